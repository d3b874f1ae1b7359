"""Samples and labels in a NumPy archive."""

import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cl_lightning.checks import one_of, reason
from cl_lightning.data import KINDS, TARGET_KINDS, ArraySource, Kind, TargetKind, Targets, TensorSource
from cl_lightning.data.images import to_bytes
from cl_lightning.data.labels import Classes, plain_labels
from cl_lightning.data.samples import as_samples, kind_of
from cl_lightning.data.shared import read_once
from cl_lightning.data.targets import IGNORED
from cl_lightning.datamodules.base import ContinualDataModule

# Errors of numpy and zipfile for damaged archives, and for archives that declare more data than memory can hold.
_DAMAGE = (
    OSError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    SyntaxError,
    AttributeError,
    MemoryError,
    RuntimeError,
    tokenize.TokenError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
_NAMES = {"y": "class_names", "yc": "coarse_names"}
_LAYOUTS = (("x_{}", "y_{}"), ("{}_images", "{}_labels"), ("X_{}", "y_{}"), ("{}_x", "{}_y"), ("{}_data", "{}_labels"))
"""Keys of images and labels of a part, in the order in which they are looked for."""
_PARTS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


class _Keys(NamedTuple):
    name: str
    images: str
    labels: str


class NpzData(ContinualDataModule):
    """Samples and labels from an ``.npz`` file of ``numpy.savez``; pickled objects in the file are refused.

    The file has ``x_train`` and ``x_test``, uint8 images ``(N, H, W)``, ``(N, H, W, C)`` or ``(N, C, H, W)`` or other
    samples (``inputs``); the labels
    ``y_train`` and ``y_test``, ``(N,)``; and optionally ``class_names``, one string per class. Other usual keys are
    read too: ``train_images``, ``train_labels``, ``test_images``, ... (MedMNIST), ``X_train``, ``train_x``,
    ``train_data``.
    Validation samples (``x_val``, ``val_images``, ...) are training samples, of which ``val_fraction`` holds out a
    share; without test samples they are the test samples. A file without training samples serves a stream of test
    images (``CorruptionStream`` with ``source_part="test"``); its test samples then define the classes.

    Labels are integers, strings, or one-hot rows. With ``class_names``, integers count them, from 0 or throughout from
    1. Without, the labels that occur in the training samples are the classes in ascending order, and their values are
    the names.

    Args:
        path: Path of the file.
        labels: Prefix of the keys of the labels, if the file has several kinds: ``yc`` for coarse labels in
            ``yc_train`` and ``yc_test``.
        names: Key of the names of the classes. None for ``class_names`` with ``labels="y"`` and ``coarse_names`` with
            ``labels="yc"``; if the file has no such key, the labels are the names.
        domains: Prefix of the keys of the domain of each sample, labels as above, such as ``d`` for ``d_train`` and
            ``d_test``; the names are in ``domain_names`` if the file has this key. None for no domains.
        targets: What the target of a sample is: its ``class``; several ``labels``, 0 and 1 of shape ``(N, C)`` with a
            column for each of ``class_names``, or for "0", "1", ...; a ``number`` ``(N,)``; or ``pixels``, masks of
            integers ``(N, H, W)`` below the number of class names, 255 for pixels without annotation, 0 for the
            background. The keys are those of labels.
        inputs: What a sample is: ``vector`` ``(N, D)``, ``sequence`` ``(N, C, T)`` or ``(N, T)``, ``tokens``, integers
            ``(N, T)``, or ``image``, which also takes floating-point maps ``(N, C, H, W)`` or ``(N, H, W)``, such as
            spectrograms. None for vectors if samples are floating-point ``(N, D)``, and images of 8 bits otherwise.
        kwargs: Options of :class:`ContinualDataModule`.

    Raises:
        ValueError: Before training, if the file is missing or damaged, lacks a key, or has arrays of a wrong shape or
            dtype.
    """

    _any_kind = True

    def __init__(
        self,
        path: str,
        *,
        labels: str = "y",
        names: str | None = None,
        domains: str | None = None,
        targets: TargetKind = "class",
        inputs: Kind | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        one_of(self, KINDS, inputs=inputs, optional=True)
        one_of(self, TARGET_KINDS, targets=targets)
        self.path = Path(path).expanduser()
        self.labels, self.names, self.domains, self.inputs, self.targets = labels, names, domains, inputs, targets

    @read_once
    def source(self, *, train: bool) -> TensorSource | ArraySource:
        with self._open() as file:
            keys = self._keys(file, train=train)
            trained: list[str] = [
                part for part in ("train", "val") if part in keys and ("test" in keys or part == "train")
            ]
            parts = trained if train else ["test" if "test" in keys else "val"]
            arrays = [self._samples(file, keys[part].images) for part in parts]
            if len({array.shape[1:] for array in arrays}) > 1:
                shapes = " and ".join(f"{keys[part].images} {a.shape}" for part, a in zip(parts, arrays, strict=True))
                raise ValueError(f"{self._at(shapes)} differ in shape; save samples of one shape")
            counts = [len(array) for array in arrays]
            names_key = self.names or _NAMES.get(self.labels, "")
            trained = trained or parts  # a file of test images alone: they define the classes
            of_parts = {part: keys[part].labels for part in (*trained, *parts)}
            targets: Targets | None = None
            if self.targets == "class":
                labels, names = self._numbers(file, of_parts, trained, parts, counts, names_key, "class")
            else:
                targets, names = self._targets(file, [of_parts[part] for part in parts], names_key)
                labels = targets.labels()
            domains: np.ndarray | None = None
            domain_names: tuple[str, ...] = ()
            if self.domains is not None:
                of_parts = {part: f"{self.domains}_{keys[part].name}" for part in (*trained, *parts)}
                domains, domain_names = self._numbers(
                    file, of_parts, trained, parts, counts, "domain_names", "domain", prefix=f"{self.domains} "
                )
        samples, where = np.concatenate(arrays) if len(arrays) > 1 else arrays[0], self._at(keys[parts[0]].images)
        facts: Any = {"class_names": names, "domains": domains, "domain_names": domain_names}
        facts |= {"targets": targets, "name": where}
        if samples.dtype == np.uint8:
            return TensorSource(samples, labels, **facts)
        return ArraySource(samples, labels, kind=self._kind(samples), **facts)

    def _kind(self, samples: np.ndarray) -> Kind:
        """What a sample is: ``inputs``, or by type and shape."""
        return self.inputs or kind_of(samples) or "image"

    def _keys(self, file: Any, *, train: bool) -> dict[str, _Keys]:
        """Keys of each part that the file has, in the first layout whose training images, or test images, it has.

        Raises:
            ValueError: If training images are missing and wanted, or both test and validation images.
        """
        images, labels = next(
            (each for part in ("train", "test") for each in _LAYOUTS if each[0].format(part) in file.files), _LAYOUTS[0]
        )
        if self.labels != "y":
            labels = f"{self.labels}_{{}}"
        found = {
            part: _Keys(name, images.format(name), labels.format(name))
            for part, names in _PARTS.items()
            for name in names
            if images.format(name) in file.files
        }
        for part in (*(("train",) if train else ()), *(() if "val" in found else ("test",))):
            if part not in found:
                self._array(file, images.format(part))  # raises
        return found

    def _samples(self, file: Any, key: str) -> np.ndarray:
        """Images of 8 bits as uint8, other samples as float32 or int64."""
        samples = self._array(file, key)
        kind = self._kind(samples)
        if kind == "image":
            try:
                return self._images(samples, key)
            except ValueError:
                if self.inputs is None or samples.dtype.kind not in "fiu":
                    raise
        if samples.dtype.kind not in "fiub":
            raise ValueError(f"{self._at(key)} is {samples.dtype} of shape {samples.shape}; save numbers")
        return as_samples(samples, kind, self._at(key)).numpy()

    def _images(self, images: np.ndarray, key: str) -> np.ndarray:
        if images.ndim not in (3, 4) or 0 in images.shape:
            allowed = "save images as (N, H, W), (N, H, W, C) or (N, C, H, W), or give data.inputs"
            raise ValueError(f"{self._at(key)} has shape {images.shape}; {allowed}")
        try:
            pixels: np.ndarray = to_bytes(torch.from_numpy(images)).numpy()
        except (TypeError, ValueError) as error:
            remedy = "save images as uint8 pixels from 0 to 255, or give data.inputs for other samples"
            raise ValueError(f"{self._at(key)} is {error}; {remedy}") from error
        return pixels

    def _numbers(
        self,
        file: Any,
        keys: dict[str, str],
        trained: list[str],
        parts: list[str],
        counts: list[int],
        names_key: str,
        kind: str,
        prefix: str = "",
    ) -> tuple[np.ndarray, tuple[str, ...]]:
        """Numbers from 0 of the labels or domains of the samples, and their names; training samples define both."""
        names = self._names(file, names_key) if names_key in file.files or self.names == names_key else None
        arrays = {part: self._array(file, key) for part, key in keys.items()}
        plain = [
            plain_labels(arrays[part], len(arrays[part]) if arrays[part].ndim else 0, self._at(keys[part]))
            for part in trained
        ]
        joined = np.concatenate(plain)
        classes = Classes.of(joined, len(joined), names, self._at(keys[trained[0]]), kind)
        numbers = [
            classes.number(arrays[part], count, self._at(keys[part]), kind)
            for part, count in zip(parts, counts, strict=True)
        ]
        shown = classes.names if names is not None else tuple(f"{prefix}{name}" for name in classes.names)
        return np.concatenate(numbers), shown

    def _at(self, key: str) -> str:
        return f"{type(self).__name__}: {self.path}: {key}"

    @contextmanager
    def _open(self) -> Iterator[Any]:
        """The archive, open; a file that numpy cannot read is closed too."""
        if not self.path.is_file():
            raise ValueError(f"{type(self).__name__}: no file {self.path}; give the path of an .npz file")
        with self.path.open("rb") as handle:
            try:
                file = np.load(handle, allow_pickle=False)
            except _DAMAGE as error:
                raise ValueError(
                    f"{type(self).__name__}: {self.path} is not a readable .npz file ({reason(error)})"
                ) from error
            if not hasattr(file, "files"):
                raise ValueError(
                    f"{type(self).__name__}: {self.path} holds a single array; save several by name with numpy.savez"
                )
            with file:
                yield file

    def _array(self, file: Any, key: str) -> np.ndarray:
        if key not in file.files:
            raise ValueError(f"{self._at(key)} is missing; the file has {', '.join(sorted(file.files)) or 'nothing'}")
        try:
            array = file[key]
        except _DAMAGE as error:
            if isinstance(error, ValueError) and "pickle" in str(error):
                raise ValueError(
                    f"{self._at(key)} is refused: it holds pickled objects, which can run any code when they are "
                    "loaded; save numbers, and names as an array of strings"
                ) from error
            raise ValueError(f"{self._at(key)} is damaged ({reason(error)})") from error
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{self._at(key)} is not an array")
        return array

    def _targets(self, file: Any, keys: list[str], names_key: str) -> tuple[Targets, tuple[str, ...]]:
        """Targets of the samples under the given keys, and the names of the classes."""
        arrays = [self._array(file, key) for key in keys]
        if len({array.shape[1:] for array in arrays}) > 1:
            raise ValueError(f"{self._at(' and '.join(keys))} differ in shape; save targets of one shape")
        values = np.concatenate(arrays)
        if self.targets == "number":
            names: tuple[str, ...] = ("number",)
        elif names_key in file.files:
            names = tuple(self._names(file, names_key))
        elif self.targets == "labels" and values.ndim == 2:
            names = tuple(map(str, range(values.shape[1])))
        else:
            present = values[values != IGNORED]
            names = tuple(map(str, range(int(present.max(initial=0)) + 1)))
        return Targets(self.targets, values, len(names), self._at(keys[0])), names

    def _names(self, file: Any, key: str) -> list[str]:
        array = self._array(file, key)
        if array.ndim != 1 or array.dtype.kind not in "US":
            raise ValueError(f"{self._at(key)} is {array.dtype} of shape {array.shape}; save a flat array of strings")
        names = [
            name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else str(name)
            for name in array.tolist()
        ]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{self._at(key)} has {twice!r} more than once; give each class or domain its own name")
        return names
