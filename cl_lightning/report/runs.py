"""Reads and checks the results of runs: a file may be incomplete, of another program, edited or outdated.

If a required field is missing or malformed, the run is unusable, and the reason is reported in one line. A malformed
optional field is left out and reported.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

from cl_lightning.files import read_text
from cl_lightning.report.fields import (
    FILE,
    Parser,
    T,
    UnusableRunError,
    _inside,
    _MalformedError,
    _Object,
    _object,
    at_most_one,
    clean,
    dict_of,
    flattened,
    fraction,
    integer,
    list_of,
    matrix_of,
    natural,
    non_negative,
    nullable,
    number,
    text,
)
from cl_lightning.report.unfinished import joined

OLDEST, NEWEST = 1, 2
"""Oldest and newest readable schema; a copy of ``cl_lightning.loop.results``, whose import of torch takes seconds."""
KINDS = ("training", "statistics", "evaluation")
"""Kinds of time that count for a method."""
SAVING = "saving"
"""Time for writing checkpoints, which does not count for a method."""
_STARTED = ("config.yaml", "manifest.json")  # files that a run writes before its first results
Matrix = tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class Problem:
    """A problem with a run, for the reader of a report.

    Attributes:
        place: The folder or file, as displayed.
        text: The problem, in one line.
    """

    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


def gathered(problems: Sequence[Problem]) -> list[Problem]:
    """The problems in order; problems of the same text are merged into one."""
    places: dict[str, list[str]] = {}
    for problem in problems:
        places.setdefault(problem.text, []).append(problem.place)
    return [
        Problem(", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else ""), text)
        for text, found in places.items()
    ]


@dataclass(frozen=True)
class TaskInfo:
    """A task of a stream: name, classes in order of arrival, numbers of samples, columns."""

    name: str
    classes: tuple[str, ...]
    train: int
    test: int
    val: int = 0
    columns: tuple[int, ...] = ()


@dataclass(frozen=True)
class Protocol:
    """The protocol of a run, as far as its file contains it; None or empty if not known.

    Attributes:
        scenario: Scenario of the stream, as a flat configuration.
        epochs: Epochs of each finished task, by phase.
        steps: Optimizer steps of each finished task.
        texts: All other fields, as text by name.
        test_data_use: Purposes that test data was used for.
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
        tasks: Task in training at each evaluation.
        accuracy: Accuracy on each task (columns) at each evaluation (rows), in [0, 1]; None for future tasks.
        samples: Number of test samples per task.
        measures: Measures of the curves, by name.
        split: Evaluated data: ``test`` or ``val``.
    """

    steps: tuple[int, ...]
    tasks: tuple[int, ...]
    accuracy: Matrix
    samples: tuple[int, ...]
    measures: Mapping[str, float]
    split: str

    def starts(self) -> list[int]:
        """Steps at which a task began, without the first task."""
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
    """The checked results of a run.

    Attributes:
        folder: Folder of the run.
        name: The folder, as displayed.
        schema: Schema version of the file.
        strategy: Import path of the method.
        config: The configuration, flat: text by dotted key; None if the run was not started from one.
        seed: Seed of all random numbers; None if not known.
        data_seed: Seed of the data, if it has a seed of its own.
        score: What the entries of the matrix are: accuracy, mIoU, mAP, R2.
        tasks: All tasks of the stream, including future tasks.
        class_order: Raw label of each column.
        class_names: Class name of each column; two classes may have the same name.
        fingerprints: Hash of the data of each task, as far as known.
        order_hash: Hash of the class order; empty if not known.
        finished: Number of tasks that are trained and evaluated.
        accuracy: R[t, i] in [0, 1], ``finished`` rows and columns; None where it was not measured.
        accuracy_known: The same with the task known; None if not in the file.
        calibration: Expected calibration error in [0, 1] after task t on task i; None if it was not measured.
        per_class: Accuracy on the class of each column after the last finished task; empty if not known.
        confusion: Test samples by true (rows) and predicted column after the last finished task; None if not known.
        measures: Measures after each finished task, by name.
        seconds: Time of each finished task in seconds, by kind.
        images_per_second: Training images of the stream per second in each finished task; empty if not known.
        bytes_kept: Bytes kept between tasks, by kind; the maximum over processes.
        bytes_per_process: The same for each process, if there are several.
        budget: Size of network and exemplars in 2^20 bytes (memory budget); None if not known.
        parameters, trainable: Number of weights of the network, and of weights trained in the last phase.
        peak_memory: Peak memory in bytes.
        flops: Floating-point operations of one prediction.
        protocol: Protocol of the run.
        curves: Evaluations during training; None without.
        plasticity: Measures of plasticity after each finished task, by name; empty without.
        versions, hardware: Software versions and hardware, as text by name.
        written: Modification time of the file in seconds; 0 if not known.
        notes: Malformed or missing optional fields of the file.
    """

    folder: Path
    name: str
    schema: int
    strategy: str
    config: Mapping[str, str] | None
    seed: int | None
    data_seed: int | None
    score: str
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
    plasticity: Mapping[str, tuple[float | None, ...]]
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
        """Key for pairing runs: the seed, and the seed of the data if it has one of its own."""
        own = "" if self.data_seed in (None, self.seed) else str(self.data_seed)
        return "" if self.seed is None else str(self.seed), own

    @property
    def last(self) -> Mapping[str, float]:
        """Measures after the last finished task, by name."""
        return self.measures[-1] if self.measures else {}

    @property
    def total_seconds(self) -> float | None:
        """Seconds of training, statistics and evaluation over all finished tasks."""
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
        """Bytes kept between tasks in addition to the network; None if not known."""
        return sum(self.bytes_kept.values()) if self.finished else None


def load(paths: Sequence[str]) -> tuple[list[Run], list[Problem]]:
    """The runs at and below the given paths, each once and in order, and the problems with the others."""
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
    """Folders with results, given or below a given folder (sorted by name), and the problems with the others."""
    folders: dict[Path, Path] = {}  # by resolved path, so that each occurs once
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
                problems.append(Problem(clean(str(folder)), f"has no {FILE}: the run ended before its first task"))
            else:
                continue
            count += 1
        if count == 0:
            problems.append(Problem(shown, f"neither is a run nor contains one: there is no {FILE} in it"))
    return list(folders.values()), problems


def _folders(path: Path) -> Iterator[tuple[Path, set[str]]]:
    """A folder and the folders below it, not below runs, with the names of their files; hidden folders are skipped."""
    for folder, below, names in os.walk(path):
        below[:] = [] if FILE in names else sorted(name for name in below if not name.startswith("."))
        yield Path(folder), set(names)


def read(folder: Path) -> Run:
    """The run in a folder.

    Raises:
        UnusableRunError: If it is not a run of this program, or cannot be read.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a number")

    try:
        data = joined(json.loads(read_text(folder / FILE), parse_constant=refuse), folder)
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
    schema = top.required("schema", integer)
    if schema > NEWEST:
        raise UnusableRunError(
            f"{FILE} has schema {schema}, of a newer cl_lightning; this version reads {OLDEST} to {NEWEST}"
        )
    if schema < OLDEST:
        raise UnusableRunError(
            f"{FILE} has schema {schema}, of an older cl_lightning; this version reads {OLDEST} to {NEWEST}"
        )
    if schema < NEWEST:
        notes.append(f"{FILE} has the older schema {schema}; the fields new in {NEWEST} are missing")
    strategy = top.required("strategy", text)
    tasks = top.required("tasks", list_of(lambda entry: _task(entry, notes)))
    finished = top.required("finished", natural)
    if finished > len(tasks):
        raise UnusableRunError(f"{FILE}: finished is {finished}, of {len(tasks)} tasks")
    matrix, cost, seeds = top.part("matrix"), top.part("cost"), top.part("seeds")
    entry = nullable(fraction)
    score = top.part("score").optional("title", text, "accuracy")
    if score != "accuracy":
        entry = nullable(at_most_one)
    entries: Parser[Matrix | None] = matrix_of(nullable(fraction), finished)
    accuracy: Matrix = ()
    if finished:
        accuracy = matrix.required("R_ci", matrix_of(entry, finished))
    measures: tuple[dict[str, float], ...] = top.optional("measures_per_task", list_of(dict_of(number)), ())
    if measures and len(measures) < finished:
        notes.append(f"{FILE}: measures_per_task has {len(measures)} entries, of {finished} tasks; left out")
        measures = ()
    if finished and not measures:  # without the curves, but with the final measures
        measures = (*({} for _ in range(finished - 1)), top.optional("measures", dict_of(number), {}))
    return Run(
        folder=folder,
        name=clean(str(folder)),
        schema=schema,
        strategy=strategy,
        config=top.optional("config", flattened, None),
        seed=top.optional("seed", nullable(integer), None),
        data_seed=seeds.optional("data", nullable(integer), None),
        score=score,
        tasks=tasks,
        class_order=top.optional("class_order", list_of(integer), ()),
        class_names=top.optional("class_names", list_of(text), ()) or _class_names(tasks),
        fingerprints=top.optional("fingerprints", list_of(text), ()),
        order_hash=top.optional("order_hash", text, ""),
        finished=finished,
        accuracy=accuracy,
        accuracy_known=matrix.optional("R_ti", entries, None) if finished else None,
        calibration=matrix.optional("R_ece", entries, None) if finished else None,
        per_class=top.optional("per_class", list_of(nullable(fraction)), ()),
        confusion=top.optional("confusion", _confusion, None),
        measures=measures[:finished],
        seconds=_per_task(cost, "seconds", _seconds, finished),
        images_per_second=_per_task(cost, "images_per_second", nullable(non_negative), finished),
        bytes_kept=cost.optional("bytes_kept", dict_of(natural), {}),
        bytes_per_process=cost.optional("bytes_kept_per_rank", list_of(dict_of(natural)), ()),
        budget=cost.optional("memory_mb", nullable(non_negative), None) if finished else None,
        parameters=cost.optional("parameters", nullable(natural), None) or None,
        trainable=cost.optional("trainable_parameters", nullable(natural), None),
        peak_memory=cost.optional("peak_memory_bytes", nullable(natural), None) or None,
        flops=cost.optional("flops_per_image", nullable(natural), None),
        protocol=_protocol(top, finished),
        curves=_curves(top),
        plasticity=_plasticity(top),
        versions=top.optional("versions", flattened, {}),
        hardware=top.optional("hardware", flattened, {}),
        notes=tuple(clean(note) for note in notes),
    )


