"""Regularisation towards the initial weights: their distribution (Wasserstein), or each of them (L2 init)."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from cl_lightning.batch import Batch
from cl_lightning.callback import ContinualCallback
from cl_lightning.checks import at_least
from cl_lightning.losses import full_precision
from cl_lightning.models import Output

if TYPE_CHECKING:
    from cl_lightning.strategy import ContinualStrategy


def wasserstein_to(weight: Tensor, initial: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance between the values of two tensors of n values, a scalar.

    It is ``1/n sum_i (sort(w)_i - sort(w0)_i)^2``. Its gradient is ``2/n (w_i - sort(w0)_rank(i))``.

    Args:
        weight: w, of any shape.
        initial: Sorted values of w0, ``(n,)``.
    """
    return (weight.flatten().sort().values - initial).square().mean()


class _FromInitial(ContinualCallback):
    """Base class of penalties on the distance from the initial weights, which it keeps.

    Args:
        weight: lambda, at least 0; with 0 no term is added.
    """

    term: str
    """Name of the term of the loss."""

    def __init__(self, *, weight: float) -> None:
        at_least(self, 0, weight=weight)
        self.weight = weight
        self.initial: dict[str, Tensor] = {}
        """What is kept of the first value of each parameter, by its name."""

    @abstractmethod
    def kept(self, value: Tensor) -> Tensor:
        """What is kept of an initial value."""

    @abstractmethod
    def distance(self, value: Tensor, initial: Tensor) -> Tensor:
        """Distance of a value from what was kept, a scalar."""

    @torch.no_grad()
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        network: Any = pl_module.network
        self.remember(network)

    @torch.no_grad()
    def remember(self, network: nn.Module) -> None:
        """Keep the values of parameters that are new, or have changed their size, since the last call."""
        for name, value in network.named_parameters():
            initial = self.initial.get(name)
            if initial is None or initial.numel() != value.numel():
                initial = self.kept(full_precision(value.detach())).clone()
            self.initial[name] = initial.to(value.device)

    def losses(self, strategy: "ContinualStrategy", batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.weight == 0:
            return {}
        distances = [
            self.distance(full_precision(value), self.initial[name])
            for name, value in strategy.network.named_parameters()
            if value.requires_grad
        ]
        return {self.term: self.weight * torch.stack(distances).sum()}

    def bytes_kept(self) -> dict[str, int]:
        return {"initial weights": sum(value.numel() * value.element_size() for value in self.initial.values())}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.initial)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.initial = dict(state_dict)


class WassersteinRegularization(_FromInitial):
    """Penalty on the distance between the distribution of the weights of each tensor and the initial one.

    With W_l the n weights of tensor l and W_l^0 their first values, the term ``wasserstein`` is added to the loss:

        lambda sum_l 1/n sum_i ( sort(vec W_l)_i - sort(vec W_l^0)_i )^2

    the squared 2-Wasserstein distance (Lewandowski et al., first version of arXiv:2406.06811). lambda -> weight.
    Weights may change places at no cost, so it restricts less than :class:`L2Init`: it is never larger than the mean
    of the squared changes. All trained parameters take part, biases too, and lambda is 1; both are our choice. The
    first values of new classes are the ones with which their task begins.

    Args:
        weight: lambda, at least 0; with 0 no term is added.
    """

    paper: str = "Lewandowski et al., arXiv:2406.06811v1"
    term = "wasserstein"

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__(weight=weight)

    def kept(self, value: Tensor) -> Tensor:
        return value.flatten().sort().values

    def distance(self, value: Tensor, initial: Tensor) -> Tensor:
        return wasserstein_to(value, initial)


class L2Init(_FromInitial):
    """Squared distance from the initial weights, in place of the distance from 0 of weight decay.

    With theta the trained parameters and theta_0 their first values, the term ``l2_init`` is added to the loss of any
    strategy:

        lambda || theta - theta_0 ||^2

    (Kumar, Marklund & Van Roy, "Maintaining Plasticity in Continual Learning via Regenerative Regularization",
    arXiv:2308.11958). lambda -> weight. The first values of new classes are the ones with which their task begins.

    Args:
        weight: lambda, at least 0; with 0 no term is added. Usual values are 1e-5 to 1e-2; the default is our choice.
    """

    paper: str = "Kumar et al., arXiv:2308.11958"
    term = "l2_init"

    def __init__(self, *, weight: float = 1e-3) -> None:
        super().__init__(weight=weight)

    def kept(self, value: Tensor) -> Tensor:
        return value.flatten()

    def distance(self, value: Tensor, initial: Tensor) -> Tensor:
        return (value.flatten() - initial).square().sum()
