"""What the tests of each method cost: seconds of processor time, as on the machine for which the limit was set.

Processor time, of the worker and of the processes that work for it, depends on the processor and on what else runs on
it. Between the tests each worker therefore times the same small piece of work, and all seconds are divided by the time
that it takes here, relative to ``PIECE``. Tests that rotate are a part of the suite whose size does not depend on the
number of methods, and count for none.
"""

import os
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from support.subjects import METHOD_OF, SUBJECTS, TESTS, method_of_file

LIMIT = 8.0
"""Seconds for a method; more is reported, and twice as much is an error, unless its test file says why:
``SLOW = "reason"``."""
TOLERANCE = 2.0
"""The same tests take up to 1.3 times as long in another run: an error at the limit itself would come and go."""
PIECE = 0.0143
"""Seconds of :func:`piece` on the machine for which the limit was set, with nothing else to do."""
EVERY = 20
"""Tests between two measurements of :func:`piece`."""
METHODS = frozenset(METHOD_OF.values())
STRATEGIES = {
    method: len({SUBJECTS[name].factory.func for name, other in METHOD_OF.items() if other == method})
    for method in METHODS
}
"""How many strategies a test file is about; each has its seconds."""
_elsewhere = 0.0
_last = 0.0
_calls = 0


def spent_elsewhere(seconds: float) -> None:
    """Count seconds of a process that is no child of this one, or still runs."""
    global _elsewhere
    _elsewhere += seconds


@contextmanager
def children_not_counted() -> Iterator[None]:
    """Count no time of child processes that end inside, because it has been counted while they ran."""
    global _elsewhere
    before = _children()
    try:
        yield
    finally:
        _elsewhere -= _children() - before


def _children() -> float:
    times = os.times()
    return times.children_user + times.children_system


def lap() -> float:
    """Seconds since the last call."""
    global _last
    times = os.times()
    now = times.user + times.system + _children() + _elsewhere
    seconds, _last = now - _last, now
    return seconds


def piece() -> float:
    """Seconds of processor time of a fixed piece of work: small operations of torch, and Python."""
    begin, values = time.process_time(), torch.ones(32, 32)
    for number in range(2000):
        values = (values @ values).clamp(max=1.0) + number % 2
    return time.process_time() - begin


def piece_now_and_then() -> float | None:
    """Every so many calls, :func:`piece`; its time is counted for no test."""
    global _calls
    _calls += 1
    return piece() if _calls % EVERY == 0 else None


def method_of(item: pytest.Item) -> str | None:
    """The method that a test belongs to: by its file, or by its parameter ``name`` in a suite for all methods."""
    if item.get_closest_marker("rotating") is not None:
        return None
    if item.path.is_relative_to(TESTS):
        method = method_of_file(item.path)
        return method if method in METHODS else None
    return METHOD_OF.get(getattr(item, "callspec", None) and item.callspec.params.get("name"))  # type: ignore[attr-defined]


def _reason(method: str) -> str | None:
    """What the test file of a method gives as ``SLOW``."""
    family, _, stem = method.partition("/")
    path = TESTS / family / f"test_{stem}.py"
    found = path.is_file() and re.search(r'^SLOW = "(.+)"', path.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else None


class Totals:
    """Seconds by method, over all workers."""

    def __init__(self) -> None:
        self.measured: dict[str, float] = defaultdict(float)
        self.rest = 0.0
        self.pieces: list[float] = []

    def add(self, report: Any) -> None:
        if not hasattr(report, "cost"):
            return
        if report.piece is not None:
            self.pieces.append(report.piece)
        if report.method is None:
            self.rest += report.cost
        else:
            self.measured[report.method] += report.cost

    @property
    def slowness(self) -> float:
        """How much longer the same work takes here than on the machine for which the limit was set."""
        return statistics.median(self.pieces) / PIECE if self.pieces else 1.0

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by method, on the machine for which the limit was set."""
        return {method: seconds / self.slowness for method, seconds in self.measured.items()}

    def too_slow(self, limit: float = LIMIT) -> list[str]:
        """Methods without a reason whose tests take longer than ``limit`` for each strategy."""
        return [
            method
            for method, seconds in self.seconds.items()
            if seconds > limit * STRATEGIES[method] and _reason(method) is None
        ]

    def fails(self) -> bool:
        """Whether the run ends with an error."""
        return bool(self.too_slow(LIMIT * TOLERANCE))

    def summary(self, most: int = 8) -> Iterator[str]:
        """Lines for the end of a run."""
        seconds = self.seconds
        if not seconds:
            return
        total, rest = sum(seconds.values()), self.rest / self.slowness
        ordered = sorted(seconds.items(), key=lambda pair: -pair[1])
        yield (
            f"processor time: {total:.0f} s for {len(ordered)} methods, {total / len(ordered):.1f} s each; "
            f"{rest:.0f} s for the rest; here each takes {self.slowness:.1f} times as long"
        )
        yield "most expensive: " + ", ".join(f"{method} {spent:.1f} s" for method, spent in ordered[:most])
        errors = self.too_slow(LIMIT * TOLERANCE)
        for method in self.too_slow():
            yield (
                f"{'error' if method in errors else 'note'}: the tests of {method} take {seconds[method]:.1f} s; the "
                f"limit is {LIMIT * STRATEGIES[method]:.0f} s: make them faster, or give the reason in its test file "
                'as SLOW = "..."'
            )


TOTALS = Totals()
