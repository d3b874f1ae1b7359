"""Streams whose samples have labels of two levels: superclasses first, then the classes within them."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from cl_lightning.hashing import IntArray
from cl_lightning.stream import draws
from cl_lightning.stream.core import DatasetInfo, Stream
from cl_lightning.stream.dealing import Order, Split, Splitter, check_order, order_classes, samples_of_groups
from cl_lightning.stream.draws import rank_in_group, round_half_up
from cl_lightning.stream.tasks import Segment


@dataclass(frozen=True)
class LabelExpansion(Splitter):
    """Hierarchical label expansion: the first task has superclasses, the others have their classes (arXiv:2308.14374).

    The data need ``superclasses``. The images of the first task have coarse labels, the images of later tasks fine
    ones, and a test image is evaluated once with its superclass and once with its class. An evaluation compares the
    scores of the classes of one level: entry 0 of a row of the accuracy matrix is the accuracy on superclasses. For a
    task-free stream, put ``Online`` around it.

    Args:
        tasks: Number of tasks with fine labels, with equal numbers of classes.
        images: ``disjoint``: an image has a coarse label or a fine one; ``shared``: each image comes with its coarse
            label first, and again with its fine label.
        coarse_share: Share of the disjoint images of each class that have coarse labels, in (0, 1); the number is
            rounded, and at least one image of a class has a fine label.
        class_order: Order of arrival of the fine classes, as for ``ClassIncremental``.

    Raises:
        ValueError: If the data have no superclasses, the classes do not split into equal tasks, the stream is to be
            extended, or validation samples are held out of shared images.
    """

    tasks: int = 5
    images: Literal["disjoint", "shared"] = "disjoint"
    coarse_share: float = 0.5
    class_order: Order = "natural"

    def __post_init__(self) -> None:
        check_order(self, self.class_order)
        if self.tasks < 1:
            self.fail(f"tasks must be at least 1, got {self.tasks}")
        if self.images not in ("disjoint", "shared"):
            self.fail(f"images {self.images!r}; use disjoint or shared")
        if not 0 < self.coarse_share < 1:
            self.fail(f"coarse_share must be above 0 and below 1, got {self.coarse_share}")
        if self.images == "shared" and self.coarse_share != 0.5:
            self.fail(f"coarse_share is {self.coarse_share}, but images is 'shared'; leave it out, or use disjoint")

    def stream(self, info: DatasetInfo, part: Segment, earlier: Stream | None) -> Stream:
        if self.images == "shared" and part.val_fraction:
            self.fail(
                f"val_fraction is {part.val_fraction}, but images is 'shared', and a validation image of one level is "
                "a training image of the other; use val_fraction 0, or disjoint"
            )
        return super().stream(info, part, earlier)

    def split(self, info: DatasetInfo, seed: int, earlier: Stream | None) -> Split:
        if not info.parents:
            self.fail("the labels of the data have one level; give data.superclasses")
        levels = info.levels
        coarse, fine = np.flatnonzero(levels == 0), np.flatnonzero(levels == 1)
        if earlier and set(earlier.class_names) != set(info.class_names):
            self.fail("the classes have changed, and the first task has all superclasses; begin a new run")
        if len(fine) % self.tasks:
            self.fail(f"{len(fine)} classes do not split into {self.tasks} equal tasks; use a divisor of {len(fine)}")
        fine = order_classes(self, self.class_order, info, fine, seed)
        train = samples_of_groups(info, [coarse, *np.split(fine, self.tasks)])
        if self.images == "disjoint":
            first = self._coarse_images(info, seed)
            train = [train[0][first[train[0] - len(first)]], *(part[~first[part]] for part in train[1:])]
        names = ["superclasses", *(f"classes {index}" for index in range(self.tasks))]
        return Split(train, np.concatenate([coarse, fine]), names)

    def _coarse_images(self, info: DatasetInfo, seed: int) -> IntArray:
        """Whether each image has its coarse label in the stream, bool ``(N,)``."""
        images = np.arange(len(info.train_labels) // 2)
        place, size = rank_in_group(info.train_labels[images], info.keys(images, seed, draws.LEVELS))
        first: IntArray = place < np.minimum(round_half_up(size * self.coarse_share).clip(1), size - 1)
        return first
