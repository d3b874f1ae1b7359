"""What a longer stream, and a second process, cost: time of a task, time of an evaluated image, and memory.

    python -m benchmarks.scaling                                   all rows, some ten minutes
    python -m benchmarks.scaling --tasks 10 100 --methods ER       some

Streams of 10, 30 and 100 tasks with equally many images of noise, one class a task, are learnt by fine-tuning and by ER
with checkpoints and results on disk, as the command line does. Each run is a process of its own with one thread per
process; all kinds of runs take turns. Results go to ``docs/benchmarks/scaling.json``, and tables of them into
``docs/benchmarks.md``.
"""

import argparse
import itertools
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer

from benchmarks.numbers import store, stored, table
from benchmarks.soak import Watch, resident_bytes
from cl_lightning.data import TensorSource
from cl_lightning.datamodules.base import ContinualDataModule
from cl_lightning.loop import LoopOptions, TaskLoop
from cl_lightning.models import MLP, ResNet32
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.rehearsal.er import ER
from cl_lightning.stream import ClassIncremental

NAME = "scaling"
ROOT = Path(__file__).parents[1]
GOAL = 1.0
SECTION = """## Long streams and two processes

Streams of noise, one class per task, {images} training and {test_images} test images per task, batches of 128, {epochs}
epochs, checkpoints and results on disk. Each run is a separate process, one thread per process, CPU; medians of
{turns} turns. Written by `python -m benchmarks.scaling`.
"""
STREAMS = """**Streams, MLP 784-400-400.** Processor milliseconds of a task, which do not depend on other load of the
machine: of its steps (training), and of everything except evaluation (task: including the start and end of its fit,
statistics, a checkpoint, results and log). Medians over the first and over the last third of the tasks, without the
very first task. The ratios compare the median task with the median task of the shortest stream. Evaluation is given per
image, because it grows with the data seen. Memory is the resident memory of the process after the first and the last
task; it includes the data, {kilobytes:.2f} kB per image, from the start.

{rows}
"""
PROCESSES = """**Processes.** Seconds of the training steps of {tasks} tasks with fine-tuning; two processes split the
same batches and exchange gradients by gloo. Processor seconds are measured in the first process and do not depend on
whether the second process had a core of its own; their minimal ratio is a half.

{rows}
"""
THIRDS = ("training_ms", "task_ms", "evaluation_us")


@dataclass(frozen=True)
class Run:
    """What a process measures.

    Attributes:
        method: Finetune or ER.
        network: mlp or resnet32.
        tasks: Length of the stream.
        images: Training images of a task.
        test_images: Test images of a task.
        epochs: Of a task.
        devices: Number of processes.
    """

    method: str = "Finetune"
    network: str = "mlp"
    tasks: int = 10
    images: int = 640
    test_images: int = 50
    epochs: int = 2
    devices: int = 1

    @property
    def shape(self) -> tuple[int, int, int]:
        return (1, 28, 28) if self.network == "mlp" else (3, 32, 32)


class Noise(ContinualDataModule):
    """Noise, one class a task."""

    mean, std = (0.5,), (0.25,)

    def __init__(self, run: Run) -> None:
        super().__init__(scenario=ClassIncremental(tasks=run.tasks), batch_size=128)
        self.run = run

    def source(self, *, train: bool) -> TensorSource:
        count = self.run.tasks * (self.run.images if train else self.run.test_images)
        images = np.random.default_rng(train).integers(0, 256, (count, *self.run.shape), dtype=np.uint8)
        return TensorSource(images, np.arange(count) % self.run.tasks)


