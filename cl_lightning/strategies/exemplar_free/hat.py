"""Hard Attention to the Task (Serra, Suris, Miron & Karatzoglou, ICML 2018, arXiv:1801.01423).

Each task t has an embedding e_l per layer l. Its masks a_l = sigmoid(s e_l) multiply the units of the layer; with
past_l the largest masks of the tasks before, unit by unit,

    L(x, y) = CE(f(x), y) + lambda R,   R = sum_{l,i} a_{l,i} (1 - past_{l,i}) / sum_{l,i} (1 - past_{l,i})    eq. (4)
    g_{l,ij} <- (1 - min(past_{l,i}, past_{l-1,j})) g_{l,ij}                                                   eq. (2)
    s = 1/s_max + (s_max - 1/s_max) (b - 1) / (B - 1)   in batch b of the B batches of an epoch                eq. (3)
    g_e <- g_e s_max/s (cosh(clamp(s e, -50, 50)) + 1) / (cosh(e) + 1),   e <- clamp(e, -6, 6) after the step   eq. (5)

so that R favours units that earlier tasks use, weights between units of earlier tasks do not move, and the embedding
trains as if s were s_max. When a task ends, past <- max(past, sigmoid(s_max e)); predictions use s = s_max.
lambda -> sparsity_weight, s_max -> scale.
The head has a block per task and no mask. Pixels have no mask: the first layer is protected by its units alone.
Weight decay moves weights without a gradient, so it is refused; the paper trains by SGD without momentum.
Departs from the released code, whose s rises with the samples before the batch and stays below s_max.
"""

from typing import Any, cast

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from cl_lightning.batch import ImageShape
from cl_lightning.checks import above, at_least
from cl_lightning.memory import PastMasks
from cl_lightning.models import (
    Backbone,
    GatedBackbone,
    clamp_embeddings,
    compensate_scale,
    newly_used,
    risen_scale,
)
from cl_lightning.strategies.base import BY_TASK, TaskIncremental, refuse_weight_decay
from cl_lightning.strategy import Batch, Output, Task, Traits


class HAT(TaskIncremental):
    """A mask over the units of each layer is learnt for each task and protects the units that earlier tasks use.

    Args:
        sparsity_weight: lambda, at least 0.
        scale: s_max, above 1.
        kwargs: Options of the base class. The backbone is a chain of layers: ``MLP`` or ``ConvNet``.
    """

    traits = Traits(
        family="exemplar-free",
        paper="Serra et al., ICML 2018, arXiv:1801.01423",
        task_ids="needed",
        scenarios=BY_TASK,
    )

    def __init__(self, *, sparsity_weight: float = 0.75, scale: float = 400.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        at_least(self, 0, sparsity_weight=sparsity_weight)
        above(self, 1, scale=scale)
        self.sparsity_weight, self.scale = sparsity_weight, scale

    @property
    def backbone(self) -> GatedBackbone:
        backbone = self.network.backbone
        assert isinstance(backbone, GatedBackbone)
        return backbone

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        self.network.backbone = GatedBackbone(cast(Backbone, self.network.backbone))
        self.past_masks = PastMasks(self.backbone.sizes)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.backbone.add_task()

    def trainable(self) -> list[nn.Parameter]:
        others = {id(p) for rows in self.backbone.embeddings[: self.task.index] for p in rows.parameters()}
        return [parameter for parameter in super().trainable() if id(parameter) not in others]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        made = super().configure_optimizers()
        refuse_weight_decay(self, made)
        return made

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        batches = int(self.trainer.num_training_batches)
        done = batch_idx / (batches - 1) if batches > 1 else 1.0
        self.backbone.task = self.task.index
        self.backbone.scale = risen_scale(done, self.scale)  # eq. (3)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        terms = {"ce": self.classification_loss(output, batch)}
        if self.sparsity_weight:
            masks = self.backbone.masks(self.backbone.task, self.backbone.scale)
            terms["sparsity"] = self.sparsity_weight * newly_used(masks, self.past_masks.masks())  # eq. (4)
        return terms

    @torch.no_grad()
    def edit_gradients(self, batch: Batch) -> None:
        backbone = self.backbone
        layers = [backbone.layers[place] for place in backbone.gated]
        for layer, (of_weight, of_bias) in zip(layers, backbone.factors(self.past_masks.masks()), strict=True):
            for parameter, factor in ((layer.weight, of_weight), (layer.bias, of_bias)):
                if isinstance(parameter, Tensor) and parameter.grad is not None:
                    parameter.grad *= factor  # eq. (2)
        compensate_scale(backbone.embeddings_of(self.task.index), backbone.scale, self.scale)  # eq. (5)

    def after_step(self, batch: Batch) -> None:
        clamp_embeddings(self.backbone.embeddings_of(self.task.index))

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        self.past_masks.merge(self.backbone.masks(task.index, self.scale))

    def predict_task(self, images: Tensor, task: int) -> Tensor:
        self.backbone.task, self.backbone.scale = task, self.scale
        return self.network.classify(images)
