"""Wasserstein regularisation: the distribution of the weights of a layer stays near the initial one."""

from torch import Tensor

from cl_lightning.callbacks._initial import InitialPenalty
from cl_lightning.losses import full_precision


class WassersteinRegularization(InitialPenalty):
    """Adds the squared 2-Wasserstein distance of each layer's weights from their initial distribution to the loss.

    The term ``wasserstein`` is

        lambda sum_l mean_i ( sort(W_l)_i - sort(W0_l)_i )^2

    over matrices and kernels (Lewandowski et al., first version of arXiv:2406.06811). lambda -> weight. It is 0 for any
    permutation of the initial weights, and never larger than the mean squared distance from them.

    Args:
        weight: lambda, at least 0; with 0 no term is added.
    """

    paper: str = "Lewandowski et al., arXiv:2406.06811v1"
    term = "wasserstein"

    def __init__(self, *, weight: float = 1e-2) -> None:
        super().__init__(weight=weight)

    def kept(self, value: Tensor) -> Tensor | None:
        return value.flatten().sort().values if value.dim() > 1 else None

    def penalty(self, weight: Tensor, first: Tensor) -> Tensor:
        return (full_precision(weight).flatten().sort().values - first).square().mean()
