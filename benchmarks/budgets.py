"""Memory-aligned comparison: each method with the same size of network and exemplars together, in one command.

    python -m benchmarks.budgets run --data DIR             all methods and budgets, seed 0
    python -m benchmarks.budgets run --data DIR --only ER MEMO --budgets 0.6 1.1 --seeds 0 1 2
    python -m benchmarks.budgets table                      writes docs/memory_budgets.md from what was run
    python -m cl_lightning report runs/budgets/er/*/*       curves of a method over its budgets

A budget of m MB leaves a method

    K = floor( (2^20 m - 4 P) / (C H W) )

exemplars (Zhou et al., MEMO, ICLR 2023, arXiv:2205.13218), with P parameters in its network at the end of the stream: a
method with a larger network gets fewer exemplars, and none of a budget that its network exceeds. P is measured by a run
of one step per phase. AUC-A and AUC-L are the areas under the average incremental and the last accuracy, as fractions,
over the sizes of network and exemplars that the runs report (arXiv:2302.03648).
"""

import argparse
import json
import math
import os
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.comparison import finished, launch
from benchmarks.numbers import DOCS, table
from benchmarks.protocols import FASHION, FIVE, subset
from benchmarks.rows import METHODS
from cl_lightning.batch import ImageShape
from cl_lightning.measures import area_under_budget
from cl_lightning.memory import exemplars_within
from cl_lightning.report import comparison as measures
from cl_lightning.report import runs as records
from cl_lightning.report.statistics import estimate

RUNS = Path("runs/budgets")
BUDGETS = (0.6, 1.1, 1.8, 2.3)
"""In MB of 2^20 bytes. The network of one MLP has 0.34 MB, of DERExpand after five tasks 1.71 MB."""
ROWS = ("ER", "ER by the loader", "iCaRL", "BiC", "WA", "FOSTER", "MEMO", "DERExpand")
SHAPE: ImageShape = (1, 28, 28)
OPTIONS = (
    f"{FASHION} {subset(FIVE, 500, 200)} --data.batch_size 32 --model.backbone MLP --model.backbone.hidden [100,100] "
    "--trainer.max_epochs 6 --trainer.accelerator cpu"
)
ONE_STEP = "--trainer.max_epochs 1 --trainer.limit_train_batches 1 --loop.dry_run false"
INTRODUCTION = """# Memory budgets

Methods with the same size of network and exemplars together: a method with a larger network has fewer exemplars.
Split-Fashion-MNIST, 5 tasks of 2 classes, 500 training and 200 test images of each class, an MLP 784-100-100, 6 epochs
per task, batches of 32, seeds {seeds}. `python -m benchmarks.budgets run --data DIR` runs all of them; with `table` in
place of `run` it writes this page."""


def arguments(method: str, memory: int, data: str) -> list[str]:
    """Arguments of ``fit`` for a method with a memory of a given number of exemplars."""
    row = METHODS[method]
    text = f"--config {row.config} {row.options} {OPTIONS}".format(memory=memory, data=data)
    return shlex.split(text)


def folder(runs: Path, method: str, budget: float | None, seed: int) -> Path:
    """Folder of a run; of the run of one step per phase without a budget."""
    size = "one_step" if budget is None else f"{budget:g}_mb"
    return runs / re.sub(r"\W+", "_", method.lower()) / size / str(seed)


def parameters(method: str, data: str, runs: Path) -> int:
    """P, the number of parameters of the network at the end of the stream."""
    target = folder(runs, method, None, 0)
    if not finished(target):
        code = launch([*arguments(method, 20, data), *shlex.split(ONE_STEP)], 0, target, data)
        if code:
            raise SystemExit(f"{method}: exit code {code}, see {target.with_suffix('.log')}")
    return int(json.loads((target / "results.json").read_text(encoding="utf-8"))["cost"]["parameters"])


