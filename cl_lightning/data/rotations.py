"""Rotation as a label: rotations by 90, 180 and 270 degrees are additional classes (Lee et al., ICML 2020).

Joint columns are the C original classes, then three per class, for 90, 180 and 270 degrees. Their logits are the
concatenation of a head with C columns and a second head with 3 C columns.
"""

import torch
from torch import Tensor

from cl_lightning.batch import Batch


def rotated(images: Tensor) -> Tensor:
    """Images ``(B, ..., S, S)``, followed by their rotations by 90, 180 and 270 degrees: ``(4 B, ..., S, S)``.

    Raises:
        ValueError: If samples are no images, or not square.
    """
    if images.dim() < 4:
        raise ValueError(f"rotated: samples of shape {tuple(images.shape[1:])} are no images (C, H, W)")
    if images.shape[-1] != images.shape[-2]:
        size = tuple(images.shape[-2:])
        raise ValueError(f"rotated: images of {size} pixels are not square; resize them (data.resize)")
    return torch.cat([torch.rot90(images, turn, (-2, -1)) for turn in range(4)])


def rotation_labels(labels: Tensor, num_classes: int) -> Tensor:
    """Joint columns for the rows of :func:`rotated`.

    y for the original image, ``C + 3 y + k - 1`` for its rotation by 90 k degrees, k in 1 .. 3.

    Args:
        labels: Columns y of the original images, int64 ``(B,)``.
        num_classes: C.

    Returns:
        int64 ``(4 B,)``, below ``4 C``.
    """
    return torch.cat([labels, *(num_classes + 3 * labels + turn for turn in range(3))])


def rotate_batch(batch: Batch) -> Batch:
    """Batch of B images, followed by their rotations: 4 B rows.

    The rotations have label -1, since they belong to none of the original classes.
    """
    hidden = torch.full_like(batch.labels, -1)
    return batch.replace(
        images=rotated(batch.images),
        raw=rotated(batch.raw),
        labels=torch.cat([batch.labels, hidden.repeat(3)]),
        tasks=batch.tasks.repeat(4),
        indices=batch.indices.repeat(4),
        extra={name: torch.cat([value] * 4) for name, value in batch.extra.items()},
    )
