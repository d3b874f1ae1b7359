"""All strategies, as small as the conformance suite runs them.

A strategy is found by itself. Its test file, ``tests/strategies/<family>/test_<stem>.py``, may have a module-level dict
``SUBJECTS`` of what is tested, by name: the strategies of the file with options that take seconds, variants whose code
is not the code of the defaults, and what does not hold for them. A strategy that no test file lists is tested as
``small(cls)``. ``WAITS = {"GEM": {"gem_projection"}}`` gives, by the names of subjects, the functions in which a step
waits for the device.
"""

import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from cl_lightning.cli import discovery
from cl_lightning.strategy import ContinualStrategy
from cl_lightning.testing import Subject, data_for, small
from support import ROOT

TESTS = ROOT / "tests" / "strategies"
WAITS: dict[str, set[str]] = {}
"""Functions in which a step of a subject waits for the device."""


def _found() -> Iterator[tuple[str, Subject, str]]:
    """Name, subject and method (``<family>/<stem>`` of the test file) of all that is tested."""
    known: set[type[ContinualStrategy]] = set()
    for path in sorted(TESTS.glob("*/test_*.py")):
        if re.search(r"^WAITS\b", path.read_text(encoding="utf-8"), re.MULTILINE):
            WAITS.update(_module(path).WAITS)
        if re.search(r"^SUBJECTS\b", path.read_text(encoding="utf-8"), re.MULTILINE):
            for name, subject in _module(path).SUBJECTS.items():
                held = subject.first_task_is_finetuning and subject.matches_single_process
                if held == bool(subject.reason):
                    raise ValueError(f"{path}: {name}: give a reason where a fact does not hold, and only there")
                known.add(subject.factory.func)
                yield name, replace(subject, name=name), method_of_file(path)
    for cls in discovery.strategies():
        if cls not in known:
            *_, family, stem = cls.__module__.split(".")
            yield cls.__name__, Subject(small(cls), cls.__name__, data=data_for(cls)), f"{family}/{stem.rstrip('_')}"


def _module(path: Path):
    """A test file under the name by which pytest imports it."""
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    return importlib.import_module(path.stem)


def method_of_file(path: Path) -> str:
    """``rehearsal/er`` for ``tests/strategies/rehearsal/test_er.py``."""
    return f"{path.parent.name}/{path.stem.removeprefix('test_')}"


_ALL = list(_found())
SUBJECTS = {name: subject for name, subject, _ in _ALL}
METHOD_OF = {name: method for name, _, method in _ALL}
"""The method that a subject belongs to."""
