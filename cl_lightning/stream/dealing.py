"""Base classes of scenarios, and the functions that scenarios share.

A scenario is a frozen dataclass of options, called with a ``DatasetInfo`` and a seed. A new scenario subclasses
``Splitter`` and returns from ``split`` the training samples of each task. The base class derives columns, test samples,
validation samples and the manifest.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np

from cl_lightning.hashing import IntArray, hash64, seed_array
from cl_lightning.stream import draws
from cl_lightning.stream.core import DatasetInfo, Stream
from cl_lightning.stream.draws import rank_in_group, round_half_up, split
from cl_lightning.stream.tasks import Segment, Shift, Task, number_tasks, repeats

Order = Literal["natural", "random"] | int | list[int] | list[str]


class Scenario(ABC):
    """Base class of scenarios: splits a data set into the tasks of a stream."""

    def __call__(self, info: DatasetInfo, *, seed: int, val_fraction: float = 0.0) -> Stream:
        """Make the stream.

        Args:
            info: Labels and names of the data set.
            seed: Determines all random choices.
            val_fraction: Fraction of the training samples of each class in each task to hold out, in [0, 1). The number
                is rounded to whole samples, and at least one sample stays in training.

        Raises:
            ValueError: If the options do not fit the data.
        """
        return self.stream(info, Segment(1, seed, val_fraction), None)

    def extend(self, stream: Stream, info: DatasetInfo, *, seed: int, val_fraction: float = 0.0) -> Stream:
        """Extend a stream of this scenario by the new classes or domains of the data.

        Earlier tasks keep their classes, domains and columns. Unchanged classes keep their samples, also if raw labels
        and indices have shifted: classes and domains are identified by name.

        Args:
            stream: The earlier stream.
            info: Labels and names of the current data set.
            seed: Seed of the new tasks; earlier tasks keep their seed.
            val_fraction: Validation fraction of the new tasks; earlier tasks keep their fraction.

        Raises:
            ValueError: If the data has nothing new or lacks a class of the stream, or the scenario is another one.
        """
        mine, its = (_class_paths(scenario) for scenario in (self.describe(), stream.scenario))
        if its and mine != its:
            self.fail(f"the stream to extend was made by {' of '.join(its)}; extend it by the same scenario")
        longer = self.stream(info, Segment(1, seed, val_fraction), stream)
        for old, new in zip(stream.tasks, longer.tasks, strict=False):
            before, after = stream.names_of(old), longer.names_of(new)
            if before != after:
                changed = sorted(set(before) ^ set(after)) or ["their order"]
                self.fail(f"the classes of task {old.index} ({old.name}) would change: {', '.join(changed[:5])}")
            if (old.name, old.domain) != (new.name, new.domain):
                self.fail(f"task {old.index} ({old.name}) would become {new.name}; keep the options of the stream")
        if len(longer) <= len(stream):
            self.fail(f"the data has nothing new for a task after the {len(stream)} tasks of the stream")
        return longer

    @abstractmethod
    def stream(self, info: DatasetInfo, part: Segment, earlier: Stream | None) -> Stream:
        """The stream of the data, or the earlier stream extended by one segment.

        Args:
            info: Labels and names of the data set.
            part: Seed and validation fraction of the new tasks; the scenario chooses the number of tasks.
            earlier: The stream to extend, if any.
        """

    def describe(self) -> dict[str, Any]:
        """Class path and arguments, in the form of a config."""
        return {
            "class_path": f"{type(self).__module__}.{type(self).__qualname__}",
            "init_args": {item.name: _plain(getattr(self, item.name)) for item in fields(self)},  # type: ignore[arg-type]
        }

    def fail(self, problem: str) -> NoReturn:
        raise ValueError(f"{type(self).__name__}: {problem}")


def _plain(value: Any) -> Any:
    """A value in the form of JSON."""
    if isinstance(value, Scenario):
        return value.describe()
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _class_paths(description: Any) -> list[str]:
    """Class names of a scenario and of the scenarios that it wraps, from the outside in."""
    paths = []
    while isinstance(description, dict) and "class_path" in description:
        paths.append(str(description["class_path"]).rpartition(".")[2])
        arguments = description.get("init_args")
        description = arguments.get("base") if isinstance(arguments, dict) else None
    return paths


@dataclass
class Split:
    """Training and test samples of each task, before validation samples are held out.

    Attributes:
        train: Indices of the training samples of each task, including the later validation samples.
        order: All raw labels; classes that arrive in the same task get their columns in this order.
        names: Name of each task.
        shifts: Shift of each task; none by default.
        test: Indices of the test samples of each task; by default the samples of its new classes.
        holds_out: Whether a task has validation samples; by default every task has.
        one_pass: Whether each sample is seen once.
        classes: Raw labels of each task, for samples of several classes; by default the classes of its samples.
    """

    train: Sequence[IntArray]
    order: IntArray
    names: Sequence[str]
    shifts: Sequence[Shift | None] | None = None
    test: Sequence[IntArray] | None = None
    holds_out: Sequence[bool] | None = None
    one_pass: bool = False
    classes: Sequence[IntArray] | None = None


class Splitter(Scenario):
    """Base class of scenarios that assign training samples to tasks; all else is derived from ``split``."""

    @abstractmethod
    def split(self, info: DatasetInfo, seed: int, earlier: Stream | None) -> Split:
        """Assign training samples to tasks.

        Args:
            info: Labels and names of the data set.
            seed: Seed of the tasks; with an earlier stream, of the tasks after it.
            earlier: A stream to extend; its tasks have to be split as before.
        """

    def stream(self, info: DatasetInfo, part: Segment, earlier: Stream | None) -> Stream:
        missing = np.setdiff1d(np.arange(info.num_classes), info.classes_in(np.arange(len(info.train_labels))))
        if missing.size:
            self.fail(
                f"class {info.class_names[missing[0]]!r} has no training samples; add some, or leave the class out"
            )
        chosen = self.split(info, part.seed, earlier)
        count = len(chosen.train)
        for index, (indices, name) in enumerate(zip(chosen.train, chosen.names, strict=True)):
            if not indices.size:
                self.fail(f"task {index} ({name}) has no training samples; use fewer tasks or add data")
        parts = earlier.parts if earlier else ()
        rest = count - sum(old.tasks for old in parts)
        if rest:
            parts = (*parts, Segment(rest, part.seed, part.val_fraction))
        train, val = _hold_out(info, chosen, parts)
        present = chosen.classes or [info.classes_in(indices) for indices in train]
        tasks, order = arrivals(info, present, chosen.order, chosen.names, chosen.shifts or [None] * count)
        return Stream(
            tasks=tasks,
            train=tuple(train),
            val=tuple(val),
            test=assign_tests(info, tasks, chosen.test),
            order=order,
            class_names=tuple(info.class_names[label] for label in order),
            parts=parts,
            one_pass=chosen.one_pass,
            scenario=self.describe(),
        )


def _hold_out(info: DatasetInfo, chosen: Split, parts: Sequence[Segment]) -> tuple[list[IntArray], list[IntArray]]:
    """Split the training samples of each class in each task into training and validation samples."""
    fractions = np.array([part.val_fraction for part in parts for _ in range(part.tasks)])
    if chosen.holds_out is not None:
        fractions = np.where(chosen.holds_out, fractions, 0.0)
    if not fractions.any():
        return list(chosen.train), [np.empty(0, np.int64) for _ in chosen.train]
    if info.train_sets is not None:
        return _hold_out_samples(info, chosen, fractions, parts[0].seed)
    seeds = seed_array(part.seed for part in parts for _ in range(part.tasks))
    task = np.repeat(np.arange(len(chosen.train)), [len(indices) for indices in chosen.train])
    indices = np.concatenate(chosen.train)
    keys = info.keys(indices, seeds[task], draws.VALIDATION)
    place, size = rank_in_group(task * info.num_classes + info.train_labels[indices], keys)
    held = place < np.minimum(round_half_up(size * fractions[task]), size - 1)
    train, val = (split(np.where(mask, task, -1), len(chosen.train)) for mask in (~held, held))
    return [indices[rows] for rows in train], [indices[rows] for rows in val]


def _hold_out_samples(
    info: DatasetInfo, chosen: Split, fractions: np.ndarray, seed: int
) -> tuple[list[IntArray], list[IntArray]]:
    """As :func:`_hold_out` for samples of several classes; one in several tasks is held out in all or in none."""
    place = rank_in_group(
        np.zeros(len(info.train_labels), np.int64), info.keys(np.arange(len(info.train_labels)), seed, draws.VALIDATION)
    )[0]
    train, val = [], []
    for indices, fraction in zip(chosen.train, fractions, strict=True):
        held = place[indices] < round(fraction * len(place))
        if held.all():
            held[place[indices].argmax()] = False
        train.append(indices[~held])
        val.append(indices[held])
    return train, val


def arrivals(
    info: DatasetInfo,
    classes: Sequence[IntArray],
    order: IntArray,
    names: Sequence[str],
    shifts: Sequence[Shift | None],
) -> tuple[tuple[Task, ...], tuple[int, ...]]:
    """Tasks with their classes, and the raw label of each column.

    Args:
        info: Labels and names of the data set.
        classes: Raw labels of each task, each once.
        order: Raw labels; classes that arrive in the same task get their columns in this order.
        names: Name of each task.
        shifts: Shift of each task.
    """
    rank = np.zeros(info.num_classes, np.int64)
    rank[order] = np.arange(len(order))
    present = [order[np.sort(rank[labels])].tolist() for labels in classes]
    return number_tasks(present, names, shifts)


def remaining_classes(info: DatasetInfo, tasks: Sequence[Task], train: Sequence[IntArray]) -> list[IntArray]:
    """Raw labels of each task after its training samples have changed; samples of several classes add none."""
    present = [info.classes_in(indices) for indices in train]
    if info.train_sets is None:
        return present
    return [np.intersect1d(labels, task.classes) for labels, task in zip(present, tasks, strict=True)]


def assign_tests(info: DatasetInfo, tasks: Sequence[Task], test: Sequence[IntArray] | None) -> tuple[IntArray, ...]:
    """Indices of the test samples of each task: as given, or by class, and never before their class is seen."""
    first = np.full(info.num_classes, -1, np.int64)
    for task in tasks:
        first[list(task.new_classes)] = task.index
    seen = info.seen_by(first)
    if test is None:
        return tuple(split(seen, len(tasks)))
    test_task = np.repeat(np.arange(len(tasks)), [len(indices) for indices in test])
    indices = np.concatenate(test)
    test_task = np.maximum(test_task, seen[indices])
    return tuple(np.unique(indices[rows]) for rows in split(test_task, len(tasks)))


def samples_of_groups(info: DatasetInfo, groups: Sequence[IntArray]) -> list[IntArray]:
    """Indices of the training samples of each group of classes."""
    group_of_class = np.full(info.num_classes, -1, np.int64)
    for index, group in enumerate(groups):
        group_of_class[group] = index
    return split(group_of_class[info.train_labels], len(groups))


def order_classes(scenario: Scenario, order: Order, info: DatasetInfo, classes: IntArray, seed: int) -> IntArray:
    """Sort classes by order of arrival.

    Args:
        scenario: The scenario, for errors.
        order: ``natural``: by raw label; ``random``: by the seed of the stream; a number n: by
            ``RandomState(n).permutation``, where n = 1993 is the order of published tables; a list of all raw labels or
            all names.
        info: Labels and names of the data set.
        classes: Raw labels, ascending.
        seed: Seed of the stream.
    """
    if order == "natural":
        return classes
    if order == "random":
        return classes[np.argsort(hash64(seed, draws.ORDER, info.name_keys[classes]), kind="stable")]
    if isinstance(order, int):
        return classes[np.random.RandomState(order).permutation(len(classes))]
    number = {name: label for label, name in enumerate(info.class_names)}
    for item in order:
        if (item not in number) if isinstance(item, str) else not 0 <= item < info.num_classes:
            scenario.fail(f"class_order has {item!r}, which is no class of the data")
    labels = [number[item] if isinstance(item, str) else item for item in order]
    if twice := repeats(labels):
        scenario.fail(f"class_order has class {twice[0]} ({info.class_names[twice[0]]}) more than once")
    missing = np.setdiff1d(classes, labels)
    if missing.size:
        scenario.fail(
            f"class_order lacks class {missing[0]} ({info.class_names[missing[0]]}); "
            f"it must have each of the {len(classes)} classes once"
        )
    listed = np.array(labels, np.int64)
    return listed[np.isin(listed, classes)]


def check_order(scenario: Scenario, order: Order) -> None:
    if isinstance(order, str) and order not in ("natural", "random"):
        scenario.fail(f"class_order {order!r}; use natural, random, a number, or a list of labels or names")
    if isinstance(order, int) and not 0 <= order < 2**32:
        scenario.fail(f"class_order {order} is no seed; use a number in 0 .. 2**32 - 1")


def known_classes(scenario: Scenario, info: DatasetInfo, earlier: Stream | None) -> tuple[list[IntArray], IntArray]:
    """Raw labels, in the current data, of the new classes of each earlier task, and of the classes of no task."""
    number = {name: label for label, name in enumerate(info.class_names)}
    names = earlier.class_names if earlier else ()
    if gone := [name for name in names if name not in number]:
        scenario.fail(f"the data lacks {len(gone)} classes of the stream, the first is {gone[0]!r}; add them again")
    labels = np.array([number[name] for name in names], np.int64)
    stops = [task.num_seen for task in earlier.tasks] if earlier else []
    groups = np.split(labels, stops)[:-1] if earlier else []
    return groups, np.setdiff1d(np.arange(info.num_classes), labels)


def chunks(classes: IntArray, size: int) -> list[IntArray]:
    """Groups of ``size`` classes; the last group has the remainder."""
    return [classes[start : start + size] for start in range(0, len(classes), size)]


def earlier_first(scenario: Scenario, info: DatasetInfo, earlier: Stream | None) -> IntArray:
    """All raw labels: classes of earlier tasks by column, then the other classes by label."""
    groups, fresh = known_classes(scenario, info, earlier)
    return np.concatenate([*groups, fresh])
