"""The manifest of a stream: JSON that any program can read, and that is checked when it is loaded."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

import numpy as np

from cl_lightning.files import read_text
from cl_lightning.hashing import IntArray
from cl_lightning.stream.tasks import Segment, Shift, number_tasks


class HasHashes(Protocol):
    @property
    def hashes(self) -> Sequence[str]: ...


S = TypeVar("S", bound=HasHashes)
FORMAT, VERSION = "cl_lightning.stream", 1


def parse(path: str | Path) -> Any:
    """JSON of a file.

    Raises:
        ValueError: If the file cannot be read or is not JSON.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a number")

    try:
        return json.loads(read_text(path), parse_constant=refuse)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: not a manifest: nested too deeply") from error
    except ValueError as error:  # malformed JSON or UTF-8, or an integer of thousands of digits
        raise ValueError(f"{path}: not JSON: {' '.join(str(error).split())}") from error


class _Fields:
    """A JSON object with type-checked access to its fields."""

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, dict):
            raise ValueError(f"{where}must be an object, got {type(data).__name__}")
        self.data, self.where = data, where

    def fail(self, name: str, problem: str) -> NoReturn:
        raise ValueError(f"{self.where}{name}: {problem}")

    def take(self, name: str, *types: type) -> Any:
        if name not in self.data:
            self.fail(name, "the field is missing")
        value = self.data[name]
        if type(value) not in types:  # not isinstance: True is not an integer here
            expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
            self.fail(name, f"must be {expected}, got {type(value).__name__}")
        return value

    def natural(self, name: str, low: int = 0) -> int:
        value: int = self.take(name, int)
        if not low <= value < 2**63:
            self.fail(name, f"must be at least {low}, got {value}" if value < low else "is beyond 64 bits")
        return value

    def plain(self, name: str) -> dict[str, Any]:
        """An object that can be written as JSON again: finite numbers, and not nested too deeply."""
        value: dict[str, Any] = self.take(name, dict)
        try:
            json.dumps(value, allow_nan=False)
        except RecursionError:
            self.fail(name, "is nested too deeply")
        except ValueError:
            self.fail(name, "holds a number that is not finite")
        return value

    def many(self, name: str, kind: type) -> list[Any]:
        values: list[Any] = self.take(name, list)
        wrong = set(map(type, values)) - {kind}
        if wrong:
            self.fail(name, f"must hold {kind.__name__} only, got {sorted(w.__name__ for w in wrong)[0]}")
        return values

    def indices(self, name: str, *, optional: bool = False) -> IntArray:
        if optional and name not in self.data:
            return np.empty(0, np.int64)
        values = self.many(name, int)
        try:
            return np.array(values, np.int64)
        except OverflowError:
            self.fail(name, "an index is beyond 64 bits")


def _shift(task: _Fields) -> Shift | None:
    pair = task.take("shift", list, type(None))
    if pair is None:
        return None
    if len(pair) != 2 or not isinstance(pair[0], str):
        task.fail("shift", "must be null or [kind, value]")
    try:
        return Shift(*pair)
    except (ValueError, OverflowError) as error:  # an integer beyond the range of floats overflows
        task.fail("shift", str(error))


def _read(data: Any, make: Callable[..., S]) -> S:
    top = _Fields(data, "")
    if top.take("format", str) != FORMAT:
        top.fail("format", f"is {top.data['format']!r}; a manifest has {FORMAT!r}")
    if top.take("version", int) != VERSION:
        top.fail("version", f"is {top.data['version']}; this release reads version {VERSION}")
    parts = []
    for index, item in enumerate(top.many("parts", dict)):
        part = _Fields(item, f"part {index}: ")
        fraction = part.take("val_fraction", float, int)
        if not 0 <= fraction < 1:
            part.fail("val_fraction", f"must be at least 0 and below 1, got {fraction}")
        parts.append(Segment(part.natural("tasks", 1), part.take("seed", int), float(fraction)))
    if not parts:
        top.fail("parts", "must hold at least one part")
    items = [_Fields(item, f"task {index}: ") for index, item in enumerate(top.many("tasks", dict))]
    if not items:
        top.fail("tasks", "must hold at least one task")
    for index, task in enumerate(items):
        if task.take("index", int) != index:
            task.fail("index", f"is {task.data['index']}; tasks must be in order")
        classes = task.indices("classes")
        if classes.size and classes.min() < 0:
            task.fail("classes", f"has the negative label {classes.min()}")
        if len(np.unique(classes)) != len(classes):
            task.fail("classes", "has a label twice")
    order = tuple(top.many("order", int))
    tasks, arrival = number_tasks(
        [item.data["classes"] for item in items],
        [item.take("name", str) for item in items],
        list(map(_shift, items)),
        [item.take("request", str) if "request" in item.data else "learn" for item in items],
    )
    if order != arrival:
        top.fail("order", "is not the order in which the classes of the tasks arrive")
    stream = make(
        tasks=tasks,
        train=tuple(item.indices("train") for item in items),
        val=tuple(item.indices("val") for item in items),
        test=tuple(item.indices("test") for item in items),
        order=order,
        class_names=tuple(top.many("class_names", str)),
        unlabelled=tuple(item.indices("unlabelled") for item in items),
        noisy=tuple(item.indices("noisy", optional=True) for item in items),
        given=tuple(item.indices("given", optional=True) for item in items),
        parts=tuple(parts),
        one_pass=top.take("one_pass", bool),
        batch_size=None if top.take("batch_size", int, type(None)) is None else top.natural("batch_size", 1),
        passes=top.natural("passes", 1),
        scenario=top.plain("scenario"),
    )
    for item, digest in zip(items, stream.hashes, strict=True):
        if item.take("hash", str) != digest:
            item.fail("hash", "does not match the classes and indices: the manifest was changed after it was written")
    return stream


def read(data: Any, source: str, make: Callable[..., S]) -> S:
    """The stream of a manifest, built by ``make`` from its fields.

    Raises:
        ValueError: If it has another format, is malformed, or was changed since it was written; names ``source``.
    """
    try:
        return _read(data, make)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
