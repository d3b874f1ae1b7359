"""Joint training on the data of all tasks so far: the upper bound of continual learning.

At each task the network f is trained by cross-entropy on the union of the data of all tasks so far:

    L(x, y) = CE(f(x), y)

By default training starts from the weights after the previous task ("incremental joint" of the survey by Masana et al.,
TPAMI 2022, arXiv:2010.15277). With ``from_scratch`` the network is initialised again at each task, so that each row of
the accuracy matrix is the result of ordinary training. The number of epochs per task is fixed, so later tasks take more
steps.
"""

from typing import Any

from torch import Tensor

from cl_lightning.batch import Batch
from cl_lightning.data import TARGET_KINDS
from cl_lightning.models import Output
from cl_lightning.strategies.base import start_again
from cl_lightning.strategy import ContinualStrategy, Traits
from cl_lightning.stream import Task


class Joint(ContinualStrategy):
    """Cross-entropy on the data of all tasks so far.

    Args:
        from_scratch: Whether the network is initialised again at each task.
        kwargs: Options of the base class; ``loss_classes`` is ``all`` or ``task``.
    """

    traits = Traits(
        family="baseline", paper="upper bound", needs_all_data=True, targets=TARGET_KINDS, losses_use_images=False
    )

    def __init__(self, *, from_scratch: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.loss_classes == "current":
            raise ValueError("Joint: loss_classes is 'current', but it trains on all tasks; use 'all' or 'task'")
        self.from_scratch = from_scratch

    def begin_task(self, task: Task) -> None:
        if self.from_scratch and not task.is_first:
            start_again(self)
        super().begin_task(task)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": self.classification_loss(output, batch)}
