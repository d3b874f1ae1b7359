"""Data sets given as torch Datasets."""

from typing import Any, Literal

from torch.utils.data import Dataset

from cl_lightning.data import DatasetSource
from cl_lightning.data.sources import names_in
from cl_lightning.datamodules.base import ContinualDataModule


class UserDataset(ContinualDataModule):
    """Training and test samples from two map-style Datasets with items ``(image, label)``.

    An image is a PIL image or a uint8 tensor ``(C, H, W)``. A label is an integer from 0, a raw label, which loaders
    map to a column. Labels are read from the attribute ``targets`` (or ``labels``) of the Dataset if it has one, else
    from every item; names of classes are read from the attribute ``classes``. For domain-incremental streams, the
    attribute ``domains`` has an integer for each item, and ``domain_names`` is optional.

    Items must not be augmented or normalised: the data module does both on the device. Items are read once and kept in
    memory if they take at most 1 GiB. A Dataset with a random transform needs ``in_memory: false``; a resumed run then
    sees other images than an uninterrupted one.

    Args:
        train: Training samples.
        test: Test samples.
        class_names: One name per class; None for the attribute ``classes`` of ``train``, or for numbers without it.
        size: Height and width in pixels to which PIL images are scaled and cropped; None if all have the same shape.
        mode: Mode to which PIL images are converted, ``RGB`` or ``L`` (grayscale); None to keep grayscale images and
            convert all others to RGB.
        kwargs: Options of :class:`ContinualDataModule`.

    Raises:
        ValueError: If ``size`` is below 1, or before training if labels, classes or images are not as above.
    """

    def __init__(
        self,
        train: Dataset,  # type: ignore[type-arg]  # jsonargparse builds no subclass of a type with brackets
        test: Dataset,  # type: ignore[type-arg]
        *,
        class_names: list[str] | None = None,
        size: int | None = None,
        mode: Literal["RGB", "L"] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if size is not None and size < 1:
            raise ValueError(f"UserDataset: size is {size}; it must be at least 1, in pixels, or null")
        self.train, self.test = train, test
        self.class_names, self.size, self.mode = class_names, size, mode

    def source(self, *, train: bool) -> DatasetSource:
        part = "train" if train else "test"
        names = self.class_names if self.class_names is not None else names_in(self.train, "UserDataset: train")
        mine = names_in(self.train if train else self.test, f"UserDataset: {part}")
        if self.class_names is None and names is not None and mine is not None and mine != names:
            raise ValueError(
                f"UserDataset: test samples have the classes {mine[:5]} ..., training samples {names[:5]} ...; give "
                "both Datasets the same classes in the same order"
            )
        if names is None and not train:
            names = list(self.samples(train=True).class_names)
        return DatasetSource(
            self.train if train else self.test,
            class_names=names,
            size=self.size,
            mode=self.mode,
            name=f"UserDataset: {part}",
        )
