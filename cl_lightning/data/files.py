"""Image files that are decoded on access."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cl_lightning.batch import ImageShape
from cl_lightning.data.images import fit, open_image
from cl_lightning.data.labels import check_labels


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

    kind = "image"
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
