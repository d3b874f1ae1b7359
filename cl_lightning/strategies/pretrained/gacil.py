"""G-ACIL, Generalized Analytic Continual Learning (Zhuang et al., NeurIPS 2024, arXiv:2403.15706).

Ridge regression on a fixed random expansion of the features of a frozen backbone f, updated with each task:

    phi = ReLU(P^T f(x)),   R = (sum phi phi^T + r I)^-1,   W = R sum phi y^T
    per batch (X rows of phi, Y one-hot):  K = (I + X R X^T)^-1,  R <- R - R X^T K X R,  W <- W + R X^T (Y - X W)

for any classes in the batch. At any time W is the joint solution over all samples so far, also if classes recur in
later tasks. r -> ridge. P ~ U(-1/sqrt(d), 1/sqrt(d)) for d features, the initial weights of ``nn.Linear``, with
``projection`` columns: the ridges of the paper belong to this scale. If no class recurs, G-ACIL is ACIL (Zhuang et al.,
NeurIPS 2022). Each image is used once, without augmentation, when its task ends: predictions within a task, which the
paper also scores (A_AUC), are therefore the predictions after the task before.
Departs from the algorithm box of the paper, which initialises R = r I: here R = I / r, as in its text and its code.
Departs from the published run, whose code updates R and W three times with each batch of the stream, as it arrives, and
computes the rows of phi again for each update, from images that its training transform normalises and crops. Three
updates with equal rows are a ridge of r / 3.
For a backbone that is trained on the first task and then frozen, use ``ACIL``.
"""

import functools
from typing import Any, Literal

from cl_lightning.models import RidgeHead
from cl_lightning.strategy import ContinualStrategy, Phase, Task, Traits


class GACIL(ContinualStrategy):
    """Recursive ridge regression on a frozen backbone, equal to joint ridge regression on the data of all tasks.

    Args:
        ridge: r, above 0: 100 in the paper for a ViT, 0.1 for a CNN.
        projection: Number of random features: 5,000 in the paper for a ViT, 8,192 or 16,384 for a CNN; None to use the
            features of the backbone.
        backend: ``recursive``, or ``accumulate`` for sums that are solved once per task, with the same result.
        kwargs: Options of the base class.
    """

    traits = Traits(family="pretrained", paper="Zhuang et al., NeurIPS 2024, arXiv:2403.15706", needs_pretrained=True)

    def __init__(
        self,
        *,
        ridge: float = 100.0,
        projection: int | None = 5000,
        backend: Literal["accumulate", "recursive"] = "recursive",
        **kwargs: Any,
    ) -> None:
        head = functools.partial(RidgeHead, ridge=ridge, projection=projection, init="uniform", backend=backend)
        head(1)  # so that an option out of range raises here, not when the network is built
        super().__init__(head=head, loss_classes="all", freeze_backbone=True, **kwargs)

    def phases(self, task: Task) -> list[Phase]:
        return []
