"""Images and labels in a NumPy archive."""

import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cl_lightning.data import TensorSource
from cl_lightning.data.sources import check_labels
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


class NpzData(ContinualDataModule):
    """Images and labels from an ``.npz`` file of ``numpy.savez``; pickled objects in the file are refused.

    The file has ``x_train`` and ``x_test``, uint8 ``(N, H, W)``, ``(N, H, W, C)`` or ``(N, C, H, W)``; the raw labels
    ``y_train`` and ``y_test``, integers from 0, ``(N,)``; and optionally ``class_names``, one string per class.

    Args:
        path: Path of the file.
        labels: Prefix of the keys of the labels, if the file has several kinds: ``yc`` for coarse labels in
            ``yc_train`` and ``yc_test``.
        names: Key of the names of the classes. None for ``class_names`` with ``labels="y"`` and ``coarse_names`` with
            ``labels="yc"``; if the file has no such key, names are numbers.
        domains: Prefix of the keys of the domain of each sample, integers from 0, ``(N,)``, such as ``d`` for
            ``d_train`` and ``d_test``; the names are in ``domain_names`` if the file has this key. None for no domains.
        kwargs: Options of :class:`ContinualDataModule`.

    Raises:
        ValueError: Before training, if the file is missing or damaged, lacks a key, or has arrays of a wrong shape or
            dtype.
    """

    def __init__(
        self,
        path: str,
        *,
        labels: str = "y",
        names: str | None = None,
        domains: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.path = Path(path).expanduser()
        self.labels, self.names, self.domains = labels, names, domains

    def source(self, *, train: bool) -> TensorSource:
        part = "train" if train else "test"
        with self._open() as file:
            images = self._array(file, key := f"x_{part}")
            if images.dtype != np.uint8:
                raise ValueError(f"{self._at(key)} is {images.dtype}; save images as uint8 pixels from 0 to 255")
            if images.ndim not in (3, 4) or 0 in images.shape:
                allowed = "save images as (N, H, W), (N, H, W, C) or (N, C, H, W)"
                raise ValueError(f"{self._at(key)} has shape {images.shape}; {allowed}")
            names_key = self.names or _NAMES.get(self.labels, "")
            labels, names = self._numbers(file, self.labels, part, len(images), names_key, "")
            domains: np.ndarray | None = None
            domain_names: list[str] = []
            if self.domains is not None:
                domains, domain_names = self._numbers(
                    file, self.domains, part, len(images), "domain_names", f"{self.domains} "
                )
        return TensorSource(
            images, labels, class_names=names, domains=domains, domain_names=domain_names, name=self._at(key)
        )

    def _numbers(
        self, file: Any, kind: str, part: str, count: int, names_key: str, prefix: str
    ) -> tuple[np.ndarray, list[str]]:
        """Labels or domains of the samples, and their names from the file, or a prefix and a number without names."""
        if names_key in file.files or self.names == names_key:
            names = self._names(file, names_key)
        else:
            keys = [f"{kind}_{other}" for other in ("train", "test")]
            arrays = [self._array(file, each) for each in keys]
            checked = [
                check_labels(a, len(a) if a.ndim else 0, None, self._at(each))
                for a, each in zip(arrays, keys, strict=True)
            ]
            names = [f"{prefix}{number}" for number in range(max(int(a.max(initial=-1)) for a in checked) + 1)]
        return check_labels(self._array(file, key := f"{kind}_{part}"), count, names, self._at(key)), names

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
                    f"{type(self).__name__}: {self.path} is not a readable .npz file ({_line(error)})"
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
            raise ValueError(f"{self._at(key)} is damaged ({_line(error)})") from error
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{self._at(key)} is not an array")
        return array

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


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
