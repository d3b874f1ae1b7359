"""Where samples come from: tensors in memory, or files that are decoded when they are asked for."""

import hashlib
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from operator import index as integer
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from cl_lightning.backbones import ImageShape

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
Mode = Literal["RGB", "L"]
# What decoders raise on damaged files; OSError is also the base of PIL's UnidentifiedImageError.
# Those that Pillow reads by itself: for others, such as PostScript in a file called .png, it starts a program. Frequent
# ones come first, since a format that was not asked for yet loads all.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "WEBP", "TIFF", "JPEG2000")
_MOST_CLASSES = 2**20  # of labels without names: one label of 10^12 would make as many classes
_CHANNELS = (1, 3, 4)
_DAMAGE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    NotImplementedError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


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
        """Raw images ``(n, C, H, W)``, uint8; n may be 0."""
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
        channels_last: Whether the channels come last; None to tell by the shape. Where both ways would do, square
            images are the likelier ones.
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
        return self.images.index_select(0, indices)  # copies whole images, an index would copy bytes: 20 times faster

    def digest(self, indices: np.ndarray) -> bytes:
        images = self.take(torch.tensor(indices, dtype=torch.int64))
        return hashlib.blake2b(images.numpy().tobytes(), digest_size=16).digest()


class DecodedSource(TensorSource):
    """Samples of another source, decoded once; their fingerprint is still that of what they were decoded from."""

    def __init__(self, images: Tensor, origin: Source) -> None:
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
    """What a data set of a user says under ``classes``; None where it says nothing, or has a method of that name."""
    classes = getattr(dataset, "classes", None)
    if classes is None or callable(classes):
        return None
    if not isinstance(classes, Iterable):
        raise ValueError(f"{name}: the attribute `classes` is a {type(classes).__name__}; make it a list of names")
    return [str(item) for item in classes]


