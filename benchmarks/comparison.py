"""All methods on the same protocols, and the page that compares them, docs/results.md.

    python -m benchmarks.comparison run fashion_mlp --data DIR      all methods, seeds 0, 1, 2
    python -m benchmarks.comparison run fashion_mlp --only er lwf --seeds 0
    python -m benchmarks.comparison table                           writes docs/results.md

DIR holds ``fashion_mnist.npz``, ``cifar100.npz`` and ``cifar10_test.npz`` (x_train, y_train, x_test, y_test,
class_names; the last one without training images), and weights in ``models``. Runs that are done are passed over, one
that was stopped goes on from its last checkpoint. Methods have the options of their configs in
``experiments/methods`` and what ``benchmarks/rows.py`` adds to them; epochs, batches, network and memory are
those of the protocol. No option was chosen by these test data. ``table`` writes rows of what was run; it keeps the
other rows of docs/results.md as long as their options are the present ones.
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
from dataclasses import dataclass, field
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

Some rows are older than the present code and will be measured again: EFC, and apart from the first table EFC++ (no
biases in the head of rotations, augmented images), CoTTA (a view was shifted before its rotation); apart from the first
table, BiC (stage 2 by steps of Adam), and offline iCaRL and LwF.MC (learning rate 0.05 instead of 0.02); and, in tables
with bf16-mixed, methods that compare cosines, which were computed in bfloat16. Times of G-ACIL, of BiC, HOC, iCaRL,
LwF.MC and ER by the loader in the first table, and of rows with one seed are from a machine with other work, and up to
10 times too long. Below their baseline, for reasons that are not known yet: mix-cd (ER) in the first table, GSS (ER) in
the online table. Still to be run: ER by the loader and ER + EMA of 10 steps on the slim
ResNet-18."""


def parts(protocol: str, method: str, data: str) -> tuple[str, str, str]:
    """The method's config, the options that all rows share, and those of this one."""
    row, shared_by = rows_of(protocol)[method], PROTOCOLS[protocol]
    texts = (
        f"--config {row.config}",
        f"{shared_by.options} --trainer.accelerator cpu",
        row.options,
    )
    values = {
        "data": data,
        "memory": shared_by.memory,
        "epochs": shared_by.epochs,
        "runs": RUNS,
    }
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
            begun = time.monotonic()
            code = launch(shlex.split(command(protocol, method, data)), seed, target, data)
            print(f"{protocol} {method} seed {seed}: exit code {code}, {time.monotonic() - begun:.0f} s", flush=True)


def launch(arguments: Sequence[str], seed: int, target: Path, data: str) -> int:
    """Run ``fit`` in a process, or resume it, with its output in the log beside its folder; returns the exit code.

    Raises:
        KeyboardInterrupt: If the run was interrupted.
    """
    own = ["--seed_everything", str(seed), "--run_dir", str(target), "--ckpt_path", "auto"]
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".log").open("a") as log:
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        code = subprocess.run(
            [sys.executable, "-m", "cl_lightning", "fit", *arguments, *own],
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
            env={**os.environ, "PYTHONPATH": path, "CL_LIGHTNING_DATA": data},
        ).returncode
    if code == 130:
        raise KeyboardInterrupt
    return code


def finished(target: Path) -> bool:
    """Whether a run has learnt its whole stream."""
    return (target / "results.json").is_file() and records.read(target).complete


@dataclass
class Section:
    """A section of the page.

    Attributes:
        heads: Of the columns after the method.
        rows: Cells of each method.
        detail: Cells of each method in the table by task, and the heads of this table under ``%``.
        shared: Options that all rows share.
        options: Config and options of each method.
    """

    heads: list[str] = field(default_factory=list)
    rows: dict[str, list[str]] = field(default_factory=dict)
    detail: dict[str, list[str]] = field(default_factory=dict)
    shared: str = ""
    options: dict[str, str] = field(default_factory=dict)


def sections(text: str) -> dict[str, Section]:
    """The sections of a page, by title."""
    found: dict[str, Section] = {}
    for part in text.split("\n## ")[1:]:
        section, tables = Section(), 0
        for line in part.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("| ") else []
            if cells and cells[0] in ("method", "%"):
                tables += 1
                section.heads = cells[1:] if tables == 1 else section.heads
            if cells and tables == 1 and cells[0] != "method":
                section.rows[cells[0]] = cells[1:]
            elif cells and tables == 2:
                section.detail[cells[0]] = cells[1:]
            elif line.startswith("SHARED: "):
                section.shared = line.removeprefix("SHARED: ")
            elif section.shared and ": --config " in line:
                method, _, options = line.partition(": ")
                section.options[method] = options
        found[part.partition("\n")[0]] = section
    return found


