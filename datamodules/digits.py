"""The digits that come with scikit-learn."""

from typing import Any, ClassVar

import numpy as np
from sklearn.datasets import load_digits

from cl_lightning.datamodules.base import ContinualDataModule
from cl_lightning.sources import TensorSource


class Digits(ContinualDataModule):
    """Optical digits, 1,797 images of 8 x 8 pixels in 10 classes, as they come with scikit-learn; needs no download.

    They are the test part of the collection of Alpaydin & Kaynak (1998). Every fifth image of a class is a test image.

    Args:
        batch_size: See the base; smaller here, as a task has few images.
        kwargs: Of the base.
    """

    mean: ClassVar[tuple[float, ...]] = (0.305,)
    std: ClassVar[tuple[float, ...]] = (0.376,)

    def __init__(self, *, batch_size: int = 32, **kwargs: Any) -> None:
        super().__init__(batch_size=batch_size, **kwargs)

    def source(self, *, train: bool) -> TensorSource:
        bunch = load_digits()
        images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
        labels = bunch.target.astype(np.int64)
        order = np.argsort(labels, kind="stable")
        within = np.empty(len(labels), dtype=np.int64)  # place of each image among those of its class
        starts = np.searchsorted(labels[order], labels[order])
        within[order] = np.arange(len(labels)) - starts
        chosen = (within % 5 != 4) if train else (within % 5 == 4)
        return TensorSource(
            images[chosen], labels[chosen], class_names=[str(digit) for digit in range(10)], name="digits"
        )
