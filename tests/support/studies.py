"""Studies whose runs are made up: a run that is started again goes on after the tasks that it has finished."""

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import yaml

from cl_lightning.study import Description, Program
from cl_lightning.study.command import main
from cl_lightning.study.definition import parse
from support.reports import ER, content

TASKS = 3
SECONDS = 0.05  # per task


def options_of(arguments):
    """Options of a command by key."""
    pairs = (argument.removeprefix("--").partition("=") for argument in arguments if argument.startswith("--"))
    return {key: value for key, _, value in pairs}


def run(arguments):
    """A run of three tasks; each task adds a line to ``tasks.txt`` with its number and the process.

    With ``model.gate`` the second task waits for a file ``go`` in the working directory, or for SIGTERM; with
    ``model.patient`` those of a lower ``model.level`` do.
    """
    options = options_of(arguments)
    folder, seed = Path(options["run_dir"]), int(options["seed_everything"])
    folder.mkdir(parents=True, exist_ok=True)
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    level = float(options.get("model.level", 0.5))
    if level > 1:
        print("error: model.level must be at most 1")
        return 2
    lines = folder / "tasks.txt"
    finished = len(lines.read_text().splitlines()) if lines.exists() else 0
    last = int(options.get("loop.stop_after_task", TASKS - 1)) + 1
    for task in range(finished, last):
        end = time.monotonic() + SECONDS
        gated = task == 1 and ("model.gate" in options or level < float(options.get("model.patient", 0)))
        while time.monotonic() < end or (gated and not Path("go").exists()):
            if stopped:
                return 143
            time.sleep(0.01)
        with lines.open("a") as file:
            file.write(f"{task} {os.getpid()}\n")
        made = content(ER, seed, level=level, finished=task + 1)
        part = made["continual_evaluation"]
        weight = float(options.get("model.weight", 0))
        part["split"] = options.get("trainer.callbacks.split", "test")
        part["accuracy"] = [
            [level - weight / 10 if i == n // 2 else level / 2 if i < n // 2 else None for i in range(task + 1)]
            for n in range(2 * (task + 1))
        ]
        draft = folder / "draft.json"
        draft.write_text(json.dumps(made))
        draft.rename(folder / "results.json")
    return 0


def describe(arguments):
    """Any option of ``model`` apart from ``model.wrong`` exists."""
    options = options_of(arguments)
    if "model.wrong" in options:
        raise ValueError("ER takes no 'wrong'")
    classes = tuple("abcdef") if "a" in arguments else tuple("uvwxyz")
    held = 5 if float(options.get("data.val_fraction", 0)) > 0 else 0
    kept = [a for a in arguments if not a.startswith("--seed_everything")]
    return Description(config=" ".join(kept), classes=classes, tasks=TASKS, validation=(held,) * TASKS)


PROGRAM = Program("python -m cl_lightning", run, describe)


def study(folder, *arguments):
    """``study`` in this process, in a folder; output goes to ``said.txt``, and the process ends with its exit code."""
    os.chdir(folder)
    with open("said.txt", "a", buffering=1) as said:
        for descriptor in (1, 2):
            os.dup2(said.fileno(), descriptor)
    os._exit(main(arguments, PROGRAM))


def write(folder, **changes):
    """A study file with two methods and two seeds on the stream ``b``."""
    known = {"data": ["b"], "methods": ["finetune", "er"], "seeds": [0, 1], **changes}
    (folder / "s.yaml").write_text(yaml.safe_dump(known))
    return parse(known, "s.yaml")


def done_tasks(folder):
    """Number and process of each task that was carried out, by folder of the run relative to the study."""
    found = {}
    for path in sorted((folder / "studies" / "s").glob("**/tasks.txt")):
        pairs = [line.split() for line in path.read_text().splitlines()]
        place = str(path.parent.relative_to(folder / "studies" / "s"))
        found[place] = SimpleNamespace(tasks=[int(t) for t, _ in pairs], processes=[int(p) for _, p in pairs])
    return found
