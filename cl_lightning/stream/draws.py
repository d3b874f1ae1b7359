"""Random choices as a sort by hashed keys: no generator, no state, whole arrays at once.

The key of a sample is a hash of (seed, purpose, name of its class, name of its domain, rank in that class and domain).
It does not depend on the label or the index. A choice therefore stays the same when the data gets further classes and
labels and indices shift.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from cl_lightning.hashing import IntArray, KeyArray

# Purposes of random choices: one number each, so that the keys of different choices are independent.
ORDER, VALIDATION, SHOTS, SHARES, MINOR, DEALING, PERMUTATION, TAIL, THINNING, LABELS = range(10)
NOISE, WRONG_LABEL, REHEARSAL, LEVELS, FORGETTING, DISCOVERY = 16, 17, 18, 19, 20, 21


def rank_in_group(groups: IntArray, keys: KeyArray | IntArray | None = None) -> tuple[IntArray, IntArray]:
    """Rank of each element in its group, with the group sorted by key.

    Args:
        groups: Number of the group of each element, ``(n,)``.
        keys: Sort keys, ``(n,)``; without keys, elements keep their order.

    Returns:
        Rank of each element, from 0, and the size of its group, both int64 ``(n,)``.
    """
    order = np.argsort(groups, kind="stable") if keys is None else np.lexsort((keys, groups))
    _, inverse, counts = np.unique(groups, return_inverse=True, return_counts=True)
    starts = np.cumsum(counts) - counts
    place = np.empty(len(groups), np.int64)
    place[order] = np.arange(len(groups)) - starts[inverse[order]]
    return place, counts.astype(np.int64)[inverse]


def split(group: IntArray, count: int) -> list[IntArray]:
    """Ascending positions of the elements of groups ``0 .. count - 1``; elements with a negative group are left out."""
    order: IntArray = np.argsort(group, kind="stable").astype(np.int64)
    bounds = np.searchsorted(group[order], np.arange(count + 1))
    return [order[start:stop] for start, stop in pairwise(bounds)]


def round_half_up(share: npt.NDArray[np.floating[Any]]) -> IntArray:
    """Nearest integers; halves are rounded up."""
    rounded: IntArray = np.floor(share + 0.5).astype(np.int64)
    return rounded
