"""A process that has imported everything, and forks a process for each run.

A worker of a study has threads, for the heartbeat of its trial, and a process with threads should not fork. It starts
this process before its first thread, and asks it for runs over a pipe.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

_PATIENCE = 60.0  # seconds that a run has to write its checkpoint when its worker has ended
FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Order:
    """A run to be carried out.

    Attributes:
        arguments: Arguments of the command line.
        log: File to which standard output and standard error are appended.
        environment: Variables to be set.
        note: Line for the log.
    """

    arguments: Sequence[str]
    log: Path
    environment: dict[str, str]
    note: str = ""


class WarmProcess:
    """Forks a process per run, one at a time.

    Args:
        call: Carries out a command in the forked process; returns its exit code.
        prepare: Called in each forked process before the command.
    """

    def __init__(self, call: Callable[[list[str]], int], prepare: Callable[[], None] = lambda: None) -> None:
        self._connection, theirs = FORK.Pipe()
        self._process = FORK.Process(target=_serve, args=(theirs, self._connection, call, prepare), name="warm")
        start_quietly(self._process)
        theirs.close()
        self._code: int | None = None

    def start(self, order: Order) -> None:
        """Begin a run."""
        self._code = None
        self._connection.send(order)

    def poll(self, seconds: float) -> int | None:
        """Exit code of the run, negative for a signal; None if it goes on after these seconds."""
        if self._code is None and self._connection.poll(seconds):
            try:
                self._code = self._connection.recv()
            except EOFError:
                self._code = -signal.SIGKILL  # the warm process itself was killed
        return self._code

    def stop(self) -> None:
        """Ask the run to write a checkpoint and end; a second call ends it at once."""
        self._connection.send(None)

    def close(self) -> None:
        """End the process; a run that goes on is asked to write a checkpoint first."""
        self._connection.close()
        self._process.join()


def start_quietly(process: multiprocessing.process.BaseProcess) -> None:
    """Start a forked process; Python warns of threads in a library such as OpenBLAS, which survive a fork."""
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()


def end_with_parent() -> None:
    """Have the operating system send SIGTERM to this process when its parent ends, however it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _serve(
    connection: Connection, others: Connection, call: Callable[[list[str]], int], prepare: Callable[[], None]
) -> None:
    """Carry out orders until the worker closes the pipe."""
    others.close()  # otherwise the end of the worker would not be seen
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the command stops its workers
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # this process ends with its worker
    while True:
        try:
            order = connection.recv()
        except (EOFError, OSError):
            return
        if order is None:  # for a run that has just ended
            continue
        process = FORK.Process(target=_carry_out, args=(connection, order, call, prepare), name="run")
        start_quietly(process)
        if not _watch(connection, process):
            return


def _watch(connection: Connection, process: multiprocessing.process.BaseProcess) -> bool:
    """Wait for a run and report its exit code; False if the worker has ended."""
    while process.exitcode is None:
        ready = wait([connection, process.sentinel])
        if connection in ready:
            try:
                connection.recv()
            except (EOFError, OSError):  # the worker has ended: its trial will be repeated, from a checkpoint
                process.terminate()
                process.join(_PATIENCE)
                process.kill()
                process.join()
                return False
            process.terminate()
        elif process.sentinel in ready:
            process.join()
    try:
        connection.send(process.exitcode)
    except OSError:
        return False
    return True


def _carry_out(
    connection: Connection, order: Order, call: Callable[[list[str]], int], prepare: Callable[[], None]
) -> None:
    connection.close()
    os.setsid()
    end_with_parent()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.update(order.environment)
    order.log.parent.mkdir(parents=True, exist_ok=True)
    with order.log.open("ab", buffering=0) as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
    print(time.strftime("%Y-%m-%d %H:%M:%S"), *order.arguments, flush=True)
    if order.note:
        print(order.note, flush=True)
    prepare()
    code = call(list(order.arguments))
    sys.stdout.flush()
    sys.stderr.flush()
    raise SystemExit(code)
