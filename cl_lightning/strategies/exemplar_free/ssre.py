"""SSRE: Self-Sustaining Representation Expansion for Non-Exemplar Class-Incremental Learning (Zhu et al., CVPR 2022,
arXiv:2203.06359).

From the second task on the backbone is frozen, batch normalisation included, and adapters are trained parallel to its
layers: a convolution of size 1 next to each convolution. When the task ends they are folded into the weights, so that
the network keeps its size (``ParallelAdapters``). With f the features, z the logits, f' the features before the task,
and p_c the mean feature of the images of class c at the end of its task, the similarity of an image to the old classes
divides the loss between classification and distillation,

    w_i = max_c cos(f(x_i), p_c), c old                                                        without gradient
    L = 1/B sum_i (1 - w_i) CE(z(x_i) / tau, y_i) + gamma sum_i w_i || f(x_i) - f'(x_i) ||_2
        + lambda * 1/B sum_j CE(z(p_cj) / tau, c_j),   c_j one of the old classes, B times

instead of a choice by a threshold. The distances are neither squared nor averaged: their sum grows with the batch. The
first task has the first term only, with w = 0. Prototypes are not changed, and no noise is added to them.
lambda -> prototype_weight, gamma -> distill_weight, tau -> temperature.
The authors' code is not available: the terms follow the re-implementation of PyCIL, which trains the adapters in the
first task too, and were not compared with the paper. The loss is over all classes so far. A negative w, which features
of both signs can have, is set to 0. A linear layer has a parallel linear layer, so that fully connected networks are
trained as a whole.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import ImageShape
from cl_lightning.checks import above, at_least
from cl_lightning.losses import cross_entropy, full_precision
from cl_lightning.memory import Prototypes, Teacher
from cl_lightning.models import AdaptedBackbone, ParallelAdapters
from cl_lightning.strategies.base import AddsLosses
from cl_lightning.strategy import Batch, ContinualStrategy, Output, Phase, Task, Traits

_CLASSES = 0x55E  # salt


@torch.no_grad()
def similarity_to_old(features: Tensor, prototypes: Tensor) -> Tensor:
    """w: the largest cosine of each row of ``features (B, d)`` and a row of ``prototypes (C_old, d)``, in [0, 1]."""
    with torch.autocast(features.device.type, enabled=False):  # cosines near 1 differ by less than bf16 resolves
        features = full_precision(features)
        cosines = F.normalize(features, dim=1) @ F.normalize(prototypes.to(features.dtype), dim=1).T
        return cosines.amax(dim=1).clamp(0, 1)


class SSRE(ContinualStrategy):
    """Adapters folded into the weights, prototypes of old classes, and distillation of samples similar to old classes.

    Args:
        prototype_weight: lambda, at least 0.
        distill_weight: gamma, at least 0.
        temperature: tau, above 0.
        kwargs: Options of the base class.
    """

    traits = Traits(family="exemplar-free", paper="Zhu et al., CVPR 2022, arXiv:2203.06359", inputs=("image",))

    def __init__(
        self,
        *,
        prototype_weight: float = 10.0,
        distill_weight: float = 2.0,
        temperature: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(loss_classes="all", **kwargs)
        at_least(self, 0, prototype_weight=prototype_weight, distill_weight=distill_weight)
        above(self, 0, temperature=temperature)
        self.prototype_weight, self.distill_weight = prototype_weight, distill_weight
        self.temperature = temperature
        self.build_backbone = functools.partial(AdaptedBackbone, backbone=self.build_backbone, peft=ParallelAdapters)
        self.teacher = Teacher(reference=True)
        self.class_means: Prototypes
        self._old = torch.zeros(0, dtype=torch.int64)  # columns with a prototype, on the CPU

    @property
    def prototypes(self) -> Prototypes:
        return self.class_means

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        self.class_means = Prototypes(self.network.head.num_features)

    def begin_phase(self, phase: Phase, origin: int, sources: Sequence[AddsLosses] = ()) -> None:
        super().begin_phase(phase, origin, sources)
        self._old = self.class_means.known_columns()

    def frozen(self) -> Iterable[nn.Module]:
        yield from super().frozen()
        yield self._adapted.peft if self.task.is_first else self._adapted.base

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        logits = full_precision(output.logits) / self.temperature
        if not self.teacher:
            return {"ce": cross_entropy(logits, batch.labels)}
        means = self.class_means.means[self._old.to(self.device)]
        w = similarity_to_old(output.features, means)  # (B,)
        gaps = (full_precision(output.features) - self.teacher(batch.images).features).norm(dim=1)
        drawn = batch.draw.fork(_CLASSES).randint(len(self._old)).to(self.device)
        imitated = full_precision(self.network.head(means[drawn])) / self.temperature
        distill = (w * gaps).mean() * batch.draw.total  # the sum over the batch of all processes
        return {
            "ce": cross_entropy(logits, batch.labels, weights=1 - w),
            "distill": self.distill_weight * distill,
            "prototypes": self.prototype_weight * cross_entropy(imitated, self._old.to(self.device)[drawn]),
        }

    def end_task(self, task: Task) -> None:
        cast(ParallelAdapters, self._adapted.peft).fold()
        super().end_task(task)
        features, labels = self.passes.features()
        self.class_means.update(features, labels, num_classes=task.num_seen, replace=True)
        self.teacher.learn_from(self.network)

    def predict(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        return self.network.classify(images) / self.temperature

    @property
    def _adapted(self) -> AdaptedBackbone:
        backbone = self.network.backbone
        assert isinstance(backbone, AdaptedBackbone)
        return backbone
