"""Image folders with one sub-folder per class."""

import hashlib
import unicodedata
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from cl_lightning.data import FileSource
from cl_lightning.data.images import IMAGE_SUFFIXES, image_files, sub_folders, visible_files
from cl_lightning.data.layout import Layout, find_layout
from cl_lightning.data.shared import read_once
from cl_lightning.datamodules.base import ContinualDataModule


@dataclass(frozen=True)
class File:
    """An image file with its class and domain, which are the names of its folders.

    Attributes:
        path: Path of the file.
        name: Path relative to the folder of the class, with ``/`` as separator.
        class_name: Name of the folder of the class.
        domain: Name of the folder of the domain; empty without domains.
    """

    path: Path
    name: str
    class_name: str
    domain: str = ""


class ImageFolder(ContinualDataModule):
    """Images in ``root/train/<class>/`` and ``root/test/<class>/``, or in ``root/<class>/`` alone.

    Which layout a folder has is decided by a rule (:func:`~cl_lightning.data.layout.find_layout`). A folder is a part
    of the data if its name means training (``train``, ``training``), validation (``val``, ``valid``, ``validation``,
    ``dev``) or test data (``test``, ``testing``, ``eval``, ``evaluation``, ``holdout``), in upper or lower case, with
    digits or words such as ``set`` and ``images`` around it, and if its images lie in folders below it. Images of a
    validation part are training samples, of which ``val_fraction`` holds out a share; without a test part they are the
    test samples. Parts in the only sub-folder of ``root`` are found. Without any part, each sub-folder is a class. All
    other layouts are ambiguous and refused; ``train_folder`` and ``test_folder`` then name the folders. What was found
    and what was left out is reported before training.

    Without a test part a share of each class becomes test data, chosen by a hash of each file's name. A test image
    therefore remains one if files or classes are added, or if the seed of the run changes. Class folders that are added
    later make further tasks when a run is continued. Files are searched in the class folders and their sub-folders, by
    the endings of the formats that Pillow decodes (``cl_lightning.data.images.ENDINGS``); HEIC needs a plugin of Pillow
    (``pip install pillow-heif``). Symbolic links are followed, except to a folder above; a broken link raises an error,
    and so does a named pipe with the name of an image. Names that begin with a dot are ignored. Images are rotated by
    their EXIF tag, converted to ``mode``, scaled so that the shorter side is ``size``, and cropped at the centre. Raw
    labels are the indices of the sorted class names.

    A file that cannot be read raises an error before training. Images that are kept in memory (``in_memory``) are all
    decoded then. For other images only the start and the end of each file are checked, and damage in between raises an
    error when the image is decoded.

    Args:
        root: Folder of the data.
        size: Height and width of the images in pixels, at least 1.
        mode: ``RGB``, or ``L`` for grayscale.
        test_fraction: Share of test images, in (0, 1), if there is no test folder. Each class of at least two images
            gets at least one: if the hash chooses none, the file with the smallest hash, which can change when files
            are added.
        test_seed: Seed of the choice of test images.
        skip_unreadable: Leave out unreadable files, with a warning. All files are then decoded before training.
        train_folder: Folder of the class folders with training images, relative to ``root`` (``.`` for ``root``), where
            the rule above does not find it; None for the rule.
        test_folder: The same for test images; None with ``train_folder`` to hold out ``test_fraction``.
        kwargs: Options of :class:`ContinualDataModule`.

    Raises:
        ValueError: If an option is outside its range, or before training if folders or files are missing.
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
        train_folder: str | None = None,
        test_folder: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if size < 1:
            raise ValueError(f"{self._name}: size is {size}; it must be at least 1, in pixels")
        if mode not in ("RGB", "L"):
            raise ValueError(f"{self._name}: mode is {mode!r}; use 'RGB', or 'L' for grayscale")
        if not 0 < test_fraction < 1:
            raise ValueError(f"{self._name}: test_fraction is {test_fraction}; it must be in (0, 1)")
        self.root = Path(root).expanduser()
        self.size, self.mode, self.skip_unreadable = size, mode, skip_unreadable
        self.test_fraction, self.test_seed = test_fraction, test_seed
        self.train_folder, self.test_folder = train_folder, test_folder

    @read_once
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

    levels: ClassVar[int] = 1
    """Number of folders between a part of the data and its images."""

    def scan(self, folder: Path, left_out: Counter[str]) -> list[File]:
        """List the image files in a folder of class folders.

        Args:
            folder: The folder.
            left_out: Counts other files by their ending.

        Raises:
            ValueError: If there are no class folders, or one of them has no images.
        """
        names = sub_folders(folder)
        if not names:
            raise ValueError(f"{self._name}: {folder} holds no folders; make one for each class, with its images in it")
        found = []
        for name in names:
            others = Counter[str]()
            paths = image_files(folder / name, others)
            if not paths:
                endings = ", ".join(IMAGE_SUFFIXES)
                remedy = f"add images (allowed suffixes: {endings}) or remove the folder"
                there = f" (its files: {counted(others)})" if others else ""
                raise ValueError(f"{self._name}: no images in {folder / name}{there}; {remedy}")
            left_out.update(others)
            found += [File(path, path.relative_to(folder / name).as_posix(), name) for path in paths]
        left_out.update(path.suffix.lower() or "no ending" for path in visible_files(folder))
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
            raise ValueError(f"{what}; change its permissions") from error

    def _find(self) -> tuple[list[File], list[File]]:
        if not self.root.is_dir():
            raise ValueError(f"{self._name}: no folder at {self.root}; give the folder that holds the images")
        layout = find_layout(
            self.root,
            self.levels,
            owner=self._name,
            train_folder=self.train_folder,
            test_folder=self.test_folder,
        )
        left_out = Counter[str]()
        train = [file for folder in layout.train for file in self.scan(folder, left_out)]
        if layout.test is None:
            parts = self._split(train)
        else:
            parts = train, self.scan(layout.test, left_out)
            for kind in ("class_name", "domain"):
                known, tested = ({getattr(file, kind) for file in part} for part in parts)
                if unknown := tested - known:
                    what = kind.removesuffix("_name")
                    raise ValueError(
                        f"{self._name}: {layout.test} has the {what} {min(unknown)!r}, which is missing in "
                        f"{' and '.join(map(str, layout.train))}"
                    )
        self._report(layout, parts, left_out)
        return parts

    def _report(self, layout: Layout, parts: tuple[list[File], list[File]], left_out: Counter[str]) -> None:
        """Report what was found; as a warning if anything was left out."""
        classes = [{file.class_name for file in part} for part in parts]
        where = " and ".join(map(str, layout.train))
        held = layout.test or f"a share of {self.test_fraction:g}, by file name"
        found = (
            f"{self._name}: {len(classes[0])} classes; {len(parts[0])} training images in {where}; {len(parts[1])} "
            f"test images: {held}"
        )
        problems = []
        if left_out:
            problems.append(f"files that are not read as images: {counted(left_out)}")
        if layout.left_out:
            problems.append(f"folders without images: {', '.join(path.name for path in layout.left_out)}")
        if layout.test is not None and (untested := sorted(classes[0] - classes[1])):
            problems.append(f"{len(untested)} classes without test images, such as {untested[0]!r}")
        if problems:
            rank_zero_warn(f"{found}. Left out: {'; '.join(problems)}", stacklevel=2)
        else:
            rank_zero_info(found)

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
            # At least one image on either side, also if two names differ in Unicode form only and share one hash.
            count = sum(chance <= self.test_fraction for chance, _ in group)
            by_chance = sorted((chance, file.name, place) for place, (chance, file) in enumerate(group))
            chosen = {place for _, _, place in by_chance[: min(max(count, 1), len(group) - 1)]}
            for place, (_, file) in enumerate(group):
                (test if place in chosen else train).append(file)
        if single:
            warnings.warn(f"{self._name}: {', '.join(single)}: a single image, so there is no test image", stacklevel=2)
        return train, test


def counted(files: Counter[str]) -> str:
    """Numbers of files by ending, the most frequent first: ``12 .txt, 3 .csv``."""
    shown = [f"{count} {ending}" for ending, count in files.most_common(8)]
    return ", ".join(shown) + (", ..." if len(files) > 8 else "")


def share(seed: int, *names: str) -> float:
    """Hash of a seed and names as a number in [0, 1), the same for every Unicode normalisation and on every system."""
    text = "\0".join([str(seed), *(unicodedata.normalize("NFC", name) for name in names)])
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53