def _task(value: Any, notes: list[str]) -> TaskInfo:
    entry = _Object(_object(value), "tasks.", notes)
    return TaskInfo(
        name=entry.required("name", text),
        classes=entry.required("classes", list_of(text)),
        train=entry.required("train", natural),
        test=entry.required("test", natural),
        val=entry.optional("val", natural, 0),
        columns=entry.optional("columns", list_of(natural), ()),
    )


def _seconds(value: Any) -> dict[str, float]:
    entry = _object(value)
    return {kind: _inside(kind, non_negative, entry[kind]) for kind in (*KINDS, SAVING) if kind in entry}


def _per_task(part: _Object, name: str, item: Parser[T], finished: int) -> tuple[T, ...]:
    """The entries of the finished tasks; empty if there are not enough."""
    entries = part.optional(name, list_of(item), ())
    return entries[:finished] if len(entries) >= finished else ()


def _class_names(tasks: Sequence[TaskInfo]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for task in tasks for name in task.classes))


def _confusion(value: Any) -> tuple[tuple[int, ...], ...]:
    return matrix_of(natural, len(value) if isinstance(value, list) else 0)(value)


def _protocol(top: _Object, finished: int) -> Protocol:
    part = top.part("protocol")
    typed = ("scenario", "epochs", "steps", "test_data_use")
    return Protocol(
        scenario=part.optional("scenario", flattened, {}),
        epochs=_per_task(part, "epochs", dict_of(natural), finished),
        steps=_per_task(part, "steps", natural, finished),
        texts=top.optional(
            "protocol", lambda value: flattened({k: v for k, v in _object(value).items() if k not in typed}), {}
        ),
        test_data_use=part.optional("test_data_use", list_of(text), ()),
    )


