"""TUNA: task-specific and universal adapters (Wang et al., ICCV 2025, arXiv:2508.08165).

A frozen pretrained backbone gets an adapter A_t in each task t, numbered from 0, which starts from A_{t-1}. Phase
``train`` trains A_t and the cosine head, with a margin m and a penalty that separates A_t from the earlier adapters:

    L = CE(s (cos(phi_t(x), w_c) - m [c = y]), y over the classes of the task)
        + ortho_weight e^{-(t+1)} sum_{i < t} mean over blocks |mean over all entries of U_t U_i^T|

phi_j(x): features with adapter j. U_j: the up-projection of A_j in a block, rows of length 1. s: scale of the head, 20.
Then the universal adapter A is merged from all adapters, weight by weight: the sign of the sum, and the largest size
among the weights with this sign:

    A = sigma max { |a_i| : sign a_i = sigma },    sigma = sign sum_i a_i,    a_i: the same weight of A_i

Means and covariances of the features phi_t of the classes of the task are stored, and phase ``align``, from task 1 on,
trains the head on features drawn from N(mu_c, Sigma_c + jitter I) of all classes, with CE over all of them.

Prediction: each adapter gives probabilities p_i = softmax(s cos(phi_i(x), w)) of all classes. The adapter i* with the
smallest entropy is chosen for each sample, and its probabilities are added to the universal adapter's:

    score_c(x) = p_{i*, c} + p_{A, c}

Scores are returned as logarithms of their mean. A prediction takes one forward pass for each adapter and one for A. If
a class recurs, its mean and covariance are computed again.
That U has rows of length 1 is our reading. The authors' code was not at hand. Departs from a port of it, whose cosine
schedule of ``align`` has a period of 5 of its 30 epochs and rises again: here it falls over all epochs.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import ImageShape
from cl_lightning.checks import at_least
from cl_lightning.losses import cross_entropy, entropy
from cl_lightning.models import Adapter, CosineHead, Peft, PeftFactory, PeftSets, head_as
from cl_lightning.strategies.base.schedules import CosineOverPhase
from cl_lightning.strategies.pretrained.alignment import AlignedClassifier
from cl_lightning.strategy import Batch, HeadFactory, Output, PhaseOptions, Task, Traits


def elected(values: Tensor) -> Tensor:
    """Merge of several tensors: entry by entry the sign of the sum, and the largest size with this sign.

    Args:
        values: ``(n, ...)``.

    Returns:
        ``(...)``; 0 where the sum is 0.
    """
    sign = values.sum(dim=0).sign()
    return sign * (values * sign).amax(dim=0)  # a weight of the other sign is negative here


def row_overlap(first: Tensor, second: Tensor) -> Tensor:
    """Absolute mean of the cosines of all pairs of rows of two matrices, ``|mean of U V^T|``.

    Rows shorter than 1e-3 count less, in proportion to their length: the gradient of a cosine is inverse to the length
    of the row, and rows that have hardly been trained would be thrown far away.

    Args:
        first: ``(..., n, r)``.
        second: ``(..., m, r)``.

    Returns:
        A scalar in [0, 1].
    """
    means = (F.normalize(rows, dim=-1, eps=1e-3).mean(dim=-2) for rows in (first, second))
    return functools.reduce(torch.mul, means).sum(dim=-1).mean().abs()


def most_certain(logits: Tensor) -> Tensor:
    """Logits of the adapter whose prediction of a sample has the smallest entropy.

    Args:
        logits: Logits with each adapter, ``(T, B, C)``.

    Returns:
        ``(B, C)``.
    """
    chosen = torch.stack([entropy(part) for part in logits]).argmin(dim=0)
    return logits[chosen, torch.arange(logits.shape[1], device=logits.device)]


class TUNA(AlignedClassifier):
    """An adapter per task, chosen for each sample by its entropy, and a universal adapter that is merged from them.

    Args:
        peft: Builds the module of a task for the backbone; None for ``Adapter`` with 16 units.
        margin: m, at least 0.
        ortho_weight: Weight of the penalty, at least 0; above 0 for an ``Adapter`` or ``LoRA``.
        align_options: Options of the phase ``align``; 0 epochs to leave it out. The default optimizer is SGD with
            learning rate 0.005, momentum 0.9 and weight decay 5e-4, with a cosine schedule.
        align_samples: Number of features drawn per class and epoch, at least 1: 5 times the batch size in the paper.
        jitter: Variance that is added in each direction, above 0.
        head: Builds the head, which must be a ``CosineHead``; None for one with scale 20.
        kwargs: Options of the base class.
    """

    traits = Traits(family="pretrained", paper="Wang et al., ICCV 2025, arXiv:2508.08165", needs_pretrained=True)

    def __init__(
        self,
        *,
        peft: PeftFactory | None = None,
        margin: float = 0.0,
        ortho_weight: float = 1e-3,
        align_options: PhaseOptions = PhaseOptions(epochs=30, batch_size=80),
        align_samples: int = 80,
        jitter: float = 1e-4,
        head: HeadFactory | None = None,
        **kwargs: Any,
    ) -> None:
        sgd = functools.partial(torch.optim.SGD, lr=0.005, momentum=0.9, weight_decay=5e-4)
        super().__init__(
            head=head or functools.partial(CosineHead, scale=20.0),
            loss_classes="current",
            align_options=align_options.filled(sgd, CosineOverPhase),
            align_samples=align_samples,
            jitter=jitter,
            **kwargs,
        )
        at_least(self, 0, margin=margin, ortho_weight=ortho_weight)
        self.margin, self.ortho_weight = margin, ortho_weight
        adapter = functools.partial(Adapter, bottleneck=16)
        self.build_backbone = functools.partial(
            PeftSets, backbone=self.build_backbone, peft=peft or adapter, merged=True
        )

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        head_as(self.network, CosineHead, self, "whose logits are cosines")
        if self.ortho_weight and not hasattr(self._sets.merged, "up_weights"):
            name = type(self._sets.merged).__name__
            raise ValueError(
                f"TUNA: ortho_weight is {self.ortho_weight}, but {name} has no up-projections; use Adapter or LoRA, or "
                "an ortho_weight of 0"
            )

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self._sets.add(copied=True)

    def frozen(self) -> Iterable[nn.Module]:
        return [self._sets.base, *self._sets.sets[:-1], cast(Peft, self._sets.merged)]

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.phase.features is not None:
            return {"ce": cross_entropy(output.logits, batch.labels)}  # over all classes
        logits = output.logits
        if self.margin:
            scale = cast(CosineHead, self.network.head).scale
            own = batch.labels[:, None] == torch.arange(logits.shape[1], device=logits.device)  # [c = y]
            logits = logits - scale * self.margin * own
        terms = {"ce": self.classification_loss(output._replace(logits=logits), batch)}  # over the task's classes
        if self.ortho_weight and not self.task.is_first:
            terms["ortho"] = self.ortho_weight * self._overlap()
        return terms

    def _overlap(self) -> Tensor:
        *earlier, newest = (cast(Adapter, one).up_weights() for one in self._sets.sets)
        overlaps = [row_overlap(up, other.detach()) for ups in earlier for up, other in zip(newest, ups, strict=True)]
        return math.exp(-(self.task.index + 1)) * torch.stack(overlaps).sum() / len(newest)

    @torch.no_grad()
    def learn_statistics(self) -> None:
        super().learn_statistics()
        parameters = [list(one.parameters()) for one in self._sets.sets]
        for own, *values in zip(cast(Peft, self._sets.merged).parameters(), *parameters, strict=True):
            own.copy_(elected(torch.stack(values)))

    def predict(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        if not len(self.gaussians):  # the first task is being trained
            return self.network.classify(images)
        features = self._sets.features(images, [*range(len(self._sets.sets)), "merged"])
        logits = torch.stack([self.network.head.classify(part).float() for part in features])
        both = torch.stack([most_certain(logits[:-1]), logits[-1]]).log_softmax(dim=2)
        return both.logsumexp(dim=0) - math.log(2)

    def predict_within_task(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        return self.network.classify(images)

    @property
    def _sets(self) -> PeftSets:
        return cast(PeftSets, self.network.backbone)
