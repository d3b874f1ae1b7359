"""A long stream on one process: memory, open files, threads and the time of a task must stay as they are.

    python -m benchmarks.soak                  200 tasks of permuted digits with ER, about half an hour
    python -m benchmarks.soak --tasks 40 --epochs 5

After each task it notes what the process holds and what the task has taken, writes ``soak.json`` into the run folder
and prints how the last fifth of the tasks compares with the second one (the first one warms up). It ends with exit code
1 where something has grown. Evaluation is told per image: it grows with the data seen.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table

from cl_lightning.callback import ContinualCallback
from cl_lightning.cli.processes import quiet
from cl_lightning.datamodules.digits import Digits
from cl_lightning.loop import LoopOptions, TaskLoop
from cl_lightning.strategies.rehearsal.er import ER
from cl_lightning.stream import PermutedDomains

LIMITS = {
    "resident_mib": 1.05,
    "open_files": 1.0,
    "threads": 1.0,
    "training_s": 1.15,
    "statistics_s": 1.15,
    "saving_s": 1.5,  # waits for the disk
    "evaluation_us_per_image": 1.15,
}
"""How much more each may be at the end than at the beginning."""


class Watch(ContinualCallback):
    """Notes what the process holds after each task."""

    observer_only = True

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_task_start(self, trainer: Trainer, strategy: Any, task: Any) -> None:
        if task.index == 0:
            return
        assert self.meter is not None
        cost = self.meter.tasks[task.index - 1]  # of the task before, which is over and saved
        images = sum(len(part) for part in trainer.datamodule.stream.test[: task.index])  # type: ignore[attr-defined]
        self.rows.append(
            {
                "task": task.index - 1,
                "resident_mib": resident_bytes() / 2**20,
                "open_files": len(os.listdir("/proc/self/fd")),
                "threads": threading.active_count(),
                "training_s": cost.training,
                "statistics_s": cost.statistics,
                "saving_s": cost.saving,
                "evaluation_us_per_image": 1e6 * cost.evaluation / images,
            }
        )


def resident_bytes() -> int:
    """Memory that this process holds now (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status tells no VmRSS; this needs Linux")


def compare(rows: list[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Medians of the second and of the last fifth of the tasks."""
    fifth = max(1, len(rows) // 5)
    early, late = rows[fifth : 2 * fifth], rows[-fifth:]
    return {
        name: (statistics.median(row[name] for row in early), statistics.median(row[name] for row in late))
        for name in LIMITS
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=60, help="per task")
    parser.add_argument("--run_dir", type=Path, default=None, help="by default a folder that is removed")
    options = parser.parse_args()
    if options.tasks < 11:
        parser.error("--tasks: at least 11, so that there are fifths to compare")
    quiet()
    torch.set_num_threads(1)
    watch = Watch()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.run_dir or Path(scratch)
        trainer = Trainer(
            max_epochs=options.epochs,
            accelerator="cpu",
            callbacks=[watch],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = Digits(scenario=PermutedDomains(tasks=options.tasks), batch_size=128)
        saving = LoopOptions(save_every_seconds=5.0)
        TaskLoop(trainer, ER(memory_size=500), data, options=saving, run_dir=folder).fit()
        compared = compare(watch.rows)
        content = {
            "options": {"tasks": options.tasks, "epochs": options.epochs},
            "rows": watch.rows,
            "medians": compared,
        }
        (folder / "soak.json").write_text(json.dumps(content, indent=1))
    table = Table("", "early", "late", "ratio", "allowed")
    grown = []
    for name, (early, late) in compared.items():
        ratio = late / early if early else 1.0
        if ratio > LIMITS[name]:
            grown.append(name)
        table.add_row(name, f"{early:.4g}", f"{late:.4g}", f"{ratio:.3f}", f"{LIMITS[name]:.2f}")
    Console().print(table)
    if grown:
        print(f"grown: {', '.join(grown)}", file=sys.stderr)
    return int(bool(grown))


if __name__ == "__main__":
    sys.exit(main())
