"""IL2A: Class-Incremental Learning via Dual Augmentation (Zhu et al., NeurIPS 2021).

Class augmentation: images x_i, x_j of two classes of the task are mixed, and each pair a > b of the m classes
of the task, counted from 0, is an additional class while the task is trained,

    x = lambda x_i + (1 - lambda) x_j,   lambda ~ Beta(alpha, alpha), 0.5 if it is outside [0.4, 0.6]
    column of the pair: C + a (a - 1) / 2 + b,   m (m - 1) / 2 columns in all

The batch is mixed ``mix_times`` times with a random permutation of itself.
Semantic augmentation: for features N(mu_y, r Sigma_y) of an old class y, the expected cross-entropy has an upper bound
in closed form, the cross-entropy of the logits

    z~_c = z_c(mu_y) + r / 2 (w_c - w_y)^T Sigma_y (w_c - w_y)

with w the rows of the linear head. Its gradient reaches w through both terms. With f the backbone, f' the backbone
before the task, and X the images of the batch and their mixtures:

    L = CE(z(X) / tau) + gamma || f(X) - f'(X) ||_2 + beta CE(z~ / tau, y),   y one of the old classes, B times

mu_y and Sigma_y, the mean and the unbiased covariance of the features of class y, are computed from un-augmented images
at the end of its task and are not changed afterwards. The first task has the first term only. The prediction is the
largest of the C logits, without pairs.
r -> strength, beta -> semantic_weight, gamma -> distill_weight, tau -> temperature, alpha -> mix_alpha.
The authors' code is not available: the constants and the division of all logits by tau follow the re-implementation of
PyCIL. z~ has no columns of pairs. A mixture of one class is left out of the losses, but passes through the network.
With several processes, each process mixes its own images.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cl_lightning.batch import Draw, ImageShape
from cl_lightning.checks import above, at_least
from cl_lightning.losses import cross_entropy, feature_norm_distillation, full_precision
from cl_lightning.memory import Prototypes, Teacher
from cl_lightning.models import Head, LinearHead, head_as
from cl_lightning.strategies.base import AddsLosses
from cl_lightning.strategy import Batch, ContinualStrategy, Output, Phase, Task, Traits

_CLASSES, _PARTNERS, _SHARES = 0x12A1, 0x12A2, 0x12A3  # salts
_TARGETS = "il2a.targets"  # columns of images and mixtures, pairs included; -1 for mixtures of one class


def pair_columns(first: Tensor, second: Tensor) -> Tensor:
    """Index of each unordered pair of different numbers: ``a (a - 1) / 2 + b`` with a > b; -1 for equal numbers.

    Args:
        first, second: Numbers from 0, below m, int64 of equal shape.

    Returns:
        int64, below ``m (m - 1) / 2``.
    """
    a, b = torch.maximum(first, second), torch.minimum(first, second)
    return (a * (a - 1) // 2 + b).masked_fill(a == b, -1)


def mixing_shares(draw: Draw, times: int, alpha: float) -> Tensor:
    """lambda of each row and mixture, float32 ``(B, times)``: Beta(alpha, alpha), and 0.5 outside [0.4, 0.6]."""
    drawn = np.random.default_rng(draw.key).beta(alpha, alpha, (draw.total, times))[draw.start : draw.stop]
    return torch.from_numpy(np.where((drawn < 0.4) | (drawn > 0.6), 0.5, drawn)).float()


def semantic_logits(
    logits: Tensor, weight: Tensor, covariances: Tensor, columns: Tensor, strength: float = 2.5
) -> Tensor:
    """z~: logits of class means whose cross-entropy is a bound of the expected cross-entropy of the class.

    Args:
        logits: z of the means, ``(n, C)``.
        weight: w, the rows of the head, ``(C, d)``.
        covariances: Sigma of each mean's class, ``(n, d, d)``.
        columns: y, the class of each mean, int64 ``(n,)``.
        strength: r.

    Returns:
        ``(n, C)``, in float32 or float64; the logit of y itself is unchanged.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = full_precision(logits)
        gaps = weight.to(logits.dtype) - weight.to(logits.dtype)[columns][:, None]  # (n, C, d)
        variances = ((gaps @ covariances.to(logits.dtype)) * gaps).sum(dim=2)  # of z_c - z_y
        return logits + strength / 2 * variances


