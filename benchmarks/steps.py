"""Time of a training step beside a plain PyTorch loop that indexes tensors: the limit of what a framework can reach.

    python -m benchmarks.steps                          all rows, with noise for images
    python -m benchmarks.steps --rows mlp_128 mlp_10    some
    python -m benchmarks.steps --rows er_10 --profile   where the time goes

Both sides have the same network, optimizer, batches and steps, on one thread. They take turns; each turn gives
the median of the times from one step to the next, a row the median of its turns and of their ratios. Results go to
``docs/benchmarks/steps.json``, and a table of them into ``docs/benchmarks.md``.
"""

import argparse
import cProfile
import functools
import itertools
import logging
import pstats
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.numbers import store, stored, table
from cl_lightning.data import TensorSource
from cl_lightning.datamodules.base import ContinualDataModule
from cl_lightning.loop import LoopOptions, TaskLoop
from cl_lightning.models import MLP, ResNet32
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.rehearsal.er import ER
from cl_lightning.stream import ClassIncremental, Online

NAME = "steps"
SECTION = """## A training step compared with a plain PyTorch loop

Time from one step to the next on one CPU thread; the images are noise, only time is compared. The plain loop indexes
tensors, scales pixels, and steps. "here" is a complete run, including checks, measures and cost accounting. Medians of
interleaved turns; on a machine with other load, the ratio of a row varies by about 0.05 to 0.1 between runs. Written by
`python -m benchmarks.steps`.

{rows}
"""


PROFILE = """Distribution of the time of a step here, in percent of a profiled run (`--profile`, which slows down Python
more than kernels):

{rows}
"""
KERNELS = "torch, kernels"


@dataclass(frozen=True)
class Row:
    """What is compared.

    Attributes:
        shape: Of the images.
        batch_size: Of the task.
        steps: Of a turn.
        goal: Largest ratio that is aimed at.
        memory: Size of a reservoir from which as many samples are drawn per step; 0 for fine-tuning.
    """

    shape: tuple[int, int, int]
    batch_size: int
    steps: int
    goal: float
    memory: int = 0


ROWS = {
    "mlp_128": Row((1, 28, 28), 128, 300, 1.10),
    "mlp_64": Row((1, 28, 28), 64, 400, 1.15),
    "mlp_10": Row((1, 28, 28), 10, 1000, 1.25),
    "resnet32_128": Row((3, 32, 32), 128, 12, 1.03),
    "er_10": Row((1, 28, 28), 10, 1000, 1.50, memory=500),
}


class Noise(ContinualDataModule):
    """Noise, of two classes."""

    mean, std = (0.5,), (0.25,)

    def __init__(self, shape: tuple[int, int, int], count: int, **options: Any) -> None:
        super().__init__(**options)
        self.shape, self.count = shape, count

    def source(self, *, train: bool) -> TensorSource:
        count = self.count if train else 20
        images = np.random.default_rng(train).integers(0, 256, (count, *self.shape), dtype=np.uint8)
        return TensorSource(images, np.arange(count) % 2)


