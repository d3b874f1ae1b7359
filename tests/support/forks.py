"""Child processes that start at once: forked from a server that has imported what they need."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from typing import Any

_context = multiprocessing.get_context("forkserver")


def start(function: Callable[..., Any], *args: Any, **environment: str) -> Any:
    """Run a function of a test module in a process of its own.

    Args:
        function: Found by its name in its module.
        args: What it is called with.
        environment: Set before it is called.
    """
    _context.set_forkserver_preload(
        [
            "support.runs",
            "cl_lightning.cli.commands",
            "cl_lightning.study.worker",
            "cl_lightning.study.page",
            "alembic.command",
        ]
    )
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    process = _context.Process(target=_call, args=(function, args, environment))
    process.start()
    return process


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pair(function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> None:
    """Run a function in two processes that a Trainer with ``devices=2, strategy="ddp"`` joins to a group."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "tests", "GROUP_RANK": "0"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "CUDA_VISIBLE_DEVICES": ""}
    both = [start(function, *args, **common, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    for process in both:
        process.join(timeout)
    codes = [process.exitcode for process in both]
    for process in both:
        process.kill()
    assert codes == [0, 0]


def _call(function: Callable[..., Any], args: tuple[Any, ...], environment: dict[str, str]) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(environment)
    function(*args)
