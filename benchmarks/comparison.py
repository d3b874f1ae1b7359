"""All methods on the same protocols, and the page that compares them, docs/results.md.

    python -m benchmarks.comparison run fashion_mlp --data DIR      all methods, seeds 0, 1, 2
    python -m benchmarks.comparison run fashion_mlp --only er lwf --seeds 0
    python -m benchmarks.comparison table                           writes docs/results.md from what was run

DIR holds ``fashion_mnist.npz`` and ``cifar100.npz`` (x_train, y_train, x_test, y_test, class_names). Runs that are done
are passed over, one that was stopped goes on from its last checkpoint. Methods have the options of their configs in
``experiments/methods`` and what is said here beside them; epochs, batches, network and memory are those of the
protocol. No option was chosen by these test data.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cl_lightning.report import comparison as measures
from cl_lightning.report import runs as records
from cl_lightning.report.statistics import estimate
from cl_lightning.report.tables import column

ROOT = Path(__file__).parents[1]
RUNS = Path("runs/comparison")
SEEDS = (0, 1, 2)
COLUMNS = (
    measures.LAST,
    measures.INCREMENTAL,
    measures.FORGETTING,
    measures.KNOWN,
    measures.SECONDS,
    measures.BYTES,
)


@dataclass(frozen=True)
class Protocol:
    """What all methods have in common.

    Attributes:
        title: In the page.
        says: What a reader has to know.
        options: Of the command.
        online: Whether it is a single pass over small batches.
    """

    title: str
    says: str
    options: str
    online: bool = False


@dataclass(frozen=True)
class Method:
    """A row of the tables.

    Attributes:
        config: In ``experiments/methods``.
        options: Beside those of the config.
        online: Whether it is made for a single pass over small batches too; False for methods with phases of many
            epochs.
    """

    config: str
    options: str = ""
    online: bool = True


FASHION = "--data NpzData --data.path {data}/fashion_mnist.npz --data.mean [0.286] --data.std [0.353]"
OFFLINE = f"{FASHION} --data.scenario ClassIncremental --data.scenario.tasks 5 --data.batch_size 128"
ONLINE = (
    f"{FASHION} --data.scenario Online --data.scenario.scenario ClassIncremental --data.scenario.scenario.tasks 5 "
    "--data.batch_size 10"
)
MLP = "--model.backbone MLP"
SLIM = "--model.backbone SlimResNet18 --trainer.precision bf16-mixed"

PROTOCOLS = {
    "fashion_mlp": Protocol(
        "Split-Fashion-MNIST, 5 tasks of 2 classes, MLP, offline",
        "MLP 784-400-400, 3 epochs per task, batches of 128, no augmentation, a memory of 500 where there is one.",
        f"{OFFLINE} {MLP} --trainer.max_epochs 3",
    ),
    "fashion_mlp_online": Protocol(
        "Split-Fashion-MNIST, 5 tasks of 2 classes, MLP, online",
        "MLP 784-400-400, one pass in batches of 10, no augmentation (but PCR's), a memory of 500 where there is one.",
        f"{ONLINE} {MLP} --trainer.max_epochs 1",
        online=True,
    ),
    "fashion_slim": Protocol(
        "Split-Fashion-MNIST, 5 tasks of 2 classes, slim ResNet-18, offline",
        "Slim ResNet-18, 1 epoch per task in bf16-mixed, batches of 128, a memory of 500 where there is one.",
        f"{OFFLINE} {SLIM} --trainer.max_epochs 1",
    ),
    "fashion_slim_online": Protocol(
        "Split-Fashion-MNIST, 5 tasks of 2 classes, slim ResNet-18, online",
        "Slim ResNet-18, one pass in batches of 10 in bf16-mixed, a memory of 500 where there is one.",
        f"{ONLINE} {SLIM} --trainer.max_epochs 1",
        online=True,
    ),
    "cifar100_b50": Protocol(
        "CIFAR-100, 50 classes and 5 tasks of 10, ResNet-32",
        "ResNet-32, 2 epochs per task in bf16-mixed, batches of 128, crops and mirror images, the class order of "
        "numpy's seed 1993, a memory of 2000 where there is one. Published runs take 70 to 200 epochs.",
        "--config experiments/data/cifar100_b50_inc10_npz.yaml --data.path {data}/cifar100.npz "
        "--model.backbone ResNet32 --trainer.precision bf16-mixed --trainer.max_epochs 2",
    ),
}

MEMORY = "--model.memory_size {memory}"
METHODS = {
    "Finetune": Method("finetune"),
    "Joint": Method("joint", online=False),
    "LwF": Method("lwf"),
    "LwF.MC": Method("lwf_mc"),
    "EWC": Method("ewc", "--model.fisher_samples 2000"),
    "SI": Method("finetune_si"),
    "SDC": Method("sdc"),
    "PASS": Method("pass"),
    "EFC": Method("efc", online=False),
    "EFC++": Method("efc_pp", online=False),
    "FeTrIL": Method("fetril", online=False),
    "PRD": Method("prd", online=False),
    "ER": Method("er", MEMORY),
    "ER + EMA": Method("er_ema", MEMORY),
    "DER++": Method("derpp", MEMORY),
    "A-GEM": Method("agem", MEMORY),
    "GEM": Method("gem", f"{MEMORY} --model.replay_size 100"),
    "PCR": Method("pcr", MEMORY),
    "iCaRL": Method("icarl", MEMORY, online=False),
    "BiC": Method("bic", MEMORY, online=False),
    "WA": Method("wa", MEMORY, online=False),
    "FOSTER": Method("foster", MEMORY, online=False),
}


def command(protocol: str, method: str, data: str) -> str:
    """The command of a run, but for its seed and its folder."""
    row, shared = METHODS[method], PROTOCOLS[protocol]
    memory = 2000 if protocol.startswith("cifar") else 500
    text = f"--config experiments/methods/{row.config}.yaml {shared.options} {row.options} --trainer.accelerator cpu"
    return " ".join(text.format(data=data, memory=memory).split())


def folder(protocol: str, method: str, seed: int, runs: Path) -> Path:
    return runs / protocol / METHODS[method].config / str(seed)


def chosen(protocol: str, only: Sequence[str] = ()) -> list[str]:
    """Methods that are run on a protocol."""
    online = PROTOCOLS[protocol].online
    return [
        name
        for name, row in METHODS.items()
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
                    env={**os.environ, "PYTHONPATH": path},
                ).returncode
            print(f"{protocol} {method} seed {seed}: exit code {code}, {time.monotonic() - begun:.0f} s", flush=True)
            if code == 130:
                raise KeyboardInterrupt


def finished(target: Path) -> bool:
    """Whether a run has learnt its whole stream."""
    return (target / "results.json").is_file() and records.read(target).complete


def page(runs: Path) -> str:
    """docs/results.md, from what was run."""
    parts = [
        "# Results\n\nAll methods on the same protocols: mean and half-width of the 95 % interval over the seeds, on "
        "the CPU. Time is of the whole run, with evaluation, and depends on what else the machine did. Written by\n"
        "`python -m benchmarks.comparison table`; each command goes behind `python -m cl_lightning fit`, with "
        "`--seed_everything`."
    ]
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
        for measure in COLUMNS:
            unit, texts = column([estimate(measure.of(run) for run in found) for found in rows.values()], measure.unit)
            heads.append(f"{measure.title} ({unit})")
            cells.append(texts)
        lines = [f"## {protocol.title}", "", protocol.says, "", " | ".join(["", *heads, ""]).strip()]
        lines.append("|" + "---|" * len(heads))
        for place, (method, found) in enumerate(rows.items()):
            lines.append(" | ".join(["", method, str(len(found)), *(texts[place] for texts in cells), ""]).strip())
        lines += ["", "<details><summary>commands</summary>", "", "```"]
        lines += [f"{command(name, method, 'DIR')}" for method in rows]
        parts.append("\n".join([*lines, "```", "", "</details>"]))
    return "\n\n".join(parts) + "\n"


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
