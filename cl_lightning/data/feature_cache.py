"""Cache of the features of a backbone that no longer changes: each image passes through it once, over all runs.

Features are identified by everything they depend on: the pixels of the image (for a file: its name, size and
modification time), the weights and layers of the backbone, the scaling of the images and the precision. The cache is
therefore shared by runs with another class order, seed, split into tasks or method on the same backbone. Cached
features equal computed ones up to rounding, since the rounding of a matrix product depends on its number of rows.

On disk, each process writes its own files under unique names. A file is renamed when it is complete and carries a
checksum: no file is truncated or overwritten, and damaged files are ignored.
"""

import hashlib
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from cl_lightning import checksums
from cl_lightning.data.levels import TwoLevelSource
from cl_lightning.data.sources import FileSource, SampleSource, TensorSource
from cl_lightning.models import example

KEYS, STORED = "feature_keys", "stored_features"
"""Keys in ``Batch.extra`` of the identities of the images, and of their stored features."""
_FORMAT = 1
_PROBES = 2
_HOUR = 3600.0


def identities(source: SampleSource) -> Tensor:
    """64-bit hashes that identify the images of a source independently of their index, int64 ``(N,)``.

    For images in memory, hashes of the pixels; for files, hashes of name, size, modification time and decoding options.

    Raises:
        ValueError: If the source is neither a ``TensorSource`` nor a ``FileSource``.
    """
    if isinstance(source, TwoLevelSource):
        return identities(source.base).repeat(2)
    if isinstance(source, TensorSource):
        rows = source.images.contiguous().flatten(1).numpy()
        found = (hashlib.blake2b(row, digest_size=8).digest() for row in rows)
    elif isinstance(source, FileSource):
        read = f"{source.size}:{source.mode}:{source.image_shape}"
        found = (_identity_of_file(path, read) for path in source.paths)
    else:
        raise ValueError(
            f"loop.feature_cache: samples of {type(source).__name__} have no identity; load them into memory "
            "(--data.in_memory true) or disable the cache"
        )
    return torch.from_numpy(np.frombuffer(b"".join(found), dtype=np.int64).copy())


def _identity_of_file(path: Path, read: str) -> bytes:
    stat = path.stat()
    text = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{read}"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


class Table(NamedTuple):
    """Immutable table of features by identity; a store that adds features creates a new table.

    Attributes:
        keys: Identities of images, int64 ``(n,)``, sorted.
        rows: Features of these images, float32 ``(n, d)``.
    """

    keys: Tensor
    rows: Tensor

    def has(self, keys: Tensor) -> Tensor:
        """Which of the identities ``(m,)`` are in the table, bool ``(m,)``."""
        if not len(self.keys):
            return torch.zeros(len(keys), dtype=torch.bool)
        return self.keys[self._places(keys)] == keys

    def take(self, keys: Tensor) -> Tensor:
        """Features ``(m, d)`` of identities ``(m,)`` that are in the table."""
        return self.rows[self._places(keys)]

    def _places(self, keys: Tensor) -> Tensor:
        return torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)


_known: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()


