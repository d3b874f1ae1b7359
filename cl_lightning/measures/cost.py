"""Cost of a run per task: seconds, samples, memory, parameters and FLOPs."""

import contextlib
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from torch import nn

from cl_lightning import distributed
from cl_lightning.memory import Memory

Kind = Literal["training", "statistics", "evaluation", "saving"]
KINDS: tuple[Kind, ...] = ("training", "statistics", "evaluation", "saving")
MEBIBYTE = 2**20


@dataclass
class TaskCost:
    """Cost of one task so far; a resumed run continues the sums.

    Attributes:
        training: Seconds from the first to the last step of each phase.
        statistics: Seconds of the work before and after training: class means, herding, Fisher information, teachers.
        evaluation: Seconds of validation and tests, including validation during training.
        saving: Seconds of writing checkpoints.
        images: Samples of the stream in training steps, over all processes; a sample counts once per epoch and pass.
        samples: Samples that passed through the network in training steps, over all processes: ``images`` and the
            samples that a strategy adds, from a memory or as further views.
        steps: Optimizer steps.
        epochs: Completed epochs, by phase.
        peak_process_bytes: Largest resident memory of a process during the task, maximum over processes. Where the
            system cannot reset the peak (Linux can), since the start of the process.
        peak_device_bytes: Largest memory allocated on a GPU during the task, maximum over processes; None without a
            GPU.
        bytes_kept: Memory kept for later tasks apart from the network, in bytes by kind, one entry per process.
        raw_bytes: Part of ``bytes_kept``: the pixels of exemplars on one process.
        parameters: Number of scalars in the parameters of the network.
        trainable: Number of scalars in all parameters of the strategy that the last phase trained.
        flops_per_image: Floating-point operations of one prediction; None if they could not be counted.
    """

    training: float = 0.0
    statistics: float = 0.0
    evaluation: float = 0.0
    saving: float = 0.0
    images: float = 0.0
    samples: float = 0.0
    steps: int = 0
    epochs: dict[str, int] = field(default_factory=dict)
    peak_process_bytes: int = 0
    peak_device_bytes: int | None = None
    bytes_kept: list[dict[str, int]] = field(default_factory=list)
    raw_bytes: int = 0
    parameters: int = 0
    trainable: int = 0
    flops_per_image: int | None = None

    @property
    def memory_mb(self) -> float:
        """Memory of network and exemplars in MB: (4 * parameters + pixels of exemplars) / 2^20.

        The budget of memory-aligned comparisons (Zhou et al., MEMO, ICLR 2023, arXiv:2205.13218; arXiv:2302.03648):
        parameters count as float32, images as uint8, and nothing else counts.
        """
        return (4 * self.parameters + self.raw_bytes) / MEBIBYTE

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of ``asdict``; unknown names are ignored, missing ones keep their default."""
        known = {item.name for item in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


class CostMeter:
    """Cost of all tasks of a run. Time is attributed to one kind of work at a time, set by :meth:`enter`."""

    def __init__(self) -> None:
        self.tasks: list[TaskCost] = []
        self.device = torch.device("cpu")
        self._kind: Kind | None = None
        self._since = 0.0

    def begin_task(self, device: torch.device) -> None:
        """Start the account of a new task.

        Args:
            device: Device whose memory is measured.
        """
        self.tasks.append(TaskCost())
        self.device = device
        reset_peaks(device)

    def resume_task(self, device: torch.device) -> None:
        """Continue the account of the last task in a new process."""
        self.device = device
        reset_peaks(device)

    def enter(self, kind: Kind | None) -> Kind | None:
        """Attribute the time from now on to ``kind`` (None: to nothing); returns the previous kind."""
        previous = self._kind
        if self.tasks:
            if self.device.type == "cuda" and previous != kind:
                torch.cuda.synchronize(self.device)  # running kernels belong to the previous kind
            now = time.perf_counter()
            if previous is not None:
                self.move(previous, now - self._since)
            self._kind, self._since = kind, now
        return previous

    def move(self, kind: Kind, seconds: float, source: Kind | None = None) -> None:
        """Add seconds to ``kind``, and subtract them from ``source`` if it is given."""
        task = self.tasks[-1]
        setattr(task, kind, getattr(task, kind) + seconds)
        if source is not None:
            setattr(task, source, getattr(task, source) - seconds)

    def add(self, **counts: float) -> None:
        """Add to the counts of the current task, by name."""
        task = self.tasks[-1]
        for name, count in counts.items():
            setattr(task, name, getattr(task, name) + count)

    def end_epoch(self, phase: str) -> None:
        """Count a completed epoch of a phase."""
        epochs = self.tasks[-1].epochs
        epochs[phase] = epochs.get(phase, 0) + 1

    def note_peaks(self) -> None:
        """Update the memory peaks of the current task from this process."""
        if self.tasks:
            task = self.tasks[-1]
            task.peak_process_bytes = max(task.peak_process_bytes, peak_process_bytes())
            if (used := peak_device_bytes(self.device)) is not None:
                task.peak_device_bytes = max(task.peak_device_bytes or 0, used)

    def close_task(
        self, strategy: nn.Module, network: nn.Module, kept: dict[str, int], flops_per_image: int | None = None
    ) -> None:
        """Record memory and parameters at the end of a task. Collective; the network is on its device in eval mode.

        Args:
            strategy: Module whose trainable parameters and memories are counted.
            network: The part of the strategy that predicts; its parameters are counted.
            kept: Memory that this process keeps for later tasks, in bytes by kind.
            flops_per_image: Floating-point operations of one prediction; None if unknown.
        """
        self.note_peaks()
        task = self.tasks[-1]
        mine = (kept, task.peak_process_bytes, task.peak_device_bytes)
        parts: list[Any] = [mine]
        if distributed.is_distributed():
            parts = [None] * distributed.world_size()
            dist.all_gather_object(parts, mine)
        task.bytes_kept = [part[0] for part in parts]
        task.peak_process_bytes = max(part[1] for part in parts)
        devices = [part[2] for part in parts if part[2] is not None]
        task.peak_device_bytes = max(devices) if devices else None
        task.raw_bytes = raw_bytes(strategy)
        task.parameters = sum(parameter.numel() for parameter in network.parameters())
        task.trainable = sum(parameter.numel() for parameter in strategy.parameters() if parameter.requires_grad)
        task.flops_per_image = flops_per_image

    def state_dict(self) -> list[dict[str, Any]]:
        """Plain values, including the time up to now."""
        self.enter(self._kind)
        self.note_peaks()
        return [
            {**vars(task), "epochs": dict(task.epochs), "bytes_kept": [dict(part) for part in task.bytes_kept]}
            for task in self.tasks
        ]

    def load_state_dict(self, state: list[Mapping[str, Any]]) -> None:
        self.tasks = [TaskCost.from_dict(task) for task in state]
        self._kind = None

    def summary(self) -> dict[str, Any]:
        """The entry ``cost`` of ``results.json``, see ``docs/results_schema.md``."""
        entries = [self.of_task(index) for index in range(len(self.tasks))] or [dict.fromkeys(_entry(TaskCost()))]
        lists = {name: [entry[name] for entry in entries[: len(self.tasks)]] for name in entries[0]}
        return lists | self.so_far()

    def of_task(self, index: int) -> dict[str, Any]:
        """The part of :meth:`summary` that has one entry for each task: the entries of one task, by name."""
        return _entry(self.tasks[index])

    def so_far(self) -> dict[str, Any]:
        """The part of :meth:`summary` that is replaced after each task."""
        tasks = self.tasks
        last = tasks[-1] if tasks else TaskCost()
        kinds = sorted({kind for part in last.bytes_kept for kind in part})
        return {
            "peak_memory_bytes": max((task.peak_device_bytes or task.peak_process_bytes for task in tasks), default=0),
            "bytes_kept": {kind: max(part.get(kind, 0) for part in last.bytes_kept) for kind in kinds},
            "bytes_kept_per_rank": last.bytes_kept,
            "parameters": last.parameters,
            "trainable_parameters": last.trainable,
            "flops_per_image": last.flops_per_image,
            "memory_mb": round(last.memory_mb, 6),
        }

    def metrics(self) -> dict[str, float]:
        """Metrics that are logged at the end of the current task."""
        task = self.tasks[-1]
        values: dict[str, float | None] = {f"cost/{kind}_seconds": getattr(task, kind) for kind in KINDS}
        values |= {
            "cost/images_per_second": _rate(task.images, task.training),
            "cost/samples_per_second": _rate(task.samples, task.training),
            "cost/peak_process_mb": task.peak_process_bytes / MEBIBYTE,
            "cost/peak_device_mb": None if task.peak_device_bytes is None else task.peak_device_bytes / MEBIBYTE,
            "cost/parameters": float(task.parameters),
            "cost/memory_mb": task.memory_mb,
            "cost/kept_mb": _total(task) / MEBIBYTE,
        }
        for kind, size in (task.bytes_kept[0] if task.bytes_kept else {}).items():
            values[f"cost/kept_{kind}_mb"] = size / MEBIBYTE
        return {name: value for name, value in values.items() if value is not None}


def raw_bytes(module: nn.Module) -> int:
    """Size of the raw images in all memories of a module, in bytes."""
    return sum(part.images.nbytes for part in module.modules() if isinstance(part, Memory))


def peak_process_bytes() -> int:
    """Largest resident memory of this process, in bytes.

    Since the last :func:`reset_peaks` on Linux; since the start of the process on systems that cannot reset the peak.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * scale


