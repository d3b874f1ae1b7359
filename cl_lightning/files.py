"""Text files: read without waiting for a pipe, and replaced as a whole, so that nobody finds half of one."""

import errno
import os
import secrets
import select
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


def require_regular(path: str | Path) -> None:
    """Refuse a named pipe, whose opening could block for ever, a device, and a folder.

    Raises:
        OSError: If there is nothing at the path, or no regular file.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_ISFIFO: "a named pipe", stat.S_ISSOCK: "a socket", stat.S_ISDIR: "a folder"}
        kind = next((name for test, name in kinds.items() if test(mode)), "a device")
        raise OSError(errno.EINVAL, f"it is {kind}, not a file", str(path))


def read_text(path: str | Path, errors: str = "strict") -> str:
    """Text of a regular file in UTF-8.

    Raises:
        OSError: As :func:`require_regular`, or if the file cannot be read.
        UnicodeDecodeError: If it is not UTF-8, and ``errors`` is ``strict``.
    """
    require_regular(path)
    return Path(path).read_text(encoding="utf-8", errors=errors)


def read_pipe(path: str | Path, *, most: int = 2**22, seconds: float = 10.0) -> bytes:
    """Everything that the writer of a pipe writes until it closes it.

    Args:
        path: A named pipe, or a pipe of the shell, such as ``/dev/fd/63``.
        most: Largest number of bytes.
        seconds: Longest time without a byte, and until there is a writer.

    Raises:
        ValueError: If the pipe gives more, or nothing for so long.
        OSError: If the pipe cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        content = b""
        due = time.monotonic() + seconds
        while True:
            select.select([descriptor], [], [], max(due - time.monotonic(), 0.0))
            try:
                part: bytes | None = os.read(descriptor, 2**16)
            except BlockingIOError:  # there is a writer, which has written nothing yet
                part = None
            if part:
                content, due = content + part, time.monotonic() + seconds
                if len(content) > most:
                    raise ValueError(f"the pipe gives more than {most} bytes")
            elif part == b"" and content:
                return content
            elif time.monotonic() >= due:
                raise ValueError(f"nothing was written to the pipe for {seconds:g} seconds")
            elif part == b"":
                time.sleep(0.02)  # no writer yet
    finally:
        os.close(descriptor)


@contextmanager
def replaced(path: str | Path) -> Iterator[TextIO]:
    """A text file under a temporary name in the same folder, renamed to ``path`` when it is complete and on the disk.

    The folder is created. If anything fails, an earlier file stays as it is and the temporary file is removed. Line
    ends are written as they are given, and names of files that are not UTF-8 (surrogates) as their bytes.

    Raises:
        OSError: If the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.draft")
    try:
        with draft.open("x", newline="", encoding="utf-8", errors="surrogateescape") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def clear_drafts(folder: Path) -> None:
    """Remove temporary files of processes that were killed while they wrote into this folder."""
    for path in folder.glob(".*.draft"):
        path.unlink(missing_ok=True)
