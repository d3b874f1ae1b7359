"""FeTrIL: Feature Translation for Exemplar-Free Class-Incremental Learning (Petit et al., WACV 2023, arXiv:2211.13131).

The backbone f learns the first task by cross-entropy and is frozen. Of each class its mean mu_c of features is kept. In
a later task the features of an old class c are imitated by those of the new class n whose mean is nearest, moved over:

    f~ = f(x) - mu_n(c) + mu_c   for all x of class n(c),   n(c) = argmin_n || mu_c - mu_n ||

and a linear classifier is fitted from scratch on the features of the new classes and the imitated ones of the old:

    classifier="svm"   one-vs-rest, squared hinge, on vectors of norm 1 (normalised after they were moved); exact
    classifier="fc"    by cross-entropy, in a phase ``head`` on features, which makes f~ of index and offset per step

The first task ends with the same classifier on its real features. ``nearest="cosine"`` takes the mean of the smallest
angle instead (PyCIL). Features are un-augmented and not normalised where means are taken.
Departs from the paper: all vectors of the SVM are normalised (the released script leaves out the first 512). Whether
those of the fully connected layer are is not told; here they are not, unless ``normalise`` says so. The first task is
trained once, where the paper trains it for 90 epochs and for 290 more with AugMix and another optimizer. With a
pretrained backbone and ``freeze_backbone`` the first task trains no backbone either.
"""

import functools
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.backbones import ImageShape
from cl_lightning.batch import Batch, Draw
from cl_lightning.distributed import rank, world_size
from cl_lightning.features import FeaturePool
from cl_lightning.heads import LinearHead
from cl_lightning.network import Output
from cl_lightning.prototypes import Metric, Prototypes, class_means, nearest_mean_scores
from cl_lightning.schedules import CosineOverPhase
from cl_lightning.strategy import ContinualStrategy, Phase
from cl_lightning.stream import Task
from cl_lightning.svm import linear_svm

_BLOCK = 16384  # rows of pseudo-features that exist at a time while an SVM is solved
_ROOM = 2**25  # numbers in them, up to which they are kept meanwhile


def nearest_new_class(old: Tensor, new: Tensor, nearest: Metric = "euclidean") -> Tensor:
    """n(c): for each old mean ``(c, d)`` the index ``(c,)`` of the new mean ``(n, d)`` that is nearest."""
    return nearest_mean_scores(old.double(), new.double(), nearest).argmax(dim=1)


