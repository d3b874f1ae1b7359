"""Rotation as a label: each class is learnt together with its three turned copies (Lee et al., ICML 2020).

Joint columns are those of the C classes as they are, then three for each class, for 90, 180 and 270 degrees: a head of
C columns and another one of 3 C columns make them.
"""

import torch
from torch import Tensor

from cl_lightning.batch import Batch


def rotated(images: Tensor) -> Tensor:
    """Square images ``(B, ..., S, S)``, then all of them turned by 90, 180 and 270 degrees: ``(4 B, ..., S, S)``."""
    if images.shape[-1] != images.shape[-2]:
        size = tuple(images.shape[-2:])
        raise ValueError(f"rotated: images of {size} pixels do not keep their shape; give square ones (data.resize)")
    return torch.cat([torch.rot90(images, turn, (-2, -1)) for turn in range(4)])


def rotation_labels(labels: Tensor, num_classes: int) -> Tensor:
    """Joint columns of the rows of :func:`rotated`: y as it is, ``C + 3 y + k - 1`` turned by k quarters.

    Args:
        labels: Columns y of the images as they are, int64 ``(B,)``.
        num_classes: C.

    Returns:
        int64 ``(4 B,)``, below ``4 C``.
    """
    return torch.cat([labels, *(num_classes + 3 * labels + turn for turn in range(3))])


def rotate_batch(batch: Batch) -> Batch:
    """The batch with its turned copies behind it; these have no label (-1), as they are of none of the classes."""
    hidden = torch.full_like(batch.labels, -1)
    return batch.replace(
        images=rotated(batch.images),
        raw=rotated(batch.raw),
        labels=torch.cat([batch.labels, hidden.repeat(3)]),
        tasks=batch.tasks.repeat(4),
        indices=batch.indices.repeat(4),
        extra={name: torch.cat([value] * 4) for name, value in batch.extra.items()},
    )
