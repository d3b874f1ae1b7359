"""``results.json``: what a run has measured so far, in plain values."""

import json
import os
import platform
import resource
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from cl_lightning.loop import TaskLoop
    from cl_lightning.measures import AccuracyMatrix

SCHEMA = 1
_PACKAGES = ("cl-lightning", "torch", "lightning", "torchmetrics", "torchvision", "timm", "numpy", "scikit-learn")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def collect(loop: "TaskLoop") -> dict[str, Any]:
    """Results of the tasks that are finished.

    Keys: ``schema`` (int), ``strategy`` (import path), ``config`` (as it was resolved), ``seed``, ``tasks`` (name,
        class
    names and number of training and test samples of each), ``class_order`` (raw label of each logit column),
    ``fingerprints`` (hash of the data of each task), ``finished`` (number of tasks), ``matrix`` (accuracies, see
    ``AccuracyMatrix.to_dict``), ``measures`` (by name, after the last finished task), ``measures_per_task``, ``cost``
    (seconds per task, bytes kept, parameters, peak memory), ``versions``, ``hardware``.
    """
    stream, matrix, strategy = loop.stream, loop.matrix, loop.strategy
    finished = matrix.learned
    kept = strategy.bytes_kept()
    for callback in loop.trainer.callbacks:  # type: ignore[attr-defined]
        for kind, size in getattr(callback, "bytes_kept", dict)().items():
            kept[kind] = kept.get(kind, 0) + size
    return {
        "schema": SCHEMA,
        "strategy": f"{type(strategy).__module__}.{type(strategy).__qualname__}",
        "config": yaml.safe_load(loop.config) if loop.config else None,
        "seed": loop.seed,
        "tasks": [
            {
                "name": task.name,
                "classes": [stream.class_names[column] for column in task.columns],
                "train": len(stream.train[task.index]),
                "test": len(stream.test[task.index]),
            }
            for task in stream.tasks
        ],
        "class_order": list(stream.order),
        "fingerprints": loop.fingerprints,
        "finished": finished,
        "matrix": matrix.to_dict(),
        "measures": matrix.measures() if finished else {},
        "measures_per_task": [matrix.measures(t) for t in range(finished)],
        "cost": {
            "seconds": [{key: round(value, 4) for key, value in cost.items()} for cost in loop.costs],
            "bytes_kept": kept,
            "parameters": sum(parameter.numel() for parameter in strategy.network.parameters()),
            "peak_memory_bytes": _peak_memory(),
        },
        "versions": versions(),
        "hardware": hardware(loop),
    }


def hardware(loop: "TaskLoop") -> dict[str, Any]:
    """What the run ran on."""
    trainer = loop.trainer
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": device.type, "name": name, "processes": trainer.world_size, "threads": torch.get_num_threads()}


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    scale = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * scale


def summary(matrix: "AccuracyMatrix", task: int) -> dict[str, float]:
    """What is logged after a task."""
    values = {f"stream/{name}": value for name, value in matrix.measures(task).items()}
    for index, value in enumerate(matrix.R_ci[task].tolist()):
        if value == value:
            values[f"accuracy/task_{index:02d}"] = value
    return values


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON beside ``path`` and rename it, so that the file is whole at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, allow_nan=False)
    os.replace(name, path)


def show(content: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the accuracy matrix with the measures of a run as a table."""
    console = console or Console()
    matrix, finished = content["matrix"]["R_ci"], content["finished"]
    aware = content["matrix"]["R_ti"]
    method = content["strategy"].rpartition(".")[2]
    table = Table(title=f"{method}: accuracy in % on each task (columns) after each task (rows)")
    table.add_column("after task")
    many = finished > 10
    for index in [] if many else range(finished):
        table.add_column(str(index), justify="right")
    for name in ("all classes", "task known", "forgetting", "seconds"):
        table.add_column(name, justify="right")
    for t in range(finished):
        per_task = content["measures_per_task"][t]
        cells = [] if many else [_percent(value) for value in matrix[t][:finished]]
        seconds = content["cost"]["seconds"][t]
        spent = sum(seconds[key] for key in ("training", "statistics", "evaluation"))
        known = [value for value in aware[t][: t + 1] if value is not None]
        table.add_row(
            f"{t}  {content['tasks'][t]['name']}",
            *cells,
            _percent(per_task["average_accuracy"]),
            _percent(sum(known) / len(known)),
            _percent(per_task.get("forgetting")),
            f"{spent:.1f}",
        )
    console.print(table)
    measures = content["measures"]
    kept = sum(content["cost"]["bytes_kept"].values())
    console.print(
        f"last accuracy {_percent(measures['average_accuracy'])} %, average incremental accuracy "
        f"{_percent(measures['average_incremental_accuracy'])} %, forgetting {_percent(measures.get('forgetting'))} %, "
        f"kept between tasks {kept / 2**20:.2f} MiB"
    )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"
