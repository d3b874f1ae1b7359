"""Options of the task loop, and checks of options, Trainer, strategy and callbacks before training starts."""

import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn

from cl_lightning.checks import above, at_least, one_of
from cl_lightning.datamodules.base import ContinualDataModule
from cl_lightning.lightning_private import keep_buffers_local, use_own_sampler
from cl_lightning.loop.lightning_support import check_support
from cl_lightning.loop.nan_guard import NanLoss
from cl_lightning.memory import HerdingPolicy, Memory
from cl_lightning.strategies.base import request_problem
from cl_lightning.strategies.base.evaluation import METRICS, check_monitor
from cl_lightning.strategy import ContinualStrategy
from cl_lightning.stream import Stream

_CXX = ((os.environ.get("CXX") or "g++").split()[0], "clang++")
_OWN_NAME = re.compile(r"last(-\d+)?|task_\d+")


@dataclass(frozen=True)
class LoopOptions:
    """Options of a run over a stream.

    Attributes:
        first_task_epochs: Epochs of the first task; None for ``trainer.max_epochs``.
        phase_epochs: Epochs of phases by name; they override the epochs that the strategy gives.
        save_every_n_steps: Interval, in optimizer steps, of checkpoints within an epoch, in addition to the checkpoints
            between epochs; None for no such checkpoints.
        save_every_seconds: Minimum time between two checkpoints at ends of epochs, in seconds; 0 to write one after
            each epoch.
        keep_last: Number of checkpoints to keep (``last.ckpt``, ``last-1.ckpt``, ...), at least 1. If the last one is
            damaged, the run resumes from the one before.
        keep_tasks: Number of finished tasks whose checkpoints are kept, newest first; None for all tasks.
        stop_after_task: Index of the task after which the run ends; it can be resumed later. None for the last task.
        nan_loss: What to do if the loss is NaN or infinite: ``stop`` the run, ``skip`` steps whose gradients are not
            finite, or ``ignore`` it.
        channels_last: Whether images and the weights of convolutions have the memory format ``channels_last``, which is
            faster for most convolutional networks on CPU and GPU. Results are the same up to rounding.
        compile: Backend of ``torch.compile`` for the backbones, such as ``inductor``; None to compile nothing. Heads
            are not compiled, because they would be compiled again each time they grow. On a CPU compilation rarely
            makes a run faster.
        feature_cache: Folder for the features of a backbone that does not change any more. Each image then passes
            through the backbone once, in all runs that use the folder. ``memory`` keeps the features until the run
            ends; None stores none.
        feature_views: Number of augmented views of each training image whose features are stored in addition to the
            features of the image without augmentation. Epoch e trains on view e mod feature_views. 0 to augment each
            image again in each epoch, with a forward pass for each image.
        feature_cache_gb: Maximum size of the folder, and of the features in memory, in 10^9 bytes, above 0.
        dry_run: Whether the first two tasks of a new run are tried on copies with two images each, so that parts that
            do not fit are reported before training. Turn it off for a method whose hooks have effects outside of it,
            such as files that it writes.
    """

    first_task_epochs: int | None = None
    phase_epochs: dict[str, int] = field(default_factory=dict)
    save_every_n_steps: int | None = None
    save_every_seconds: float = 60.0
    keep_last: int = 2
    keep_tasks: int | None = 1
    stop_after_task: int | None = None
    nan_loss: NanLoss = "stop"
    channels_last: bool = False
    compile: str | None = None
    feature_cache: str | None = None
    feature_views: int = 0
    feature_cache_gb: float = 8.0
    dry_run: bool = True

    def __post_init__(self) -> None:
        epochs: dict[str, Any] = {f"phase_epochs.{name}": value for name, value in self.phase_epochs.items()}
        at_least("loop", 1, optional=True, first_task_epochs=self.first_task_epochs)
        at_least("loop", 1, **epochs)
        at_least("loop", 1, optional=True, save_every_n_steps=self.save_every_n_steps)
        at_least("loop", 1, keep_last=self.keep_last)
        at_least("loop", 0, optional=True, keep_tasks=self.keep_tasks, stop_after_task=self.stop_after_task)
        one_of("loop", get_args(NanLoss), nan_loss=self.nan_loss)
        if self.compile is not None:
            one_of("loop", _compilers(), optional=True, compile=self.compile)
        at_least("loop", 0, feature_views=self.feature_views)
        if self.feature_views and self.feature_cache is None:
            raise ValueError(
                f"loop: feature_views is {self.feature_views} and feature_cache null; give feature_cache a folder or "
                "'memory', or set feature_views to 0"
            )
        above("loop", 0, feature_cache_gb=self.feature_cache_gb)


