"""The digits data set of scikit-learn."""

from typing import Any, ClassVar

import numpy as np
from sklearn.datasets import load_digits

from cl_lightning.data import TensorSource
from cl_lightning.data.shared import read_once
from cl_lightning.datamodules.base import ContinualDataModule


class Digits(ContinualDataModule):
    """Optical digits, 1,797 images of 8 x 8 pixels in 10 classes; part of scikit-learn, without download.

    They are the test set of Alpaydin & Kaynak (1998). Every fifth image of a class is a test image.

    Args:
        batch_size: Samples per training step; the default is small, since a task has about 290 training images.
        kwargs: Options of :class:`ContinualDataModule`.
    """

    mean: ClassVar[tuple[float, ...]] = (0.305,)
    std: ClassVar[tuple[float, ...]] = (0.376,)

    def __init__(self, *, batch_size: int = 32, **kwargs: Any) -> None:
        super().__init__(batch_size=batch_size, **kwargs)

    @read_once
    def source(self, *, train: bool) -> TensorSource:
        bunch = load_digits()
        images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
        labels = bunch.target.astype(np.int64)
        order = np.argsort(labels, kind="stable")
        within = np.empty(len(labels), dtype=np.int64)  # index of each image within its class
        starts = np.searchsorted(labels[order], labels[order])
        within[order] = np.arange(len(labels)) - starts
        chosen = (within % 5 != 4) if train else (within % 5 == 4)
        return TensorSource(
            images[chosen], labels[chosen], class_names=[str(digit) for digit in range(10)], name="digits"
        )
