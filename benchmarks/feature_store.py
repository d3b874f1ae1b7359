"""What the store of features saves: heads on a frozen MobileNetV2, CIFAR-100 in 10 tasks, with ``loop.feature_cache``.

    python -m benchmarks.feature_store --data DIR                                   a part of the images, minutes
    python -m benchmarks.feature_store --data DIR --samples 500 --test_samples 100  all of them, about an hour

DIR holds ``cifar100.npz`` (x_train, y_train, x_test, y_test, class_names) and
``models/mobilenetv2_100_imagenet_fp16.pt``. Each run is ``python -m cl_lightning fit`` in a process of its own with one
thread. A turn begins with an empty store. Runs without it are long, and are made in the first turn alone. Results go to
``docs/benchmarks/feature_store.json``, by number of images, and a table for each into ``docs/benchmarks.md``.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.numbers import store, stored, table

NAME = "feature_store"
ROOT = Path(__file__).parents[1]
GOAL = 50.0
KINDS = ("training", "statistics", "evaluation")
SECTION = """## Cached features of a frozen backbone

MobileNetV2 (ImageNet-1k, 96 x 96 pixels), frozen, on CIFAR-100 in 10 tasks of 10 classes; complete runs of the
command line, each in its own process with one thread. Learning is the sum of training, statistics and evaluation in
`results.json`, where the cache saves time. The rest of a run is the same with and without the cache: imports, building,
loading of images and features, checkpoints, a report. The goal, a second method {goal:.0f} times as fast as the first,
applies to learning; complete runs cannot reach it, because they need seconds to start and only minutes to learn.
Written by `python -m benchmarks.feature_store`.
"""
PART = """**{samples} training and {test_samples} test images of each class.** {turns}; runs without the cache were
made once. Imports alone take {imports_s:.1f} s; the cache takes {megabytes:.0f} MB on disk.

{rows}
"""
COMMON = (
    "--config cifar100_10x10_npz_imagenet --data.resize 96 --data.mean [0.5] --data.std [0.5] "
    "--data.transforms [] --data.scenario.class_order random --model.backbone Timm "
    '--model.backbone.name mobilenetv2_100 --model.backbone.kwargs \'{"pad_type":"same"}\' --trainer.accelerator cpu '
    "--trainer.logger false --trainer.enable_progress_bar false"
)
PROTOTYPES = "--model SimpleCIL"
NEAREST = "--model SimpleCIL --model.metric euclidean"
LDA = "--model FSA --model.adapt false --model.head LDAHead --model.head.ridge 0.01"
LINEAR = "--model Finetune --model.freeze_backbone true --model.loss_classes current --trainer.max_epochs 3"


@dataclass(frozen=True)
class Row:
    """A run of a turn.

    Attributes:
        title: In the table.
        options: Of the command.
        seed: Decides the order of the classes.
        stored: Whether it has the store.
    """

    title: str
    options: str
    seed: int = 0
    stored: bool = True


FIRST, SECOND = "first", "second"
ROWS = {
    FIRST: Row("prototypes (SimpleCIL), first: fills the store", PROTOTYPES),
    "without": Row("prototypes, without a store", PROTOTYPES, stored=False),
    SECOND: Row("second method (nearest class mean), from the store", NEAREST),
    "order": Row("prototypes, another class order, from the store", PROTOTYPES, seed=1),
    "lda": Row("LDA, from the store", LDA),
    "linear_without": Row("linear head, 3 epochs, without a store", LINEAR, stored=False),
    "linear": Row("linear head, 3 epochs, from the store", LINEAR),
}


def write_part(source: Path, target: Path, samples: int, test_samples: int) -> None:
    """The first images of each class."""
    with np.load(source) as file:
        arrays = {"class_names": file["class_names"]}
        for part, count in (("train", samples), ("test", test_samples)):
            labels = file[f"y_{part}"]
            places = np.sort(np.concatenate([np.flatnonzero(labels == c)[:count] for c in np.unique(labels)]))
            arrays |= {f"x_{part}": file[f"x_{part}"][places], f"y_{part}": labels[places]}
    np.savez(target, **arrays)


def run(row: Row, data: Path, weights: Path, store: Path, folder: Path) -> dict[str, float]:
    """Seconds on the clock, and those of learning and evaluation; accuracy after the last task."""
    arguments = shlex.split(f"{row.options} {COMMON}")
    arguments += ["--data.path", str(data), "--model.backbone.weights", str(weights)]
    arguments += ["--seed_everything", str(row.seed), "--run_dir", str(folder)]
    arguments += ["--loop.feature_cache", str(store)] if row.stored else []
    wall = timed([sys.executable, "-m", "cl_lightning", "fit", *arguments])
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    learning = sum(part[kind] for part in results["cost"]["seconds"] for kind in KINDS)
    return {"wall_s": wall, "learning_s": learning, "accuracy": results["measures"]["average_accuracy"]}


def timed(command: list[str]) -> float:
    """Seconds that a process takes.

    Raises:
        RuntimeError: If it fails; with its last words.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    begun = time.perf_counter()
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed: {ended.stderr[-2000:]}")
    return time.perf_counter() - begun