class FeatureStore:
    """Features of one backbone by image identity.

    Args:
        num_features: Size of a feature vector, d.
        folder: Folder of the files; None to keep features in memory only.
        probe: Features of fixed images, ``(n, d)``; files whose probe differs are ignored.
        room: Memory limit in bytes; features beyond it are not stored.
    """

    def __init__(self, num_features: int, folder: Path | None, probe: Tensor, room: int) -> None:
        self.folder, self.probe, self.room = folder, probe, room
        self._table = Table(torch.zeros(0, dtype=torch.int64), torch.zeros(0, num_features))
        self._new: list[tuple[Tensor, Tensor]] = []
        self._unwritten: list[tuple[Tensor, Tensor]] = []
        if folder is not None:
            self._read(folder)

    def __len__(self) -> int:
        return len(self.table().keys)

    @staticmethod
    def identities(source: SampleSource) -> Tensor:
        """As :func:`identities`, computed once per source."""
        if source not in _known:
            _known[source] = identities(source)
        return _known[source]

    @property
    def nbytes(self) -> int:
        """Size of the stored features in bytes."""
        return self._table.rows.nbytes + sum(rows.nbytes for _, rows in self._new)

    def table(self) -> Table:
        """Table of the features stored so far."""
        self._merge()
        return self._table

    def add(self, keys: Tensor, features: Tensor) -> None:
        """Store features ``(n, d)`` under identities ``(n,)``."""
        if self.nbytes + features.shape[0] * features.shape[1] * 4 <= self.room:
            self._new.append((keys.cpu(), features.detach().float().cpu()))

    def write(self) -> int:
        """Write the features added since the last call to a new file; returns its size in bytes, 0 without a file."""
        self._merge()
        if self.folder is None or not self._unwritten:
            return 0
        keys, rows = (torch.cat(part) for part in zip(*self._unwritten, strict=True))
        self._unwritten = []
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f"{uuid4().hex}.pt"
        draft = checksums.draft_of(target)
        try:
            torch.save({"format": _FORMAT, "keys": keys, "rows": rows, "probe": self.probe}, draft)
            checksums.seal(draft)
            os.replace(draft, target)
        finally:
            draft.unlink(missing_ok=True)
        return target.stat().st_size

    def _merge(self) -> None:
        if not self._new:
            return
        keys, rows = (torch.cat(part) for part in zip(*self._new, strict=True))
        self._new = []
        finite = rows.isfinite().all(1)  # others are computed again
        keys, rows = keys[finite], rows[finite]
        known = self._table.has(keys)
        if self.folder is not None and not known.all():
            self._unwritten.append((keys[~known], rows[~known]))
        self._insert(keys[~known], rows[~known])

    def _insert(self, keys: Tensor, rows: Tensor) -> None:
        joint, order = torch.cat([self._table.keys, keys]).sort(stable=True)
        first = torch.ones(len(joint), dtype=torch.bool)
        first[1:] = joint[1:] != joint[:-1]  # equal images have equal features
        self._table = Table(joint[first], torch.cat([self._table.rows, rows])[order[first]])

    def _read(self, folder: Path) -> None:
        found: list[tuple[Tensor, Tensor]] = []
        size = 0
        for path in sorted(path for path in folder.glob("*.pt") if path.is_file()):
            try:
                checksums.check(path)
                part = _checked(torch.load(path, "cpu", weights_only=True), self._table.rows.shape[1])
            except Exception as error:  # the content of a foreign file leads to errors of all kinds
                reason = " ".join(str(error).split()) or type(error).__name__
                warnings.warn(f"feature cache: {path} cannot be used and is left out: {reason}", stacklevel=2)
                continue
            size += part["rows"].nbytes
            if same_backbone(part["probe"], self.probe) and size <= self.room:
                found.append((part["keys"], part["rows"]))
        if found:
            keys, rows = (torch.cat(part) for part in zip(*found, strict=True))
            self._insert(keys, rows)


def _checked(part: Any, num_features: int) -> dict[str, Tensor]:
    """The content of a file, if it is what :meth:`FeatureStore.write` writes.

    Raises:
        ValueError: If it is not, with the reason.
    """
    if not isinstance(part, dict) or part.get("format") != _FORMAT:
        raise ValueError("it is not a file of features of this version")
    keys, rows, probe = (part.get(name) for name in ("keys", "rows", "probe"))
    if not isinstance(keys, Tensor) or keys.dtype != torch.int64 or keys.ndim != 1:
        raise ValueError("its keys are not a list of integers")
    if not isinstance(rows, Tensor) or rows.dtype != torch.float32 or rows.shape != (len(keys), num_features):
        raise ValueError(f"its rows are not {len(keys)} rows of {num_features} features")
    if not isinstance(probe, Tensor) or not probe.is_floating_point():
        raise ValueError("its probe is not a tensor of features")
    if not rows.isfinite().all():
        raise ValueError("it has features that are nan or infinite")
    return {"keys": keys, "rows": rows, "probe": probe}


