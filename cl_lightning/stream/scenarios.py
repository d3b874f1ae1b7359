"""Scenarios in which classes arrive."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cl_lightning.stream import draws
from cl_lightning.stream.core import Catalogue, Part, Stream, repeats
from cl_lightning.stream.dealing import (
    Deal,
    Dealer,
    Order,
    Scenario,
    check_order,
    chunks,
    home_by_class,
    known_classes,
    order_classes,
)
from cl_lightning.stream.draws import IntArray, nearest, places, split


@dataclass(frozen=True)
class ClassIncremental(Dealer):
    """Each task brings new classes with all their samples, and no class comes back.

    Args:
        tasks: Number of tasks.
        first: Classes of the first task; as many as the others by default.
        increment: Classes of each further task.
        sizes: Classes of each task; instead of the three above.
        class_order: Order of arrival: ``natural`` (by raw label), ``random`` (by the seed of the stream), a number n
            (``RandomState(n).permutation``; published tables use 1993), or a list of all raw labels or all names.

    When a stream is extended, new classes are ordered among themselves and dealt in tasks of ``increment`` (or the size
    of the last task given); a remainder is a task of its own.
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

    def deal(self, catalogue: Catalogue, seed: int, earlier: Stream | None) -> Deal:
        groups, fresh = known_classes(self, catalogue, earlier)
        fresh = order_classes(self, self.class_order, catalogue, fresh, seed)
        if earlier:
            groups += chunks(fresh, self._further(earlier))
        else:
            groups = np.split(fresh, np.cumsum(self.task_sizes(catalogue.num_classes))[:-1])
        names = [f"task {index}" for index in range(len(groups))]
        return Deal(home_by_class(catalogue, groups), np.concatenate(groups), names)

    def task_sizes(self, classes: int) -> list[int]:
        """Number of classes of each task.

        Raises:
            ValueError: The classes do not divide.
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
            assert further is not None  # else the constructor had refused
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
class SingleTask(Dealer):
    """All classes at once: joint training. When the stream is extended, all new classes are one further task."""

    def deal(self, catalogue: Catalogue, seed: int, earlier: Stream | None) -> Deal:
        groups, fresh = known_classes(self, catalogue, earlier)
        groups += [fresh] if fresh.size else []
        names = [f"task {index}" for index in range(len(groups))]
        return Deal(home_by_class(catalogue, groups), np.concatenate(groups), names)


@dataclass(frozen=True)
class FewShot(Dealer):
    """A first task with many samples, then sessions of ``way`` new classes with ``shot`` samples each.

    Few-shot class-incremental learning (Tao et al., CVPR 2020, arXiv:2004.10956). Sessions hold nothing out, so that
    validation samples come from the first task only; test samples are all those of the classes.

    Args:
        base: Classes of the first task.
        way: New classes of each further task.
        shot: Training samples of each of these.
        index_lists: Published lists: the training indices of each session after the first, or a file of them (JSON, a
            list of lists; or text, a line of numbers for each session). Drawn by the seed by default.
        class_order: As for ``ClassIncremental``; published lists belong to ``natural``.

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

    def deal(self, catalogue: Catalogue, seed: int, earlier: Stream | None) -> Deal:
        groups, fresh = known_classes(self, catalogue, earlier)
        fresh = order_classes(self, self.class_order, catalogue, fresh, seed)
        if not earlier:
            rest = catalogue.num_classes - self.base
            if rest < 0:
                self.fail(f"base has {self.base} classes, the data {catalogue.num_classes}; use a smaller base")
            if rest % self.way:
                self.fail(
                    f"{rest} classes after the first {self.base} do not split into sessions of {self.way}; "
                    f"use a divisor of {rest} as way"
                )
            groups, fresh = [fresh[: self.base]], fresh[self.base :]
        groups += chunks(fresh, self.way)
        train = home_by_class(catalogue, groups)
        if self.index_lists is None:
            seeds = [part.seed for part in earlier.task_parts] if earlier else []
            seeds += [seed] * (len(groups) - len(seeds))
            train[1:] = [self._draw(catalogue, *pair) for pair in zip(train[1:], seeds[1:], strict=True)]
        else:
            train[1:] = self._listed(catalogue, groups[1:])
        names = ["base", *(f"session {index}" for index in range(1, len(groups)))]
        holds_out = [index == 0 for index in range(len(groups))]
        return Deal(train, np.concatenate(groups), names, holds_out=holds_out)

    def _draw(self, catalogue: Catalogue, indices: IntArray, seed: int) -> IntArray:
        labels = catalogue.train_labels[indices]
        place, size = places(labels, catalogue.keys(indices, seed, draws.SHOTS))
        if size.min() < self.shot:
            label = labels[size.argmin()]
            self.fail(
                f"class {catalogue.class_names[label]!r} has {size.min()} training samples; "
                f"use at most that many shots, not {self.shot}"
            )
        return indices[place < self.shot]

    def _listed(self, catalogue: Catalogue, groups: Sequence[IntArray]) -> list[IntArray]:
        lists = read_lists(self.index_lists) if isinstance(self.index_lists, str) else self.index_lists or []
        if len(lists) != len(groups):
            self.fail(f"index_lists has {len(lists)} lists for {len(groups)} sessions after the first")
        total, sessions = len(catalogue.train_labels), []
        for session, (indices, group) in enumerate(zip(lists, groups, strict=True), 1):
            if indices and (min(indices) < 0 or max(indices) >= total):
                self.fail(f"the list of session {session} has an index outside 0 .. {total - 1}")
            if twice := repeats(indices):
                self.fail(f"the list of session {session} has index {twice[0]} twice")
            listed = np.sort(np.array(indices, np.int64))
            counts = np.bincount(catalogue.train_labels[listed], minlength=catalogue.num_classes)
            expected = np.zeros_like(counts)
            expected[group] = self.shot
            wrong = np.flatnonzero(counts != expected)
            if wrong.size:
                label = wrong[0]
                self.fail(
                    f"the list of session {session} has {counts[label]} samples of class {label} "
                    f"({catalogue.class_names[label]}) instead of {expected[label]}; "
                    "the data or the class order is not that of the lists"
                )
            sessions.append(listed)
        return sessions


