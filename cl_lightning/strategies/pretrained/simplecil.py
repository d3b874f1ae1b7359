"""SimpleCIL (Zhou et al., IJCV 2024, arXiv:2303.07338): class means of a pretrained backbone that is never trained.

    mu_c = 1/n_c sum_{y_i = c} f(x_i),   score_c(x) = cos(f(x), mu_c)

Means are those of raw features, of un-augmented images; classes without samples are never predicted. With
``metric="euclidean"`` it is the nearest mean classifier (NMC: Janson et al., 2022, arXiv:2210.04428; that its features
are not normalised is our choice, the paper was not at hand), ``score_c = -||f(x) - mu_c||^2``. Nothing depends on the
order of the classes or on how they are dealt out over tasks.
"""

import functools
from typing import Any, ClassVar

from cl_lightning.heads import PrototypeHead
from cl_lightning.prototypes import Metric
from cl_lightning.strategy import ContinualStrategy, Phase
from cl_lightning.stream import Task


class SimpleCIL(ContinualStrategy):
    """Nearest class mean on a frozen backbone, without any training.

    Args:
        metric: ``cosine``, or ``euclidean`` for NMC.
        kwargs: Of the base.
    """

    family: ClassVar[str] = "pretrained"
    paper: ClassVar[str] = "Zhou et al., IJCV 2024, arXiv:2303.07338"
    needs_pretrained: ClassVar[bool] = True
    plain_first_task = False

    def __init__(self, *, metric: Metric = "cosine", **kwargs: Any) -> None:
        if metric not in ("cosine", "euclidean"):
            raise ValueError(f"SimpleCIL: metric is {metric!r}; use cosine or euclidean")
        head = functools.partial(PrototypeHead, metric=metric)
        super().__init__(head=head, visible="all", freeze_backbone=True, **kwargs)

    def phases(self, task: Task) -> list[Phase]:
        return []
