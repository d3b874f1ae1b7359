"""Folders of image files, one sub-folder per class."""

import hashlib
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cl_lightning.datamodules.base import ContinualDataModule
from cl_lightning.sources import IMAGE_SUFFIXES, FileSource, image_files, sub_folders

_TEST_FOLDERS = ("test", "val", "valid", "validation")


@dataclass(frozen=True)
class File:
    """An image file and what the folders that it lies in say about it.

    Attributes:
        path: The file.
        name: Its path inside the folder of its class, with ``/``.
        class_name: Name of that folder.
        domain: Name of the folder of the domain; empty where there are none.
    """

    path: Path
    name: str
    class_name: str
    domain: str = ""


class ImageFolder(ContinualDataModule):
    """Images in ``root/train/<class>/`` and ``root/test/<class>/``, or in ``root/<class>/`` alone.

    In the second layout a share of each class becomes test data, chosen by a hash of each file's name: a file that is
    a test image stays one when files or classes are added, also with another seed of the run. Class folders that come
    later make further tasks when a run is continued. Files lie in the class folders or deeper, also behind symbolic
    links, wherever they lead, except to a folder above; a link that leads nowhere is an error. Names that begin with a
    dot are left out. Images are turned upright by their EXIF tag, converted to ``mode``, scaled so that the shorter
    side is ``size`` and cropped at the centre.

    A file that cannot be read is an error before training. Images that are kept in memory (``in_memory``) are all
    decoded then; of others the head and the end of each file are looked at, and damage in between shows when an image
    is decoded.

    Args:
        root: The folder. Instead of ``test``, the test folder may be called ``val``, ``valid`` or ``validation``.
        size: Height and width of the images in pixels.
        mode: ``RGB``, or ``L`` for grayscale.
        test_fraction: Share of test images, in (0, 1), where there is no test folder. Each class of at least two images
            gets one or more: where the hash chooses none, the file with the lowest one, which can change when files are
            added.
        test_seed: Other numbers choose other test images.
        skip_unreadable: Leave out files that cannot be read, with a warning; every file is decoded before training.
        kwargs: Of the base.
    """

    def __init__(
        self,
        root: str,
        *,
        size: int = 224,
        mode: Literal["RGB", "L"] = "RGB",
        test_fraction: float = 0.2,
        test_seed: int = 0,
        skip_unreadable: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if size < 1:
            raise ValueError(f"{self._name}: size is {size}; give height and width in pixels, at least 1")
        if mode not in ("RGB", "L"):
            raise ValueError(f"{self._name}: mode is {mode!r}; use RGB, or L for grayscale")
        if not 0 < test_fraction < 1:
            raise ValueError(f"{self._name}: test_fraction is {test_fraction}; it must lie between 0 and 1")
        self.root = Path(root).expanduser()
        self.size, self.mode, self.skip_unreadable = size, mode, skip_unreadable
        self.test_fraction, self.test_seed = test_fraction, test_seed

    def source(self, *, train: bool) -> FileSource:
        files = self._files[0 if train else 1]
        class_names = sorted({file.class_name for file in self._files[0]})
        domain_names = sorted({file.domain for file in self._files[0]} - {""})
        labels, domains = ({name: index for index, name in enumerate(names)} for names in (class_names, domain_names))
        return FileSource(
            [file.path for file in files],
            [labels[file.class_name] for file in files],
            class_names=class_names,
            root=self.root,
            size=self.size,
            mode=self.mode,
            domains=np.array([domains[file.domain] for file in files], dtype=np.int64) if domains else None,
            domain_names=domain_names,
            skip_unreadable=self.skip_unreadable,
            name=self._name,
        )

    def scan(self, folder: Path) -> list[File]:
        """The image files in a folder of classes.

        Raises:
            ValueError: If there are no class folders, or one without images.
        """
        names = sub_folders(folder)
        if not names:
            raise ValueError(f"{self._name}: {folder} holds no folders; make one for each class, with its images in it")
        found = []
        for name in names:
            paths = image_files(folder / name)
            if not paths:
                endings = ", ".join(IMAGE_SUFFIXES)
                remedy = f"add some (known endings: {endings}) or remove the folder"
                raise ValueError(f"{self._name}: no images in {folder / name}; {remedy}")
            found += [File(path, path.relative_to(folder / name).as_posix(), name) for path in paths]
        return found

    @property
    def _name(self) -> str:
        return type(self).__name__

    @cached_property
    def _files(self) -> tuple[list[File], list[File]]:
        """Training and test files."""
        try:
            return self._find()
        except OSError as error:
            what = f"{self._name}: {error.filename} cannot be read ({(error.strerror or str(error)).lower()})"
            raise ValueError(f"{what}; give yourself the right to read it") from error

    def _find(self) -> tuple[list[File], list[File]]:
        if not self.root.is_dir():
            raise ValueError(f"{self._name}: no folder at {self.root}; give the folder that holds the images")
        train, test = self.root / "train", next((p for n in _TEST_FOLDERS if (p := self.root / n).is_dir()), None)
        if not train.is_dir() or test is None:
            if sub_folders(self.root) == ["train"]:
                raise ValueError(
                    f"{self._name}: {self.root} holds `train` alone; add `test`, or give {train} as root, of which a "
                    "share becomes test data"
                )
            return self._split(self.scan(self.root))
        parts = self.scan(train), self.scan(test)
        for kind in ("class_name", "domain"):
            known, tested = ({getattr(file, kind) for file in part} for part in parts)
            if unknown := tested - known:
                what = kind.removesuffix("_name")
                raise ValueError(f"{self._name}: {test} holds the {what} {min(unknown)!r}, which {train} does not have")
        return parts

    def _split(self, files: Sequence[File]) -> tuple[list[File], list[File]]:
        groups: dict[tuple[str, str], list[tuple[float, File]]] = {}
        for file in files:
            chance = share(self.test_seed, file.domain, file.class_name, file.name)
            groups.setdefault((file.domain, file.class_name), []).append((chance, file))
        train: list[File] = []
        test: list[File] = []
        single = []
        for (domain, class_name), group in groups.items():
            if len(group) == 1:
                single.append(f"{domain}/{class_name}" if domain else class_name)
                train.append(group[0][1])
                continue
            # At least one image on either side, also where names that encode an accent in two ways have one chance.
            count = sum(chance <= self.test_fraction for chance, _ in group)
            by_chance = sorted((chance, file.name, place) for place, (chance, file) in enumerate(group))
            chosen = {place for _, _, place in by_chance[: min(max(count, 1), len(group) - 1)]}
            for place, (_, file) in enumerate(group):
                (test if place in chosen else train).append(file)
        if single:
            warnings.warn(f"{self._name}: {', '.join(single)}: one image only, and so none to test on", stacklevel=2)
        return train, test


def share(seed: int, *names: str) -> float:
    """Number in [0, 1) that depends on names and a seed only; on all systems, however they encode accents."""
    text = "\0".join([str(seed), *(unicodedata.normalize("NFC", name) for name in names)])
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53
