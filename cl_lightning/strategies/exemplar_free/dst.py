"""Continual learning with dynamic sparse training (Yildirim, Gok Yildirim, Sokar, Mocanu & Vanschoren, CPAL 2024,
arXiv:2308.14831).

Each task t has a mask M_t on the weights of the backbone and predicts with w * M_t. U_t is the union of the masks of
earlier tasks: a mask may contain weights of U_t, which are reused and do not change; the task trains M_t without U_t.
The mask of a layer of n weights starts with round(d_l n) random weights. With the density d of all layers together,

    uniform:  d_l = d
    erk:      d_l = eps (sum of the sizes of the weight's dimensions) / (their product), at most 1     (ER kernel)

with eps such that sum_l d_l n_l = d sum_l n_l. After every ``update_every`` optimizer steps, in each layer,

    1. the k = ceil(zeta_s d_l n_l) weights of smallest |w| leave the mask,
    2. k of the weights outside of it enter: at random; at random among those that were not in the mask of this task
       before, while there are any (``unfired``); or by the largest |dL/dw| (``gradient``),

    zeta_s = zeta_end + (zeta - zeta_end) (1 + cos(pi s / S)) / 2   after s of the S steps of the task.

A weight that enters and is not in U_t starts at 0, with moments of 0. A weight that leaves keeps its value, which no
step changes; a later task may start from it.
d -> density, zeta -> drop_rate, zeta_end -> last_drop_rate.
Biases and batch normalisation are trained in the first task only. The head has a block per task and no mask.
Departs from the released code: a layer has the exact number of weights instead of one that is drawn; biases, batch
normalisation and the head are not shared, so that nothing is forgotten; a reused weight that leaves and enters again
has its value at once, not only in predictions; the loss and the predictions are over the classes of the task.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cl_lightning.batch import Batch, ImageShape, mix
from cl_lightning.checks import at_least, one_of, within
from cl_lightning.memory import Held, NamedBuffers
from cl_lightning.models import Backbone
from cl_lightning.strategies.base import BY_TASK, AddsLosses, SharesWeights, routed
from cl_lightning.strategy import Output, Phase, Task, Traits

Spread = Literal["uniform", "erk"]
Growth = Literal["random", "unfired", "gradient"]
_START, _GROW = 0xD57, 0xD58  # salts


def layer_densities(shapes: Mapping[str, Sequence[int]], density: float, spread: Spread) -> dict[str, float]:
    """Share of the weights of each layer that a mask contains, d_l, in (0, 1].

    Args:
        shapes: Shape of the weight of each layer, by name.
        density: d, share of the weights of all layers together, in (0, 1].
        spread: ``uniform``, or ``erk``: layers whose share would exceed 1 are dense, and eps is solved for the others.
    """
    if spread == "uniform":
        return dict.fromkeys(shapes, density)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / sizes[name] for name, shape in shapes.items()}
    dense: set[str] = set()
    while True:
        others = [name for name in shapes if name not in dense]
        if not others:
            return dict.fromkeys(shapes, 1.0)
        wanted = density * sum(sizes.values()) - sum(sizes[name] for name in dense)
        eps = wanted / sum(raw[name] * sizes[name] for name in others)
        above = {name for name in others if eps * raw[name] > 1}
        if not above:
            return {name: 1.0 if name in dense else eps * raw[name] for name in shapes}
        dense |= above


def moved(mask: Tensor, weight: Tensor, growth: Tensor, count: int) -> Tensor:
    """The mask after its weights of smallest absolute value have left and as many others have entered.

    Args:
        mask: Weights in the mask, bool, of the shape of the weight.
        weight: Values w.
        growth: Score of each weight, of the same shape; the largest scores outside of the mask enter. Weights that have
            just left may enter again.
        count: k, at most the number of weights in the mask.

    Returns:
        bool, with as many weights as ``mask``. Equal values are ordered by their position.
    """
    chosen, shape = mask.flatten().clone(), mask.shape
    size = torch.where(chosen, weight.detach().flatten().abs().double(), math.inf)
    chosen[size.argsort(stable=True)[:count]] = False
    score = torch.where(chosen, -math.inf, growth.flatten().double())
    chosen[score.argsort(stable=True, descending=True)[:count]] = True
    return chosen.view(shape)


class TaskMasks(NamedBuffers):
    """Masks on weights, by task and parameter name: bool, of the shapes of the weights.

    ``fired`` marks the weights that have been in the mask of the current task. State is in buffers, whose shapes come
    from the state dict that is loaded; it is the same on all processes.
    """

    kept_as: ClassVar[str] = "masks"
    tasks: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("tasks", torch.zeros((), dtype=torch.int64))

    def of(self, task: int) -> dict[str, Tensor]:
        """M_t by parameter name."""
        return self._get(f"task_{task}")

    def earlier(self, task: int) -> dict[str, Tensor]:
        """U_t by parameter name: the weights in the masks of tasks before ``task``."""
        return {
            name: torch.stack([torch.zeros_like(mask), *(self.of(past)[name] for past in range(task))]).any(dim=0)
            for name, mask in self.of(task).items()
        }

    @property
    def fired(self) -> dict[str, Tensor]:
        return self._get("fired")

    def set(self, task: int, masks: Mapping[str, Tensor], *, begins: bool = False) -> None:
        """Replace the masks of a task and mark their weights as fired; ``begins`` unmarks all others."""
        fired = {} if begins else self.fired
        self.tasks.fill_(task + 1)
        for name, mask in masks.items():
            self._set(f"task_{task}", name, mask)
            self._set("fired", name, mask | fired[name] if name in fired else mask)


class MaskedBackbone(Backbone):
    """A backbone whose weights are multiplied by the masks of a task; gradients reach masked weights too.

    Args:
        backbone: Any backbone.

    Attributes:
        masks: Masks of all tasks.
        task: Index of the task whose masks are used.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone.image_shape)
        self.backbone, self.num_features = backbone, backbone.num_features
        self.masks = TaskMasks()
        self.task = 0

    def forward(self, images: Tensor) -> Tensor:
        weights, masks = dict(self.backbone.named_parameters()), self.masks.of(self.task)
        # w + (w M - w) has the value w M, exactly, and the gradient of a dense weight
        masked = {name: weights[name] + (weights[name] * mask - weights[name]).detach() for name, mask in masks.items()}
        features: Tensor = functional_call(self.backbone, masked, (images,))
        return features


