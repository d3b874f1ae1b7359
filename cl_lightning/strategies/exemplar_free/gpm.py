"""Gradient Projection Memory (Saha, Garg & Roy, ICLR 2021, arXiv:2103.09762).

For each layer, M is an orthonormal basis of the inputs that the layer has had in earlier tasks. A step is orthogonal to
it, so that the outputs of the layer for these inputs stay as they are:

    g_W <- g_W - g_W M M^T,   W (outputs, D): D inputs, or channels * height * width of a kernel       eq. (6), (7)

When a task ends, M grows by the directions of the inputs of ``samples`` training images until it holds the share eps_t
of their squared norm, eps_t = energy + energy_growth * t, at most 1. Nothing else is kept of a task.
Biases, and batch normalisation with its running statistics, are trained in the first task and frozen afterwards. In
streams whose tasks have new classes, each task trains its own block of the head; in others (permuted images) the head
is a layer like the others.
Weight decay and optimizers that scale each weight (Adam) leave the space of projected gradients, so they are refused;
momentum stays in it, since each task has a new optimizer.
Departs from the released code, which appends one vector fewer in the first task than the rule says, and whose batch
normalisation uses the statistics of the batch, in the test too.
"""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from cl_lightning.batch import ImageShape
from cl_lightning.checks import at_least, within
from cl_lightning.memory import InputSpaces, input_grams, linear_maps
from cl_lightning.models import batch_norms
from cl_lightning.strategies.base import LossClasses, refuse_weight_decay
from cl_lightning.strategy import Batch, ContinualStrategy, Output, Task, Traits

HEAD = "head"


class GPM(ContinualStrategy):
    """Cross-entropy with gradients that are orthogonal to the inputs of each layer in earlier tasks.

    Args:
        energy: eps of the first task, in (0, 1].
        energy_growth: Increase of eps per task, at least 0.
        samples: Number of training images of a task whose inputs are stored as a basis, at least 1; None for all.
        loss_classes: Classes of the cross-entropy, see the base class.
        kwargs: Options of the base class.
    """

    traits = Traits(family="exemplar-free", paper="Saha et al., ICLR 2021, arXiv:2103.09762")

    def __init__(
        self,
        *,
        energy: float = 0.97,
        energy_growth: float = 0.003,
        samples: int | None = 125,
        loss_classes: LossClasses = "current",
        **kwargs: Any,
    ) -> None:
        super().__init__(loss_classes=loss_classes, **kwargs)
        within(self, "(0, 1]", energy=energy)
        at_least(self, 0, energy_growth=energy_growth)
        at_least(self, 1, samples=samples, optional=True)
        self.energy, self.energy_growth, self.samples = energy, energy_growth, samples
        self.spaces = InputSpaces()

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        linear_maps(self.network.backbone, type(self).__name__)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": self.classification_loss(output, batch)}

    def frozen(self) -> list[nn.Module]:
        later = [] if self.task.is_first else list(batch_norms(self.network.backbone))
        return [*super().frozen(), *later]

    def trainable(self) -> list[nn.Parameter]:
        chosen = list(super().trainable())
        if self.task.is_first:
            return chosen
        kept = {id(weight) for _, weight in self._projected()}
        if self.task.num_new > 0:
            kept |= {id(parameter) for parameter in self.network.head.parameters()}
        return [parameter for parameter in chosen if id(parameter) in kept]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        made = super().configure_optimizers()
        refuse_weight_decay(self, made, (torch.optim.SGD,))  # steps must be sums of projected gradients
        return made

    def edit_gradients(self, batch: Batch) -> None:
        self.spaces.project((name, weight.grad) for name, weight in self._projected() if weight.grad is not None)

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        layers = {**self._layers(), HEAD: self.network.head}
        grams = input_grams(self.network, layers, self.passes.batches(samples=self.samples))
        self.keep(task, grams, min(1.0, self.energy + self.energy_growth * task.index))

    def keep(self, task: Task, grams: dict[str, Tensor], energy: float) -> None:
        """Keep the share ``energy`` of the inputs of a task, given by R R^T of each layer."""
        self.spaces.grow(grams, energy)

    def _layers(self) -> dict[str, nn.Linear | nn.Conv2d]:
        backbone = linear_maps(self.network.backbone, type(self).__name__)
        return {f"backbone.{name}": layer for name, layer in backbone.items()}

    def _projected(self) -> Iterator[tuple[str, Tensor]]:
        """Layer name and weight of what is projected; of the head only where the task has no block of its own."""
        yield from ((name, layer.weight) for name, layer in self._layers().items())
        if self.task.num_new == 0:
            yield from ((HEAD, weight) for weight in self.network.head.parameters() if weight.dim() == 2)
