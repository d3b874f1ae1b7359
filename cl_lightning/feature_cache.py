"""Features of a backbone that no longer changes: each image passes through it once, in this run or an earlier one.

Features are found again by what they were made of: the pixels of the image (of a file: its name, size and time), the
weights and layers of the backbone, the scaling of the images and the precision. So another class order, another seed,
another cut into tasks or another method on the same backbone starts at once. They are equal to those of a pass up to
rounding, since a row of a matrix product depends a little on how many rows there are.

On disk each process writes files of its own, under a name that nobody has, renamed when they are whole and sealed with
a digest: nothing can be torn or overwritten, and what is damaged is left out.
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

from cl_lightning import sealed
from cl_lightning.sources import FileSource, Source, TensorSource

KEYS, STORED = "feature_keys", "stored_features"
"""Names in ``Batch.extra``: of the identities of its images, and of their features."""

_FORMAT = 1
_PROBES = 2
_HOUR = 3600.0


def identities(source: Source) -> Tensor:
    """What tells the images of a source apart, whatever their place in it: hashes of 64 bits, int64 ``(N,)``.

    Of images in memory they are those of the pixels; of files, of name, size, time and how they are read.

    Raises:
        ValueError: If the source is neither.
    """
    if isinstance(source, TensorSource):
        rows = source.images.contiguous().flatten(1).numpy()
        found = (hashlib.blake2b(row, digest_size=8).digest() for row in rows)
    elif isinstance(source, FileSource):
        read = f"{source.size}:{source.mode}:{source.image_shape}"
        found = (_identity_of_file(path, read) for path in source.paths)
    else:
        raise ValueError(
            f"loop.feature_cache: samples of {type(source).__name__} cannot be told apart by what they are; keep them "
            "in memory (--data.in_memory true), or leave the cache out"
        )
    return torch.from_numpy(np.frombuffer(b"".join(found), dtype=np.int64).copy())


def _identity_of_file(path: Path, read: str) -> bytes:
    stat = path.stat()
    text = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{read}"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


class Table(NamedTuple):
    """Features at one moment; a store that takes in more makes another one.

    Attributes:
        keys: Identities of images, int64 ``(n,)``, sorted.
        rows: Their features, float32 ``(n, d)``.
    """

    keys: Tensor
    rows: Tensor

    def has(self, keys: Tensor) -> Tensor:
        """Which of the images with these identities are in it, bool."""
        if not len(self.keys):
            return torch.zeros(len(keys), dtype=torch.bool)
        return self.keys[self._places(keys)] == keys

    def take(self, keys: Tensor) -> Tensor:
        """Features of images that are in it."""
        return self.rows[self._places(keys)]

    def _places(self, keys: Tensor) -> Tensor:
        return torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)


_known: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()


class FeatureStore:
    """Features of one backbone by the identities of their images.

    Args:
        num_features: Size of a feature vector, d.
        folder: Where they are written; None for nowhere.
        probe: Features of fixed images, ``(n, d)``: files of a backbone that gives others are left out.
        room: Bytes that the store may hold; what comes beyond is not taken.
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
    def identities(source: Source) -> Tensor:
        """As :func:`identities`, made once for each source."""
        if source not in _known:
            _known[source] = identities(source)
        return _known[source]

    @property
    def nbytes(self) -> int:
        """Size of what it holds."""
        return self._table.rows.nbytes + sum(rows.nbytes for _, rows in self._new)

    def table(self) -> Table:
        """What it holds now."""
        self._merge()
        return self._table

    def add(self, keys: Tensor, features: Tensor) -> None:
        """Take features ``(n, d)`` in."""
        if self.nbytes + features.shape[0] * features.shape[1] * 4 <= self.room:
            self._new.append((keys.cpu(), features.detach().float().cpu()))

    def write(self) -> int:
        """Write what came since the last time, into a file of its own; returns its size in bytes."""
        self._merge()
        if self.folder is None or not self._unwritten:
            return 0
        keys, rows = (torch.cat(part) for part in zip(*self._unwritten, strict=True))
        self._unwritten = []
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f"{uuid4().hex}.pt"
        draft = sealed.draft_of(target)
        try:
            torch.save({"format": _FORMAT, "keys": keys, "rows": rows, "probe": self.probe}, draft)
            sealed.seal(draft)
            os.replace(draft, target)
        finally:
            draft.unlink(missing_ok=True)
        return target.stat().st_size

    def _merge(self) -> None:
        if not self._new:
            return
        keys, rows = (torch.cat(part) for part in zip(*self._new, strict=True))
        self._new = []
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
        for path in sorted(folder.glob("*.pt")):
            try:
                sealed.check(path)
                part = torch.load(path, "cpu", weights_only=True)
            except (OSError, ValueError, RuntimeError) as error:
                warnings.warn(f"feature cache: {path} is left out: {error}", stacklevel=2)
                continue
            size += part["rows"].nbytes
            if part["format"] == _FORMAT and alike(part["probe"], self.probe) and size <= self.room:
                found.append((part["keys"], part["rows"]))
        if found:
            keys, rows = (torch.cat(part) for part in zip(*found, strict=True))
            self._insert(keys, rows)


