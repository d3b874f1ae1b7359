"""Where samples come from: tensors in memory, or files that are decoded when they are asked for."""

import hashlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from cl_lightning.backbones import ImageShape

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


class Source(Protocol):
    """Labelled images that can be taken by index."""

    labels: np.ndarray
    """Raw labels, int64 ``(N,)``."""
    class_names: tuple[str, ...]
    """Name of each raw label."""
    domains: np.ndarray | None
    """Domain of each sample, int64 ``(N,)``; None where the data have no domains."""
    domain_names: tuple[str, ...]
    in_memory: bool
    """Whether taking samples is an index operation, so that worker processes would only cost."""

    @property
    def image_shape(self) -> ImageShape: ...

    def take(self, indices: Tensor) -> Tensor:
        """Raw images ``(n, C, H, W)``, uint8."""
        ...

    def digest(self, indices: np.ndarray) -> bytes:
        """Hash of the content of the given samples, the same wherever they lie in the data set."""
        ...


class TensorSource:
    """Images held in memory.

    Args:
        images: uint8, ``(N, H, W)``, ``(N, H, W, C)`` or ``(N, C, H, W)`` with C of 1, 3 or 4; a tensor or an array.
        labels: Raw labels, integers ``(N,)`` from 0.
        class_names: One per class; None for ``"0"``, ``"1"``, ...
        channels_last: Whether the channels come last; None to tell by the shape.
        domains: Domain of each sample, integers ``(N,)``.
        domain_names: One per domain.
        name: Names the data in errors.
    """

    in_memory = True

    def __init__(
        self,
        images: Tensor | np.ndarray,
        labels: Tensor | np.ndarray | Sequence[int],
        *,
        class_names: Sequence[str] | None = None,
        channels_last: bool | None = None,
        domains: np.ndarray | None = None,
        domain_names: Sequence[str] = (),
        name: str = "data",
    ) -> None:
        tensor = images if isinstance(images, Tensor) else torch.from_numpy(np.require(images, requirements="CW"))
        if tensor.dtype != torch.uint8:
            raise ValueError(f"{name}: images are {tensor.dtype}; give uint8 pixels from 0 to 255")
        if tensor.dim() == 3:
            tensor = tensor.unsqueeze(1)
        elif tensor.dim() == 4:
            last = channels_last if channels_last is not None else tensor.shape[-1] in (1, 3, 4)
            tensor = tensor.permute(0, 3, 1, 2).contiguous() if last else tensor
        else:
            raise ValueError(
                f"{name}: images have shape {tuple(tensor.shape)}; use (N, H, W), (N, H, W, C) or (N, C, H, W)"
            )
        self.images = tensor
        self.labels = check_labels(labels, len(tensor), class_names, name)
        count = int(self.labels.max(initial=-1)) + 1
        self.class_names = tuple(class_names) if class_names is not None else tuple(str(i) for i in range(count))
        self.domains, self.domain_names = domains, tuple(domain_names)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> ImageShape:
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def take(self, indices: Tensor) -> Tensor:
        return self.images[indices]

    def digest(self, indices: np.ndarray) -> bytes:
        return hashlib.blake2b(self.images[torch.as_tensor(indices)].numpy().tobytes(), digest_size=16).digest()


def check_labels(
    labels: Tensor | np.ndarray | Sequence[int], count: int, class_names: Sequence[str] | None, name: str
) -> np.ndarray:
    """Labels as int64, after a look at their number and range.

    Raises:
        ValueError: If there are not ``count`` integer labels, or one lies outside ``0 .. number of classes - 1``.
    """
    array = np.asarray(labels)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.shape != (count,) or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"{name}: labels are {array.dtype} of shape {array.shape}; give {count} integers, one per image"
        )
    array = array.astype(np.int64)
    limit = len(class_names) if class_names is not None else None
    wrong = (array < 0) if limit is None else (array < 0) | (array >= limit)
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        allowed = "0 and above" if limit is None else f"0 .. {limit - 1}, as there are {limit} class names"
        raise ValueError(f"{name}: label {array[first]} of sample {first} is outside the range; labels are {allowed}")
    return array