def peak_device_bytes(device: torch.device) -> int | None:
    """Largest memory in bytes that torch allocated on a GPU since :func:`reset_peaks`; None for other devices."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None


def reset_peaks(device: torch.device) -> None:
    """Reset the memory peaks of this process and of ``device`` to the current use."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak only
    # Before a process has initialised CUDA nothing is allocated, and a reset raises an error.
    if device.type == "cuda" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.reset_peak_memory_stats(device)


class Stopwatch:
    """Seconds that work takes on its device, measured without synchronisation at each block.

    Example: ``with watch: step()`` any number of times, then ``watch.take()``.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0
        self._started: Any = None

    def __enter__(self) -> None:
        if self.device.type == "cuda":
            self._started = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._started.record(torch.cuda.current_stream(self.device))
        else:
            self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            stopped = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            stopped.record(torch.cuda.current_stream(self.device))
            self._events.append((self._started, stopped))
        else:
            self._seconds += time.perf_counter() - self._started

    def take(self) -> float:
        """Seconds since the last call; synchronises with the device."""
        if self._events:
            self._events[-1][1].synchronize()
        seconds: float = self._seconds + sum(start.elapsed_time(stop) for start, stop in self._events) / 1000
        self._events, self._seconds = [], 0.0
        return seconds


def _entry(task: TaskCost) -> dict[str, Any]:
    return {
        "seconds": {kind: round(getattr(task, kind), 4) for kind in KINDS},
        "images": round(task.images),
        "samples": round(task.samples),
        "images_per_second": _rate(task.images, task.training),
        "samples_per_second": _rate(task.samples, task.training),
        "peak_process_bytes": task.peak_process_bytes,
        "peak_device_bytes": task.peak_device_bytes,
        "bytes_kept_per_task": _total(task),
        "parameters_per_task": task.parameters,
        "memory_mb_per_task": round(task.memory_mb, 6),
    }


def _rate(count: float, seconds: float) -> float | None:
    return round(count / seconds, 2) if seconds > 0 else None


def _total(task: TaskCost) -> int:
    return max((sum(part.values()) for part in task.bytes_kept), default=0)
