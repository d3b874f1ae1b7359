"""Scenarios in which the classes stay and the images change."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cl_lightning.stream import draws
from cl_lightning.stream.core import Catalogue, Part, Shift, Stream, repeats
from cl_lightning.stream.dealing import Deal, Dealer, Scenario, earlier_first
from cl_lightning.stream.draws import mix, places, split


@dataclass(frozen=True)
class DomainIncremental(Dealer):
    """Each task is a domain of the data, with all its classes.

    Args:
        domains: Names of the domains in order; the order of the data by default.
    """

    domains: list[str] | None = None

    def deal(self, catalogue: Catalogue, seed: int, earlier: Stream | None) -> Deal:
        if catalogue.train_domains is None or catalogue.test_domains is None:
            self.fail("the data tells no domains; use data with one folder per domain, or another scenario")
        number = {name: index for index, name in enumerate(catalogue.domain_names)}
        before = [task.name for task in earlier.tasks] if earlier else []
        if gone := [name for name in before if name not in number]:
            self.fail(f"the data has lost domain {gone[0]!r} of the stream; add it again")
        wanted = list(catalogue.domain_names) if self.domains is None else self.domains
        if twice := repeats(wanted):
            self.fail(f"domains has {twice[0]!r} more than once")
        if unknown := [name for name in wanted if name not in number]:
            self.fail(f"domains has {unknown[0]!r}; the data has {', '.join(number)}")
        names = before + [name for name in wanted if name not in before]
        if missing := [name for name in number if name not in names]:
            self.fail(f"domains lacks {missing[0]!r}; it must have each domain of the data once")
        task = np.empty(len(number), np.int64)
        task[[number[name] for name in names]] = np.arange(len(names))
        return Deal(
            train=split(task[catalogue.train_domains], len(names)),
            order=earlier_first(self, catalogue, earlier),
            names=names,
            test=split(task[catalogue.test_domains], len(names)),
        )


class _ShiftedDomains(Dealer):
    """All classes in every task, each time with another shift of the images."""

    share: Literal["all", "split"]

    @abstractmethod
    def domains(self, seed: int) -> list[tuple[str, Shift | None]]:
        """Name and shift of each task."""

    def stream(self, catalogue: Catalogue, part: Part, earlier: Stream | None) -> Stream:
        if earlier and self.share == "split":
            self.fail("share 'split' cannot be extended, since the samples are already dealt out; use share 'all'")
        if earlier and (part.seed, part.val_fraction) != (earlier.seed, earlier.parts[0].val_fraction):
            # Else a sample would be held out in one task and trained on in another.
            self.fail(
                "all tasks have the same samples, so an extension must keep "
                f"seed {earlier.seed} and val_fraction {earlier.parts[0].val_fraction}"
            )
        return super().stream(catalogue, part, earlier)

    def deal(self, catalogue: Catalogue, seed: int, earlier: Stream | None) -> Deal:
        names, shifts = zip(*self.domains(seed), strict=True)
        count, samples = len(names), np.arange(len(catalogue.train_labels))
        if self.share == "split":
            place, _ = places(catalogue.train_labels, catalogue.keys(samples, seed, draws.SHARES))
            # The class label shifts the start, so that the remainders of many classes even out.
            train = split((place + catalogue.train_labels) % count, count)
        else:
            train = [samples] * count
        test = [np.arange(len(catalogue.test_labels))] * count
        return Deal(train, earlier_first(self, catalogue, earlier), names, shifts, test)


def _check_share(scenario: Scenario, share: str) -> None:
    if share not in ("all", "split"):
        scenario.fail(f"share {share!r}; use all or split")


@dataclass(frozen=True)
class PermutedDomains(_ShiftedDomains):
    """Each task permutes the pixels of all images in its own way (permuted MNIST, Goodfellow et al. 2014).

    Args:
        tasks: Number of tasks; a larger number extends a stream.
        first_identity: Whether the first task leaves the images as they are.
        share: ``all``: each task has all training samples, as is the custom; ``split``: each has its share of them.
            Test samples are all in every task.
    """

    tasks: int = 10
    first_identity: bool = True
    share: Literal["all", "split"] = "all"

    def __post_init__(self) -> None:
        _check_share(self, self.share)
        if self.tasks < 1:
            self.fail(f"tasks must be at least 1, got {self.tasks}")

    def domains(self, seed: int) -> list[tuple[str, Shift | None]]:
        seeds = (mix(seed, draws.PERMUTATION, np.arange(self.tasks)) >> np.uint64(32)).tolist()
        domains: list[tuple[str, Shift | None]] = [
            (f"permutation {index}", Shift("permute", value)) for index, value in enumerate(seeds)
        ]
        return [("identity", None), *domains[1:]] if self.first_identity else domains


@dataclass(frozen=True)
class RotatedDomains(_ShiftedDomains):
    """Each task turns all images by its own angle (rotated MNIST, Lopez-Paz & Ranzato 2017, arXiv:1706.08840).

    Args:
        tasks: Number of tasks, turned by multiples of 180 / tasks degrees from 0 on.
        degrees: The angles, instead of ``tasks``; a longer list extends a stream.
        share: ``all``: each task has all training samples, as is the custom; ``split``: each has its share of them.
            Test samples are all in every task.
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
