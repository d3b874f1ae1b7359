"""Who stays able to learn: callbacks that keep plasticity, on a stream of random labels on permuted pixels.

    python -m benchmarks.plasticity run                                     200 tasks, three seeds, all methods
    python -m benchmarks.plasticity run --tasks 40 --seeds 0 --methods finetune l2_init
    python -m benchmarks.plasticity table                                   writes docs/plasticity.md from the results

``run`` starts the command line once per method and seed with the configs ``digits_random_labels`` and
``finetune_plasticity``, one thread each; finished runs are left as they are. ``table`` reads the results of all runs in
the folder and writes the table and the curves.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "plasticity.md"
CURVES = ("task_accuracy", "dormant_units", "effective_rank", "weight_norm")
METHODS: dict[str, tuple[str, list[str]]] = {
    "finetune": ("Adam alone", []),
    "l2_init": ("L2Init", ["L2Init", "--trainer.callbacks.weight", "0.001"]),
    "wasserstein": ("WassersteinRegularization", ["WassersteinRegularization", "--trainer.callbacks.weight", "1.0"]),
    "spectral": ("SpectralRegularization", ["SpectralRegularization", "--trainer.callbacks.weight", "0.01"]),
    "shrink_task": ("ShrinkAndPerturb, per task", ["ShrinkAndPerturb", "--trainer.callbacks.shrink", "0.6"]),
    "shrink_step": (
        "ShrinkAndPerturb, per step",
        ["ShrinkAndPerturb", "--trainer.callbacks.when", "step", "--trainer.callbacks.decay", "0.1"],
    ),
    "cbp": (
        "ContinualBackprop",
        ["ContinualBackprop", "--trainer.callbacks.rate", "0.001", "--trainer.callbacks.maturity", "50"],
    ),
}
"""Label, and the arguments after ``--trainer.callbacks+=``, of each method."""

TEXT = """# Plasticity

A network that has learnt many tasks may lose the ability to learn the next one. The stream `digits_random_labels`
shows it within minutes on a CPU: 200 of scikit-learn's digits have random labels, the same in all tasks, and each task
has a new permutation of the pixels. They are to be memorised in 20 epochs by an MLP with two hidden layers of 64 units
and Adam with learning rate 0.003. Memorising is measured: the accuracy is on the training samples of a task directly
after it. The accuracy on test data is chance by design.

{table}

Means over {seeds}, with standard deviations if there are several; {tasks} tasks. "First" and "last" are the accuracies
in the first and the last tenth of the tasks; dormant units, rank and norm are of the last tenth. The weights of the
penalties and the rates are one choice each, not tuned.

{plots}

The measures are recorded by the callback `Plasticity`, which any run takes:

    python -m cl_lightning fit --config digits_random_labels --config finetune_plasticity
    python -m cl_lightning fit --config digits_random_labels --config finetune_plasticity \\
        --trainer.callbacks+=L2Init --trainer.callbacks.weight 0.001

Written by `python -m benchmarks.plasticity table`; the runs are made by `python -m benchmarks.plasticity run`.
"""


def run(folder: Path, methods: Sequence[str], seeds: Sequence[int], tasks: int) -> None:
    """Learn the stream with each method and seed, one after another."""
    for seed in seeds:
        for name in methods:
            place = folder / f"{name}_{seed}"
            if _measures(place, tasks) is not None:
                continue
            options = METHODS[name][1]
            command = [sys.executable, "-m", "cl_lightning", "fit", "--config", "digits_random_labels"]
            command += ["--config", "finetune_plasticity", "--data.scenario.base.base.tasks", str(tasks)]
            command += ["--seed_everything", str(seed), "--run_dir", str(place)]
            if options:
                command += ["--trainer.callbacks+=" + options[0], *options[1:]]
            threads = {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, cwd=ROOT, env=os.environ | threads, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name}, seed {seed}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
            print(f"{name}, seed {seed}: done", flush=True)


def _measures(place: Path, tasks: int | None = None) -> dict[str, Any] | None:
    """Results of the callback of a finished run; None if there are none, or of another number of tasks."""
    path = place / "results.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    found: dict[str, Any] | None = content.get("plasticity")
    count = len(found["task_accuracy"]) if found else 0
    return found if count and count == (tasks or len(content["tasks"])) else None


def collected(folder: Path) -> dict[str, npt.NDArray[np.float64]]:
    """Curves by method, float64 ``(seeds, measures, tasks)`` in the order of ``CURVES``."""
    found: dict[str, npt.NDArray[np.float64]] = {}
    for name in METHODS:
        runs = [_measures(place) for place in sorted(folder.glob(f"{name}_[0-9]*"))]
        curves = [[each[measure] for measure in CURVES] for each in runs if each is not None]
        if curves:
            found[name] = np.array(curves, np.float64)
    if len({curves.shape[2] for curves in found.values()}) > 1:
        raise SystemExit(f"{folder}: runs with different numbers of tasks; give another --folder")
    return found


def table(found: dict[str, npt.NDArray[np.float64]]) -> str:
    """Table of the methods, the one that learns the last tasks best first."""
    lines = [
        "| method | first (%) | last (%) | dormant units (%) | effective rank | weight norm |",
        "|---|---|---|---|---|---|",
    ]
    tenth = max(1, next(iter(found.values())).shape[2] // 10)
    for name in sorted(found, key=lambda name: -found[name][:, 0, -tenth:].mean()):
        curves = found[name]
        first, last = curves[:, :, :tenth].mean(2), curves[:, :, -tenth:].mean(2)
        cells = [_cell(100 * first[:, 0]), _cell(100 * last[:, 0]), _cell(100 * last[:, 1])]
        lines.append(f"| {METHODS[name][0]} | {' | '.join([*cells, _cell(last[:, 2]), _cell(last[:, 3])])} |")
    return "\n".join(lines)


def _cell(values: npt.NDArray[np.float64]) -> str:
    spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{values.mean():.1f}{spread}"


def plots(found: dict[str, npt.NDArray[np.float64]], folder: Path) -> str:
    """Write a plot of each measure over the tasks as SVG; returns the text that shows them."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    shown = []
    for place, measure in enumerate(CURVES):
        figure = Figure(figsize=(7, 3.2), layout="constrained")
        axes = figure.subplots()
        for name, curves in found.items():
            mean = curves[:, place].mean(0)
            width = max(1, len(mean) // 20)
            smooth = np.convolve(mean, np.ones(width) / width, mode="valid")
            axes.plot(np.arange(len(smooth)) + width, smooth, label=METHODS[name][0], linewidth=1.3)
        axes.set_xlabel("task")
        axes.set_ylabel(measure.replace("_", " "))
        axes.legend(fontsize=7, ncols=2)
        figure.savefig(folder / f"{measure}.svg", metadata={"Date": None})
        shown.append(f"![{measure.replace('_', ' ')}]({folder.name}/{measure}.svg)")
    return "\n\n".join(shown)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "plasticity")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(args)
    if options.command == "run":
        run(options.folder, options.methods, options.seeds, options.tasks)
        return
    found = collected(options.folder)
    if not found:
        raise SystemExit(f"{options.folder}: no finished runs; first run `python -m benchmarks.plasticity run`")
    counts = {len(curves) for curves in found.values()}
    text = TEXT.format(
        table=table(found),
        plots=plots(found, options.page.parent / "plasticity"),
        seeds=f"{max(counts)} seed{'s' if max(counts) > 1 else ''}",
        tasks=next(iter(found.values())).shape[2],
    )
    options.page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
