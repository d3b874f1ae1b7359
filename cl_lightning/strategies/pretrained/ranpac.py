"""RanPAC (McDonnell et al., NeurIPS 2023, arXiv:2307.02251): random projection and ridge regression.

A pretrained backbone is adapted to the first task as in ``APER`` (phase 1; ``adapt=False`` leaves it out) and frozen.
Its features h are projected by a fixed random matrix P ~ N(0, 1) with M columns, and regressed on:

    phi = ReLU(P^T h),   G = sum phi phi^T,   Q = sum phi y^T,   W = (G + lambda I)^-1 Q,   scores W^T phi

over all samples so far. M -> projection. lambda -> ridge: of a list, after each task the one of the least square error
on a fifth of its samples (``RidgeHead``), so noisy where tasks are small. Only adapted features are used.
Departs from the code: the held-out samples are drawn, and one eigendecomposition serves all candidates.
"""

import functools
from typing import Any, ClassVar

from cl_lightning.closed_form import RidgeHead
from cl_lightning.peft import SSF, Adapter, PeftFactory
from cl_lightning.strategies.pretrained.first_session import FirstSessionAdaptation


class RanPAC(FirstSessionAdaptation):
    """Adaptation to the first task, then ridge regression on random features.

    Args:
        peft: What is put into the backbone; None for ``Adapter``.
        projection: M, 10,000 in the paper, which takes 800 MB for G; None to take the features as they are.
        ridge: lambda, above 0, or a list of candidates; None for 10^-8 to 10^8.
        adapt: Whether the backbone is adapted to the first task.
        kwargs: Of ``FirstSessionAdaptation``.
    """

    paper: ClassVar[str] = "McDonnell et al., NeurIPS 2023, arXiv:2307.02251"

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
        head(1)  # so that a mistake is told now
        super().__init__(peft=peft or Adapter, head=head, concatenate=False, adapt=adapt, **kwargs)

    @classmethod
    def conformance_options(cls) -> dict[str, Any]:
        return {"peft": SSF, "projection": 40, "ridge": [0.1, 10.0, 1000.0]}