class Clock(Watch):
    """Notes, beside what the process holds, seconds of the processor: of tasks, their steps and their evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[float] = []
        self.training: list[float] = []
        self.evaluation: list[float] = []

    def on_task_start(self, trainer: Trainer, strategy: Any, task: Any) -> None:
        super().on_task_start(trainer, strategy, task)
        self.begun.append(time.process_time())

    def on_train_start(self, *_: Any) -> None:
        self.training.append(-time.process_time())

    def on_train_end(self, *_: Any) -> None:
        self.training[-1] += time.process_time()

    def on_test_epoch_start(self, *_: Any) -> None:
        self.evaluation.append(-time.process_time())

    def on_test_epoch_end(self, *_: Any) -> None:
        self.evaluation[-1] += time.process_time()


def learn(run: Run, folder: Path) -> dict[str, Any]:
    """A whole stream: lists of a number per task, and memory."""
    clock = Clock()
    trainer = Trainer(
        max_epochs=run.epochs,
        accelerator="cpu",
        devices=run.devices,
        strategy="ddp" if run.devices > 1 else "auto",
        logger=False,
        callbacks=[clock],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    backbone = MLP if run.network == "mlp" else ResNet32
    strategy = ER(memory_size=500, backbone=backbone) if run.method == "ER" else Finetune(backbone=backbone)
    loop = TaskLoop(trainer, strategy, Noise(run), options=LoopOptions(save_every_seconds=1e9), run_dir=folder)
    loop.fit()
    tasks = [after - before for before, after in itertools.pairwise([*clock.begun, time.process_time()])]
    return {
        "training_ms": [1e3 * seconds for seconds in clock.training],
        "task_ms": [1e3 * (whole - part) for whole, part in zip(tasks, clock.evaluation, strict=True)],
        "evaluation_us": [
            1e6 * seconds / (run.test_images * count) for count, seconds in enumerate(clock.evaluation, start=1)
        ],
        "resident_mib": [clock.rows[0]["resident_mib"], resident_bytes() / 2**20],
        "steps": sum(cost.steps for cost in loop.meter.tasks),
        "clock_s": sum(cost.training for cost in loop.meter.tasks),
    }


def thirds(values: list[float]) -> tuple[float, float, float]:
    """Medians of the first and of the last third, the first value left out, and of all."""
    third = len(values) // 3
    return statistics.median(values[1 : 1 + third]), statistics.median(values[-third:]), statistics.median(values[1:])


def in_process(run: Run) -> dict[str, Any]:
    """What a process of its own measures.

    Raises:
        RuntimeError: If it fails; with its last words.
    """
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "benchmarks.scaling", "--run", json.dumps(asdict(run)), "--folder", scratch]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise RuntimeError(f"{run} failed: {ended.stderr[-2000:]}")
        return dict(json.loads(Path(scratch, "found.json").read_text(encoding="utf-8")))


def measure(run: Run, folder: Path) -> None:
    """In a process of its own: learn, and write what was found; the first of several processes writes."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    found = learn(run, folder / "run")
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")


def streams(runs: list[Run], turns: int) -> list[dict[str, Any]]:
    """Medians over turns of the streams, each kind of run in each turn."""
    found: list[list[dict[str, float]]] = [[] for _ in runs]
    for turn in range(turns):
        for run, parts in zip(runs, found, strict=True):
            result, part = in_process(run), {}
            for name in THIRDS:
                part[f"{name}_first"], part[f"{name}_last"], part[name] = thirds(result[name])
            part["resident_mib_first"], part["resident_mib_last"] = result["resident_mib"]
            shortest = found[next(i for i, other in enumerate(runs) if other.method == run.method)]
            base = shortest[turn] if turn < len(shortest) else part
            parts.append({**part, **{f"{name}_ratio": part[name] / base[name] for name in ("training_ms", "task_ms")}})
            told = f"{part['training_ms']:>9.1f} ms{part['task_ms']:>9.1f} ms"
            print(f"turn {turn}  {run.method:<10}{run.tasks:>4} tasks{told}", flush=True)
    return [{**asdict(run), **medians(parts)} for run, parts in zip(runs, found, strict=True)]