def _curves(top: _Object) -> Curves | None:
    def parse(value: Any) -> Curves | None:
        notes: list[str] = []
        part = _Object(_object(value), "", notes)
        found = Curves(
            steps=part.optional("steps", list_of(natural), ()),
            tasks=part.optional("tasks", list_of(natural), ()),
            accuracy=part.optional("accuracy", list_of(list_of(nullable(fraction))), ()),
            samples=part.optional("samples", list_of(natural), ()),
            measures=part.optional("measures", dict_of(number), {}),
            split=part.optional("split", text, ""),
        )
        sizes = {len(found.steps), len(found.tasks), len(found.accuracy)}
        if notes or len(sizes) > 1 or {len(row) for row in found.accuracy} != {len(found.samples)}:
            raise _MalformedError("must have one step and task per row of accuracy, and one sample count per column")
        return found

    return top.optional("continual_evaluation", parse, None)


def _plasticity(top: _Object) -> Mapping[str, tuple[float | None, ...]]:
    def parse(value: Any) -> Mapping[str, tuple[float | None, ...]]:
        from cl_lightning.measures import PLASTICITY  # imports torch, which most reports do not need

        part = _object(value)
        found = {name: list_of(nullable(number))(part[name]) for name in PLASTICITY if name in part}
        if len({len(values) for values in found.values()}) > 1:
            raise _MalformedError("must have one entry per task in each list")
        return found

    return top.optional("plasticity", parse, {})
