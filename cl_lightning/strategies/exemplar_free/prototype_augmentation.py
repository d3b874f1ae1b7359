"""PASS: Prototype Augmentation and Self-Supervision for Incremental Learning (Zhu et al., CVPR 2021).

Each image is turned by 0, 90, 180 and 270 degrees, and a class together with a turn k is a class of its own: B images
of C classes become X, 4 B images of 4 C labels. With f the backbone, z the logits, f' the backbone before the task:

    L = CE(z(X) / tau, (y, k)) + lambda * CE(z(p~) / tau, (c, 0)) + gamma * || f(X) - f'(X) ||_2
    p~ = p_c + r eps,   eps ~ N(0, I),   c one of the old classes, B times

p_c is the mean feature of class c, un-turned, when its task ended, and stays. r^2 = mean_c tr(Sigma_c) / d is the
average variance of a feature within the classes of the first task. The norm is that of the features of the whole batch
as one vector, neither squared nor divided by the size of the batch: it grows with the square root of that size. In the
first task the last two terms are missing. Predictions are the largest of the C logits of k = 0.
tau -> temperature, lambda -> prototype_weight, gamma -> distill_weight.
Over several processes the norm is that of all their rows, but in a batch of less rows than processes, where each takes
that of its own; where gradients are accumulated it is that of each batch, which is smaller by the root of their number.
The average of the predictions over the turns, which the paper mentions, is left out, and so is CBAM in its ResNet-18.
"""

import functools
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.backbones import ImageShape
from cl_lightning.batch import Batch
from cl_lightning.distributed import all_sum, rows_norm, world_size
from cl_lightning.heads import Head
from cl_lightning.losses import cross_entropy, full_precision
from cl_lightning.network import Output
from cl_lightning.prototypes import Prototypes
from cl_lightning.rotations import rotate_batch, rotation_labels
from cl_lightning.strategy import ContinualStrategy, Phase
from cl_lightning.stream import Task
from cl_lightning.teacher import Teacher

_CLASSES, _NOISE = 0x9A51, 0x9A52  # salts


def average_radius(features: Tensor, labels: Tensor, means: Tensor, counts: Tensor) -> Tensor:
    """Average standard deviation of a feature within a class: ``sqrt(mean_c tr(Sigma_c) / d)``, a scalar.

    Args:
        features: This process's, ``(n, d)``.
        labels: Their columns, ``(n,)``.
        means: Of the classes, over all processes, ``(C, d)``.
        counts: Number of samples of each class, over all processes, ``(C,)``; classes without any do not count.
    """
    gaps = (features.double() - means[labels].double()).square().sum(dim=1)
    of_class = F.one_hot(labels, len(counts)).double()
    traces = all_sum(of_class.T @ gaps) / (counts - 1).clamp(min=1)
    return (traces.sum() / (counts > 0).sum() / features.shape[1]).sqrt()


class PASS(ContinualStrategy):
    """Turned copies as classes of their own, noisy prototypes of old classes, distillation of features.

    Args:
        prototype_weight: lambda, at least 0.
        distill_weight: gamma, at least 0.
        temperature: tau, above 0; it divides the logits.
        kwargs: Of the base.
    """

    family: ClassVar[str] = "exemplar-free"
    paper: ClassVar[str] = "Zhu et al., CVPR 2021"

    def __init__(
        self,
        *,
        prototype_weight: float = 10.0,
        distill_weight: float = 10.0,
        temperature: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(visible="all", **kwargs)
        if min(prototype_weight, distill_weight) < 0 or temperature <= 0:
            raise ValueError(
                f"PASS: prototype_weight={prototype_weight}, distill_weight={distill_weight}, "
                f"temperature={temperature}; at least 0, at least 0, above 0"
            )
        self.prototype_weight, self.distill_weight = prototype_weight, distill_weight
        self.temperature = temperature
        self.plain_first_task = False  # it learns turned images
        self.teacher = Teacher()
        self.turned_head: Head  # 3 columns for each one of the head
        self.class_means: Prototypes
        self.radius: Tensor
        self.register_buffer("radius", torch.zeros(()))
        self._old = torch.zeros(0, dtype=torch.int64)  # columns that there is a prototype of, on the CPU

    @classmethod
    def conformance_options(cls) -> dict[str, Any]:
        return {"optimizer": functools.partial(torch.optim.Adam, lr=1e-3)}  # logits are multiplied by ten: small steps

    @property
    def prototypes(self) -> Prototypes:
        return self.class_means

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        num_features = self.network.head.num_features
        self.turned_head, self.class_means = self.build_head(num_features), Prototypes(num_features)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.turned_head.grow(3 * task.num_new)

    def begin_phase(self, phase: Phase, epochs: int, origin: int) -> None:
        super().begin_phase(phase, epochs, origin)
        self._old = self.class_means.known.nonzero().squeeze(1).cpu()

    def trainable(self) -> Iterable[nn.Parameter]:
        yield from super().trainable()
        yield from self.turned_head.parameters()

    def prepare(self, batch: Batch) -> Batch:
        return rotate_batch(batch)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        columns = output.logits.shape[1]
        labels = rotation_labels(batch.labels[: len(batch) // 4], columns)
        terms = {"ce": self._cross_entropy(output.features, output.logits, labels)}
        if not self.teacher:
            return terms
        old = self._old[batch.draw.fork(_CLASSES).randint(len(self._old))].to(self.device)
        noise = batch.draw.fork(_NOISE).randn(self.class_means.num_features, device=self.device)
        imitated = self.class_means.means[old] + self.radius * noise  # (B, d)
        logits = self.network.head(imitated)
        terms["prototypes"] = self.prototype_weight * self._cross_entropy(imitated, logits, old)
        gap = output.features.float() - self.teacher(batch.images).features.float()
        everywhere = batch.draw.total >= world_size()  # else a process without rows would not take part
        norm = rows_norm(gap) / batch.weight if everywhere else gap.norm()  # the base multiplies by the weight
        terms["distill"] = self.distill_weight * norm
        return terms

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        features, labels = self.features()
        self.class_means.update(features, labels, num_classes=task.num_seen, replace=True)
        if task.is_first:
            self.radius.copy_(average_radius(features, labels, self.class_means.means, self.class_means.counts))
        self.teacher.learn_from(self.network)

    def predict(self, images: Tensor) -> Tensor:
        return self.network.classify(images) / self.temperature

    def bytes_kept(self) -> dict[str, int]:
        turned = sum(tensor.nbytes for tensor in self.turned_head.state_dict().values())
        return {**super().bytes_kept(), "heads": turned}

    def _cross_entropy(self, features: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Over all 4 C joint columns."""
        joint = torch.cat([logits, self.turned_head(features)], dim=1)
        return cross_entropy(full_precision(joint) / self.temperature, labels)
