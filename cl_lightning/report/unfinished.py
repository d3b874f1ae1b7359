"""Joins ``results.json`` of a long run that did not end in order with the lines of the tasks since it was written."""

import json
from pathlib import Path
from typing import Any

from cl_lightning.files import read_text

LINES = "results.jsonl"
"""A copy of the name in ``cl_lightning.loop.task_lines``, whose import of torch takes seconds."""


def joined(data: Any, folder: Path) -> Any:
    """The content of ``results.json`` with the tasks that have a line in ``results.jsonl``.

    Lines are joined in the order of their tasks, from the first unfinished one, up to a line that is incomplete or no
    line of the next task. Without such a file the content is returned as it is.
    """
    path = folder / LINES
    if not isinstance(data, dict) or not path.is_file():
        return data
    try:
        lines = read_text(path, errors="replace").splitlines()
    except OSError:
        return data
    tasks = data.get("tasks")
    if not isinstance(tasks, list):
        return data
    for text in lines:
        try:
            line = json.loads(text, parse_constant=_refuse)
            task, rows, now = line["task"], line["rows"].items(), line["now"].items()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            break
        if type(task) is not int or task >= len(tasks):
            break
        if task != data.get("finished"):
            continue
        for key, value in rows:
            part, name = _place(data, key)
            before = part[name] if isinstance(part.get(name), list) else []
            part[name] = [*before[:task], *([None] * (task - len(before))), value]
        for key, value in now:
            part, name = _place(data, key)
            part[name] = value
        data["finished"] = task + 1
    matrices = data.get("matrix")
    for name, matrix in matrices.items() if isinstance(matrices, dict) else ():
        if name.startswith("R_") and isinstance(matrix, list):
            for row in matrix:
                if isinstance(row, list):  # a row ends with its last number in a line, and with its task in the file
                    row += [None] * (len(tasks) - len(row))
    return data


def _place(data: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The object that a dotted key names, which is created where it is missing, and the name in it."""
    *parts, name = key.split(".")
    for part in parts:
        inner = data.get(part)
        if not isinstance(inner, dict):
            inner = data[part] = {}
        data = inner
    return data, name


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a number")
