"""What a study saves: twelve runs of the size of the quickstart by commands, by a study, and in a loop in one process.

    python -m benchmarks.study
    python -m benchmarks.study --epochs 1 --workers 2

All ways carry out the same runs with one thread each. The loop is the least that one process can take: it imports once,
and its runs share a process, so that the failure of one ends all. The goal is a study with one worker in at most 0.4 of
the time of the commands. Seconds of the processor are printed too, since they do not depend on what else the machine
does.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

GOAL = 0.4
METHODS = ("Finetune", "ER", "LwF")
SEEDS = range(4)
ROOT = Path(__file__).parents[1]
_LOOP = """
import json, sys
from cl_lightning.cli import main
for arguments in json.loads(sys.argv[1]):
    code = main(arguments)
    if code:
        sys.exit(code)
"""


def commands(epochs: int) -> list[list[str]]:
    """Arguments of the runs, without their folders."""
    return [
        ["fit", "--data=Digits", f"--model={method}", f"--trainer.max_epochs={epochs}", f"--seed_everything={seed}"]
        for seed in SEEDS
        for method in METHODS
    ]


def by_commands(folder: Path, epochs: int) -> None:
    """One command after another."""
    for index, arguments in enumerate(commands(epochs)):
        call(folder, "-m", "cl_lightning", *arguments, f"--run_dir=commands/{index}")


def by_loop(folder: Path, epochs: int) -> None:
    """All runs in one process."""
    runs = [[*arguments, f"--run_dir=loop/{index}"] for index, arguments in enumerate(commands(epochs))]
    call(folder, "-c", _LOOP, json.dumps(runs))


def by_study(folder: Path, epochs: int, workers: int) -> None:
    """A study."""
    content = {
        "name": f"study_{workers}",
        "data": [{"name": "digits", "options": {"data": "Digits"}}],
        "methods": [{"name": method.lower(), "options": {"model": method}} for method in METHODS],
        "seeds": list(SEEDS),
        "options": {"trainer.max_epochs": epochs},
    }
    (folder / "study.yaml").write_text(json.dumps(content), encoding="utf-8")
    call(folder, "-m", "cl_lightning", "study", "study.yaml", f"--workers={workers}")


def call(folder: Path, *arguments: str) -> None:
    """Run Python in a folder with one thread, and require that it succeeds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)[:200]} has failed:\n{done.stderr[-2000:]}")


def timed(way: Callable[[], None]) -> tuple[float, float]:
    """Seconds on the clock, and of the processor, with all child processes."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    way()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return time.perf_counter() - began, processor


def main(args: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5, help="epochs per task (default: those of the quickstart)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of workers (default: 1 2)")
    options = parser.parse_args(args)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ways: dict[str, Callable[[], None]] = {
            "twelve commands": lambda: by_commands(folder, options.epochs),
            "a loop in one process": lambda: by_loop(folder, options.epochs),
        }
        for workers in options.workers:
            label = f"a study, {workers} worker{'s' if workers > 1 else ''}"
            ways[label] = lambda workers=workers: by_study(folder, options.epochs, workers)
        found = {}
        for label, way in ways.items():
            found[label] = timed(way)
            clock, processor = (found[label][i] / found["twelve commands"][i] for i in (0, 1))
            print(
                f"{label:<24}{found[label][0]:8.1f} s  {clock:5.2f} of the commands; "
                f"processor {found[label][1]:7.1f} s  {processor:5.2f}",
                flush=True,
            )
    if (one := found.get("a study, 1 worker")) is not None:
        share = one[0] / found["twelve commands"][0]
        print(f"goal: one worker in at most {GOAL}: {'reached' if share <= GOAL else 'missed'} ({share:.2f})")


if __name__ == "__main__":
    main()
