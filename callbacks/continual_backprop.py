"""Continual backprop: hidden units of low utility are replaced by new ones while the network is trained."""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from cl_lightning.batch import Batch, Draw
from cl_lightning.callback import ContinualCallback
from cl_lightning.checks import at_least, one_of, within
from cl_lightning.distributed import all_sum
from cl_lightning.losses import full_precision
from cl_lightning.models import BasicBlock, Head, Network
from cl_lightning.stream import Task

if TYPE_CHECKING:
    from cl_lightning.strategy import ContinualStrategy

Utility = Literal["contribution", "adaptable"]

_UNITS = 0xCB9  # salt of the weights of new units
_WEIGHTED = nn.Linear | nn.Conv2d


class HiddenLayer(NamedTuple):
    """A layer of units that can be replaced.

    Attributes:
        name: Name of the incoming layer in the network.
        incoming: Layer that computes the units; the weight of unit j is row j.
        norm: Normalisation with a scale and a shift per unit between the incoming layer and the activation, or None.
        outgoing: Layer, or head, whose input the units are; unit j owns a block of ``n`` columns of its weights, with n
            the number of pixels of a feature map that a linear layer reads.
    """

    name: str
    incoming: nn.Linear | nn.Conv2d
    norm: nn.Module | None
    outgoing: nn.Module

    def readers(self) -> list[nn.Module]:
        """The modules with the outgoing weights: the layer itself, or the blocks of a head."""
        return list(self.outgoing.blocks) if isinstance(self.outgoing, Head) else [self.outgoing]

    def columns(self, weight: Tensor) -> Tensor:
        """View of outgoing weights ``(outputs, units, columns per unit)``."""
        return weight.view(len(weight), len(self.incoming.weight), -1)


def hidden_layers(network: Network) -> list[HiddenLayer]:
    """The layers whose units can be replaced: in chains of layers, and the inner layer of each ``BasicBlock``.

    A chain is an ``nn.Sequential`` of convolutions, linear layers, and layers without weights or with one scale per
    unit, as in ``MLP`` and ``ConvNet``. The head reads the last layer of the chain ``layers`` of the backbone.
    """
    found = []
    for name, module in network.backbone.named_modules(prefix="backbone"):
        if isinstance(module, BasicBlock):
            found.append(HiddenLayer(f"{name}.conv1", module.conv1, module.bn1, module.conv2))
        elif isinstance(module, nn.Sequential) and not any(len(list(part.children())) for part in module):
            found += _of_chain(name, module, network)
    return found


def _of_chain(name: str, chain: nn.Sequential, network: Network) -> Iterator[HiddenLayer]:
    places = [place for place, layer in enumerate(chain) if isinstance(layer, _WEIGHTED)]
    is_last = bool(places) and chain is getattr(network.backbone, "layers", None)
    for place, following in pairwise([*places, len(chain)]):
        incoming: Any = chain[place]
        if following == len(chain) and not is_last:
            continue
        outgoing: Any = network.head if following == len(chain) else chain[following]
        if getattr(outgoing, "groups", 1) > 1:
            continue
        between = chain[place + 1 : following]
        norms = [layer for layer in between if getattr(layer, "weight", None) is not None]
        yield HiddenLayer(f"{name}.{place}", incoming, norms[0] if norms else None, outgoing)


