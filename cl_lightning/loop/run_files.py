"""Files of a run: checkpoints, the manifest, and the results."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch.utilities import rank_zero_warn

from cl_lightning import checksums, distributed
from cl_lightning.files import clear_drafts, replaced
from cl_lightning.loop import checkpoint as checkpoints
from cl_lightning.loop import results
from cl_lightning.loop.nan_guard import NanGuard
from cl_lightning.loop.run import Position, Run
from cl_lightning.loop.task_lines import NAME, SHORT, TaskLines
from cl_lightning.stream import Task


class _Running(Run, Protocol):
    """A run whose position changes."""

    position: Position
    nan_guard: NanGuard | None


class RunFiles:
    """Writes the files of a run; its methods are called on all processes, the main process writes.

    Args:
        run: The run.

    Attributes:
        io: Reads and writes checkpoints for the Trainer.
        newest: Checkpoint from which the run can be resumed now.
        is_saving: Whether a checkpoint of the loop is being written; other checkpoints are not exact.
    """

    def __init__(self, run: _Running) -> None:
        self.run = run
        self.io = checkpoints.CheckpointFiles(run.options.keep_last)
        self.newest: Path | None = None
        self.is_saving = False
        self._last_save = time.monotonic()
        self._is_behind = False  # whether a checkpoint has tasks that results.json does not have
        self._lines: TaskLines | None = None

    @property
    def last(self) -> Path:
        assert self.run.run_dir is not None
        return self.run.run_dir / "checkpoints" / "last.ckpt"

    def check_are_free(self, saved: Mapping[str, Any] | None) -> None:
        """Raise a ValueError if the folder of a new run has a checkpoint already."""
        if saved is None and self.run.run_dir is not None and checksums.candidates(self.last):
            raise ValueError(
                f"{self.run.run_dir} holds a run already; add --ckpt_path last to resume it, or give another --run_dir"
            )

    def path_of(self, ckpt_path: str | Path) -> Path:
        """Path of a checkpoint; ``last`` is the newest one of the run folder that is whole.

        Raises:
            ValueError: If the run has no folder, or no whole checkpoint in it.
        """
        if str(ckpt_path) != "last":
            return Path(ckpt_path)
        if self.run.run_dir is None:
            raise ValueError("ckpt_path 'last' needs a run folder; give run_dir, or the path of a checkpoint")
        path, problems = checksums.newest(self.last)
        if path is None:
            found = problems[0] if problems else f"ckpt_path 'last': there is no checkpoint under {self.run.run_dir}"
            raise ValueError(found)
        for problem in problems:
            rank_zero_warn(f"{problem}; the run resumes from {path.name}", stacklevel=4)
        return path

    @contextmanager
    def writing(self, resumed: Path | None) -> Iterator[None]:
        """Write the first files of a process, and at its end the results, also if an error ends it.

        Args:
            resumed: Checkpoint from which the run is resumed.

        Raises:
            ValueError: If the first files cannot be written.
            WriteError: If the run is over and its results cannot be written.
        """
        self.newest = resumed
        self._write_start(resumed)
        try:
            yield
        except BaseException:
            self._write_end(needed=False)
            raise
        self._write_end(needed=True)

    def save(self, *, needed: bool = True) -> Path | None:
        """Write a checkpoint.

        Args:
            needed: Whether to raise if the checkpoint cannot be written. Otherwise a warning reports the error, earlier
                checkpoints are kept, and the run continues until the next checkpoint is due.

        Returns:
            Path of the checkpoint; None without a run folder, or if it could not be written.

        Raises:
            WriteError: On all processes, if the checkpoint is needed and cannot be written.
        """
        run = self.run
        if run.run_dir is None:
            return None
        if run.nan_guard is not None:
            if run.position.running:
                run.nan_guard.check(run.strategy)
            run.nan_guard.check_weights(run.strategy)
        before = run.meter.enter("saving")
        self.is_saving = True
        try:
            run.trainer.save_checkpoint(self.last)
        finally:
            self.is_saving = False
        run.meter.enter(before)
        self._last_save = time.monotonic()
        failure = run.trainer.strategy.broadcast(self.io.failure and _in_words(self.io.failure))
        if failure is None:
            self.newest = self.last
            return self.last
        message = f"checkpoint {self.last}: cannot be written ({failure}); "
        if needed:
            left = next(iter(checksums.candidates(self.last)), "none")
            raise checkpoints.WriteError(f"{message}the newest earlier checkpoint: {left}")
        rank_zero_warn(message + "the run continues and tries again when the next checkpoint is due")
        return None

    def save_is_due(self) -> bool:
        """Whether ``save_every_seconds`` have passed since the last checkpoint; the same answer on all processes."""
        due = time.monotonic() - self._last_save >= self.run.options.save_every_seconds
        return bool(self.run.trainer.strategy.broadcast(due)) if distributed.is_distributed() else due

    def write_task(self, task: Task) -> None:
        """Write a checkpoint and the results after a task."""
        run, last = self.run, self.save()
        if last is None or not run.trainer.is_global_zero:
            return
        with self._reporting(last.with_name(f"task_{task.index:03d}.ckpt")) as path:
            if run.options.keep_tasks != 0:
                checksums.link(last, path)
            kept = sorted(last.parent.glob("task_[0-9]*.ckpt"), key=checksums.task_number)
            for old in kept[: -run.options.keep_tasks] if run.options.keep_tasks else []:
                old.unlink()
        self._is_behind = True
        if self._lines is None:
            self._write_results()
        else:
            results.measure(run)
            with self._reporting(self._lines.path):
                self._lines.add(run)

    def _write_start(self, resumed: Path | None) -> None:
        run = self.run
        if run.run_dir is None or not run.trainer.is_global_zero:
            return
        run.run_dir.mkdir(parents=True, exist_ok=True)
        checksums.clear_torn(self.last.parent)
        if resumed is not None:
            checksums.resume_from(self.last, resumed)
        clear_drafts(run.run_dir)
        try:
            if run.config:
                with replaced(run.run_dir / "config.yaml") as file:
                    file.write(run.config)
            run.stream.save(run.run_dir / "manifest.json")
            (run.run_dir / NAME).unlink(missing_ok=True)  # of a process that was killed; the checkpoint has its tasks
            results.write(run.run_dir / "results.json", results.collect(run))
        except OSError as error:
            raise ValueError(
                f"{run.run_dir}: cannot be written ({_in_words(error)}); free the disk, or give another --run_dir"
            ) from error
        if len(run.stream.tasks) > SHORT:
            self._lines = TaskLines(run.run_dir / NAME, run.matrix.learned)

    def _write_end(self, *, needed: bool) -> None:
        if self._is_behind:
            self._write_results(needed=needed)
        if self._lines is not None and not self._is_behind:
            self._lines.path.unlink(missing_ok=True)

    def _write_results(self, *, needed: bool = False) -> None:
        """Write ``results.json``; called on one process. If it is needed, an error is raised, otherwise reported."""
        assert self.run.run_dir is not None
        with self._reporting(self.run.run_dir / "results.json", needed=needed) as path:
            results.write(path, results.collect(self.run))
            self._is_behind = False

    @contextmanager
    def _reporting(self, path: Path, *, needed: bool = False) -> Iterator[Path]:
        """Report that a file cannot be written; a run whose checkpoint is whole does not end for it."""
        try:
            yield path
        except OSError as error:
            message = f"{path}: cannot be written ({_in_words(error)}); "
            if needed:
                raise checkpoints.WriteError(
                    f"{message}the run is complete and saved; free the disk, then resume with --ckpt_path last, which "
                    "writes it"
                ) from error
            rank_zero_warn(f"{message}the run continues and tries again at the end of the next task")


def _in_words(error: OSError) -> str:
    return error.strerror or str(error)


def next_number(base: Path) -> int:
    """The number of the next run in a folder of numbered runs, ``runs/ER/0000``, ``runs/ER/0001``, ..."""
    return max((int(entry.name) for entry in base.glob("[0-9]*") if entry.name.isdigit()), default=-1) + 1


def reserved_folder(base: Path) -> Path:
    """The folder of the next run, made now, so that runs that start at the same time have different folders."""
    number = next_number(base)
    while True:
        folder = base / f"{number:04d}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return folder
