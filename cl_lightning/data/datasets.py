"""Samples of a user's map-style Dataset: where its items hold sample and label, and how both are read."""

import hashlib
import warnings
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from cl_lightning.batch import ImageShape
from cl_lightning.checks import reason
from cl_lightning.data.arrays import is_channels_last
from cl_lightning.data.images import CHANNELS, Mode, convert, fit, pixels, to_bytes
from cl_lightning.data.labels import Classes, names_in
from cl_lightning.data.samples import Kind, as_samples, kind_of

Key = int | str
_IMAGE_KEYS = ("image", "img", "images", "pixel_values", "picture", "x")
_LABEL_KEYS = ("label", "labels", "target", "targets", "class", "cls", "category", "class_id", "label_id", "y")
_LABEL_ATTRIBUTES = ("targets", "labels", "_labels", "y")


@dataclass(frozen=True)
class Fields:
    """Places of image and label in the items of a data set: indices of a tuple, or keys of a dict.

    Attributes:
        image: Place of the image; None if the item itself is the image.
        label: Place of the label; None if items have none.
    """

    image: Key | None = 0
    label: Key | None = 1


class DatasetSource:
    """A user's map-style Dataset with items ``(image, label)`` or dicts; images are PIL images or uint8 ``(C, H, W)``.

    Other samples than images are tensors, arrays or lists of numbers. Without ``inputs``, floating-point tensors and
    arrays ``(D,)`` are vectors, and all other items are images.

    Labels are read from the attribute ``targets``, ``labels``, ``_labels`` or ``y``, or from the column of a data set
    of Hugging Face; without one, every item is read once. ``Subset``, ``ConcatDataset`` and ``TensorDataset`` of torch
    are looked through; a ``Subset`` has those classes that occur in it. Domains are read from the attribute ``domains``
    (one per item, as labels), their names from ``domain_names``.

    Args:
        dataset: The data set. Its items must not be augmented: augmentation runs on the device.
        class_names: One per class; None for the attribute ``classes`` or the names of a ``ClassLabel`` column; without
            one, the labels that occur are the names.
        classes: Labels and names of the training samples, for test samples; None to find them in this data set.
        labels: Labels, one per item; None to read them as described above.
        size: Height and width in pixels to which images are resized and cropped; None if all images have one shape.
        mode: ``RGB`` or ``L`` (grayscale), to which PIL images are converted; None to keep grayscale images and convert
            all others to RGB.
        image_key: Key of the image in items that are dicts; None to find it, see :func:`find_fields`.
        label_key: Key of the label, likewise.
        inputs: What a sample is; None to decide by the first item. ``image`` also takes images that are no pixels of 8
            bits, such as spectrograms, floating point ``(C, H, W)`` or ``(H, W)``.
        threads: Whether items may be read by several threads at once.
        name: Name of the data in error messages.

    Raises:
        ValueError: If an option or a label is out of range, or the data set has no length or no items.
    """

    in_memory = False

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        class_names: Sequence[str] | None = None,
        classes: Classes | None = None,
        labels: np.ndarray | None = None,
        size: int | None = None,
        mode: Mode | None = None,
        image_key: str | None = None,
        label_key: str | None = None,
        inputs: Kind | None = None,
        threads: bool = False,
        name: str = "data",
    ) -> None:
        if size is not None and size < 1:
            raise ValueError(f"{name}: size is {size}; give the height and width of an image in pixels, at least 1")
        if mode not in ("RGB", "L", None):
            raise ValueError(f"{name}: mode is {mode!r}; use RGB, L for grayscale, or null")
        if isinstance(dataset, Mapping):
            parts = ", ".join(repr(str(key)) for key in dataset)
            raise ValueError(f"{name}: {type(dataset).__name__} is a dict of {parts}; give one of these data sets")
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise ValueError(
                f"{name}: {type(dataset).__name__} has no length; give a map-style data set (__getitem__, __len__)"
            )
        self.dataset, self.size, self.mode, self.threads, self.name = dataset, size, mode, threads, name
        self._keys, self._inputs = (image_key, label_key), inputs
        self._pixels = True if inputs is None else None  # whether images are pixels of 8 bits; None before the first
        self._fields: Fields | None = None
        count = len(dataset)  # type: ignore[arg-type]
        if count == 0:
            raise ValueError(f"{name}: {type(dataset).__name__} has no items; give a data set with at least one")
        found = labels if labels is not None else self._find_labels(count)
        if classes is None:
            names = class_names if class_names is not None else class_names_of(dataset, name, label_key)
            classes = Classes.of(found, count, names, name)
            if class_names is None and isinstance(dataset, Subset):  # it may hold some classes only
                classes = classes.present(classes.number(found, count, name))
        self.classes = classes
        self.labels = classes.number(found, count, name)
        self.class_names = classes.names
        self.domains: np.ndarray | None = None
        self.domain_names: tuple[str, ...] = ()
        if (domains := getattr(dataset, "domains", None)) is not None:
            of_domains, where = getattr(dataset, "domain_names", None), f"{name}, domains"
            known = Classes.of(domains, count, of_domains, where, "domain")
            self.domains, self.domain_names = known.number(domains, count, where, "domain"), known.names

    def _find_labels(self, count: int) -> Any:
        if self._keys[1] is None and (known := _labels_of(self.dataset)) is not None and len(known) == count:
            return known
        if _features(self.dataset) is not None and self.fields.label is not None:
            return list(self.dataset[self.fields.label])
        warnings.warn(
            f"{self.name}: no attribute `targets`; every item is read once for its label; add `targets` to skip this",
            stacklevel=3,
        )
        found = []
        for place in range(count):
            item = self._item(place)
            self._fields = self._fields or find_fields(item, _features(self.dataset), *self._keys, name=self.name)
            if self._fields.label is None:
                raise ValueError(
                    f"{self.name}: items have no label; return (image, label), or add the attribute `targets`"
                )
            try:
                found.append(item[self._fields.label])
            except (TypeError, LookupError) as error:
                raise ValueError(f"{self.name}: item {place} has no label ({reason(error)})") from error
        return found

    def _item(self, place: int) -> Any:
        try:
            return self.dataset[place]
        except (TypeError, ValueError, LookupError, RuntimeError, OSError, SyntaxError) as error:
            raise ValueError(f"{self.name}: item {place} cannot be read ({reason(error)})") from error

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def fields(self) -> Fields:
        """Places of image and label, from the first item."""
        if self._fields is None:
            self._fields = find_fields(self._item(0), _features(self.dataset), *self._keys, name=self.name)
        return self._fields

    @property
    def kind(self) -> str:
        """What a sample is: ``inputs``, or by the first item."""
        if self._inputs is None:
            item = self._sample(0)
            is_row = isinstance(item, Tensor | np.ndarray) and item.ndim == 1
            self._inputs = (kind_of(item[None]) if is_row else None) or "image"
        return self._inputs

    @property
    def image_shape(self) -> ImageShape:
        return tuple(self.image(0).shape)

    def image(self, index: int) -> Tensor:
        """One sample: an image of 8 bits as uint8 ``(C, H, W)``, others as float32 or int64 ``(*shape)``.

        Raises:
            ValueError: If the item cannot be read, or is no sample of the kind.
        """
        kind, item, name = self.kind, self._sample(index), f"{self.name}: item {index}"
        if kind == "image" and isinstance(item, Image.Image):
            return fit(item, self.size) if self.size is not None else pixels(item)
        if kind == "image" and self._pixels is None:
            self._pixels = _is_of_pixels(item)
        if kind != "image" or not self._pixels:
            return as_samples(_numbers(item, name)[None], kind, name)[0]  # type: ignore[arg-type]
        try:
            tensor = image_of(item)
        except ValueError as error:
            raise ValueError(f"{name} is {error}") from error
        if self.size is not None and tensor.shape[1:] != (self.size, self.size):
            raise ValueError(
                f"{name} is a tensor of shape {tuple(tensor.shape)}; `size` {self.size} applies to PIL images only: "
                "return PIL images, or remove `size`"
            )
        return tensor

    def _sample(self, index: int) -> Any:
        """The first part of an item; a PIL image is converted to its mode."""
        place = self.fields.image
        try:
            item = self.dataset[index]
            item = item if place is None else item[place]
            if isinstance(item, Image.Image):
                item.load()  # PIL may read the file only now
                item = convert(item, self.mode or ("L" if item.mode in ("1", "L", "LA", "I", "I;16") else "RGB"))
        except (
            OSError,
            SyntaxError,
            EOFError,
            ValueError,
            LookupError,
            TypeError,
            Image.DecompressionBombError,
        ) as error:
            raise ValueError(f"{self.name}: item {index} cannot be read ({reason(error)})") from error
        return item

    def take(self, indices: Tensor) -> Tensor:
        if len(indices) == 0:
            return self.image(0)[None][:0]
        images = [self.image(index) for index in indices.tolist()]
        for image, index in zip(images, indices.tolist(), strict=True):
            if image.shape != images[0].shape:
                raise ValueError(of_other_shape(self, tuple(images[0].shape), index, tuple(image.shape)))
        return torch.stack(images)

    def digest(self, indices: np.ndarray) -> bytes:
        """Hash of the number of samples only: reading items may be slow and may not return the same bytes twice."""
        return hashlib.blake2b(str(len(indices)).encode(), digest_size=16).digest()


