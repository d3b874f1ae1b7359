"""Labels and names of a data set, and the stream of tasks that a scenario makes of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from json import dumps
from pathlib import Path
from typing import Any, get_args

import numpy as np

from cl_lightning.files import replaced
from cl_lightning.hashing import BoolArray, IntArray, KeyArray, hash64, hash_names
from cl_lightning.stream import manifest
from cl_lightning.stream.draws import rank_in_group
from cl_lightning.stream.tasks import RequestKind, Segment, Shift, Task, _integers, number_tasks, repeats


@dataclass(frozen=True, eq=False)
class DatasetInfo:
    """Labels, domains and names of a data set, without the samples.

    Attributes:
        train_labels: Raw label of each training sample, int64 ``(N,)``.
        test_labels: Raw label of each test sample, int64 ``(M,)``; a class may have none.
        class_names: Name of each raw label, all different.
        train_domains: Domain of each training sample, int64 ``(N,)``, or None if the data has no domains.
        test_domains: Domain of each test sample, int64 ``(M,)``, or None.
        domain_names: Name of each domain, all different.
        parents: Raw label of the superclass of each class, and -1 for a superclass; empty for labels of one level. The
            second half of the samples is then the first half again, with the superclasses of their classes as labels.
        train_sets: Classes of each training sample where it may have several (multi-label, classes of pixels), bool
            ``(N, num_classes)``, each row with at least one; its label is one of them. None for one class a sample.
        test_sets: Classes of each test sample, bool ``(M, num_classes)``, or None.

    Raises:
        ValueError: If a label or domain has no name, a name is given twice, lengths differ, or labels contradict
            ``parents`` or the sets of classes.
    """

    train_labels: IntArray
    test_labels: IntArray
    class_names: tuple[str, ...]
    train_domains: IntArray | None = None
    test_domains: IntArray | None = None
    domain_names: tuple[str, ...] = ()
    parents: tuple[int, ...] = ()
    train_sets: BoolArray | None = None
    test_sets: BoolArray | None = None

    def __post_init__(self) -> None:
        for kind in ("class", "domain"):
            names = tuple(getattr(self, f"{kind}_names"))
            object.__setattr__(self, f"{kind}_names", names)
            if kind == "class" and not names:
                raise ValueError("DatasetInfo: class_names is empty; name at least one class")
            if twice := repeats(names):
                raise ValueError(f"DatasetInfo: {kind} name {twice[0]!r} is given twice; names must differ")
        if (self.train_domains is None) != (self.test_domains is None):
            raise ValueError("DatasetInfo: domains are given for one of train and test only; give both or neither")
        for part in ("train", "test"):
            labels = self._numbers(f"{part}_labels", "label", self.class_names, "class_names")
            if getattr(self, f"{part}_domains") is not None:
                domains = self._numbers(f"{part}_domains", "domain", self.domain_names, "domain_names")
                if len(domains) != len(labels):
                    raise ValueError(f"DatasetInfo: {len(labels)} {part} labels but {len(domains)} {part} domains")
        self._check_parents()
        self._check_sets()

    def _check_sets(self) -> None:
        if (self.train_sets is None) != (self.test_sets is None):
            raise ValueError("DatasetInfo: sets of classes are given for one of train and test only; give both")
        for part in ("train", "test"):
            labels, sets = getattr(self, f"{part}_labels"), getattr(self, f"{part}_sets")
            if sets is None:
                continue
            sets = np.asarray(sets, bool)
            object.__setattr__(self, f"{part}_sets", sets)
            if sets.shape != (len(labels), self.num_classes):
                expected = (len(labels), self.num_classes)
                raise ValueError(f"DatasetInfo: {part}_sets has shape {sets.shape}; expected {expected}")
            if (wrong := np.flatnonzero(~sets[np.arange(len(labels)), labels])).size:
                raise ValueError(
                    f"DatasetInfo: {part} sample {wrong[0]} has label {labels[wrong[0]]}, which is not in its set"
                )

    def _check_parents(self) -> None:
        object.__setattr__(self, "parents", tuple(int(parent) for parent in self.parents))
        if not self.parents:
            return
        parents = np.array(self.parents, np.int64)
        if len(parents) != self.num_classes:
            raise ValueError(f"DatasetInfo: {len(parents)} parents for {self.num_classes} classes; give one for each")
        if parents.max() >= self.num_classes or (parents[parents[parents >= 0]] >= 0).any():
            raise ValueError("DatasetInfo: parents has a label that is no superclass, a class whose parent is -1")
        for part in ("train", "test"):
            classes, superclasses = np.array_split(getattr(self, f"{part}_labels"), 2)
            if len(classes) != len(superclasses) or (parents[classes] != superclasses).any():
                raise ValueError(
                    f"DatasetInfo: the second half of {part}_labels is not the superclasses of the first half"
                )

    def _numbers(self, attribute: str, kind: str, names: tuple[str, ...], names_attribute: str) -> IntArray:
        numbers = _integers(getattr(self, attribute), f"DatasetInfo: {attribute}")
        object.__setattr__(self, attribute, numbers)
        wrong = np.flatnonzero((numbers < 0) | (numbers >= len(names)))
        if wrong.size:
            raise ValueError(
                f"DatasetInfo: {attribute} has {kind} {numbers[wrong[0]]} at index {wrong[0]}; "
                f"{names_attribute} names 0 to {len(names) - 1} only"
            )
        return numbers

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @cached_property
    def levels(self) -> IntArray:
        """Level of each class, int64 ``(num_classes,)``: 1 for the classes of superclasses, else 0."""
        return (np.array(self.parents or [-1] * self.num_classes) >= 0).astype(np.int64)

    @cached_property
    def name_keys(self) -> KeyArray:
        """Hash of each class name, uint64 ``(num_classes,)``."""
        return hash_names(self.class_names)

    @cached_property
    def _sample_ids(self) -> KeyArray:
        """Hash of class name, domain name and rank among the samples that share both, uint64 ``(N,)``."""
        labels = self.train_labels
        if self.train_domains is None:
            return hash64(self.name_keys[labels], rank_in_group(labels)[0])
        place, _ = rank_in_group(labels * len(self.domain_names) + self.train_domains)
        return hash64(self.name_keys[labels], hash_names(self.domain_names)[self.train_domains], place)

    def classes_in(self, indices: IntArray) -> IntArray:
        """Raw labels of the classes that occur in training samples, ascending."""
        if self.train_sets is None:
            return np.unique(self.train_labels[indices])
        return np.flatnonzero(self.train_sets[indices].any(axis=0))

    def seen_by(self, first: IntArray) -> IntArray:
        """For each test sample the first task at whose end all of its classes have been seen, int64 ``(M,)``.

        Args:
            first: First task of each raw label, int64 ``(num_classes,)``; -1 for a class that never arrives.

        Returns:
            -1 for a sample with a class that never arrives.
        """
        if self.test_sets is None:
            return first[self.test_labels]
        latest = np.where(self.test_sets, first, -1).max(axis=1, initial=-1)
        return np.where((self.test_sets & (first < 0)).any(axis=1), -1, latest)

    def keys(self, indices: IntArray, seed: int | KeyArray, purpose: int) -> KeyArray:
        """Counter-based random numbers of training samples.

        Args:
            indices: Training samples, ``(n,)``.
            seed: One seed, or one for each sample.
            purpose: Constant of ``draws``; the numbers of different purposes are independent.

        Returns:
            uint64 ``(n,)``.
        """
        return hash64(seed, purpose, self._sample_ids[indices])


_ARRAYS = ("train", "val", "test", "unlabelled", "noisy", "given")
_OPTIONAL = ("noisy", "given")  # in manifests and hashes only where they are not empty
_ASKED: dict[str, tuple[str, ...]] = {"keep": ("hold",), "forget": ("learn", "hold")}  # tasks that a request is about


@dataclass(frozen=True, eq=False)
class Stream:
    """A sequence of tasks with the indices of their samples. Equal streams have equal manifests.

    Attributes:
        tasks: The tasks in order.
        train: Indices of the training samples of each task, int64, read-only.
        val: Indices, in the training set, of the held-out validation samples of each task.
        test: Indices, in the test set, of the samples of each task; entry i of a row of the accuracy matrix is the
            accuracy on ``test[i]``. All of their classes have been seen at the end of the task.
        order: Raw label of each column.
        class_names: Name of each column.
        unlabelled: Indices of the samples of ``train`` whose labels are hidden.
        noisy: Indices of the samples of ``train`` whose given label is not the label of the data.
        given: Raw labels that these samples have in training, classes of the same task; see :meth:`given_labels`.
        parts: Segments of tasks that were made at once, with their seeds.
        one_pass: Whether each sample is seen once, in a stream, instead of in epochs.
        batch_size: Batch size of a one-pass stream; None for the batch size of the data module.
        passes: Number of steps on each batch of a one-pass stream.
        scenario: Class path and arguments of the scenario that made the stream.

    Raises:
        ValueError: If fields contradict each other.
    """

    tasks: tuple[Task, ...]
    train: tuple[IntArray, ...]
    val: tuple[IntArray, ...]
    test: tuple[IntArray, ...]
    order: tuple[int, ...]
    class_names: tuple[str, ...]
    unlabelled: tuple[IntArray, ...] = ()
    noisy: tuple[IntArray, ...] = ()
    given: tuple[IntArray, ...] = ()
    parts: tuple[Segment, ...] = ()
    one_pass: bool = False
    batch_size: int | None = None
    passes: int = 1
    scenario: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = len(self.tasks)
        if not count:
            raise ValueError("Stream: it has no tasks; give at least one")
        for name in ("unlabelled", *_OPTIONAL):
            if not getattr(self, name):
                object.__setattr__(self, name, (np.empty(0, np.int64),) * count)
        if not self.parts:
            object.__setattr__(self, "parts", (Segment(count, 0, 0.0),))
        for name in _ARRAYS:
            arrays = getattr(self, name)
            if len(arrays) != count:
                raise ValueError(f"{name}: {len(arrays)} index arrays for {count} tasks")
            arrays = tuple(_integers(array, f"task {task}: {name}") for task, array in enumerate(arrays))
            object.__setattr__(self, name, arrays)
            for task, array in enumerate(arrays):
                if array.size and array.min() < 0:
                    raise ValueError(f"task {task}: {name} has the negative index {array.min()}")
                if name != "given" and len(np.unique(array)) != len(array):
                    raise ValueError(f"task {task}: {name} has an index twice")
        for task, (train, val, hidden) in enumerate(zip(self.train, self.val, self.unlabelled, strict=True)):
            if not train.size:
                raise ValueError(f"task {task}: train is empty; every task needs training samples")
            if val.size and np.isin(val, train).any():
                raise ValueError(f"task {task}: val shares samples with train")
            if hidden.size and not np.isin(hidden, train).all():
                raise ValueError(f"task {task}: unlabelled has samples that are not in train")
        self._check_given()
        self._check_requests()
        tasks, order = number_tasks(
            [t.classes for t in self.tasks], [t.name for t in self.tasks], self.shifts, [t.request for t in self.tasks]
        )
        if tasks != self.tasks or order != self.order:
            raise ValueError("order: the columns are not the classes of the tasks in order of arrival")
        if len(self.class_names) != len(order):
            raise ValueError(f"class_names: {len(self.class_names)} names for {len(order)} columns")
        if twice := repeats(self.class_names):
            raise ValueError(f"class_names: {twice[0]!r} is given twice")
        if sum(part.tasks for part in self.parts) != count:
            raise ValueError(
                f"parts: their tasks add up to {sum(part.tasks for part in self.parts)}, the stream has {count}"
            )
        if self.passes < 1 or (self.batch_size is not None and self.batch_size < 1):
            raise ValueError(f"passes {self.passes} and batch_size {self.batch_size} must be at least 1")

    def _check_given(self) -> None:
        for task, (noisy, given) in enumerate(zip(self.noisy, self.given, strict=True)):
            if len(noisy) != len(given):
                raise ValueError(f"task {task}: given has {len(given)} labels for {len(noisy)} samples of noisy")
            if noisy.size and not np.isin(noisy, self.train[task]).all():
                raise ValueError(f"task {task}: noisy has samples that are not in train")
            if noisy.size and np.isin(noisy, self.unlabelled[task]).any():
                raise ValueError(f"task {task}: noisy has samples whose label is hidden")
            if given.size and not np.isin(given, self.tasks[task].classes).all():
                raise ValueError(f"task {task}: given has labels that are no classes of the task")
        noisy, given = np.concatenate(self.noisy), np.concatenate(self.given)
        samples, first, inverse = np.unique(noisy, return_index=True, return_inverse=True)
        for task, (train, its) in enumerate(zip(self.train, self.noisy, strict=True)):
            if samples.size and np.isin(train, samples).sum() != len(its):
                raise ValueError(f"task {task}: noisy lacks samples of train that are noisy in another task")
        if (given[first][inverse] != given).any():
            raise ValueError("given: a sample of several tasks has different labels in them; give it one")

    def _check_requests(self) -> None:
        for task in self.tasks:
            if task.request not in get_args(RequestKind):
                raise ValueError(
                    f"task {task.index}: request is {task.request!r}; use {', '.join(get_args(RequestKind))}"
                )
            if task.learns:
                continue
            mine = self.train[task.index]
            asked = [t.index for t in self.tasks[: task.index] if t.request in _ASKED[task.request]]
            known = np.concatenate([np.empty(0, np.int64), *(self.train[index] for index in asked)])
            if task.num_new or not np.isin(mine, known).all() or np.isin(mine, self.forgotten(task.index - 1)).any():
                raise ValueError(
                    f"task {task.index}: it asks to {task.request} samples that no earlier task has, or that are "
                    "forgotten already"
                )
            if self.val[task.index].size or self.test[task.index].size:
                raise ValueError(f"task {task.index}: it asks to {task.request}, and has validation or test samples")
            later = [t.index for t in self.tasks[task.index :] if t.learns]
            if task.request == "forget" and any(np.isin(mine, self.train[index]).any() for index in later):
                raise ValueError(f"task {task.index}: it asks to forget samples that a later task learns again")

    def forgotten(self, task: int) -> IntArray:
        """Training samples that the requests up to and including a task ask to forget, ascending; -1 for no task."""
        asked = [self.train[t.index] for t in self.tasks[: task + 1] if t.request == "forget"]
        return np.unique(np.concatenate([np.empty(0, np.int64), *asked]))

    def emptied(self, task: int) -> tuple[int, ...]:
        """Earlier tasks that a request to forget leaves without samples, ascending."""
        before, after = self.forgotten(task - 1), self.forgotten(task)
        earlier = [t.index for t in self.tasks[:task] if t.learns]
        left = [(np.setdiff1d(self.train[t], before).size, np.setdiff1d(self.train[t], after).size) for t in earlier]
        return tuple(t for t, (old, new) in zip(earlier, left, strict=True) if old and not new)

    def __len__(self) -> int:
        return len(self.tasks)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(self.hashes)

    @property
    def seed(self) -> int:
        """Seed of the first segment."""
        return self.parts[0].seed

    @property
    def shifts(self) -> tuple[Shift | None, ...]:
        """Transform of the images of each task, or None."""
        return tuple(task.domain for task in self.tasks)

    @property
    def task_parts(self) -> tuple[Segment, ...]:
        """The segment of each task."""
        return tuple(part for part in self.parts for _ in range(part.tasks))

    @property
    def part_tasks(self) -> tuple[tuple[Task, ...], ...]:
        """The tasks of each segment."""
        stops = np.cumsum([part.tasks for part in self.parts]).tolist()
        return tuple(self.tasks[stop - part.tasks : stop] for part, stop in zip(self.parts, stops, strict=True))

    @cached_property
    def column_table(self) -> IntArray:
        """Column of each raw label, int64 ``(highest raw label + 1,)``; -1 for labels that never arrive."""
        table = np.full(max(self.order, default=-1) + 1, -1, np.int64)
        table[list(self.order)] = np.arange(len(self.order))
        table.flags.writeable = False
        return table

    def columns_of(self, labels: IntArray | Sequence[int]) -> IntArray:
        """Columns of raw labels, int64 of the same shape; -1 for labels that never arrive."""
        labels = np.asarray(labels, np.int64)
        known = (labels >= 0) & (labels < len(self.column_table))
        return np.where(known, self.column_table[np.where(known, labels, 0)], -1)

    def given_labels(self, labels: IntArray) -> IntArray:
        """Labels of the training samples as training sees them.

        Everything that trains reads its labels here. Validation and test samples have the labels of the data.

        Args:
            labels: Raw labels of the data, int64 ``(N,)``.

        Returns:
            Raw labels, int64 ``(N,)``, with the given labels of the samples of ``noisy``.
        """
        if not any(part.size for part in self.noisy):
            return labels
        changed = np.array(labels, np.int64)
        changed[np.concatenate(self.noisy)] = np.concatenate(self.given)
        return changed

    def names_of(self, task: Task) -> tuple[str, ...]:
        """Names of the classes of a task."""
        return tuple(self.class_names[column] for column in task.columns)

    @cached_property
    def hashes(self) -> tuple[str, ...]:
        """BLAKE2b of each task: its name, classes by name, columns, shift and index arrays."""
        digests = []
        for task in self.tasks:
            shift = task.domain and [task.domain.kind, task.domain.value]
            request = [] if task.request == "learn" else [task.request]
            facts = [task.name, self.names_of(task), task.columns, shift, *request]
            digest = blake2b(dumps(facts).encode(), digest_size=16)
            for name in _ARRAYS:
                array = getattr(self, name)[task.index]
                if name in _OPTIONAL and not array.size:
                    continue
                digest.update(f"{name} {len(array)} ".encode() + array.astype("<i8").tobytes())
            digests.append(digest.hexdigest())
        return tuple(digests)

    def check(self, info: DatasetInfo) -> None:
        """Check that the stream was made for this data.

        Raises:
            ValueError: If an index is outside the data, a class has another name, or a sample's class is not in its
                task.
        """
        for column, (label, name) in enumerate(zip(self.order, self.class_names, strict=True)):
            found = info.class_names[label] if label < info.num_classes else None
            if found != name:
                raise ValueError(
                    f"Stream: class {label} (column {column}) is {name!r} in the stream and {found!r} in the data; "
                    "use the data that the stream was made for, or extend the stream"
                )
        for task in self.tasks:
            for name in _ARRAYS:
                if name == "given":
                    continue  # checked by the constructor
                labels = info.test_labels if name == "test" else info.train_labels
                array = getattr(self, name)[task.index]
                if array.size and array.max() >= len(labels):
                    raise ValueError(
                        f"Stream: task {task.index}: {name} has index {array.max()}; the data has {len(labels)} samples"
                    )
                fits = self._fits(info, task, array, test=name == "test")
                if not fits.all():
                    sample = array[~fits][0]
                    raise ValueError(
                        f"Stream: task {task.index}: {name} has sample {sample} of class "
                        f"{info.class_names[labels[sample]]!r}, which does not belong to this task"
                    )

    def _fits(self, info: DatasetInfo, task: Task, samples: IntArray, *, test: bool) -> BoolArray:
        """Whether each sample belongs to the task: a test sample has seen classes alone, another one of the task's."""
        labels, sets = (info.test_labels, info.test_sets) if test else (info.train_labels, info.train_sets)
        if sets is None:
            columns = self.columns_of(labels[samples])
            return (columns >= 0) & (columns < task.num_seen) if test else np.isin(columns, task.columns)
        allowed = np.zeros(info.num_classes, bool)
        allowed[list(self.order[: task.num_seen] if test else task.classes)] = True
        wrong = sets[samples] & ~allowed
        return np.asarray(~wrong.any(axis=1) if test else (sets[samples] & allowed).any(axis=1))

    def to_dict(self) -> dict[str, Any]:
        """The manifest of the stream: numbers, strings, lists and dicts only."""
        tasks = [
            {
                "index": task.index,
                "name": task.name,
                "classes": list(task.classes),
                "shift": task.domain and [task.domain.kind, task.domain.value],
                **({} if task.request == "learn" else {"request": task.request}),
                "train": self.train[task.index].tolist(),
                "val": self.val[task.index].tolist(),
                "test": self.test[task.index].tolist(),
                "unlabelled": self.unlabelled[task.index].tolist(),
                **{name: array.tolist() for name in _OPTIONAL if (array := getattr(self, name)[task.index]).size},
                "hash": digest,
            }
            for task, digest in zip(self.tasks, self.hashes, strict=True)
        ]
        return {
            "format": manifest.FORMAT,
            "version": manifest.VERSION,
            "scenario": self.scenario,
            "parts": [{"tasks": p.tasks, "seed": p.seed, "val_fraction": p.val_fraction} for p in self.parts],
            "one_pass": self.one_pass,
            "batch_size": self.batch_size,
            "passes": self.passes,
            "order": list(self.order),
            "class_names": list(self.class_names),
            "tasks": tasks,
        }

    @staticmethod
    def from_dict(data: Any, source: str = "manifest") -> "Stream":
        """The stream of a manifest.

        Args:
            data: Return value of ``to_dict``.
            source: Name of the manifest in errors.

        Raises:
            ValueError: If it has another format or version, is malformed, or was changed since it was written.
        """
        return manifest.read(data, source, Stream)

    def save(self, path: str | Path) -> None:
        """Write the manifest as JSON; an existing file is replaced atomically."""
        with replaced(path) as file:
            file.write(dumps(self.to_dict(), allow_nan=False, separators=(",", ":")) + "\n")

    @staticmethod
    def load(path: str | Path) -> "Stream":
        """Read a manifest.

        Raises:
            ValueError: If there is no such file, it is not a manifest, or it was changed since it was written.
        """
        return Stream.from_dict(manifest.parse(path), str(path))
