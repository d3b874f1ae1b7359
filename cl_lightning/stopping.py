"""Ends a run when a signal asks for it, on all processes at the same step."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Trainer

from cl_lightning import distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM)
REQUEUE_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
"""What SLURM is told to send some time before a job's end (``#SBATCH --signal=SIGUSR1@90``)."""

_SECONDS_TO_AGREE = 0.5
_LOST = re.compile(r"connection (was )?(closed|reset)|broken pipe|remote process exited", re.IGNORECASE)


class Interrupted(Exception):  # noqa: N818  # no error
    """The run was asked to stop and has written a checkpoint."""

    def __init__(self, path: Path, signum: int) -> None:
        self.path, self.signum = path, signum
        super().__init__(f"stopped; the state is in {path}")


class StopRequest:
    """Notes the first signal that asks for a stop; a second one ends the process at once.

    Several processes have to agree on the step at which they stop. They exchange what they know every half second or
    so, not at every step, where they would wait for one another.

    Args:
        trainer: What trains; its own signal handling, which would exchange messages in the middle of others, is
            switched off.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.signum: int | None = None
        self._trainer = trainer
        self._every, self._steps = 1, 0
        self._asked = time.monotonic()
        trainer._signal_connector.register_signal_handlers = _nothing  # type: ignore[method-assign]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals are noted inside."""
        before: dict[int, Any] = {}

        def note(signum: int, frame: FrameType | None) -> None:
            if self.signum is not None:
                signal.signal(signum, before[signal.Signals(signum)] or signal.SIG_DFL)
                raise KeyboardInterrupt
            self.signum = signum

        for number in (*SIGNALS, *(REQUEUE_SIGNALS if slurm_job() else ())):
            try:
                before[number] = signal.signal(number, note)
            except ValueError:  # not in the main thread, where signals cannot be caught
                continue
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def made(self, *, now: bool = False) -> bool:
        """Whether any process was asked to stop: the same answer on all of them, which all call this at each step.

        Args:
            now: Find out at once; else within half a second, in steps that all processes count alike.
        """
        if not distributed.is_distributed():
            return self.signum is not None
        self._steps += 1
        if self._steps < self._every and not now:
            return False
        passed, self._asked = time.monotonic() - self._asked, time.monotonic()
        steps_to_agree = max(1.0, min(100.0, _SECONDS_TO_AGREE * self._steps / max(passed, 1e-6)))
        told = torch.tensor([float(self.signum or 0), -steps_to_agree], device=self._trainer.strategy.root_device)
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)  # the shortest interval that any wants
        signum, every = told.tolist()
        self._steps, self._every, self.signum = 0, int(-every), int(signum) or None
        return self.signum is not None


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error of a collective says that another process is gone."""
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


def slurm_job() -> str | None:
    """Number of the SLURM job that this process belongs to, as ``scontrol`` names it."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}" if array else os.environ.get("SLURM_JOB_ID")
    return job if job is not None and re.fullmatch(r"\d+(_\d+)?", job) else None


def requeue(signum: int) -> str | None:
    """Have SLURM start this job again, if it was SLURM that sent a signal before the job's end.

    Returns:
        What came of it, in words; None if there was nothing to do.
    """
    job = slurm_job()
    if job is None or signum not in REQUEUE_SIGNALS:
        return None
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"job {job} could not be put into the queue again: {error}"
    if done.returncode:
        return f"job {job} could not be put into the queue again: {done.stderr.strip() or done.returncode}"
    return f"job {job} is in the queue again"


def _nothing(*_: object) -> None:
    """In place of Lightning's own handling of signals."""