class IL2A(ContinualStrategy):
    """Mixtures of two classes as additional classes, and old classes as normal distributions of features.

    Args:
        semantic_weight: beta, at least 0.
        distill_weight: gamma, at least 0.
        strength: r, at least 0; with 0 the prototypes mu alone are classified.
        temperature: tau, above 0.
        mix_times: Number of mixtures per image, at least 0.
        mix_alpha: alpha, above 0.
        head: Builds a ``LinearHead``; None for ``LinearHead``.
        kwargs: Options of the base class.
    """

    traits = Traits(family="exemplar-free", paper="Zhu et al., NeurIPS 2021")

    def __init__(
        self,
        *,
        semantic_weight: float = 10.0,
        distill_weight: float = 10.0,
        strength: float = 2.5,
        temperature: float = 0.1,
        mix_times: int = 4,
        mix_alpha: float = 20.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(loss_classes="all", **kwargs)
        at_least(self, 0, semantic_weight=semantic_weight, distill_weight=distill_weight, strength=strength)
        at_least(self, 0, mix_times=mix_times)
        above(self, 0, temperature=temperature, mix_alpha=mix_alpha)
        self.semantic_weight, self.distill_weight, self.strength = semantic_weight, distill_weight, strength
        self.temperature, self.mix_times, self.mix_alpha = temperature, mix_times, mix_alpha
        self.teacher = Teacher()
        self.pair_head: Head  # a column for each pair of classes of the task, while it is trained
        self.class_means: Prototypes
        self._old = torch.zeros(0, dtype=torch.int64)  # columns with a prototype, on the CPU

    @property
    def prototypes(self) -> Prototypes:
        return self.class_means

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        head = head_as(self.network, LinearHead, self, "for whose logits the bound holds")
        self.pair_head = self.build_head(head.num_features)
        self.class_means = Prototypes(head.num_features, covariance=True)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.pair_head.grow(len(task.columns) * (len(task.columns) - 1) // 2 if self.mix_times else 0)

    def begin_phase(self, phase: Phase, origin: int, sources: Sequence[AddsLosses] = ()) -> None:
        super().begin_phase(phase, origin, sources)
        self._old = self.class_means.known_columns()

    def trainable(self) -> Iterable[nn.Parameter]:
        yield from super().trainable()
        yield from self.pair_head.parameters()

    def prepare_batch(self, batch: Batch) -> Batch:
        """Images ``(B, ...)``, followed by ``mix_times`` mixtures of each."""
        partners = batch.draw.fork(_PARTNERS).rand(self.mix_times).argsort(dim=0).T.to(batch.images.device)
        shares = mixing_shares(batch.draw.fork(_SHARES), self.mix_times, self.mix_alpha).T.to(batch.images)
        places = (self.task_columns[-1].cumsum(0) - 1)[batch.labels]  # of the classes among those of the task
        images, targets = [batch.images], [batch.labels]
        for partner, share in zip(partners, shares, strict=True):
            images.append(
                torch.lerp(batch.images[partner], batch.images, share.view(-1, *[1] * (batch.images.dim() - 1)))
            )
            pairs = pair_columns(places, places[partner])
            known = (pairs >= 0) & (batch.labels >= 0) & (batch.labels[partner] >= 0)
            targets.append((self.network.head.num_columns + pairs).where(known, -1))
        times = 1 + self.mix_times
        hidden = torch.full_like(batch.labels, -1)
        extra = {name: torch.cat([value] * times) for name, value in batch.extra.items()}
        return batch.replace(
            images=torch.cat(images),
            raw=torch.cat([batch.raw] * times),
            labels=torch.cat([batch.labels, *[hidden] * self.mix_times]),
            tasks=batch.tasks.repeat(times),
            indices=batch.indices.repeat(times),
            extra={**extra, _TARGETS: torch.cat(targets)},
        )

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        targets = batch.extra[_TARGETS]
        logits = torch.cat([output.logits, self.pair_head(output.features)], dim=1)
        terms = {"ce": cross_entropy(full_precision(logits) / self.temperature, targets)}
        if not self.teacher:
            return terms
        counted = targets >= 0
        counted[: batch.draw.stop - batch.draw.start] = True  # images, with or without a label
        before = self.teacher(batch.images).features
        student, teacher = (rows.where(counted[:, None], 0.0) for rows in (output.features, before))
        terms["distill"] = self.distill_weight * feature_norm_distillation(student, teacher, batch)
        old = self._old.to(self.device)
        means, covariances = self.class_means.means[old], self.class_means.covariances[old]
        head = self.network.head
        bounds = semantic_logits(head(means), head.weight(), covariances, old, self.strength)  # (C_old, C)
        drawn = batch.draw.fork(_CLASSES).randint(len(self._old)).to(self.device)
        terms["semantic"] = self.semantic_weight * cross_entropy(bounds[drawn] / self.temperature, old[drawn])
        return terms

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        features, labels = self.passes.features()
        self.class_means.update(features, labels, num_classes=task.num_seen, replace=True)
        self.pair_head.blocks = nn.ModuleList()
        self.teacher.learn_from(self.network)

    def predict(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        return self.network.classify(images) / self.temperature
