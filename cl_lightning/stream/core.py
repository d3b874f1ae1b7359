"""What a data set tells, what a task is, and the stream of tasks."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from json import dumps
from operator import index
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cl_lightning.stream.draws import IntArray, KeyArray, hash_names, mix, places


def _integers(values: Any, what: str) -> IntArray:
    """Read-only int64 copy of a flat sequence of integers."""
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"{what} must be a flat array of integers, got {array.dtype} of shape {array.shape}")
    array = array.astype(np.int64)
    array.flags.writeable = False
    return array


@dataclass(frozen=True, eq=False)
class Catalogue:
    """What a data set tells about its samples, without the samples.

    Attributes:
        train_labels: Raw label of each training sample, int64 ``(N,)``.
        test_labels: Raw label of each test sample, int64 ``(M,)``; a class may have none.
        class_names: Name of each raw label; the names differ.
        train_domains: Domain of each training sample, int64 ``(N,)``, or None where the data has no domains.
        test_domains: Domain of each test sample, int64 ``(M,)``, or None.
        domain_names: Name of each domain; the names differ.

    Raises:
        ValueError: A label or domain without a name, a name given twice, or lengths that differ.
    """

    train_labels: IntArray
    test_labels: IntArray
    class_names: tuple[str, ...]
    train_domains: IntArray | None = None
    test_domains: IntArray | None = None
    domain_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for kind in ("class", "domain"):
            names = tuple(getattr(self, f"{kind}_names"))
            object.__setattr__(self, f"{kind}_names", names)
            if kind == "class" and not names:
                raise ValueError("Catalogue: class_names is empty; name at least one class")
            if twice := repeats(names):
                raise ValueError(f"Catalogue: {kind} name {twice[0]!r} is given twice; names must differ")
        if (self.train_domains is None) != (self.test_domains is None):
            raise ValueError("Catalogue: domains are given for one of train and test only; give both or neither")
        for part in ("train", "test"):
            labels = self._numbers(f"{part}_labels", "label", self.class_names, "class_names")
            if getattr(self, f"{part}_domains") is not None:
                domains = self._numbers(f"{part}_domains", "domain", self.domain_names, "domain_names")
                if len(domains) != len(labels):
                    raise ValueError(f"Catalogue: {len(labels)} {part} labels but {len(domains)} {part} domains")

    def _numbers(self, attribute: str, kind: str, names: tuple[str, ...], names_attribute: str) -> IntArray:
        numbers = _integers(getattr(self, attribute), f"Catalogue: {attribute}")
        object.__setattr__(self, attribute, numbers)
        wrong = np.flatnonzero((numbers < 0) | (numbers >= len(names)))
        if wrong.size:
            raise ValueError(
                f"Catalogue: {attribute} has {kind} {numbers[wrong[0]]} at index {wrong[0]}; "
                f"{names_attribute} names 0 to {len(names) - 1} only"
            )
        return numbers

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @cached_property
    def name_keys(self) -> KeyArray:
        """Hash of each class name, uint64 ``(num_classes,)``."""
        return hash_names(self.class_names)

    @cached_property
    def _sample_ids(self) -> KeyArray:
        """Hash of class name, domain name and place among the samples that share both, uint64 ``(N,)``."""
        labels = self.train_labels
        if self.train_domains is None:
            return mix(self.name_keys[labels], places(labels)[0])
        place, _ = places(labels * len(self.domain_names) + self.train_domains)
        return mix(self.name_keys[labels], hash_names(self.domain_names)[self.train_domains], place)

    def keys(self, indices: IntArray, seed: int | KeyArray, purpose: int) -> KeyArray:
        """Random numbers of training samples.

        Args:
            indices: Training samples, ``(n,)``.
            seed: One seed, or one for each sample.
            purpose: What the numbers are for; other purposes have independent numbers.

        Returns:
            uint64 ``(n,)``.
        """
        return mix(seed, purpose, self._sample_ids[indices])


def repeats(items: Sequence[Any]) -> list[Any]:
    """The items that are there more than once."""
    return [item for item, count in Counter(items).items() if count > 1]


@dataclass(frozen=True)
class Shift:
    """What is done to all images of a task.

    Attributes:
        kind: ``permute``: the pixels change places, alike in all images; ``rotate``: the image is turned.
        value: Seed of the permutation in ``0 .. 2**32 - 1``, or degrees counter-clockwise.
    """

    kind: Literal["permute", "rotate"]
    value: int | float

    def __post_init__(self) -> None:
        if self.kind not in ("permute", "rotate"):
            raise ValueError(f"Shift: kind {self.kind!r}; use permute or rotate")
        if isinstance(self.value, bool) or not isinstance(self.value, int | float) or not math.isfinite(self.value):
            raise ValueError(f"Shift: value {self.value!r} of {self.kind} is not a finite number")
        if self.kind == "permute" and not (isinstance(self.value, int) and 0 <= self.value < 2**32):
            raise ValueError(f"Shift: the seed of a permutation is an integer in 0 .. 2**32 - 1, got {self.value!r}")


@dataclass(frozen=True)
class Task:
    """One task of a stream.

    Attributes:
        index: Place in the stream, from 0.
        name: What to call it in tables.
        classes: Raw labels of the classes that have training samples here, by column.
        columns: Their columns in the logits.
        new_classes: Raw labels of the classes that no earlier task had.
        num_new: Columns that the task adds; 0 where all its classes are known.
        num_seen: Columns after this task.
        domain: What is done to its images, or None.
    """

    index: int
    name: str
    classes: tuple[int, ...]
    columns: tuple[int, ...]
    new_classes: tuple[int, ...]
    num_new: int
    num_seen: int
    domain: Shift | None = None

    @property
    def is_first(self) -> bool:
        return self.index == 0


def number_tasks(
    classes: Sequence[Sequence[int]], names: Sequence[str], shifts: Sequence[Shift | None]
) -> tuple[tuple[Task, ...], tuple[int, ...]]:
    """Give classes their columns in order of arrival.

    Args:
        classes: Raw labels present in each task; those that are new get their columns in this order.
        names: Name of each task.
        shifts: Shift of each task.

    Returns:
        The tasks, and the raw label of each column.
    """
    column: dict[int, int] = {}
    tasks = []
    for place, (present, name, shift) in enumerate(zip(classes, names, shifts, strict=True)):
        new = [label for label in present if label not in column]
        for label in new:
            column[label] = len(column)
        classes_here = tuple(sorted(present, key=column.__getitem__))
        columns = tuple(column[label] for label in classes_here)
        tasks.append(Task(place, name, classes_here, columns, tuple(new), len(new), len(column), shift))
    return tuple(tasks), tuple(column)


@dataclass(frozen=True)
class Part:
    """Tasks that were dealt at once: the first part when the stream was made, a further one by each extension.

    Attributes:
        tasks: Number of tasks, at least 1.
        seed: What they were drawn with.
        val_fraction: Share of the training samples that was held out, in [0, 1).
    """

    tasks: int
    seed: int
    val_fraction: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", index(self.seed))  # also of numpy; the manifest takes plain numbers only
        object.__setattr__(self, "val_fraction", float(self.val_fraction))
        if self.tasks < 1:
            raise ValueError(f"Part: tasks must be at least 1, got {self.tasks}")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"Stream: val_fraction must be at least 0 and below 1, got {self.val_fraction}")


_ARRAYS = ("train", "val", "test", "unlabelled")


@dataclass(frozen=True, eq=False)
class Stream:
    """The tasks, and the samples of each. Equal streams have equal manifests.

    Attributes:
        tasks: The tasks in order.
        train: Indices of the training samples of each task, int64, read-only.
        val: Indices, in the training set, of the samples that each task holds out.
        test: Indices, in the test set, of the samples whose home is the task: row entry i of the accuracy matrix. All
            of their classes have been seen when the task is over.
        order: Raw label of each column.
        class_names: Name of each column.
        unlabelled: Those of ``train`` whose labels are hidden.
        parts: How the tasks came to be.
        one_pass: Whether samples are seen once, in a stream, instead of in epochs.
        batch_size: Samples that a one-pass stream gives at a time; None leaves it to the data module.
        passes: How often a one-pass stream is given.
        scenario: Class path and arguments of the scenario that made the stream.

    Raises:
        ValueError: Fields that contradict one another.
    """

    tasks: tuple[Task, ...]
    train: tuple[IntArray, ...]
    val: tuple[IntArray, ...]
    test: tuple[IntArray, ...]
    order: tuple[int, ...]
    class_names: tuple[str, ...]
    unlabelled: tuple[IntArray, ...] = ()
    parts: tuple[Part, ...] = ()
    one_pass: bool = False
    batch_size: int | None = None
    passes: int = 1
    scenario: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = len(self.tasks)
        if not count:
            raise ValueError("Stream: it has no tasks; give at least one")
        if not self.unlabelled:
            object.__setattr__(self, "unlabelled", (np.empty(0, np.int64),) * count)
        if not self.parts:
            object.__setattr__(self, "parts", (Part(count, 0, 0.0),))
        for name in _ARRAYS:
            arrays = getattr(self, name)
            if len(arrays) != count:
                raise ValueError(f"{name}: {len(arrays)} index arrays for {count} tasks")
            arrays = tuple(_integers(array, f"task {task}: {name}") for task, array in enumerate(arrays))
            object.__setattr__(self, name, arrays)
            for task, array in enumerate(arrays):
                if array.size and array.min() < 0:
                    raise ValueError(f"task {task}: {name} has the negative index {array.min()}")
                if len(np.unique(array)) != len(array):
                    raise ValueError(f"task {task}: {name} has an index twice")
        for task, (train, val, hidden) in enumerate(zip(self.train, self.val, self.unlabelled, strict=True)):
            if not train.size:
                raise ValueError(f"task {task}: train is empty; every task needs training samples")
            if val.size and np.isin(val, train).any():
                raise ValueError(f"task {task}: val shares samples with train")
            if hidden.size and not np.isin(hidden, train).all():
                raise ValueError(f"task {task}: unlabelled has samples that are not in train")
        tasks, order = number_tasks([t.classes for t in self.tasks], [t.name for t in self.tasks], self.shifts)
        if tasks != self.tasks or order != self.order:
            raise ValueError("order: the columns are not the classes of the tasks in order of arrival")
        if len(self.class_names) != len(order):
            raise ValueError(f"class_names: {len(self.class_names)} names for {len(order)} columns")
        if twice := repeats(self.class_names):
            raise ValueError(f"class_names: {twice[0]!r} is there twice")
        if sum(part.tasks for part in self.parts) != count:
            raise ValueError(f"parts: they have {sum(part.tasks for part in self.parts)} tasks, the stream has {count}")
        if self.passes < 1 or (self.batch_size is not None and self.batch_size < 1):
            raise ValueError(f"passes {self.passes} and batch_size {self.batch_size} must be at least 1")

    def __len__(self) -> int:
        return len(self.tasks)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(self.hashes)

    @property
    def seed(self) -> int:
        """What the first part was drawn with."""
        return self.parts[0].seed

    @property
    def shifts(self) -> tuple[Shift | None, ...]:
        """What is done to the images of each task."""
        return tuple(task.domain for task in self.tasks)

    @property
    def task_parts(self) -> tuple[Part, ...]:
        """The part that each task belongs to."""
        return tuple(part for part in self.parts for _ in range(part.tasks))

    @property
    def part_tasks(self) -> tuple[tuple[Task, ...], ...]:
        """The tasks of each part."""
        stops = np.cumsum([part.tasks for part in self.parts]).tolist()
        return tuple(self.tasks[stop - part.tasks : stop] for part, stop in zip(self.parts, stops, strict=True))

    @cached_property
    def column_table(self) -> IntArray:
        """Column of each raw label, int64 ``(highest raw label + 1,)``; -1 for labels that never come."""
        table = np.full(max(self.order, default=-1) + 1, -1, np.int64)
        table[list(self.order)] = np.arange(len(self.order))
        table.flags.writeable = False
        return table

    def columns_of(self, labels: IntArray | Sequence[int]) -> IntArray:
        """Columns of raw labels, int64 of the same shape; -1 for labels that never come."""
        labels = np.asarray(labels, np.int64)
        known = (labels >= 0) & (labels < len(self.column_table))
        return np.where(known, self.column_table[np.where(known, labels, 0)], -1)

    def names_of(self, task: Task) -> tuple[str, ...]:
        """Names of the classes of a task."""
        return tuple(self.class_names[column] for column in task.columns)

    @cached_property
    def hashes(self) -> tuple[str, ...]:
        """BLAKE2b of each task: its name, classes by name, columns, shift and index arrays."""
        digests = []
        for task in self.tasks:
            shift = task.domain and [task.domain.kind, task.domain.value]
            digest = blake2b(dumps([task.name, self.names_of(task), task.columns, shift]).encode(), digest_size=16)
            for name in _ARRAYS:
                array = getattr(self, name)[task.index]
                digest.update(f"{name} {len(array)} ".encode() + array.astype("<i8").tobytes())
            digests.append(digest.hexdigest())
        return tuple(digests)

    def check(self, catalogue: Catalogue) -> None:
        """Refuse data that the stream was not made for.

        Raises:
            ValueError: An index outside the data, a class of another name, a sample of a class that is not in its task.
        """
        for column, (label, name) in enumerate(zip(self.order, self.class_names, strict=True)):
            found = catalogue.class_names[label] if label < catalogue.num_classes else None
            if found != name:
                raise ValueError(
                    f"Stream: class {label} (column {column}) is {name!r} in the stream and {found!r} in the data; "
                    "use the data it was made for, or extend it"
                )
        for task in self.tasks:
            for name in _ARRAYS:
                labels = catalogue.test_labels if name == "test" else catalogue.train_labels
                array = getattr(self, name)[task.index]
                if array.size and array.max() >= len(labels):
                    raise ValueError(
                        f"Stream: task {task.index}: {name} has index {array.max()}; the data has {len(labels)} samples"
                    )
                columns = self.columns_of(labels[array])
                fits = (columns >= 0) & (columns < task.num_seen) if name == "test" else np.isin(columns, task.columns)
                if not fits.all():
                    sample = array[~fits][0]
                    raise ValueError(
                        f"Stream: task {task.index}: {name} has sample {sample} of class "
                        f"{catalogue.class_names[labels[sample]]!r}, which does not belong there"
                    )

    def to_dict(self) -> dict[str, Any]:
        """The manifest: numbers, strings, lists and dicts only."""
        from cl_lightning.stream.manifest import write

        return write(self)

    @staticmethod
    def from_dict(data: Any, source: str = "manifest") -> "Stream":
        """The stream of a manifest.

        Args:
            data: What ``to_dict`` gave.
            source: What to call it in errors.

        Raises:
            ValueError: Of another format or version, malformed, or changed since it was written.
        """
        from cl_lightning.stream.manifest import read

        return read(data, source)

    def save(self, path: str | Path) -> None:
        """Write the manifest as JSON; a file that is there is replaced in one step."""
        path = Path(path)
        draft = path.with_name(path.name + ".draft")
        draft.write_text(dumps(self.to_dict(), allow_nan=False, separators=(",", ":")) + "\n", encoding="utf-8")
        draft.replace(path)

    @staticmethod
    def load(path: str | Path) -> "Stream":
        """Read a manifest.

        Raises:
            ValueError: No such file, or not a manifest, or changed since it was written.
        """
        from cl_lightning.stream.manifest import parse

        return Stream.from_dict(parse(path), str(path))