class Ticks(Callback):
    """When steps begin."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.times.append(time.perf_counter())


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def ours(row: Row) -> list[float]:
    """Times of the steps of a run of one task, in seconds."""
    scenario: Any = ClassIncremental(tasks=1)
    if row.memory:
        scenario = Online(scenario)
    data = Noise(row.shape, row.batch_size * row.steps, scenario=scenario, batch_size=row.batch_size)
    backbone = MLP if row.shape[0] == 1 else ResNet32
    options: dict[str, Any] = {"backbone": backbone, "optimizer": sgd}
    strategy = ER(memory_size=row.memory, replay_by="step", **options) if row.memory else Finetune(**options)
    ticks = Ticks()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        callbacks=[ticks],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    TaskLoop(trainer, strategy, data, options=LoopOptions()).fit()
    return [after - before for before, after in zip(ticks.times, ticks.times[1:], strict=False)]


def plain(row: Row) -> list[float]:
    """The same by hand."""
    draw = np.random.default_rng(1)
    count = row.batch_size * row.steps
    images = torch.from_numpy(draw.integers(0, 256, (count, *row.shape), dtype=np.uint8))
    labels = torch.arange(count) % 2
    backbone = (MLP if row.shape[0] == 1 else ResNet32)(row.shape)
    network = nn.Sequential(backbone, nn.Linear(backbone.num_features, 2)).train()
    optimizer, times = sgd(network.parameters()), []
    stored = torch.zeros(max(row.memory, 1), *row.shape, dtype=torch.uint8)
    answers, seen = torch.zeros(max(row.memory, 1), dtype=torch.int64), 0

    def prepared(raw: Tensor) -> Tensor:
        return raw.float().div_(255).sub_(0.5).div_(0.25)

    order = torch.randperm(count)
    for rows in order.split(row.batch_size):  # type: ignore[no-untyped-call]
        times.append(time.perf_counter())
        raw, wanted = images[rows], labels[rows]
        inputs, targets = raw, wanted
        if row.memory and seen:
            drawn = torch.randint(min(seen, row.memory), (row.batch_size,))
            inputs, targets = torch.cat([raw, stored[drawn]]), torch.cat([wanted, answers[drawn]])
        optimizer.zero_grad()
        F.cross_entropy(network(prepared(inputs)), targets).backward()
        optimizer.step()
        if row.memory:  # algorithm R
            places = torch.arange(seen, seen + len(raw))
            places = torch.where(places < row.memory, places, (torch.rand(len(raw)) * (places + 1)).long())
            kept = places < row.memory
            stored[places[kept]], answers[places[kept]] = raw[kept], wanted[kept]
            seen += len(raw)
    return [after - before for before, after in itertools.pairwise(times)]


def compare(row: Row, turns: int) -> dict[str, float]:
    """Medians over turns: milliseconds of a step on either side, and their ratio."""
    sides: tuple[Callable[[], list[float]], ...] = (functools.partial(plain, row), functools.partial(ours, row))
    found: list[list[float]] = []
    for turn in range(turns + 1):
        seconds = [statistics.median(side()) for side in sides]
        if turn > 0:  # the first one warms up
            found.append([1e3 * seconds[0], 1e3 * seconds[1], seconds[1] / seconds[0]])
    medians = [statistics.median(column) for column in zip(*found, strict=True)]
    return dict(zip(("plain_ms", "ours_ms", "ratio"), medians, strict=True))


def profile(row: Row) -> dict[str, float]:
    """Share of the time of a run in functions of each owner, themselves alone; a profiler slows Python's down most."""
    ours(row)  # warms up
    profiler = cProfile.Profile()
    profiler.runcall(ours, row)
    found: dict[str, float] = {}
    for (path, _, name), (_, _, own, _, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        kernel = path == "~" and ("torch" in name or "Tensor" in name or "run_backward" in name)
        owners = {"/torch/": "torch, Python", "/lightning/": "Lightning", "/cl_lightning/": "this package"}
        owner = next((owner for part, owner in owners.items() if part in path), "Python and others")
        owner = KERNELS if kernel else owner
        found[owner] = found.get(owner, 0.0) + own
    return {owner: seconds / sum(found.values()) for owner, seconds in found.items()}


def section(results: dict[str, dict[str, Any]]) -> str:
    """Of the page, with all rows that were measured."""
    rows = []
    for name, part in results.items():
        row = ROWS[name]
        what = "online ER, as many from a memory" if row.memory else "Finetune"
        network = "MLP 784-400-400" if row.shape[0] == 1 else "ResNet-32"
        numbers = (f"{part[key]:.2f}" for key in ("plain_ms", "ours_ms", "ratio", "goal"))
        rows.append([what, network, str(row.batch_size), *numbers])
    heads = ["row", "network", "batch", "plain (ms)", "here (ms)", "ratio", "goal"]
    text = SECTION.format(rows=table(heads, rows))
    if profiled := {name: part["profile"] for name, part in results.items() if "profile" in part}:
        owners = sorted(
            {owner for part in profiled.values() for owner in part}, key=lambda owner: (owner != KERNELS, owner)
        )
        lines = [[name, *(f"{100 * part.get(owner, 0):.0f}" for owner in owners)] for name, part in profiled.items()]
        text += "\n" + PROFILE.format(rows=table(["row", *owners], lines))
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="say where the time goes, instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    results = stored(NAME)
    for name in options.rows:
        row = ROWS[name]
        before = results.get(name, {})
        if options.profile:
            results[name] = {**before, "profile": profile(row)}
            print(name, {owner: round(share, 2) for owner, share in results[name]["profile"].items()})
            continue
        results[name] = {**before, **compare(row, options.turns), "goal": row.goal, "turns": options.turns}
        part = results[name]
        print(f"{name:<14}{part['plain_ms']:>9.3f} ms{part['ours_ms']:>9.3f} ms  {part['ratio']:.3f} (goal {row.goal})")
    store(NAME, results)


if __name__ == "__main__":
    main()
