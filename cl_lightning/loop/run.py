"""Position of a run in its stream, and restoring of stream, strategy and callbacks from a checkpoint."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.flop_counter import FlopCounterMode

from cl_lightning.batch import ImageShape
from cl_lightning.datamodules.base import ContinualDataModule
from cl_lightning.loop.checkpoint_parts import named
from cl_lightning.loop.options import LoopOptions
from cl_lightning.measures import AccuracyMatrix, CostMeter
from cl_lightning.models import example
from cl_lightning.strategy import ContinualStrategy
from cl_lightning.stream import Stream, Task


def flops_per_image(strategy: ContinualStrategy, image_shape: ImageShape) -> int | None:
    """Floating-point operations of the prediction of one sample; a multiplication and an addition count as two.

    ``torch.utils.flop_counter`` counts matrix products, convolutions and attention in one forward pass. Sums,
    activations and normalisation, a few percent of a network, are not counted. The result is None if nothing was
    counted, for example for a compiled network, or if the network cannot predict an image of zeros.
    """
    image = example(strategy.network.backbone, 1, image_shape).to(strategy.device)
    devices = [image.device] if image.device.type == "cuda" else []
    counter = FlopCounterMode(display=False)
    with torch.random.fork_rng(devices=devices), torch.no_grad(), counter:
        try:
            strategy.predict(image)
        except (RuntimeError, ValueError, NotImplementedError):  # an unknown cost must not end a run
            return None
    return int(counter.get_total_flops()) or None


@dataclass(frozen=True)
class Position:
    """Position of a run in its stream.

    Attributes:
        task: Index of the task.
        phase: Index of the phase; the number of phases when all phases are over and ``end_task`` comes next.
        running: Whether the phase has begun, so that its fit is resumed and not started.
        origin: Epoch of the Trainer at which the phase began.
        done: Whether the task is over and evaluated.
        learnt: Whether ``end_task`` is over, so that the evaluation comes next.
    """

    task: int = 0
    phase: int = 0
    running: bool = False
    origin: int = 0
    done: bool = False
    learnt: bool = False


def begin_task(strategy: ContinualStrategy, task: Task, stream: Stream) -> None:
    """Prepare a strategy for a task: its columns, its head, and the names of the classes for a head that needs them."""
    strategy.network.head.check_room(stream.tasks[-1].num_seen)
    strategy.data.stream = stream
    strategy.mark_columns(task)
    strategy.begin_task(task)
    if (head := strategy.network.head).needs_names:
        head.fill_names(stream.class_names[: head.num_columns])


def check_processes(saved: Mapping[str, Any], processes: int) -> None:
    """Warn if a run is resumed with another number of processes than its checkpoint was written with."""
    before = saved["cl_lightning"].get("processes", processes)
    if before != processes:
        rank_zero_warn(
            f"the checkpoint is of a run with {before} process{'es' if before > 1 else ''}, this one has {processes}; "
            "the results may differ from those of an uninterrupted run by rounding, by the random numbers of dropout, "
            "and by batch normalisation, whose statistics are those of the samples of each process"
        )


def extended_stream(saved: Mapping[str, Any], data: ContinualDataModule, seed: int, path: Path | None) -> Stream:
    """The stream of a checkpoint, extended by tasks for the classes that the data have gained since.

    Args:
        saved: Content of the checkpoint.
        data: Data of the stream.
        seed: Seed of the run.
        path: File of the checkpoint, for messages.

    Raises:
        ValueError: If the checkpoint is of another stream.
    """
    with named(path):
        earlier = Stream.from_dict(json.loads(saved["cl_lightning"]["manifest"]))
        data.load_state_dict(saved.get(type(data).__qualname__, {}))
        expected_hashes = saved["cl_lightning"]["fingerprints"]
        if (place := saved["cl_lightning"]["place"]["task"]) >= len(earlier.tasks):
            raise ValueError(f"its part place is in task {place}, of {len(earlier)}")
    stream = data.make_stream(seed, earlier)
    for index, expected in enumerate(expected_hashes):
        if index < len(stream.tasks) and data.fingerprint(index) != expected:
            raise ValueError(
                f"the checkpoint is of another stream: task {index} ({stream.tasks[index].name}) has other classes or "
                "other samples than in that run; give the data, class order and seed of that run"
            )
    return stream


def restore(strategy: ContinualStrategy, trainer: Trainer, saved: Mapping[str, Any]) -> None:
    """Load the state of a strategy, whose network is built, and of the callbacks from a checkpoint.

    Raises:
        ValueError: If the checkpoint was written by another strategy or with another network.
    """
    mine, its = _class_path(strategy), saved["cl_lightning"]["strategy"]
    if its != mine:
        raise ValueError(f"the checkpoint is of another strategy: {its}, not {mine}")
    try:
        strategy.load_state_dict(saved["state_dict"])
    except RuntimeError as error:
        first = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise ValueError(f"the checkpoint is of another network or other options: {first}") from error
    if strategy.task_columns.ndim != 2:
        raise ValueError(f"its part task_columns has {strategy.task_columns.ndim} dimensions instead of 2")
    if (terms := saved["cl_lightning"].get("terms")) is not None:
        strategy.terms.load_state_dict(terms, strategy.device)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if (state := saved["callbacks"].get(callback.state_key)) is not None:
            callback.load_state_dict(state)


def _class_path(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


class Run(Protocol):
    """Attributes of a run that results and loggers read; ``TaskLoop`` has them.

    Attributes:
        trainer, strategy, datamodule, options: Arguments of the loop.
        run_dir: Folder of the run; None to write nothing.
        seed, config: Seed of the run, and its configuration as YAML without secrets.
        recorded: In place of a configuration, the options of a run that was made in Python.
        option_changes: Options with which the run was resumed and that differ from its checkpoint.
        stream: Tasks of the run.
        matrix: Accuracies so far.
        meter: Costs so far.
        measured: Measures of each finished task.
        fingerprints: Hash of the data of each task.
        own_callbacks: Callbacks that the loop added.
        optimizers: Names and options of the optimizers of the last fit.
    """

    trainer: Trainer
    strategy: ContinualStrategy
    datamodule: ContinualDataModule
    options: LoopOptions
    run_dir: Path | None
    seed: int
    config: str
    recorded: str
    option_changes: list[dict[str, Any]]
    stream: Stream
    matrix: AccuracyMatrix
    meter: CostMeter
    measured: list[dict[str, float]]
    fingerprints: list[str]
    own_callbacks: tuple[Callback, ...]

    @property
    def optimizers(self) -> list[dict[str, Any]]: ...
