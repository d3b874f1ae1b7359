"""Domain-incremental scenarios: the classes are the same in all tasks, the images change."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cl_lightning.hashing import hash64
from cl_lightning.stream import draws
from cl_lightning.stream.core import DatasetInfo, Stream
from cl_lightning.stream.dealing import Scenario, Split, Splitter, earlier_first
from cl_lightning.stream.draws import rank_in_group, split
from cl_lightning.stream.tasks import Segment, Shift, repeats


@dataclass(frozen=True)
class DomainIncremental(Splitter):
    """Each task is a domain of the data, with all its classes.

    Args:
        domains: Names of the domains in order; the order of the data by default.
    """

    domains: list[str] | None = None

    def split(self, info: DatasetInfo, seed: int, earlier: Stream | None) -> Split:
        if info.train_domains is None or info.test_domains is None:
            self.fail("the data has no domains; use data with one folder per domain, or another scenario")
        number = {name: index for index, name in enumerate(info.domain_names)}
        before = [task.name for task in earlier.tasks] if earlier else []
        if gone := [name for name in before if name not in number]:
            self.fail(f"the data lacks domain {gone[0]!r} of the stream; add it again")
        wanted = list(info.domain_names) if self.domains is None else self.domains
        if twice := repeats(wanted):
            self.fail(f"domains has {twice[0]!r} more than once")
        if unknown := [name for name in wanted if name not in number]:
            self.fail(f"domains has {unknown[0]!r}; the data has {', '.join(number)}")
        names = before + [name for name in wanted if name not in before]
        if missing := [name for name in number if name not in names]:
            self.fail(f"domains lacks {missing[0]!r}; it must have each domain of the data once")
        task = np.empty(len(number), np.int64)
        task[[number[name] for name in names]] = np.arange(len(names))
        return Split(
            train=split(task[info.train_domains], len(names)),
            order=earlier_first(self, info, earlier),
            names=names,
            test=split(task[info.test_domains], len(names)),
        )


class _ShiftedDomains(Splitter):
    """All classes in every task, with another shift of the images in each task."""

    share: Literal["all", "split"]

    @abstractmethod
    def domains(self, seed: int) -> list[tuple[str, Shift | None]]:
        """Name and shift of each task."""

    def stream(self, info: DatasetInfo, part: Segment, earlier: Stream | None) -> Stream:
        if earlier and self.share == "split":
            self.fail("share 'split' cannot be extended, since all samples already have a task; use share 'all'")
        if earlier and (part.seed, part.val_fraction) != (earlier.seed, earlier.parts[0].val_fraction):
            # Otherwise a sample would be held out in one task and trained on in another.
            self.fail(
                "all tasks have the same samples, so an extension must keep "
                f"seed {earlier.seed} and val_fraction {earlier.parts[0].val_fraction}"
            )
        return super().stream(info, part, earlier)

    def split(self, info: DatasetInfo, seed: int, earlier: Stream | None) -> Split:
        names, shifts = zip(*self.domains(seed), strict=True)
        count, samples = len(names), np.arange(len(info.train_labels))
        if self.share == "split":
            place, _ = rank_in_group(info.train_labels, info.keys(samples, seed, draws.SHARES))
            # The class label shifts the start, so that the remainders of many classes even out.
            train = split((place + info.train_labels) % count, count)
        else:
            train = [samples] * count
        test = [np.arange(len(info.test_labels))] * count
        return Split(train, earlier_first(self, info, earlier), names, shifts, test)


def _check_share(scenario: Scenario, share: str) -> None:
    if share not in ("all", "split"):
        scenario.fail(f"share {share!r}; use all or split")


@dataclass(frozen=True)
class PermutedDomains(_ShiftedDomains):
    """A permutation of the pixels of all images per task (permuted MNIST, Goodfellow et al. 2014).

    Args:
        tasks: Number of tasks; a larger number extends a stream.
        first_identity: Whether the first task leaves the images as they are.
        share: ``all``: each task has all training samples, as is usual; ``split``: the training samples are split over
            the tasks. Every task has all test samples.
    """

    tasks: int = 10
    first_identity: bool = True
    share: Literal["all", "split"] = "all"

    def __post_init__(self) -> None:
        _check_share(self, self.share)
        if self.tasks < 1:
            self.fail(f"tasks must be at least 1, got {self.tasks}")

    def domains(self, seed: int) -> list[tuple[str, Shift | None]]:
        seeds = (hash64(seed, draws.PERMUTATION, np.arange(self.tasks)) >> np.uint64(32)).tolist()
        domains: list[tuple[str, Shift | None]] = [
            (f"permutation {index}", Shift("permute", value)) for index, value in enumerate(seeds)
        ]
        return [("identity", None), *domains[1:]] if self.first_identity else domains


@dataclass(frozen=True)
class RotatedDomains(_ShiftedDomains):
    """A rotation of all images per task (rotated MNIST, Lopez-Paz & Ranzato 2017, arXiv:1706.08840).

    Args:
        tasks: Number of tasks, rotated by 0, 1, 2, ... times 180 / tasks degrees.
        degrees: The angles, in place of ``tasks``; a longer list extends a stream.
        share: ``all``: each task has all training samples, as is usual; ``split``: the training samples are split over
            the tasks. Every task has all test samples.
    """

    tasks: int | None = None
    degrees: list[float] | None = None
    share: Literal["all", "split"] = "all"

    def __post_init__(self) -> None:
        _check_share(self, self.share)
        if (self.tasks is None) == (self.degrees is None):
            self.fail("give either tasks or degrees")
        if self.tasks is not None and self.tasks < 1:
            self.fail(f"tasks must be at least 1, got {self.tasks}")
        if self.degrees is not None:
            if not self.degrees:
                self.fail("degrees is empty; give at least one angle")
            for angle in self.degrees:
                Shift("rotate", angle)

    def domains(self, seed: int) -> list[tuple[str, Shift | None]]:
        angles = [task * 180 / self.tasks for task in range(self.tasks)] if self.tasks else self.degrees or []
        return [(f"{angle:g} degrees", Shift("rotate", float(angle)) if angle else None) for angle in angles]
