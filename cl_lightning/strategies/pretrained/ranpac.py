"""RanPAC (McDonnell et al., NeurIPS 2023, arXiv:2307.02251): random projection and ridge regression.

A pretrained backbone is adapted to the first task as in ``APER`` (phase 1; ``adapt=False`` leaves it out) and frozen.
Its features h are projected by a fixed random matrix P ~ N(0, 1) with M columns; ridge regression predicts one-hot y:

    phi = ReLU(P^T h),   G = sum phi phi^T,   Q = sum phi y^T,   W = (G + lambda I)^-1 Q,   scores W^T phi

with sums over all samples so far. M -> projection. lambda -> ridge: after each task the value of a list with the
smallest squared error on a held-out fifth of the samples of the task (``RidgeHead``); the choice is noisy for small
tasks. Only adapted features are used.
Departs from the code: the held-out samples are drawn at random, and one eigendecomposition serves all candidates.
"""

import functools
from typing import Any

from cl_lightning.models import Adapter, PeftFactory, RidgeHead
from cl_lightning.strategies.pretrained.first_session import FirstSessionAdaptation


class RanPAC(FirstSessionAdaptation):
    """Adaptation to the first task, and ridge regression on random projections of the features.

    Args:
        peft: Builds the module for the backbone; None for ``Adapter``.
        projection: M: 10,000 in the paper, with 800 MB for G; None to use the features without a projection.
        ridge: lambda, above 0, or a list of candidates; None for the powers of 10 from 10^-8 to 10^8.
        adapt: Whether the backbone is adapted to the first task.
        kwargs: Options of ``FirstSessionAdaptation``.
    """

    traits = FirstSessionAdaptation.traits.but(paper="McDonnell et al., NeurIPS 2023, arXiv:2307.02251")

    def __init__(
        self,
        *,
        peft: PeftFactory | None = None,
        projection: int | None = 10000,
        ridge: float | list[float] | None = None,
        adapt: bool = True,
        **kwargs: Any,
    ) -> None:
        ridge = [10.0**power for power in range(-8, 9)] if ridge is None else ridge
        head = functools.partial(RidgeHead, ridge=ridge, projection=projection)
        head(1)  # so that an option out of range raises here, not when the network is built
        super().__init__(peft=peft or Adapter, head=head, concatenate=False, adapt=adapt, **kwargs)
