"""Runs a strategy on a small stream, and records its steps, its states and the samples that it reads."""

import copy
import logging
import random
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from cl_lightning.batch import Batch, ImageShape
from cl_lightning.data import RandomCrop, SampleSource, TensorSource, targets_of
from cl_lightning.datamodules.base import ContinualDataModule
from cl_lightning.loop import LoopOptions, RunFiles, TaskLoop
from cl_lightning.strategy import ContinualStrategy
from cl_lightning.stream import ClassIncremental, Stream

Factory = Callable[[], ContinualStrategy]


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return np.round(bunch.images * (255 / 16)).astype(np.uint8), bunch.target.astype(np.int64)


class TinyDigits(ContinualDataModule):
    """121 training and 50 test images of digits, in tasks of 4, 3 and 3 classes, with augmentation and validation.

    Batches of 24 leave a last batch of 1, 13 and 11 samples in the three tasks: one batch that two processes cannot
    split, and two that they split unevenly. Columns differ from labels.

    Args:
        options: Options of the base class; they replace the options above.
    """

    mean = (0.305,)
    std = (0.376,)
    _ORDER = (3, 1, 4, 0, 5, 9, 2, 6, 8, 7)
    _TRAIN = (13, 12, 12, 12, 13, 12, 12, 12, 12, 11)  # of each class in this order
    _TEST = 5

    def __init__(self, **options: Any) -> None:
        chosen: dict[str, Any] = {
            "scenario": ClassIncremental(sizes=[4, 3, 3], class_order=list(self._ORDER)),
            "batch_size": 24,
            "eval_batch_size": 15,
            "val_fraction": 1 / 13,
            "transforms": [RandomCrop(padding=1)],
        }
        super().__init__(**{**chosen, **options})

    def source(self, *, train: bool) -> SampleSource:
        images, labels = _digits()
        chosen = []
        for label, size in zip(self._ORDER, self._TRAIN, strict=True):
            rows = np.flatnonzero(labels == label)
            chosen.append(rows[: size + 1] if train else rows[size + 1 : size + 1 + self._TEST])  # one is held out
        rows = np.sort(np.concatenate(chosen))
        return TensorSource(images[rows], labels[rows], class_names=[str(digit) for digit in range(10)])


@dataclass(frozen=True)
class Subject:
    """A strategy to test, and the data and options of its runs.

    Attributes:
        factory: Returns a new strategy with the same options at each call.
        name: Name in messages.
        callbacks: Returns the callbacks of a run.
        data: Returns the data module; its stream has at least two tasks, and a run over it takes seconds.
        epochs: Epochs per task; at least 2, so that a run is also stopped between two epochs.
        seed: Seed of all random numbers.
        accelerator: Accelerator of the Trainer; on a GPU choose deterministic algorithms, otherwise equal runs differ.
        first_task_is_finetuning: Whether the first task equals fine-tuning, bit by bit.
        matches_single_process: Whether two processes give the result of one process with the same global batch, within
            rounding.
        reason: Why one of these two facts does not hold.
    """

    factory: Factory
    name: str = "strategy"
    callbacks: Callable[[], Sequence[Callback]] = tuple
    data: Callable[[], ContinualDataModule] = TinyDigits
    epochs: int = 2
    seed: int = 0
    accelerator: str = "cpu"
    first_task_is_finetuning: bool = True
    matches_single_process: bool = True
    reason: str = ""


class SavePoint(NamedTuple):
    """A position in a run at which a checkpoint is written."""

    task: int
    phase: int
    kind: str
    """``step``: between two steps of an epoch; ``epoch``: between two epochs; ``phase``: after the last epoch, before
    the statistics of the task; ``task``: after its evaluation."""
    step: int
    """Optimizer steps so far."""

    def __str__(self) -> str:
        kinds = {"step": "in the middle of an epoch", "epoch": "between two epochs", "phase": "at the end of a phase"}
        where = f"task {self.task}, phase {self.phase}, after {self.step} steps"
        return f"after task {self.task}" if self.kind == "task" else f"{kinds[self.kind]} ({where})"


@dataclass(frozen=True)
class Step:
    """A training step.

    Attributes:
        task, phase, epoch, batch: Position of the step; epochs are counted from the start of the phase.
        loss: Loss on this process.
        indices, labels, tasks: Fields of the batch as it came from the loader.
    """

    task: int
    phase: int
    epoch: int
    batch: int
    loss: float
    indices: Tensor
    labels: Tensor
    tasks: Tensor

    def __str__(self) -> str:
        return f"task {self.task}, phase {self.phase}, epoch {self.epoch}, batch {self.batch}"


