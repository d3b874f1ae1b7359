"""Runs of strategies on two processes of this machine, for the comparison with a run on one process."""

import os
import pickle
import shutil
import subprocess
import sys
import time
import traceback
import weakref
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from io import BytesIO
from itertools import count
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
import torch.distributed as dist

from cl_lightning.testing.bench import SavePoint, Subject, run

_TIMEOUT = 30.0  # seconds that one process waits for the other


def scratch_folder(owner: object) -> Path:
    """A folder that is removed with its owner."""
    folder = Path(mkdtemp(prefix="conformance_"))
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return folder


class Pair:
    """Two processes that run strategies one after another, each when it is first asked for.

    Starting them takes longer than running a strategy: one pair serves many, and lasts until it is closed. If a
    strategy brings them down, they are started again for the next one.

    Args:
        timeout: Seconds to wait for one strategy, apart from the start.

    Attributes:
        seconds: Processor time of both processes so far, apart from their start.
    """

    def __init__(self, *, timeout: float = 180.0) -> None:
        self.timeout = timeout
        self.seconds = 0.0
        self._processes: list[subprocess.Popen[bytes]] = []
        self._folder = scratch_folder(self)
        self._starts = self._number = 0

    def start(self) -> None:
        """Start the processes without waiting for them."""
        if self._processes:
            return
        self._starts += 1
        folder = self._inside()
        folder.mkdir()
        self._number = 0
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("PL_", "SLURM_"))},
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "TORCHELASTIC_RUN_ID": "conformance",
            "CUDA_VISIBLE_DEVICES": "",
        }
        for rank in range(2):
            command = [sys.executable, "-c", "from cl_lightning.testing.pair import main; main()", str(folder)]
            mine = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
            with (folder / f"log_{rank}.txt").open("wb") as log:
                self._processes.append(subprocess.Popen(command, env=mine, stdout=log, stderr=subprocess.STDOUT))

    def report(self, subject: Subject, points: Sequence[SavePoint]) -> dict[str, Any]:
        """What the processes find for a strategy: ``whole`` run and ``resumed`` one, for each rank.

        The resumed run begins from a checkpoint of the whole one, at the first of the points, in new objects.

        Args:
            subject: The strategy, its data and options.
            points: Where the resumed run is killed and resumed, in order.

        Raises:
            AssertionError: If one of the processes ended with an error.
        """
        self.start()
        folder = self._inside()
        paths = [_path(folder, self._number, rank) for rank in range(2)]
        # Made by this process for its own children: what pickle could do wrong, these could do anyway.
        _write(_path(folder, self._number), pickle.dumps((subject, tuple(points))))
        self._number += 1
        until = time.monotonic() + self.timeout
        while not all(path.exists() for path in paths):
            if any(process.poll() is not None for process in self._processes) or time.monotonic() > until:
                time.sleep(1.0)  # for the other one's last words
                self.close()
                words = _last_words(folder) or f"took more than {self.timeout:.0f} s"
                raise AssertionError(f"{subject.name}: processes: {words}")
            time.sleep(0.01)
        parts = [torch.load(path, weights_only=True) for path in paths]
        self.seconds += sum(part.pop("seconds") for part in parts)
        return {key: [part[key] for part in parts] for key in parts[0]}

    def close(self) -> None:
        """Kill the processes."""
        for process in self._processes:
            process.kill()
            process.wait()
        self._processes = []

    def _inside(self) -> Path:
        """What the present processes and this one exchange lies here."""
        return self._folder / str(self._starts)

    def __del__(self) -> None:
        self.close()


def _last_words(folder: Path) -> str:
    """Errors of the processes: the last line of each, and the traceback of the process that failed first."""
    errors = sorted(folder.glob("error_*.txt"), key=lambda path: path.stat().st_mtime_ns)
    if not errors:
        logs = [path.read_text(errors="replace").strip() for path in sorted(folder.glob("log_*.txt"))]
        return "\n".join(log[-2000:] for log in logs)
    texts = {f"process {path.stem[-1]}": path.read_text().strip() for path in errors}
    short = "; ".join(f"{who} ended with {text.splitlines()[-1]}" for who, text in texts.items())
    return f"{short}\n{next(iter(texts.values()))[-3000:]}"


def _path(folder: Path, number: int, rank: int | None = None) -> Path:
    """File of a subject, and of a process's report on it."""
    return folder / (f"subject_{number}.pkl" if rank is None else f"report_{number}_{rank}.pt")


def _write(path: Path, content: bytes) -> None:
    """Write a file that is whole as soon as it is there."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)


def _arrived(path: Path) -> bytes:
    """Content of a file, once it is there; the process ends with the one that would write it."""
    parent = os.getppid()
    while not path.exists():
        if os.getppid() != parent:
            os._exit(0)
        time.sleep(0.01)
    return path.read_bytes()


def main() -> None:
    """Run each strategy that arrives in the folder on the command line, as one of the processes, and report on it."""
    folder = Path(sys.argv[-1])
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    # A file takes no port that another test may have taken.
    init = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2, timeout=timedelta(seconds=_TIMEOUT))
    for number in count():
        content, before = _arrived(_path(folder, number)), time.process_time()
        try:
            subject, points = pickle.loads(content)
            subject = replace(subject, accelerator="cpu")
            runs, killed = folder / f"run_{number}", folder / f"killed_{number}"
            first = points[0] if points else None
            whole = resumed = run(subject, folder=runs, copy_at=first, copy_to=killed, processes=2)
            for point in [*points[1:], None] if points else ():
                resumed = run(subject, folder=killed, resume="last", kill_at=point, processes=2)
        except BaseException:
            error = folder / f"error_{rank}.txt"
            error.write_text(traceback.format_exc())
            os._exit(1)  # without waiting for the other
        report = {"whole": whole.plain(), "resumed": resumed.plain(), "seconds": time.process_time() - before}
        buffer = BytesIO()
        torch.save(report, buffer)
        _write(_path(folder, number, rank), buffer.getvalue())
