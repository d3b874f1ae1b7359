"""Image files: formats, decoding and conversion to the shape of a data set."""

import errno
import importlib
import os
import struct
import zlib
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from cl_lightning.checks import reason
from cl_lightning.files import require_regular

ENDINGS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "AVIF": (".avif", ".avifs"),
    "HEIF": (".heic", ".heif", ".hif"),
    "JXL": (".jxl",),
    "TGA": (".tga",),
    "DIB": (),
    "PCX": (".pcx",),
    "SGI": (".sgi",),
    "SUN": (".ras",),
    "QOI": (".qoi",),
    "DDS": (".dds",),
    "ICO": (".ico",),
    "PSD": (".psd",),
}
"""Formats that are read, by Pillow's names, and the endings of their files; in the order in which they are tried.

Only formats that Pillow or a plugin decodes itself: for others, such as PostScript in a file named .png, Pillow starts
a program. Frequent formats come first: Pillow loads all its plugins when it meets a format that is not loaded.
"""
IMAGE_SUFFIXES = tuple(ending for endings in ENDINGS.values() for ending in endings)
Mode = Literal["RGB", "L"]
# Formats that Pillow reads with another package: its module, the function that registers it (importing is enough
# without one), its name for pip, and how the content of a file begins at byte 4.
_PLUGINS = {
    "AVIF": ("pillow_avif", "", "pillow-avif-plugin", (b"ftypavif", b"ftypavis")),
    "HEIF": (
        "pillow_heif",
        "register_heif_opener",
        "pillow-heif",
        tuple(b"ftyp" + brand for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")),
    ),
    "JXL": ("pillow_jxl", "", "pillow-jxl-plugin", (b"JXL ",)),
}
CHANNELS = (1, 3, 4)
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


def _opened(path: Path) -> Image.Image:
    """The image of a file, not decoded yet; a plugin of Pillow is loaded where the content needs it.

    Raises:
        OSError: If there is nothing at the path, or no regular file.
        ValueError: If its format needs a package that is not installed.
    """
    require_regular(path)
    formats = [name for name in ENDINGS if name not in _PLUGINS or name in Image.OPEN]
    try:
        return Image.open(path, formats=formats)
    except UnidentifiedImageError:
        with path.open("rb") as file:
            start = file.read(16)
        kind = next((name for name, (*_, marks) in _PLUGINS.items() if start[4:12].startswith(marks)), None)
        if kind is None:
            raise
        _load_plugin(kind)
        return Image.open(path, formats=[kind])


def _load_plugin(kind: str) -> None:
    """Make Pillow read a format, with Pillow's own decoder or with the package that has one."""
    module, register, package, _ = _PLUGINS[kind]
    Image.init()
    if kind not in Image.OPEN:
        try:
            plugin = importlib.import_module(module)
        except ImportError:
            raise ValueError(f"install {package}, Pillow needs it to read {kind}") from None
        if register:
            getattr(plugin, register)()


def looks_whole(path: Path) -> bool:
    """Whether a file starts and ends like a complete image file of its format; False if this cannot be decided.

    Raises:
        ValueError: If the header of the file is of no known format.
    """
    try:
        with _opened(path) as image:
            kind = image.format
        with path.open("rb") as file:
            start, length = file.read(12), file.seek(0, os.SEEK_END)
            file.seek(max(0, length - 1024))
            end = file.read()
    except _DAMAGE as error:
        raise ValueError(f"{path}: not a readable image ({reason(error)})") from error
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
        with _opened(path) as file:
            if least is not None:
                file.draft(None, (least, least))  # type: ignore[arg-type]  # None keeps the mode
            file.load()
            return convert(upright(file), mode)
    except _DAMAGE as error:
        raise ValueError(f"{path}: not a readable image ({reason(error)})") from error


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


def to_bytes(values: Tensor) -> Tensor:
    """Pixels as uint8, from any type in which their reading is certain.

    Understood are integers of 8, 32 or 64 bits in 0 .. 255, booleans (False is black), and floating point pixels in
    [0, 1] that are multiples of 1/255, as ``ToTensor`` makes them.

    Args:
        values: Any shape.

    Raises:
        ValueError: If values are something else; the message says what they look like.
    """
    kind = str(values.dtype).removeprefix("torch.")
    if values.dtype == torch.uint8:
        return values
    if values.dtype == torch.bool:
        return values.to(torch.uint8) * 255
    if kind in ("int16", "uint16"):
        raise ValueError(f"{kind}: images of 16 bits; scale them to 0 .. 255 and convert them to uint8")
    if not values.numel() or values.is_complex():
        raise ValueError(f"{kind}; give uint8 pixels from 0 to 255")
    wide = values if values.dtype == torch.float64 else values.to(torch.float32)
    low, high = float(wide.min()), float(wide.max())
    if not values.is_floating_point():
        if low < 0 or high > 255:
            raise ValueError(f"{kind} from {low:g} to {high:g}; give uint8 pixels from 0 to 255")
        return values.to(torch.uint8)
    shown = f"{kind} from {low:.4g} to {high:.4g}"
    if not (low >= 0 and high <= 1):  # also nan
        what = (
            "pixels of 0 .. 255 as floating point" if low >= 0 and high <= 255 else "normalised images or measurements"
        )
        raise ValueError(f"{shown}: {what}; give uint8 pixels from 0 to 255, without ToTensor and Normalize")
    scaled = wide * 255
    if (scaled - scaled.round()).abs().max() > 0.1:
        raise ValueError(
            f"{shown}, but no pixels of 8 bits; give the images before they are resized or augmented, without ToTensor"
        )
    return scaled.round().to(torch.uint8)


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


def image_files(folder: Path, left_out: Counter[str] | None = None) -> list[Path]:
    """Image files in a folder and its sub-folders, sorted by name; symbolic links are followed.

    Files are recognised by their extension. Hidden files and folders are ignored, and so are links to a parent folder,
    which would list its images a second time, with images of other classes.

    Args:
        folder: The folder.
        left_out: Counts other files by their extension, in lower case; None to count nothing.

    Raises:
        OSError: If a folder cannot be listed.
        ValueError: If a link without an image extension is broken: it may have been a folder of images. Or if something
            with the name of an image is no file, such as a named pipe.
    """
    found: list[tuple[tuple[str, ...], Path]] = []
    seen = {(status.st_dev, status.st_ino) for status in map(os.stat, folder.resolve().parents)}
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder above
            continue
        seen.add((status.st_dev, status.st_ino))
        inner = []
        with os.scandir(place) as entries:
            for entry in entries:
                path = Path(entry.path)
                if entry.name.startswith("."):
                    continue
                if _leads_to_folder(entry):
                    inner.append(path)
                elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                    if not _dangling(path) and not entry.is_file():  # a broken link is reported when it is decoded
                        _refuse_special(path)
                    found.append((path.relative_to(folder).parts, path))
                else:
                    _refuse_dangling(path)
                    if left_out is not None:
                        left_out[path.suffix.lower() or "no ending"] += 1
        # Sorted, so that a folder that is reachable by two paths has the same path on every machine.
        waiting += sorted(inner, reverse=True)
    return [path for _, path in sorted(found)]


def levels_above_images(folder: Path) -> int | None:
    """Number of folders between a folder and the images nearest to it; 0 for images in the folder itself.

    Returns:
        None if there is no image in the folder or any folder below.

    Raises:
        OSError: If a folder cannot be listed.
    """
    seen: set[tuple[int, int]] = set()
    level, places = 0, [folder]
    while places:
        below = []
        for place in places:
            status = os.stat(place)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(place) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if _leads_to_folder(entry):
                        below.append(Path(entry.path))
                    elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                        return level
        level, places = level + 1, below
    return None


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


def visible_files(folder: Path) -> list[Path]:
    """What a folder holds apart from folders and hidden names, sorted.

    Raises:
        OSError: If the folder cannot be listed.
    """
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and not path.is_dir())


def _leads_to_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _dangling(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def _refuse_dangling(path: Path) -> None:
    if _dangling(path):
        raise ValueError(f"{path} is a link to {os.readlink(path)}, which does not exist; repair or remove the link")


def _refuse_special(path: Path) -> None:
    try:
        require_regular(path)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise ValueError(f"{path}: {reason(error)}; remove it") from None
