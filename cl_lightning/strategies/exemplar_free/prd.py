"""Prototype-Sample Relation Distillation (Asadi et al., ICML 2023, arXiv:2303.14771).

Each image is used in two augmented views. With f the backbone, g a projection, P_c a learnt prototype of class c, f'
and P' the backbone and the prototypes before the task, and sg the stop-gradient:

    L = L_SC + alpha L_P + beta L_D
    L_SC = supervised contrastive loss of g(f(x)), over all views                        trains f and g
    L_P = mean_i 1 - cos(sg f(x_i), P_y_i)                                               trains P of the batch's classes
    L_D = sum_t mean_c KL( softmax_i(S'_ic / T) || softmax_i(S_ic / T) ), c of task t    trains f and the old P
    S_ic = f(x_i) . P_c / ||P_c||,   S'_ic = f'(x_i) . P'_c / ||P'_c||

L_D preserves the relation of the new images to each old prototype, and old prototypes are updated with the features.
The prediction is the class of the nearest prototype, argmax_c cos(f(x), P_c), over all classes or over the classes of a
known task.
alpha -> prototype_weight, beta -> distill_weight, T -> distill_temperature.

The softmax of L_D is over the views of the batch (``relation_axis="samples"``), as in the paper. In the released code
it is over the prototypes of a task for each view (``"prototypes"``), and the copy of the network stays in train mode:
its batch normalisation uses the statistics of the batch, and its running statistics follow them. ``released=True`` does
both. It is not known which of the two the published results are from. The mean over the prototypes of a task is our
choice, since the code has a mean over views there. The prototypes are rows of a ``CosineHead``, one block per task,
trained without momentum and weight decay. The default weights are from the CIFAR-100 runs of the code with known tasks;
its class-incremental runs search alpha in {4, 8} and beta from 4 to 12.
With several processes, L_SC and L_D over samples are over the views of all processes. If a batch has fewer images than
there are processes, each process takes its own views only.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import ImageShape, cat
from cl_lightning.checks import above, at_least, one_of
from cl_lightning.losses import (
    cosine_feature_distillation,
    full_precision,
    rows_of_all,
    softmax_distillation,
    supervised_contrastive,
)
from cl_lightning.memory import Teacher
from cl_lightning.models import CosineHead, perceptron
from cl_lightning.strategies.base import separate_group
from cl_lightning.strategy import Batch, ContinualStrategy, HeadFactory, Output, Task, Traits

Axis = Literal["samples", "prototypes"]

_VIEW = 0x92D  # salt of the second view


def relation_scores(features: Tensor, prototypes: Tensor) -> Tensor:
    """S_ic: ``f_i . P_c / ||P_c||`` of features ``(B, d)`` and prototypes ``(C, d)``; ``(B, C)``, at least float32."""
    with torch.autocast(features.device.type, enabled=False):
        features = full_precision(features)
        return features @ F.normalize(prototypes.to(features.dtype), dim=1).T


def relation_distillation(
    student: Tensor, teacher: Tensor, sizes: list[int], temperature: float = 1.0, axis: Axis = "samples"
) -> Tensor:
    """L_D: KL divergence between softmaxes of scores of samples and prototypes, summed over tasks, in nats.

    Args:
        student: S, scores of samples and old prototypes, ``(B, C_old)``.
        teacher: S', scores before the task, ``(B, C_old)``.
        sizes: Number of prototypes of each old task; their sum is C_old.
        temperature: T, above 0.
        axis: With ``samples``, a distribution over the B samples for each prototype, and the mean over the prototypes
            of a task. With ``prototypes``, a distribution over the prototypes of a task for each sample, and the mean
            over the samples.
    """
    if axis == "prototypes":
        columns = [group.tolist() for group in torch.split(torch.arange(sum(sizes)), sizes)]
        return softmax_distillation(student, teacher, temperature, form="kl", groups=columns)
    pairs = zip(torch.split(student, sizes, dim=1), torch.split(teacher, sizes, dim=1), strict=True)  # (B, C_t) each
    return torch.stack([softmax_distillation(s.T, t.T, temperature, form="kl") for s, t in pairs]).sum()


class PRD(ContinualStrategy):
    """Supervised contrastive learning, learnt prototypes, and distillation of relations between samples and prototypes.

    Args:
        prototype_weight: alpha, at least 0.
        distill_weight: beta, at least 0.
        contrast_temperature: Temperature of L_SC, above 0.
        distill_temperature: T of L_D, above 0.
        relation_axis: Axis of the softmax of L_D: ``samples`` or ``prototypes``; None for ``prototypes`` if
            ``released``, else ``samples``.
        released: Whether L_D is the one of the released code: over prototypes, with a copy in train mode.
        prototype_lr: Learning rate of the prototypes, at least 0; None for the learning rate of the optimizer.
        projection_hidden: Number of units of each of the two hidden layers of g, at least 1.
        projection_size: Number of outputs of g, at least 1.
        head: Builds a ``CosineHead`` of fixed scale; None for ``CosineHead``.
        kwargs: Options of the base class.
    """

    traits = Traits(family="exemplar-free", paper="Asadi et al., ICML 2023, arXiv:2303.14771", uses_old_logits=True)

    def __init__(
        self,
        *,
        prototype_weight: float = 2.0,
        distill_weight: float = 4.0,
        contrast_temperature: float = 0.1,
        distill_temperature: float = 1.0,
        relation_axis: Axis | None = None,
        released: bool = False,
        prototype_lr: float | None = None,
        projection_hidden: int = 512,
        projection_size: int = 128,
        head: HeadFactory | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(head=head or CosineHead, **kwargs)
        at_least(self, 0, prototype_weight=prototype_weight, distill_weight=distill_weight)
        above(self, 0, contrast_temperature=contrast_temperature, distill_temperature=distill_temperature)
        axis: Axis = relation_axis or ("prototypes" if released else "samples")
        one_of(self, get_args(Axis), relation_axis=axis)
        at_least(self, 0, prototype_lr=prototype_lr, optional=True)
        at_least(self, 1, projection_hidden=projection_hidden, projection_size=projection_size)
        self.prototype_weight, self.distill_weight = prototype_weight, distill_weight
        self.contrast_temperature, self.distill_temperature = contrast_temperature, distill_temperature
        self.relation_axis, self.prototype_lr = axis, prototype_lr
        self.projection_sizes = (projection_hidden, projection_size)
        self.teacher = Teacher(adapts=released)
        self.projection: nn.Module  # g

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        head, (hidden, size) = self.network.head, self.projection_sizes
        if not isinstance(head, CosineHead) or isinstance(head.scale, nn.Parameter):
            raise ValueError(
                f"PRD: head is {type(head).__name__}; use a CosineHead of fixed scale, whose rows are the prototypes"
            )
        self.projection = perceptron(head.num_features, hidden, hidden, size)

    def trainable(self) -> Any:
        yield from super().trainable()
        yield from self.projection.parameters()

    def parameter_groups(self, parameters: list[nn.Parameter]) -> list[nn.Parameter] | list[dict[str, Any]]:
        options: dict[str, Any] = {"momentum": 0.0, "weight_decay": 0.0}
        options |= {} if self.prototype_lr is None else {"lr": self.prototype_lr}
        return separate_group(parameters, self.network.head.parameters(), **options)

    def prepare_batch(self, batch: Batch) -> Batch:
        second = self.data.augment(batch.replace(draw=batch.draw.fork(_VIEW)))
        return cat([batch, second], self.trainer.world_size)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        rows, factor = rows_of_all(batch)
        prototypes = self.network.head.weight()
        embeddings = self.projection(output.features).float()
        contrast = supervised_contrastive(rows(embeddings), rows(batch.labels), self.contrast_temperature)
        attraction = cosine_feature_distillation(prototypes[batch.labels], output.features)
        terms = {"contrast": factor * contrast, "prototypes": self.prototype_weight * attraction}
        if self.distill_weight and (before := self.teacher.network) is not None:
            old = before.head.weight()
            scores = relation_scores(output.features, prototypes[: len(old)])
            target = relation_scores(self.teacher(batch.images).features, old)
            if self.relation_axis == "samples":
                scores, target = rows(scores), rows(target)
            else:
                factor = 1.0
            distill = relation_distillation(
                scores, target, before.head.block_sizes(), self.distill_temperature, self.relation_axis
            )
            terms["distill"] = self.distill_weight * factor * distill
        return terms

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        self.teacher.learn_from(self.network)

    def bytes_kept(self) -> dict[str, int]:
        return {**super().bytes_kept(), "heads": sum(value.nbytes for value in self.projection.state_dict().values())}