def alike(first: Tensor, second: Tensor) -> bool:
    """Whether features are those of the same backbone on two machines, up to rounding in half precision."""
    if first.shape != second.shape:
        return False
    return float((first - second).abs().max()) <= 0.02 * float(second.abs().max()) + 1e-6


class FeatureCache:
    """Stores of features, one for each backbone, within a bound.

    Args:
        folder: Where they are kept between runs; None to keep them as long as the run lasts.
        max_bytes: Most that the folder may hold, and that a store may hold in memory: those used the longest ago go
            first.
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
        """The store of a backbone as it is now; the one before is written and left.

        Args:
            backbone: In eval mode for what ``forward`` does.
            forward: Gives features, float ``(n, d)``, of normalised images.
            image_shape: Of the images that it takes.
            setting: What else features depend on: scaling of images, precision.
        """
        tensors = list(backbone.state_dict(keep_vars=True).items())
        seen = [(id(value), value.data_ptr(), value._version) for _, value in tensors], setting
        if self._store is not None and seen == self._seen:
            return self._store
        name = _digest(backbone, tensors, setting)
        if self._store is not None and name == self._name:  # moved to another device and back
            self._seen = seen
            return self._store
        self.close()
        device = next((value.device for _, value in tensors), torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            images = torch.randn(_PROBES, *image_shape, generator=generator).to(device)
            probe = forward(images).float().cpu()
        folder = None if self.folder is None else self.folder / name
        if folder is not None and folder.is_dir():
            _tidy(folder)
        self._store = FeatureStore(probe.shape[1], folder, probe, self.max_bytes)
        self._seen, self._name = seen, name
        return self._store

    def close(self) -> None:
        """Write what is new; where that cannot be done it is told, and the run goes on."""
        if self._store is None or self.folder is None:
            return
        try:
            self._store.write()
            self._make_room()
        except OSError as error:
            warnings.warn(f"feature cache: {self.folder} cannot be written to: {error.strerror}", stacklevel=2)

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
    """Note that a folder was used, and remove what processes left that were killed while they wrote."""
    try:
        os.utime(folder)
        for path in folder.glob(".*.pt.*"):
            if time.time() - path.stat().st_mtime > _HOUR:
                path.unlink(missing_ok=True)
    except OSError:  # another process tidies too, or it may only be read
        pass


def _digest(backbone: nn.Module, tensors: Iterable[tuple[str, Tensor]], setting: str) -> str:
    digest = hashlib.blake2b(f"{_FORMAT}\0{setting}\0{backbone}".encode(), digest_size=16)
    for name, value in tensors:
        digest.update(f"\0{name}:{value.dtype}:{tuple(value.shape)}:".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