class FileSource:
    """Image files, decoded to one shape when they are asked for.

    An image is turned upright by its EXIF tag, converted to ``mode``, scaled so that its shorter side is ``size`` and
    cropped at the centre, unless ``load`` says otherwise.

    Args:
        paths: The files.
        labels: Raw labels, one per file.
        class_names: One per class.
        root: Folder that the paths are told relative to.
        size: Height and width after decoding, in pixels.
        mode: ``RGB`` or ``L`` (grayscale).
        load: Own decoding of a PIL image to a uint8 tensor ``(C, H, W)``, all of one shape.
        domains: Domain of each file.
        domain_names: One per domain.
        name: Names the data in errors.
    """

    in_memory = False

    def __init__(
        self,
        paths: Sequence[Path],
        labels: np.ndarray | Sequence[int],
        *,
        class_names: Sequence[str],
        root: Path,
        size: int = 224,
        mode: str = "RGB",
        load: Callable[[Image.Image], Tensor] | None = None,
        domains: np.ndarray | None = None,
        domain_names: Sequence[str] = (),
        name: str = "folder",
    ) -> None:
        self.paths = list(paths)
        self.labels = check_labels(np.asarray(labels, dtype=np.int64), len(self.paths), class_names, name)
        self.class_names = tuple(class_names)
        self.root, self.size, self.mode, self.load = root, size, mode, load
        self.domains, self.domain_names = domains, tuple(domain_names)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def image_shape(self) -> ImageShape:
        if self.load is not None and self.paths:
            channels, height, width = self.decode(self.paths[0]).shape
            return channels, height, width
        return (1 if self.mode == "L" else 3), self.size, self.size

    def decode(self, path: Path) -> Tensor:
        """One file as uint8 ``(C, H, W)``.

        Raises:
            ValueError: If the file cannot be read as an image; its name is in the message.
        """
        with open_image(path, self.mode) as image:
            return self.load(image) if self.load is not None else fit(image, self.size)

    def take(self, indices: Tensor) -> Tensor:
        if len(indices) == 0:
            return torch.zeros(0, *self.image_shape, dtype=torch.uint8)
        return torch.stack([self.decode(self.paths[index]) for index in indices.tolist()])

    def digest(self, indices: np.ndarray) -> bytes:
        digest = hashlib.blake2b(digest_size=16)
        for index in np.asarray(indices).tolist():
            path = self.paths[index]
            digest.update(f"{path.relative_to(self.root).as_posix()}:{path.stat().st_size};".encode())
        return digest.digest()

    def unreadable(self) -> list[tuple[int, str]]:
        """Index and reason of every file that is not a readable image; reads all of them."""
        found: list[tuple[int, str]] = []
        for index, path in enumerate(self.paths):
            try:
                with open_image(path, self.mode):
                    pass
            except ValueError as error:
                found.append((index, str(error)))
        return found


class DatasetSource:
    """A map-style Dataset of a user: items ``(image, label)``, image a PIL image or a uint8 tensor ``(C, H, W)``.

    Labels come from an attribute ``targets`` or ``labels``; without one, every item is read once.

    Args:
        dataset: The data set.
        class_names: One per class; None for its attribute ``classes``, or numbers.
        size: Height and width that images are scaled and cropped to; None to leave them, if all have one shape.
        name: Names the data in errors.
    """

    in_memory = False

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        class_names: Sequence[str] | None = None,
        size: int | None = None,
        name: str = "data",
    ) -> None:
        self.dataset, self.size, self.name = dataset, size, name
        count = len(dataset)  # type: ignore[arg-type]
        for attribute in ("targets", "labels", "_labels", "y"):
            labels = getattr(dataset, attribute, None)
            if labels is not None and len(labels) == count:
                break
        else:
            warnings.warn(f"{name}: no attribute `targets`; every item is read once for its label", stacklevel=2)
            labels = [dataset[index][1] for index in range(count)]
        names = class_names if class_names is not None else getattr(dataset, "classes", None)
        self.labels = check_labels(np.asarray(labels), count, names, name)
        known = int(self.labels.max(initial=-1)) + 1
        self.class_names = tuple(str(n) for n in names) if names is not None else tuple(str(i) for i in range(known))
        self.domains: np.ndarray | None = None
        self.domain_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> ImageShape:
        channels, height, width = self._image(0).shape
        return channels, height, width

    def _image(self, index: int) -> Tensor:
        image = self.dataset[index][0]
        if isinstance(image, Image.Image):
            tensor = fit(image, self.size) if self.size is not None else pixels(image)
        else:
            tensor = torch.as_tensor(image)
            if tensor.dim() == 2:
                tensor = tensor.unsqueeze(0)
        if tensor.dtype != torch.uint8 or tensor.dim() != 3:
            raise ValueError(
                f"{self.name}: item {index} is {tensor.dtype} of shape {tuple(tensor.shape)}; give PIL images or uint8 "
                "tensors (C, H, W) without ToTensor or Normalize, which the data module does on the device"
            )
        return tensor

    def take(self, indices: Tensor) -> Tensor:
        try:
            return torch.stack([self._image(index) for index in indices.tolist()])
        except RuntimeError as error:
            if "equal size" in str(error):
                raise ValueError(f"{self.name}: images differ in shape; give `size` to scale and crop them") from error
            raise

    def digest(self, indices: np.ndarray) -> bytes:
        return hashlib.blake2b(np.asarray(self.labels[indices]).tobytes(), digest_size=16).digest()