class ContinualBackprop(ContinualCallback):
    """Replaces hidden units of low utility by new units at a small rate, with any optimizer.

    After each optimizer step, unit j of a hidden layer with the activation h_j, the outgoing weights o_j and the
    incoming weights w_j has the age a_j, the mean activation f_j and the utility u_j:

        a_j <- a_j + 1,   f_j <- eta f_j + (1 - eta) mean(h_j),   u_j <- eta u_j + (1 - eta) y_j
        contribution   y_j = mean |h_j| * sum |o_j|
        adaptable      y_j = mean |h_j - f^_j| * sum |o_j| / sum |w_j|

    with means over the batch and the pixels, f^_j = f_j / (1 - eta^a_j) before the step and u^_j = u_j / (1 - eta^a_j).
    Units older than m steps are eligible. c <- c + rho * (number of eligible units), and the floor(c) of them with the
    lowest u^_j are replaced and subtracted from c (Dohare et al., "Loss of Plasticity in Deep Continual Learning",
    Nature 2024, arXiv:2108.06325). rho -> rate, m -> maturity, eta -> decay. A new unit has incoming weights drawn from
    He's uniform distribution, U(-b, b) with b = sqrt(6 / fan-in), an incoming bias of 0, and outgoing weights of 0. The
    bias of each outgoing layer gets o_j f^_j, so that its mean output stays; age, utility and mean start at 0, and the
    state of the optimizer for the weights of the unit is set to 0.

    Replaced are units of ``MLP``, of ``ConvNet`` and other chains, and of the inner layer of each residual block. A
    normalisation layer behind the incoming layer gets the scale 1, the shift 0 and the statistics 0 and 1. Where the
    outgoing layer has no bias, its output changes by o_j f^_j; normalisation removes this. The activation is what the
    outgoing layer reads, after pooling and dropout. The authors' code replaces one unit with probability rho times the
    number of eligible units; the counter c of the paper needs no random numbers. The count of steps of Adam, which all
    weights of a tensor share, stays. Layers that a phase does not train are left alone. The backbone must not be
    compiled. All processes replace the same units.

    Args:
        rate: rho, in [0, 1]; the paper uses 1e-6 to 3e-4 for wide layers.
        maturity: m, at least 0, in optimizer steps.
        decay: eta, in [0, 1).
        utility: ``contribution`` or ``adaptable``.

    Raises:
        ValueError: If an option is out of range, or, before training, if the network has no such layer.
    """

    paper: str = "Dohare et al., Nature 2024, arXiv:2108.06325"

    def __init__(
        self, *, rate: float = 1e-4, maturity: int = 100, decay: float = 0.99, utility: Utility = "contribution"
    ) -> None:
        within(self, "[0, 1]", rate=rate)
        at_least(self, 0, maturity=maturity)
        within(self, "[0, 1)", decay=decay)
        one_of(self, get_args(Utility), utility=utility)
        self.rate, self.maturity, self.decay = rate, maturity, decay
        self.utility: Utility = utility
        self.units: dict[str, dict[str, Tensor]] = {}
        """By the name of the incoming layer: ``age``, ``mean``, ``utility`` ``(units,)``, and ``counter`` and
        ``replaced``, scalars; float64."""
        self._layers: list[HiddenLayer] = []
        self._sums: dict[str, Tensor] = {}  # sums of h, of its distances, and their number, since the last step
        self._handles: list[RemovableHandle] = []
        self._step = 0

    # ------------------------------------------------------------------ activations

    def on_task_start(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        if not hidden_layers(strategy.network):
            raise ValueError(
                f"ContinualBackprop: {type(strategy.network.backbone).__name__} has no layers whose units can be "
                "replaced; use MLP, ConvNet or a ResNet of basic blocks"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step, self._sums = trainer.global_step, {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        network: Any = pl_module.network
        self._layers = [layer for layer in hidden_layers(network) if layer.incoming.weight.requires_grad]
        if self.rate:
            self._begin(self._layers)
            for layer in self._layers:
                self._handles.append(layer.outgoing.register_forward_pre_hook(self._hook(layer)))

    def _begin(self, layers: list[HiddenLayer]) -> None:
        """State of each layer, on its device."""
        for layer in layers:
            weight = layer.incoming.weight
            zeros = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
            kept = self.units.get(layer.name)
            if kept is None or kept["age"].shape != zeros.shape:
                kept = {name: zeros.clone() for name in ("age", "mean", "utility")}
                kept |= {name: zeros.new_zeros(()) for name in ("counter", "replaced")}
            self.units[layer.name] = {name: value.to(weight.device) for name, value in kept.items()}
            self._sums.setdefault(layer.name, zeros.new_zeros(3, len(weight)))

    def _hook(self, layer: HiddenLayer) -> Any:
        @torch.no_grad()
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            # (rows, units, pixels)
            h = full_precision(inputs[0]).reshape(len(inputs[0]), len(layer.incoming.weight), -1)
            centre = self._mean(layer.name)[:, None].to(h) if self.utility == "adaptable" else 0.0
            count = h.new_full((h.shape[1],), h.shape[0] * h.shape[2])
            self._sums[layer.name] += torch.stack([h.sum((0, 2)), (h - centre).abs().sum((0, 2)), count])

        return add

    def _mean(self, name: str) -> Tensor:
        """f^: bias-corrected means of the activations, 0 for units of age 0."""
        units = self.units[name]
        return units["mean"] / (1 - self.decay ** units["age"].clamp(min=1))

    # ------------------------------------------------------------------ after a step

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._release()
        if not self.rate or trainer.global_step == self._step:  # gradients are being accumulated
            return
        self._step = trainer.global_step
        strategy: Any = pl_module
        for number, layer in enumerate(self._layers):
            self.measure(layer, all_sum(self._sums.pop(layer.name)))
            chosen, certain = self.choose(layer)
            draw = Draw.of(1, strategy.seed, _UNITS, strategy.task.index, trainer.global_step, number)
            replace_units(layer, chosen, certain, self._mean(layer.name), draw, trainer.optimizers)
            for name in ("age", "mean", "utility"):
                value = self.units[layer.name][name]
                value[chosen] = value[chosen].masked_fill(certain, 0)

    def measure(self, layer: HiddenLayer, sums: Tensor) -> None:
        """Update age, mean and utility.

        Args:
            layer: The layer.
            sums: Sums of h, of ``|h|`` or ``|h - f^|``, and numbers of values, since the last step, ``(3, units)``.
        """
        units, (total, distances, count) = self.units[layer.name], sums
        seen = count.clamp(min=1)
        reading: list[Any] = layer.readers()
        outgoing = [layer.columns(reader.weight).double().abs().sum((0, 2)) for reader in reading]
        contribution = distances / seen * torch.stack(outgoing).sum(0)
        if self.utility == "adaptable":
            contribution = contribution / layer.incoming.weight.double().abs().flatten(1).sum(1).clamp(min=1e-12)
        units["age"] += 1
        units["mean"].lerp_(total / seen, 1 - self.decay)
        units["utility"].lerp_(contribution, 1 - self.decay)

    def choose(self, layer: HiddenLayer) -> tuple[Tensor, Tensor]:
        """The units that may be replaced at this step, and which of them are, without waiting for the device.

        Returns:
            Indices of the units with the lowest utility, int64 ``(k,)``, and whether each is replaced, bool ``(k,)``.
        """
        units = self.units[layer.name]
        eligible = units["age"] > self.maturity
        corrected = units["utility"] / (1 - self.decay ** units["age"].clamp(min=1))
        units["counter"] += self.rate * eligible.sum()
        number = (units["counter"] + 1e-9).floor()
        most = min(len(eligible), int(self.rate * len(eligible)) + 1)  # counter < 1 before this step
        lowest, chosen = corrected.masked_fill(~eligible, torch.inf).topk(most, largest=False)
        certain = (torch.arange(most, device=chosen.device) < number) & lowest.isfinite()
        units["counter"] -= certain.sum()
        units["replaced"] += certain.sum()
        return chosen, certain

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    # ------------------------------------------------------------------ state

    def bytes_kept(self) -> dict[str, int]:
        tensors = [value for units in self.units.values() for value in units.values()]
        return {"utilities": sum(value.numel() * value.element_size() for value in tensors)}

    def results(self) -> dict[str, Any]:
        return {"replaced": {name: int(units["replaced"]) for name, units in self.units.items()}}

    def state_dict(self) -> dict[str, Any]:
        return {name: dict(units) for name, units in self.units.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.units = {name: dict(units) for name, units in state_dict.items()}


@torch.no_grad()
def replace_units(
    layer: HiddenLayer, chosen: Tensor, certain: Tensor, mean: Tensor, draw: Draw, optimizers: list[Any]
) -> None:
    """Replace units of a layer by new ones, and clear the state that optimizers keep for their weights.

    Args:
        layer: The layer.
        chosen: Indices of units, int64 ``(k,)``.
        certain: Whether each is replaced, bool ``(k,)``.
        mean: Mean activation of each unit of the layer, ``(units,)``; it is moved to the biases of the outgoing layer.
        draw: Random numbers of the incoming weights.
        optimizers: Optimizers; each tensor of their states that has the shape of a parameter is cleared.
    """
    incoming, weight = layer.incoming, layer.incoming.weight
    rows = weight[chosen]
    bound = (6 / rows[0].numel()) ** 0.5
    fresh = torch.rand(rows.shape, generator=draw.generator(rows.device), device=rows.device, dtype=rows.dtype)
    _set_rows(weight, chosen, certain, (2 * fresh - 1) * bound)
    touched = [weight]
    norm = layer.norm
    vectors = [(incoming.bias, 0.0)]
    if norm is not None:
        vectors += [(norm.weight, 1.0), (norm.bias, 0.0)]  # type: ignore[list-item]
    for vector, value in vectors:
        if vector is not None:
            _set_rows(vector, chosen, certain, torch.full_like(vector[chosen], value))
            touched.append(vector)
    if isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None:
        _set_rows(norm.running_mean, chosen, certain, torch.zeros_like(norm.running_mean[chosen]))
        _set_rows(norm.running_var, chosen, certain, torch.ones_like(norm.running_var[chosen]))
    states = [optimizer.state for optimizer in optimizers]
    for reader in layer.readers():
        columns = layer.columns(reader.weight)  # type: ignore[arg-type]
        gone = columns[:, chosen] * certain[:, None]
        if (bias := getattr(reader, "bias", None)) is not None:
            bias += (gone.sum(2).to(mean) @ mean[chosen]).to(bias)
        columns[:, chosen] -= gone
        for state in states:
            for kept in _like(state, reader.weight):
                of_unit = layer.columns(kept)
                of_unit[:, chosen] = of_unit[:, chosen].masked_fill(certain[:, None], 0)
    for parameter in touched:
        for state in states:
            for kept in _like(state, parameter):
                _set_rows(kept, chosen, certain, torch.zeros_like(kept[chosen]))


def _set_rows(tensor: Tensor, chosen: Tensor, certain: Tensor, values: Tensor) -> None:
    mask = certain.view(-1, *(1,) * (tensor.dim() - 1))
    tensor[chosen] = torch.where(mask, values, tensor[chosen])


def _like(state: Mapping[Any, Any], parameter: Any) -> Iterator[Tensor]:
    """Tensors of the state of a parameter that have its shape, such as moments."""
    for value in state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            yield value
