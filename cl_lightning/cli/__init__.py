"""The command line: ``python -m cl_lightning fit | validate | test | predict | report | study | methods``."""

from cl_lightning.cli.arguments import (
    COMMANDS,
    PROGRAM,
    check_required,
    fail,
    last_of_newest_run,
    resolve_last,
    value_of,
    without,
)
from cl_lightning.cli.main import HELP, main, stopped_at_once, version

__all__ = [
    "COMMANDS",
    "HELP",
    "PROGRAM",
    "check_required",
    "fail",
    "last_of_newest_run",
    "main",
    "resolve_last",
    "stopped_at_once",
    "value_of",
    "version",
    "without",
]