def open_image(path: Path, mode: str) -> Image.Image:
    """Decoded image, upright, in ``RGB`` or ``L``.

    16-bit grayscale is scaled to 8 bits; transparency is laid on white.

    Raises:
        ValueError: If the file is not a readable image.
    """
    try:
        with Image.open(path) as file:
            file.load()
            image: Image.Image = file
            if (file.getexif() or {}).get(0x0112, 1) != 1:
                from PIL import ImageOps

                image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I") or image.mode == "F":
                values = np.asarray(image, dtype=np.float64)
                top = 65535.0 if values.max(initial=0) > 255 else 255.0
                image = Image.fromarray((values.clip(0, top) * (255.0 / top)).round().astype(np.uint8))
            if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert(mode)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error})") from error


def pixels(image: Image.Image) -> Tensor:
    """uint8 ``(C, H, W)``."""
    array = torch.from_numpy(np.array(image, dtype=np.uint8))
    return array.unsqueeze(0) if array.dim() == 2 else array.permute(2, 0, 1).contiguous()


def fit(image: Image.Image, size: int) -> Tensor:
    """Scale the shorter side to ``size`` (bilinear, antialiased) and crop the centre; uint8 ``(C, size, size)``."""
    width, height = image.size
    if (width, height) != (size, size):
        scale = size / min(width, height)
        # Only the part that is kept is scaled, so that a very long image costs no more than a square one.
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=None if scale > 1 else 2.0)
    return pixels(image)


def folder_of_classes(
    root: Path, *, class_names: Sequence[str] | None = None, name: str = "folder"
) -> tuple[list[Path], list[int], tuple[str, ...]]:
    """Files, labels and class names of a folder with one sub-folder per class, in sorted order.

    Args:
        root: The folder.
        class_names: Names whose order fixes the labels; None for the sorted names of the sub-folders.
        name: Names the data in errors.

    Raises:
        ValueError: If the folder is missing, holds no class folders or no images, or a class is not in ``class_names``.
    """
    if not root.is_dir():
        raise ValueError(f"{name}: no folder at {root}; give a folder with one sub-folder of images per class")
    found = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not found:
        raise ValueError(
            f"{name}: {root} holds no class folders; give a folder with one sub-folder of images per class"
        )
    names = tuple(class_names) if class_names is not None else tuple(found)
    if unknown := set(found) - set(names):
        raise ValueError(f"{name}: {root} holds the class {min(unknown)!r}, which is not in the training data")
    paths: list[Path] = []
    labels: list[int] = []
    for label, class_name in enumerate(names):
        folder = root / class_name
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES) if folder.is_dir() else []
        paths += files
        labels += [label] * len(files)
    if not paths:
        raise ValueError(f"{name}: no images under {root}; known endings are {', '.join(IMAGE_SUFFIXES)}")
    return paths, labels, names
