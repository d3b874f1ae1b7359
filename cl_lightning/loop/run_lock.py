"""A lock on the run folder, so that two runs do not write into it at the same time."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_warn

from cl_lightning.escape_control import printable

_LONGEST = 200  # characters; the file may be of anybody


@contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Hold a run folder inside the context; called on the one process that writes.

    The operating system releases the lock of a process that has died, so that a lock is never stale. The name of the
    holder is in a second file, because a lock file may be truncated by the processes that try to acquire it.

    Raises:
        ValueError: If another process holds the folder; the message names it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(run_dir / ".lock"), run_dir / ".lock_holder"
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"{run_dir}: {_name(holder)} is writing a run there; wait until it ends, or give another --run_dir"
        ) from error
    except NotImplementedError:
        rank_zero_warn(f"{run_dir}: the file system has no locks; do not start two runs there at the same time")
        yield
        return
    try:
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _name(holder: Path) -> str:
    try:
        return printable(holder.read_text(encoding="utf-8", errors="replace")[:_LONGEST]) or "another process"
    except OSError:  # the holder has not written it yet
        return "another process"
