"""Data sets of one's own."""

from typing import Any, Literal

from torch.utils.data import Dataset

from cl_lightning.datamodules.base import ContinualDataModule
from cl_lightning.sources import DatasetSource, names_in


class UserDataset(ContinualDataModule):
    """Two map-style Datasets, for training and for testing, each with items ``(image, label)``.

    An image is a PIL image or a uint8 tensor ``(C, H, W)``, a label an integer from 0. Labels are read from an
    attribute ``targets`` (or ``labels``) if there is one, else from every item; names of the classes from an attribute
    ``classes``. For domain-incremental streams an attribute ``domains`` has an integer for each item, and
    ``domain_names`` may name them.

    Items must not be augmented or normalised: that is done here, on the device. They are read once and kept in memory
    where they take at most 1 GiB. A Dataset with a random transform needs ``in_memory: false``, and a resumed run then
    does not see the images that the uninterrupted one would have seen.

    Args:
        train: Training samples.
        test: Test samples.
        class_names: One per class; None for the attribute ``classes`` of ``train``, or numbers.
        size: Height and width that PIL images are scaled and cropped to; None where all have one shape.
        mode: ``RGB`` or ``L`` (grayscale) that PIL images are converted to; None to keep grayscale ones and convert all
            others to RGB.
        kwargs: Of the base.
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
            raise ValueError(f"UserDataset: size is {size}; give height and width in pixels, at least 1")
        self.train, self.test = train, test
        self.class_names, self.size, self.mode = class_names, size, mode

    def source(self, *, train: bool) -> DatasetSource:
        part = "train" if train else "test"
        names = self.class_names if self.class_names is not None else names_in(self.train, "UserDataset: train")
        mine = names_in(self.train if train else self.test, f"UserDataset: {part}")
        if self.class_names is None and names is not None and mine is not None and mine != names:
            raise ValueError(
                f"UserDataset: the classes of the test samples are {mine[:5]} ..., those of the training samples "
                f"{names[:5]} ...; labels must mean the same in both"
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
