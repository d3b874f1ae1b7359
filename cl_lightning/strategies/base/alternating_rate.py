"""A learning rate that changes when a test says that another one lowers the loss more (CLIB: Koh et al., ICLR 2022)."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, variance
from typing import Any, ClassVar

import torch
from scipy.special import stdtr
from torch import nn

from cl_lightning.checks import at_least, within

_BASE = "rate_of_one"  # key of the learning rate of a parameter group at a factor of 1


def larger_mean(first: Sequence[float], second: Sequence[float]) -> float:
    """p-value of Welch's t-test that the mean of ``first`` is larger than the mean of ``second``, in [0, 1].

    A small value says that it is. Without any variance it is 0, 0.5 or 1, as the means are larger, equal or smaller.

    Args:
        first, second: At least 2 numbers each.
    """
    errors = [variance(values) / len(values) for values in (first, second)]
    gap, total = fmean(first) - fmean(second), sum(errors)
    if total == 0:
        return 0.5 if gap == 0 else float(gap < 0)
    parts = zip(errors, (first, second), strict=True)
    freedom = total**2 / sum(error**2 / (len(values) - 1) for error, values in parts)
    return float(stdtr(freedom, -gap / math.sqrt(total)))


class AlternatingRate(nn.Module):
    """Alternates a high and a low learning rate, and shifts both in the direction of the larger decrease of the loss.

    A period ends with :meth:`end_period` and the decrease of the loss in it; then the other rate is used. With
    ``periods`` decreases of either rate, Welch's t-test compares them: if the low rate is better the high rate becomes
    the low one and the low one is multiplied by ``ratio``; if the high rate is better the low rate becomes the high one
    and the high one is divided by ``ratio``. The test then begins again. Rates are factors of the learning rates of the
    optimizer: 1 and ``ratio`` at first, the high one first.

    The state is a few numbers on the CPU, the same on every process.

    Args:
        ratio: Low rate by high rate, in (0, 1).
        periods: Number of decreases of either rate in a test, the latest ones, at least 2.
        significance: Largest p-value that shifts the rates, in (0, 0.5).
    """

    kept_as: ClassVar[str] = "statistics"

    def __init__(self, *, ratio: float = 0.95, periods: int = 10, significance: float = 0.05) -> None:
        super().__init__()
        within(self, "(0, 1)", ratio=ratio)
        at_least(self, 2, periods=periods)
        within(self, "(0, 0.5)", significance=significance)
        self.ratio, self.periods, self.significance = ratio, periods, significance
        self.low, self.high, self.is_high = ratio, 1.0, True
        self.decreases: dict[str, list[float]] = {"low": [], "high": []}

    @property
    def factor(self) -> float:
        """Factor of the learning rates at present."""
        return self.high if self.is_high else self.low

    def end_period(self, decrease: float) -> None:
        """End a period of the present rate, and begin one of the other rate.

        Args:
            decrease: Decrease of the loss in the period; nan if it is not known.
        """
        if not math.isnan(decrease):
            history = self.decreases["high" if self.is_high else "low"]
            history.append(decrease)
            del history[: -self.periods]
        self.is_high = not self.is_high
        low, high = self.decreases["low"], self.decreases["high"]
        if min(len(low), len(high)) < self.periods:
            return
        p = larger_mean(low, high)
        if p < self.significance:
            self.high, self.low = self.low, self.low * self.ratio
        elif p > 1 - self.significance:
            self.low, self.high = self.high, self.high / self.ratio
        else:
            return
        self.decreases, self.is_high = {"low": [], "high": []}, True

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Note the learning rates of a new optimizer as the rates at a factor of 1, and set the present rates."""
        for group in optimizer.param_groups:
            group[_BASE] = group["lr"]
        self.set(optimizer)

    def set(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the present learning rates of an optimizer that :meth:`begin` has seen, also before a restart."""
        for group in optimizer.param_groups:
            group["lr"] = group[_BASE] * self.factor

    def num_bytes(self) -> int:
        return sum(value.nbytes for value in self._state().values())

    def _state(self) -> dict[str, torch.Tensor]:
        numbers = {"rates": [self.low, self.high, float(self.is_high)], **self.decreases}
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + name: value for name, value in self._state().items()})

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = [prefix + name for name in ("rates", "low", "high")]
        if absent := [name for name in names if name not in state_dict]:
            missing_keys += absent
            return
        rates, low, high = (state_dict[name].tolist() for name in names)
        self.low, self.high, self.is_high = rates[0], rates[1], bool(rates[2])
        self.decreases = {"low": low, "high": high}
