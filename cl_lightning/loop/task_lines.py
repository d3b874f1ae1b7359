"""``results.jsonl``: one line for each task of a long stream, so that what is measured once is written once.

``results.json`` grows with the square of the number of tasks. In a stream of more than ``SHORT`` tasks it is therefore
written at the start and at the end of a process only; in between, each finished task adds a line to ``results.jsonl``.
``cl_lightning.report.unfinished`` joins the two after a crash.
"""

import json
import os
from pathlib import Path
from typing import Any

from cl_lightning.loop.run import Run

SHORT = 50  # tasks; the whole file of so many takes milliseconds
NAME = "results.jsonl"
_ROWS = ("R_ci", "R_ti", "R_prefix", "R_ece", "per_class")


class TaskLines:
    """Lines of the tasks that finished since ``results.json`` was written; called on one process.

    Args:
        path: The file.
        first: Index of the first task that gets a line.
    """

    def __init__(self, path: Path, first: int = 0) -> None:
        self.path, self.next = path, first
        self._end = 0  # bytes of whole lines; a write that failed may have left a part of one behind them

    def add(self, run: Run) -> None:
        """Append the lines of all tasks that have finished and have none yet.

        Raises:
            OSError: If the file cannot be written; the lines are then written with the next call.
        """
        finished = len(run.measured)
        lines = [json.dumps(line(run, task), allow_nan=False) + "\n" for task in range(self.next, finished)]
        content = "".join(lines).encode()
        with self.path.open("r+b" if self._end else "wb") as file:
            file.seek(self._end)
            file.truncate()
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self._end, self.next = self._end + len(content), finished


def line(run: Run, task: int) -> dict[str, Any]:
    """What a finished task adds to ``results.json``.

    Returns:
        ``task``; ``rows``: the entry of this task in each list with one entry per task, by the dotted key of the list;
        ``now``: new values by dotted key. Rows of matrices end with their last number.
    """
    matrix, cost = run.matrix, run.meter.tasks[task]
    rows: dict[str, Any] = {f"matrix.{name}": _numbers(getattr(matrix, name)[task].tolist()) for name in _ROWS}
    rows |= {f"cost.{name}": value for name, value in run.meter.of_task(task).items()}
    rows["matrix.online_error"] = _number(float(matrix.online_error[task]))
    rows["matrix.unknown_auroc"] = _number(float(matrix.unknown_auroc[task]))
    rows["matrix.totals"] = int(matrix.totals[task])
    rows["measures_per_task"] = run.measured[task]
    rows |= {"protocol.epochs": dict(cost.epochs), "protocol.steps": cost.steps}
    now: dict[str, Any] = {f"cost.{name}": value for name, value in run.meter.so_far().items()}
    now |= {"measures": run.measured[task], "per_class": rows["matrix.per_class"], "confusion": None}
    return {"task": task, "rows": rows, "now": now}


def _numbers(row: list[float]) -> list[float | None]:
    numbers = [_number(value) for value in row]
    while numbers and numbers[-1] is None:
        numbers.pop()
    return numbers


def _number(value: float) -> float | None:
    return value if value == value else None
