"""Two processes on this machine that learn what one process learns."""

import os
import pickle
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from cl_lightning.testing.bench import Subject, run

_TIMEOUT = 30.0  # seconds that one process waits for the other


class Pair:
    """Two processes that run strategies one after another, each once; started when first asked, or by ``start``.

    Starting them takes longer than running a strategy: one pair serves many. If a strategy brings them down, they are
    started again for those after it.

    Args:
        subjects: What is run, by their names, which differ.
        timeout: Seconds to wait for one strategy, beside the start.
    """

    def __init__(self, subjects: Sequence[Subject], *, timeout: float = 180.0) -> None:
        names = [subject.name for subject in subjects]
        if len(set(names)) < len(names):
            raise ValueError(f"Pair: names {names}; they must differ")
        self.waiting, self.timeout = list(subjects), timeout
        self.reports: dict[str, dict[str, Any] | str] = {}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._folder: TemporaryDirectory[str] | None = None
        self._starts = self._number = 0

    def start(self) -> None:
        """Start the processes, and do not wait."""
        if self._processes:
            return
        self._folder = self._folder or TemporaryDirectory(prefix="conformance_pair_")
        folder = Path(self._folder.name) / str(self._starts)
        folder.mkdir()
        self._starts += 1
        for number, subject in enumerate(self.waiting):
            # Made by this process for its own children: what pickle could do wrong, these could do anyway.
            _path(folder, number).write_bytes(pickle.dumps(subject))
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

    def report(self, name: str) -> dict[str, Any]:
        """What the processes found for a strategy: ``whole`` run and ``resumed`` one, for each rank.

        Raises:
            AssertionError: If one of them ended with an error.
        """
        while name not in self.reports:
            if all(subject.name != name for subject in self.waiting):
                raise ValueError(f"Pair: no strategy of the name {name!r}")
            self._collect_next()
        found = self.reports[name]
        if isinstance(found, str):
            raise AssertionError(f"{name}: processes: {found}")
        return found

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.wait()
        self._processes = []

    def _collect_next(self) -> None:
        self.start()
        assert self._folder is not None
        folder, subject = Path(self._folder.name) / str(self._starts - 1), self.waiting.pop(0)
        until = time.monotonic() + self.timeout
        paths = [_path(folder, self._number, rank) for rank in range(2)]
        self._number += 1
        while not all(path.exists() for path in paths):
            ended = [process.poll() not in (None, 0) for process in self._processes]
            if any(ended) or time.monotonic() > until:
                time.sleep(1.0)  # for the other one's last words
                if all(path.exists() for path in paths):  # it was the next strategy that failed
                    break
                self.close()
                self.reports[subject.name] = _last_words(folder) or f"took more than {self.timeout:.0f} s"
                return
            time.sleep(0.02)
        parts = [torch.load(path, weights_only=True) for path in paths]
        self.reports[subject.name] = {key: [part[key] for part in parts] for key in parts[0]}
        if not self.waiting:
            for process in self._processes:
                process.wait()
            self._processes = []

    def __del__(self) -> None:
        self.close()


def _last_words(folder: Path) -> str:
    """Errors of the processes, that of the first to fail at length."""
    errors = sorted(folder.glob("error_*.txt"), key=lambda path: path.stat().st_mtime_ns)
    if not errors:
        logs = [path.read_text(errors="replace").strip() for path in sorted(folder.glob("log_*.txt"))]
        return "\n".join(log[-2000:] for log in logs)
    texts = {f"process {path.stem[-1]}": path.read_text().strip() for path in errors}
    short = "; ".join(f"{who} ended with {text.splitlines()[-1]}" for who, text in texts.items())
    return f"{short}\n{next(iter(texts.values()))[-3000:]}"


def _path(folder: Path, number: int, rank: int | None = None) -> Path:
    """Where a subject is told, and where a process reports on it."""
    return folder / (f"subject_{number}.pkl" if rank is None else f"report_{number}_{rank}.pt")


def main() -> None:
    """Run the strategies that the folder on the command line tells, as one of the processes, and report on each."""
    from cl_lightning.testing.checks import places

    folder = Path(sys.argv[-1])
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    # A file takes no port that another test may have taken.
    init = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2, timeout=timedelta(seconds=_TIMEOUT))
    for number in range(len(list(folder.glob("subject_*.pkl")))):
        try:
            subject: Subject = replace(pickle.loads(_path(folder, number).read_bytes()), accelerator="cpu")
            whole = run(subject, processes=2)
            middle = [point for point in places(whole.snapshots) if point.kind in ("step", "phase")][-2:]
            resumed = whole
            for index, point in enumerate([*middle, None]):
                runs = folder / f"run_{number}"
                resumed = run(subject, folder=runs, resume="last" if index else None, kill_at=point, processes=2)
        except BaseException:
            error = folder / f"error_{rank}.txt"
            error.write_text(traceback.format_exc())
            os._exit(1)  # without waiting for the other
        target = _path(folder, number, rank)
        torch.save({"whole": whole.plain(), "resumed": resumed.plain()}, f"{target}.part")
        os.replace(f"{target}.part", target)
    dist.destroy_process_group()
