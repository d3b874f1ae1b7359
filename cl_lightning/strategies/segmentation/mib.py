"""MiB, modeling the background (Cermelli et al., CVPR 2020, arXiv:2002.00718).

In step t the pixels of earlier and of later classes are labelled as background b. With o the logits over b, the old
classes Y and the new ones C_t, p their softmax, y the label of a pixel, and q the softmax of the teacher, the network
before the task, over b and Y:

    L_ce = -log p_y for a new class y,   -log (p_b + sum_{c in Y} p_c) for y = b                            (eq. 3, 4)
    L_kd = -1 / (|Y| + 1) [q_b log (p_b + sum_{c in C_t} p_c) + sum_{c in Y} q_c log p_c]                    (eq. 5, 6)
    L = mean over pixels of L_ce + lambda L_kd

What is labelled as background may be an old class, and what the teacher takes for background may be a new one. New rows
of the classifier begin as copies of the row of the background, whose probability they share (eq. 10):

    w_c <- w_b,   beta_c <- beta_b - log (|C_t| + 1)   for c in C_t and for b itself

lambda -> distill_weight. In the first task L is the cross-entropy. Pixels without annotation count as 0, as in the
published code.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from cl_lightning.checks import at_least
from cl_lightning.data import TARGETS
from cl_lightning.losses import at_size, full_precision, mean_over_rows
from cl_lightning.memory import Teacher
from cl_lightning.models import ConvPixels, PixelHead, head_as
from cl_lightning.strategies.base import BackboneFactory, HeadFactory
from cl_lightning.strategy import Batch, ContinualStrategy, Output, Task, Traits

IGNORED = 255
"""Pixel without annotation."""


class MiB(ContinualStrategy):
    """Cross-entropy and distillation for classes of pixels in which the background stands for unlabelled classes too.

    Args:
        distill_weight: lambda, at least 0.
        unbiased: Whether the background is modelled in the losses; False for the plain cross-entropy and distillation,
            where p_b stands in place of the sums.
        init_from_background: Whether new rows begin as copies of the background; False for torch's initial values.
        backbone: As in the base class; None for ``ConvPixels``.
        head: As in the base class, a ``PixelHead`` with biases; None for it.
        kwargs: Options of the base class.
    """

    traits = Traits(
        family="segmentation",
        paper="Cermelli et al., CVPR 2020, arXiv:2002.00718",
        inputs=("image",),
        targets=("pixels",),
    )

    def __init__(
        self,
        *,
        distill_weight: float = 10.0,
        unbiased: bool = True,
        init_from_background: bool = True,
        backbone: BackboneFactory | None = None,
        head: HeadFactory | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone=backbone or ConvPixels, head=head or PixelHead, **kwargs)
        at_least(self, 0, distill_weight=distill_weight)
        self.distill_weight, self.unbiased = distill_weight, unbiased
        self.init_from_background = init_from_background
        self.teacher = Teacher()

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        head = head_as(self.network, PixelHead, self, "the classifier of each pixel")
        if not head.bias:
            raise ValueError(f"{type(self).__name__}: bias of its head is False; the background is shared by biases")
        if self.init_from_background and not task.is_first and task.num_new:
            share_background(head)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        masks = batch.extra[TARGETS]
        if not (old := self.teacher.num_columns):
            return {"ce": self.classification_loss(output, batch)}
        logits = at_size(full_precision(output.logits), masks.shape[-2:])
        terms = {"ce": background_cross_entropy(logits, masks, old if self.unbiased else 0)}
        if self.distill_weight:
            target = at_size(full_precision(self.teacher(batch.images).logits), masks.shape[-2:])
            distill = background_distillation(logits, target, unbiased=self.unbiased)
            terms["distill"] = self.distill_weight * distill
        return terms

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        self.teacher.learn_from(self.network)


@torch.no_grad()
def share_background(head: PixelHead) -> None:
    """Set the rows of the last block to the row of the background, column 0, and share its probability out equally.

    Args:
        head: A head with biases and at least two blocks.
    """
    first, last = (cast(nn.Linear, head.blocks[place]) for place in (0, -1))
    share = math.log(len(last.weight) + 1)
    last.weight.copy_(first.weight[:1].expand_as(last.weight))
    first.bias[0] -= share
    last.bias.copy_(first.bias[:1].expand_as(last.bias))


def background_cross_entropy(logits: Tensor, masks: Tensor, old: int) -> Tensor:
    """L_ce: a pixel labelled as background may have an old class. The mean over all pixels, in nats.

    Args:
        logits: o ``(B, C, H, W)``; column 0 is the background.
        masks: Columns of the pixels, uint8 ``(B, H, W)``: 0 or a new class; 255 for pixels that count as 0.
        old: Number of columns of the background and the old classes; 0 or 1 for the plain cross-entropy.
    """
    every = logits.logsumexp(dim=1)  # (B, H, W)
    background = logits[:, : max(old, 1)].logsumexp(dim=1)
    labels = masks.long()
    known = labels != IGNORED
    own = logits.gather(1, labels.where(known, 0)[:, None])[:, 0]
    losses = every - torch.where(labels == 0, background, own)
    return mean_over_rows(torch.where(known, losses, 0.0).flatten(1).mean(dim=1))


def background_distillation(logits: Tensor, teacher: Tensor, *, unbiased: bool = True) -> Tensor:
    """L_kd: what the teacher takes for background may be a new class. The mean over pixels, in nats.

    Args:
        logits: o ``(B, C, H, W)``; column 0 is the background.
        teacher: Logits of the teacher ``(B, C_old, H, W)``, the first columns of ``logits``.
        unbiased: Whether the background of the student takes in the new classes; False for a softmax over the columns
            of the teacher alone.
    """
    old = teacher.shape[1]
    q = teacher.detach().softmax(dim=1)
    if not unbiased:
        log_p = logits[:, :old].log_softmax(dim=1)
    else:
        with_new = torch.cat([logits[:, :1], logits[:, old:]], dim=1).logsumexp(dim=1, keepdim=True)
        log_p = torch.cat([with_new, logits[:, 1:old]], dim=1) - logits.logsumexp(dim=1, keepdim=True)
    return mean_over_rows(-(q * log_p).mean(dim=1).flatten(1).mean(dim=1))
