"""PASS: Prototype Augmentation and Self-Supervision for Incremental Learning (Zhu et al., CVPR 2021).

Each image is rotated by 0, 90, 180 and 270 degrees, and each pair of a class and a rotation k is a separate class: B
images of C classes become X, 4 B images of 4 C classes. With f the backbone, z the logits, f' the backbone before the
task:

    L = CE(z(X) / tau, (y, k)) + lambda * CE(z(p~) / tau, (c, 0)) + gamma * || f(X) - f'(X) ||_2
    p~ = p_c + r eps,   eps ~ N(0, I),   c one of the old classes, B times

The prototype p_c is the mean feature of the images of class c, without rotation, at the end of its task; it is not
changed afterwards. The noise scale r^2 = mean_c tr(Sigma_c) / d is the average variance of a feature within the classes
of the first task. The norm is of the differences of the whole batch as one vector, neither squared nor divided by the
batch size, so it grows with the square root of the batch size. The first task has the first term only. The prediction
is the largest of the C logits with k = 0.
tau -> temperature, lambda -> prototype_weight, gamma -> distill_weight.
Departs from the paper: predictions are not averaged over the rotations; the ResNet-18 has no CBAM. p_c and r are
computed from un-augmented images, where the released code takes augmented images, whose variance is larger.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import ImageShape
from cl_lightning.checks import above, at_least
from cl_lightning.data import rotate_batch, rotation_labels
from cl_lightning.distributed import all_sum
from cl_lightning.losses import cross_entropy, feature_norm_distillation, full_precision
from cl_lightning.memory import Prototypes, Teacher
from cl_lightning.models import Head
from cl_lightning.strategies.base import AddsLosses
from cl_lightning.strategy import Batch, ContinualStrategy, Output, Phase, Task, Traits

_CLASSES, _NOISE = 0x9A51, 0x9A52  # salts


def average_radius(features: Tensor, labels: Tensor, means: Tensor, counts: Tensor) -> Tensor:
    """Average standard deviation of a feature within a class: ``sqrt(mean_c tr(Sigma_c) / d)``.

    Args:
        features: Features of this process's samples, ``(n, d)``; sums are taken over all processes.
        labels: Columns of the samples, int64 ``(n,)``.
        means: Class means over all processes, ``(C, d)``.
        counts: Number of samples of each class over all processes, ``(C,)``; classes without samples are ignored.

    Returns:
        Scalar, float64, the same on every process.
    """
    gaps = (features.double() - means[labels].double()).square().sum(dim=1)
    of_class = F.one_hot(labels, len(counts)).double()
    traces = all_sum(of_class.T @ gaps) / (counts - 1).clamp(min=1)
    return (traces.sum() / (counts > 0).sum() / features.shape[1]).sqrt()


class PASS(ContinualStrategy):
    """Rotations as additional classes, prototypes of old classes with Gaussian noise, and distillation of features.

    Args:
        prototype_weight: lambda, at least 0.
        distill_weight: gamma, at least 0.
        temperature: tau, above 0.
        kwargs: Options of the base class.
    """

    traits = Traits(family="exemplar-free", paper="Zhu et al., CVPR 2021", inputs=("image",))

    def __init__(
        self,
        *,
        prototype_weight: float = 10.0,
        distill_weight: float = 10.0,
        temperature: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(loss_classes="all", **kwargs)
        at_least(self, 0, prototype_weight=prototype_weight, distill_weight=distill_weight)
        above(self, 0, temperature=temperature)
        self.prototype_weight, self.distill_weight = prototype_weight, distill_weight
        self.temperature = temperature
        self.teacher = Teacher()
        self.rotation_head: Head  # k = 1, 2, 3: 3 columns for each column of the head
        self.class_means: Prototypes
        self.radius: Tensor
        self.register_buffer("radius", torch.zeros(()))
        self._old = torch.zeros(0, dtype=torch.int64)  # columns with a prototype, on the CPU

    @property
    def prototypes(self) -> Prototypes:
        return self.class_means

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        num_features = self.network.head.num_features
        self.rotation_head, self.class_means = self.build_head(num_features), Prototypes(num_features)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.rotation_head.grow(3 * task.num_new)

    def begin_phase(self, phase: Phase, origin: int, sources: Sequence[AddsLosses] = ()) -> None:
        super().begin_phase(phase, origin, sources)
        self._old = self.class_means.known_columns()

    def trainable(self) -> Iterable[nn.Parameter]:
        yield from super().trainable()
        yield from self.rotation_head.parameters()

    def prepare_batch(self, batch: Batch) -> Batch:
        return rotate_batch(batch)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        columns = output.logits.shape[1]
        labels = rotation_labels(batch.labels[: len(batch) // 4], columns)
        terms = {"ce": self._cross_entropy(output.features, output.logits, labels)}
        if not self.teacher:
            return terms
        old = self._old[batch.draw.fork(_CLASSES).randint(len(self._old))].to(self.device)
        noise = batch.draw.fork(_NOISE).randn(self.class_means.num_features, device=self.device)
        augmented = self.class_means.means[old] + self.radius * noise  # p~, (B, d)
        logits = self.network.head(augmented)
        terms["prototypes"] = self.prototype_weight * self._cross_entropy(augmented, logits, old)
        before = self.teacher(batch.images).features
        terms["distill"] = self.distill_weight * feature_norm_distillation(output.features, before, batch)
        return terms

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        features, labels = self.passes.features()
        self.class_means.update(features, labels, num_classes=task.num_seen, replace=True)
        if task.is_first:
            self.radius.copy_(average_radius(features, labels, self.class_means.means, self.class_means.counts))
        self.teacher.learn_from(self.network)

    def predict(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        return self.network.classify(images) / self.temperature

    def bytes_kept(self) -> dict[str, int]:
        rotations = sum(tensor.nbytes for tensor in self.rotation_head.state_dict().values())
        return {**super().bytes_kept(), "heads": rotations}

    def _cross_entropy(self, features: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy over the 4 C columns of both heads."""
        joint = torch.cat([logits, self.rotation_head(features)], dim=1)
        return cross_entropy(full_precision(joint) / self.temperature, labels)
