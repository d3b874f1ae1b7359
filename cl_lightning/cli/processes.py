"""Processes of one command: which process is the first, and what they print."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from cl_lightning.cli.arguments import PROGRAM
from cl_lightning.loop import slurm_job
from cl_lightning.loop.warning_filters import MESSAGES

_NOISE = (
    *MESSAGES,
    r".*does not have many workers.*",  # data in memory needs no workers
    r".*You defined a `validation_step` but have no `val_dataloader`.*",
    r".*`broadcast_buffers` is deprecated.*",  # its replacement would still broadcast once per fit
)


def _was_started_by_another() -> bool:
    """Whether the first process of this run started this process, rather than torchrun or SLURM."""
    return is_follower() and not TorchElasticEnvironment.detect() and slurm_job() is None


@contextmanager
def process_arguments(arguments: Sequence[str]) -> Iterator[None]:
    """Set the arguments of the process; Lightning starts the processes of a distributed run with them."""
    before = sys.argv
    sys.argv = [before[0] if before else PROGRAM, *arguments]
    try:
        yield
    finally:
        sys.argv = before


def is_follower() -> bool:
    """Whether this is not the first process of the run, which chooses the run folder and writes files."""
    return any(os.environ.get(name, "0") != "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def shown(path: Path) -> Path:
    """A path for messages: relative to the working directory if it is inside."""
    resolved = path.resolve()
    return resolved.relative_to(Path.cwd()) if resolved.is_relative_to(Path.cwd()) else resolved


def quiet() -> None:
    """Silence the messages of Lightning that repeat at each fit and test of a stream, or do not apply to it."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _NOISE:
        warnings.filterwarnings("ignore", message)
