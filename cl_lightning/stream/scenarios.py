"""Class-incremental scenarios: new classes arrive with the tasks."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cl_lightning.files import read_text
from cl_lightning.hashing import IntArray
from cl_lightning.stream import draws
from cl_lightning.stream.core import DatasetInfo, Stream
from cl_lightning.stream.dealing import (
    Order,
    Scenario,
    Split,
    Splitter,
    check_order,
    chunks,
    known_classes,
    order_classes,
    samples_of_groups,
)
from cl_lightning.stream.draws import rank_in_group, round_half_up, split
from cl_lightning.stream.tasks import Segment, repeats


@dataclass(frozen=True)
class ClassIncremental(Splitter):
    """Class-incremental learning: each task has new classes with all their samples, and each class is in one task.

    Args:
        tasks: Number of tasks.
        first: Number of classes of the first task; by default the same as the other tasks.
        increment: Number of classes of each further task.
        sizes: Number of classes of each task, in place of the three above.
        class_order: Order of arrival: ``natural`` (by raw label), ``random`` (by the seed of the stream), a number n
            (``RandomState(n).permutation``; published tables use 1993), or a list of all raw labels or all names.

    When a stream is extended, the new classes are ordered among themselves and split into tasks of ``increment``
    classes (or the size of the last task given); a remainder is a task of its own.
    """

    tasks: int | None = None
    first: int | None = None
    increment: int | None = None
    sizes: list[int] | None = None
    class_order: Order = "natural"

    def __post_init__(self) -> None:
        check_order(self, self.class_order)
        given = {name: getattr(self, name) for name in ("tasks", "first", "increment")}
        for name, value in given.items():
            if value is not None and value < 1:
                self.fail(f"{name} must be at least 1, got {value}")
        if self.sizes is not None:
            if any(value is not None for value in given.values()):
                self.fail("give either sizes or tasks, first and increment")
            if not self.sizes or min(self.sizes) < 1:
                self.fail(f"sizes must hold numbers of at least 1, got {self.sizes}")
        elif self.tasks is None and self.increment is None:
            self.fail("give tasks, increment or sizes")

    def split(self, info: DatasetInfo, seed: int, earlier: Stream | None) -> Split:
        groups, fresh = known_classes(self, info, earlier)
        fresh = order_classes(self, self.class_order, info, fresh, seed)
        if earlier:
            groups += chunks(fresh, self._further(earlier))
        else:
            groups = np.split(fresh, np.cumsum(self.task_sizes(info.num_classes))[:-1])
        names = [f"task {index}" for index in range(len(groups))]
        return Split(samples_of_groups(info, groups), np.concatenate(groups), names)

    def task_sizes(self, classes: int) -> list[int]:
        """Number of classes of each task.

        Raises:
            ValueError: If the number of classes does not fit the options.
        """
        if self.sizes is not None:
            if sum(self.sizes) != classes:
                self.fail(f"sizes {self.sizes} add up to {sum(self.sizes)}; the data has {classes} classes")
            return self.sizes
        if self.first is None:
            rest, further, after = classes, self.tasks, ""
        else:
            rest, further = classes - self.first, None if self.tasks is None else self.tasks - 1
            after = f" after the first {self.first}"
            if rest < 0:
                self.fail(f"the first task has {self.first} classes, the data {classes}; use a smaller first")
        remedy = f"use a divisor of {rest} or give sizes"
        if self.increment is None:
            assert further is not None  # checked by the constructor
            if rest % further if further else rest:
                self.fail(f"{rest} classes{after} do not split into {further} equal tasks; {remedy}")
            sizes = [rest // further] * further if further else []
        else:
            if rest % self.increment:
                self.fail(f"{rest} classes{after} do not split into tasks of {self.increment}; {remedy}")
            sizes = [self.increment] * (rest // self.increment)
            if further is not None and further != len(sizes):
                self.fail(f"{rest} classes{after} in tasks of {self.increment} are {len(sizes)} tasks, not {further}")
        if 0 in sizes:
            self.fail(f"{rest} classes{after} are too few for {further} tasks; use fewer tasks")
        return sizes if self.first is None else [self.first, *sizes]

    def _further(self, earlier: Stream) -> int:
        if self.sizes is not None:
            return self.sizes[-1]
        return self.increment or earlier.part_tasks[0][-1].num_new


@dataclass(frozen=True)
class SingleTask(Splitter):
    """Joint training: all classes in one task. When the stream is extended, all new classes are one further task."""

    def split(self, info: DatasetInfo, seed: int, earlier: Stream | None) -> Split:
        groups, fresh = known_classes(self, info, earlier)
        groups += [fresh] if fresh.size else []
        names = [f"task {index}" for index in range(len(groups))]
        return Split(samples_of_groups(info, groups), np.concatenate(groups), names)


@dataclass(frozen=True)
class Rounds(Splitter):
    """Rounds over one pool of samples, for active learning: every task has all classes and all training samples.

    A method that queries labels trains on the samples that it has chosen; others train on the pool again and again. All
    test samples belong to the first round, so the first column of the accuracy matrix has the accuracy after each
    round. The stream cannot be extended.

    Args:
        rounds: Number of tasks, at least 1.
    """

    rounds: int = 10

    def __post_init__(self) -> None:
        if self.rounds < 1:
            self.fail(f"rounds must be at least 1, got {self.rounds}")

    def split(self, info: DatasetInfo, seed: int, earlier: Stream | None) -> Split:
        if earlier is not None:
            self.fail("the pool of the earlier rounds would change; make a new stream")
        pool, test = np.arange(len(info.train_labels)), np.arange(len(info.test_labels))
        return Split(
            [pool] * self.rounds,
            np.arange(info.num_classes),
            [f"round {index}" for index in range(self.rounds)],
            test=[test, *[test[:0]] * (self.rounds - 1)],
        )


@dataclass(frozen=True)
class FewShot(Splitter):
    """Few-shot class-incremental learning (Tao et al., CVPR 2020, arXiv:2004.10956).

    A first task with many samples is followed by sessions of ``way`` new classes with ``shot`` samples each. Only the
    first task has validation samples. All test samples of the classes are used.

    Args:
        base: Number of classes of the first task.
        way: Number of new classes of each further task.
        shot: Number of training samples of each new class.
        index_lists: Published lists: the training indices of each session after the first, or a file of them (JSON, a
            list of lists; or text, a line of numbers per session). By default the samples are drawn by the seed.
        class_order: As for ``ClassIncremental``; published lists assume ``natural``.

    When a stream is extended, new classes are further sessions; a remainder is a session of fewer classes.
    """

    base: int
    way: int
    shot: int
    index_lists: list[list[int]] | str | None = None
    class_order: Order = "natural"

    def __post_init__(self) -> None:
        check_order(self, self.class_order)
        for name in ("base", "way", "shot"):
            if getattr(self, name) < 1:
                self.fail(f"{name} must be at least 1, got {getattr(self, name)}")

    def split(self, info: DatasetInfo, seed: int, earlier: Stream | None) -> Split:
        groups, fresh = known_classes(self, info, earlier)
        fresh = order_classes(self, self.class_order, info, fresh, seed)
        if not earlier:
            rest = info.num_classes - self.base
            if rest < 0:
                self.fail(f"base has {self.base} classes, the data {info.num_classes}; use a smaller base")
            if rest % self.way:
                self.fail(
                    f"{rest} classes after the first {self.base} do not split into sessions of {self.way}; "
                    f"use a divisor of {rest} as way"
                )
            groups, fresh = [fresh[: self.base]], fresh[self.base :]
        groups += chunks(fresh, self.way)
        train = samples_of_groups(info, groups)
        if self.index_lists is None:
            seeds = [part.seed for part in earlier.task_parts] if earlier else []
            seeds += [seed] * (len(groups) - len(seeds))
            train[1:] = [self._draw(info, *pair) for pair in zip(train[1:], seeds[1:], strict=True)]
        else:
            train[1:] = self._listed(info, groups[1:])
        names = ["base", *(f"session {index}" for index in range(1, len(groups)))]
        holds_out = [index == 0 for index in range(len(groups))]
        return Split(train, np.concatenate(groups), names, holds_out=holds_out)

    def _draw(self, info: DatasetInfo, indices: IntArray, seed: int) -> IntArray:
        labels = info.train_labels[indices]
        place, size = rank_in_group(labels, info.keys(indices, seed, draws.SHOTS))
        if size.min() < self.shot:
            label = labels[size.argmin()]
            self.fail(
                f"class {info.class_names[label]!r} has {size.min()} training samples; "
                f"use at most that many shots, not {self.shot}"
            )
        return indices[place < self.shot]

    def _listed(self, info: DatasetInfo, groups: Sequence[IntArray]) -> list[IntArray]:
        lists = read_lists(self.index_lists) if isinstance(self.index_lists, str) else self.index_lists or []
        if len(lists) != len(groups):
            self.fail(f"index_lists has {len(lists)} lists for {len(groups)} sessions after the first")
        total, sessions = len(info.train_labels), []
        for session, (indices, group) in enumerate(zip(lists, groups, strict=True), 1):
            if indices and (min(indices) < 0 or max(indices) >= total):
                self.fail(f"the list of session {session} has an index outside 0 .. {total - 1}")
            if twice := repeats(indices):
                self.fail(f"the list of session {session} has index {twice[0]} twice")
            listed = np.sort(np.array(indices, np.int64))
            counts = np.bincount(info.train_labels[listed], minlength=info.num_classes)
            expected = np.zeros_like(counts)
            expected[group] = self.shot
            wrong = np.flatnonzero(counts != expected)
            if wrong.size:
                label = wrong[0]
                self.fail(
                    f"the list of session {session} has {counts[label]} samples of class {label} "
                    f"({info.class_names[label]}) instead of {expected[label]}; "
                    "the lists were made for other data or another class order"
                )
            sessions.append(listed)
        return sessions


def read_lists(path: str) -> list[list[int]]:
    """Lists of indices from JSON (a list of lists) or text (one list per line, separated by spaces or commas).

    Raises:
        ValueError: If there is no such file, or it holds anything other than integers.
    """
    try:
        text = read_text(path)
        if text.lstrip().startswith("["):
            lists = json.loads(text)
        else:
            lines = (line.partition("#")[0].replace(",", " ").split() for line in text.splitlines())
            lists = [[int(number) for number in line] for line in lines if line]
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not lists of indices: {' '.join(str(error).split())}") from error
    if not all(isinstance(items, list) and set(map(type, items)) <= {int} for items in lists):
        raise ValueError(f"{path}: not lists of indices: it must be a list of lists of integers")
    return lists  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Blurry(Splitter):
    """i-Blurry-N-M, blurry task boundaries (Koh et al., ICLR 2022, arXiv:2110.10031).

    ``disjoint`` percent of the classes are split over the tasks and appear in one task alone. Each of the other
    classes, the blurry classes, has a major task; ``blurry`` percent of its samples are split evenly over the other
    tasks. A test sample belongs to the first task with its class, so that the test samples of the tasks so far have
    exactly the classes seen so far.

    Args:
        tasks: Number of tasks.
        disjoint: N, percent of the classes, in 0 .. 100.
        blurry: M, percent of the samples of a blurry class outside its major task, in 0 .. 100.
        class_order: As for ``ClassIncremental``; the first N percent are disjoint.
        one_pass: Whether each sample is seen once.

    When a stream is extended, the new classes form a blurry stream of their own, with about as many classes per task.
    """

    tasks: int = 5
    disjoint: float = 50.0
    blurry: float = 10.0
    class_order: Order = "random"
    one_pass: bool = True

    def __post_init__(self) -> None:
        check_order(self, self.class_order)
        if self.tasks < 1:
            self.fail(f"tasks must be at least 1, got {self.tasks}")
        for name in ("disjoint", "blurry"):
            if not 0 <= getattr(self, name) <= 100:
                self.fail(f"{name} is percent, in 0 .. 100, got {getattr(self, name)}")

    def split(self, info: DatasetInfo, seed: int, earlier: Stream | None) -> Split:
        groups, fresh = known_classes(self, info, earlier)
        segments: list[tuple[IntArray, int, int]] = []  # classes, tasks and seed of each segment
        for part in earlier.parts if earlier else ():
            mine, groups = groups[: part.tasks], groups[part.tasks :]
            segments.append((np.sort(np.concatenate(mine)), part.tasks, part.seed))
        if fresh.size:
            tasks = max(1, round(len(fresh) * segments[0][1] / len(segments[0][0]))) if segments else self.tasks
            segments.append((fresh, tasks, seed))
        task = np.full(len(info.train_labels), -1, np.int64)
        order, start = [], 0
        for classes, tasks, its_seed in segments:
            order.append(self._split_segment(info, classes, tasks, its_seed, start, task))
            start += tasks
        names = [f"task {index}" for index in range(start)]
        return Split(split(task, start), np.concatenate(order), names, one_pass=self.one_pass)

    def _split_segment(
        self, info: DatasetInfo, classes: IntArray, tasks: int, seed: int, start: int, task: IntArray
    ) -> IntArray:
        """Set ``task`` of the samples of the classes; returns the classes sorted by their major task."""
        classes = order_classes(self, self.class_order, info, classes, seed)
        sharp, soft = np.split(classes, [int(len(classes) * self.disjoint / 100 + 0.5)])
        home, blurs = np.full(info.num_classes, -1, np.int64), np.zeros(info.num_classes, bool)
        for group in (sharp, soft):
            for index, members in enumerate(np.array_split(group, tasks)):
                home[members] = index
        blurs[soft] = tasks > 1
        indices = np.flatnonzero(home[info.train_labels] >= 0)
        labels = info.train_labels[indices]
        place, size = rank_in_group(labels, info.keys(indices, seed, draws.MINOR))
        target = home[labels]
        minor = blurs[labels] & (place < round_half_up(size * (self.blurry / 100)))
        if minor.any():
            # The minor samples of each major task are shuffled and assigned to the other tasks in turn.
            turn, _ = rank_in_group(target[minor], info.keys(indices[minor], seed, draws.DEALING))
            target[minor] = (target[minor] + 1 + turn % (tasks - 1)) % tasks
        task[indices] = start + target
        return classes[np.argsort(home[classes], kind="stable")]


@dataclass(frozen=True)
class FromManifest(Scenario):
    """The stream of a manifest, with the same samples, seed and validation fraction.

    Args:
        path: File that ``Stream.save`` wrote.
    """

    path: str

    def stream(self, info: DatasetInfo, part: Segment, earlier: Stream | None) -> Stream:
        if earlier:
            self.fail("a manifest cannot be extended; use the scenario that made the stream")
        stream = Stream.load(self.path)
        try:
            stream.check(info)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        return stream
