"""Stops a run after a signal or a stop of the Trainer, on all processes at the same step."""

import inspect
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping

from cl_lightning import distributed
from cl_lightning.lightning_private import ignore_signals, set_properties

SIGNALS = (signal.SIGINT, signal.SIGTERM)
REQUEUE_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
"""Signals that SLURM can send before the time limit of a job (``#SBATCH --signal=SIGUSR1@90``: 90 seconds before)."""
NO_SIGNAL = 0
"""In the place of a signal number: the run was stopped by ``trainer.should_stop``."""
_SECONDS_TO_AGREE = 0.5
_LOST = re.compile(r"connection (was )?(closed|reset)|broken pipe|remote process exited", re.IGNORECASE)


class Interrupted(Exception):  # noqa: N818  # not an error
    """A signal, or ``trainer.should_stop``, stopped the run, and a checkpoint was written.

    Attributes:
        path: The checkpoint.
        signum: Number of the signal; ``NO_SIGNAL`` if the Trainer was stopped by a callback or by ``max_time``.
    """

    def __init__(self, path: Path, signum: int) -> None:
        self.path, self.signum = path, signum
        super().__init__(f"stopped; the state is in {path}")


class StopRequest:
    """Records the first stop signal, so that the run can stop between two steps; a second signal ends the process.

    ``trainer.should_stop = True`` is such a request too, unless a method of ``EarlyStopping`` sets it: early stopping
    ends the phase, every other stop (``max_time``, ``Timer``, a callback) ends the run.

    Several processes have to agree on the step at which they stop. They exchange the signal about every half second;
    an exchange at every step would synchronise the processes each time.

    Args:
        trainer: Trainer of the run. Its own signal handling is switched off, because it sends messages between
            processes in the middle of other collectives.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.signum: int | None = None
        self._trainer = trainer
        self._every, self._steps = 1, 0
        self._asked = time.monotonic()
        ignore_signals(trainer)
        _hand_over_stops(trainer, self)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Record signals inside the context; restore the earlier handlers at its end."""
        before: dict[int, Any] = {}

        def note(signum: int, frame: FrameType | None) -> None:
            if self.signum:
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

    def by_trainer(self) -> None:
        """Record that ``trainer.should_stop`` was set on this process."""
        if self.signum is None:
            self.signum = NO_SIGNAL

    def made(self, *, now: bool = False) -> bool:
        """Whether any process received a stop signal; all processes call this at each step and get the same answer.

        Args:
            now: Exchange signals at this call; otherwise about every half second, at the same step on all processes.
        """
        if not distributed.is_distributed():
            return self.signum is not None
        self._steps += 1
        if self._steps < self._every and not now:
            return False
        return self._agree()[0]

    def watch(self, batches: int) -> Callable[[int], bool]:
        """Look at the request in a pass over data outside of training steps; all processes call this as it begins.

        Processes may have different numbers of batches. They look before the batches that each of them has, about
        every half second.

        Args:
            batches: Number of batches of this process.

        Returns:
            Function that is called before each batch with its number, from 0: whether any process received a signal.
        """
        if not distributed.is_distributed():
            return lambda number: self._trainer.world_size == 1 and self.signum is not None
        stopped, common = self._agree(batches)

        def made(number: int) -> bool:
            # The second batch is the first whose time is known, which may be another than that of a training step.
            return stopped or (0 < number < common and self.made(now=number == 1))

        return made

    def _agree(self, batches: int = 0) -> tuple[bool, int]:
        """Whether any process received a signal, and the smallest number of batches of all processes."""
        passed, self._asked = time.monotonic() - self._asked, time.monotonic()
        steps_to_agree = max(1.0, min(100.0, _SECONDS_TO_AGREE * self._steps / max(passed, 1e-6)))
        mine = [float(-1 if self.signum is None else self.signum), -steps_to_agree, -float(batches)]
        exchanged = torch.tensor(mine, dtype=torch.float64, device=self._trainer.strategy.root_device)
        torch.distributed.all_reduce(exchanged, torch.distributed.ReduceOp.MAX)  # the shortest interval of all
        signum, every, common = exchanged.tolist()
        self._steps, self._every = 0, int(-every)
        if signum >= 0:
            self.signum = int(signum)
        return signum >= 0, int(-common)


def _hand_over_stops(trainer: Trainer, request: StopRequest) -> None:
    """Make ``should_stop`` of this Trainer end a phase if ``EarlyStopping`` sets it, and the run otherwise.

    A property of a subclass, because ``should_stop`` may be set in any hook of a fit or an evaluation, and Lightning
    would end the epoch before the next hook of the loop.
    """
    ends_phase = trainer.should_stop

    def get(_: Trainer) -> bool:
        return ends_phase

    def set_(_: Trainer, value: bool) -> None:
        nonlocal ends_phase
        caller = inspect.currentframe().f_back  # type: ignore[union-attr]
        if not value or isinstance(caller and caller.f_locals.get("self"), EarlyStopping):
            ends_phase = bool(value)
        elif not ends_phase:  # ``should_stop = should_stop or ...`` sets it again after early stopping
            request.by_trainer()

    set_properties(trainer, should_stop=property(get, set_))


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error of a collective reports that the connection to another process was lost."""
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


def slurm_job() -> str | None:
    """Number of the SLURM job that this process belongs to, as ``scontrol`` names it."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}" if array else os.environ.get("SLURM_JOB_ID")
    return job if job is not None and re.fullmatch(r"\d+(_\d+)?", job) else None


def requeue(signum: int) -> str | None:
    """Requeue this SLURM job, if ``signum`` is a signal that SLURM sends before the job's time limit.

    Returns:
        A message that reports success or failure; None if this is not a SLURM job or the signal is another one.
    """
    job = slurm_job()
    if job is None or signum not in REQUEUE_SIGNALS:
        return None
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"job {job} could not be requeued: {error}"
    if done.returncode:
        return f"job {job} could not be requeued: {done.stderr.strip() or done.returncode}"
    return f"job {job} is requeued"
