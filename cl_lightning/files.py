"""Text files that are replaced as a whole: a reader, a crash or a full disk never finds half of one."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


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
