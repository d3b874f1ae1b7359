"""Sources of samples: tensors in memory, or files that are decoded on access."""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from operator import index as integer
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from cl_lightning.batch import ImageShape
from cl_lightning.data.images import _CHANNELS, Mode, _reason, convert, fit, looks_whole, open_image, pixels

_MOST_CLASSES = 2**20  # limit without class names: a single label of 10^12 would create 10^12 classes


class SampleSource(Protocol):
    """Protocol of labelled images that can be accessed by index."""

    labels: np.ndarray
    """Raw labels, int64 ``(N,)``."""
    class_names: tuple[str, ...]
    """Name of each raw label."""
    domains: np.ndarray | None
    """Domain of each sample, int64 ``(N,)``; None where the data have no domains."""
    domain_names: tuple[str, ...]
    in_memory: bool
    """Whether samples are in memory, so that worker processes would only add overhead."""

    @property
    def image_shape(self) -> ImageShape: ...

    def take(self, indices: Tensor) -> Tensor:
        """Raw images of indices ``(n,)``, uint8 ``(n, C, H, W)``; n may be 0."""
        ...

    def digest(self, indices: np.ndarray) -> bytes:
        """Hash of the content of the given samples, independent of their indices in the data set."""
        ...


class TensorSource:
    """Images in memory.

    Args:
        images: uint8, ``(N, H, W)``, ``(N, H, W, C)`` or ``(N, C, H, W)`` with C of 1, 3 or 4; a tensor or an array.
        labels: Raw labels, integers ``(N,)`` from 0.
        class_names: One per class; None for ``"0"``, ``"1"``, ...
        channels_last: Whether channels are the last dimension; None to infer it from the shape. If both readings are
            possible, the reading with square images is used.
        domains: Domain of each sample, integers ``(N,)``.
        domain_names: One per domain.
        name: Name of the data in error messages.

    Raises:
        ValueError: If images or labels have another dtype, shape or range.
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
        tensor = images if isinstance(images, Tensor) else torch.from_numpy(np.require(images, requirements=["C", "W"]))
        if tensor.dtype != torch.uint8:
            raise ValueError(f"{name}: images are {tensor.dtype}; give uint8 pixels from 0 to 255")
        if tensor.dim() == 3:
            tensor = tensor.unsqueeze(1)
        elif tensor.dim() == 4:
            last = channels_last if channels_last is not None else _channels_last(tuple(tensor.shape[1:]), name)
            tensor = tensor.permute(0, 3, 1, 2).contiguous() if last else tensor
        else:
            raise ValueError(
                f"{name}: images have shape {tuple(tensor.shape)}; use (N, H, W), (N, H, W, C) or (N, C, H, W)"
            )
        self.images = tensor
        self.labels = check_labels(labels, len(tensor), class_names, name)
        count = int(self.labels.max(initial=-1)) + 1
        self.class_names = tuple(class_names) if class_names is not None else tuple(str(i) for i in range(count))
        self.domains = None if domains is None else np.asarray(domains, dtype=np.int64)
        self.domain_names = tuple(domain_names)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> ImageShape:
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def take(self, indices: Tensor) -> Tensor:
        return self.images.index_select(0, indices)  # copies whole images: 20 times faster than images[indices]

    def digest(self, indices: np.ndarray) -> bytes:
        images = self.take(torch.tensor(indices, dtype=torch.int64))
        return hashlib.blake2b(images.numpy().tobytes(), digest_size=16).digest()


class DecodedSource(TensorSource):
    """Samples of another source, decoded into memory; the digest is the digest of the original source."""

    def __init__(self, images: Tensor, origin: SampleSource) -> None:
        super().__init__(
            images,
            origin.labels,
            class_names=origin.class_names,
            channels_last=False,
            domains=origin.domains,
            domain_names=origin.domain_names,
        )
        self.origin = origin

    def digest(self, indices: np.ndarray) -> bytes:
        return self.origin.digest(indices)


def names_in(dataset: Any, name: str) -> list[str] | None:
    """Class names from the attribute ``classes`` of a user's data set; None without it, or if it is a method.

    Raises:
        ValueError: If the attribute is not iterable.
    """
    classes = getattr(dataset, "classes", None)
    if classes is None or callable(classes):
        return None
    if not isinstance(classes, Iterable):
        raise ValueError(f"{name}: the attribute `classes` is a {type(classes).__name__}; make it a list of names")
    return [str(item) for item in classes]


def check_labels(
    labels: Tensor | np.ndarray | Sequence[int], count: int, class_names: Sequence[str] | None, name: str
) -> np.ndarray:
    """Labels as int64, after checks of their number and range.

    Raises:
        ValueError: If there are not ``count`` integer labels, or one is outside ``0 .. number of classes - 1``.
    """
    try:
        array = np.asarray(labels)
    except (TypeError, ValueError, RuntimeError) as error:  # lists of unequal length, bfloat16, tensors with a gradient
        raise ValueError(
            f"{name}: labels are no array of numbers ({_reason(error)}); give {count} integers, one per image"
        ) from error
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.shape != (count,) or array.dtype.kind not in "iu":
        raise ValueError(
            f"{name}: labels are {array.dtype} of shape {array.shape}; give {count} integers, one per image"
        )
    limit = len(class_names) if class_names is not None else _MOST_CLASSES
    wrong = (array < 0) | (array >= limit)
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        why = f"as there are {limit} class names" if class_names is not None else "where classes have no names"
        allowed = f"0 .. {limit - 1}, {why}" if limit else "limited to class names, of which there are none"
        raise ValueError(f"{name}: label {array[first]} of sample {first} is outside the range; labels are {allowed}")
    return array.astype(np.int64)


def _channels_last(shape: tuple[int, ...], name: str) -> bool:
    """Whether the last dimension of images ``shape`` is the channels, instead of the first."""
    first, height, last = shape
    if first not in _CHANNELS and last not in _CHANNELS:
        raise ValueError(
            f"{name}: images have shape {shape}; neither the first nor the last side is 1, 3 or 4 channels; save "
            "images as (N, H, W), (N, H, W, C) or (N, C, H, W), or give channels_last"
        )
    return last in _CHANNELS and (first not in _CHANNELS or (first == height and height != last))


class FileSource:
    """Image files, decoded to one shape on access.

    Images are rotated upright by their EXIF tag, converted to ``mode``, resized so that the shorter side is ``size``
    and cropped at the centre, unless ``load`` is given.

    Args:
        paths: The files.
        labels: Raw labels, one per file.
        class_names: One per class.
        root: Folder to which the paths are relative in digests.
        size: Height and width after decoding, in pixels.
        mode: ``RGB`` or ``L`` (grayscale).
        load: Custom conversion of a PIL image to a uint8 tensor ``(C, H, W)``, all of one shape.
        domains: Domain of each file.
        domain_names: One per domain.
        skip_unreadable: Whether ``decoded`` and ``checked`` leave out unreadable files instead of raising an error.
        name: Name of the data in error messages.

    Raises:
        ValueError: If an option or a label is out of range.
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
        skip_unreadable: bool = False,
        name: str = "folder",
    ) -> None:
        if size < 1:
            raise ValueError(f"{name}: size is {size}; give the height and width of an image in pixels, at least 1")
        if mode not in ("RGB", "L"):
            raise ValueError(f"{name}: mode is {mode!r}; use RGB, or L for grayscale")
        self.paths = list(paths)
        self.labels = check_labels(np.asarray(labels, dtype=np.int64), len(self.paths), class_names, name)
        self.class_names = tuple(class_names)
        self.root, self.size, self.mode, self.load, self.name = root, size, mode, load, name
        self.domains = None if domains is None else np.asarray(domains, dtype=np.int64)
        self.domain_names = tuple(domain_names)
        self.skip_unreadable = skip_unreadable
        self._shape: ImageShape | None = None

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def image_shape(self) -> ImageShape:
        if self._shape is None:
            self._shape = ((1 if self.mode == "L" else 3), self.size, self.size)
            if self.load is not None and self.paths:
                channels, height, width = self.decode(self.paths[0]).shape
                self._shape = (channels, height, width)
        return self._shape

    def decode(self, path: Path) -> Tensor:
        """Decode one file to uint8 ``(C, H, W)``.

        Raises:
            ValueError: If the file cannot be read as an image; the message contains its name.
        """
        if self.load is not None:
            return self.load(open_image(path, self.mode))
        # Resizing from twice the size makes no visible difference, and a large JPEG decodes at 1/8 to 1/2 of its size.
        return fit(open_image(path, self.mode, least=2 * self.size), self.size)

    def take(self, indices: Tensor) -> Tensor:
        if len(indices) == 0:
            return torch.zeros(0, *self.image_shape, dtype=torch.uint8)
        return torch.stack([self.decode(self.paths[index]) for index in indices.tolist()])

    def digest(self, indices: np.ndarray) -> bytes:
        """Hash of the names and sizes of the files; no file is read."""
        digest = hashlib.blake2b(digest_size=16)
        for index in np.asarray(indices).tolist():
            path = self.paths[index]
            line = f"{path.relative_to(self.root).as_posix()}:{path.stat().st_size};"
            digest.update(line.encode("utf-8", "surrogatepass"))
        return digest.digest()

    def subset(self, rows: np.ndarray) -> "FileSource":
        """Source of the files at the given indices."""
        return FileSource(
            [self.paths[row] for row in rows.tolist()],
            self.labels[rows],
            class_names=self.class_names,
            root=self.root,
            size=self.size,
            mode=self.mode,
            load=self.load,
            domains=None if self.domains is None else self.domains[rows],
            domain_names=self.domain_names,
            skip_unreadable=self.skip_unreadable,
            name=self.name,
        )


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


