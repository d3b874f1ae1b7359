"""Which of many expensive tests an ordinary run makes: a few of them, others each day; ``make stress`` makes all.

A test with the mark ``rotating(count)`` runs for ``count`` of its parameters, or with ``rotating(count, each=group)``
for ``count`` of each group, where ``group`` is a function of the first parameter. The parameters are put into the order
of a hash of ``CL_LIGHTNING_ROTATION``, the test and the parameter, and the first ones run: all workers of a run agree,
and a run is repeated by its rotation. The variable is the date unless it is set; ``all`` stands for all parameters. A
test that is selected by ``-k`` or by its node id runs in any case.

With ``of=files``, a function from the first parameter to files of the checkout, the parameters that depend on what has
changed come first (``support/selection.py``). A test with the mark ``dependent`` runs for all methods that depend on
what has changed, and for one in ten of the others: on each day another tenth, so that all have their turn in ten days.
The same holds for tests that call ``check_strategy`` on variants of a method, without a mark. Where a change concerns
more than ``MOST`` of them, those whose own files have changed come first, then others in the order of the day.

All other tests of a method, in its own file and in the suites for all methods, run if its own files have changed, and
otherwise on one day in ``DAYS``: the time of a run grows little with the number of methods. A shared part that has
changed is tested by a third of the methods on each day, and by all of them in ``make stress``.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest

from support import costs, selection
from support.subjects import SUBJECTS

ROTATION = os.environ.setdefault("CL_LIGHTNING_ROTATION", datetime.now(UTC).date().isoformat())
"""Set before the workers start, which inherit it."""
ONE_IN = 10
"""Of the methods that do not depend on what has changed."""
DAYS = 3
"""Of the methods whose own files have not changed, an ordinary run tests one in so many."""
MOST = 8
"""Of the methods, and files of variants, that depend on what has changed: the time of a run stays bounded."""


def place(name: str, rotation: str = ROTATION) -> str:
    """What names are sorted by."""
    return hashlib.sha256(f"{rotation} {name}".encode()).hexdigest()


def left_out(
    items: Iterable[Any],
    rotation: str = ROTATION,
    affected: frozenset[str] | None = None,
    changed: frozenset[str] | None = None,
) -> list[Any]:
    """The rotating and dependent tests that this run does not make.

    Args:
        items: All tests.
        rotation: Decides which parameters run.
        affected: Files that depend on what has changed; by default of this checkout.
        changed: Files that have changed themselves; by default of this checkout.
    """
    if rotation == "all":
        return []
    items = list(items)
    affected = selection.now() if affected is None else affected
    changed = selection.changed_now() if changed is None else changed
    dependent = [item for item in items if item.get_closest_marker("rotating") is None and _is_dependent(item)]
    chosen = _chosen(dependent, rotation, affected, changed)
    groups: dict[tuple[str, str, Any], list[Any]] = defaultdict(list)
    count: dict[tuple[str, str, Any], int] = {}
    found: list[Any] = []
    for item in items:
        if (mark := item.get_closest_marker("rotating")) is not None:
            each = mark.kwargs.get("each", lambda value: None)
            group = (str(item.path), item.originalname, each(_first(item)))
            groups[group].append(item)
            count[group] = mark.args[0]
        elif _is_dependent(item):
            if _name(item) not in chosen and not _has_its_turn(item, rotation):
                found.append(item)
        elif (method := costs.method_of(item)) is not None and _rests(method, rotation, changed):
            found.append(item)
    for group, members in groups.items():
        members.sort(key=lambda item: _order(item, rotation, affected))
        found += members[count[group] :]
    return found


def _first(item: Any) -> Any:
    """The first parameter of a test."""
    return next(iter(item.callspec.params.values()))


def _chosen(items: Iterable[Any], rotation: str, affected: frozenset[str], changed: frozenset[str]) -> frozenset[str]:
    """Names whose dependent tests run because of a change."""
    others: dict[str, bool] = {}  # whether it is not the own files of a method that have changed
    for item in items:
        if selection.depends(selection.files_of(item), affected):
            others[_name(item)] = changed.isdisjoint(selection.own_files_of(item))
    return frozenset(sorted(others, key=lambda name: (others[name], place(name, rotation)))[:MOST])


def _name(item: Any) -> str:
    """Method, or test file, that a dependent test is about."""
    return str(selection.parameters(item).get("name", Path(item.path).stem))


def _has_its_turn(item: Any, rotation: str) -> bool:
    """Whether it is the day of a dependent test; all tests of a method run together, and share its reference run."""
    return (int(place(_name(item), ""), 16) + _day(rotation)) % ONE_IN == 0


def _rests(method: str, rotation: str, changed: frozenset[str]) -> bool:
    """Whether the tests of a method wait for another day: it is not its turn, and its own files have not changed."""
    turn = (int(place(method, ""), 16) + _day(rotation)) % DAYS == 0
    return not turn and changed.isdisjoint(selection.files_of_module(method))


def _day(rotation: str) -> int:
    try:
        return date.fromisoformat(rotation).toordinal()
    except ValueError:
        return int(place("", rotation), 16)


def _is_dependent(item: Any) -> bool:
    code = getattr(getattr(item, "function", None), "__code__", None)
    is_suite = code is not None and "check_strategy" in code.co_names
    return is_suite or item.get_closest_marker("dependent") is not None


def _order(item: Any, rotation: str, affected: frozenset[str]) -> tuple[bool, str]:
    of = item.get_closest_marker("rotating").kwargs.get("of", lambda value: ())
    return not selection.depends(of(_first(item)), affected), place(f"{item.originalname} {item.callspec.id}", rotation)


def summary() -> Iterator[str]:
    """A line on the tests that depend on what has changed, for the end of a run that has looked."""
    if selection.AFFECTED not in os.environ:
        return
    affected = selection.now()
    if ROTATION == "all":
        yield "selection: all methods"
        return
    names = [name for name in SUBJECTS if selection.depends(selection.files_of_method(name), affected)]
    yield (
        f"selection: {len(names)} of {len(SUBJECTS)} methods depend on what has changed, of which up to {MOST} are "
        "tested on two processes, in half precision and on a device; of the others a tenth. Of the methods whose own "
        f"files have not changed, one in {DAYS} is tested (all of them with CL_LIGHTNING_ROTATION=all)"
    )


def how_to_repeat(item: pytest.Item) -> str | None:
    """A command that runs a rotating test again, with what is drawn in it."""
    if item.get_closest_marker("rotating") is None:
        return None  # a dependent test has no random numbers: its node id is enough
    return f"CL_LIGHTNING_ROTATION={ROTATION} python -m pytest '{item.nodeid.partition('@')[0]}'"
