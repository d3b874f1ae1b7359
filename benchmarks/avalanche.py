"""Whole runs beside Avalanche (PyPI ``avalanche-lib``): time of training, of everything, and accuracy.

    python -m benchmarks.avalanche --data DIR                   all rows, 1,000 images per class
    python -m benchmarks.avalanche --data DIR --samples 6000    all of Fashion-MNIST
    python -m benchmarks.avalanche --data DIR --rows er lwf     some rows

DIR holds ``fashion_mnist.npz`` (x_train, y_train, x_test, y_test). Avalanche runs in an environment of its own, made by
the first run in ``.avalanche-venv`` (or where ``--environment`` says) with ``venv`` and ``pip``: the packages of this
Python, its torch among them, and over them Avalanche and what else it imports. Both sides wait in processes of their
own for their turns. Results go to ``docs/benchmarks/avalanche.json``, and a table into ``docs/benchmarks.md``.
"""

import argparse
import contextlib
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import lightning
import numpy as np
import torch
from lightning.pytorch import Callback, Trainer

import cl_lightning
from benchmarks.numbers import store, stored, table
from cl_lightning.callbacks.importance_penalty import ImportancePenalty
from cl_lightning.datamodules.npz import NpzData
from cl_lightning.loop import TaskLoop
from cl_lightning.models import MLP
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.exemplar_free.ewc import EWC
from cl_lightning.strategies.exemplar_free.lwf import LwF
from cl_lightning.strategies.rehearsal.er import ER
from cl_lightning.strategies.rehearsal.gem import AGEM
from cl_lightning.stream import ClassIncremental, Online

NAME = "avalanche"
VERSION = "0.6.0"
# What Avalanche imports beyond what this package needs. Left out are solvers for GEM, which nothing here uses.
PACKAGES = [f"avalanche-lib=={VERSION}", "psutil", "gputil", "pytorchcv", "gdown", "dill", "qpsolvers"]
PACKAGES += ["beautifulsoup4", "soupsieve"]
ROOT = Path(__file__).parents[1]
SIDES = ("ours", "pictures", "tensors")  # this package, and Avalanche with its two kinds of images
SECTION = """## Whole runs compared with Avalanche

Split-Fashion-MNIST, 5 tasks of 2 classes, {samples} training images per class, 1 epoch; MLP 784-400-400-10 whose last
layer grows with the tasks (`IncrementalClassifier` in Avalanche), SGD with learning rate 0.01 and momentum 0.9, CPU,
one thread. Replay and online ER have a reservoir of 500 images, A-GEM has 100 per task; each step draws as many memory
samples as its batch has. Both sides take the same number of steps and test all tasks seen so far after each task, in
batches of {eval_batch_size}; neither writes files. avalanche-lib {avalanche} and cl_lightning {ours} (Lightning
{lightning}), both with torch {torch}.

Avalanche: accuracies of experiences and stream, no loggers, no evaluation during training, `num_workers` 0, online
streams with task boundaries, warnings silenced. It is measured with two kinds of images: *pictures*, as in its
`SplitFMNIST`, converted to tensors one by one by `ToTensor` and `Normalize`; and *tensors*, normalised in advance, the
minimal work, which excludes augmentation. Here all options have their defaults: pixels are scaled and normalised in
each step. Replay here adds each batch to the memory and draws from the second step on; in Avalanche a task is added to
the memory at its end, and replayed in later tasks. The first task therefore costs more here, and some replayed samples
belong to the current task.

Training is the time from the first step of a task to the end of its last step, summed over tasks. Total is the time
from reading the images to the last accuracy, including statistics and tests, without imports. Times are given as here /
Avalanche with pictures / Avalanche with tensors, ratios as Avalanche with pictures / with tensors, divided by here:
medians of {turns} interleaved turns. They are processor seconds, because the machine had other load; with one thread
they equal the wall-clock seconds of a machine without other load, and `docs/benchmarks/avalanche.json` has both.
Accuracy is the accuracy over all classes after the last task, mean and standard deviation over turns. The goal of every
ratio is above 1. Written by `python -m benchmarks.avalanche`.

{rows}
"""