def same_backbone(first: Tensor, second: Tensor) -> bool:
    """Whether features of the same images are from the same backbone, up to half-precision rounding of two machines."""
    if first.shape != second.shape:
        return False
    return float((first - second).abs().max()) <= 0.02 * float(second.abs().max()) + 1e-6


class FeatureCache:
    """One store of features per backbone, with a common limit on the size.

    Args:
        folder: Folder that is shared by runs; None to keep features for this run only.
        max_bytes: Limit in bytes of the folder, and of the memory of one store. Stores in the folder that were not used
            for the longest time are deleted first.
    """

    def __init__(self, folder: str | Path | None, max_bytes: int) -> None:
        self.folder = None if folder is None else Path(folder)
        self.max_bytes = max_bytes
        self._store: FeatureStore | None = None
        self._seen: Any = None
        self._name = ""

    def store(
        self, backbone: nn.Module, forward: Callable[[Tensor], Tensor], image_shape: tuple[int, ...], setting: str
    ) -> FeatureStore:
        """Store of a backbone with its current weights; the previous store is written to disk and released.

        Args:
            backbone: In eval mode when ``forward`` is called.
            forward: Maps normalised images to features, float ``(n, d)``.
            image_shape: Shape of one of these images.
            setting: Everything else that features depend on: scaling of images, precision.
        """
        tensors = list(backbone.state_dict(keep_vars=True).items())
        seen = [(id(value), value.data_ptr(), value._version) for _, value in tensors], setting
        if self._store is not None and seen == self._seen:
            return self._store
        name = _digest(backbone, tensors, setting)
        if self._store is not None and name == self._name:  # other tensors with equal values: moved between devices
            self._seen = seen
            return self._store
        self.close()
        device = next((value.device for _, value in tensors), torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            images = example(backbone, _PROBES, image_shape, generator).to(device)
            probe = forward(images).float().cpu()
        folder = None if self.folder is None else self.folder / name
        if folder is not None and folder.is_dir():
            _tidy(folder)
        self._store = FeatureStore(probe.shape[1], folder, probe, self.max_bytes)
        self._seen, self._name = seen, name
        return self._store

    def close(self) -> None:
        """Write new features to disk; a failure raises a warning, not an error."""
        if self._store is None or self.folder is None:
            return
        try:
            self._store.write()
            self._make_room()
        except OSError as error:
            warnings.warn(
                f"feature cache: {self.folder} cannot be written to ({error.strerror}); the run continues without it; "
                "give a writable folder as loop.feature_cache",
                stacklevel=2,
            )

    def _make_room(self) -> None:
        assert self.folder is not None
        assert self._store is not None
        if not self.folder.is_dir():
            return
        folders = [path for path in self.folder.iterdir() if path.is_dir()]
        sizes = {path: sum(file.stat().st_size for file in path.glob("*.pt")) for path in folders}
        own = self._store.folder
        for path in sorted((path for path in folders if path != own), key=lambda path: path.stat().st_mtime_ns):
            if sum(sizes.values()) <= self.max_bytes:
                break
            shutil.rmtree(path, ignore_errors=True)
            del sizes[path]


def _tidy(folder: Path) -> None:
    """Mark a folder as used, and remove temporary files of processes that were killed while writing."""
    try:
        os.utime(folder)
        for path in folder.glob(".*.pt.*"):
            if time.time() - path.stat().st_mtime > _HOUR:
                path.unlink(missing_ok=True)
    except OSError:  # another process removed the file, or the folder is read-only
        pass


def _digest(backbone: nn.Module, tensors: Iterable[tuple[str, Tensor]], setting: str) -> str:
    digest = hashlib.blake2b(f"{_FORMAT}\0{setting}\0{backbone}".encode(), digest_size=16)
    for name, value in tensors:
        digest.update(f"\0{name}:{value.dtype}:{tuple(value.shape)}:".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
