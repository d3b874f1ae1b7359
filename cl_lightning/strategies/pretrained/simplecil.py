"""SimpleCIL (Zhou et al., IJCV 2024, arXiv:2303.07338): class means of a pretrained backbone that is never trained.

    mu_c = 1/n_c sum_{y_i = c} f(x_i),   score_c(x) = cos(f(x), mu_c)

Means are taken over features that are not normalised, of un-augmented images; classes without samples are never
predicted. With ``metric="euclidean"`` this is the nearest mean classifier (NMC: Janson et al., 2022, arXiv:2210.04428),
``score_c = -||f(x) - mu_c||^2``; we could not check in the paper whether it normalises features. The result does not
depend on the order of the classes or on their split into tasks.
"""

import functools
from typing import Any

from cl_lightning.checks import one_of
from cl_lightning.memory import Metric, PrototypeHead
from cl_lightning.strategy import ContinualStrategy, Phase, Task, Traits


class SimpleCIL(ContinualStrategy):
    """Nearest class mean in the features of a frozen pretrained backbone, without training.

    Args:
        metric: ``cosine``, or ``euclidean`` for NMC.
        kwargs: Options of the base class.
    """

    traits = Traits(family="pretrained", paper="Zhou et al., IJCV 2024, arXiv:2303.07338", needs_pretrained=True)

    def __init__(self, *, metric: Metric = "cosine", **kwargs: Any) -> None:
        one_of(self, ("cosine", "euclidean"), metric=metric)
        head = functools.partial(PrototypeHead, metric=metric)
        super().__init__(head=head, loss_classes="all", freeze_backbone=True, **kwargs)

    def phases(self, task: Task) -> list[Phase]:
        return []
