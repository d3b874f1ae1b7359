"""TRGP: Trust Region Gradient Projection for Continual Learning (Lin, Yang, Fan & Zhang, ICLR 2022, arXiv:2202.02931).

Gradients of each layer are projected as in GPM, so that a step is orthogonal to the inputs of earlier tasks, with the
basis M. A task may reuse weights of earlier tasks with similar inputs: B_j is an orthonormal basis of the inputs of
task j, and with the gradient g of the first batch of task t

    R = the tasks j < t, at most ``regions``, with the largest ||g B_j B_j^T|| / ||g|| > threshold      trust region
    W_t = W + sum_{j in R} (W B_j Q_j B_j^T - W B_j B_j^T)                                    scaled weight projection

The first batch is seen with W_t = W. Q_j starts as the identity, is trained with the task without projection, and is
kept for its predictions. A step of W is orthogonal to M, which contains all B_j, so that the outputs of earlier tasks
for their inputs stay as they are. Predictions need the task. When a task ends, old directions compete with new ones for
B_t (``InputSpaces.grow``), and M grows by the new ones. Biases, batch normalisation and the head are as in GPM.
Departs from the released code, which appends to M one of the new directions fewer (and one fewer in the first task),
and chooses the trust region by a batch of its own. If a gradient scaler skips the first step of a task, because its
gradients overflow, the task has no trust region.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from cl_lightning.batch import ImageShape
from cl_lightning.checks import at_least, within
from cl_lightning.memory import InputSpaces, NamedBuffers, linear_maps
from cl_lightning.models import Backbone, LinearHead, Network
from cl_lightning.strategies.base import AddsLosses, TaskIncremental, routed
from cl_lightning.strategies.exemplar_free.gpm import GPM
from cl_lightning.strategy import Batch, HeadFactory, Phase, Task, Traits


def scaled_projection(weight: Tensor, bases: Tensor, scales: Tensor) -> Tensor:
    """``W + sum_j W B_j (Q_j - I) B_j^T``.

    Args:
        weight: W, ``(outputs, D)`` or, of a convolution, ``(outputs, channels, height, width)``.
        bases: B_j, ``(r, D, m)``; columns of zeros have no effect.
        scales: Q_j, ``(r, m, m)``.

    Returns:
        Of the shape of ``weight``.
    """
    with torch.autocast(weight.device.type, enabled=False):
        inner = weight.flatten(1) @ bases  # (r, outputs, m)
        change = inner @ (scales - torch.eye(scales.shape[-1], device=scales.device, dtype=scales.dtype))
        return weight + (change @ bases.mT).sum(dim=0).view_as(weight)


class TaskScales(NamedBuffers):
    """Q of finished tasks, by task, task of the basis and layer.

    State is in buffers, whose shapes come from the state dict that is loaded; it is the same on all processes.
    """

    kept_as: ClassVar[str] = "scales"
    tasks: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("tasks", torch.zeros((), dtype=torch.int64))

    def of(self, task: int, source: int) -> dict[str, Tensor]:
        """Q of a task for the basis of task ``source``, ``(m, m)``, by layer."""
        return self._get(f"scale_{task}_{source}")

    def store(self, task: int, source: int, layer: str, scale: Tensor) -> None:
        self._set(f"scale_{task}_{source}", layer, scale)


class Regions(nn.Module):
    """The trust region of one layer in the current task; empty until :meth:`choose` is called.

    Args:
        bases: B_j of all earlier tasks, each ``(D, m_j)``.
        size: Number of tasks in the region at most, r.

    Attributes:
        scale: Q, ``(r, m, m)`` with m the largest m_j.
        basis: B of the chosen tasks, ``(r, D, m)``, filled up with zeros.
        source: Index of the chosen tasks, int64 ``(r,)``; -1 where there is none.
    """

    basis: Tensor
    source: Tensor

    def __init__(self, bases: Sequence[Tensor], size: int) -> None:
        super().__init__()
        width, like = max(basis.shape[1] for basis in bases), bases[0]
        self.scale = nn.Parameter(torch.eye(width).to(like).repeat(size, 1, 1))
        self.register_buffer("basis", like.new_zeros(size, len(like), width))
        self.register_buffer("source", torch.full((size,), -1, device=like.device))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight of the task, of the shape of ``weight``."""
        return scaled_projection(weight, self.basis, self.scale)

    @torch.no_grad()
    def choose(self, gradient: Tensor, bases: Sequence[Tensor], threshold: float) -> None:
        """Choose the tasks whose inputs hold the largest part of a gradient.

        Args:
            gradient: Of the weight, of its shape.
            bases: As in the constructor.
            threshold: Share of the norm of the gradient above which a task is chosen.
        """
        flat = gradient.flatten(1)
        shares = torch.stack([(flat @ basis.to(flat)).norm() for basis in bases]) / flat.norm()
        values, found = shares.topk(len(self.source))
        chosen = values > threshold
        padded = torch.stack([F.pad(basis, (0, self.basis.shape[2] - basis.shape[1])) for basis in bases])
        self.basis.copy_(padded[found] * chosen[:, None, None])
        self.source.copy_(torch.where(chosen, found, -1))


