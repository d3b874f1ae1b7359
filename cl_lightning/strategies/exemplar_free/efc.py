"""Elastic Feature Consolidation (Magistri et al., ICLR 2024, arXiv:2402.03917).

With f the backbone, f' that before the task, W the rows of all heads and p the softmax over all classes, features are
held in the directions that the predictions depend on, by the empirical feature matrix E of the task before:

    L_EFM = 1/B sum_i (f(x_i) - f'(x_i))^T (lambda E + eta I) (f(x_i) - f'(x_i))
    E = 1/n sum_x W^T (diag(p) - p p^T) W

Each class is kept as a normal distribution N(p_c, Sigma_c) of its features when it was learnt. To the cross-entropy
over the classes of the task, L_cur, comes one over all classes, L_PR, on B features that are balanced over them: each
is of a class drawn uniformly, imitated if it is an old one, f~ ~ N(p_c, Sigma_c), and else that of an image of the
batch before:

    L = L_cur(X) + L_EFM(X) + L_PR(f~ or f(X'))

When the task is over, the means of old classes follow the features (with the old E, d and w per class and sample):

    p_c <- p_c + sum_i w_ci (f(x_i) - f'(x_i)) / sum_i w_ci,   w_ci = exp(-d_ci / (2 sigma^2)),
    d_ci = (f'(x_i) - p_c)^T E (f'(x_i) - p_c), scaled to [0, 1] over all c and i

Then E and the new classes are measured. The first task learns turned images too: by 90, 180 and 270 degrees they are
3 C further classes of a head that is thrown away. After it batch normalisation is frozen.
lambda -> feature_weight, eta -> identity_weight, sigma -> drift_sigma.
Departs from the released code: classes of L_PR are drawn with replacement; the image that stands for a new class is the
one at the same place of the batch before, not one of its first. Before a task's first such batch all are imitated.
"""

import functools
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cl_lightning.backbones import ImageShape
from cl_lightning.batch import Batch
from cl_lightning.distributed import all_gather_together, all_sum
from cl_lightning.heads import Head, LinearHead
from cl_lightning.losses import cross_entropy, feature_distillation
from cl_lightning.network import Output, batch_norms
from cl_lightning.prototypes import GaussianPrototypes, kernel_drift
from cl_lightning.rotations import rotate_batch, rotation_labels
from cl_lightning.strategy import ContinualStrategy, HeadFactory, Phase
from cl_lightning.stream import Task
from cl_lightning.teacher import Teacher

_CLASSES, _NOISE = 0xEFC1, 0xEFC2  # salts


def empirical_feature_matrix(logits: Tensor, weight: Tensor) -> Tensor:
    """``E = 1/n sum_x W^T (diag(p_x) - p_x p_x^T) W``: how much each direction of the features changes predictions.

    The mean of ``sum_c p_c J_c^T J_c`` with ``J_c = d log p_c / d f`` for a linear head. It is symmetric, positive
    semi-definite and of rank C - 1 at most.

    Args:
        logits: Of this process's samples, ``(n, C)``; sums are taken over all processes.
        weight: Of the head, ``(C, d)``.

    Returns:
        ``(d, d)``, float64, the same on every process.
    """
    p, w = logits.double().softmax(dim=1), weight.double()
    count = all_sum(p.new_tensor(float(len(p)))).clamp(min=1)
    middle = all_sum(p.sum(dim=0).diag() - p.T @ p) / count  # (C, C)
    matrix = w.T @ middle @ w
    return (matrix + matrix.T) / 2


