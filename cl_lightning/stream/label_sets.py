"""Class-incremental scenarios for samples of several classes: multi-label images, classes of pixels."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from cl_lightning.hashing import IntArray
from cl_lightning.stream.core import DatasetInfo, Stream
from cl_lightning.stream.dealing import Split, chunks, known_classes, order_classes
from cl_lightning.stream.scenarios import ClassIncremental


@dataclass(frozen=True)
class LabelSets(ClassIncremental):
    """Class-incremental learning of samples that have several classes each.

    A task shows a sample with the classes of the task alone: its other classes, earlier and later ones, are not
    annotated (multi-label), or are background (pixels). A test sample belongs to the first task at whose end all its
    classes have been seen, and has all its classes.

    Args:
        setting: Which samples a task has (Cermelli et al., MiB, CVPR 2020, arXiv:2002.00718): ``overlapped``, all
            samples with at least one class of the task, so that a sample may occur in several tasks; or ``disjoint``,
            those of them without classes of later tasks, so that a sample is in one task.
        background: Class that is part of the first task and of each sample, and makes no sample a member of a task, by
            name; None for none.
        kwargs: Options of ``ClassIncremental``; the background counts for none of their numbers.
    """

    setting: Literal["overlapped", "disjoint"] = "overlapped"
    background: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.setting not in ("overlapped", "disjoint"):
            self.fail(f"setting {self.setting!r}; use overlapped or disjoint")

    def split(self, info: DatasetInfo, seed: int, earlier: Stream | None) -> Split:
        if info.train_sets is None:
            self.fail("the samples of the data have one class each; use ClassIncremental, or data with several classes")
        sets, behind = info.train_sets, np.empty(0, np.int64)
        if self.background is not None:
            if self.background not in info.class_names:
                self.fail(f"background is {self.background!r}, which is no class of the data")
            behind = np.array([info.class_names.index(self.background)])
        groups, fresh = known_classes(self, info, earlier)
        fresh = order_classes(self, self.class_order, info, fresh, seed)
        fresh = fresh[~np.isin(fresh, behind)]
        if earlier:
            groups = [group[~np.isin(group, behind)] for group in groups]
            groups += chunks(fresh, self._further(earlier))
        else:
            groups = np.split(fresh, np.cumsum(self.task_sizes(len(fresh)))[:-1])
        train = []
        for place, group in enumerate(groups):
            chosen = sets[:, group].any(axis=1)
            if self.setting == "disjoint":
                later: list[IntArray] = groups[place + 1 :]
                chosen &= ~sets[:, np.concatenate([np.empty(0, np.int64), *later])].any(axis=1)
            train.append(np.flatnonzero(chosen))
        names = [f"task {place}" for place in range(len(groups))]
        classes = [np.concatenate([behind, group]) for group in groups]
        return Split(train, np.concatenate([behind, *groups]), names, classes=classes)
