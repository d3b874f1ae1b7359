"""Commands that a test runs as a user does, and what they print."""

import shlex
from collections.abc import Callable
from typing import Any, NamedTuple

import yaml

from cl_lightning.cli import main

ORDER = "--data.scenario ClassIncremental --data.scenario.tasks 5 --data.scenario.class_order"
SHORT = ("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--loop.stop_after_task", "1")
"""Options of a run of two tasks and two steps."""


class Said(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


Run = Callable[..., Said]


def command(capsys: Any, line: str, *more: str) -> Said:
    """Run a command in this process: one string, or arguments one by one."""
    capsys.readouterr()
    code = main([*shlex.split(line), *more])
    return Said(code, *capsys.readouterr())


def config_of(said: Said) -> dict[str, Any]:
    """The configuration that a command has printed."""
    assert said.code == 0, said.err
    return yaml.safe_load(said.out)


def is_one_line(said: Said) -> bool:
    """Whether a command has ended with an error of one line."""
    return said.code == 2 and said.err.count("\n") == 1 and said.err.startswith("error: ")