class DST(SharesWeights):
    """Each task trains a sparse network inside of the backbone, whose connections move during training.

    Args:
        density: d, share of the weights that a task uses, in (0, 1].
        spread: How the density is spread over the layers: ``uniform`` or ``erk``.
        drop_rate: zeta, share of the weights of a layer that are exchanged at first, in [0, 1].
        last_drop_rate: zeta_end, the share at the end of a task, in [0, ``drop_rate``].
        growth: Which weights enter a mask: ``random``, ``unfired`` or ``gradient``.
        update_every: Number of optimizer steps between two exchanges, at least 1; None to keep the first masks.
        kwargs: Options of the base class.
    """

    traits = Traits(
        family="exemplar-free",
        paper="Yildirim et al., CPAL 2024, arXiv:2308.14831",
        task_ids="needed",
        scenarios=BY_TASK,
    )

    def __init__(
        self,
        *,
        density: float = 0.2,
        spread: Spread = "uniform",
        drop_rate: float = 0.5,
        last_drop_rate: float = 0.005,
        growth: Growth = "random",
        update_every: int | None = 400,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        within(self, "(0, 1]", density=density)
        one_of(self, get_args(Spread), spread=spread)
        within(self, "[0, 1]", drop_rate=drop_rate)
        within(self, f"[0, {drop_rate:g}]", last_drop_rate=last_drop_rate)
        one_of(self, get_args(Growth), growth=growth)
        at_least(self, 1, update_every=update_every, optional=True)
        self.density, self.spread, self.growth, self.update_every = density, spread, growth, update_every
        self.drop_rate, self.last_drop_rate = drop_rate, last_drop_rate
        self._held: Held | None = None
        self._steps, self._due = 0, False
        self._gradients: dict[str, Tensor] = {}

    @property
    def backbone(self) -> MaskedBackbone:
        backbone = self.network.backbone
        assert isinstance(backbone, MaskedBackbone)
        return backbone

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        self.network.backbone = MaskedBackbone(cast(Backbone, self.network.backbone))

    def weights(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.backbone.backbone.named_parameters() if p.dim() > 1}

    def counts(self) -> dict[str, int]:
        """Number of weights in the mask of each layer, at least 1, by parameter name."""
        weights = self.weights()
        densities = layer_densities({name: p.shape for name, p in weights.items()}, self.density, self.spread)
        return {name: max(1, round(densities[name] * p.numel())) for name, p in weights.items()}

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        weights, masks = self.weights(), {}
        random = torch.Generator().manual_seed(mix(self.seed, _START, task.index))
        for name, count in self.counts().items():
            chosen = torch.randperm(weights[name].numel(), generator=random)[:count]
            mask = torch.zeros(weights[name].numel(), dtype=torch.bool).index_fill_(0, chosen, True)
            masks[name] = mask.view(weights[name].shape).to(weights[name].device)
        self.backbone.masks.set(task.index, masks, begins=True)
        self.backbone.task = task.index

    def begin_phase(self, phase: Phase, origin: int, sources: Sequence[AddsLosses] = ()) -> None:
        super().begin_phase(phase, origin, sources)
        self._held, self._due = None, False
        self.backbone.task = self.task.index

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self._steps = self.epoch * self._steps_per_epoch() + batch_idx // self.trainer.accumulate_grad_batches

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": self.classification_loss(output, batch)}

    def edit_gradients(self, batch: Batch) -> None:
        self._due = self.update_every is not None and (self._steps + 1) % self.update_every == 0
        if self._due and self.growth == "gradient":
            weights = self.weights()
            self._gradients = {
                name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in weights.items()
            }
        if self._held is None:  # before the first step since the fit began, was resumed, or the masks have moved
            self._held = self._hold()
        self._held.mask_gradients()

    def after_step(self, batch: Batch) -> None:
        if self._held is not None:
            self._held.restore()
        if self._due:
            self._due, self._held = False, None
            self._move(self._steps + 1)

    def end_phase(self, phase: Phase) -> None:
        self._held, self._gradients = None, {}

    def predict_task(self, images: Tensor, task: int) -> Tensor:
        with routed(self.backbone, task):
            return self.network.classify(images)

    def _hold(self) -> Held:
        earlier = self.backbone.masks.earlier(self.task.index)
        trained = {name: mask & ~earlier[name] for name, mask in self.backbone.masks.of(self.task.index).items()}
        return Held(self.weights(), trained)

    def _steps_per_epoch(self) -> int:
        return max(1, math.ceil(int(self.trainer.num_training_batches) / self.trainer.accumulate_grad_batches))

    def _drop_rate(self, done: int) -> float:
        """zeta_s after ``done`` steps of the task."""
        steps = self._steps_per_epoch() * (self.phase.options.epochs or 1)
        span = self.drop_rate - self.last_drop_rate
        return self.last_drop_rate + span * (1 + math.cos(math.pi * min(1.0, done / steps))) / 2

    def _move(self, done: int) -> None:
        """Exchange the weights in the masks after ``done`` steps of the task."""
        masks, weights, counts = self.backbone.masks, self.weights(), self.counts()
        earlier, fired, present = masks.earlier(self.task.index), masks.fired, masks.of(self.task.index)
        rate, found = self._drop_rate(done), {}
        random = torch.Generator().manual_seed(mix(self.seed, _GROW, self.task.index, done))
        for name, weight in weights.items():
            if self.growth == "gradient":
                score = self._gradients[name].abs()
            else:
                score = torch.rand(weight.shape, generator=random, dtype=torch.float64).to(weight.device)
                score = score - fired[name].double() if self.growth == "unfired" else score
            found[name] = moved(present[name], weight, score, math.ceil(rate * counts[name]))
            weight.masked_fill_(found[name] & ~present[name] & ~earlier[name], 0.0)
        self._gradients = {}
        masks.set(self.task.index, found)
        self._mask_moments(weights, {name: found[name] & present[name] for name in found})

    def _mask_moments(self, weights: Mapping[str, nn.Parameter], stayed: Mapping[str, Tensor]) -> None:
        """Set the moments of the optimizers to 0, apart from the weights that have stayed in the masks."""
        optimizers = self.optimizers(use_pl_optimizer=False)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            for name, weight in weights.items():
                for value in optimizer.state.get(weight, {}).values():
                    if isinstance(value, Tensor) and value.shape == weight.shape:
                        value.mul_(stayed[name])