def _compilers() -> list[str]:
    import torch._dynamo  # slow to import, and only needed to compile

    return list(torch._dynamo.list_backends(exclude_tags=()))


def check_trainer(trainer: Trainer, options: LoopOptions) -> int:
    """Check the options of a Trainer, and prepare it for a stream.

    Returns:
        Epochs per task.

    Raises:
        ValueError: If an option of the Trainer does not work with a stream.
    """
    check_support(trainer)
    cpu = trainer.strategy.root_device.type == "cpu"
    if options.compile == "inductor" and cpu and not any(map(shutil.which, _CXX)):
        raise ValueError("loop: compile is 'inductor', which needs a C++ compiler on the CPU, such as g++; set CXX")
    if isinstance(trainer.strategy, DDPStrategy):
        # Statistics of normalisation layers are averaged between epochs instead (see LoopHooks). A broadcast of
        # buffers at every forward pass would include prototypes, and overwrite the buffers of all other processes.
        keep_buffers_local(trainer.strategy)
    use_own_sampler(trainer)
    assert trainer.max_epochs is not None
    return trainer.max_epochs


def check_phases(strategy: ContinualStrategy, stream: Stream, phase_epochs: Mapping[str, int]) -> None:
    """Check the names of ``phase_epochs``; warn if several phases of a task share samples that are seen once.

    Raises:
        ValueError: If ``phase_epochs`` names a phase that no task has.
    """
    phases = [strategy.phases(task) for task in stream.tasks]
    names = [[phase.name for phase in each] for each in phases]
    on_data = [[phase.name for phase in each if not phase.on_memory] for each in phases]
    if stream.one_pass and (several := next((each for each in on_data if len(each) > 1), None)):
        warnings.warn(
            f"loop: samples of this stream are seen once, but a task of {type(strategy).__name__} has the "
            f"phases {', '.join(several)}: each phase takes one pass over its data",
            stacklevel=2,
        )
    known = {name for phases in names for name in phases}
    for name in phase_epochs:
        if name not in known:
            raise ValueError(
                f"loop: phase_epochs names a phase {name!r}; {type(strategy).__name__} has "
                f"{', '.join(sorted(known)) or 'none'}"
            )


def check_kinds(strategy: ContinualStrategy, datamodule: ContinualDataModule) -> None:
    """Check that a strategy takes the samples and targets of the data, before its network is built for them.

    Raises:
        ValueError: If it does not.
    """
    name, traits = type(strategy).__name__, strategy.traits
    for what, kind, taken in (
        ("inputs", datamodule.input_kind, traits.inputs),
        ("targets", datamodule.target_kind, traits.targets),
    ):
        if kind not in taken:
            raise ValueError(
                f"{name} takes {what} of the kind {' or '.join(taken)}, {type(datamodule).__name__} gives {kind}; use "
                "other data, or another strategy"
            )


def check_network(strategy: ContinualStrategy, datamodule: ContinualDataModule) -> None:
    """Check that backbone and head are made for the samples and the targets.

    Raises:
        ValueError: If they are not.
    """
    _check_pixels(strategy, datamodule)
    _check_tokens(strategy, datamodule)


def _check_pixels(strategy: ContinualStrategy, datamodule: ContinualDataModule) -> None:
    """Check that backbone and head are made for the target: classes of pixels, or one output for a sample.

    Raises:
        ValueError: If one of them is not.
    """
    needed = datamodule.target_kind == "pixels"
    for part in (strategy.network.backbone, strategy.network.head):
        if getattr(part, "for_pixels", False) != needed:
            remedy = "a backbone such as ConvPixels and the head PixelHead" if needed else "another backbone or head"
            raise ValueError(
                f"{type(part).__name__} is {'not ' if needed else ''}made for classes of pixels, and the target of "
                f"{type(datamodule).__name__} is {datamodule.target_kind}; use {remedy}"
            )


def _check_tokens(strategy: ContinualStrategy, datamodule: ContinualDataModule) -> None:
    """Check that the backbone has an embedding of each token of the data.

    Raises:
        ValueError: If a token is too large.
    """
    for module in strategy.network.backbone.modules():
        vocabulary = getattr(module, "vocabulary", None)
        if not isinstance(vocabulary, int):
            continue
        for train in (True, False):
            largest = getattr(datamodule.samples(train=train), "largest", None)
            if largest is not None and largest >= vocabulary:
                raise ValueError(
                    f"{type(module).__name__}: vocabulary is {vocabulary}, and the {'training' if train else 'test'} "
                    f"samples have the token {largest}; give a vocabulary of at least {largest + 1}"
                )