class TranslatedFeatures(FeaturePool):
    """Features of the new classes, and of each old class those of the nearest new class, moved by the gap of the means.

    Kept are the features of the new classes and, for each row, which of them it is and how it is moved.

    Args:
        features: Of the task, ``(n, d)``.
        labels: Their columns, ``(n,)``.
        means: Of the classes so far, ``(C, d)``.
        known: Which of them are known from earlier tasks, bool ``(C,)``.
        nearest: Measure of means by which a new class is the nearest.
        normalise: Whether rows get norm 1, at the end.
    """

    def __init__(
        self, features: Tensor, labels: Tensor, means: Tensor, known: Tensor, *, nearest: Metric, normalise: bool
    ) -> None:
        super().__init__(features, labels)
        self.normalise = normalise
        own = class_means(features, labels, len(means), reduce=False)
        present = labels.bincount(minlength=len(means)) > 0
        new, old = present.nonzero().squeeze(1), (known & ~present).nonzero().squeeze(1)
        borrowed = new[nearest_new_class(means[old], own[new], nearest)]
        self.offsets = torch.zeros_like(means)  # of each class, from the features that stand for it
        self.offsets[old] = means[old] - own[borrowed]
        parts = [(labels == source).nonzero().squeeze(1) for source in borrowed.tolist()]
        self.sources = torch.cat([torch.arange(len(labels), device=labels.device), *parts])
        counts = torch.tensor([len(part) for part in parts], dtype=torch.int64, device=labels.device)
        self.labels = torch.cat([labels, old.repeat_interleave(counts)])

    def take(self, rows: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        rows = rows.to(self.labels.device)
        labels = self.labels[rows]
        features = self.features[self.sources[rows]] + self.offsets[labels]
        return F.normalize(features, dim=1) if self.normalise else features, labels


class FeTrIL(ContinualStrategy):
    """A backbone frozen after the first task, and old classes imitated by the features of new ones.

    Args:
        classifier: ``svm`` or ``fc``, a linear layer trained by gradient descent.
        nearest: How near a new class is to an old one: by the distance of means, or the angle between them.
        svm_cost: Weight of the SVM's errors, above 0.
        normalise: Whether features get norm 1 before the classifier; None for True with an SVM, False without.
        head_epochs: Epochs of the phase ``head``.
        head_optimizer: Of that phase; None for SGD with learning rate 0.05, momentum 0.9 and weight decay 5e-4.
        head_scheduler: Of that phase; None for a cosine, where ``head_optimizer`` is None too.
        head_batch_size: Of that phase, over all processes; None for that of the data.
        kwargs: Of the base.
    """

    family: ClassVar[str] = "exemplar-free"
    paper: ClassVar[str] = "Petit et al., WACV 2023, arXiv:2211.13131"

    def __init__(
        self,
        *,
        classifier: Literal["svm", "fc"] = "svm",
        nearest: Metric = "euclidean",
        svm_cost: float = 1.0,
        normalise: bool | None = None,
        head_epochs: int = 50,
        head_optimizer: OptimizerCallable | None = None,
        head_scheduler: LRSchedulerCallable | None = None,
        head_batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(visible="all", **kwargs)
        if classifier not in ("svm", "fc") or nearest not in ("euclidean", "cosine"):
            raise ValueError(
                f"FeTrIL: classifier={classifier!r}, nearest={nearest!r}; use svm or fc, euclidean or cosine"
            )
        if svm_cost <= 0 or head_epochs < 1 or (head_batch_size is not None and head_batch_size < 1):
            raise ValueError(
                f"FeTrIL: svm_cost={svm_cost}, head_epochs={head_epochs}, head_batch_size={head_batch_size}; above "
                "0, at least 1, at least 1 or null"
            )
        self.classifier, self.nearest, self.svm_cost = classifier, nearest, svm_cost
        self.normalise = classifier == "svm" if normalise is None else normalise
        self.head_phase = Phase(
            "head",
            head_epochs,
            head_optimizer or functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=5e-4),
            head_scheduler or (None if head_optimizer is not None else CosineOverPhase),
            on_features=True,
            batch_size=head_batch_size,
        )
        self.means: Prototypes
        self._pool: TranslatedFeatures | None = None
        self.plain_first_task = False  # its head is fitted anew when it ends

    @classmethod
    def conformance_options(cls) -> dict[str, Any]:
        return {"head_epochs": 2}

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        self.means = Prototypes(self.network.head.num_features)
        if self.classifier == "svm" and not isinstance(self.network.head, LinearHead):
            name = type(self.network.head).__name__
            raise ValueError(f"FeTrIL: an SVM is no {name}; use LinearHead, or classifier fc")

    @property
    def backbone_is_fixed(self) -> bool:
        return self.freeze_backbone or not self.task.is_first

    def phases(self, task: Task) -> list[Phase]:
        backbone = [Phase()] if task.is_first and not self.freeze_backbone else []
        return [*backbone, self.head_phase] if self.classifier == "fc" else backbone

    def begin_phase(self, phase: Phase, epochs: int, origin: int) -> None:
        super().begin_phase(phase, epochs, origin)
        if phase.on_features:
            self.means.grow(self.task.num_seen)  # from now on predictions are those of the classifier
            head = self.network.head
            for block, size in zip(head.blocks, head.block_sizes(), strict=True):
                block.load_state_dict(head.new_block(size).state_dict())  # from scratch

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": self.classification_loss(output, batch)}

    def feature_pool(self) -> TranslatedFeatures:
        if self._pool is None:  # an image is seen once, for the phase and for the end of the task
            self.means.grow(self.task.num_seen)
            means, known = self.means.means, self.means.known
            self._pool = TranslatedFeatures(
                *self.all_features(), means, known, nearest=self.nearest, normalise=self.normalise
            )
        return self._pool

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        pool = self.feature_pool()
        if self.classifier == "svm":
            self._solve(pool)
        self.means.update(pool.features, pool.labels[: len(pool.features)], num_classes=task.num_seen, reduce=False)
        self._pool = None

    def predict(self, images: Tensor) -> Tensor:
        features = self.network.backbone(images)
        # In the first task, before there is a classifier, the head is that of the network.
        normalise = self.normalise and len(self.means) > 0
        return self.network.head.classify(F.normalize(features, dim=1) if normalise else features)

    def _solve(self, pool: TranslatedFeatures) -> None:
        """Put the SVM's weights into the head, the same on every process; each goes through its share of the rows."""
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
