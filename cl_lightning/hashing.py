"""Counter-based random numbers: 64-bit hashes of integers and names, the same on every machine."""

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
KeyArray = npt.NDArray[np.uint64]
BoolArray = npt.NDArray[np.bool_]


def hash64(*numbers: int | IntArray | KeyArray) -> KeyArray:
    """Hash integers to 64 bits, element by element: the vectorised form of ``cl_lightning.batch.mix``.

    ``hash64(seed, np.arange(5))`` gives one number for each of 5 samples.

    Args:
        numbers: Integers or arrays of shapes that broadcast to one dimension.

    Returns:
        uint64 ``(n,)``, with n = 1 if all arguments are integers.
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
    """Seeds as an array ``(n,)``, for which :func:`hash64` gives the same hashes as for the integers."""
    return np.array([seed & (1 << 64) - 1 for seed in seeds], np.uint64)


def hash_names(names: tuple[str, ...]) -> KeyArray:
    """64-bit hash of each name, uint64 ``(len(names),)``; the same in every process, unlike the built-in ``hash``."""
    digests = (blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest() for name in names)
    return np.array([int.from_bytes(digest, "little") for digest in digests], np.uint64)
