"""Loggers that fail (a full disk, a lost server): reported, tried again, and never the end of a run."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_warn

from cl_lightning.lightning_private import renew_logger

_CALLS = ("log_metrics", "log_hyperparams", "log_graph", "after_save_checkpoint", "save", "finalize")
_KEPT = ("log_metrics", "log_hyperparams", "log_graph")  # calls whose content would be lost
_MOST = 10_000  # calls that are kept for one logger
_SHARE = 0.05  # largest share of the time that attempts may take
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 300.0


class LoggerGuard:
    """Calls the methods of a logger, and keeps what the logger could not take.

    After an error a warning reports it, calls are kept in their order, and the logger is tried again: after a pause,
    which doubles with each failure, and at the end of each task (:meth:`try_again`). An attempt that waits long, for a
    server for example, makes the pause longer, so that attempts take at most 5 % of the time.

    Args:
        logger: Its methods are replaced, until :meth:`release`.
    """

    def __init__(self, logger: Logger) -> None:
        self.logger = logger
        self.error: Exception | None = None
        self._kept: deque[Callable[[], Any]] = deque(maxlen=_MOST)  # then the oldest are dropped
        self._pause, self._due = _FIRST_PAUSE, 0.0
        self._originals: dict[str, Callable[..., Any]] = {}
        for name in _CALLS:
            if (original := getattr(logger, name, None)) is not None:
                self._originals[name] = original
                setattr(logger, name, self._guarded(name, original))

    def try_again(self) -> None:
        """Make the calls that were kept, and save; nothing happens unless the logger has failed."""
        if self.error is not None:
            self._run(self._originals["save"], keep=False, now=True)

    def attempt(self, action: Callable[[], Any]) -> None:
        """Run something else that uses the logger; it is left out if it or the logger fails."""
        self._run(action, keep=False)

    def release(self) -> None:
        """Give the logger its own methods back, and report what it never took."""
        for name in self._originals:
            vars(self.logger).pop(name, None)
        if self.error is not None:
            rank_zero_warn(
                f"{self._name}: the run ends, and some of what it logged is not written ({_reason(self.error)})"
            )

    @property
    def _name(self) -> str:
        return type(self.logger).__name__

    def _guarded(self, name: str, original: Callable[..., Any]) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            copied = [dict(value) if isinstance(value, dict) else value for value in args]
            named = {key: dict(value) if isinstance(value, dict) else value for key, value in kwargs.items()}
            self._run(lambda: original(*copied, **named), keep=name in _KEPT, now=name == "finalize")

        return call

    def _run(self, action: Callable[[], Any], *, keep: bool, now: bool = False) -> None:
        if keep and self.error is not None:
            self._kept.append(action)
        if self.error is not None and not now and time.monotonic() < self._due:
            return
        started = time.monotonic()
        failed_before = self.error is not None
        try:
            if failed_before:
                renew_logger(self.logger)
                while self._kept:
                    self._kept[0]()
                    self._kept.popleft()
                self._originals["save"]()
            if not (keep and failed_before):
                action()
        except Exception as error:  # loggers of all kinds raise errors of all kinds
            if keep and not failed_before:
                self._kept.append(action)
            self._failed(error, time.monotonic() - started)
            return
        if failed_before:
            self.error, self._pause = None, _FIRST_PAUSE
            rank_zero_warn(f"{self._name}: works again; what was kept for it is written")

    def _failed(self, error: Exception, seconds: float) -> None:
        if self.error is None:
            rank_zero_warn(
                f"{self._name}: cannot log ({_reason(error)}); the run continues, what is logged is kept and tried "
                "again; free the disk or restore the connection"
            )
        self.error = error
        self._due = time.monotonic() + max(self._pause, seconds / _SHARE)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)


@contextmanager
def silent_writers() -> Iterator[None]:
    """Print no traceback when a thread of TensorBoard cannot write: the next call of its logger raises that error."""
    before = threading.excepthook

    def report(failure: threading.ExceptHookArgs) -> None:
        if not type(failure.thread).__module__.startswith("tensorboard."):
            before(failure)

    threading.excepthook = report
    try:
        yield
    finally:
        threading.excepthook = before


def _reason(error: Exception) -> str:
    text = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
    cause = error.__cause__  # Lightning's TensorBoardLogger hides the error behind a remark on the value
    if isinstance(cause, OSError) and cause.strerror:
        text = cause.strerror
    return text or type(error).__name__