class EFC(ContinualStrategy):
    """Features held where predictions depend on them, and old classes imitated from normal distributions.

    Args:
        feature_weight: lambda, at least 0.
        identity_weight: eta, at least 0.
        drift_sigma: sigma, above 0: the width of the kernel, as a share of the largest distance.
        rotations: Whether the first task learns turned images too.
        head: Builds a ``LinearHead``; None for one without biases.
        kwargs: Of the base.
    """

    family: ClassVar[str] = "exemplar-free"
    paper: ClassVar[str] = "Magistri et al., ICLR 2024, arXiv:2402.03917"
    uses_old_logits = True
    teacher_measures = True

    def __init__(
        self,
        *,
        feature_weight: float = 10.0,
        identity_weight: float = 0.1,
        drift_sigma: float = 0.2,
        rotations: bool = True,
        head: HeadFactory | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(head=head or functools.partial(LinearHead, bias=False), visible="current", **kwargs)
        if min(feature_weight, identity_weight) < 0 or drift_sigma <= 0:
            raise ValueError(
                f"{type(self).__name__}: feature_weight={feature_weight}, identity_weight={identity_weight}, "
                f"drift_sigma={drift_sigma}; at least 0, at least 0, above 0"
            )
        self.feature_weight, self.identity_weight = feature_weight, identity_weight
        self.drift_sigma, self.rotations = drift_sigma, rotations
        self.plain_first_task = not rotations
        self.teacher = Teacher()
        self.turned_head: Head  # of the first task
        self.gaussians: GaussianPrototypes
        self.feature_matrix: Tensor
        self._previous: Batch | None = None
        self._candidates, self._num_old = torch.zeros(0, dtype=torch.int64), 0
        self._balanced: tuple[Tensor, ...] = ()

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        if not isinstance(self.network.head, LinearHead):
            name = type(self.network.head).__name__
            raise ValueError(f"{type(self).__name__}: head is {name}; the feature matrix is that of a LinearHead")
        num_features = self.network.head.num_features
        self.turned_head, self.gaussians = LinearHead(num_features, bias=False), GaussianPrototypes(num_features)
        self.register_buffer("feature_matrix", torch.zeros(num_features, num_features))

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if task.is_first and self.rotations:
            self.turned_head.grow(3 * task.num_new)

    def begin_phase(self, phase: Phase, epochs: int, origin: int) -> None:
        super().begin_phase(phase, epochs, origin)
        old = self.gaussians.known.nonzero().squeeze(1).tolist()
        # Kept on the CPU, so that a step does not wait for the device to know how many images it needs.
        self._candidates = torch.tensor([*old, *(column for column in self.task.columns if column not in old)])
        self._num_old = len(old)

    def on_train_start(self) -> None:
        self._previous = self.batch_before()

    def frozen_norms(self) -> list[nn.Module]:
        return super().frozen_norms() if self.task.is_first else list(batch_norms(self.network.backbone))

    def trainable(self) -> Iterable[nn.Parameter]:
        yield from super().trainable()
        yield from self.turned_head.parameters()

    def prepare(self, batch: Batch) -> Batch:
        if self.task.is_first:
            return rotate_batch(batch) if self.rotations else batch
        previous, self._previous = self._previous, batch
        self._balanced = self._draw_balanced(batch, previous)
        return batch

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.task.is_first and self.rotations:
            joint = torch.cat([output.logits, self.turned_head(output.features)], dim=1)  # (4 B, 4 C)
            labels = rotation_labels(batch.labels[: len(batch) // 4], output.logits.shape[1])
            return {"ce": cross_entropy(joint, labels)}
        terms = {"ce": self.classification_loss(output, batch)}  # over the columns of the task
        if self.teacher:
            terms["features"] = self._feature_loss(batch, output)
            if self._balanced:
                terms["balanced"] = self._balanced_loss()
        return terms

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        features, labels = self.features()
        self.follow_drift(features)
        self.remember(features, labels)

    def bytes_kept(self) -> dict[str, int]:
        return {**super().bytes_kept(), "importance": self.feature_matrix.nbytes}

    def _feature_loss(self, batch: Batch, output: Output) -> Tensor:
        identity = torch.eye(len(self.feature_matrix), device=self.device)
        metric = self.feature_weight * self.feature_matrix + self.identity_weight * identity
        return feature_distillation(output.features, self.teacher(batch.images).features, metric)

    def _draw_balanced(self, batch: Batch, previous: Batch | None) -> tuple[Tensor, ...]:
        """For L_PR: features and columns of imitated classes, images of the batch before and their columns."""
        if self._num_old == 0:
            return ()
        drawn = batch.draw.fork(_CLASSES).randint(self._num_old if previous is None else len(self._candidates))
        imitated = (drawn < self._num_old).nonzero().squeeze(1).to(self.device)
        old = self._candidates[drawn[drawn < self._num_old]]
        noise = batch.draw.fork(_NOISE).randn(self.gaussians.num_features, device=self.device)
        imitations, labels_of_old = self.gaussians.sample(old, noise[imitated]), old.to(self.device)
        if previous is None:
            return imitations, labels_of_old
        images, labels = previous.images, previous.labels
        rows = (drawn >= self._num_old).nonzero().squeeze(1)
        if previous.draw.total != batch.draw.total:  # the last batch of an epoch: no row for each row on each process
            images, labels = all_gather_together([images, labels])
            rows = (rows + batch.draw.start) % previous.draw.total
        rows = rows.to(self.device)
        return imitations, labels_of_old, images[rows], labels[rows]

    def _balanced_loss(self) -> Tensor:
        """L_PR: cross-entropy over all classes on imitated old classes and on images of the batch before."""
        features, labels, *of_new = self._balanced
        if of_new and len(of_new[0]):
            self.samples_in_step = (self.samples_in_step or 0) + len(of_new[0])
            features = torch.cat([features, self.network.backbone(of_new[0]).float()])
            labels = torch.cat([labels, of_new[1]])
        return cross_entropy(self.network.head(features), labels)

    @torch.no_grad()
    def follow_drift(self, features: Tensor) -> None:
        """Move the means of old classes as the task's images have moved; ``features`` are those of this process now."""
        if not self.teacher or self.teacher.network is None:
            return
        before, after = all_gather_together([self.features(self.teacher.network)[0], features])
        known = self.gaussians.known.nonzero().squeeze(1)
        means = self.gaussians.means[known]
        self.gaussians.means[known] += kernel_drift(
            before, after, means, self.drift_sigma, metric=self.feature_matrix, rescale=True
        )

    def remember(self, features: Tensor, labels: Tensor) -> None:
        """Measure E, then the distributions of the classes of the task."""
        head = self.network.head
        self.feature_matrix.copy_(empirical_feature_matrix(head(features), head.weight()))
        self.gaussians.update(features, labels, num_classes=self.task.num_seen, replace=True)
        self.turned_head.blocks = nn.ModuleList()
        self.teacher.learn_from(self.network)
