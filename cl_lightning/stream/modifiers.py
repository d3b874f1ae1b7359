"""Modifiers: scenarios that wrap another scenario and change its stream."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from cl_lightning.hashing import IntArray, KeyArray, hash64, seed_array
from cl_lightning.stream import draws
from cl_lightning.stream.core import DatasetInfo, Stream
from cl_lightning.stream.dealing import Scenario, arrivals, assign_tests, remaining_classes
from cl_lightning.stream.draws import rank_in_group, round_half_up, split
from cl_lightning.stream.tasks import Segment


class Modifier(Scenario):
    """Base class of scenarios that change the stream of another scenario."""

    base: Scenario

    @abstractmethod
    def change(self, stream: Stream, info: DatasetInfo) -> Stream:
        """The changed stream; random choices use the seeds of ``stream.parts``."""

    def stream(self, info: DatasetInfo, part: Segment, earlier: Stream | None) -> Stream:
        stream = self.base.stream(info, part, earlier)
        if any(task.request != "learn" for task in stream.tasks):
            self.fail("the base has requests to hold, keep or forget samples; put Requests around all other modifiers")
        return replace(self.change(stream, info), scenario=self.describe())


@dataclass(frozen=True)
class Online(Modifier):
    """Online continual learning: samples arrive in small batches and are seen once, or ``passes`` times.

    Args:
        base: Scenario to make a one-pass stream of.
        batch_size: Samples per batch.
        passes: Number of passes over the samples of a task.
    """

    base: Scenario
    batch_size: int = 10
    passes: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.passes < 1:
            self.fail(f"batch_size and passes must be at least 1, got {self.batch_size} and {self.passes}")

    def change(self, stream: Stream, info: DatasetInfo) -> Stream:
        return replace(stream, one_pass=True, batch_size=self.batch_size, passes=self.passes)


@dataclass(frozen=True)
class LabelFraction(Modifier):
    """Semi-supervised continual learning: the labels of most training samples are hidden.

    In each task a class keeps at least one label. Samples with a hidden label stay in the training data. Validation
    samples keep their labels and are not counted.

    Args:
        base: Scenario whose labels are hidden.
        fraction: Fraction of the samples of a class that keep their label, above 0 and at most 1.
        per_class: Number of samples of a class that keep their label, in place of ``fraction``; a class with fewer
            samples keeps all.
    """

    base: Scenario
    fraction: float | None = None
    per_class: int | None = None

    def __post_init__(self) -> None:
        if (self.fraction is None) == (self.per_class is None):
            self.fail("give either fraction or per_class")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            self.fail(f"fraction must be above 0 and at most 1, got {self.fraction}")
        if self.per_class is not None and self.per_class < 1:
            self.fail(f"per_class must be at least 1, got {self.per_class}")

    def change(self, stream: Stream, info: DatasetInfo) -> Stream:
        _refuse_noise(self, stream)
        task = np.repeat(np.arange(len(stream)), [len(indices) for indices in stream.train])
        indices = np.concatenate(stream.train)
        seeds = seed_array(part.seed for part in stream.task_parts)[task]
        keys = info.keys(indices, seeds, draws.LABELS)
        place, size = rank_in_group(task * info.num_classes + info.train_labels[indices], keys)
        if self.fraction is not None:
            kept = np.maximum(round_half_up(size * self.fraction), 1)
        else:
            kept = np.full_like(size, self.per_class)
        hidden = split(np.where(place < kept, -1, task), len(stream))
        return replace(stream, unlabelled=tuple(indices[rows] for rows in hidden))


@dataclass(frozen=True)
class NoisyLabels(Modifier):
    """Continual learning with noisy labels: some training samples have the label of another class of their task.

    In each class of a task, ``rate`` times the number of labelled samples is rounded to the number of wrong labels; at
    least one label stays correct. Validation and test samples keep their labels, and samples whose label is hidden are
    not counted. A sample of several tasks has one label, drawn among the classes of the first of them.

    Args:
        base: Scenario whose labels are changed.
        rate: Fraction of the labelled samples of a class that get a wrong label, at least 0 and below 1. It counts
            wrong labels only: no label is drawn that happens to be the correct one.
        kind: ``symmetric``: the wrong label is drawn uniformly among the other classes of the task; ``asymmetric``: it
            is the next class of the task in order of columns, and the first class after the last one.

    Raises:
        ValueError: If a task has one class only, or labels are already noisy.
    """

    base: Scenario
    rate: float
    kind: Literal["symmetric", "asymmetric"] = "symmetric"

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            self.fail(f"rate must be at least 0 and below 1, got {self.rate}")
        if self.kind not in ("symmetric", "asymmetric"):
            self.fail(f"kind {self.kind!r}; use symmetric or asymmetric")

    def change(self, stream: Stream, info: DatasetInfo) -> Stream:
        _refuse_noise(self, stream)
        counts = np.array([len(task.classes) for task in stream.tasks])
        if self.rate and counts.min() < 2:
            single = stream.tasks[int(counts.argmin())]
            self.fail(
                f"task {single.index} ({single.name}) has one class, and no other label to give; use larger tasks"
            )
        labelled = [np.setdiff1d(*pair) for pair in zip(stream.train, stream.unlabelled, strict=True)]
        indices, first = np.unique(np.concatenate(labelled), return_index=True)
        task = np.repeat(np.arange(len(stream)), [len(rows) for rows in labelled])[first]
        hidden = np.isin(indices, np.concatenate(stream.unlabelled))
        indices, task = indices[~hidden], task[~hidden]

        seeds = seed_array(part.seed for part in stream.task_parts)[task]
        group = task * info.num_classes + info.train_labels[indices]
        rank, size = rank_in_group(group, info.keys(indices, seeds, draws.NOISE))
        wrong = rank < np.minimum(round_half_up(size * self.rate), size - 1)
        indices, task, seeds = indices[wrong], task[wrong], seeds[wrong]

        # Classes of all tasks in one array, the classes of a task from ``start`` on in order of columns.
        start = np.cumsum(counts) - counts
        classes = np.concatenate([np.array(each.classes, np.int64) for each in stream.tasks])
        place = np.zeros((len(stream), info.num_classes), np.int64)
        for each in stream.tasks:
            place[each.index, list(each.classes)] = np.arange(len(each.classes))
        steps = np.ones(len(indices), np.int64)  # from the class of the data to the given class
        if self.kind == "symmetric":
            others = (counts[task] - 1).astype(np.uint64)
            steps += (info.keys(indices, seeds, draws.WRONG_LABEL) % others).astype(np.int64)
        given = classes[start[task] + (place[task, info.train_labels[indices]] + steps) % counts[task]]
        noisy = [np.isin(indices, part) for part in stream.train]
        for each, rows in zip(stream.tasks, noisy, strict=True):
            if not np.isin(given[rows], each.classes).all():
                self.fail(
                    f"task {each.index} ({each.name}) has samples of an earlier task with labels that are no classes "
                    f"of task {each.index}; use a base whose tasks share no samples, or share all classes"
                )
        return replace(stream, noisy=tuple(indices[rows] for rows in noisy), given=tuple(given[rows] for rows in noisy))


@dataclass(frozen=True)
class Discovery(Modifier):
    """Discovery of classes: a first task with labels, then sessions without labels that mix old and new classes.

    A share of the samples of each class is kept back from the task in which the class arrives, and split evenly over
    the later tasks of the stream. The labels of all training samples after the first task are hidden (continual
    generalised category discovery: Wu et al., ICCV 2023, arXiv:2308.11063). A test sample belongs to the first task
    with its class. When a stream is extended, earlier tasks keep their samples: those of a class go to tasks that were
    made together with its own.

    Args:
        base: Scenario whose later tasks become sessions.
        later: Share of the samples of a class that later sessions have, in [0, 1); 0 for sessions of new classes alone.
    """

    base: Scenario
    later: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.later < 1:
            self.fail(f"later must be at least 0 and below 1, got {self.later}")

    def change(self, stream: Stream, info: DatasetInfo) -> Stream:
        _refuse_noise(self, stream)
        if any(hidden.size for hidden in stream.unlabelled):
            self.fail("labels are already hidden; leave LabelFraction out")
        task = np.repeat(np.arange(len(stream)), [len(indices) for indices in stream.train])
        indices = np.concatenate(stream.train)
        if len(np.unique(indices)) != len(indices):
            self.fail("a sample is in several tasks; use a base whose tasks share no samples")
        stops = np.cumsum([part.tasks for part in stream.parts])
        sessions = (np.repeat(stops, [part.tasks for part in stream.parts]) - 1 - np.arange(len(stream)))[task]
        keys = info.keys(indices, seed_array(part.seed for part in stream.task_parts)[task], draws.DISCOVERY)
        place, size = rank_in_group(task * info.num_classes + info.train_labels[indices], keys)
        moved = (place < np.minimum(round_half_up(size * self.later), size - 1)) & (sessions > 0)
        task = np.where(moved, task + 1 + place % np.maximum(sessions, 1), task)
        train = [np.sort(indices[rows]) for rows in split(task, len(stream))]
        names = [each.name for each in stream.tasks]
        tasks, order = arrivals(
            info, remaining_classes(info, stream.tasks, train), np.array(stream.order), names, stream.shifts
        )
        return replace(
            stream,
            tasks=tasks,
            order=order,
            class_names=tuple(info.class_names[label] for label in order),
            train=tuple(train),
            test=assign_tests(info, tasks, stream.test),
            unlabelled=(np.empty(0, np.int64), *train[1:]),
        )


def _refuse_noise(modifier: Modifier, stream: Stream) -> None:
    if any(part.size for part in stream.noisy):
        modifier.fail(f"labels are noisy already; put NoisyLabels around {type(modifier).__name__}, and only once")


class Subsampling(Modifier):
    """Base class of modifiers that remove training samples of each class; validation samples likewise, possibly all."""

    @abstractmethod
    def shares(self, stream: Stream, info: DatasetInfo) -> tuple[npt.NDArray[np.float64], KeyArray]:
        """Fraction of the samples that each class keeps, rounded down but at least one sample, and the seeds of the
        choice, both ``(num_classes,)``."""

    def tests(self, stream: Stream, info: DatasetInfo) -> tuple[IntArray, ...]:
        """Test samples of each task: all of them."""
        return stream.test

    def change(self, stream: Stream, info: DatasetInfo) -> Stream:
        name = type(self).__name__
        _refuse_noise(self, stream)
        if any(hidden.size for hidden in stream.unlabelled):
            self.fail(
                f"labels are already hidden, and and a class might lose all labels; put LabelFraction around {name}"
            )
        share, seeds = self.shares(stream, info)
        train = self._thin(stream.train, info, share, seeds, least=1)
        val = self._thin(stream.val, info, share, seeds, least=0)
        labels = info.train_labels
        # A class of several tasks may have no training samples left in one of them.
        val = [held[np.isin(labels[held], labels[rest])] for held, rest in zip(val, train, strict=True)]
        for task, indices in zip(stream.tasks, train, strict=True):
            if not indices.size:
                self.fail(f"task {task.index} ({task.name}) has no training samples left; remove fewer of them")
        # A class without samples left in its first task arrives in a later task.
        names = [task.name for task in stream.tasks]
        tasks, order = arrivals(
            info, remaining_classes(info, stream.tasks, train), np.array(stream.order), names, stream.shifts
        )
        return replace(
            stream,
            tasks=tasks,
            order=order,
            class_names=tuple(info.class_names[label] for label in order),
            train=tuple(train),
            val=tuple(val),
            test=assign_tests(info, tasks, self.tests(stream, info)),
            unlabelled=(),
        )

    def _thin(
        self,
        arrays: tuple[IntArray, ...],
        info: DatasetInfo,
        share: npt.NDArray[np.float64],
        seeds: KeyArray,
        *,
        least: int,
    ) -> list[IntArray]:
        indices = np.unique(np.concatenate(arrays))  # a sample of several tasks is kept in all of them or in none
        labels = info.train_labels[indices]
        place, size = rank_in_group(labels, info.keys(indices, seeds[labels], draws.THINNING))
        kept = np.zeros(len(info.train_labels), bool)
        kept[indices] = place < np.maximum(np.floor(size * share[labels] + 1e-9), least)
        return [array[kept[array]] for array in arrays]


@dataclass(frozen=True)
class Subset(Subsampling):
    """A subset of the samples of each class, for learning from little data or for a quick test of a stream.

    The classes of an extension are subsampled in the same way; a class that has more samples in the extension keeps
    more of them.

    Args:
        base: Scenario to subsample.
        fraction: Fraction of the training samples of a class to keep, above 0 and at most 1, rounded down; at least
            one sample.
        per_class: Number of training samples of a class to keep, in place of ``fraction``; a class with fewer samples
            keeps all.
        test_per_class: Number of test samples of a class to keep in each task, the first ones; None for all.
    """

    base: Scenario
    fraction: float | None = None
    per_class: int | None = None
    test_per_class: int | None = None

    def __post_init__(self) -> None:
        if self.fraction is not None and self.per_class is not None:
            self.fail("give fraction or per_class, not both")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            self.fail(f"fraction must be above 0 and at most 1, got {self.fraction}")
        for name in ("per_class", "test_per_class"):
            if (count := getattr(self, name)) is not None and count < 1:
                self.fail(f"{name} must be at least 1, got {count}")

    def shares(self, stream: Stream, info: DatasetInfo) -> tuple[npt.NDArray[np.float64], KeyArray]:
        share = np.full(info.num_classes, 1.0 if self.fraction is None else self.fraction)
        if self.per_class is not None:
            present = info.train_labels[np.unique(np.concatenate(stream.train))]
            share = np.minimum(1.0, self.per_class / np.bincount(present, minlength=len(share)).clip(1))
        seeds = np.zeros(len(share), np.uint64)
        for part, tasks in zip(stream.parts, stream.part_tasks, strict=True):
            seeds[[label for task in tasks for label in task.new_classes]] = seed_array([part.seed])
        return share, seeds

    def tests(self, stream: Stream, info: DatasetInfo) -> tuple[IntArray, ...]:
        if self.test_per_class is None:
            return stream.test
        return tuple(each[rank_in_group(info.test_labels[each])[0] < self.test_per_class] for each in stream.test)


@dataclass(frozen=True)
class LongTailed(Subsampling):
    """Long-tailed class-incremental learning: training data is subsampled to exponentially decreasing class sizes.

    The i-th of C classes keeps a fraction imbalance^(-i / (C - 1)) of its samples, rounded down, at least one (profile:
    Cui et al., CVPR 2019, arXiv:1901.05555; scenarios: Liu et al., ECCV 2022, arXiv:2210.00266). Validation samples are
    subsampled in the same way, possibly to none; all test samples are kept. When a stream is extended, the new classes
    have a profile of their own.

    Args:
        base: Scenario to subsample.
        imbalance: Size of the largest class divided by the size of the smallest, at least 1.
        arrangement: ``ordered``: sizes decrease in order of arrival; ``shuffled``: large and small classes are mixed.
    """

    base: Scenario
    imbalance: float = 100.0
    arrangement: Literal["ordered", "shuffled"] = "ordered"

    def __post_init__(self) -> None:
        if not (1 <= self.imbalance < float("inf")):
            self.fail(f"imbalance must be at least 1 and finite, got {self.imbalance}")
        if self.arrangement not in ("ordered", "shuffled"):
            self.fail(f"arrangement {self.arrangement!r}; use ordered or shuffled")

    def shares(self, stream: Stream, info: DatasetInfo) -> tuple[npt.NDArray[np.float64], KeyArray]:
        share = np.ones(info.num_classes)
        seeds = np.zeros(info.num_classes, np.uint64)
        for part, tasks in zip(stream.parts, stream.part_tasks, strict=True):
            classes = np.array([label for task in tasks for label in task.new_classes], np.int64)
            if self.arrangement == "shuffled":
                classes = classes[np.argsort(hash64(part.seed, draws.TAIL, info.name_keys[classes]), kind="stable")]
            share[classes] = self.imbalance ** (-np.arange(len(classes)) / max(len(classes) - 1, 1))
            seeds[classes] = seed_array([part.seed])
        return share, seeds
