"""Files that tell whether they are whole: zip archives, as torch writes them, with their own digest in the comment.

Nothing here needs torch, so that a command can look for a checkpoint before anything heavy is imported.
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
_END = 22  # bytes of the last record of a zip archive; the last two count those of the comment that follows


class DamagedError(ValueError):
    """A file is not what was written: torn, or with other bytes."""


def seal(path: str | Path) -> None:
    """Write the SHA-256 digest of a zip archive that has no comment into its comment; it stays a zip archive."""
    with open(path, "r+b") as file:
        file.seek(-_END, os.SEEK_END)
        if not file.read().startswith(b"PK\x05\x06"):
            raise ValueError(f"{path} is no zip archive without a comment, so it cannot be sealed")
        size = file.seek(-2, os.SEEK_END)
        digest = _digest(path, size)
        file.seek(size)
        file.write(_SEAL.to_bytes(2, "little") + _MARK + digest)
        file.flush()
        os.fsync(file.fileno())


def check(path: str | Path) -> None:
    """See that a file is whole: by its seal, or, where it has none, by the checksums of the parts of the archive.

    Raises:
        DamagedError: If it is not; the message names the file.
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
    """Before ``target`` is replaced, give what it holds the name ``last-1``, what that held ``last-2``, and so on.

    At no moment is there no file ``target``.

    Args:
        target: ``last.ckpt``, say; it need not exist.
        keep: Files to keep, the coming ``target`` among them.
    """
    for path, age in _aged(target):
        if age >= keep:
            path.unlink(missing_ok=True)
    if keep < 2 or not target.is_file():
        return
    for age in range(keep - 2, 0, -1):
        if (path := _earlier(target, age)).is_file():
            os.replace(path, _earlier(target, age + 1))
    give_name(target, _earlier(target, 1))


def draft_of(target: Path) -> Path:
    """A free name beside ``target``, to be renamed to it when the file is whole."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}")


def give_name(source: Path, target: Path) -> None:
    """Give a file a second name, or its copy where the file system has no such thing; ``target`` is replaced."""
    name = draft_of(target)
    try:
        try:
            os.link(source, name)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, name)
        os.replace(name, target)
    finally:
        name.unlink(missing_ok=True)  # two names of the same file: replacing does nothing


def clear_torn(folder: Path) -> None:
    """Remove what processes have left that were killed while they wrote a checkpoint."""
    for path in folder.glob(".*.ckpt.*"):
        path.unlink(missing_ok=True)


def go_on_from(target: Path, path: Path) -> None:
    """Make ``path``, an earlier checkpoint of the run, its last one; those written after it are not kept."""
    if path == target or path.parent != target.parent:
        return
    age = path.stat().st_mtime_ns
    for other, _ in _aged(target):
        if other != path and other.stat().st_mtime_ns > age:
            other.unlink()
    give_name(path, target)


def candidates(target: Path) -> list[Path]:
    """The checkpoints of a run: ``target``, those before it, then those of finished tasks, newest first."""
    aged = [path for path, _ in sorted(_aged(target), key=lambda pair: pair[1])]
    tasks = sorted(target.parent.glob("task_*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return [path for path in (target, *aged, *tasks) if path.is_file()]


def newest(target: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run that is whole.

    Args:
        target: Its ``last.ckpt``.

    Returns:
        The path, None where there is none; and what was found wrong with newer ones.
    """
    problems: list[str] = []
    for path in candidates(target):
        try:
            check(path)
        except DamagedError as error:
            problems.append(str(error))
            continue
        return path, problems
    return None, problems


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