def processes(runs: list[Run], turns: int) -> list[dict[str, Any]]:
    """Medians over turns of one and of two processes."""
    rows = []
    for run in runs:
        found: list[dict[str, float]] = []
        for turn in range(turns):
            one, two = (in_process(Run(**{**asdict(run), "devices": devices})) for devices in (1, 2))
            assert one["steps"] == two["steps"]
            seconds = [result["clock_s"] for result in (one, two)]
            used = [sum(result["training_ms"]) / 1e3 for result in (one, two)]
            part = {"one_s": seconds[0], "two_s": seconds[1], "ratio": seconds[1] / seconds[0]}
            part |= {"step_ms": 1e3 * seconds[0] / one["steps"]}
            part |= {"one_processor_s": used[0], "two_processor_s": used[1], "processor_ratio": used[1] / used[0]}
            found.append(part)
            print(f"turn {turn}  {run.network:<10}{seconds[0]:>9.2f} s{seconds[1]:>9.2f} s", flush=True)
        rows.append({**asdict(run), **medians(found)})
    return rows


def medians(parts: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(part[name] for part in parts) for name in parts[0]}


def section(results: dict[str, Any]) -> str:
    """Of the page."""
    text = SECTION.format(**results["options"])
    if found := results.get("streams"):
        rows = []
        for part in found:
            pairs = [f"{part[f'{name}_first']:.0f} / {part[f'{name}_last']:.0f}" for name in ("training_ms", "task_ms")]
            speed = f"{part['evaluation_us_first']:.1f} / {part['evaluation_us_last']:.1f}"
            memory = f"{part['resident_mib_first']:.0f} / {part['resident_mib_last']:.0f}"
            ratios = [f"{part[f'{name}_ratio']:.2f}" for name in ("training_ms", "task_ms")]
            goal = f"{GOAL:.1f}" if part["tasks"] > found[0]["tasks"] else ""
            rows.append([part["method"], str(part["tasks"]), *pairs, *ratios, goal, speed, memory])
        heads = ["method", "tasks", "training (ms)", "task (ms)", "training ratio", "task ratio", "goal"]
        heads += ["evaluation (µs/image)", "memory (MiB)"]
        text += "\n" + STREAMS.format(rows=table(heads, rows), kilobytes=math.prod(Run().shape) / 1e3)
    if found := results.get("processes"):
        rows = []
        for part in found:
            network = "MLP 784-400-400" if part["network"] == "mlp" else "ResNet-32"
            keys = ("step_ms", "one_s", "two_s", "ratio", "one_processor_s", "two_processor_s", "processor_ratio")
            rows.append([network, *(f"{part[key]:.2f}" for key in keys)])
        heads = ["network", "step, one process (ms)", "one process (s)", "two processes (s)", "two / one"]
        heads += ["one (processor s)", "two (processor s)", "two / one"]
        text += "\n" + PROCESSES.format(rows=table(heads, rows), tasks=found[0]["tasks"])
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", type=int, default=[10, 30, 100], help="from the shortest stream on")
    parser.add_argument("--methods", nargs="*", choices=["Finetune", "ER"], default=["Finetune", "ER"])
    parser.add_argument("--networks", nargs="*", choices=["mlp", "resnet32"], default=["mlp", "resnet32"])
    parser.add_argument("--turns", type=int, default=3, help="each takes minutes")
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        measure(Run(**options.run), options.folder)
        return
    usual = Run()
    results = stored(NAME)
    results["options"] = {
        "images": usual.images,
        "test_images": usual.test_images,
        "epochs": usual.epochs,
        "turns": options.turns,
    }
    runs = [Run(method, tasks=tasks) for method in options.methods for tasks in options.tasks]
    if runs:
        results["streams"] = streams(runs, options.turns)
    pairs = [Run(network="mlp"), Run(network="resnet32", images=256, epochs=1)]
    if pairs := [run for run in pairs if run.network in options.networks]:
        results["processes"] = processes(pairs, options.turns)
    store(NAME, results)


if __name__ == "__main__":
    main()
