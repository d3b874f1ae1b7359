"""Checksums of checkpoints: zip archives, as torch writes them, with their SHA-256 digest in the archive's comment.

This module does not import torch, so that a command can search for a checkpoint before it imports heavy packages.
"""

import hashlib
import os
import re
import secrets
import shutil
import zipfile
import zlib
from pathlib import Path

_MARK = b"cl_lightning sha256 "
_SEAL = len(_MARK) + 64  # the digest in hexadecimal digits
_END = 22  # bytes of the last record of a zip archive; its last two bytes are the length of the comment that follows


class DamagedError(ValueError):
    """A file differs from the file that was written: it is truncated or its bytes have changed."""


def seal(path: str | Path) -> None:
    """Write the SHA-256 digest of a zip archive into its comment; it remains a valid zip archive.

    Args:
        path: A zip archive without a comment.

    Raises:
        ValueError: If the file is not a zip archive, or has a comment already.
    """
    with open(path, "r+b") as file:
        file.seek(-_END, os.SEEK_END)
        if not file.read().startswith(b"PK\x05\x06"):
            raise ValueError(f"checkpoint {path}: cannot be sealed; it must be a zip archive without a comment")
        size = file.seek(-2, os.SEEK_END)
        digest = _digest(path, size)
        file.seek(size)
        file.write(_SEAL.to_bytes(2, "little") + _MARK + digest)
        file.flush()
        os.fsync(file.fileno())


def check(path: str | Path) -> None:
    """Verify a file by its seal, or by the checksums of the archive's members if it has no seal.

    Raises:
        DamagedError: If the file is damaged; the message names the file.
        OSError: If the file is missing or cannot be read.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            file.seek(max(size - _SEAL, 0))
            mark = file.read()
        if size >= _SEAL + _END and mark.startswith(_MARK):
            if _digest(path, size - _SEAL - 2) != mark[len(_MARK) :]:
                raise DamagedError(f"checkpoint {path}: damaged, its bytes are not those that were written")
            return
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, ValueError, RuntimeError) as error:
        if isinstance(error, DamagedError):
            raise
        raise DamagedError(
            f"checkpoint {path}: not a readable checkpoint (not whole, or not written by this framework)"
        ) from error
    if wrong is not None:
        raise DamagedError(f"checkpoint {path}: not a readable checkpoint (its part {wrong} is damaged)")


def keep_earlier(target: Path, keep: int) -> None:
    """Rotate earlier checkpoints before ``target`` is replaced: ``last`` to ``last-1``, ``last-1`` to ``last-2``, ...

    The file ``target`` exists at all times.

    Args:
        target: Path such as ``last.ckpt``; the file need not exist.
        keep: Number of files to keep, the new ``target`` included; older files are removed.
    """
    for path, age in _aged(target):
        if age >= keep:
            path.unlink(missing_ok=True)
    if keep < 2 or not target.is_file():
        return
    for age in range(keep - 2, 0, -1):
        if (path := _earlier(target, age)).is_file():
            os.replace(path, _earlier(target, age + 1))
    link(target, _earlier(target, 1))


def draft_of(target: Path) -> Path:
    """An unused path in the folder of ``target``: write the file there, then rename it to ``target``."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}")


def link(source: Path, target: Path) -> None:
    """Replace ``target`` by a hard link to ``source``, or by a copy if the file system has no hard links."""
    name = draft_of(target)
    try:
        try:
            os.link(source, name)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, name)
        os.replace(name, target)
    finally:
        name.unlink(missing_ok=True)  # os.replace does nothing if both are links to one file


def clear_torn(folder: Path) -> None:
    """Remove incomplete files of processes that were killed while they wrote a checkpoint."""
    for path in folder.glob(".*.ckpt.*"):
        path.unlink(missing_ok=True)


def resume_from(target: Path, path: Path) -> None:
    """Make an earlier checkpoint of the run its last one, and remove the checkpoints that were written after it.

    Args:
        target: ``last.ckpt`` of the run.
        path: The checkpoint to resume from; nothing happens if it is ``target`` or in another folder. Checkpoints of
            finished tasks stay; the run writes them again.
    """
    if path == target or path.parent != target.parent:
        return
    age = path.stat().st_mtime_ns
    for other, _ in _aged(target):
        if other != path and other.stat().st_mtime_ns > age:
            other.unlink()
    link(path, target)


def candidates(target: Path) -> list[Path]:
    """Existing checkpoints of a run: ``target``, then earlier ones and those of finished tasks, newest first.

    Args:
        target: ``last.ckpt`` of the run.
    """
    others = _others(target)
    others.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)  # stable: a link is as old as its file
    return [*([target] if target.is_file() else []), *others]


def task_number(path: Path) -> int:
    """Task of a file ``task_7.ckpt``; by number, because as text task_1000 comes before task_999."""
    number = path.stem.removeprefix("task_")
    return int(number) if number.isdecimal() else -1


def newest(target: Path) -> tuple[Path | None, list[str]]:
    """Find the newest undamaged checkpoint of a run.

    Args:
        target: ``last.ckpt`` of the run.

    Returns:
        The path, or None if there is none, and a message for each newer checkpoint that is damaged.
    """
    damaged: dict[Path, str] = {}
    whole = None
    for path in candidates(target):
        try:
            check(path)
        except DamagedError as error:
            damaged[path] = str(error)
            continue
        except OSError as error:
            damaged[path] = f"checkpoint {path}: cannot be read ({error.strerror or error})"
            continue
        whole = path
        break
    return whole, [damaged[path] for path in (target, *_others(target)) if path in damaged]


def _others(target: Path) -> list[Path]:
    """Earlier checkpoints and those of finished tasks, each kind from the last one on."""
    aged = [path for path, _ in sorted(_aged(target), key=lambda pair: pair[1])]
    tasks = sorted(target.parent.glob("task_*.ckpt"), key=task_number, reverse=True)
    return [path for path in (*aged, *tasks) if path.is_file()]


def _aged(target: Path) -> list[tuple[Path, int]]:
    pattern = re.compile(rf"{re.escape(target.stem)}-(\d+){re.escape(target.suffix)}")
    found = [(path, pattern.fullmatch(path.name)) for path in target.parent.glob(f"{target.stem}-*{target.suffix}")]
    return [(path, int(match[1])) for path, match in found if match]


def _earlier(target: Path, age: int) -> Path:
    return target.with_name(f"{target.stem}-{age}{target.suffix}")


def _digest(path: str | Path, size: int) -> bytes:
    """SHA-256 of the first ``size`` bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while size > 0 and (block := file.read(min(size, 2**20))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest().encode()
