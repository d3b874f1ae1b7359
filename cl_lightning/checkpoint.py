"""Checkpoints: what is in them, how they are written, and how they are checked before they are trusted."""

import io
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from cl_lightning import sealed

SCHEMA = 1
"""Version of the part under the key ``cl_lightning``; old versions stay readable."""


class WriteError(OSError):
    """A checkpoint that is needed cannot be written."""


class CheckpointFiles(TorchCheckpointIO):
    """Writes to a temporary file beside the target, seals it and renames it: a crash never leaves half a checkpoint.

    A file that cannot be written (a full disk, a folder that is gone) raises nothing here, where one process alone is
    asked and the others wait for it: ``failure`` keeps the reason until the next call.

    Args:
        keep: Checkpoints of a name to keep, see :func:`cl_lightning.sealed.keep_earlier`.
    """

    def __init__(self, keep: int = 1) -> None:
        self.keep = keep
        self.failure: OSError | None = None
        self._read: tuple[Path, dict[str, Any]] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        self.failure = None
        try:
            self._write(checkpoint, Path(path))
        except OSError as error:
            self.failure = error

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; what ``read`` has just read is handed out, once, instead of read again."""
        held, self._read = self._read, None
        return held[1] if held is not None and held[0] == Path(path) else load(path)

    def read(self, path: Path) -> dict[str, Any]:
        """As :func:`load`; kept for ``load_checkpoint`` or until ``forget``."""
        if self._read is None or self._read[0] != path:
            self._read = path, load(path)
        return self._read[1]

    def forget(self) -> None:
        """Let go of what ``read`` keeps."""
        self._read = None

    def _write(self, checkpoint: dict[str, Any], target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        name = sealed.draft_of(target)
        try:
            with _Faithful(io.FileIO(name, "xb")) as file:
                try:
                    torch.save(checkpoint, file)
                except RuntimeError as error:  # torch's words when a write comes short
                    raise file.error or error from error
                file.flush()
                os.fsync(file.fileno())
            sealed.seal(name)
            sealed.keep_earlier(target, self.keep)
            os.replace(name, target)
        except BaseException:
            name.unlink(missing_ok=True)
            raise


class _Faithful(io.BufferedWriter):
    """A file that remembers why a write to it failed."""

    error: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError as error:
            self.error = error
            raise


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this framework; nothing in it is executed.

    Raises:
        ValueError: If the file is missing, damaged (:class:`cl_lightning.sealed.DamagedError`), holds pickled objects,
            is of another program or of a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {path}: no such file; give the path of a .ckpt file, or 'last'")
    sealed.check(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint {path}: refused, it holds pickled objects, which can run any code when they are loaded; "
            "checkpoints of this framework hold tensors and plain values only"
        ) from error
    except (RuntimeError, EOFError, zipfile.BadZipFile, OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise sealed.DamagedError(f"checkpoint {path}: not a readable checkpoint ({reason})") from error
    part = checkpoint.get("cl_lightning") if isinstance(checkpoint, Mapping) else None
    if not isinstance(part, Mapping) or "schema" not in part:
        raise ValueError(f"checkpoint {path}: not written by this framework; it has no part 'cl_lightning'")
    if part["schema"] > SCHEMA:
        raise ValueError(
            f"checkpoint {path}: its version is {part['schema']}, this program reads up to {SCHEMA}; update it"
        )
    return dict(checkpoint)


def settle_progress(loops: dict[str, Any], *, mid_epoch: bool) -> None:
    """Bring the counters of a fit loop, in place, to a form from which Lightning goes on exactly.

    A checkpoint is taken inside a hook, where some counters are one ahead of others, and Lightning guesses from them in
    which hook. Here it is known: either between two steps of an epoch, or between two epochs.

    Args:
        loops: ``state_dict`` of the fit loop.
        mid_epoch: Whether the epoch has steps to go.
    """
    epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    if mid_epoch:
        for counters in (batches["total"], batches["current"]):
            counters.update(dict.fromkeys(("ready", "started", "processed"), counters["completed"]))
        batches["is_last_batch"] = False
    else:
        for counters in (epochs["total"], epochs["current"]):
            counters.update(dict.fromkeys(("ready", "started", "completed"), counters["processed"]))