@dataclass(frozen=True)
class Row:
    """What is compared.

    Attributes:
        title: In the table.
        method: Name of the method on both sides.
        batch_size: Of the stream.
        goal: Smallest ratio that is aimed at; all ratios are to be above 1.
        of: Whether the goal is for the time of ``training`` or in ``total``.
        online: Whether the stream comes in batches.
        ours: Options of the method here.
        theirs: Options of the method in Avalanche.
    """

    title: str
    method: str
    batch_size: int = 64
    goal: float = 1.0
    of: str = "training"
    online: bool = False
    ours: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)


# Formulas that differ are brought together by options: LwF's cross-entropy is over all classes in Avalanche, SI's
# penalty has a factor 1/2 there, and EWC's Fisher information is that of batches, smaller by about their size.
ROWS = {
    "finetune_64": Row("Finetune", "finetune", goal=1.7),
    "finetune_10": Row("Finetune", "finetune", batch_size=10, goal=1.7),
    "er": Row("Replay", "er", goal=4.0, of="total", ours={"memory_size": 500}, theirs={"memory_size": 500}),
    "lwf": Row("LwF", "lwf", ours={"loss_classes": "all"}, theirs={"alpha": 1.0, "temperature": 2.0}),
    "ewc": Row("EWC", "ewc", goal=4.0, of="total", ours={"penalty_weight": 1.0}, theirs={"ewc_lambda": 32.0}),
    "si": Row("SI", "si", ours={"weight": 0.1, "xi": 0.1}, theirs={"si_lambda": 0.2, "eps": 0.1}),
    "agem": Row("A-GEM", "agem", ours={"memory_size": 500}, theirs={"patterns_per_exp": 100, "sample_size": 64}),
    "er_online": Row(
        "online ER", "er", 10, goal=5.0, online=True, ours={"memory_size": 500}, theirs={"memory_size": 500}
    ),
}
SETTINGS = {"tasks": 5, "epochs": 1, "lr": 0.01, "momentum": 0.9, "mean": 0.286, "std": 0.353, "eval_batch_size": 512}


# ---------------------------------------------------------------------- this side


def now() -> np.ndarray:
    """Seconds on the clock, and of the processor."""
    return np.array([time.perf_counter(), time.process_time()])


class Clock(Callback):
    """Seconds from the beginning of the first step of each task to the end of its last one, and number of steps."""

    def __init__(self) -> None:
        self.seconds, self.steps = np.zeros(2), 0
        self._first: Any = None
        self._last = np.zeros(2)

    def on_train_batch_start(self, *_: Any) -> None:
        if self._first is None:
            self._first = now()

    def on_train_batch_end(self, *_: Any) -> None:
        self._last = now()
        self.steps += 1

    def on_train_end(self, *_: Any) -> None:
        self.seconds += self._last - self._first
        self._first = None


