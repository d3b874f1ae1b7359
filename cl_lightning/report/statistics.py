"""Means over seeds with confidence intervals; independent of runs and files."""

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

from scipy.special import stdtrit


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