@dataclass(frozen=True)
class Touch:
    """Samples that were read from the data set.

    Attributes:
        task: The task at that time.
        stage: ``train`` (all of a task except its evaluation), ``validate`` or ``evaluate``.
        train: Whether they are training samples; otherwise they are test samples.
        indices: Indices in the data set.
    """

    task: int
    stage: str
    train: bool
    indices: Tensor


@dataclass
class Outcome:
    """Outcome of a run.

    Attributes:
        state: ``state_dict`` of the strategy.
        callbacks: ``state_dict`` of each callback, by its state key.
        matrix: ``state_dict`` of the accuracy matrix.
        kept: Bytes kept from task to task, by kind.
        global_step: Number of optimizer steps.
        snapshots: ``state_dict`` of the strategy at each position where a checkpoint can be written.
        steps: The training steps.
        touches: The samples that were read.
        strategy: The strategy.
        stream: The stream.
        target_kind: What the target of a sample is.
    """

    state: dict[str, Tensor]
    callbacks: dict[str, Any]
    matrix: dict[str, Tensor]
    kept: dict[str, int]
    global_step: int
    snapshots: dict[SavePoint, dict[str, Tensor]] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    touches: list[Touch] = field(default_factory=list)
    strategy: ContinualStrategy | None = None
    stream: Stream | None = None
    target_kind: str = "class"

    def plain(self) -> dict[str, Any]:
        """The fields that are compared between processes, as plain values and tensors."""
        names = ("state", "callbacks", "matrix", "kept", "global_step")
        return {name: getattr(self, name) for name in names}


class KilledError(Exception):
    """A simulated crash."""