def page(runs: Path, old: str = "") -> str:
    """docs/results.md: rows of what was run, and the other rows of an old page whose options are still the same."""
    parts = [INTRODUCTION]
    before = sections(old)
    for name, protocol in PROTOCOLS.items():
        made = section_of(name, runs, before.get(protocol.title, Section()))
        if not made.rows:
            continue
        lines = [f"## {protocol.title}", "", protocol.says, "", row("method", made.heads)]
        lines += ["|" + "---|" * (len(made.heads) + 1), *(row(method, cells) for method, cells in made.rows.items())]
        if made.detail:
            (head, names), *others = made.detail.items()
            lines += ["", row(head, names), "|" + "---|" * (len(names) + 1)]
            lines += [row(method, cells) for method, cells in others]
        lines += ["", "<details><summary>options</summary>", "", "```", f"SHARED: {made.shared}", ""]
        lines += [f"{method}: {options}" for method, options in made.options.items()]
        parts.append("\n".join([*lines, "```", "", "</details>"]))
    return "\n\n".join(parts) + "\n"


def row(first: str, cells: Sequence[str]) -> str:
    return " | ".join(["", first, *cells, ""]).strip()


def section_of(name: str, runs: Path, old: Section) -> Section:
    """The section of a protocol: rows of what was run, and rows of the old section with the same options."""
    protocol, made = PROTOCOLS[name], Section()
    options = {method: parts(name, method, "DIR") for method in chosen(name)}
    made.shared = next(iter(options.values()))[1]
    lines = {method: f"{config} {own}".rstrip() for method, (config, _, own) in options.items()}
    new = {
        method: [records.read(path) for seed in SEEDS if finished(path := folder(name, method, seed, runs))]
        for method in lines
    }
    new = {method: found for method, found in new.items() if found}
    same = {method for method, line in old.options.items() if line == lines.get(method) and old.shared == made.shared}
    kept = {method: cells for method, cells in old.rows.items() if method in same and method not in new}
    columns: list[list[str]] = [[str(len(found)) for found in new.values()]]
    made.heads = ["seeds"]
    for place, measure in enumerate(protocol.columns, start=1):
        values = [[measure.of(run) for run in found] for found in new.values()]
        if measure is measures.SECONDS:
            values = [[min(value for value in part if value is not None)] for part in values]
        unit = old.heads[place].rpartition("(")[2].rstrip(")") if kept else None
        unit, cells = column([estimate(part) for part in values], measure.unit, name=unit)
        made.heads.append(f"{measure.title} ({unit})")
        columns.append(cells)
    measured = dict(zip(new, map(list, zip(*columns, strict=True)), strict=True))
    made.options = {method: line for method, line in lines.items() if method in kept or method in measured}
    made.rows = {method: measured.get(method) or kept[method] for method in made.options}
    if protocol.detail and made.rows:
        tables = by_task(protocol.detail, new) if new else {}
        heads = tables.get("%") or old.detail["%"]
        made.detail = {"%": heads, **{method: tables.get(method) or old.detail[method] for method in made.rows}}
    return made


def by_task(name: str, rows: dict[str, list[records.Run]]) -> dict[str, list[str]]:
    """Numbers per task in percent, the mean over the seeds, and names of tasks; tasks without a number are left out."""
    table: dict[str, list[str]] = {}
    for method, found in rows.items():
        files = [json.loads((run.folder / "results.json").read_text(encoding="utf-8")) for run in found]
        series = [file["matrix"].get(name) or [task[name] for task in file["measures_per_task"]] for file in files]
        values = [[value for value in column if value is not None] for column in series]
        tasks = [task["name"] for task in files[0]["tasks"]]
        table["%"] = [task.replace("_", " ") for task in tasks[len(tasks) - len(values[0]) :]]
        table[method] = [f"{100 * sum(column) / len(column):.1f}" for column in zip(*values, strict=True)]
    return table


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
        target = ROOT / "docs" / "results.md"
        target.write_text(page(options.runs, target.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