def check_fit(strategy: ContinualStrategy, stream: Stream) -> None:
    """Check that the traits of a strategy fit the stream.

    Raises:
        ValueError: If the strategy does not support streams of this kind, or optimises manually.
    """
    name, traits = type(strategy).__name__, strategy.traits
    if not strategy.automatic_optimization:
        raise ValueError(
            f"{name}: automatic_optimization is False, which is not supported: return the loss from losses(), and "
            "change gradients in edit_gradients()"
        )
    later = [task for task in stream.tasks[1:] if task.learns]
    kinds = {
        "class-incremental": any(task.num_new for task in later),
        "domain-incremental": any(not task.num_new for task in later),
        "online": stream.one_pass,
    }
    for kind, present in kinds.items():
        if present and kind not in traits.scenarios:
            reason = next((f" (task {task.index} brings no new class)" for task in later if not task.num_new), "")
            raise ValueError(
                f"{name} does not take {kind} streams{reason if kind == 'domain-incremental' else ''}; it takes "
                f"{', '.join(traits.scenarios)}; {traits.remedy or 'use another scenario, or another strategy'}"
            )


def check_requests(strategy: ContinualStrategy, stream: Stream) -> None:
    """Check that a strategy serves the requests of the stream to hold, keep and forget samples.

    Raises:
        ValueError: If it cannot forget, or not what a request asks for.
    """
    if (problem := request_problem(strategy, stream)) is not None:
        raise ValueError(problem)


def check_balance(strategy: ContinualStrategy, datamodule: ContinualDataModule, stream: Stream) -> None:
    """Check that a balanced sampler and class weights have an effect on what a strategy trains.

    Raises:
        ValueError: If no task has a phase of the kind in which they have one.
    """
    phases = [phase for task in stream.tasks for phase in strategy.phases(task)]
    name = type(strategy).__name__
    if datamodule.sampler == "balanced" and all(phase.features is not None for phase in phases):
        raise ValueError(f"{name} takes no step on images, so that data.sampler balanced has no effect; remove it")
    if datamodule.class_weights is not None and not phases:
        raise ValueError(f"{name} takes no gradient step, so that data.class_weights has no effect; remove it")


def check_watched(trainer: Trainer, strategy: ContinualStrategy, stream: Stream) -> None:
    """Check that the validation metrics that callbacks monitor will exist.

    Every callback with an attribute ``monitor`` is checked; schedules are checked when they are built.

    Raises:
        ValueError: If there are no validation samples, or if a strategy of this package does not log the metric.
    """
    own = type(strategy).__module__.startswith("cl_lightning.")  # other strategies may log further metrics
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(watched := getattr(callback, "monitor", None), str):
            continue
        name = type(callback).__name__
        check_monitor(name, watched, stream, only=METRICS if own else ())
        if watched.startswith("val") and trainer.limit_val_batches == 0:
            raise ValueError(f"{name}: monitor is {watched!r}, but trainer.limit_val_batches is 0; give at least 1")


def check_memory(strategy: ContinualStrategy, stream: Stream) -> None:
    """Warn, once and before training, if a memory of samples is smaller than the number of classes or of lists."""
    for module in strategy.modules():
        if not isinstance(module, Memory):
            continue
        lists = isinstance(module.policy, HerdingPolicy)
        count = sum(len(task.classes) for task in stream.tasks) if lists else len(stream.order)
        if module.size >= count or (module.size == 0 and not lists):  # a reservoir of 0 samples is no memory
            continue
        what = f"{count} lists of exemplars" if lists and count != len(stream.order) else f"{count} classes"
        rank_zero_warn(
            f"give --model.memory_size {20 * count}, or at least {count}: the memory of {type(strategy).__name__} has "
            f"{module.size} samples for {what}, so that at least {count - module.size} of them have no exemplar; a "
            "method that classifies by exemplars never predicts such a class"
        )


def check_names(trainer: Trainer, folder: Path) -> None:
    """Check that no ``ModelCheckpoint`` writes files with the names of the run's own checkpoints into their folder.

    Args:
        trainer: Trainer of the run.
        folder: Folder of the run's own checkpoints, in which ``ModelCheckpoint`` writes by default.

    Raises:
        ValueError: If a ``ModelCheckpoint`` could replace a checkpoint from which the run is resumed.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, ModelCheckpoint):
            continue
        if callback.dirpath is not None and Path(callback.dirpath).resolve() != folder.resolve():
            continue
        names = [callback.filename or "", *([callback.CHECKPOINT_NAME_LAST] if callback.save_last else [])]
        if (name := next((name for name in names if _OWN_NAME.fullmatch(name)), None)) is not None:
            remedy = "filename" if name == callback.filename else "dirpath, or leave save_last out"
            raise ValueError(
                f"{type(callback).__name__}: {name}.ckpt is a name of the run's own checkpoints, which are written in "
                f"any case; give another {remedy}"
            )
