"""FeTrIL: Feature Translation for Exemplar-Free Class-Incremental Learning (Petit et al., WACV 2023, arXiv:2211.13131).

The backbone f is trained on the first task by cross-entropy and then frozen. The mean mu_c of the features of each
class is stored. In a later task, pseudo-features of an old class c are the features of the nearest new class n(c),
translated by the difference of the means:

    f~ = f(x) - mu_n(c) + mu_c   for all x of class n(c),   n(c) = argmin_n || mu_c - mu_n ||

A linear classifier is fitted from scratch on features of the new classes and pseudo-features of the old classes:

    classifier="svm"   one-vs-rest, squared hinge, on vectors of norm 1 (normalised after the translation); exact
    classifier="fc"    by cross-entropy, in a phase ``head`` on features; f~ is computed at each step

At the end of the first task the same classifier is fitted on the features of its classes. ``nearest="cosine"`` chooses
n(c) by the smallest angle between the means instead (PyCIL). Means are of un-augmented images, without normalisation.
Departs from the paper: all vectors of the SVM are normalised (the released script excludes the first 512). The paper
does not say whether the inputs of the fully connected layer are normalised; here they are not, unless ``normalise`` is
True. The first task is trained once; the paper trains it for 90 epochs and for 290 more with AugMix and another
optimizer. With a pretrained backbone and ``freeze_backbone``, the backbone is not trained in the first task either.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import Draw, ImageShape
from cl_lightning.checks import above, at_least, one_of
from cl_lightning.data import FeaturePool
from cl_lightning.distributed import rank, world_size
from cl_lightning.memory import Metric, Prototypes, class_means, nearest_mean_scores
from cl_lightning.models import LinearHead, linear_svm
from cl_lightning.strategies.base import AddsLosses
from cl_lightning.strategies.base.schedules import CosineOverPhase
from cl_lightning.strategy import Batch, ContinualStrategy, Output, Phase, PhaseOptions, Task, Traits

_BLOCK = 16384  # rows of pseudo-features in memory at a time while an SVM is solved
_ROOM = 2**25  # if all pseudo-features have at most this many numbers, they stay in memory between iterations


def nearest_new_class(old: Tensor, new: Tensor, nearest: Metric = "euclidean") -> Tensor:
    """n(c): for each old mean ``(c, d)``, the index of the nearest new mean ``(n, d)``, int64 ``(c,)``."""
    return nearest_mean_scores(old.double(), new.double(), nearest).argmax(dim=1)


class TranslatedFeatures(FeaturePool):
    """Features of the new classes, and translated features of the nearest new class for each old class.

    The pool stores the features of the new classes; a pseudo-feature is stored as an index and the offset of its class.

    Args:
        features: Features of the task, ``(n, d)``.
        labels: Columns of the features, int64 ``(n,)``.
        means: Means of the classes so far, ``(C, d)``.
        known: Whether the mean of a class is known from an earlier task, bool ``(C,)``.
        nearest: Metric by which the nearest new class is chosen.
        normalise: Whether rows are divided by their norms, after the translation.
    """

    def __init__(
        self, features: Tensor, labels: Tensor, means: Tensor, known: Tensor, *, nearest: Metric, normalise: bool
    ) -> None:
        super().__init__(features, labels)
        self.normalise = normalise
        own = class_means(features, labels, len(means), reduce=False)
        present = labels.bincount(minlength=len(means)) > 0
        new, old = present.nonzero().squeeze(1), (known & ~present).nonzero().squeeze(1)
        source = new[nearest_new_class(means[old], own[new], nearest)]  # n(c) of each old class
        self.offsets = torch.zeros_like(means)  # (C, d): mu_c - mu_n(c) of old classes, 0 of new ones
        self.offsets[old] = means[old] - own[source]
        parts = [(labels == column).nonzero().squeeze(1) for column in source.tolist()]
        self.sources = torch.cat([torch.arange(len(labels), device=labels.device), *parts])
        counts = torch.tensor([len(part) for part in parts], dtype=torch.int64, device=labels.device)
        self.labels = torch.cat([labels, old.repeat_interleave(counts)])

    def take(self, rows: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        rows = rows.to(self.labels.device)
        labels = self.labels[rows]
        features = self.features[self.sources[rows]] + self.offsets[labels]
        return F.normalize(features, dim=1) if self.normalise else features, labels


class FeTrIL(ContinualStrategy):
    """A linear classifier on a backbone frozen after the first task, with pseudo-features of old classes.

    Pseudo-features of an old class are features of the nearest new class, translated by the difference of the means.

    Args:
        classifier: ``svm``, or ``fc`` for a linear layer trained by gradient descent.
        nearest: Metric between means by which the nearest new class is chosen: ``euclidean`` or ``cosine``.
        svm_cost: Weight of the errors of the SVM, above 0.
        normalise: Whether features are divided by their norms before the classifier; None for True with an SVM and
            False with a linear layer.
        head_options: Options of the phase ``head``; at least 1 epoch. The default is SGD with learning rate 0.05,
            momentum 0.9 and weight decay 5e-4, with a cosine schedule.
        kwargs: Options of the base class.
    """

    traits = Traits(family="exemplar-free", paper="Petit et al., WACV 2023, arXiv:2211.13131")

    def __init__(
        self,
        *,
        classifier: Literal["svm", "fc"] = "svm",
        nearest: Metric = "euclidean",
        svm_cost: float = 1.0,
        normalise: bool | None = None,
        head_options: PhaseOptions = PhaseOptions(epochs=50),
        **kwargs: Any,
    ) -> None:
        super().__init__(loss_classes="all", **kwargs)
        one_of(self, ("svm", "fc"), classifier=classifier)
        one_of(self, ("euclidean", "cosine"), nearest=nearest)
        above(self, 0, svm_cost=svm_cost)
        at_least(self, 1, **{"head_options.epochs": head_options.epochs}, optional=True)
        self.classifier, self.nearest, self.svm_cost = classifier, nearest, svm_cost
        self.normalise = classifier == "svm" if normalise is None else normalise
        sgd = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=5e-4)
        self.head_options = head_options.filled(sgd, CosineOverPhase)
        self.means: Prototypes
        self._pool: TranslatedFeatures | None = None

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        self.means = Prototypes(self.network.head.num_features)
        if self.classifier == "svm" and not isinstance(self.network.head, LinearHead):
            name = type(self.network.head).__name__
            raise ValueError(f"FeTrIL: head is {name}; use a LinearHead for the SVM, or classifier 'fc'")

    @property
    def backbone_is_final(self) -> bool:
        return self.freeze_backbone or not self.task.is_first

    def phases(self, task: Task) -> list[Phase]:
        backbone = [Phase()] if task.is_first and not self.freeze_backbone else []
        if self.classifier == "svm":
            return backbone
        return [*backbone, Phase("head", self.head_options, features=self.translated_features)]

    def begin_phase(self, phase: Phase, origin: int, sources: Sequence[AddsLosses] = ()) -> None:
        super().begin_phase(phase, origin, sources)
        if phase.features is not None:
            self.means.grow(self.task.num_seen)  # from now on `predict` uses the classifier on features
            head = self.network.head
            for block, size in zip(head.blocks, head.block_sizes(), strict=True):
                block.load_state_dict(head.new_block(size).state_dict())  # from scratch

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": self.classification_loss(output, batch)}

    def translated_features(self) -> TranslatedFeatures:
        if self._pool is None:  # one pass over the images, for the phase and for the end of the task
            self.means.grow(self.task.num_seen)
            means, known = self.means.means, self.means.known
            self._pool = TranslatedFeatures(
                *self.passes.all_features(), means, known, nearest=self.nearest, normalise=self.normalise
            )
        return self._pool

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        pool = self.translated_features()
        if self.classifier == "svm":
            self._solve(pool)
        self.means.update(pool.features, pool.labels[: len(pool.features)], num_classes=task.num_seen, reduce=False)
        self._pool = None

    def predict(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        features = self.network.backbone(images)
        # While the backbone is trained in the first task, the head takes features that are not normalised.
        normalise = self.normalise and len(self.means) > 0
        return self.network.head.classify(F.normalize(features, dim=1) if normalise else features)

    def _solve(self, pool: TranslatedFeatures) -> None:
        """Fit the SVM and copy its weights to the head. Each process computes on its share of the rows."""
        head = self.network.head
        assert isinstance(head, LinearHead)
        share = torch.arange(len(pool))[rank() :: world_size()]

        def blocks() -> Iterator[tuple[Tensor, Tensor]]:
            for rows in torch.split(share, _BLOCK):
                yield pool.take(rows, Draw.of(len(rows)))

        weight, bias = linear_svm(
            blocks,
            self.task.num_seen,
            head.num_features,
            cost=self.svm_cost,
            bias=head.bias,
            keep=len(share) * head.num_features <= _ROOM,
            device=self.device,
        )
        first = 0
        for block in head.blocks:
            assert isinstance(block, nn.Linear)
            rows = slice(first, first := first + block.out_features)
            block.weight.copy_(weight[rows])
            if block.bias is not None:
                block.bias.copy_(bias[rows])