def of_other_shape(source: Any, first: tuple[int, ...], index: int, shape: tuple[int, ...]) -> str:
    """Message for a sample whose shape differs from the first sample's."""
    what, remedy = "samples", "cut or pad them to one shape"
    if source.kind == "image":
        what, remedy = "images", "give `size` to scale and crop them, `mode` if only the channels differ"
    return f"{getattr(source, 'name', 'data')}: {what} differ in shape, {first} and, item {index}, {shape}; {remedy}"


def _numbers(item: Any, name: str) -> Tensor:
    """A sample as a tensor.

    Raises:
        ValueError: If it has no numbers.
    """
    try:
        return torch.as_tensor(np.require(item, requirements=["C", "W"]) if isinstance(item, np.ndarray) else item)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} has no numbers ({reason(error)}); return a tensor, an array or numbers") from error


def _is_of_pixels(item: Any) -> bool:
    try:
        image_of(item)
    except ValueError:
        return False
    return True


def find_fields(
    item: Any, features: Mapping[str, Any] | None, image_key: str | None, label_key: str | None, *, name: str
) -> Fields:
    """Where an item holds its image and its label.

    A tuple or list holds them at 0 and 1. In a dict they are the columns of the types ``Image`` and ``ClassLabel`` of a
    data set of Hugging Face, or the keys that are usual (``image``, ``img``, ...; ``label``, ``target``, ...), or the
    only image and the only other integer or string. An item that is no tuple or dict is the image.

    Args:
        item: An item.
        features: Types of the columns, or None.
        image_key: Key of the image; None to find it.
        label_key: Key of the label; None to find it.
        name: Name of the data in errors.

    Raises:
        ValueError: If a key is missing, or several could be meant.
    """
    if not isinstance(item, Mapping):
        if given := [key for key in (image_key, label_key) if key is not None]:
            raise ValueError(f"{name}: items are {type(item).__name__}, no dicts; remove the key {given[0]!r}")
        if isinstance(item, tuple | list):
            if not item:
                raise ValueError(f"{name}: items are empty; return (image, label)")
            return Fields(0, 1 if len(item) > 1 else None)
        return Fields(None, None)
    types = {key: type(feature).__name__ for key, feature in (features or {}).items()}
    images = [key for key in item if types.get(key) == "Image"] or [key for key in item if _is_image(item[key])]
    image = _chosen(item, "image", image_key, images, _IMAGE_KEYS, name)
    others = [key for key in item if key != image]
    labels = (
        [key for key in others if types.get(key) == "ClassLabel"]
        or [key for key in others if str(key).lower() in _LABEL_KEYS]
        or [key for key in others if isinstance(item[key], int | np.integer | str)]
    )
    return Fields(image, _chosen(item, "label", label_key, labels, (), name))


