"""Continual backpropagation: units of little use are replaced by fresh ones."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from cl_lightning.batch import Batch, mix
from cl_lightning.callback import ContinualCallback
from cl_lightning.checks import at_least, within
from cl_lightning.distributed import all_sum

_FRESH = 0xCB9  # salt of new weights
_MAPS = (nn.Linear, nn.Conv1d, nn.Conv2d)
# Modules between two layers that keep the order of units.
_BETWEEN = (
    *(nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.Dropout, nn.Dropout2d, nn.Identity),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.modules.batchnorm._BatchNorm),
)


@dataclass
class Units:
    """The units of a layer, and the layers that take their activations.

    Attributes:
        name: Name of the layer in the network.
        layer: Linear layer or convolution whose outputs the units are.
        norm: Batch normalisation after it, or None.
        takers: Layers whose inputs are the activations of the units.
    """

    name: str
    layer: Any
    norm: Any
    takers: list[Any]

    def __len__(self) -> int:
        return len(self.layer.weight)

    def are_trained(self) -> bool:
        """Whether the weights before and after the units are trained."""
        return all(layer.weight.requires_grad for layer in (self.layer, *self.takers))


def units_of(network: nn.Module, head: Sequence[nn.Module]) -> list[Units]:
    """Hidden units of the chains of layers of a network, in order.

    A chain is an ``nn.Sequential`` whose layers follow each other, with activations, dropout, pooling and batch
    normalisation between them; the last units of the backbone are taken by the head.

    Args:
        network: The network; its backbone is searched for chains.
        head: Linear layers that take the features, which are the units of the last layer of a chain that ends the
            backbone.
    """
    found: list[Units] = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Sequential):
            found += _of_chain(name, module, head if _ends(network, module) else ())
    return [units for units in found if units.takers]


def _ends(network: nn.Module, chain: nn.Sequential) -> bool:
    """Whether the outputs of a chain are the features: its last layer has their number and no later layer follows."""
    maps = [module for module in network.backbone.modules() if isinstance(module, _MAPS)]  # type: ignore[union-attr]
    own = [module for module in chain if isinstance(module, _MAPS)]
    return bool(own) and own[-1] is maps[-1]


def _of_chain(name: str, chain: nn.Sequential, head: Sequence[nn.Module]) -> Iterator[Units]:
    last: Units | None = None
    for place, module in chain.named_children():
        if isinstance(module, _MAPS):
            if last is not None:
                last.takers = [module]
                yield last
            groups = getattr(module, "groups", 1)
            last = Units(f"{name}.{place}", module, None, []) if groups == 1 else None
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and last is not None:
            last.norm = module
        elif not isinstance(module, _BETWEEN):
            last = None
    if last is not None and head:
        last.takers = list(head)
        yield last


def activity(activations: Tensor, units: int) -> Tensor:
    """Sum over rows of |h_i|, the mean over the places of a map, ``(units,)``.

    Args:
        activations: Inputs of the layers that take the units, ``(B, units, ...)`` or flattened, ``(B, units *
            places)``, with B at least 1.
        units: Number of units.
    """
    return activations.detach().float().abs().reshape(len(activations), units, -1).mean(2).sum(0)


def outgoing_size(takers: Sequence[Any], units: int) -> Tensor:
    """Sum of the absolute outgoing weights of each unit, ``(units,)``.

    Args:
        takers: Layers that take the units.
        units: Number of units.
    """
    return torch.stack([_by_unit(x.weight.detach().float(), units).abs().sum((0, 2)) for x in takers]).sum(0)


def _by_unit(weight: Tensor, units: int) -> Tensor:
    """Weights of a layer by the unit that they take, ``(outputs, units, rest)``: a view."""
    return weight.view(len(weight), units, -1)


class ContinualBackprop(ContinualCallback):
    """Replaces a small share of mature units of little utility at each step, in any strategy.

    For the units i of each hidden layer, with activations h and outgoing weights w, after each step

        u_i <- eta u_i + (1 - eta) mean |h_i| sum_k |w_ik|,   a_i <- a_i + 1

    Of the n units with age a > maturity, ``n rate`` are replaced, counted over the steps: those of the smallest
    ``u_i / (1 - eta^a_i)``. A replaced unit gets incoming weights from their initial distribution and outgoing weights
    0, u = 0 and a = 0 (Dohare et al., Nature 2024, arXiv:2306.13812). eta -> decay, rho -> rate. The state of the
    optimizer for all these weights is set to 0, whatever the optimizer; a batch normalisation between gets scale 1,
    shift 0 and its initial statistics for the unit.

    Initial weights are drawn as torch's layers draw them, U(-1/sqrt(fan in), 1/sqrt(fan in)), with bias 0. The mean is
    over the samples of the step and the places of a map. Layers of ``nn.Sequential`` chains are covered, as in ``MLP``
    and ``ConvNet``; residual networks have none and are refused. Replaced units are the same on every process.

    Args:
        rate: rho, share of the mature units replaced at each step, in [0, 1]; with 0 nothing changes.
        decay: eta, in [0, 1).
        maturity: Number of steps before a unit may be replaced, at least 0.
    """

    paper: str = "Dohare et al., Nature 2024, arXiv:2306.13812"

    def __init__(self, *, rate: float = 1e-4, decay: float = 0.99, maturity: int = 100) -> None:
        within(self, "[0, 1]", rate=rate)
        within(self, "[0, 1)", decay=decay)
        at_least(self, 0, maturity=maturity)
        self.rate, self.decay, self.maturity = rate, decay, maturity
        self.utility: dict[str, Tensor] = {}
        self.age: dict[str, Tensor] = {}
        self.due: dict[str, float] = {}  # units to be replaced, summed over the steps
        self.replaced: dict[str, int] = {}
        self._units: list[Units] = []
        self._seen: dict[str, Tensor] = {}
        self._rows: dict[str, int] = {}
        self._hooks: list[Any] = []
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove()
        if self.rate == 0:
            return
        network: Any = pl_module.network
        blocks = [block for block in getattr(network.head, "blocks", ()) if isinstance(block, nn.Linear)]
        self._units = [units for units in units_of(network, blocks) if units.are_trained()]
        if not self._units:
            raise ValueError(
                f"ContinualBackprop: {type(network.backbone).__name__} has no trained chain of layers; use MLP, "
                "ConvNet or another nn.Sequential"
            )
        self._step = trainer.global_step
        for units in self._units:
            device = units.layer.weight.device
            for kept in (self.utility, self.age):
                value = kept.get(units.name)
                kept[units.name] = torch.zeros(len(units)) if value is None or len(value) != len(units) else value
                kept[units.name] = kept[units.name].to(device)
            self._hooks.append(units.takers[0].register_forward_pre_hook(self._note(units, pl_module)))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if not self._units or trainer.global_step == self._step:  # gradients are being accumulated
            return
        self._step = trainer.global_step
        strategy: Any = pl_module
        self.update(trainer.optimizers, mix(strategy.seed, _FRESH, trainer.global_step))

    @torch.no_grad()
    def update(self, optimizers: list[Any], key: int) -> None:
        """Update utilities and ages after a step, and replace units.

        Args:
            optimizers: Their state for the weights of replaced units is set to 0.
            key: Seed of the new weights, the same on every process.
        """
        sizes = [len(units) for units in self._units]
        sums = [
            self._seen.get(units.name, torch.zeros(len(units), device=units.layer.weight.device))
            for units in self._units
        ]
        counts = torch.tensor([float(self._rows.get(units.name, 0)) for units in self._units], device=sums[0].device)
        joint = all_sum(torch.cat([*sums, counts]))
        self._seen, self._rows = {}, {}
        parts, rows = torch.split(joint[: sum(sizes)], sizes), joint[sum(sizes) :]
        for place, units in enumerate(self._units):
            name, mean = units.name, parts[place] / rows[place].clamp(min=1)
            self.utility[name].lerp_(mean * outgoing_size(units.takers, len(units)), 1 - self.decay)
            self.age[name].add_(1)
            mature = self.age[name] > self.maturity
            number = int(mature.sum())  # synchronises, as the choice below does
            self.due[name] = self.due.get(name, 0.0) + self.rate * number
            if (count := min(int(self.due[name]), number)) == 0:
                continue
            self.due[name] -= count
            corrected = self.utility[name] / (1 - self.decay ** self.age[name])
            chosen = corrected.masked_fill(~mature, torch.inf).argsort(stable=True)[:count]
            self._replace(units, chosen, optimizers, mix(key, place))
            self.utility[name][chosen], self.age[name][chosen] = 0.0, 0.0
            self.replaced[name] = self.replaced.get(name, 0) + count

    @torch.no_grad()
    def _replace(self, units: Units, chosen: Tensor, optimizers: list[Any], key: int) -> None:
        weight = units.layer.weight
        bound = weight[0].numel() ** -0.5
        generator = torch.Generator().manual_seed(key)
        fresh = torch.rand((len(chosen), *weight.shape[1:]), generator=generator) * 2 * bound - bound
        weight[chosen] = fresh.to(weight)
        changed: list[tuple[Tensor, Any]] = [(weight, chosen)]
        if units.layer.bias is not None:
            units.layer.bias[chosen] = 0.0
            changed.append((units.layer.bias, chosen))
        if units.norm is not None:
            for tensor, value in ((units.norm.weight, 1.0), (units.norm.bias, 0.0)):
                if tensor is not None:
                    tensor[chosen] = value
                    changed.append((tensor, chosen))
            if units.norm.running_mean is not None:
                units.norm.running_mean[chosen], units.norm.running_var[chosen] = 0.0, 1.0
        for layer in units.takers:
            _by_unit(layer.weight, len(units))[:, chosen] = 0.0
        for optimizer in optimizers:
            for tensor, rows in changed:
                for state in _states(optimizer, tensor):
                    state[rows] = 0.0
            for layer in units.takers:
                for state in _states(optimizer, layer.weight):
                    _by_unit(state, len(units))[:, chosen] = 0.0

    def _note(self, units: Units, strategy: Any) -> Any:
        """A hook that sums the activations of a forward pass in training."""

        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if strategy.training and torch.is_grad_enabled() and len(args[0]):
                rows = activity(args[0], len(units))
                self._seen[units.name] = self._seen[units.name] + rows if units.name in self._seen else rows
                self._rows[units.name] = self._rows.get(units.name, 0) + len(args[0])

        return note

    def _remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._units, self._seen, self._rows = [], [], {}, {}

    def bytes_kept(self) -> dict[str, int]:
        return {"statistics": sum(x.nbytes for kept in (self.utility, self.age) for x in kept.values())}

    def results(self) -> dict[str, Any]:
        return {"replaced": dict(self.replaced)} if self.replaced else {}

    def state_dict(self) -> dict[str, Any]:
        kept = {key: {n: x.cpu() for n, x in getattr(self, key).items()} for key in ("utility", "age")}
        return {**kept, "due": dict(self.due), "replaced": dict(self.replaced)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.utility, self.age = dict(state_dict["utility"]), dict(state_dict["age"])
        self.due, self.replaced = dict(state_dict["due"]), dict(state_dict["replaced"])


def _states(optimizer: Any, tensor: Tensor) -> Iterator[Tensor]:
    """Tensors of an optimizer's state that have the shape of a weight."""
    for value in optimizer.state.get(tensor, {}).values():
        if isinstance(value, Tensor) and value.shape == tensor.shape:
            yield value
