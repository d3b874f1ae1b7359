"""G-ACIL, Generalized Analytic Continual Learning (Zhuang et al., NeurIPS 2024, arXiv:2403.15706).

Ridge regression on a fixed random expansion of the features of a frozen backbone f, brought up to date with each task:

    phi = ReLU(P^T f(x)),   R = (sum phi phi^T + r I)^-1,   W = R sum phi y^T
    per batch (X rows of phi, Y one-hot):  K = (I + X R X^T)^-1,  R <- R - R X^T K X R,  W <- W + R X^T (Y - X W)

whatever the classes in the batch: it is at any time the joint solution over all samples so far, for classes that come
again too. r -> ridge, P ~ N(0, 1) with ``projection`` columns. For classes that never come again it is ACIL (Zhuang et
al., NeurIPS 2022). Each image is seen once, without augmentation, when its task ends: predictions within a task, which
the paper also scores (A_AUC), are those of the tasks before.
Departs from the paper: R begins as I / r (as defined there and in the code; the algorithm box has r I).
A backbone that is trained on the first task and then frozen: ``FirstSessionAdaptation`` with ``RidgeHead``.
"""

import functools
from typing import Any, ClassVar, Literal

from cl_lightning.closed_form import RidgeHead
from cl_lightning.strategy import ContinualStrategy, Phase
from cl_lightning.stream import Task


class GACIL(ContinualStrategy):
    """Recursive ridge regression on a frozen backbone, equal to the regression on all data at once.

    Args:
        ridge: r, above 0. The default is the paper's for a ViT; it takes 0.1 for a CNN.
        projection: Number of random features, 5,000 in the paper for a ViT, 8,192 or 16,384 for a CNN; None for none.
        backend: ``recursive``, or ``accumulate``: sums, solved once a task; the same result.
        kwargs: Of the base.
    """

    family: ClassVar[str] = "pretrained"
    paper: ClassVar[str] = "Zhuang et al., NeurIPS 2024, arXiv:2403.15706"
    needs_pretrained: ClassVar[bool] = True
    plain_first_task = False

    def __init__(
        self,
        *,
        ridge: float = 100.0,
        projection: int | None = 5000,
        backend: Literal["accumulate", "recursive"] = "recursive",
        **kwargs: Any,
    ) -> None:
        head = functools.partial(RidgeHead, ridge=ridge, projection=projection, backend=backend)
        head(1)  # so that a mistake is told now
        super().__init__(head=head, visible="all", freeze_backbone=True, **kwargs)

    @classmethod
    def conformance_options(cls) -> dict[str, Any]:
        return {"projection": 40}

    def phases(self, task: Task) -> list[Phase]:
        return []
