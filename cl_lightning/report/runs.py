"""Reads what runs have written, and checks all of it: a file may be half-written, foreign, edited or outdated.

What a report cannot do without makes a run unusable, and is told in one line; what it can do without is left out, and
told as well.
"""

import json
import math
import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn, TypeVar

OLDEST, NEWEST = 1, 2
"""The schemas of ``cl_lightning.results`` that can be read; without importing it, since torch takes seconds."""
FILE = "results.json"
KINDS = ("training", "statistics", "evaluation")
"""What the seconds of a method are spent on."""
SAVING = "saving"
"""Seconds of writing checkpoints, which are no part of a method."""

_LONGEST = 300  # characters of a text
_DEEPEST = 40  # levels of a configuration
_STARTED = ("config.yaml", "manifest.json")  # what a run writes before its first results

T = TypeVar("T")
D = TypeVar("D")
Parser = Callable[[Any], T]
Matrix = tuple[tuple[float | None, ...], ...]


class UnusableRunError(ValueError):
    """A folder that no report can be made of; the message says why, in one line, without the folder."""


class _MalformedError(ValueError):
    """A value that is not what it should be; the message says what it should be."""


@dataclass(frozen=True)
class Problem:
    """Something that the reader of a report should know of.

    Attributes:
        place: The folder or file, as it is shown.
        text: What is wrong, in one line.
    """

    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