def class_names_of(dataset: Any, name: str, label_key: str | None = None) -> list[str] | None:
    """Names of the classes from the attribute ``classes`` or a ``ClassLabel`` column; None without both.

    Raises:
        ValueError: If the attribute is no list, or the parts of a ``ConcatDataset`` have different classes.
    """
    if (names := names_in(dataset, name)) is not None:
        return names
    if isinstance(dataset, Subset):
        return class_names_of(dataset.dataset, name, label_key)
    if isinstance(dataset, ConcatDataset):
        first, *others = (class_names_of(part, name, label_key) for part in dataset.datasets)
        if any(other != first for other in others):
            raise ValueError(f"{name}: the parts of a ConcatDataset have different `classes`; give data.class_names")
        return first
    columns = {
        key: feature
        for key, feature in (_features(dataset) or {}).items()
        if type(feature).__name__ == "ClassLabel" and label_key in (None, key)
    }
    return [str(each) for each in next(iter(columns.values())).names] if len(columns) == 1 else None


def image_of(item: Any) -> Tensor:
    """An image given as a tensor or an array, as uint8 ``(C, H, W)``.

    Arrays ``(H, W, C)``, as OpenCV and NumPy have them, and tensors ``(C, H, W)`` differ in the side of 1, 3 or
    4; if both readings are possible, an array is read as a square image, and a tensor as ``(C, H, W)``.

    Raises:
        ValueError: If it is no image; the message continues the words "item 3 is".
    """
    if isinstance(item, str | bytes) or not isinstance(item, Tensor | np.ndarray | Sequence):
        raise ValueError(f"{_named(item)}; give (image, label), the image a PIL image or a uint8 tensor (C, H, W)")
    try:
        tensor = torch.as_tensor(np.require(item, requirements=["C", "W"]) if isinstance(item, np.ndarray) else item)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{_named(item)}; give (image, label), the image a PIL image or a uint8 tensor (C, H, W)"
        ) from error
    shape = tuple(tensor.shape)
    kind = f"{tensor.dtype} of shape {shape}"
    remedy = "return PIL images or uint8 tensors (C, H, W), or give data.inputs for other samples"
    if tensor.dim() < 2 or (tensor.dim() == 2 and tensor.is_floating_point()):
        what = "a row of a table" if tensor.dim() < 2 else "a matrix of measurements, such as a series or a spectrogram"
        raise ValueError(f"{kind}, {what}; {remedy}")
    if tensor.dim() > 3 or 0 in shape:
        raise ValueError(f"{kind}; {remedy}")
    if tensor.dim() == 3:
        from_numpy = isinstance(item, np.ndarray)
        if from_numpy and not set(CHANNELS) & {shape[0], shape[2]}:
            raise ValueError(f"{kind}; neither the first nor the last side is 1, 3 or 4 channels; {remedy}")
        if is_channels_last(shape, "") if from_numpy else shape[0] not in CHANNELS and shape[2] in CHANNELS:
            tensor = tensor.permute(2, 0, 1).contiguous()
    try:
        tensor = to_bytes(tensor)
    except ValueError as error:
        raise ValueError(
            f"{error} (the item has shape {shape}); the data module itself applies ToTensor and Normalize"
        ) from None
    return tensor.unsqueeze(0) if tensor.dim() == 2 else tensor


