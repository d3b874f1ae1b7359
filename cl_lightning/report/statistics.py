"""Means over seeds with confidence intervals, tests of differences, and ranks; independent of runs and files."""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

MOST_PAIRS = 40
"""Largest number of differences of ``permutation_test``: the sums of each half of them are listed."""


@dataclass(frozen=True)
class Estimate:
    """A mean with the half-width of its confidence interval.

    Attributes:
        mean: Mean, in the unit of the values.
        half: Half-width of the interval around the mean, in the same unit; None for a single value.
        count: Number of values.
    """

    mean: float
    half: float | None
    count: int

    @property
    def low(self) -> float:
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        return self.mean + (self.half or 0.0)

    @property
    def clear(self) -> bool:
        """Whether there is an interval and 0 is outside it."""
        return self.half is not None and abs(self.mean) > self.half


def student_t(level: float, degrees: int) -> float:
    """The t with P(|X| <= t) = ``level``, X of Student's distribution with ``degrees`` >= 1 degrees of freedom."""
    return float(stdtrit(degrees, 0.5 + level / 2))


def estimate(values: Iterable[float | None], level: float = 0.95) -> Estimate | None:
    """Mean and Student's interval, mean +- t s / sqrt(n) with s over n - 1; None without values.

    Valid for independent and approximately normal values, such as runs of a method with different seeds.

    Args:
        values: Values; None is left out.
        level: Confidence level in (0, 1), the fraction of such intervals that contain the true mean.
    """
    known = [value for value in values if value is not None]
    count = len(known)
    if not known:
        return None
    mean = math.fsum(known) / count
    if count == 1:
        return Estimate(mean, None, 1)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in known) / (count - 1))
    return Estimate(mean, student_t(level, count - 1) * spread / math.sqrt(count), count)


def paired_difference(
    values: Mapping[Hashable, float], baseline: Mapping[Hashable, float], level: float = 0.95
) -> Estimate | None:
    """Mean and interval of value - baseline over the common keys (seeds); None without a common key.

    Effects of a seed on both values, such as an easy class order, cancel out, unlike in the difference of two means.
    """
    return estimate((values[key] - baseline[key] for key in values if key in baseline), level)


def permutation_test(differences: Sequence[float]) -> float:
    """Two-sided p-value of the exact paired permutation test: the share of sign patterns with at least this mean.

    Under the hypothesis that two methods are equal, each difference could as well have the other sign. With n
    differences the smallest possible value is 2^(1-n). No distribution is assumed.

    Args:
        differences: One per pair, at least 1 and at most ``MOST_PAIRS``.
    """
    values = np.abs(np.asarray(differences, dtype=np.float64))
    if not 1 <= len(values) <= MOST_PAIRS:
        raise ValueError(f"permutation_test: {len(values)} differences; give 1 to {MOST_PAIRS}")
    least = abs(math.fsum(differences)) - 1e-12 * (float(values.sum()) or 1.0)  # equal sums, rounded differently
    half = len(values) // 2
    first, second = _signed_sums(values[:half]), np.sort(_signed_sums(values[half:]))
    above = len(second) - np.searchsorted(second, least - first, side="left")
    below = np.searchsorted(second, -least - first, side="right")
    return min(1.0, float((above + below).sum()) / 2.0 ** len(values)) if least > 0 else 1.0


def _signed_sums(values: np.ndarray) -> np.ndarray:
    """Sums with all patterns of signs, ``(2^n,)``."""
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    return sums


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number by Holm's step-down method (Holm 1979), in the given order."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def mean_ranks(scores: Sequence[Sequence[float]]) -> list[float]:
    """Mean rank of each method over data sets; rank 1 is the highest score, equal scores share their mean rank.

    Args:
        scores: A row per data set, with the score of each method.
    """
    from scipy.stats import rankdata  # slow to import

    ranks = rankdata(-np.asarray(scores, dtype=np.float64), axis=1)
    return [float(rank) for rank in ranks.mean(axis=0)]


def critical_difference(methods: int, sets: int, level: float = 0.95) -> float:
    """Difference of two mean ranks from which on the Nemenyi test calls methods different (Demsar, JMLR 2006).

    CD = q sqrt(k (k + 1) / (6 N)), q the quantile of the studentised range over sqrt(2).

    Args:
        methods: k, number of methods, at least 2.
        sets: N, number of data sets, at least 1.
        level: Level of confidence.
    """
    from scipy.stats import studentized_range  # slow to import

    q = float(studentized_range.ppf(level, methods, np.inf)) / math.sqrt(2)
    return q * math.sqrt(methods * (methods + 1) / (6 * sets))


def cliques(ranks: Sequence[float], difference: float) -> list[tuple[float, float]]:
    """Smallest and largest rank of each largest group of methods that are less than ``difference`` apart."""
    ordered = sorted(ranks)
    found: list[tuple[float, float]] = []
    for start, low in enumerate(ordered):
        high = max(rank for rank in ordered if rank - low < difference)
        members = [rank for rank in ordered[start:] if rank <= high]
        if len(members) > 1 and not (found and found[-1][1] >= high):
            found.append((low, high))
    return found
