"""Samples of a user's map-style Dataset."""

import hashlib
import warnings
from collections.abc import Sequence, Sized
from operator import index as integer
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from cl_lightning.batch import ImageShape
from cl_lightning.data.images import Mode, _reason, convert, fit, pixels
from cl_lightning.data.labels import check_labels, names_in


class DatasetSource:
    """A user's map-style Dataset with items ``(image, label)``; images are PIL images or uint8 tensors ``(C, H, W)``.

    Labels are read from the attribute ``targets``, ``labels``, ``_labels`` or ``y``; without one, every item is read
    once. Domains are read from the attribute ``domains`` (integers, one per item), their names from ``domain_names``.

    Args:
        dataset: The data set. Its items must not be augmented: augmentation runs on the device.
        class_names: One per class; None for the attribute ``classes``, or numbers.
        labels: Raw labels, one per item; None to read them as described above.
        size: Height and width in pixels to which images are resized and cropped; None if all images have one shape.
        mode: ``RGB`` or ``L`` (grayscale), to which PIL images are converted; None to keep grayscale images and convert
            all others to RGB.
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
        labels: np.ndarray | None = None,
        size: int | None = None,
        mode: Mode | None = None,
        threads: bool = False,
        name: str = "data",
    ) -> None:
        if size is not None and size < 1:
            raise ValueError(f"{name}: size is {size}; give the height and width of an image in pixels, at least 1")
        if mode not in ("RGB", "L", None):
            raise ValueError(f"{name}: mode is {mode!r}; use RGB, L for grayscale, or null")
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise ValueError(
                f"{name}: {type(dataset).__name__} has no length; give a map-style data set (__getitem__, __len__)"
            )
        self.dataset, self.size, self.mode, self.threads, self.name = dataset, size, mode, threads, name
        count = len(dataset)  # type: ignore[arg-type]
        if count == 0:
            raise ValueError(f"{name}: {type(dataset).__name__} has no items; give a data set with at least one")
        names = class_names if class_names is not None else names_in(dataset, name)
        if labels is None:
            labels = self._find_labels(count)
        self.labels = check_labels(labels, count, names, name)
        known = int(self.labels.max(initial=-1)) + 1
        self.class_names = tuple(map(str, names)) if names is not None else tuple(str(i) for i in range(known))
        self.domains: np.ndarray | None = None
        self.domain_names: tuple[str, ...] = ()
        if (domains := getattr(dataset, "domains", None)) is not None:
            domain_names = getattr(dataset, "domain_names", None)
            self.domains = check_labels(domains, count, domain_names, f"{name}, domains")
            last = int(self.domains.max(initial=-1))
            self.domain_names = (
                tuple(domain_names) if domain_names is not None else tuple(str(i) for i in range(last + 1))
            )

    def _find_labels(self, count: int) -> Any:
        for attribute in ("targets", "labels", "_labels", "y"):
            labels = getattr(self.dataset, attribute, None)
            if isinstance(labels, Sized) and not callable(labels) and len(labels) == count:
                return labels
        warnings.warn(
            f"{self.name}: no attribute `targets`; every item is read once for its label; add `targets` to skip this",
            stacklevel=3,
        )
        try:
            return np.array([integer(self.dataset[place][1]) for place in range(count)], dtype=np.int64)
        except (TypeError, ValueError, LookupError, OverflowError, RuntimeError) as error:
            raise ValueError(
                f"{self.name}: items are not (image, label) with an integer label ({_reason(error)}); return such pairs"
            ) from error

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> ImageShape:
        channels, height, width = self.image(0).shape
        return channels, height, width

    def image(self, index: int) -> Tensor:
        """One image as uint8 ``(C, H, W)``.

        Raises:
            ValueError: If the item cannot be read, or is neither a PIL image nor a uint8 tensor.
        """
        try:
            pair = self.dataset[index]
            item = pair[0] if isinstance(pair, tuple | list) and pair else None
            if isinstance(item, Image.Image):
                item.load()  # PIL may read the file only now
                item = convert(item, self.mode or ("L" if item.mode in ("1", "L", "LA", "I", "I;16") else "RGB"))
        except (OSError, SyntaxError, EOFError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{self.name}: item {index} cannot be read ({_reason(error)})") from error
        if isinstance(item, Image.Image):
            tensor = fit(item, self.size) if self.size is not None else pixels(item)
        else:
            try:
                tensor = torch.as_tensor(item)
            except (TypeError, ValueError, RuntimeError) as error:
                found = type(pair).__name__ if item is None else f"({type(item).__name__}, ...)"
                raise ValueError(
                    f"{self.name}: item {index} is {found}; give (image, label), the image a PIL image or a uint8 "
                    "tensor (C, H, W)"
                ) from error
            if tensor.dim() == 2:
                tensor = tensor.unsqueeze(0)
        if tensor.dtype != torch.uint8 or tensor.dim() != 3 or 0 in tensor.shape:
            raise ValueError(
                f"{self.name}: item {index} is {tensor.dtype} of shape {tuple(tensor.shape)}; give PIL images or uint8 "
                "tensors (C, H, W) without ToTensor or Normalize; the data module applies both on the device"
            )
        if self.size is not None and tensor.shape[1:] != (self.size, self.size):
            raise ValueError(
                f"{self.name}: item {index} is a tensor of shape {tuple(tensor.shape)}; `size` {self.size} applies to "
                "PIL images only: return PIL images, or remove `size`"
            )
        return tensor

    def take(self, indices: Tensor) -> Tensor:
        if len(indices) == 0:
            return torch.zeros(0, *self.image_shape, dtype=torch.uint8)
        images = [self.image(index) for index in indices.tolist()]
        for image, index in zip(images, indices.tolist(), strict=True):
            if image.shape != images[0].shape:
                raise ValueError(
                    f"{self.name}: images differ in shape, {tuple(images[0].shape)} and, item {index}, "
                    f"{tuple(image.shape)}; give `size` to scale and crop them, `mode` if only the channels differ"
                )
        return torch.stack(images)

    def digest(self, indices: np.ndarray) -> bytes:
        """Hash of the number of samples only: reading items may be slow and may not return the same bytes twice."""
        return hashlib.blake2b(str(len(indices)).encode(), digest_size=16).digest()