def read_lists(path: str) -> list[list[int]]:
    """Lists of indices from JSON (a list of lists) or text (a line each, numbers apart by spaces or commas).

    Raises:
        ValueError: No such file, or something other than integers.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
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
class Blurry(Dealer):
    """Some classes belong to one task alone, the others come back in all tasks.

    i-Blurry-N-M (Koh et al., ICLR 2022, arXiv:2110.10031). Of the classes, ``disjoint`` percent are split among the
    tasks; the others, the blurry ones, have a task each in which they are major, and ``blurry`` percent of their
    samples are dealt evenly to the other tasks. A test sample is at home in the first task that has its class, so that
    the homes so far hold exactly the classes seen so far.

    Args:
        tasks: Number of tasks.
        disjoint: N, percent of the classes, in 0 .. 100.
        blurry: M, percent of the samples of a blurry class that come in other tasks than its own, in 0 .. 100.
        class_order: As for ``ClassIncremental``; the first N percent are disjoint.
        one_pass: Whether samples are seen once.

    When a stream is extended, the new classes are such a stream of their own, with about as many classes to a task.
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

    def deal(self, catalogue: Catalogue, seed: int, earlier: Stream | None) -> Deal:
        stretches, fresh = known_classes(self, catalogue, earlier)
        dealt: list[tuple[IntArray, int, int]] = []  # classes, tasks and seed of each part
        for part in earlier.parts if earlier else ():
            mine, stretches = stretches[: part.tasks], stretches[part.tasks :]
            dealt.append((np.sort(np.concatenate(mine)), part.tasks, part.seed))
        if fresh.size:
            tasks = max(1, round(len(fresh) * dealt[0][1] / len(dealt[0][0]))) if dealt else self.tasks
            dealt.append((fresh, tasks, seed))
        task = np.full(len(catalogue.train_labels), -1, np.int64)
        order, start = [], 0
        for classes, tasks, its_seed in dealt:
            order.append(self._deal_part(catalogue, classes, tasks, its_seed, start, task))
            start += tasks
        names = [f"task {index}" for index in range(start)]
        return Deal(split(task, start), np.concatenate(order), names, one_pass=self.one_pass)

    def _deal_part(
        self, catalogue: Catalogue, classes: IntArray, tasks: int, seed: int, start: int, task: IntArray
    ) -> IntArray:
        """Set ``task`` of the samples of the classes; the classes by home are returned."""
        classes = order_classes(self, self.class_order, catalogue, classes, seed)
        sharp, soft = np.split(classes, [int(len(classes) * self.disjoint / 100 + 0.5)])
        home, blurs = np.full(catalogue.num_classes, -1, np.int64), np.zeros(catalogue.num_classes, bool)
        for group in (sharp, soft):
            for index, members in enumerate(np.array_split(group, tasks)):
                home[members] = index
        blurs[soft] = tasks > 1
        indices = np.flatnonzero(home[catalogue.train_labels] >= 0)
        labels = catalogue.train_labels[indices]
        place, size = places(labels, catalogue.keys(indices, seed, draws.MINOR))
        target = home[labels]
        minor = blurs[labels] & (place < nearest(size * (self.blurry / 100)))
        if minor.any():
            # All minor samples of a home are shuffled and go to the other tasks in turn.
            turn, _ = places(target[minor], catalogue.keys(indices[minor], seed, draws.DEALING))
            target[minor] = (target[minor] + 1 + turn % (tasks - 1)) % tasks
        task[indices] = start + target
        return classes[np.argsort(home[classes], kind="stable")]


@dataclass(frozen=True)
class FromManifest(Scenario):
    """The stream that a manifest tells, sample by sample; seed and validation share are those of the manifest.

    Args:
        path: File that ``Stream.save`` wrote.
    """

    path: str

    def stream(self, catalogue: Catalogue, part: Part, earlier: Stream | None) -> Stream:
        if earlier:
            self.fail("a manifest has no rule to extend it by; use the scenario that made the stream")
        stream = Stream.load(self.path)
        try:
            stream.check(catalogue)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        return stream
