"""What the tests of each method cost: seconds of processor time.

Processor time, of the worker and of the processes that work for it, is what a test would take on a machine that does
nothing else, whatever else this machine does. Tests that rotate are a part of the suite whose size does not depend on
the number of methods, and count for none.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest

from support.subjects import METHOD_OF, SUBJECTS, TESTS, method_of_file

LIMIT = 8.0
"""Seconds for a method; more is an error unless its test file says why: ``SLOW = "reason"``."""
METHODS = frozenset(METHOD_OF.values())
STRATEGIES = {
    method: len({SUBJECTS[name].factory.func for name, other in METHOD_OF.items() if other == method})
    for method in METHODS
}
"""How many strategies a test file is about; each has its seconds."""
BUSY = 2.5
"""Load for each processor, above which other programs make processor time long, so that the limit is only reported."""
_elsewhere = 0.0
_last = 0.0


def spent_elsewhere(seconds: float) -> None:
    """Count seconds of a process that is no child of this one, or still runs."""
    global _elsewhere
    _elsewhere += seconds


def lap() -> float:
    """Seconds since the last call."""
    global _last
    times = os.times()
    now = times.user + times.system + times.children_user + times.children_system + _elsewhere
    seconds, _last = now - _last, now
    return seconds


def method_of(item: pytest.Item) -> str | None:
    """The method that a test belongs to: by its file, or by its parameter ``name`` in a suite for all methods."""
    if item.get_closest_marker("rotating") is not None:
        return None
    if item.path.is_relative_to(TESTS):
        method = method_of_file(item.path)
        return method if method in METHODS else None
    return METHOD_OF.get(getattr(item, "callspec", None) and item.callspec.params.get("name"))  # type: ignore[attr-defined]


def is_busy() -> bool:
    """Whether other programs use this machine, too."""
    return os.getloadavg()[0] > BUSY * (os.cpu_count() or 1)


def _reason(method: str) -> str | None:
    """What the test file of a method gives as ``SLOW``."""
    family, _, stem = method.partition("/")
    path = TESTS / family / f"test_{stem}.py"
    found = path.is_file() and re.search(r'^SLOW = "(.+)"', path.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else None


class Totals:
    """Seconds by method, over all workers."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.rest = 0.0

    def add(self, report: Any) -> None:
        if not hasattr(report, "cost"):
            return
        if report.method is None:
            self.rest += report.cost
        else:
            self.seconds[report.method] += report.cost

    def too_slow(self) -> list[str]:
        return [
            method
            for method, seconds in self.seconds.items()
            if seconds > LIMIT * STRATEGIES[method] and _reason(method) is None
        ]

    def fails(self) -> bool:
        """Whether the run ends with an error."""
        return not is_busy() and bool(self.too_slow())

    def summary(self, most: int = 8) -> Iterator[str]:
        """Lines for the end of a run."""
        if not self.seconds:
            return
        total = sum(self.seconds.values())
        ordered = sorted(self.seconds.items(), key=lambda pair: -pair[1])
        yield (
            f"processor time: {total:.0f} s for {len(ordered)} methods, {total / len(ordered):.1f} s each; "
            f"{self.rest:.0f} s for the rest"
        )
        yield "most expensive: " + ", ".join(f"{method} {seconds:.1f} s" for method, seconds in ordered[:most])
        kind = "note: this machine is busy, but" if is_busy() else "error:"
        for method in self.too_slow():
            limit = LIMIT * STRATEGIES[method]
            yield (
                f"{kind} the tests of {method} take {self.seconds[method]:.1f} s; the limit is {limit:.0f} s: make "
                'them faster, or give the reason in its test file as SLOW = "..."'
            )


TOTALS = Totals()
