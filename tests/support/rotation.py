"""Which of many expensive tests an ordinary run makes: a few of them, others each day; ``make stress`` makes all.

A test with the mark ``rotating(count)`` runs for ``count`` of its parameters, or with ``rotating(count, each=group)``
for ``count`` of each group, where ``group`` is a function of the first parameter. The parameters are put into the order
of a hash of ``CL_LIGHTNING_ROTATION``, the test and the parameter, and the first ones run: all workers of a run agree,
and a run is repeated by its rotation. The variable is the date unless it is set; ``all`` stands for all parameters. A
test that is selected by ``-k`` or by its node id runs in any case.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import pytest

ROTATION = os.environ.setdefault("CL_LIGHTNING_ROTATION", datetime.now(UTC).date().isoformat())
"""Set before the workers start, which inherit it."""


def place(name: str, rotation: str = ROTATION) -> str:
    """What names are sorted by."""
    return hashlib.sha256(f"{rotation} {name}".encode()).hexdigest()


def left_out(items: Iterable[Any], rotation: str = ROTATION) -> list[Any]:
    """The rotating tests that this run does not make."""
    groups: dict[tuple[str, str, Any], list[Any]] = defaultdict(list)
    count: dict[tuple[str, str, Any], int] = {}
    for item in items:
        if rotation != "all" and (mark := item.get_closest_marker("rotating")) is not None:
            each = mark.kwargs.get("each", lambda value: None)
            group = (str(item.path), item.originalname, each(next(iter(item.callspec.params.values()))))
            groups[group].append(item)
            count[group] = mark.args[0]
    found: list[Any] = []
    for group, members in groups.items():
        members.sort(key=lambda item: place(f"{item.originalname} {item.callspec.id}", rotation))
        found += members[count[group] :]
    return found


def how_to_repeat(item: pytest.Item) -> str | None:
    """A command that runs a rotating test again, with what is drawn in it."""
    if item.get_closest_marker("rotating") is None:
        return None
    return f"CL_LIGHTNING_ROTATION={ROTATION} python -m pytest '{item.nodeid.partition('@')[0]}'"
