"""Runs of the command line in processes that are killed at a chosen event, and what they leave behind."""

import csv
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from support.forks import start

DATA = (
    "--data Digits --data.scenario ClassIncremental --data.scenario.sizes [4,3,3] --data.scenario.tasks null "
    "--data.batch_size 64 --data.val_fraction 0.05"  # tasks: a config may have a scenario with this option
)
MASKS = "--data Shapes --data.classes 4 --data.train 60 --data.test 20 --data.size 16 --data.batch_size 20"
TRAINER = "--trainer.max_epochs 2 --trainer.accelerator cpu --trainer.enable_progress_bar false"
SAVING = "--loop.save_every_n_steps 3 --loop.save_every_seconds 0"

KINDS = ("start", "step", "update", "statistics", "write", "seal", "rename", "finished", "evaluate", "results")
"""Events: the start of a task; a training step, before and after its update; a batch of a pass over the training data;
a write into a checkpoint; before it is sealed, and before it is renamed; a task that is learnt and saved; a batch of an
evaluation; the writing of ``results.json``."""


def fit(arguments: Sequence[str], folder: str, kill: int | None, trace: str | None) -> None:
    """``python -m cl_lightning fit`` in this process; kills it at the event of number ``kill``.

    Args:
        arguments: Of the command.
        folder: Working directory.
        kill: Number of an event, from 0; None for none.
        trace: File that gets the kinds of all events, a line each; None for none.
    """
    os.chdir(folder)
    log = open("log.txt", "a", buffering=1)  # noqa: SIM115  # until the process ends
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    events: list[str] = []

    def happen(kind: str) -> None:
        if len(events) == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        events.append(kind)

    _watch(happen)
    from cl_lightning import report
    from cl_lightning.cli import main

    report.write = lambda runs, path: path  # type: ignore[assignment]  # takes longer than the run, and has its own tests

    sys.argv = ["cl_lightning"]
    code = main(["fit", *arguments])
    if trace is not None:
        Path(trace).write_text("\n".join(events))
    log.flush()
    os._exit(code)  # without waiting for threads of loggers


def _watch(happen: Callable[[str], None]) -> None:
    from cl_lightning import checksums
    from cl_lightning.loop import checkpoint, hooks, results, run_files
    from cl_lightning.loop import task_loop as loop
    from cl_lightning.strategies.base.passes import Passes
    from cl_lightning.strategy import ContinualStrategy

    def before(owner: Any, name: str, kind: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            happen(kind)
            return original(*args, **kwargs)

        setattr(owner, name, watched)

    original_batches = Passes.batches

    def batches(self: Passes, **kwargs: Any) -> Any:
        for batch in original_batches(self, **kwargs):
            happen("statistics")
            yield batch

    Passes.batches = batches  # type: ignore[method-assign]
    before(loop.TaskLoop, "_call", "start")
    before(hooks.LoopHooks, "on_train_batch_start", "step")
    before(hooks.LoopHooks, "on_train_batch_end", "update")
    before(checkpoint._Faithful, "write", "write")
    before(checksums, "seal", "seal")
    before(checksums, "keep_earlier", "rename")
    before(run_files.RunFiles, "write_task", "finished")
    before(ContinualStrategy, "test_step", "evaluate")
    before(results, "write", "results")


def run(arguments: str, folder: Path, *, kill: int | None = None, trace: bool = False, timeout: float = 300.0) -> int:
    """The exit code of a fit in a process of its own; -9 if it was killed."""
    folder.mkdir(parents=True, exist_ok=True)
    process = start(fit, arguments.split(), str(folder), kill, str(folder / "events.txt") if trace else None)
    process.join(timeout)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"the run in {folder} does not end: {tail(folder)}")
    code: int = process.exitcode
    return code


def tail(folder: Path) -> str:
    """The last lines that a run has printed."""
    path = folder / "log.txt"
    return path.read_text(errors="replace")[-2000:] if path.exists() else ""


def left(run_dir: Path) -> dict[str, Any]:
    """All that a finished run has left but times: checkpoint, measures, logged values."""
    saved = torch.load(run_dir / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)
    part = saved["cl_lightning"]
    content = json.loads((run_dir / "results.json").read_text())
    with (run_dir / "metrics.csv").open(newline="") as file:
        rows = [
            {key: value for key, value in row.items() if not key.startswith("cost/") and value}
            for row in csv.DictReader(file)
        ]
    return {
        "weights": saved["state_dict"],
        "callbacks": {key: value for key, value in saved["callbacks"].items() if not key.startswith("EarlyStopping")},
        "step": saved["global_step"],
        "matrix": part["matrix"],
        "place": part["place"],
        "results": {key: content[key] for key in ("matrix", "measures", "per_class", "confusion", "finished")},
        "kept": content["cost"]["bytes_kept"],
        "logged": rows,
    }