def decoded(source: SampleSource, threads: int = 0) -> TensorSource:
    """Decode all samples of a source once and keep them in memory.

    Args:
        source: Unreadable files are left out with a warning if its ``skip_unreadable`` is set.
        threads: Number of decoding threads; 0 for one per processor, at most 8.

    Raises:
        ValueError: If a file cannot be read and ``skip_unreadable`` is not set (the first files are named), or images
            differ in shape.
    """
    files = source if isinstance(source, FileSource) else None
    images = torch.empty(len(source.labels), *source.image_shape, dtype=torch.uint8)
    problems: list[str | None] = [None] * len(images)

    def decode(index: int) -> None:
        try:
            image = files.decode(files.paths[index]) if files is not None else source.take(torch.tensor([index]))[0]
        except ValueError as error:
            if files is None:
                raise
            problems[index] = str(error)
            return
        if image.shape != images.shape[1:]:
            name, first = getattr(source, "name", "data"), tuple(images.shape[1:])
            raise ValueError(
                f"{name}: images differ in shape, {first} and, item {index}, "
                f"{tuple(image.shape)}; give `size` to scale and crop them, `mode` if only the channels differ"
            )
        images[index] = image

    _each(decode, len(images), threads if files is not None or getattr(source, "threads", False) else 1)
    if files is None:
        return DecodedSource(images, source)
    kept = _without(files, problems)
    return DecodedSource(images if kept is files else images[torch.tensor([p is None for p in problems])], kept)