def measure(
    names: list[str], source: Path, weights: Path, samples: int, test_samples: int, turns: int
) -> dict[str, Any]:
    """Medians over turns."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ROWS if name in (FIRST, *names)}
    imports, size = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch, "images.npz")
        write_part(source, data, samples, test_samples)
        for turn in range(turns):
            place = Path(scratch, str(turn))
            imports.append(timed([sys.executable, "-c", "import cl_lightning.cli.commands"]))
            for name, parts in found.items():
                row = ROWS[name]
                if turn > 0 and not row.stored:
                    continue
                each = run(row, data, weights, place / "store", place / name)
                parts.append(each)
                for kind in ("wall", "learning"):
                    each[f"{kind}_ratio"] = found[FIRST][-1][f"{kind}_s"] / each[f"{kind}_s"]
                print(f"turn {turn}  {row.title:<52}{each['wall_s']:>8.1f} s{each['learning_s']:>9.2f} s", flush=True)
            size = sum(path.stat().st_size for path in (place / "store").rglob("*.pt"))
            shutil.rmtree(place)
    return {
        "samples": samples,
        "test_samples": test_samples,
        "turns": turns,
        "imports_s": statistics.median(imports),
        "megabytes": size / 1e6,
        "rows": {
            name: {key: statistics.median(part[key] for part in parts) for key in parts[0]}
            for name, parts in found.items()
        },
    }


def section(results: dict[str, Any]) -> str:
    """Of the page, with all numbers of images that were measured."""
    heads = ["run", "whole run (s)", "learning (s)", "first / this", "goal", "whole: first / this", "accuracy (%)"]
    text = SECTION.format(goal=GOAL)
    for part in results.values():
        rows = []
        for name, row in part["rows"].items():
            seconds = (f"{row['wall_s']:.1f}", f"{row['learning_s']:.2f}")
            ratios = (
                f"{row['learning_ratio']:.1f}",
                f"{GOAL:.0f}" if name == SECOND else "",
                f"{row['wall_ratio']:.1f}",
            )
            rows.append([ROWS[name].title, *seconds, *ratios, f"{100 * row['accuracy']:.1f}"])
        turns = "One turn" if part["turns"] == 1 else f"Medians of {part['turns']} turns"
        text += "\n" + PART.format(**{**part, "turns": turns, "rows": table(heads, rows)})
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("CL_LIGHTNING_DATA", "data")))
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS), help="beside the first")
    parser.add_argument("--samples", type=int, default=20, help="training images of each class")
    parser.add_argument("--test_samples", type=int, default=10, help="test images of each class")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    source = options.data.resolve() / "cifar100.npz"
    weights = options.data.resolve() / "models" / "mobilenetv2_100_imagenet_fp16.pt"
    for path in (source, weights):
        if not path.is_file():
            parser.error(f"no file {path}; say with --data where the images and the weights are")
    part = measure(options.rows, source, weights, options.samples, options.test_samples, options.turns)
    results = stored(NAME)
    results[f"{options.samples}+{options.test_samples}"] = part
    store(NAME, results)


if __name__ == "__main__":
    main()