def check_labels(
    labels: Tensor | np.ndarray | Sequence[int], count: int, class_names: Sequence[str] | None, name: str
) -> np.ndarray:
    """Labels as int64, after a look at their number and range.

    Raises:
        ValueError: If there are not ``count`` integer labels, or one lies outside ``0 .. number of classes - 1``.
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
        allowed = f"0 .. {limit - 1}, {why}" if limit else "those of class names, of which there are none"
        raise ValueError(f"{name}: label {array[first]} of sample {first} is outside the range; labels are {allowed}")
    return array.astype(np.int64)


def _channels_last(shape: tuple[int, ...], name: str) -> bool:
    """Whether the last of three sides of an image is that of its channels, and not the first."""
    first, height, last = shape
    if first not in _CHANNELS and last not in _CHANNELS:
        raise ValueError(
            f"{name}: images have shape {shape}; which side is that of the channels cannot be told unless they are 1, "
            "3 or 4: save such images as (N, H, W), (N, H, W, C) or (N, C, H, W), or say channels_last"
        )
    return last in _CHANNELS and (first not in _CHANNELS or (first == height and height != last))


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
        skip_unreadable: Whether ``decoded`` and ``checked`` leave out files that are no readable images.
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
        """One file as uint8 ``(C, H, W)``.

        Raises:
            ValueError: If the file cannot be read as an image; its name is in the message.
        """
        if self.load is not None:
            return self.load(open_image(path, self.mode))
        # Twice the size is enough to scale from without a visible difference, and large photographs decode much faster.
        return fit(open_image(path, self.mode, least=2 * self.size), self.size)

    def take(self, indices: Tensor) -> Tensor:
        if len(indices) == 0:
            return torch.zeros(0, *self.image_shape, dtype=torch.uint8)
        return torch.stack([self.decode(self.paths[index]) for index in indices.tolist()])

    def digest(self, indices: np.ndarray) -> bytes:
        """Hash of the names and sizes of the files, which needs no file to be read."""
        digest = hashlib.blake2b(digest_size=16)
        for index in np.asarray(indices).tolist():
            path = self.paths[index]
            line = f"{path.relative_to(self.root).as_posix()}:{path.stat().st_size};"
            digest.update(line.encode("utf-8", "surrogatepass"))
        return digest.digest()

    def subset(self, rows: np.ndarray) -> "FileSource":
        """The files at the given places."""
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
    """A map-style Dataset of a user: items ``(image, label)``, image a PIL image or a uint8 tensor ``(C, H, W)``.

    Labels come from the attribute ``targets``, ``labels``, ``_labels`` or ``y``; without one, every item is read once.
    An attribute ``domains`` (integers, one per item) tells the domains, ``domain_names`` their names.

    Args:
        dataset: The data set. Items must not be augmented: that is done on the device.
        class_names: One per class; None for its attribute ``classes``, or numbers.
        labels: Raw labels, one per item; None to find them as told above.
        size: Height and width that images are scaled and cropped to; None to leave them, if all have one shape.
        mode: ``RGB`` or ``L`` (grayscale), which PIL images are converted to; None to keep grayscale images and convert
            all others to RGB.
        threads: Whether items may be read by several threads at once.
        name: Names the data in errors.
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
                f"{name}: {type(dataset).__name__} has no length; give a data set of items that have a place"
            )
        self.dataset, self.size, self.mode, self.threads, self.name = dataset, size, mode, threads, name
        count = len(dataset)  # type: ignore[arg-type]
        if count == 0:
            raise ValueError(f"{name}: {type(dataset).__name__} has no items")
        names = class_names if class_names is not None else names_in(dataset, name)
        if labels is None:
            labels = self._find_labels(count)
        self.labels = check_labels(labels, count, names, name)
        known = int(self.labels.max(initial=-1)) + 1
        self.class_names = tuple(map(str, names)) if names is not None else tuple(str(i) for i in range(known))
        self.domains: np.ndarray | None = None
        self.domain_names: tuple[str, ...] = ()
        if (domains := getattr(dataset, "domains", None)) is not None:
            told = getattr(dataset, "domain_names", None)
            self.domains = check_labels(domains, count, told, f"{name}, domains")
            last = int(self.domains.max(initial=-1))
            self.domain_names = tuple(told) if told is not None else tuple(str(i) for i in range(last + 1))

    def _find_labels(self, count: int) -> Any:
        for attribute in ("targets", "labels", "_labels", "y"):
            labels = getattr(self.dataset, attribute, None)
            if isinstance(labels, Sized) and not callable(labels) and len(labels) == count:
                return labels
        warnings.warn(f"{self.name}: no attribute `targets`; every item is read once for its label", stacklevel=3)
        try:
            return np.array([integer(self.dataset[place][1]) for place in range(count)], dtype=np.int64)
        except (TypeError, ValueError, LookupError, OverflowError, RuntimeError) as error:
            raise ValueError(
                f"{self.name}: items are not (image, label) with an integer label ({_reason(error)})"
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
                item.load()  # it may read its file only now
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
                "tensors (C, H, W) without ToTensor or Normalize, which the data module does on the device"
            )
        if self.size is not None and tensor.shape[1:] != (self.size, self.size):
            raise ValueError(
                f"{self.name}: item {index} is a tensor of shape {tuple(tensor.shape)}; `size` {self.size} scales PIL "
                "images only: give those, or leave `size` out"
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
        """Hash of the number of samples alone: reading them may take long, and need not give the same bytes twice."""
        return hashlib.blake2b(str(len(indices)).encode(), digest_size=16).digest()


def decoded(source: Source, threads: int = 0) -> TensorSource:
    """The same samples, decoded once and kept in memory.

    Args:
        source: Files that cannot be read are left out with a warning where it says so (``skip_unreadable``).
        threads: Number of threads that decode; 0 for one per processor, at most 8.

    Raises:
        ValueError: If a file cannot be read; the first ones are named.
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
    """The same files, after a look at each of them.

    With ``skip_unreadable`` every file is decoded once, and those that fail are left out. Without it, only the head and
    the end of a file are read: a file that is missing, empty, no image or cut off is found, damage in the middle of one
    shows when it is decoded.

    Args:
        source: The files.
        threads: Number of threads; 0 for one per processor, at most 8.

    Raises:
        ValueError: If a file cannot be read and ``skip_unreadable`` is not set; the first ones are named.
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
    """Call ``work`` with ``0 .. count - 1``; decoding releases the interpreter, so that threads help."""
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
        raise ValueError(f"{which}. There is nothing left to learn from")
    warnings.warn(f"{which}. They are left out", stacklevel=4)
    return source.subset(np.array([row for row, problem in enumerate(problems) if problem is None], dtype=np.int64))


def looks_whole(path: Path) -> bool:
    """Whether the file begins and ends as an image file of its kind does; False also where that cannot be told.

    Raises:
        ValueError: If the file has no head that is known.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            kind = image.format
        with path.open("rb") as file:
            start, length = file.read(12), file.seek(0, os.SEEK_END)
            file.seek(max(0, length - 1024))
            end = file.read()
    except _DAMAGE as error:
        raise ValueError(f"{path}: not a readable image ({_reason(error)})") from error
    if kind == "JPEG":
        return b"\xff\xd9" in end
    if kind == "PNG":
        return b"IEND" in end
    if kind == "WEBP":
        return int.from_bytes(start[4:8], "little") + 8 <= length
    return False


def open_image(path: Path, mode: str, least: int | None = None) -> Image.Image:
    """Decoded image, upright, in ``RGB`` or ``L``; of several images in one file the first.

    Grayscale of 16 bits is scaled to 8 bits; transparency is laid on white.

    Args:
        path: The file.
        mode: ``RGB`` or ``L``.
        least: Height and width in pixels that are enough: a larger JPEG is decoded at 1/2, 1/4 or 1/8 of its size, not
            below them.

    Raises:
        ValueError: If the file is not a readable image.
    """
    try:
        with Image.open(path, formats=_FORMATS) as file:
            if least is not None:
                file.draft(None, (least, least))  # type: ignore[arg-type]  # None keeps the mode
            file.load()
            return convert(upright(file), mode)
    except _DAMAGE as error:
        raise ValueError(f"{path}: not a readable image ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror is not None:
        return error.strerror.lower()
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF tag says; as it is where the tag is damaged."""
    try:
        if image.getexif().get(0x0112, 1) == 1:
            return image
        return ImageOps.exif_transpose(image)
    except _DAMAGE:  # the pixels are readable all the same
        return image


def convert(image: Image.Image, mode: str) -> Image.Image:
    """The image in ``RGB`` or ``L``: 16 bits of grayscale scaled to 8, transparency laid on white.

    Raises:
        ValueError: If the pixels are floating point, or integers beyond 16 bits, whose white is not known.
    """
    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode == "F" or values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise ValueError(f"pixels of mode {image.mode}; give images of 8 or 16 bits")
        image = Image.fromarray(((values.astype(np.int64) * 255 + 32767) // 65535).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def pixels(image: Image.Image) -> Tensor:
    """uint8 ``(C, H, W)``."""
    array = torch.from_numpy(np.array(image, dtype=np.uint8))
    return array.unsqueeze(0) if array.dim() == 2 else array.permute(2, 0, 1).contiguous()


def fit(image: Image.Image, size: int) -> Tensor:
    """Scale the shorter side to ``size`` (bilinear, antialiased) and crop the centre; uint8 ``(C, size, size)``."""
    width, height = image.size
    if (width, height) != (size, size):
        # Only the part that is kept is scaled, so that a very long image costs no more than a square one.
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BILINEAR, box)
    return pixels(image)


def image_files(folder: Path) -> list[Path]:
    """Image files in a folder and its sub-folders, also behind symbolic links, in the order of their names.

    Files are known by their ending; hidden files and folders are left out, and so are links to folders above, whose
    images would come once more, and those of other classes with them.

    Raises:
        OSError: If a folder cannot be listed.
        ValueError: If a link that is no image leads nowhere: it may have been a folder of images.
    """

    def refuse(error: OSError) -> None:
        raise error

    found: list[tuple[tuple[str, ...], Path]] = []
    seen = {(status.st_dev, status.st_ino) for status in map(os.stat, folder.resolve().parents)}
    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        # In sorted order, so that of two ways to one folder the same is taken everywhere.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            path = Path(place, name)
            if name.startswith("."):
                continue
            if name.lower().endswith(IMAGE_SUFFIXES):
                found.append((path.relative_to(folder).parts, path))
            else:
                _refuse_dangling(path)
    return [path for _, path in sorted(found)]


def sub_folders(root: Path) -> list[str]:
    """Names of the folders in a folder, sorted; hidden ones and links to it or to folders above are left out.

    Raises:
        OSError: If the folder cannot be listed.
        ValueError: If a link leads nowhere: a folder that is missing would be a class that is missing.
    """
    above = {root.resolve(), *root.resolve().parents}
    names = []
    for entry in root.iterdir():
        if entry.name.startswith("."):
            continue
        _refuse_dangling(entry)
        if entry.is_dir() and not (entry.is_symlink() and entry.resolve() in above):
            names.append(entry.name)
    return sorted(names)


def _refuse_dangling(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{path} is a link to {os.readlink(path)}, which is not there; mend the link or remove it")
