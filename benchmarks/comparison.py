"""All methods on the same protocols, and the page that compares them, docs/results.md.

    python -m benchmarks.comparison run fashion_mlp --data DIR      all methods, seeds 0, 1, 2
    python -m benchmarks.comparison run fashion_mlp --only er lwf --seeds 0
    python -m benchmarks.comparison table                           writes docs/results.md from what was run

DIR holds ``fashion_mnist.npz``, ``cifar100.npz`` and ``cifar10_test.npz`` (x_train, y_train, x_test, y_test,
class_names; the last one without training images), and weights in ``models``. Runs that are done are passed over, one
that was stopped goes on from its last checkpoint. Methods have the options of their configs in
``experiments/methods`` and what ``benchmarks/protocols.py`` says beside them; epochs, batches, network and memory are
those of the protocol. No option was chosen by these test data.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.protocols import PROTOCOLS, rows_of
from cl_lightning.report import comparison as measures
from cl_lightning.report import runs as records
from cl_lightning.report.statistics import estimate
from cl_lightning.report.tables import column

ROOT = Path(__file__).parents[1]
RUNS = Path("runs/comparison")
SEEDS = (0, 1, 2)
INTRODUCTION = """# Results

All methods on the same protocols: mean and half-width of the 95 % interval over the seeds, on the CPU. Time is the time
of the fastest run, with evaluation; it depends on the load of the machine. A run is
`python -m cl_lightning fit METHOD OWN SHARED --seed_everything SEED`, with the options listed below each table.
`python -m benchmarks.comparison run PROTOCOL --data DIR` runs all methods; with `table` in place of `run` it writes
this page.

Some rows are older than the present code and will be measured again: G-ACIL (P was normal), BiC (stage 2 by steps of
Adam), EFC++ with augmented images, CoTTA (a view was shifted before its rotation), LAE and SLCA; and, in tables with
bf16-mixed, methods that compare cosines, which were computed in bfloat16."""


def parts(protocol: str, method: str, data: str) -> tuple[str, str, str]:
    """The method's config, the options that all rows share, and those of this one."""
    row, shared_by = rows_of(protocol)[method], PROTOCOLS[protocol]
    texts = (
        f"--config {row.config}",
        f"{shared_by.options} --trainer.accelerator cpu",
        row.options,
    )
    values = {"data": data, "memory": shared_by.memory, "epochs": shared_by.epochs, "runs": RUNS}
    filled = (text.format(**values) for text in texts)
    config, shared, own = (" ".join(text.split()) for text in filled)
    return config, shared, own


def command(protocol: str, method: str, data: str) -> str:
    """The command of a run, but for its seed and its folder; options of a class come after its name."""
    config, shared, own = parts(protocol, method, data)
    return " ".join(part for part in (config, own, shared) if part)


def folder(protocol: str, method: str, seed: int, runs: Path) -> Path:
    return runs / protocol / re.sub(r"\W+", "_", method.lower()) / str(seed)


def chosen(protocol: str, only: Sequence[str] = ()) -> list[str]:
    """Methods that are run on a protocol."""
    online = PROTOCOLS[protocol].online
    return [
        name
        for name, row in rows_of(protocol).items()
        if (row.online or not online) and (not only or row.config in only or name in only)
    ]


def run(protocol: str, methods: Iterable[str], seeds: Sequence[int], data: str, runs: Path) -> None:
    """Run what was not run yet, one after another."""
    for seed in seeds:
        for method in methods:
            target = folder(protocol, method, seed, runs)
            if finished(target):
                continue
            arguments = shlex.split(command(protocol, method, data))
            arguments += ["--seed_everything", str(seed), "--run_dir", str(target), "--ckpt_path", "auto"]
            target.parent.mkdir(parents=True, exist_ok=True)
            begun = time.monotonic()
            with target.with_suffix(".log").open("a") as log:
                path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
                code = subprocess.run(
                    [sys.executable, "-m", "cl_lightning", "fit", *arguments],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    check=False,
                    env={**os.environ, "PYTHONPATH": path, "CL_LIGHTNING_DATA": data},
                ).returncode
            print(f"{protocol} {method} seed {seed}: exit code {code}, {time.monotonic() - begun:.0f} s", flush=True)
            if code == 130:
                raise KeyboardInterrupt


