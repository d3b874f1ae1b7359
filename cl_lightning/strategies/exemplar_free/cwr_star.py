"""Copy Weights with Re-init, CWR* (Lomonaco, Maltoni & Pellegrini, CVPR-W 2020, arXiv:1907.03799).

The backbone is trained in the first task and frozen afterwards. Each class has two rows of a linear classifier without
bias: tw_c is trained, cw_c predicts. With n_c the number of samples of class c in the task, and N_c in earlier tasks,

    before a task    tw_c <- cw_c  for the classes of the task that have been seen before,  0 for all others
    in a task        CE(W f(x), y)  over the rows tw
    after a task     cw_c <- ( r_c cw_c + tw_c - mean(tw) ) / ( r_c + 1 ),   r_c = sqrt(N_c / n_c),   N_c <- N_c + n_c
                     for the classes of the task                                                            alg. 3

where the mean is one number, over all entries of the rows of the task. The softmax is over all classes seen so far, as
in the authors' code, so that the rows of absent classes, which start at 0 and are discarded, give a common level;
``loss_classes="current"`` restricts it to the classes of the task.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cl_lightning.models import ConsolidatedHead, head_as
from cl_lightning.strategy import Batch, ContinualStrategy, HeadFactory, Output, Task, Traits


class CWRStar(ContinualStrategy):
    """Frozen backbone after the first task, and rows that are trained per task, then averaged with the earlier ones.

    Args:
        head: Builds the classifier, a ``ConsolidatedHead``; None for it.
        kwargs: Options of the base class.
    """

    traits = Traits(
        family="exemplar-free",
        paper="Lomonaco et al., CVPR-W 2020, arXiv:1907.03799",
        losses_use_images=False,
    )

    def __init__(self, *, head: HeadFactory | None = None, **kwargs: Any) -> None:
        super().__init__(head=head or ConsolidatedHead, **kwargs)

    @property
    def head(self) -> ConsolidatedHead:
        """The head of the network.

        Raises:
            ValueError: If it is no ``ConsolidatedHead``.
        """
        return head_as(self.network, ConsolidatedHead, self, "which has consolidated rows")

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.head.begin(self.trained_columns())

    def trained_columns(self) -> Tensor:
        """Classes whose rows are trained in the task, bool ``(columns,)``."""
        return self.task_columns[-1]

    def counts(self) -> Tensor:
        """Number of samples of each class in the task, over all processes, int64 ``(columns,)``."""
        return self.data.labels().bincount(minlength=self.head.num_columns)

    def frozen(self) -> Iterable[nn.Module]:
        return super().frozen() if self.task.is_first else [self.network.backbone]

    @property
    def backbone_is_final(self) -> bool:
        return self.freeze_backbone or not self.task.is_first

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": self.classification_loss(output, batch)}

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        super().end_task(task)
        self.head.end(self.counts())
