"""How a scenario deals: the base classes, and what the scenarios share.

A scenario is a frozen dataclass of options, called with a catalogue and a seed. A new one subclasses ``Dealer`` and
says in ``deal`` which training samples come in which task; columns, homes of test samples, validation and manifest
follow.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np

from cl_lightning.stream import draws
from cl_lightning.stream.core import Catalogue, Part, Shift, Stream, Task, number_tasks, repeats
from cl_lightning.stream.draws import IntArray, mix, nearest, places, seed_array, split

Order = Literal["natural", "random"] | int | list[int] | list[str]


class Scenario(ABC):
    """Deals a data set out over tasks."""

    def __call__(self, catalogue: Catalogue, *, seed: int, val_fraction: float = 0.0) -> Stream:
        """Make the stream.

        Args:
            catalogue: What the data set tells of its samples.
            seed: Decides everything that is left to chance, and nothing else does.
            val_fraction: Share of the training samples of each class in each task to hold out, in [0, 1); rounded to
                whole samples, and at least one sample stays in training.

        Raises:
            ValueError: The options do not fit the data.
        """
        return self.stream(catalogue, Part(1, seed, val_fraction), None)

    def extend(self, stream: Stream, catalogue: Catalogue, *, seed: int, val_fraction: float = 0.0) -> Stream:
        """Continue a stream of this scenario with what the data has gained.

        Earlier tasks keep their classes, domains, columns, and, for unchanged classes, their samples, also where labels
        and indices have shifted; classes and domains are known by name.

        Args:
            stream: The earlier stream.
            catalogue: What the data set tells now.
            seed: For the new tasks; the earlier ones keep theirs.
            val_fraction: For the new tasks; the earlier ones keep theirs.

        Raises:
            ValueError: The data has gained nothing or lost a class of the stream, or the scenario is another one.
        """
        mine, its = (_class_paths(scenario) for scenario in (self.describe(), stream.scenario))
        if its and mine != its:
            self.fail(f"the stream to extend was made by {' of '.join(its)}; extend it by the same")
        longer = self.stream(catalogue, Part(1, seed, val_fraction), stream)
        for old, new in zip(stream.tasks, longer.tasks, strict=False):
            before, after = stream.names_of(old), longer.names_of(new)
            if before != after:
                changed = sorted(set(before) ^ set(after)) or ["their order"]
                self.fail(f"the classes of task {old.index} ({old.name}) would change: {', '.join(changed[:5])}")
            if (old.name, old.domain) != (new.name, new.domain):
                self.fail(f"task {old.index} ({old.name}) would become {new.name}; keep the options of the stream")
        if len(longer) <= len(stream):
            self.fail(f"the data has gained nothing that would give a task after the {len(stream)} of the stream")
        return longer

    @abstractmethod
    def stream(self, catalogue: Catalogue, part: Part, earlier: Stream | None) -> Stream:
        """The stream of the data, or the earlier stream and a part after it.

        Args:
            catalogue: What the data tells.
            part: Seed and validation share of the new tasks; how many they are is for the scenario to say.
            earlier: The stream to continue, if any.
        """

    def describe(self) -> dict[str, Any]:
        """Class path and arguments, as in a config."""
        return {
            "class_path": f"{type(self).__module__}.{type(self).__qualname__}",
            "init_args": {item.name: _plain(getattr(self, item.name)) for item in fields(self)},  # type: ignore[arg-type]
        }

    def fail(self, problem: str) -> NoReturn:
        raise ValueError(f"{type(self).__name__}: {problem}")


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, Scenario):
        return value.describe()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _class_paths(description: Any) -> list[str]:
    """Class path of a scenario and of those that it wraps."""
    paths = []
    while isinstance(description, dict) and "class_path" in description:
        paths.append(str(description["class_path"]).rpartition(".")[2])
        arguments = description.get("init_args")
        description = arguments.get("base") if isinstance(arguments, dict) else None
    return paths


@dataclass
class Deal:
    """Which samples come when.

    Attributes:
        train: Training samples of each task, before validation samples are held out.
        order: All raw labels; classes that arrive together get their columns in this order.
        names: Name of each task.
        shifts: Shift of each task; none by default.
        test: Test samples of each task; by default those of the classes that are new there.
        holds_out: Whether a task gives validation samples; by default all do.
        one_pass: Whether the stream is seen once.
    """

    train: Sequence[IntArray]
    order: IntArray
    names: Sequence[str]
    shifts: Sequence[Shift | None] | None = None
    test: Sequence[IntArray] | None = None
    holds_out: Sequence[bool] | None = None
    one_pass: bool = False


class Dealer(Scenario):
    """A scenario that says which training samples come in which task, and leaves the rest to this class."""

    @abstractmethod
    def deal(self, catalogue: Catalogue, seed: int, earlier: Stream | None) -> Deal:
        """Deal the training samples.

        Args:
            catalogue: What the data tells.
            seed: For the tasks, or for those after the earlier ones.
            earlier: A stream to continue; its tasks are to be dealt as they were.
        """

    def stream(self, catalogue: Catalogue, part: Part, earlier: Stream | None) -> Stream:
        missing = np.flatnonzero(np.bincount(catalogue.train_labels, minlength=catalogue.num_classes) == 0)
        if missing.size:
            self.fail(
                f"class {catalogue.class_names[missing[0]]!r} has no training samples; add some, or leave the class out"
            )
        deal = self.deal(catalogue, part.seed, earlier)
        count = len(deal.train)
        for index, (indices, name) in enumerate(zip(deal.train, deal.names, strict=True)):
            if not indices.size:
                self.fail(f"task {index} ({name}) has no training samples; use fewer tasks or add data")
        parts = earlier.parts if earlier else ()
        rest = count - sum(old.tasks for old in parts)
        if rest:
            parts = (*parts, Part(rest, part.seed, part.val_fraction))
        train, val = _hold_out(catalogue, deal, parts)
        tasks, order = arrivals(catalogue, train, deal.order, deal.names, deal.shifts or [None] * count)
        return Stream(
            tasks=tasks,
            train=tuple(train),
            val=tuple(val),
            test=homes(catalogue, tasks, deal.test),
            order=order,
            class_names=tuple(catalogue.class_names[label] for label in order),
            parts=parts,
            one_pass=deal.one_pass,
            scenario=self.describe(),
        )


def _hold_out(catalogue: Catalogue, deal: Deal, parts: Sequence[Part]) -> tuple[list[IntArray], list[IntArray]]:
    """Split training samples into training and validation, by class within each task."""
    fractions = np.array([part.val_fraction for part in parts for _ in range(part.tasks)])
    if deal.holds_out is not None:
        fractions = np.where(deal.holds_out, fractions, 0.0)
    if not fractions.any():
        return list(deal.train), [np.empty(0, np.int64) for _ in deal.train]
    seeds = seed_array(part.seed for part in parts for _ in range(part.tasks))
    task = np.repeat(np.arange(len(deal.train)), [len(indices) for indices in deal.train])
    indices = np.concatenate(deal.train)
    keys = catalogue.keys(indices, seeds[task], draws.VALIDATION)
    place, size = places(task * catalogue.num_classes + catalogue.train_labels[indices], keys)
    held = place < np.minimum(nearest(size * fractions[task]), size - 1)
    train, val = (split(np.where(mask, task, -1), len(deal.train)) for mask in (~held, held))
    return [indices[rows] for rows in train], [indices[rows] for rows in val]


def arrivals(
    catalogue: Catalogue,
    train: Sequence[IntArray],
    order: IntArray,
    names: Sequence[str],
    shifts: Sequence[Shift | None],
) -> tuple[tuple[Task, ...], tuple[int, ...]]:
    """Tasks of the classes that have training samples, and the raw label of each column.

    Args:
        catalogue: What the data tells.
        train: Training samples of each task.
        order: Raw labels; classes that arrive together get their columns in this order.
        names: Name of each task.
        shifts: Shift of each task.
    """
    rank = np.zeros(catalogue.num_classes, np.int64)
    rank[order] = np.arange(len(order))
    present = [order[np.unique(rank[catalogue.train_labels[indices]])].tolist() for indices in train]
    return number_tasks(present, names, shifts)


def homes(catalogue: Catalogue, tasks: Sequence[Task], test: Sequence[IntArray] | None) -> tuple[IntArray, ...]:
    """Test samples of each task: as given, or with their class, but not before their class has been seen."""
    first = np.full(catalogue.num_classes, -1, np.int64)
    for task in tasks:
        first[list(task.new_classes)] = task.index
    if test is None:
        return tuple(split(first[catalogue.test_labels], len(tasks)))
    home = np.repeat(np.arange(len(tasks)), [len(indices) for indices in test])
    indices = np.concatenate(test)
    home = np.maximum(home, first[catalogue.test_labels[indices]])
    return tuple(np.unique(indices[rows]) for rows in split(home, len(tasks)))


def home_by_class(catalogue: Catalogue, groups: Sequence[IntArray]) -> list[IntArray]:
    """Training samples of the classes of each group."""
    home = np.full(catalogue.num_classes, -1, np.int64)
    for index, group in enumerate(groups):
        home[group] = index
    return split(home[catalogue.train_labels], len(groups))


def order_classes(scenario: Scenario, order: Order, catalogue: Catalogue, classes: IntArray, seed: int) -> IntArray:
    """Put classes in order.

    Args:
        scenario: Who asks, for errors.
        order: ``natural``: by raw label; ``random``: by the seed of the stream; a number n: by
            ``RandomState(n).permutation``, whose order for n = 1993 published tables use; a list of all raw labels or
            all names.
        catalogue: What the data tells.
        classes: Raw labels, ascending.
        seed: Seed of the stream.
    """
    if order == "natural":
        return classes
    if order == "random":
        return classes[np.argsort(mix(seed, draws.ORDER, catalogue.name_keys[classes]), kind="stable")]
    if isinstance(order, int):
        return classes[np.random.RandomState(order).permutation(len(classes))]
    number = {name: label for label, name in enumerate(catalogue.class_names)}
    for item in order:
        if (item not in number) if isinstance(item, str) else not 0 <= item < catalogue.num_classes:
            scenario.fail(f"class_order has {item!r}, which is no class of the data")
    labels = [number[item] if isinstance(item, str) else item for item in order]
    if twice := repeats(labels):
        scenario.fail(f"class_order has class {twice[0]} ({catalogue.class_names[twice[0]]}) more than once")
    missing = np.setdiff1d(classes, labels)
    if missing.size:
        scenario.fail(
            f"class_order lacks class {missing[0]} ({catalogue.class_names[missing[0]]}); "
            f"it must have each of the {len(classes)} classes once"
        )
    listed = np.array(labels, np.int64)
    return listed[np.isin(listed, classes)]


def check_order(scenario: Scenario, order: Order) -> None:
    if isinstance(order, str) and order not in ("natural", "random"):
        scenario.fail(f"class_order {order!r}; use natural, random, a number, or a list of labels or names")
    if isinstance(order, int) and not 0 <= order < 2**32:
        scenario.fail(f"class_order {order} is no seed; use a number in 0 .. 2**32 - 1")


def known_classes(scenario: Scenario, catalogue: Catalogue, earlier: Stream | None) -> tuple[list[IntArray], IntArray]:
    """Raw labels, today, of the classes that were new in each earlier task, and of those that no task had."""
    number = {name: label for label, name in enumerate(catalogue.class_names)}
    names = earlier.class_names if earlier else ()
    if gone := [name for name in names if name not in number]:
        scenario.fail(f"the data has lost {len(gone)} classes of the stream, {gone[0]!r} first; add them again")
    labels = np.array([number[name] for name in names], np.int64)
    stops = [task.num_seen for task in earlier.tasks] if earlier else []
    groups = np.split(labels, stops)[:-1] if earlier else []
    return groups, np.setdiff1d(np.arange(catalogue.num_classes), labels)


def chunks(classes: IntArray, size: int) -> list[IntArray]:
    """Groups of ``size`` classes; the last one has the remainder."""
    return [classes[start : start + size] for start in range(0, len(classes), size)]


def earlier_first(scenario: Scenario, catalogue: Catalogue, earlier: Stream | None) -> IntArray:
    """All raw labels: those of earlier tasks by column, then the others by label."""
    groups, fresh = known_classes(scenario, catalogue, earlier)
    return np.concatenate([*groups, fresh])
