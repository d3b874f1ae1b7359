"""Data sets given as torch Datasets."""

from typing import Any, Literal

from torch.utils.data import Dataset

from cl_lightning.checks import one_of
from cl_lightning.data import KINDS, DatasetSource, Kind
from cl_lightning.data.datasets import class_names_of
from cl_lightning.data.labels import Classes
from cl_lightning.datamodules.base import ContinualDataModule


class UserDataset(ContinualDataModule):
    """Training and test samples from two map-style Datasets with items ``(image, label)`` or dicts.

    Samples are images, or what ``inputs`` says. An image is a PIL image or a uint8 tensor ``(C, H, W)``; arrays ``(H,
    W, C)`` and pixels of other types are understood where there is one reading
    (``cl_lightning.data.images.to_bytes``). Items may be dicts: the columns of a data set of Hugging Face are found by
    their types, other keys by their names.

    Labels are integers, strings, or one-hot rows. Where classes have names (the attribute ``classes``, a ``ClassLabel``
    column, or ``class_names``), integers count them, from 0 or throughout from 1. Without names, the labels that occur
    in the training samples are the classes in ascending order, and their values are the names. The data module numbers
    classes from 0; its raw labels are these numbers. Labels are read from the attribute ``targets`` (or ``labels``) of
    the Dataset if it has one, also behind ``Subset`` and ``ConcatDataset``, else from every item. For
    domain-incremental streams, the attribute ``domains`` has a label for each item, and ``domain_names`` is optional.

    Items must not be augmented or normalised: the data module does both on the device. Items are read once and kept in
    memory if they take at most 1 GiB. A Dataset with a random transform needs ``in_memory: false``; a resumed run then
    sees other images than an uninterrupted one.

    Args:
        train: Training samples.
        test: Test samples.
        class_names: One name per class; None for the names of ``train``, or the labels themselves.
        size: Height and width in pixels to which PIL images are scaled and cropped; None if all have the same shape.
        mode: Mode to which PIL images are converted, ``RGB`` or ``L`` (grayscale); None to keep grayscale images and
            convert all others to RGB.
        image_key: Key of the image in items that are dicts; None to find it.
        label_key: Key of the label, likewise; needed where several columns are labels (CIFAR-100 of Hugging Face).
        inputs: What a sample is: ``image``, ``vector`` ``(D,)``, ``sequence`` ``(C, T)`` or ``tokens``, integers
            ``(T,)``. None for vectors if the first item is a floating-point tensor or array ``(D,)``, else images of 8
            bits; images that are other numbers, such as spectrograms, need ``image``.
        kwargs: Options of :class:`ContinualDataModule`.

    Raises:
        ValueError: If ``size`` is below 1, or before training if labels, classes or images are not as above.
    """

    _any_kind = True

    def __init__(
        self,
        train: Dataset,  # type: ignore[type-arg]  # jsonargparse builds no subclass of a type with brackets
        test: Dataset,  # type: ignore[type-arg]
        *,
        class_names: list[str] | None = None,
        size: int | None = None,
        mode: Literal["RGB", "L"] | None = None,
        image_key: str | None = None,
        label_key: str | None = None,
        inputs: Kind | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if size is not None and size < 1:
            raise ValueError(f"UserDataset: size is {size}; it must be at least 1, in pixels, or null")
        one_of(self, KINDS, inputs=inputs, optional=True)
        self.train, self.test, self.inputs = train, test, inputs
        self.class_names, self.size, self.mode = class_names, size, mode
        self.image_key, self.label_key = image_key, label_key
        self._classes: Classes | None = None

    def source(self, *, train: bool) -> DatasetSource:
        part, dataset = ("train", self.train) if train else ("test", self.test)
        name = f"UserDataset: {part}"
        if not train:
            self._check_names(name)
            if self._classes is None:
                self.samples(train=True)  # defines the classes
        source = DatasetSource(
            dataset,
            class_names=self.class_names,
            classes=None if train else self._classes,
            size=self.size,
            mode=self.mode,
            image_key=self.image_key,
            label_key=self.label_key,
            inputs=self.inputs,
            name=name,
        )
        self._classes = source.classes
        return source

    def _check_names(self, name: str) -> None:
        if self.class_names is not None:
            return
        names = class_names_of(self.train, "UserDataset: train", self.label_key)
        mine = class_names_of(self.test, name, self.label_key)
        if names is not None and mine is not None and mine != names:
            raise ValueError(
                f"UserDataset: test samples have the classes {mine[:5]} ..., training samples {names[:5]} ...; give "
                "both Datasets the same classes in the same order"
            )
