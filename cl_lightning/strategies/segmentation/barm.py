"""BARM, background adaptation with residual modeling (Chen et al., ECCV 2024, arXiv:2407.09838).

Each task t >= 1 adds a branch with the logits of its classes and a residual r_t of the background
(:class:`~cl_lightning.models.BackgroundHead`). Classes have sigmoids. With b the background logit in training, z the
logits of the old classes without gradient and of the new ones, y' the labels, in which background becomes the teacher's
best class if that is a class with a sigmoid of at least tau, e_i the features of branch i, and M+ and M- the places of
new classes and of background,

    L_pbg  = sum over [b, z] of BCE with y', mean over annotated pixels
    L_bga1 = mean over M+ of BCE(r_t, 0)
    L_bga2 = mean over M- of max(0, (s - 1)^2 - s^2),  s = sigmoid(r_t)
    L_bfd  = sum over old branches i of the mean of ((e_i - e_i of the teacher) M-)^2
    L_gkd  = sum over old branches i and their logits, r_i and b_0 among them, of BCE with the teacher's sigmoid
    L = L_pbg + alpha1 L_bga1 + alpha2 L_bga2 + alpha3 L_bfd + alpha4 L_gkd

tau -> pseudo_threshold, alpha1 .. alpha4 -> new_weight, background_weight, feature_weight, distill_weight. In the first
task L = L_pbg without pseudo-labels. From the second task on batch normalisation is frozen, with its weights, and the
learning rate of all but the new branch and the ``decoder`` of the backbone, if it has one, is multiplied by a factor.
The places M are those of the features: masks are taken at the nearest pixel.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.checks import at_least, within
from cl_lightning.data import TARGETS
from cl_lightning.losses import at_size, full_precision, mean_over_rows, mean_over_selected
from cl_lightning.memory import Teacher
from cl_lightning.models import BackgroundHead, ConvPixels, batch_norms, head_as
from cl_lightning.strategies.base import BackboneFactory, FreezeNorm, HeadFactory
from cl_lightning.strategy import Batch, ContinualStrategy, Output, Task, Traits

IGNORED = 255
"""Pixel without annotation."""


class BARM(ContinualStrategy):
    """A branch per task that models its classes and what it takes from the background; old branches are distilled.

    Args:
        pseudo_threshold: tau, in [0, 1].
        new_weight: alpha1, at least 0.
        background_weight: alpha2, at least 0.
        feature_weight: alpha3, at least 0.
        distill_weight: alpha4, at least 0.
        old_rate: Factor of the learning rate of old weights from the second task on, above 0.
        backbone: As in the base class; None for ``ConvPixels``.
        head: As in the base class, a ``BackgroundHead``; None for it.
        freeze_norm: As in the base class.
        kwargs: Options of the base class.
    """

    traits = Traits(
        family="segmentation",
        paper="Chen et al., ECCV 2024, arXiv:2407.09838",
        inputs=("image",),
        targets=("pixels",),
        uses_old_logits=True,
    )

    def __init__(
        self,
        *,
        pseudo_threshold: float = 0.7,
        new_weight: float = 1.0,
        background_weight: float = 5.0,
        feature_weight: float = 4.0,
        distill_weight: float = 1.0,
        old_rate: float = 0.1,
        backbone: BackboneFactory | None = None,
        head: HeadFactory | None = None,
        freeze_norm: FreezeNorm = "never",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            backbone=backbone or ConvPixels, head=head or BackgroundHead, freeze_norm=freeze_norm, **kwargs
        )
        within(self, "[0, 1]", pseudo_threshold=pseudo_threshold)
        at_least(self, 0, new_weight=new_weight, background_weight=background_weight)
        at_least(self, 0, feature_weight=feature_weight, distill_weight=distill_weight)
        within(self, "(0, 1]", old_rate=old_rate)
        self.pseudo_threshold, self.new_weight, self.background_weight = pseudo_threshold, new_weight, background_weight
        self.feature_weight, self.distill_weight, self.old_rate = feature_weight, distill_weight, old_rate
        self.teacher = Teacher()

    @property
    def _head(self) -> BackgroundHead:
        return head_as(self.network, BackgroundHead, self, "which has a branch per task")

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        _ = self._head

    def frozen(self) -> list[nn.Module]:
        frozen = [*super().frozen()]
        return frozen if self.task.is_first else [*frozen, *batch_norms(self.network)]

    def parameter_groups(self, parameters: list[nn.Parameter]) -> list[dict[str, Any]] | list[nn.Parameter]:
        if self.task.is_first or not self.task.num_new:
            return parameters
        new = [
            *self._head.blocks[-1].parameters(),
            *getattr(self.network.backbone, "decoder", nn.Module()).parameters(),
        ]
        fast = {id(parameter) for parameter in new}
        parts = ([p for p in parameters if (id(p) in fast) == is_new] for is_new in (True, False))
        return [{"params": part, "lr_factor": f} for part, f in zip(parts, (1.0, self.old_rate), strict=True) if part]

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        masks, head = batch.extra[TARGETS], self._head
        logits = at_size(full_precision(head.training_logits()), masks.shape[-2:])
        if not self.teacher:
            return {"bce": self._labelled(logits, masks, batch)}
        teacher = self.teacher(batch.images)
        assert self.teacher.network is not None
        old_head: Any = self.teacher.network.head
        labels = pseudo_labels(masks, at_size(full_precision(teacher.logits), masks.shape[-2:]), self.pseudo_threshold)
        terms = {"bce": self._labelled(logits, labels, batch)}
        new, places = head.outputs[-1], at_places(masks, output.features.shape[-2:])
        behind = places == 0
        if len(head.outputs) > len(old_head.outputs):
            residual = full_precision(new.background)
            positive = (places > 0) & (places != IGNORED)
            low = F.softplus(residual)  # BCE with target 0
            share = residual.sigmoid()
            high = ((share - 1) ** 2 - share**2).clamp(min=0)
            terms["new"] = self.new_weight * mean_over_selected(low.flatten(), positive.flatten(), batch)
            terms["background"] = self.background_weight * mean_over_selected(high.flatten(), behind.flatten(), batch)
        moved = logits.new_zeros(())
        distilled = logits.new_zeros(())
        for own, before in zip(head.outputs, old_head.outputs, strict=False):
            moved = moved + mean_over_rows((((own.ear - before.ear) * behind[:, None]) ** 2).flatten(1).mean(dim=1))
            mine, its = (torch.cat([part.background[:, None], part.classes], dim=1) for part in (own, before))
            each = F.binary_cross_entropy_with_logits(full_precision(mine), its.sigmoid(), reduction="none")
            distilled = distilled + mean_over_rows(each.sum(dim=1).flatten(1).mean(dim=1))
        return terms | {"features": self.feature_weight * moved, "distill": self.distill_weight * distilled}

    def _labelled(self, logits: Tensor, labels: Tensor, batch: Batch) -> Tensor:
        """Sum over columns of the binary cross-entropy, mean over the annotated pixels of the batch."""
        known = labels != IGNORED
        targets = F.one_hot(labels.long().where(known, 0), logits.shape[1]).movedim(-1, 1).to(logits)
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=1)
        return mean_over_selected(losses.flatten(), known.flatten(), batch)

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        self.teacher.learn_from(self.network)


def pseudo_labels(masks: Tensor, teacher: Tensor, threshold: float) -> Tensor:
    """Masks in which background is replaced by the teacher's best class where it is certain.

    Args:
        masks: uint8 ``(B, H, W)``.
        teacher: Logits of the teacher ``(B, C_old, H, W)``; column 0 is the background.
        threshold: Least sigmoid of the class.

    Returns:
        uint8 ``(B, H, W)``.
    """
    score, best = teacher.sigmoid().max(dim=1)
    certain = (masks == 0) & (best > 0) & (score >= threshold)
    return torch.where(certain, best.to(masks.dtype), masks)


def at_places(masks: Tensor, size: torch.Size) -> Tensor:
    """Masks ``(B, H, W)`` at the places of a feature map, ``(B, h, w)``, of the nearest pixel."""
    return F.interpolate(masks[:, None].float(), size=tuple(size), mode="nearest")[:, 0].to(masks.dtype)