def _named(item: Any) -> str:
    if isinstance(item, str | bytes):
        return f"the {type(item).__name__} {item[:60]!r}"
    return f"of the type {type(item).__name__}"


def _is_image(value: Any) -> bool:
    return isinstance(value, Image.Image) or (isinstance(value, Tensor | np.ndarray) and value.ndim >= 2)


def _chosen(
    item: Mapping[Any, Any], what: str, given: str | None, found: list[Any], usual: Sequence[str], name: str
) -> Any:
    """The key that is given, or the only one found, or the one found that is usual."""
    keys = ", ".join(repr(str(key)) for key in item)
    if given is not None:
        if given not in item:
            raise ValueError(f"{name}: {what}_key is {given!r}; items have the keys {keys}")
        return given
    by_name = [key for key in found if str(key).lower() in usual]
    found = by_name if len(by_name) == 1 else found
    if not found:
        raise ValueError(f"{name}: items are dicts of {keys}, and none is the {what}; give data.{what}_key")
    if len(found) > 1:
        several = ", ".join(repr(str(key)) for key in found)
        raise ValueError(f"{name}: items are dicts, and each of {several} may be the {what}; give data.{what}_key")
    return found[0]


def _features(dataset: Any) -> Mapping[str, Any] | None:
    """Types of the columns of a data set of Hugging Face, which gives a column by its name; None for another one."""
    features = getattr(dataset, "features", None)
    return features if isinstance(features, Mapping) and hasattr(dataset, "column_names") else None


def _labels_of(dataset: Any) -> Any:
    """Labels from an attribute, without reading items; None if there is none."""
    for attribute in _LABEL_ATTRIBUTES:
        labels = getattr(dataset, attribute, None)
        if isinstance(labels, Sized) and not callable(labels) and len(labels) == len(dataset):
            return labels
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[1] if len(dataset.tensors) > 1 else None
    if isinstance(dataset, Subset) and (labels := _labels_of(dataset.dataset)) is not None:
        return [labels[place] for place in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [_labels_of(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else [label for part in parts for label in part]
    return None
