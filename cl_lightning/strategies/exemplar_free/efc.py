"""Elastic Feature Consolidation (Magistri et al., ICLR 2024, arXiv:2402.03917).

With f the backbone, f' the backbone before the task, W the weights of the head (all classes) and p the softmax over
all classes, the loss L_EFM penalises feature drift in the directions that predictions depend on. The directions are
given by the empirical feature matrix E after the previous task:

    L_EFM = 1/B sum_i (f(x_i) - f'(x_i))^T (lambda E + eta I) (f(x_i) - f'(x_i))
    E = 1/n sum_x W^T (diag(p) - p p^T) W

The features of each class are stored as a normal distribution N(p_c, Sigma_c) when its task ends. The total loss is
the sum of the cross-entropy L_cur over the classes of the task, L_EFM, and a cross-entropy L_PR over all classes on B
class-balanced features. For each of the B rows a class is drawn uniformly. The row of an old class is a pseudo-feature
f~ ~ N(p_c, Sigma_c); the row of a new class is the feature of an image X' of the previous batch:

    L = L_cur(X) + L_EFM(X) + L_PR(f~ or f(X'))

When the task ends, the means of old classes are corrected for the drift of the features, with E of the previous task
and d and w per class c and sample i:

    p_c <- p_c + sum_i w_ci (f(x_i) - f'(x_i)) / sum_i w_ci,   w_ci = exp(-d_ci / (2 sigma^2)),
    d_ci = (f'(x_i) - p_c)^T E (f'(x_i) - p_c), scaled to [0, 1] over all c and i

Then E and the distributions of the new classes are computed. In the first task, rotations of the images by 90, 180 and
270 degrees are trained as 3 C additional classes, with a head that is removed afterwards; as in the released code it
has biases, unlike the head of the classes. From the second task on batch normalisation is frozen.
lambda -> feature_weight, eta -> identity_weight, sigma -> drift_sigma.
Departs from the released code: classes of L_PR are drawn with replacement; the image of a new class is the image in the
same row of the previous batch, not one of the first images of that batch. In the first batch of a task, which has no
previous batch, all B rows are pseudo-features of old classes. E, the distributions and the drift are computed from
un-augmented images; the code takes augmented images, whose features have larger covariances (on digits with shifts the
trace is 1.5 times as large).
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cl_lightning.batch import ImageShape
from cl_lightning.checks import above, at_least
from cl_lightning.data import rotate_batch, rotation_labels
from cl_lightning.distributed import all_gather_together, all_sum
from cl_lightning.losses import cross_entropy, feature_distillation
from cl_lightning.memory import GaussianPrototypes, Teacher, kernel_drift
from cl_lightning.models import Head, LinearHead, batch_norms, head_as
from cl_lightning.strategies.base import AddsLosses
from cl_lightning.strategy import Batch, ContinualStrategy, HeadFactory, Output, Phase, Task, Traits

_CLASSES, _NOISE = 0xEFC1, 0xEFC2  # salts


def empirical_feature_matrix(logits: Tensor, weight: Tensor) -> Tensor:
    """Empirical feature matrix ``E = 1/n sum_x W^T (diag(p_x) - p_x p_x^T) W``.

    E is the mean over samples of ``sum_c p_c J_c^T J_c`` with ``J_c = d log p_c / d f``, for a linear head: the local
    sensitivity of predictions to each direction of the features. E is symmetric, positive semi-definite and has rank
    C - 1 at most.

    Args:
        logits: Logits of this process's samples, ``(n, C)``; sums are taken over all processes.
        weight: Weights of the head, ``(C, d)``.

    Returns:
        ``(d, d)``, float64, the same on every process.
    """
    p, w = logits.double().softmax(dim=1), weight.double()
    count = all_sum(p.new_tensor(float(len(p)))).clamp(min=1)
    middle = all_sum(p.sum(dim=0).diag() - p.T @ p) / count  # (C, C)
    matrix = w.T @ middle @ w
    return (matrix + matrix.T) / 2


class EFC(ContinualStrategy):
    """Feature-drift penalty in the directions relevant for predictions, and pseudo-features of old classes.

    Args:
        feature_weight: lambda, at least 0.
        identity_weight: eta, at least 0.
        drift_sigma: sigma, above 0: the width of the kernel, relative to the square root of the range of d.
        rotations: Whether rotations are additional classes in the first task.
        head: Builds a ``LinearHead``; None for a ``LinearHead`` without biases.
        kwargs: Options of the base class.
    """

    traits = Traits(family="exemplar-free", paper="Magistri et al., ICLR 2024, arXiv:2402.03917", uses_old_logits=True)

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
        super().__init__(head=head or functools.partial(LinearHead, bias=False), loss_classes="current", **kwargs)
        at_least(self, 0, feature_weight=feature_weight, identity_weight=identity_weight)
        above(self, 0, drift_sigma=drift_sigma)
        self.feature_weight, self.identity_weight = feature_weight, identity_weight
        self.drift_sigma, self.rotations = drift_sigma, rotations
        if rotations:
            self.traits = self.traits.but(inputs=("image",))
        self.teacher = Teacher(reference=True)
        self.rotation_head: Head  # 3 C columns during the first task
        self.gaussians: GaussianPrototypes
        self.feature_matrix: Tensor
        self._previous: Batch | None = None
        self._candidates, self._num_old = torch.zeros(0, dtype=torch.int64), 0
        self._balanced: tuple[Tensor, ...] = ()

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        num_features = head_as(self.network, LinearHead, self, "of whose weights E is made").num_features
        self.rotation_head, self.gaussians = LinearHead(num_features), GaussianPrototypes(num_features)
        self.register_buffer("feature_matrix", torch.zeros(num_features, num_features))

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if task.is_first and self.rotations:
            self.rotation_head.grow(3 * task.num_new)

    def begin_phase(self, phase: Phase, origin: int, sources: Sequence[AddsLosses] = ()) -> None:
        super().begin_phase(phase, origin, sources)
        old = self.gaussians.known_columns().tolist()
        # On the CPU, so that the number of images of a step is known without a synchronisation.
        self._candidates = torch.tensor([*old, *(column for column in self.task.columns if column not in old)])
        self._num_old = len(old)

    def on_train_start(self) -> None:
        self._previous = self.data.batch_before()

    def _frozen_norms(self) -> list[nn.Module]:
        return super()._frozen_norms() if self.task.is_first else list(batch_norms(self.network.backbone))

    def trainable(self) -> Iterable[nn.Parameter]:
        yield from super().trainable()
        yield from self.rotation_head.parameters()

    def prepare_batch(self, batch: Batch) -> Batch:
        if self.task.is_first:
            return rotate_batch(batch) if self.rotations else batch
        previous, self._previous = self._previous, batch
        self._balanced = self._draw_balanced(batch, previous)
        return batch

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.task.is_first and self.rotations:
            joint = torch.cat([output.logits, self.rotation_head(output.features)], dim=1)  # (4 B, 4 C)
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
        features, labels = self.passes.features()
        self.follow_drift(features)
        self.remember(features, labels)

    def bytes_kept(self) -> dict[str, int]:
        return {**super().bytes_kept(), "importance": self.feature_matrix.nbytes}

    def _feature_loss(self, batch: Batch, output: Output) -> Tensor:
        identity = torch.eye(len(self.feature_matrix), device=self.device)
        metric = self.feature_weight * self.feature_matrix + self.identity_weight * identity
        return feature_distillation(output.features, self.teacher(batch.images).features, metric)

    def _draw_balanced(self, batch: Batch, previous: Batch | None) -> tuple[Tensor, ...]:
        """Rows of L_PR: pseudo-features and their columns, then images of the previous batch and their columns."""
        if self._num_old == 0:
            return ()
        drawn = batch.draw.fork(_CLASSES).randint(self._num_old if previous is None else len(self._candidates))
        old_rows = (drawn < self._num_old).nonzero().squeeze(1).to(self.device)
        old = self._candidates[drawn[drawn < self._num_old]]
        noise = batch.draw.fork(_NOISE).randn(self.gaussians.num_features, device=self.device)
        pseudo_features, old_labels = self.gaussians.sample(old, noise[old_rows]), old.to(self.device)
        if previous is None:
            return pseudo_features, old_labels
        images, labels = previous.images, previous.labels
        rows = (drawn >= self._num_old).nonzero().squeeze(1)
        if previous.draw.total != batch.draw.total:  # last batch of an epoch: the shares of the processes differ
            images, labels = all_gather_together([images, labels])
            rows = (rows + batch.draw.start) % previous.draw.total
        rows = rows.to(self.device)
        return pseudo_features, old_labels, images[rows], labels[rows]

    def _balanced_loss(self) -> Tensor:
        """L_PR: cross-entropy over all classes on pseudo-features of old classes and images of the previous batch."""
        features, labels, *new = self._balanced  # new: images and labels of new classes
        if new and len(new[0]):
            self.terms.samples = (self.terms.samples or 0) + len(new[0])
            features = torch.cat([features, self.network.backbone(new[0]).float()])
            labels = torch.cat([labels, new[1]])
        return cross_entropy(self.network.head(features), labels)

    @torch.no_grad()
    def follow_drift(self, features: Tensor) -> None:
        """Correct the means of old classes for drift; ``features`` are the new ones of this process's images."""
        if not self.teacher or self.teacher.network is None:
            return
        before, after = all_gather_together([self.passes.features(self.teacher.network)[0], features])
        known = self.gaussians.known.nonzero().squeeze(1)
        means = self.gaussians.means[known]
        self.gaussians.means[known] += kernel_drift(
            before, after, means, self.drift_sigma, metric=self.feature_matrix, rescale=True
        )

    def remember(self, features: Tensor, labels: Tensor) -> None:
        """Compute E and the distributions of the classes of the task, and copy the network as teacher."""
        head = self.network.head
        self.feature_matrix.copy_(empirical_feature_matrix(head(features), head.weight()))
        self.gaussians.update(features, labels, num_classes=self.task.num_seen, replace=True)
        self.rotation_head.blocks = nn.ModuleList()
        self.teacher.learn_from(self.network)