def run(row: dict[str, Any]) -> dict[str, float]:
    """Learn the stream of a row once, here."""
    begun = now()
    scenario: Any = ClassIncremental(tasks=row["tasks"])
    if row["online"]:
        scenario = Online(scenario, batch_size=row["batch_size"])
    data = NpzData(
        row["data"],
        mean=[row["mean"]],
        std=[row["std"]],
        scenario=scenario,
        batch_size=row["batch_size"],
        eval_batch_size=row["eval_batch_size"],
    )
    kinds = {"finetune": Finetune, "er": ER, "lwf": LwF, "ewc": EWC, "si": Finetune, "agem": AGEM}
    clock, options = Clock(), row["options"]
    callbacks: list[Callback] = [clock]
    if row["method"] == "si":
        callbacks.append(ImportancePenalty(estimator="si", **options))
        options = {}
    kind: Any = kinds[row["method"]]
    strategy = kind(
        backbone=MLP,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=row["lr"], momentum=row["momentum"]),
        **options,
    )
    trainer = Trainer(
        max_epochs=row["epochs"],
        accelerator="cpu",
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    matrix = TaskLoop(trainer, strategy, data, seed=row["seed"]).fit()
    total = now() - begun
    accuracy = matrix.measures()["average_accuracy"]
    return {
        **dict(zip(("training_s", "training_cpu_s"), clock.seconds.tolist(), strict=True)),
        **dict(zip(("total_s", "total_cpu_s"), total.tolist(), strict=True)),
        "steps": clock.steps,
        "accuracy": accuracy,
    }


def serve() -> None:
    """Run what is asked for, a line of JSON each."""
    answers = sys.stdout
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    versions = {"cl_lightning": cl_lightning.__version__, "lightning": lightning.__version__}
    print(json.dumps(versions | {"torch": torch.__version__}), file=answers, flush=True)
    with contextlib.redirect_stdout(sys.stderr):
        for line in sys.stdin:
            print(json.dumps(run(json.loads(line))), file=answers, flush=True)


# ---------------------------------------------------------------------- both sides


class Side:
    """A process that waits for runs."""

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.versions = self._answer()

    def run(self, row: dict[str, Any]) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(row) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(map(str, self.process.args))} has ended, see above")  # type: ignore[arg-type]
        return dict(json.loads(line))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()  # which ends its loop
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def environment(folder: Path) -> Path:
    """The Python of an environment with Avalanche, which is made where it is missing."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if python.is_file():
        found = subprocess.run([python, "-P", "-c", "import avalanche"], capture_output=True, check=False)
        if found.returncode == 0:
            return python
    print(f"making {folder} with avalanche-lib {VERSION}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    where = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    # The packages of this Python come after its own, and so need not be installed a second time.
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    shared = "; ".join(f"site.addsitedir({path!r})" for path in packages)
    (Path(where) / "shared.pth").write_text(f"import site; {shared}\n", encoding="utf-8")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *PACKAGES], check=True)
    return python


def share(source: Path, target: Path, samples: int) -> None:
    """Write the first so many training images of each class, and as large a share of the test images."""
    with np.load(source) as file:
        arrays = {name: file[name] for name in ("x_train", "y_train", "x_test", "y_test")}
    fraction = min(1.0, samples / np.bincount(arrays["y_train"]).max())
    for part in ("train", "test"):
        labels = arrays[f"y_{part}"]
        rows = [np.flatnonzero(labels == label) for label in range(10)]
        chosen = np.sort(np.concatenate([row[: max(1, round(len(row) * fraction))] for row in rows]))
        arrays |= {f"{axis}_{part}": arrays[f"{axis}_{part}"][chosen] for axis in "xy"}
    np.savez(target, **arrays)


def compare(row: Row, asked: dict[str, Any], sides: dict[str, Callable[..., dict[str, float]]], turns: int) -> Any:
    """Let the sides take turns, and give the numbers of each turn by side, the first one left out."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in sides}
    for turn in range(turns + 1):
        for name, side in sides.items():
            options = row.ours if name == "ours" else row.theirs
            measured = side({**asked, "seed": turn, "options": options, "images": name})
            if turn > 0:  # the first one warms up
                for key, value in measured.items():
                    found[name].setdefault(key, []).append(value)
    steps = {name: set(part["steps"]) for name, part in found.items()}
    if len(set().union(*steps.values())) != 1:
        raise RuntimeError(f"{row.title}: the sides took different numbers of steps, {steps}")
    return found


def ratio(part: dict[str, dict[str, list[float]]], name: str, of: str) -> float:
    """Median over turns of Avalanche's seconds of the processor by those of the run here beside it."""
    pairs = zip(part[name][f"{of}_cpu_s"], part["ours"][f"{of}_cpu_s"], strict=True)
    return statistics.median(theirs / ours for theirs, ours in pairs)


