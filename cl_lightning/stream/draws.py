"""Random choices as a sort by hashed keys: no generator, no state, whole arrays at once.

The key of a sample is a hash of (seed, purpose, name of its class, name of its domain, place in that class and domain).
It does not contain the label or the index, so that a choice stays what it was when the data gains other classes, and
labels and indices shift.
"""

from collections.abc import Iterable
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
KeyArray = npt.NDArray[np.uint64]

# Purposes: one number each, so that independent choices have independent keys.
ORDER, VALIDATION, SHOTS, SHARES, MINOR, DEALING, PERMUTATION, TAIL, THINNING, LABELS = range(10)


def mix(*numbers: int | IntArray | KeyArray) -> KeyArray:
    """Hash integers, element by element, to 64 bits: ``cl_lightning.batch.mix`` for arrays.

    Args:
        numbers: Integers or arrays of shapes that broadcast to one dimension.

    Returns:
        uint64 ``(n,)``, with n = 1 if there are only integers.
    """
    state = np.zeros(1, np.uint64)
    for number in numbers:
        term = np.uint64(number & (1 << 64) - 1) if isinstance(number, int) else number.astype(np.uint64)
        state = state + term + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def seed_array(seeds: Iterable[int]) -> KeyArray:
    """Seeds as an array, for which ``mix`` gives what it gives for the integers."""
    return np.array([seed & (1 << 64) - 1 for seed in seeds], np.uint64)


def hash_names(names: tuple[str, ...]) -> KeyArray:
    """64-bit hash of each name, uint64 ``(len(names),)``; the same in every process, unlike ``hash``."""
    digests = (blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest() for name in names)
    return np.array([int.from_bytes(digest, "little") for digest in digests], np.uint64)


def places(groups: IntArray, keys: KeyArray | IntArray | None = None) -> tuple[IntArray, IntArray]:
    """Where each element stands in its group, when the group is sorted by key.

    Args:
        groups: Number of the group of each element, ``(n,)``.
        keys: What to sort by, ``(n,)``; without keys, elements keep their order.

    Returns:
        Place of each element, from 0, and the size of its group, both int64 ``(n,)``.
    """
    order = np.argsort(groups, kind="stable") if keys is None else np.lexsort((keys, groups))
    _, inverse, counts = np.unique(groups, return_inverse=True, return_counts=True)
    starts = np.cumsum(counts) - counts
    place = np.empty(len(groups), np.int64)
    place[order] = np.arange(len(groups)) - starts[inverse[order]]
    return place, counts.astype(np.int64)[inverse]


def split(group: IntArray, count: int) -> list[IntArray]:
    """Ascending positions of the elements of groups ``0 .. count - 1``; a negative group is in none."""
    order: IntArray = np.argsort(group, kind="stable").astype(np.int64)
    bounds = np.searchsorted(group[order], np.arange(count + 1))
    return [order[start:stop] for start, stop in pairwise(bounds)]


def nearest(share: npt.NDArray[np.floating[Any]]) -> IntArray:
    """Nearest integers, halves upwards."""
    rounded: IntArray = np.floor(share + 0.5).astype(np.int64)
    return rounded
