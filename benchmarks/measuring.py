"""What logging and measuring add to a run: its time with them, divided by its time without.

    python -m benchmarks.measuring                    small digits and a small network, where the share is largest
    python -m benchmarks.measuring --network resnet   images of 32 x 32 and a ResNet-32
    python -m benchmarks.measuring --wandb            also with W&B, in offline mode

Runs of all kinds take turns, and the medians are compared; seconds of the processor are told beside those on the clock,
since they do not depend on what else the machine does.
"""

import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from cl_lightning.callbacks.continual_evaluation import ContinualEvaluation
from cl_lightning.data import TensorSource
from cl_lightning.datamodules.base import ContinualDataModule
from cl_lightning.datamodules.digits import Digits
from cl_lightning.loop import TaskLoop
from cl_lightning.measures import CostMeter
from cl_lightning.models import MLP, ResNet32
from cl_lightning.strategies.rehearsal.er import ER
from cl_lightning.stream import ClassIncremental


class NoMeter(CostMeter):
    """Accounts for nothing."""

    def enter(self, kind: Any) -> Any: ...
    def add(self, **counts: float) -> None: ...
    def end_epoch(self, phase: str) -> None: ...
    def begin_task(self, device: torch.device) -> None: ...
    def close_task(self, *args: Any) -> None: ...


class Noise(ContinualDataModule):
    """Images of noise, 32 x 32, 10 classes."""

    mean, std = (0.5,), (0.3,)

    def source(self, *, train: bool) -> TensorSource:
        draw, count = np.random.default_rng(train), 1280 if train else 400
        images = draw.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
        return TensorSource(images, np.arange(count) % 10, class_names=[str(label) for label in range(10)])


def run(kind: str, network: str, epochs: int) -> tuple[float, float]:
    """Seconds on the clock, and of the processor, that a run of five tasks takes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loggers: list[Any] = []
        if kind != "nothing":
            loggers = [TensorBoardLogger(folder, name="", version="", sub_dir="tensorboard")]
        if kind == "W&B":
            loggers = [WandbLogger(save_dir=folder, project="measuring")]
        trainer = Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=loggers or False,
            callbacks=[ContinualEvaluation(every_n_steps=10)] if kind == "continual evaluation" else [],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        scenario = ClassIncremental(tasks=5)
        data = Digits(scenario=scenario, batch_size=32) if network == "mlp" else Noise(scenario=scenario, batch_size=32)
        strategy = ER(memory_size=200, backbone=MLP if network == "mlp" else ResNet32)
        loop = TaskLoop(trainer, strategy, data, run_dir=None if kind == "nothing" else folder)
        loop.save = lambda **_: None  # type: ignore[method-assign,assignment]  # checkpoints are no measuring
        if kind == "nothing":
            loop.meter = NoMeter()
        else:  # what would come with the checkpoint
            write = loop.results
            loop._write_task = lambda task: write_all(loop, task, folder, write)  # type: ignore[method-assign]
        clock, processor = time.perf_counter(), time.process_time()
        loop.fit()
        return time.perf_counter() - clock, time.process_time() - processor


def write_all(loop: TaskLoop, task: Any, folder: Path, collect: Any) -> None:
    from cl_lightning.loop import results

    loop.run_logging.task_done(task)
    results.write(folder / "results.json", collect())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=["mlp", "resnet"], default="mlp")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--wandb", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}
    kinds = ["nothing", "default", "continual evaluation", *(["W&B"] if options.wandb else [])]
    seconds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for repeat in range(options.repeats + 1):
        for kind in kinds:
            found = run(kind, options.network, options.epochs)
            if repeat > 0:  # the first round warms up
                seconds[kind].append(found)
        print(f"round {repeat} of {options.repeats}", file=sys.stderr)
    base = [statistics.median(part) for part in zip(*seconds["nothing"], strict=True)]
    print(f"{'measured':<22}{'clock':>10}{'ratio':>8}{'processor':>12}{'ratio':>8}")
    for kind in kinds:
        clock, processor = (statistics.median(part) for part in zip(*seconds[kind], strict=True))
        print(f"{kind:<22}{clock:>8.3f} s{clock / base[0]:>8.3f}{processor:>10.3f} s{processor / base[1]:>8.3f}")


if __name__ == "__main__":
    main()
