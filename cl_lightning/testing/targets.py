"""Small streams whose targets are not one class, for the conformance suite."""

from collections.abc import Callable
from typing import Any

import numpy as np

from cl_lightning.data import RandomHorizontalFlip, SampleSource, Targets, TensorSource
from cl_lightning.datamodules.base import ContinualDataModule
from cl_lightning.strategy import ContinualStrategy
from cl_lightning.stream import LabelSets
from cl_lightning.testing.bench import TinyDigits


class TinyMasks(ContinualDataModule):
    """57 training and 24 test images of 12 x 12 pixels with rectangles of six classes, in three tasks of two classes.

    The target is the class of each pixel; class 0 is the background. An image has one or two rectangles, whose colour
    is the colour of their class with noise. Tasks are overlapped, and batches of 12 leave uneven last batches.

    Args:
        options: Options of the base class; they replace the options above.
    """

    mean = (0.4,)
    std = (0.3,)
    _CLASSES = 6

    def __init__(self, **options: Any) -> None:
        chosen: dict[str, Any] = {
            "scenario": LabelSets(tasks=3, class_order=[3, 1, 6, 2, 5, 4, 0], background="background"),
            "batch_size": 12,
            "eval_batch_size": 7,
            "transforms": [RandomHorizontalFlip()],
        }
        super().__init__(**{**chosen, **options})

    def source(self, *, train: bool) -> SampleSource:
        random = np.random.default_rng(int(train))
        count, side = (57, 12) if train else (24, 12)
        masks = np.zeros((count, side, side), np.uint8)
        for place in range(2):
            labels = random.permutation(np.arange(count) % self._CLASSES) + 1
            present = np.arange(count) % 3 != 2 * place  # a third of the images has one rectangle
            corners, sizes = random.integers(0, 7, (count, 2)), random.integers(3, 6, (count, 2))
            for row in np.flatnonzero(present):
                (top, left), (height, width) = corners[row], sizes[row]
                masks[row, top : top + height, left : left + width] = labels[row]
        grey = 20 + masks * 35.0 + random.normal(0, 8, masks.shape)
        names = ("background", *(f"class {number}" for number in range(1, self._CLASSES + 1)))
        targets = Targets("pixels", masks, len(names))
        images = grey.clip(0, 255).astype(np.uint8)
        return TensorSource(images, targets.labels(), class_names=names, targets=targets)


def data_for(cls: type[ContinualStrategy]) -> Callable[[], ContinualDataModule]:
    """A small stream whose targets a strategy takes."""
    return TinyMasks if cls.traits.targets == ("pixels",) else TinyDigits