class _Loop(TaskLoop):
    """A task loop that can be killed right after a checkpoint; it writes only this checkpoint and those of tasks.

    Instead of an end at ``kill_at``, what a killed process would leave can be copied to ``copy_to``.
    """

    def __init__(
        self,
        *args: Any,
        kill_at: SavePoint | None,
        copy_at: SavePoint | None,
        copy_to: Path | None,
        probe: "_Probe",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.kill_at, self.copy_at, self.copy_to, self.probe = kill_at, copy_at, copy_to, probe
        self.snapshots: dict[SavePoint, dict[str, Tensor]] = {}
        self.files = _Files(self)
        self.trainer.strategy.checkpoint_io = self.files.io


class _Files(RunFiles):
    """Files of a loop that can be killed."""

    run: _Loop

    def save(self, *, needed: bool = True) -> Path | None:
        run = self.run
        position, driver = run.position, run._driver
        kind = (
            "task" if position.done else "phase" if not position.running else "step" if driver._mid_epoch else "epoch"
        )
        phase = position.phase - (kind == "phase")
        point = SavePoint(position.task, phase, kind, run.trainer.global_step)
        run.snapshots[point] = detached(run.strategy.state_dict())
        written = point in (run.kill_at, run.copy_at) or kind == "task"
        path = super().save() if written else None
        if point == run.kill_at:
            raise KilledError
        if point == run.copy_at and run.trainer.is_global_zero:
            assert run.run_dir is not None
            assert run.copy_to is not None
            shutil.copytree(run.run_dir, run.copy_to)
        return path


class _Watched:
    """A source that records which samples are read, and gives no other access to them."""

    def __init__(self, source: SampleSource, note: Callable[[Tensor], None]) -> None:
        self._source, self._note = source, note
        self.labels, self.class_names, self.in_memory = source.labels, source.class_names, source.in_memory
        self.domains, self.domain_names, self.kind = source.domains, source.domain_names, source.kind
        self.parents = getattr(source, "parents", ())
        self.targets = targets_of(source)

    @property
    def image_shape(self) -> ImageShape:
        return self._source.image_shape

    def take(self, indices: Tensor) -> Tensor:
        self._note(indices)
        return self._source.take(indices)

    def digest(self, indices: np.ndarray) -> bytes:
        return self._source.digest(indices)


class _Probe(Callback):
    """Records training steps and the samples that are read."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.touches: list[Touch] = []
        self._stage = "train"
        self._task = 0

    def watch(self, data: ContinualDataModule) -> None:
        """Record which samples are read from ``data``."""
        samples, made = data.samples, dict[bool, SampleSource]()

        def watched(*, train: bool) -> SampleSource:
            def note(indices: Tensor) -> None:
                task = data.task.index if hasattr(data, "task") else 0
                self.touches.append(Touch(task, self._stage, train, indices.clone()))

            if train not in made:
                made[train] = _Watched(samples(train=train), note)
            return made[train]

        data.samples = watched  # type: ignore[method-assign]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, ContinualStrategy)
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        value = float(loss) if isinstance(loss, Tensor) else float("nan") if loss is None else float(loss)
        where = (pl_module.task.index, trainer.datamodule.phase_index, pl_module.epoch, batch_idx)  # type: ignore[attr-defined]
        parts = (part.detach().cpu().clone() for part in (batch.indices, batch.labels, batch.tasks))
        self.steps.append(Step(*where, value, *parts))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stage = "validate"

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stage = "train"

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The driver of the loop comes before this callback: what ends a task is over.
        self._stage = "evaluate"

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stage = "train"


def detached(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Copies of the tensors of a ``state_dict``, on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in state.items() if isinstance(value, Tensor)}


_runs = count(1)


@contextmanager
def _apart() -> Iterator[None]:
    """Run with one thread and without messages; restore the states of the global random generators at the end."""
    threads = torch.get_num_threads()
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), isolate_rng():
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _seed_globals(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def run(
    subject: Subject,
    *,
    folder: Path | None = None,
    resume: str | Path | None = None,
    kill_at: SavePoint | None = None,
    copy_at: SavePoint | None = None,
    copy_to: Path | None = None,
    last_task: int | None = None,
    processes: int = 1,
    **options: Any,
) -> Outcome:
    """Learn the stream, or a part of it: up to ``last_task``, or up to ``kill_at``, where the run crashes.

    The global random generators have another state at each call. A strategy that draws from them where the loop has
    not seeded them therefore gives another result at each call.

    Args:
        subject: The strategy, its data and options.
        folder: Run folder; None to write nothing.
        resume: Checkpoint to resume from, or ``last``.
        kill_at: Crash right after the checkpoint at this position.
        copy_at: Copy the run folder right after the checkpoint at this position.
        copy_to: Folder for this copy, from which another run can resume as if this one had crashed.
        last_task: Stop after this task.
        processes: World size; the other processes are running already.
        options: Options of the Trainer.
    """
    with _apart():
        _seed_globals(subject.seed)
        strategy, callbacks, data = subject.factory(), subject.callbacks(), subject.data()
        _seed_globals(0xC0FFEE + next(_runs))
        probe = _Probe()
        probe.watch(data)
        trainer = Trainer(
            **{
                "accelerator": subject.accelerator,
                "devices": processes,
                "strategy": "ddp" if processes > 1 else "auto",
                "max_epochs": subject.epochs,
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "num_sanity_val_steps": 0,
                "log_every_n_steps": 1,
                "use_distributed_sampler": False,
                "callbacks": [*callbacks, probe],
                **options,
            }
        )
        every = LoopOptions(
            save_every_n_steps=1,
            save_every_seconds=0.0,
            stop_after_task=last_task,
            nan_loss="ignore",  # for a check to find
            dry_run=False,
        )
        loop = _Loop(
            trainer,
            strategy,
            data,
            options=every,
            run_dir=folder,
            seed=subject.seed,
            kill_at=kill_at,
            copy_at=copy_at,
            copy_to=copy_to,
            probe=probe,
        )
        with suppress(KilledError):
            loop.fit(resume)
        for point in (kill_at, copy_at):
            if point is not None and point not in loop.snapshots:
                raise AssertionError(f"{subject.name}: the run never came by the checkpoint {point}")
        states = {callback.state_key: copy.deepcopy(callback.state_dict()) for callback in callbacks}
        return Outcome(
            state=detached(strategy.state_dict()),
            callbacks={key: state for key, state in states.items() if state},
            matrix=loop.matrix.state_dict(),
            kept=dict(loop.results()["cost"]["bytes_kept"]),
            global_step=trainer.global_step,
            snapshots=loop.snapshots,
            steps=probe.steps,
            touches=probe.touches,
            strategy=strategy,
            stream=loop.stream,
            target_kind=data.target_kind,
        )


def places(snapshots: Iterable[SavePoint], *, every: bool = False) -> list[SavePoint]:
    """Checkpoints at which to kill a run, in order.

    Args:
        snapshots: All checkpoints of the run.
        every: Whether to return all of them; otherwise three in the middle of epochs and one of each other kind, spread
            over the tasks.
    """
    points = list(snapshots)
    if every:
        return [point for point in points if point.kind != "task" or point.task < points[-1].task]
    chosen: set[SavePoint] = set()
    tasks = sorted({point.task for point in points})
    for kind, task, which in (
        ("step", tasks[0], 0),
        ("task", tasks[0], 0),
        ("step", tasks[min(1, len(tasks) - 1)], -1),
        ("epoch", tasks[min(1, len(tasks) - 1)], 0),
        ("phase", tasks[min(1, len(tasks) - 1)], -1),
        ("step", tasks[-1], -1),
    ):
        found = [point for point in points if (point.kind, point.task) == (kind, task)]
        chosen |= {found[which]} if found else set()
    return [point for point in points if point in chosen]
