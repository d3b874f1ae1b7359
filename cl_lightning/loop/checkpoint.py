"""Checkpoints: atomic writing with a checksum, and validation before they are loaded."""

import io
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from cl_lightning import checksums, renamed
from cl_lightning.loop import process_state
from cl_lightning.loop.checkpoint_parts import check_parts, named

SCHEMA = 1
"""Version of the part under the key ``cl_lightning``; old versions stay readable."""


class WriteError(OSError):
    """A checkpoint that the run needs cannot be written."""


class CheckpointFiles(TorchCheckpointIO):
    """Checkpoint IO that writes a temporary file in the same folder, adds a checksum, and renames the file.

    A crash therefore never leaves an incomplete checkpoint under the final name.
    If a file cannot be written (a full disk, a missing folder), ``save_checkpoint`` does not raise, because only one
    process writes while the others wait for it. The attribute ``failure`` holds the error until the next call.

    Args:
        keep: Number of checkpoints of one name to keep, see :func:`cl_lightning.checksums.keep_earlier`.

    Attributes:
        process: Rank of this process, and number of processes: a checkpoint of as many processes is read with the
            statistics of batch normalisation of this one, any other with their mean.
    """

    def __init__(self, keep: int = 1) -> None:
        self.keep = keep
        self.process = (0, 1)
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
        """Read a checkpoint; a checkpoint that ``read`` holds is returned once without another read."""
        held, self._read = self._read, None
        return held[1] if held is not None and held[0] == Path(path) else self._own(Path(path))

    def read(self, path: Path) -> dict[str, Any]:
        """Read a checkpoint, and hold it for ``load_checkpoint`` or until ``forget``."""
        if self._read is None or self._read[0] != path:
            self._read = path, self._own(path)
        return self._read[1]

    def forget(self) -> None:
        """Release the checkpoint that ``read`` holds."""
        self._read = None

    def _own(self, path: Path) -> dict[str, Any]:
        checkpoint = load(path)
        with named(path):
            return process_state.own(checkpoint, *self.process)

    def _write(self, checkpoint: dict[str, Any], target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        name = checksums.draft_of(target)
        try:
            with _Faithful(io.FileIO(name, "xb")) as file:
                try:
                    torch.save(checkpoint, file)
                except RuntimeError as error:  # raised by torch when a write is incomplete
                    raise file.error or error from error
                file.flush()
                os.fsync(file.fileno())
            checksums.seal(name)
            checksums.keep_earlier(target, self.keep)
            os.replace(name, target)
        except BaseException:
            name.unlink(missing_ok=True)
            raise


class _Faithful(io.BufferedWriter):
    """A file that stores the error of a failed write."""

    error: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError as error:
            self.error = error
            raise


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this framework; no code in it is executed.

    Raises:
        ValueError: If the file is missing or damaged (:class:`cl_lightning.checksums.DamagedError`), holds pickled
            objects, or was written by another program or by a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {path}: no such file; give the path of a .ckpt file, or 'last'")
    checksums.check(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint {path}: refused, it holds pickled objects, which can run any code when they are loaded; "
            "checkpoints of this framework hold tensors and plain values only"
        ) from error
    except (RuntimeError, EOFError, zipfile.BadZipFile, OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise checksums.DamagedError(f"checkpoint {path}: not a readable checkpoint ({reason})") from error
    part = checkpoint.get("cl_lightning") if isinstance(checkpoint, Mapping) else None
    if not isinstance(part, Mapping) or "schema" not in part:
        raise ValueError(f"checkpoint {path}: not written by this framework; it has no part 'cl_lightning'")
    with named(path):
        check_parts(checkpoint)
    if part["schema"] > SCHEMA:
        raise ValueError(
            f"checkpoint {path}: its version is {part['schema']}, this program reads up to {SCHEMA}; update it"
        )
    state = renamed.state_dict(checkpoint.get("state_dict", {}))
    strategy = renamed.class_path(part.get("strategy", ""))
    return {**checkpoint, "state_dict": state, "cl_lightning": {**part, "strategy": strategy}}


def settle_progress(loops: dict[str, Any], *, mid_epoch: bool) -> None:
    """Make the counters of a fit loop unambiguous, in place, so that Lightning resumes at the right step.

    A checkpoint is taken inside a hook, where some counters are one ahead of others, and Lightning infers from the
    counters in which hook. Here the position is known: between two steps of an epoch, or between two epochs.

    Args:
        loops: ``state_dict`` of the fit loop.
        mid_epoch: Whether steps of the epoch remain.
    """
    epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    if mid_epoch:
        for counters in (batches["total"], batches["current"]):
            counters.update(dict.fromkeys(("ready", "started", "processed"), counters["completed"]))
        batches["is_last_batch"] = False
    else:
        for counters in (epochs["total"], epochs["current"]):
            counters.update(dict.fromkeys(("ready", "started", "completed"), counters["processed"]))
