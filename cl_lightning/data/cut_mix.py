"""CutMix and mixup: each image is mixed with another image of the batch, and the loss with the loss of its label.

CutMix (Yun et al., ICCV 2019, arXiv:1905.04899) replaces a box of each image by a part of another image. With r the
share of the pixels that remain,

    L = r CE(f(x), y_a) + (1 - r) CE(f(x), y_b),    box of area 1 - u, u ~ Beta(alpha, alpha), cut at the border

The box is the same in all images of a step, and the other image is the previous one of the batch of all processes, or
the previous one of the same group, so the result does not depend on the number of processes. Mixup (Zhang et al., ICLR
2018, arXiv:1710.09412) takes the means r x_a + (1 - r) x_b of whole images with r ~ Beta(alpha, alpha).
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cl_lightning.batch import Batch
from cl_lightning.distributed import all_gather_together

_CUTMIX, _MIXUP = 0x6D2, 0x317  # salts of the draws of the box, and of the weight
_PARTNER, _REMAINS = "partner", "remains"


def cut_box(height: int, width: int, share: float, centre: tuple[float, float]) -> tuple[slice, slice]:
    """Rows and columns of the box that CutMix replaces, cut at the border of the image.

    Args:
        height, width: Size of the image.
        share: Share of the area that remains where the box is inside the image, in [0, 1].
        centre: Row and column of the centre, as shares of the size, in [0, 1).
    """
    ratio = math.sqrt(1 - share)
    ends = []
    for size, place in zip((height, width), centre, strict=True):
        middle, half = int(place * size), int(size * ratio) // 2
        ends.append(slice(max(middle - half, 0), min(middle + half, size)))
    return ends[0], ends[1]


def cutmix(batch: Batch, probability: float, alpha: float, *, groups: Tensor | None = None) -> Batch:
    """A batch whose images are mixed by CutMix with a probability; the loss of a mixed batch is :func:`mixed_loss`.

    Every process must call this, also without rows, since the images are exchanged.

    Args:
        batch: Batch with finished images ``(B, C, H, W)``; its rows may be the parts of a joint batch.
        probability: p, in [0, 1].
        alpha: alpha, above 0.
        groups: Images are mixed with images of the same group; group of each row, int64 ``(B,)``. None for one group.

    Returns:
        The batch itself, or a copy whose images have the box and whose ``extra`` has the column of the other image,
        ``partner``, and r, ``remains``, of each row.

    Raises:
        ValueError: If the samples are no images.
    """
    if batch.images.dim() != 4:
        raise ValueError(
            f"cutmix: samples have shape {tuple(batch.images.shape[1:])}; boxes are cut from images (C, H, W); give "
            "the method a probability of CutMix of 0"
        )
    random = np.random.default_rng(batch.draw.fork(_CUTMIX).key)  # the same numbers on every process
    share, chance, *centre = random.beta(alpha, alpha), *random.random(3)
    if chance >= probability:
        return batch
    height, width = batch.images.shape[2:]
    rows, columns = cut_box(height, width, float(share), (float(centre[0]), float(centre[1])))
    boxes, labels = _previous(batch, batch.images[:, :, rows, columns], groups)
    images = batch.images.clone()
    images[:, :, rows, columns] = boxes
    remains = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
    return _mixed(batch, images, labels, remains)


def mixup(batch: Batch, probability: float, alpha: float) -> Batch:
    """A batch whose images are mixed by mixup with a probability; the loss of a mixed batch is :func:`mixed_loss`.

    Every process must call this, also without rows, since the images are exchanged.

    Args:
        batch: Batch with finished images ``(B, C, H, W)``; its rows may be the parts of a joint batch.
        probability: p, in [0, 1].
        alpha: alpha, above 0.

    Returns:
        As :func:`cutmix`.
    """
    random = np.random.default_rng(batch.draw.fork(_MIXUP).key)  # the same numbers on every process
    remains, chance = float(random.beta(alpha, alpha)), random.random()
    if chance >= probability:
        return batch
    others, labels = _previous(batch, batch.images)
    return _mixed(batch, remains * batch.images + (1 - remains) * others, labels, remains)


def previous(groups: Tensor) -> Tensor:
    """Place of the previous element of the same group, for the first element of the last one; int64 ``(n,)``.

    Args:
        groups: Group of each element, int64 ``(n,)``.
    """
    order = groups.argsort(stable=True)
    found = order.roll(1)  # wrong for the first element of each group, which follows the last one of another
    first = groups[order] != groups[found]
    ends = torch.searchsorted(groups[order], groups[order], right=True) - 1
    return torch.empty_like(order).index_copy_(0, order, torch.where(first, order[ends], found))


def mixed_loss(loss: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
    """Loss of a batch that may be mixed: ``r L(y_a) + (1 - r) L(y_b)``, or ``L(y)`` if it is not.

    Args:
        loss: Loss of a batch by its ``labels``.
        batch: Result of :func:`cutmix` or :func:`mixup`.
    """
    if _PARTNER not in batch.extra:
        return loss(batch)
    remains = batch.extra[_REMAINS].mean()  # the same in all rows
    return remains * loss(batch) + (1 - remains) * loss(batch.replace(labels=batch.extra[_PARTNER]))


def _previous(batch: Batch, rows: Tensor, groups: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows and labels of the previous sample of each sample, or of its group, in the batch of all processes."""
    places = row_places(batch)
    groups = torch.zeros_like(places) if groups is None else groups
    gathered, labels, order, groups = all_gather_together((rows, batch.labels, places, groups))
    order = order.argsort()
    other = order[previous(groups[order])[places]]
    return gathered[other], labels[other]


def _mixed(batch: Batch, images: Tensor, labels: Tensor, remains: float) -> Batch:
    extra = {_PARTNER: labels, _REMAINS: torch.full_like(images[:, 0, 0, 0], remains)}
    return batch.replace(images=images, extra={**batch.extra, **extra})


def row_places(batch: Batch) -> Tensor:
    """Place of each row of this process in the batch of a single process, int64 ``(B,)``."""
    places, before = [], 0
    for part in [part for _, part in batch.parts.values()] or [batch]:
        places.append(torch.arange(part.draw.start, part.draw.stop) + before)
        before += part.draw.total
    return torch.cat(places).to(batch.labels.device)
