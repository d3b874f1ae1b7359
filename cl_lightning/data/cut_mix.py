"""CutMix (Yun et al., ICCV 2019, arXiv:1905.04899): a box of each image is replaced by a part of another image.

With probability p, and r the share of the pixels that remain,

    L = r CE(f(x), y_a) + (1 - r) CE(f(x), y_b),    box of area 1 - u, u ~ Beta(alpha, alpha), cut at the border

The box is the same in all images of a step, and the other image is the previous one of the batch of all processes, or
the previous one of the same group, so the result does not depend on the number of processes.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cl_lightning.batch import Batch
from cl_lightning.distributed import all_gather_together

_CUTMIX = 0x6D2  # salt of the draw of the box
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
    """
    random = np.random.default_rng(batch.draw.fork(_CUTMIX).key)  # the same numbers on every process
    share, chance, *centre = random.beta(alpha, alpha), *random.random(3)
    if chance >= probability:
        return batch
    height, width = batch.images.shape[2:]
    rows, columns = cut_box(height, width, float(share), (float(centre[0]), float(centre[1])))
    places = _places(batch)
    groups = torch.zeros_like(places) if groups is None else groups
    boxes, labels, order, groups = all_gather_together(
        (batch.images[:, :, rows, columns], batch.labels, places, groups)
    )
    order = order.argsort()
    other = order[previous(groups[order])[places]]
    images = batch.images.clone()
    images[:, :, rows, columns] = boxes[other]
    remains = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
    extra = {_PARTNER: labels[other], _REMAINS: torch.full_like(images[:, 0, 0, 0], remains)}
    return batch.replace(images=images, extra={**batch.extra, **extra})


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
        batch: Result of :func:`cutmix`.
    """
    if _PARTNER not in batch.extra:
        return loss(batch)
    remains = batch.extra[_REMAINS].mean()  # the same in all rows
    return remains * loss(batch) + (1 - remains) * loss(batch.replace(labels=batch.extra[_PARTNER]))


def _places(batch: Batch) -> Tensor:
    """Place of each row of this process in the batch of a single process, int64 ``(B,)``."""
    places, before = [], 0
    for part in [part for _, part in batch.parts.values()] or [batch]:
        places.append(torch.arange(part.draw.start, part.draw.stop) + before)
        before += part.draw.total
    return torch.cat(places).to(batch.labels.device)