def finished(target: Path) -> bool:
    """Whether a run has learnt its whole stream."""
    return (target / "results.json").is_file() and records.read(target).complete


def page(runs: Path) -> str:
    """docs/results.md, from what was run."""
    sections = [INTRODUCTION]
    for name, protocol in PROTOCOLS.items():
        rows = {
            method: [records.read(path) for seed in SEEDS if finished(path := folder(name, method, seed, runs))]
            for method in chosen(name)
        }
        rows = {method: found for method, found in rows.items() if found}
        if not rows:
            continue
        cells: list[list[str]] = []
        heads = ["method", "seeds"]
        for measure in protocol.columns:
            values = [[measure.of(run) for run in found] for found in rows.values()]
            if measure is measures.SECONDS:
                values = [[min(value for value in part if value is not None)] for part in values]
            unit, texts = column([estimate(part) for part in values], measure.unit)
            heads.append(f"{measure.title} ({unit})")
            cells.append(texts)
        lines = [f"## {protocol.title}", "", protocol.says, "", " | ".join(["", *heads, ""]).strip()]
        lines.append("|" + "---|" * len(heads))
        for place, (method, found) in enumerate(rows.items()):
            lines.append(" | ".join(["", method, str(len(found)), *(texts[place] for texts in cells), ""]).strip())
        if protocol.detail:
            lines += ["", *by_task(protocol.detail, rows)]
        options = {method: parts(name, method, "DIR") for method in rows}
        shared = next(iter(options.values()))[1]
        lines += ["", "<details><summary>options</summary>", "", "```", f"SHARED: {shared}", ""]
        lines += [f"{method}: {config} {own}".rstrip() for method, (config, _, own) in options.items()]
        sections.append("\n".join([*lines, "```", "", "</details>"]))
    return "\n\n".join(sections) + "\n"


def by_task(name: str, rows: dict[str, list[records.Run]]) -> list[str]:
    """A table of a number per task in percent, the mean over the seeds; tasks without one are left out."""
    means: dict[str, list[float]] = {}
    told: list[str] = []
    for method, found in rows.items():
        parts = [json.loads((run.folder / "results.json").read_text(encoding="utf-8")) for run in found]
        series = [part["matrix"].get(name) or [task[name] for task in part["measures_per_task"]] for part in parts]
        values = [[value for value in column if value is not None] for column in series]
        tasks = [task["name"] for task in parts[0]["tasks"]]
        told = tasks[len(tasks) - len(values[0]) :]
        means[method] = [100 * sum(column) / len(column) for column in zip(*values, strict=True)]
    lines = [" | ".join(["", "%", *(task.replace("_", " ") for task in told), ""]).strip()]
    lines.append("|" + "---|" * (len(told) + 1))
    return lines + [" | ".join(["", method, *(f"{v:.1f}" for v in row), ""]).strip() for method, row in means.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("protocol", choices=PROTOCOLS)
    runner.add_argument("--only", nargs="*", default=[], help="names of methods or of their configs")
    runner.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    runner.add_argument("--data", default=os.environ.get("CL_LIGHTNING_DATA", "data"))
    table = commands.add_parser("table")
    for each in (runner, table):
        each.add_argument("--runs", type=Path, default=RUNS)
    options = parser.parse_args()
    if options.what == "run":
        run(options.protocol, chosen(options.protocol, options.only), options.seeds, options.data, options.runs)
    else:
        (ROOT / "docs" / "results.md").write_text(page(options.runs), encoding="utf-8")


if __name__ == "__main__":
    main()