def run(methods: Sequence[str], budgets: Sequence[float], seeds: Sequence[int], data: str, runs: Path) -> None:
    """Run what was not run yet, one after another."""
    for method in methods:
        count = parameters(method, data, runs)
        for budget in budgets:
            memory = exemplars_within(budget, count, SHAPE)
            if memory < 1:
                print(f"{method}: {budget:g} MB are less than its network, {4 * count / 2**20:.2f} MB", flush=True)
                continue
            for seed in seeds:
                target = folder(runs, method, budget, seed)
                if finished(target):
                    continue
                begun = time.monotonic()
                code = launch(arguments(method, memory, data), seed, target, data)
                spent = time.monotonic() - begun
                print(f"{method}, {budget:g} MB, {memory} exemplars: exit code {code}, {spent:.0f} s", flush=True)


Found = Mapping[tuple[str, float], Sequence[records.Run]]
"""Finished runs by method and budget."""


def gathered(runs: Path, budgets: Sequence[float] = BUDGETS) -> dict[tuple[str, float], list[records.Run]]:
    """What was run."""
    found = {}
    for method in ROWS:
        for budget in budgets:
            folders = sorted(folder(runs, method, budget, 0).parent.glob("*/results.json"))
            if members := [records.read(file.parent) for file in folders if finished(file.parent)]:
                found[method, budget] = members
    return found


def areas(found: Found, method: str) -> tuple[float, float]:
    """AUC-A and AUC-L of a method over its budgets, with the mean over seeds at each; nan for fewer than two."""
    members = [entry for (name, _), entry in found.items() if name == method]
    sizes = torch.tensor([sum(run.budget or 0.0 for run in entry) / len(entry) for entry in members])
    values = []
    for measure in (measures.INCREMENTAL, measures.LAST):
        means = [mean.mean for entry in members if (mean := estimate(measure.of(run) for run in entry)) is not None]
        values.append(area_under_budget(sizes, torch.tensor(means)))
    return values[0], values[1]


def page(found: Found, budgets: Sequence[float] = BUDGETS) -> str:
    """The page: accuracies at each budget, and areas."""
    methods = list(dict.fromkeys(method for method, _ in found))
    seeds = sorted({str(run.seed) for members in found.values() for run in members})
    parts = [INTRODUCTION.format(seeds=", ".join(seeds))]
    for measure in (measures.LAST, measures.INCREMENTAL):
        rows = [
            [method, *(_cell(found.get((method, budget), []), measure) for budget in budgets)] for method in methods
        ]
        heads = [f"{measure.title} (%), exemplars", *(f"{budget:g} MB" for budget in budgets)]
        parts.append(table(heads, rows))
    rows = []
    for method in methods:
        sizes = [budget for name, budget in found if name == method]
        rows.append([method, f"{min(sizes):g} to {max(sizes):g} MB", *(_area(area) for area in areas(found, method))])
    parts.append(table(["method", "budgets", "AUC-A", "AUC-L"], rows))
    parts.append("Areas over different ranges of budgets are not comparable.")
    parts.append("A dash: not run, or the network exceeds the budget.")
    return "\n\n".join(parts) + "\n"


def _cell(members: Sequence[records.Run], measure: measures.Measure) -> str:
    if (value := estimate(measure.of(run) for run in members)) is None:
        return "–"  # noqa: RUF001
    first = members[0]
    pixels = 2**20 * (first.budget or 0.0) - 4 * (first.parameters or 0)
    return f"{100 * value.mean:.1f}, {round(pixels / math.prod(SHAPE))}"


def _area(area: float) -> str:
    return "–" if area != area else f"{area:.3f}"  # noqa: RUF001


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("--only", nargs="*", default=list(ROWS), choices=ROWS)
    runner.add_argument("--budgets", nargs="*", type=float, default=list(BUDGETS), help="in MB of 2^20 bytes")
    runner.add_argument("--seeds", nargs="*", type=int, default=[0])
    runner.add_argument("--data", default=os.environ.get("CL_LIGHTNING_DATA", "data"))
    writer = commands.add_parser("table")
    for each in (runner, writer):
        each.add_argument("--runs", type=Path, default=RUNS)
    options = parser.parse_args()
    if options.what == "run":
        run(options.only, options.budgets, options.seeds, options.data, options.runs)
    else:
        (DOCS / "memory_budgets.md").write_text(page(gathered(options.runs)), encoding="utf-8")


if __name__ == "__main__":
    main()
