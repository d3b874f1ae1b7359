"""Image files: formats, decoding and conversion to the shape of a data set."""

import os
import struct
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
Mode = Literal["RGB", "L"]
# Formats that Pillow decodes itself; for other formats, such as PostScript in a file named .png, it starts a program.
# Frequent formats come first: Pillow loads all its plugins when it meets a format that is not loaded yet.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "WEBP", "TIFF", "JPEG2000")
_CHANNELS = (1, 3, 4)
# Exceptions of decoders on damaged files; OSError is also the base class of PIL's UnidentifiedImageError.
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


def looks_whole(path: Path) -> bool:
    """Whether a file starts and ends like a complete image file of its format; False if this cannot be decided.

    Raises:
        ValueError: If the header of the file is of no known format.
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
    """Decode an image, rotated upright, in mode ``RGB`` or ``L``; the first image of a file with several.

    16-bit grayscale is scaled to 8 bits; transparent pixels are blended with white.

    Args:
        path: The file.
        mode: ``RGB`` or ``L``.
        least: Sufficient height and width in pixels: a larger JPEG is decoded at 1/2, 1/4 or 1/8 of its size, but not
            below ``least``.

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
    """Image rotated according to its EXIF tag; unchanged if the tag is damaged."""
    try:
        if image.getexif().get(0x0112, 1) == 1:
            return image
        return ImageOps.exif_transpose(image)
    except _DAMAGE:  # the EXIF data is damaged, the pixels are readable
        return image


def convert(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to mode ``RGB`` or ``L``; 16-bit grayscale is scaled to 8 bits, transparency blended with white.

    Raises:
        ValueError: If pixels are floating point, or integers outside 16 bits: their white level is unknown.
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
    """Pixels of an image, uint8 ``(C, H, W)``."""
    array = torch.from_numpy(np.array(image, dtype=np.uint8))
    return array.unsqueeze(0) if array.dim() == 2 else array.permute(2, 0, 1).contiguous()


def fit(image: Image.Image, size: int) -> Tensor:
    """Resize the shorter side to ``size`` (bilinear, antialiased) and crop the centre; uint8 ``(C, size, size)``."""
    width, height = image.size
    if (width, height) != (size, size):
        # Only the crop is resized, so that the cost does not depend on the longer side.
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BILINEAR, box)
    return pixels(image)


def image_files(folder: Path) -> list[Path]:
    """Image files in a folder and its sub-folders, sorted by name; symbolic links are followed.

    Files are recognised by their extension. Hidden files and folders are ignored, and so are links to a parent folder,
    which would list its images a second time, with images of other classes.

    Raises:
        OSError: If a folder cannot be listed.
        ValueError: If a link without an image extension is broken: it may have been a folder of images.
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
        # Sorted, so that a folder that is reachable by two paths has the same path on every machine.
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
    """Names of the sub-folders of a folder, sorted; hidden folders and links to the folder or its parents are ignored.

    Raises:
        OSError: If the folder cannot be listed.
        ValueError: If a link is broken: a missing folder would be a missing class.
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
        raise ValueError(f"{path} is a link to {os.readlink(path)}, which does not exist; repair or remove the link")
