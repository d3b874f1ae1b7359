"""Scenarios around another scenario, which change the stream that it makes."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from cl_lightning.stream import draws
from cl_lightning.stream.core import Catalogue, Part, Stream
from cl_lightning.stream.dealing import Scenario, arrivals, homes
from cl_lightning.stream.draws import IntArray, KeyArray, mix, nearest, places, seed_array, split


class Modifier(Scenario):
    """A scenario that changes the stream of another one."""

    base: Scenario

    @abstractmethod
    def change(self, stream: Stream, catalogue: Catalogue) -> Stream:
        """The changed stream; choices are to follow the seeds of ``stream.parts``."""

    def stream(self, catalogue: Catalogue, part: Part, earlier: Stream | None) -> Stream:
        return replace(self.change(self.base.stream(catalogue, part, earlier), catalogue), scenario=self.describe())


@dataclass(frozen=True)
class Online(Modifier):
    """The samples come in small batches and are seen once, or ``passes`` times.

    Args:
        base: What is made a one-pass stream.
        batch_size: Samples that arrive at a time.
        passes: How often the samples of a task are given.
    """

    base: Scenario
    batch_size: int = 10
    passes: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.passes < 1:
            self.fail(f"batch_size and passes must be at least 1, got {self.batch_size} and {self.passes}")

    def change(self, stream: Stream, catalogue: Catalogue) -> Stream:
        return replace(stream, one_pass=True, batch_size=self.batch_size, passes=self.passes)


@dataclass(frozen=True)
class LabelFraction(Modifier):
    """Hides the labels of most training samples: semi-supervised continual learning.

    In each task a class keeps some labels, at least one; samples whose label is hidden stay in the training data.
    Validation samples keep their labels and are not counted.

    Args:
        base: What the labels are hidden in.
        fraction: Share of the samples that keep their label, above 0 and at most 1.
        per_class: Number of samples of a class that keep it, instead of ``fraction``; a class of fewer keeps all.
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

    def change(self, stream: Stream, catalogue: Catalogue) -> Stream:
        task = np.repeat(np.arange(len(stream)), [len(indices) for indices in stream.train])
        indices = np.concatenate(stream.train)
        seeds = seed_array(part.seed for part in stream.task_parts)[task]
        keys = catalogue.keys(indices, seeds, draws.LABELS)
        place, size = places(task * catalogue.num_classes + catalogue.train_labels[indices], keys)
        if self.fraction is not None:
            kept = np.maximum(nearest(size * self.fraction), 1)
        else:
            kept = np.full_like(size, self.per_class)
        hidden = split(np.where(place < kept, -1, task), len(stream))
        return replace(stream, unlabelled=tuple(indices[rows] for rows in hidden))


class Thinning(Modifier):
    """Takes training samples out, class by class; validation samples are thinned alike, down to none."""

    @abstractmethod
    def shares(self, stream: Stream, catalogue: Catalogue) -> tuple[npt.NDArray[np.float64], KeyArray]:
        """Which share of its samples each class keeps, rounded down but at least one sample, and the seeds by which
        they are chosen, both ``(num_classes,)``."""

    def tests(self, stream: Stream, catalogue: Catalogue) -> tuple[IntArray, ...]:
        """Test samples of each task: all of them."""
        return stream.test

    def change(self, stream: Stream, catalogue: Catalogue) -> Stream:
        name = type(self).__name__
        if any(hidden.size for hidden in stream.unlabelled):
            self.fail(f"labels are already hidden, and this might take the rest; put LabelFraction around {name}")
        share, seeds = self.shares(stream, catalogue)
        train = self._thin(stream.train, catalogue, share, seeds, least=1)
        val = self._thin(stream.val, catalogue, share, seeds, least=0)
        labels = catalogue.train_labels
        # A class that comes in several tasks may have left one of them.
        val = [held[np.isin(labels[held], labels[rest])] for held, rest in zip(val, train, strict=True)]
        for task, indices in zip(stream.tasks, train, strict=True):
            if not indices.size:
                self.fail(f"task {task.index} ({task.name}) has no training samples left; take fewer of them out")
        # A class may have left a task, and then arrives later.
        names = [task.name for task in stream.tasks]
        tasks, order = arrivals(catalogue, train, np.array(stream.order), names, stream.shifts)
        return replace(
            stream,
            tasks=tasks,
            order=order,
            class_names=tuple(catalogue.class_names[label] for label in order),
            train=tuple(train),
            val=tuple(val),
            test=homes(catalogue, tasks, self.tests(stream, catalogue)),
            unlabelled=(),
        )

    def _thin(
        self,
        arrays: tuple[IntArray, ...],
        catalogue: Catalogue,
        share: npt.NDArray[np.float64],
        seeds: KeyArray,
        *,
        least: int,
    ) -> list[IntArray]:
        indices = np.unique(np.concatenate(arrays))  # a sample that several tasks have is kept by all or none
        labels = catalogue.train_labels[indices]
        place, size = places(labels, catalogue.keys(indices, seeds[labels], draws.THINNING))
        kept = np.zeros(len(catalogue.train_labels), bool)
        kept[indices] = place < np.maximum(np.floor(size * share[labels] + 1e-9), least)
        return [array[kept[array]] for array in arrays]