def gathered(problems: Sequence[Problem]) -> list[Problem]:
    """The problems, those of the same text as one, in the order in which they came."""
    places: dict[str, list[str]] = {}
    for problem in problems:
        places.setdefault(problem.text, []).append(problem.place)
    return [
        Problem(", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else ""), text)
        for text, found in places.items()
    ]


@dataclass(frozen=True)
class TaskInfo:
    """A task of a stream: its name, its classes in order of arrival, its numbers of samples, its columns."""

    name: str
    classes: tuple[str, ...]
    train: int
    test: int
    val: int = 0
    columns: tuple[int, ...] = ()


@dataclass(frozen=True)
class Protocol:
    """How the numbers of a run came about, as far as its file says; None or empty is not known.

    Attributes:
        scenario: How the data were dealt out, flat, as a configuration.
        epochs: Of each finished task, by phase.
        steps: Optimizer steps of each finished task.
        texts: All else, as text by name.
        test_data_use: What test data was used for.
    """

    scenario: Mapping[str, str]
    epochs: tuple[Mapping[str, int], ...]
    steps: tuple[int, ...]
    texts: Mapping[str, str]
    test_data_use: tuple[str, ...]


@dataclass(frozen=True)
class Curves:
    """Accuracies at many points during training, on the classes seen by then.

    Attributes:
        steps: Optimizer steps at each evaluation.
        tasks: Task that was being learnt.
        accuracy: On each task (columns) at each evaluation (rows), in [0, 1]; None before a task has come.
        samples: Test samples per task.
        measures: By name.
        split: Which data it was evaluated on.
    """

    steps: tuple[int, ...]
    tasks: tuple[int, ...]
    accuracy: Matrix
    samples: tuple[int, ...]
    measures: Mapping[str, float]
    split: str

    def starts(self) -> list[int]:
        """Steps at which a task began, but for the first."""
        changes = zip(self.steps[1:], self.tasks[1:], self.tasks[:-1], strict=True)
        return [step for step, now, before in changes if now != before]

    def average(self) -> list[float | None]:
        """Accuracy on all samples of the classes seen by then, at each evaluation."""
        averages: list[float | None] = []
        for row in self.accuracy:
            known = [(value, count) for value, count in zip(row, self.samples, strict=True) if value is not None]
            total = sum(count for _, count in known)
            averages.append(sum(value * count for value, count in known) / total if total else None)
        return averages


@dataclass(frozen=True)
class Run:
    """What a run has written, checked.

    Attributes:
        folder: Where it lies.
        name: The folder as it is shown.
        schema: Version of the file.
        strategy: Import path of the method.
        config: The configuration, flat: text by dotted key; None if the run did not come from a configuration.
        seed: Of everything that was drawn; None if it is not known.
        data_seed: Of the data, where they have one of their own.
        tasks: All tasks of the stream, also those to come.
        class_order: Raw label of each column.
        class_names: Name of the class of each column; two classes may have the same.
        fingerprints: Hash of the data of each task, as far as the file has them.
        order_hash: Of the order of the classes; empty if it is not known.
        finished: Number of tasks that were learnt and evaluated.
        accuracy: R[t, i] in [0, 1], ``finished`` rows and columns; None where it was not measured.
        accuracy_known: The same with the task known; None if the file does not have it.
        calibration: Expected calibration error in [0, 1] after task t on task i; None if it was not measured.
        per_class: Accuracy on the class of each column after the last finished task; empty if it is not known.
        confusion: Test samples by true (rows) and predicted column after the last finished task; None if not known.
        measures: After each finished task, by name.
        seconds: Spent on each finished task, by kind.
        images_per_second: Of the stream, in the training of each finished task; empty if it is not known.
        bytes_kept: What was kept between tasks, by kind; the most of any process.
        bytes_per_process: The same of each process, if there are several.
        budget: Network and exemplars in 2^20 bytes, as memory budgets count them; None if it is not known.
        parameters, trainable: Number of weights of the network, and of those trained last.
        peak_memory: In bytes.
        flops: Operations of one prediction.
        protocol: How the numbers came about.
        curves: Evaluations during training; None if there were none.
        versions, hardware: What the run ran with, and on, as text by name.
        written: When the file was, in seconds; 0 if that is not known.
        notes: What the file has, but not in a form that can be used.
    """

    folder: Path
    name: str
    schema: int
    strategy: str
    config: Mapping[str, str] | None
    seed: int | None
    data_seed: int | None
    tasks: tuple[TaskInfo, ...]
    class_order: tuple[int, ...]
    class_names: tuple[str, ...]
    fingerprints: tuple[str, ...]
    order_hash: str
    finished: int
    accuracy: Matrix
    accuracy_known: Matrix | None
    calibration: Matrix | None
    per_class: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...] | None
    measures: tuple[Mapping[str, float], ...]
    seconds: tuple[Mapping[str, float], ...]
    images_per_second: tuple[float | None, ...]
    bytes_kept: Mapping[str, int]
    bytes_per_process: tuple[Mapping[str, int], ...]
    budget: float | None
    parameters: int | None
    trainable: int | None
    peak_memory: int | None
    flops: int | None
    protocol: Protocol
    curves: Curves | None
    versions: Mapping[str, str]
    hardware: Mapping[str, str]
    written: float = field(default=0.0, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def method(self) -> str:
        """Name of the class of the strategy."""
        return self.strategy.rpartition(".")[2] or self.strategy

    @property
    def complete(self) -> bool:
        return self.finished == len(self.tasks)

    @property
    def draw(self) -> tuple[str, str]:
        """What runs are paired by: the seed, and that of the data where it has one of its own."""
        own = "" if self.data_seed in (None, self.seed) else str(self.data_seed)
        return "" if self.seed is None else str(self.seed), own

    @property
    def last(self) -> Mapping[str, float]:
        """Measures after the last finished task, by name."""
        return self.measures[-1] if self.measures else {}

    @property
    def total_seconds(self) -> float | None:
        """Spent on the training, statistics and evaluation of all finished tasks."""
        return math.fsum(task.get(kind, 0.0) for task in self.seconds for kind in KINDS) if self.seconds else None

    @property
    def bounds(self) -> list[int]:
        """Number of classes after each task."""
        if all(task.columns for task in self.tasks):
            return list(accumulate((max(task.columns) + 1 for task in self.tasks), max))
        known: dict[str, None] = {}
        return [len(known := known | dict.fromkeys(task.classes)) for task in self.tasks]

    @property
    def total_bytes(self) -> int | None:
        """Kept between tasks beside the network; None if it is not known."""
        return sum(self.bytes_kept.values()) if self.finished else None


# ---------------------------------------------------------------------- values, checked


def clean(value: str) -> str:
    """A text that can be printed in one line and written as UTF-8, cut where it is very long."""
    plain = value.encode("utf-8", "replace").decode("utf-8")
    plain = "".join(" " if unicodedata.category(mark) in ("Cc", "Zl", "Zp") else mark for mark in plain)
    return plain if len(plain) <= _LONGEST else f"{plain[: _LONGEST - 1]}…"


def text(value: Any) -> str:
    if not isinstance(value, str):
        _refuse("a text", value)
    return clean(value)


def number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _refuse("a number", value)
    if not abs(value) < 1e18:  # also nan; an integer may lie beyond the range of floats
        _refuse("a finite number", value)
    return float(value)


def share(value: Any) -> float:
    if not 0 <= number(value) <= 1:
        _refuse("a number in [0, 1]", value)
    return float(value)


def positive(value: Any) -> float:
    if number(value) < 0:
        _refuse("a number from 0", value)
    return float(value)


def natural(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        _refuse("a whole number from 0", value)
    return value


def whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**64:
        _refuse("a whole number", value)
    return value


def maybe(item: Parser[T]) -> Parser[T | None]:
    return lambda value: None if value is None else item(value)


def many(item: Parser[T]) -> Parser[tuple[T, ...]]:
    def parse(value: Any) -> tuple[T, ...]:
        if not isinstance(value, list):
            _refuse("a list", value)
        return tuple(_inside(str(index), item, entry) for index, entry in enumerate(value))

    return parse


def by_name(item: Parser[T]) -> Parser[dict[str, T]]:
    def parse(value: Any) -> dict[str, T]:
        return {clean(key): _inside(clean(key), item, entry) for key, entry in _object(value).items()}

    return parse


def square(item: Parser[T], size: int) -> Parser[tuple[tuple[T, ...], ...]]:
    """The first rows and columns of a matrix that is at least so large."""

    def parse(value: Any) -> tuple[tuple[T, ...], ...]:
        if not isinstance(value, list) or any(not isinstance(row, list) or len(row) < size for row in value[:size]):
            _refuse(f"a matrix of at least {size} rows and columns", value)
        if len(value) < size:
            _refuse(f"a matrix of at least {size} rows and columns", value)
        return many(many(item))([row[:size] for row in value[:size]])

    return parse


def flat(value: Any) -> dict[str, str]:
    """A configuration as text by dotted key; a list of plain values is one text."""
    entries = dict(_leaves(_object(value), "", 0))
    return {clean(key): clean(entry) for key, entry in entries.items()}


def _leaves(value: Any, key: str, depth: int) -> Iterator[tuple[str, str]]:
    if depth > _DEEPEST:
        raise _MalformedError(f"must not be nested deeper than {_DEEPEST} levels")
    start = f"{key}." if key else ""
    if isinstance(value, dict):
        for name, entry in value.items():
            yield from _leaves(entry, f"{start}{name}", depth + 1)
    elif isinstance(value, list) and any(isinstance(entry, (dict, list)) for entry in value):
        for index, entry in enumerate(value):
            yield from _leaves(entry, f"{start}{index}", depth + 1)
    elif value is not None:  # what is not set is not written either, where a configuration is saved
        yield key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        _refuse("an object", value)
    return value


def _inside(name: str, item: Parser[T], value: Any) -> T:
    try:
        return item(value)
    except _MalformedError as error:
        inner = str(error)
        raise _MalformedError(f"{name}.{inner}" if not inner.startswith("must") else f"{name} {inner}") from None


def _refuse(expected: str, value: Any) -> NoReturn:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        raise _MalformedError(f"must be {expected}, is {value:.6g}" if abs(value) < 1e18 else f"must be {expected}")
    raise _MalformedError(f"must be {expected}, is {kinds.get(type(value), type(value).__name__)}")


class _Object:
    """A JSON object whose fields are taken out and checked."""

    def __init__(self, data: dict[str, Any], where: str, notes: list[str]) -> None:
        self.data, self.where, self.notes = data, where, notes

    def need(self, name: str, item: Parser[T]) -> T:
        """A field that there must be."""
        if name not in self.data:
            raise UnusableRunError(f"{FILE} has no field {self.where}{name}")
        try:
            return _inside(f"{self.where}{name}", item, self.data[name])
        except _MalformedError as error:
            raise UnusableRunError(f"{FILE}: {error}") from None

    def ask(self, name: str, item: Parser[T], default: D) -> T | D:
        """A field that may be missing; one that is there but malformed is noted, and counts as missing."""
        if self.data.get(name) is None:
            return default
        try:
            return _inside(f"{self.where}{name}", item, self.data[name])
        except _MalformedError as error:
            self.notes.append(f"{FILE}: {error}; left out")
            return default

    def part(self, name: str) -> "_Object":
        """An object inside, empty if it is missing."""
        return _Object(self.ask(name, _object, {}), f"{self.where}{name}.", self.notes)


# ---------------------------------------------------------------------- files


def load(paths: Sequence[str]) -> tuple[list[Run], list[Problem]]:
    """The runs at and below some paths, each once, in the order given, and what is wrong with the others."""
    folders, problems = find(paths)
    runs = []
    for folder in folders:
        try:
            run = read(folder)
        except UnusableRunError as error:
            problems.append(Problem(clean(str(folder)), clean(str(error))))
            continue
        runs.append(run)
        problems += [Problem(run.name, note) for note in run.notes]
    return runs, problems


def find(paths: Sequence[str]) -> tuple[list[Path], list[Problem]]:
    """Folders that hold results: the given ones, or those below them by name; and what is wrong with the others."""
    folders: dict[Path, Path] = {}  # by what they resolve to, so that each comes once
    problems = []
    for given in paths:
        path, shown = Path(given), clean(given)
        if path.is_file() and path.suffix == ".json":
            path = path.parent
        if not path.exists():
            problems.append(Problem(shown, "there is no such folder"))
            continue
        if not path.is_dir():
            problems.append(Problem(shown, "is a file; give the folder of a run"))
            continue
        count = 0
        for folder, names in _folders(path):
            if FILE in names:
                folders.setdefault(folder.resolve(), folder)
            elif any(name in names for name in _STARTED):
                problems.append(Problem(clean(str(folder)), f"holds no {FILE}: the run ended before its first task"))
            else:
                continue
            count += 1
        if count == 0:
            problems.append(Problem(shown, f"is not a run, and holds none: there is no {FILE} in it"))
    return list(folders.values()), problems


def _folders(path: Path) -> Iterator[tuple[Path, set[str]]]:
    """A folder of a run, or all those below, with the names of their files; hidden ones are passed over."""
    for folder, below, names in os.walk(path):
        below[:] = [] if FILE in names else sorted(name for name in below if not name.startswith("."))
        yield Path(folder), set(names)


def read(folder: Path) -> Run:
    """The run in a folder.

    Raises:
        UnusableRunError: It is not a run of this program, or not one that can be read.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a number")

    try:
        data = json.loads((folder / FILE).read_text(encoding="utf-8"), parse_constant=refuse)
        written = (folder / FILE).stat().st_mtime
    except OSError as error:
        raise UnusableRunError(f"{FILE} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UnusableRunError(f"{FILE} is not UTF-8 text") from None
    except RecursionError:
        raise UnusableRunError(f"{FILE} is nested too deeply") from None
    except ValueError as error:
        raise UnusableRunError(f"{FILE} is not JSON: {clean(str(error))}") from None
    return replace(parse(data, folder), written=written)


def parse(data: Any, folder: Path) -> Run:
    """A run from the content of its file.

    Raises:
        UnusableRunError: It is not a run of this program, or not one that can be read.
    """
    if not isinstance(data, dict) or "schema" not in data:
        raise UnusableRunError(f"{FILE} was not written by cl_lightning: it has no field schema")
    notes: list[str] = []
    top = _Object(data, "", notes)
    schema = top.need("schema", whole)
    if schema > NEWEST:
        raise UnusableRunError(
            f"{FILE} has schema {schema}, of a newer cl_lightning; this one reads {OLDEST} to {NEWEST}"
        )
    if schema < OLDEST:
        raise UnusableRunError(
            f"{FILE} has schema {schema}, of an older cl_lightning; this one reads {OLDEST} to {NEWEST}"
        )
    if schema < NEWEST:
        notes.append(f"{FILE} has the older schema {schema}; what is new in {NEWEST} is missing")
    strategy = top.need("strategy", text)
    tasks = top.need("tasks", many(lambda entry: _task(entry, notes)))
    finished = top.need("finished", natural)
    if finished > len(tasks):
        raise UnusableRunError(f"{FILE}: finished is {finished}, of {len(tasks)} tasks")
    matrix, cost, seeds = top.part("matrix"), top.part("cost"), top.part("seeds")
    entries: Parser[Matrix | None] = square(maybe(share), finished)
    accuracy: Matrix = ()
    if finished:
        accuracy = matrix.need("R_ci", square(maybe(share), finished))
    measures: tuple[dict[str, float], ...] = top.ask("measures_per_task", many(by_name(number)), ())
    if measures and len(measures) < finished:
        notes.append(f"{FILE}: measures_per_task has {len(measures)} entries, of {finished} tasks; left out")
        measures = ()
    if finished and not measures:  # the curves are lost, not what came out
        measures = (*({} for _ in range(finished - 1)), top.ask("measures", by_name(number), {}))
    return Run(
        folder=folder,
        name=clean(str(folder)),
        schema=schema,
        strategy=strategy,
        config=top.ask("config", flat, None),
        seed=top.ask("seed", maybe(whole), None),
        data_seed=seeds.ask("data", maybe(whole), None),
        tasks=tasks,
        class_order=top.ask("class_order", many(whole), ()),
        class_names=top.ask("class_names", many(text), ()) or _class_names(tasks),
        fingerprints=top.ask("fingerprints", many(text), ()),
        order_hash=top.ask("order_hash", text, ""),
        finished=finished,
        accuracy=accuracy,
        accuracy_known=matrix.ask("R_ti", entries, None) if finished else None,
        calibration=matrix.ask("R_ece", entries, None) if finished else None,
        per_class=top.ask("per_class", many(maybe(share)), ()),
        confusion=top.ask("confusion", _confusion, None),
        measures=measures[:finished],
        seconds=_per_task(cost, "seconds", _seconds, finished),
        images_per_second=_per_task(cost, "images_per_second", maybe(positive), finished),
        bytes_kept=cost.ask("bytes_kept", by_name(natural), {}),
        bytes_per_process=cost.ask("bytes_kept_per_rank", many(by_name(natural)), ()),
        budget=cost.ask("memory_mb", maybe(positive), None) if finished else None,
        parameters=cost.ask("parameters", maybe(natural), None) or None,
        trainable=cost.ask("trainable_parameters", maybe(natural), None),
        peak_memory=cost.ask("peak_memory_bytes", maybe(natural), None) or None,
        flops=cost.ask("flops_per_image", maybe(natural), None),
        protocol=_protocol(top, finished),
        curves=_curves(top),
        versions=top.ask("versions", flat, {}),
        hardware=top.ask("hardware", flat, {}),
        notes=tuple(clean(note) for note in notes),
    )


def _task(value: Any, notes: list[str]) -> TaskInfo:
    entry = _Object(_object(value), "tasks.", notes)
    return TaskInfo(
        name=entry.need("name", text),
        classes=entry.need("classes", many(text)),
        train=entry.need("train", natural),
        test=entry.need("test", natural),
        val=entry.ask("val", natural, 0),
        columns=entry.ask("columns", many(natural), ()),
    )


def _seconds(value: Any) -> dict[str, float]:
    entry = _object(value)
    return {kind: _inside(kind, positive, entry[kind]) for kind in (*KINDS, SAVING) if kind in entry}


def _per_task(part: _Object, name: str, item: Parser[T], finished: int) -> tuple[T, ...]:
    """The entries of the finished tasks; empty if there are fewer."""
    entries = part.ask(name, many(item), ())
    return entries[:finished] if len(entries) >= finished else ()


def _class_names(tasks: Sequence[TaskInfo]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for task in tasks for name in task.classes))


def _confusion(value: Any) -> tuple[tuple[int, ...], ...]:
    return square(natural, len(value) if isinstance(value, list) else 0)(value)


def _protocol(top: _Object, finished: int) -> Protocol:
    part = top.part("protocol")
    typed = ("scenario", "epochs", "steps", "test_data_use")
    return Protocol(
        scenario=part.ask("scenario", flat, {}),
        epochs=_per_task(part, "epochs", by_name(natural), finished),
        steps=_per_task(part, "steps", natural, finished),
        texts=top.ask("protocol", lambda value: flat({k: v for k, v in _object(value).items() if k not in typed}), {}),
        test_data_use=part.ask("test_data_use", many(text), ()),
    )


def _curves(top: _Object) -> Curves | None:
    def parse(value: Any) -> Curves | None:
        notes: list[str] = []
        part = _Object(_object(value), "", notes)
        found = Curves(
            steps=part.ask("steps", many(natural), ()),
            tasks=part.ask("tasks", many(natural), ()),
            accuracy=part.ask("accuracy", many(many(maybe(share))), ()),
            samples=part.ask("samples", many(natural), ()),
            measures=part.ask("measures", by_name(number), {}),
            split=part.ask("split", text, ""),
        )
        sizes = {len(found.steps), len(found.tasks), len(found.accuracy)}
        if notes or len(sizes) > 1 or {len(row) for row in found.accuracy} != {len(found.samples)}:
            raise _MalformedError("must have as many steps and tasks as rows of accuracy, and samples as columns")
        return found

    return top.ask("continual_evaluation", parse, None)
