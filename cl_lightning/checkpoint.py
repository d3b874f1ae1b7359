"""Checkpoints: what is in them, how they are written, and how they are checked before they are trusted."""

import os
import pickle
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

SCHEMA = 1
"""Version of the part under the key ``cl_lightning``; old versions stay readable."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary file beside the target and renames it, so that a crash never leaves half a checkpoint."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this framework; nothing in it is executed.

    Raises:
        ValueError: If the file is missing, torn, holds pickled objects, is of another program or of a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {path}: no such file; give the path of a .ckpt file, or 'last'")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"checkpoint {path}: not a readable checkpoint (not whole, or not written by this framework)")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint {path}: refused, it holds pickled objects, which can run any code when they are loaded; "
            "checkpoints of this framework hold tensors and plain values only"
        ) from error
    except (RuntimeError, EOFError, zipfile.BadZipFile, OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"checkpoint {path}: not a readable checkpoint ({reason})") from error
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
