"""Results that all tests of a session share, over all its processes: made by the test that first asks for them."""

import atexit
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

FOLDER = "CL_LIGHTNING_SHARED"
"""Variable with the folder of the session, which its workers inherit."""


def begin() -> None:
    """Make the folder of this session, unless a process that started this one has made it; it is removed at the end."""
    if FOLDER not in os.environ:
        os.environ[FOLDER] = folder = tempfile.mkdtemp(prefix="cl_lightning_tests_")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


def made_once(name: str, make: Callable[[], Any]) -> Any:
    """What ``make`` returns, plain values and tensors; one process makes it, and all others read it.

    Args:
        name: Says what it is, with everything that it depends on.
        make: Is called if no process of this session has made it.
    """
    begin()
    path = Path(os.environ[FOLDER]) / f"{hashlib.sha256(name.encode()).hexdigest()}.pt"
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            torch.save(make(), path)
    return torch.load(path, weights_only=True)


def words(value: Any) -> str:
    """A description of options that is the same in all processes, and another for other options.

    Raises:
        TypeError: For an object that has no description, such as a lambda or an instance of a class.
    """
    if isinstance(value, partial):
        return f"partial({words(value.func)}, {words(value.args)}, {words(value.keywords)})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {words(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(words, value))}]"
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    name = getattr(value, "__qualname__", None)
    if name is None and hasattr(value, "__dict__"):
        return f"{words(type(value))}({words(vars(value))})"
    if name is None or "<" in name:
        raise TypeError(f"{value!r} has no description; give a class or a function of a module, or a partial of one")
    return f"{value.__module__}.{name}"
