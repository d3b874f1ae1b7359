"""Regenerative regularisation: weights are drawn towards their first values."""

from torch import Tensor

from cl_lightning.callbacks._initial import InitialPenalty


class L2Init(InitialPenalty):
    """Adds the squared distance of all weights from their first values to the loss of any strategy.

    The term ``l2_init`` is ``lambda sum_j (theta_j - theta0_j)^2`` (Kumar et al., CoLLAs 2025, arXiv:2308.11958).
    lambda -> weight. ``ImportancePenalty(estimator="l2")`` penalises changes from the weights after the previous task
    instead.

    Args:
        weight: lambda, at least 0; with 0 no term is added.
    """

    paper: str = "Kumar et al., CoLLAs 2025, arXiv:2308.11958"
    term = "l2_init"

    def __init__(self, *, weight: float = 1e-3) -> None:
        super().__init__(weight=weight)

    def kept(self, value: Tensor) -> Tensor | None:
        return value

    def penalty(self, weight: Tensor, first: Tensor) -> Tensor:
        return (weight - first).square().sum()
