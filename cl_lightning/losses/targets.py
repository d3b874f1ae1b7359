"""Losses of targets that are not one class: several labels, a number, a class for each pixel."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.losses.classification import full_precision, mean_over_rows

IGNORED = 255
"""Pixel without annotation."""


def target_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Loss of outputs for their targets; the kind of target follows from its type.

    - Several labels, int8 ``(B, C)`` of 1, 0, and -1 for labels that are not known: binary cross-entropy over the known
      labels of a sample, in nats, outputs ``(B, C')`` with ``C' <= C``, of the columns so far.
    - A number, floating point ``(B,)``: squared error, outputs ``(B, 1)``.
    - Classes of pixels, uint8 ``(B, H, W)``: cross-entropy, in nats, outputs ``(B, C, h, w)``, which are enlarged to
      the size of the masks. Pixels of the value 255 count as 0, as published code for segmentation has it: the mean is
      over all pixels.

    Returns:
        The mean over the samples, a scalar; 0 for a batch without samples.

    Raises:
        ValueError: If the outputs do not fit the targets.
    """
    outputs = full_precision(outputs)
    if targets.dtype == torch.int8:
        return mean_over_rows(multi_label_losses(outputs, targets))
    if targets.is_floating_point():
        if outputs.shape != (len(targets), 1):
            raise ValueError(f"target_loss: outputs are {tuple(outputs.shape)} for numbers; expected (B, 1)")
        return mean_over_rows((outputs[:, 0] - targets) ** 2)
    if outputs.dim() != 4:
        raise ValueError(
            f"target_loss: outputs are {tuple(outputs.shape)} for classes of pixels {tuple(targets.shape)}; expected "
            "(B, C, h, w): use a backbone and a head for pixels, such as ConvPixels and PixelHead"
        )
    losses = F.cross_entropy(
        at_size(outputs, targets.shape[-2:]), targets.long(), ignore_index=IGNORED, reduction="none"
    )
    return mean_over_rows(losses.flatten(1).mean(dim=1))


def target_distillation(student: Tensor, teacher: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Distillation of outputs whose targets are not one class; the kind of target follows from the type of ``targets``.

    - Several labels: binary cross-entropy of sigmoids of logits divided by T, the mean over classes.
    - A number: squared difference; T has no effect.
    - Classes of pixels: cross-entropy of softmaxes of logits divided by T, the mean over pixels, at the size of the
      outputs.

    Args:
        student, teacher: Outputs of the network, and of the teacher without gradient, of the same shape ``(B, ...)``.
        targets: Targets of the samples.
        temperature: T, above 0.

    Returns:
        The mean over the samples, a scalar, without the factor T^2.
    """
    student, teacher = full_precision(student), full_precision(teacher).detach()
    if targets.is_floating_point():
        return mean_over_rows(((student - teacher) ** 2).flatten(1).mean(dim=1))
    student, teacher = student / temperature, teacher / temperature
    if targets.dtype == torch.int8:
        each = F.binary_cross_entropy_with_logits(student, teacher.sigmoid(), reduction="none")
        return mean_over_rows(each.mean(dim=1))
    return mean_over_rows(-(teacher.softmax(dim=1) * student.log_softmax(dim=1)).sum(dim=1).flatten(1).mean(dim=1))


def at_size(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits ``(B, C, h, w)`` at the size of masks, ``(B, C, H, W)``, by bilinear interpolation; unchanged if equal."""
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def multi_label_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of each sample over its known labels, in nats, ``(B,)``.

    Args:
        outputs: Logits ``(B, C')``.
        targets: int8 ``(B, C)``, ``C >= C'``: 1, 0, or -1 for a label that is not known.
    """
    if outputs.dim() != 2 or outputs.shape[1] > targets.shape[1]:
        raise ValueError(
            f"target_loss: outputs are {tuple(outputs.shape)} for labels {tuple(targets.shape)}; expected one logit "
            "for each column so far"
        )
    marks = targets[:, : outputs.shape[1]]
    known = marks >= 0
    losses = F.binary_cross_entropy_with_logits(outputs, marks.clamp(min=0).to(outputs.dtype), reduction="none")
    return torch.where(known, losses, 0.0).sum(dim=1) / known.sum(dim=1).clamp(min=1)