class ScaledBackbone(Backbone):
    """A backbone whose weights differ from task to task by scaled projections.

    Args:
        backbone: Any backbone.
        spaces: Bases of the inputs of each task, by the names of the layers in the network.

    Attributes:
        task: Index of the task whose weights are used.
        learning: The trust regions of the current task, by layer, under the index of the task.
    """

    def __init__(self, backbone: Backbone, spaces: InputSpaces) -> None:
        super().__init__(backbone.image_shape)
        self.backbone, self.spaces, self.num_features = backbone, spaces, backbone.num_features
        self.scales, self.learning = TaskScales(), nn.ModuleDict()
        self.layers = list(linear_maps(backbone, "TRGP"))
        self.task = 0

    def bases(self, layer: str, tasks: int) -> list[Tensor]:
        """B of the first tasks for a layer."""
        return [self.spaces.of(task)[f"backbone.backbone.{layer}"] for task in range(tasks)]

    def begin(self, task: int, size: int) -> None:
        """Prepare the trust regions of a task; layers without inputs so far have none."""
        regions = nn.ModuleDict()
        for layer in self.layers:
            bases = self.bases(layer, task)
            if any(basis.shape[1] for basis in bases):
                regions[layer.replace(".", "/")] = Regions(bases, min(size, task))
        self.learning = nn.ModuleDict({str(task): regions})

    def regions(self, task: int) -> dict[str, Regions]:
        """Trust regions by layer; empty if the task is not being learnt."""
        if str(task) not in self.learning:
            return {}
        found = cast(nn.ModuleDict, self.learning[str(task)])
        return {name.replace("/", "."): cast(Regions, region) for name, region in found.items()}

    def finish(self, task: int) -> None:
        """Keep Q of the chosen tasks, and remove the trust regions."""
        for layer, region in self.regions(task).items():
            for source, scale in zip(region.source.tolist(), region.scale.detach(), strict=True):
                if source >= 0:
                    size = self.bases(layer, task)[source].shape[1]
                    self.scales.store(task, source, layer, scale[:size, :size])
        self.learning = nn.ModuleDict()

    def weights(self, task: int) -> dict[str, Tensor]:
        """Weights of a task that differ from the common ones, by parameter name."""
        layers = dict(self.backbone.named_modules())
        found = {layer: cast(Tensor, layers[layer].weight) for layer in self.layers}
        for layer, region in self.regions(task).items():
            found[layer] = region(found[layer])
        common = {layer: cast(Tensor, layers[layer].weight) for layer in self.layers}
        for source in range(task):
            for layer, scale in self.scales.of(task, source).items():
                change = scaled_projection(common[layer], self.bases(layer, task)[source][None], scale[None])
                found[layer] = found[layer] + (change - common[layer])
        return {f"{layer}.weight": weight for layer, weight in found.items() if weight is not common[layer]}

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = functional_call(self.backbone, self.weights(self.task), (images,))
        return features

    def restore_network(self, student: Network, state: Mapping[str, Any], prefix: str) -> None:
        """Prepare for loading ``state``: have the trust regions that it has."""
        start, self.learning = f"{prefix}learning.", nn.ModuleDict()
        for key in state:
            if key.startswith(start) and key.endswith(".scale"):
                task, layer, _ = key.removeprefix(start).split(".")
                if task not in self.learning:
                    self.learning[task] = nn.ModuleDict()
                basis = state[f"{start}{task}.{layer}.basis"]
                cast(nn.ModuleDict, self.learning[task])[layer] = Regions([torch.zeros_like(basis[0])], len(basis))


class TRGP(GPM, TaskIncremental):
    """Gradient projection memory, and scaled copies of the weights of earlier tasks with similar inputs.

    Args:
        regions: Number of earlier tasks in the trust region of a layer at most, at least 1.
        threshold: Share of the norm of the gradient above which a task is in the trust region, in [0, 1].
        head: Builds the classifier; None for ``LinearHead``, which GPM projects on streams without new classes.
        kwargs: Options of ``GPM``.
    """

    traits = Traits(
        family="exemplar-free",
        paper="Lin et al., ICLR 2022, arXiv:2202.02931",
        task_ids="needed",
    )

    def __init__(
        self, *, regions: int = 2, threshold: float = 0.5, head: HeadFactory | None = None, **kwargs: Any
    ) -> None:
        super().__init__(head=head or LinearHead, **kwargs)
        at_least(self, 1, regions=regions)
        within(self, "[0, 1]", threshold=threshold)
        self.regions, self.threshold = regions, threshold
        self._first_step = False

    @property
    def backbone(self) -> ScaledBackbone:
        backbone = self.network.backbone
        assert isinstance(backbone, ScaledBackbone)
        return backbone

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        self.network.backbone = ScaledBackbone(cast(Backbone, self.network.backbone), self.spaces)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.backbone.task = task.index
        if not task.is_first:
            self.backbone.begin(task.index, self.regions)

    def begin_phase(self, phase: Phase, origin: int, sources: Sequence[AddsLosses] = ()) -> None:
        super().begin_phase(phase, origin, sources)
        self.backbone.task = self.task.index

    def trainable(self) -> list[nn.Parameter]:
        scales = list(self.backbone.learning.parameters())
        own = {id(parameter) for parameter in scales}
        return [*(parameter for parameter in super().trainable() if id(parameter) not in own), *scales]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self._first_step = self.epoch == 0 and batch_idx < self.trainer.accumulate_grad_batches

    def edit_gradients(self, batch: Batch) -> None:
        if self._first_step:
            layers = dict(self.backbone.backbone.named_modules())
            for name, region in self.backbone.regions(self.task.index).items():
                gradient = cast(Tensor, layers[name].weight).grad
                if gradient is not None:
                    region.choose(gradient, self.backbone.bases(name, self.task.index), self.threshold)
        super().edit_gradients(batch)

    def end_task(self, task: Task) -> None:
        self.backbone.task = task.index
        self.backbone.finish(task.index)
        super().end_task(task)

    def keep(self, task: Task, grams: dict[str, Tensor], energy: float) -> None:
        self.spaces.grow(grams, energy, task=task.index)

    def predict_task(self, images: Tensor, task: int) -> Tensor:
        with routed(self.backbone, task):
            return self.network.classify(images)
