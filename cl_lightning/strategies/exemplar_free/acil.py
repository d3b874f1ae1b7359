"""ACIL: Analytic Class-Incremental Learning (Zhuang et al., NeurIPS 2022, arXiv:2205.14922).

The backbone f is trained by cross-entropy on the first task, under a linear classifier that is then removed, and
frozen. A fixed random expansion of its features is regressed on one-hot labels, first on the samples of the first task
again (re-alignment) and then on each further task:

    phi = ReLU(P^T f(x)),   R = (sum phi phi^T + r I)^-1,   W = R sum phi y^T
    per batch (X rows of phi, Y one-hot):  K = (I + X R X^T)^-1,  R <- R - R X^T K X R,  W <- W + R X^T (Y - X W)

W equals the joint regression on the samples of all tasks. r -> ridge; P ~ U(-1/sqrt(d), 1/sqrt(d)), the initial weights
of ``nn.Linear``, with ``projection`` columns. Where classes recur in later tasks this is G-ACIL, the same method with a
further term; ACIL itself is for disjoint tasks. On a pretrained backbone without training on the first task
(``adapt=False``) it is ``GACIL``.
Departs from the code, which selects the epoch of the first task by its test accuracy: here the last epoch is used.
"""

import functools
from typing import Any, Literal

from cl_lightning.models import LinearHead, RidgeHead
from cl_lightning.strategies.pretrained.first_session import FirstSessionAdaptation
from cl_lightning.strategy import HeadFactory


class ACIL(FirstSessionAdaptation):
    """Recursive ridge regression on random features of a backbone that is trained on the first task and then frozen.

    Args:
        ridge: r, above 0.
        projection: Number of random features: 8,192 in the paper for CIFAR-100, 16,384 for ImageNet; None to use the
            features of the backbone.
        backend: ``recursive``, or ``accumulate`` for sums that are solved once per task, with the same result.
        session_head: Builds the classifier of the first task; None for ``LinearHead``.
        kwargs: Options of ``FirstSessionAdaptation``.
    """

    traits = FirstSessionAdaptation.traits.but(
        family="exemplar-free", paper="Zhuang et al., NeurIPS 2022, arXiv:2205.14922", needs_pretrained=False
    )

    def __init__(
        self,
        *,
        ridge: float = 0.1,
        projection: int | None = 8192,
        backend: Literal["accumulate", "recursive"] = "recursive",
        session_head: HeadFactory | None = None,
        **kwargs: Any,
    ) -> None:
        head = functools.partial(RidgeHead, ridge=ridge, projection=projection, init="uniform", backend=backend)
        head(1)  # so that an option out of range raises here, not when the network is built
        super().__init__(head=head, session_head=session_head or LinearHead, **kwargs)