@dataclass(frozen=True)
class Subset(Thinning):
    """Keeps some samples of each class: little data, or a stream that is tried out quickly.

    A class of an extension is thinned alike; of a class that gains samples then, more are kept.

    Args:
        base: What is thinned.
        fraction: Share of the training samples of a class that stay, above 0 and at most 1, rounded down; one at least.
        per_class: Number of training samples of a class that stay, instead of ``fraction``; a class of fewer keeps all.
        test_per_class: Number of test samples of a class that stay in each task, the first ones; None for all.
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

    def shares(self, stream: Stream, catalogue: Catalogue) -> tuple[npt.NDArray[np.float64], KeyArray]:
        share = np.full(catalogue.num_classes, 1.0 if self.fraction is None else self.fraction)
        if self.per_class is not None:
            present = catalogue.train_labels[np.unique(np.concatenate(stream.train))]
            share = np.minimum(1.0, self.per_class / np.bincount(present, minlength=len(share)).clip(1))
        seeds = np.zeros(len(share), np.uint64)
        for part, tasks in zip(stream.parts, stream.part_tasks, strict=True):
            seeds[[label for task in tasks for label in task.new_classes]] = seed_array([part.seed])
        return share, seeds

    def tests(self, stream: Stream, catalogue: Catalogue) -> tuple[IntArray, ...]:
        if self.test_per_class is None:
            return stream.test
        return tuple(each[places(catalogue.test_labels[each])[0] < self.test_per_class] for each in stream.test)


@dataclass(frozen=True)
class LongTailed(Thinning):
    """Thins the training data so that class sizes fall off: long-tailed class-incremental learning.

    The i-th of C classes keeps a share imbalance^(-i / (C - 1)) of its samples, rounded down, at least one (profile:
    Cui et al., CVPR 2019, arXiv:1901.05555; scenarios: Liu et al., ECCV 2022, arXiv:2210.00266). Validation samples are
    thinned alike, down to none; test samples stay. When a stream is extended, the new classes have a tail of their own.

    Args:
        base: What is thinned.
        imbalance: Size of the largest class over that of the smallest, at least 1.
        arrangement: ``ordered``: sizes fall in order of arrival; ``shuffled``: large and small classes come mixed.
    """

    base: Scenario
    imbalance: float = 100.0
    arrangement: Literal["ordered", "shuffled"] = "ordered"

    def __post_init__(self) -> None:
        if not (1 <= self.imbalance < float("inf")):
            self.fail(f"imbalance must be at least 1 and finite, got {self.imbalance}")
        if self.arrangement not in ("ordered", "shuffled"):
            self.fail(f"arrangement {self.arrangement!r}; use ordered or shuffled")

    def shares(self, stream: Stream, catalogue: Catalogue) -> tuple[npt.NDArray[np.float64], KeyArray]:
        share = np.ones(catalogue.num_classes)
        seeds = np.zeros(catalogue.num_classes, np.uint64)
        for part, tasks in zip(stream.parts, stream.part_tasks, strict=True):
            classes = np.array([label for task in tasks for label in task.new_classes], np.int64)
            if self.arrangement == "shuffled":
                classes = classes[np.argsort(mix(part.seed, draws.TAIL, catalogue.name_keys[classes]), kind="stable")]
            share[classes] = self.imbalance ** (-np.arange(len(classes)) / max(len(classes) - 1, 1))
            seeds[classes] = seed_array([part.seed])
        return share, seeds