def checked(source: FileSource, threads: int = 0) -> FileSource:
    """Check all files of a source, and return the readable ones.

    With ``skip_unreadable``, every file is decoded once, and files that fail are left out. Without it, only the start
    and the end of each file are read: this detects files that are missing, empty, truncated or no images. Damage in the
    middle of a file is detected when it is decoded.

    Args:
        source: The files.
        threads: Number of threads; 0 for one per processor, at most 8.

    Raises:
        ValueError: If a file cannot be read and ``skip_unreadable`` is not set; the first files are named.
    """
    problems: list[str | None] = [None] * len(source)

    def look(index: int) -> None:
        path = source.paths[index]
        try:
            if source.skip_unreadable:
                source.decode(path)
            elif not looks_whole(path):
                open_image(path, source.mode)
        except ValueError as error:
            problems[index] = str(error)

    _each(look, len(source), threads)
    return _without(source, problems)


def _each(work: Callable[[int], None], count: int, threads: int) -> None:
    """Call ``work`` with ``0 .. count - 1``, in threads: decoding releases the GIL."""
    threads = threads or min(8, os.cpu_count() or 1)
    if threads == 1 or count < 2:
        for index in range(count):
            work(index)
        return

    def stretch(start: int) -> None:
        for index in range(start, min(start + 64, count)):
            work(index)

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(stretch, range(0, count, 64)):
            pass


def _without(source: FileSource, problems: Sequence[str | None]) -> FileSource:
    """The source without the files that have a problem, or an error that names them."""
    found = [problem for problem in problems if problem is not None]
    if not found:
        return source
    shown = "; ".join(found[:5]) + (f"; and {len(found) - 5} more" if len(found) > 5 else "")
    which = f"{source.name}: {len(found)} of {len(source)} files cannot be read: {shown}"
    if not source.skip_unreadable:
        raise ValueError(f"{which}. Repair or remove them, or set skip_unreadable to leave them out")
    if len(found) == len(source):
        raise ValueError(f"{which}. There is nothing left to learn from; repair at least one of them")
    warnings.warn(f"{which}. They are left out", stacklevel=4)
    return source.subset(np.array([row for row, problem in enumerate(problems) if problem is None], dtype=np.int64))