def section(results: dict[str, Any]) -> str:
    """Of the page, with all rows that were measured."""
    rows = []
    for name, row in ROWS.items():
        if (part := results["rows"].get(name)) is None:
            continue
        times = {
            "training": [1e3 * statistics.median(part[s]["training_cpu_s"]) / part[s]["steps"][0] for s in SIDES],
            "total": [statistics.median(part[s]["total_cpu_s"]) for s in SIDES],
        }
        ratios = {of: [ratio(part, side, of) for side in SIDES[1:]] for of in times}
        cells = [row.title, str(row.batch_size)]
        for of in times:
            cells += [" / ".join(f"{value:.2f}" for value in values) for values in (times[of], ratios[of])]
        for side in SIDES[:2]:
            percent = [100 * value for value in part[side]["accuracy"]]
            cells.append(f"{statistics.mean(percent):.1f} ± {statistics.pstdev(percent):.1f}")
        rows.append([*cells, f"{row.goal:g} in {row.of}" if row.goal > 1 else "above 1", reached(row, ratios)])
    heads = ["method", "batch", "step (ms)", "ratio of training", "total (s)", "ratio of totals"]
    heads += ["accuracy here (%)", "of Avalanche (%)", "goal", "reached"]
    versions, settings = results["versions"], results["settings"]
    return SECTION.format(
        rows=table(heads, rows),
        samples=f"{settings['samples']:,}",
        eval_batch_size=settings["eval_batch_size"],
        turns=settings["turns"],
        avalanche=versions["avalanche"]["avalanche-lib"],
        ours=versions["ours"]["cl_lightning"],
        lightning=versions["ours"]["lightning"],
        torch=versions["ours"]["torch"],
    )


def reached(row: Row, ratios: dict[str, list[float]]) -> str:
    """Beside which kinds of images of Avalanche a row has its goal."""
    kinds = []
    for place, kind in enumerate(SIDES[1:]):
        if ratios[row.of][place] >= row.goal and min(values[place] for values in ratios.values()) > 1:
            kinds.append(kind)
    return "yes" if len(kinds) == 2 else f"with {kinds[0]}" if kinds else "no"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with fashion_mnist.npz")
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--samples", type=int, default=1000, help="training images per class")
    parser.add_argument("--environment", type=Path, default=ROOT / ".avalanche-venv")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    if options.data is None or not (options.data / "fashion_mnist.npz").is_file():
        parser.error(f"--data: {options.data} is no folder with fashion_mnist.npz")
    if options.turns < 1 or options.samples < 1:
        parser.error("--turns and --samples: at least 1")
    python = str(environment(options.environment.resolve()))
    settings = {**SETTINGS, "samples": options.samples, "turns": options.turns}
    results = stored(NAME)
    if results.get("settings") != settings:
        results = {}  # rows of other settings do not stand beside these
    results = {"settings": settings, "versions": {}, "rows": results.get("rows", {})}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "fashion_mnist.npz"
        share(options.data / "fashion_mnist.npz", data, options.samples)
        for name in options.rows:
            row = ROWS[name]
            asked = {**SETTINGS, "data": str(data), "method": row.method, "batch_size": row.batch_size}
            with (
                Side(sys.executable, "-m", "benchmarks.avalanche", "--serve") as ours,
                Side(python, "-P", str(ROOT / "benchmarks" / "avalanche_side.py")) as theirs,
            ):
                if ours.versions["torch"] != theirs.versions["torch"]:
                    parser.error(f"--environment: its torch is {theirs.versions['torch']}, not {torch.__version__}")
                results["versions"] = {"ours": ours.versions, "avalanche": theirs.versions}
                sides = {side: ours.run if side == "ours" else theirs.run for side in SIDES}
                part = compare(row, {**asked, "online": row.online}, sides, options.turns)
            results["rows"][name] = part
            found = {of: [ratio(part, side, of) for side in SIDES[1:]] for of in ("training", "total")}
            told = "   ".join(f"{of} {' / '.join(f'{value:.2f}' for value in found[of])}" for of in found)
            print(f"{name:<14}{told}   (goal {row.goal} in {row.of})", flush=True)
            store(NAME, results)


if __name__ == "__main__":
    main()
