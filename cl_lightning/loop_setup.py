"""What the task loop asks of its options, the Trainer and the callbacks; what does not fit is told before training."""

import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from cl_lightning.finite import NanLoss
from cl_lightning.strategy import ContinualStrategy
from cl_lightning.stream import Stream

_CXX = ((os.environ.get("CXX") or "g++").split()[0], "clang++")
_PRECISIONS = ("32-true", "32", "bf16-mixed", "16-mixed")


@dataclass(frozen=True)
class LoopOptions:
    """How a stream is gone through.

    Attributes:
        first_task_epochs: Epochs of the first task where they differ from ``trainer.max_epochs``.
        phase_epochs: Epochs of phases by their name, over what the strategy asks for.
        save_every_n_steps: Write a checkpoint after every so many steps, beside those between epochs.
        save_every_seconds: Least time between two checkpoints at ends of epochs; 0 to write one after each epoch.
        keep_last: Keep the last so many checkpoints, ``last.ckpt``, ``last-1.ckpt``, ...: if the last one is damaged,
            the run goes on from the one before.
        keep_tasks: Keep the checkpoints of the last so many finished tasks; None for all of them.
        stop_after_task: End the run after the task of this index; it can be continued later.
        nan_loss: ``stop`` a run whose loss is nan or infinite, ``skip`` steps whose gradients are, or ``ignore`` it.
        channels_last: Lay images and the weights of convolutions out with the channels last, which is faster for most
            convolutional networks, on CPU and GPU; results are the same up to rounding.
        compile: Backend of ``torch.compile`` for the backbones, such as ``inductor``; None to compile nothing. Heads
            are not compiled, so that nothing is compiled anew when they grow. On a CPU it seldom pays.
        feature_cache: Folder for the features of a backbone that does not change any more, so that each image passes
            through it once, in all runs with it; ``memory`` to keep them as long as the run lasts; None to keep none.
        feature_views: Augmented views of each training image whose features are kept beside those of the plain image:
            epoch e trains on view e mod feature_views. 0 to augment anew in each epoch, by a pass of each image.
        feature_cache_gb: Most that the folder, and what is kept in memory, may grow to, in 10^9 bytes.
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

    def __post_init__(self) -> None:
        epochs = {"first_task_epochs": self.first_task_epochs, **self.phase_epochs}
        for name, value in epochs.items():
            if value is not None and value < 1:
                raise ValueError(f"loop: epochs of {name!r} are {value}; they must be at least 1")
        if self.save_every_n_steps is not None and self.save_every_n_steps < 1:
            raise ValueError(f"loop: save_every_n_steps is {self.save_every_n_steps}; it must be at least 1, or null")
        if self.keep_last < 1:
            raise ValueError(f"loop: keep_last is {self.keep_last}; at least 1 checkpoint is kept")
        if self.keep_tasks is not None and self.keep_tasks < 0:
            raise ValueError(f"loop: keep_tasks is {self.keep_tasks}; it must be at least 0, or null")
        if self.nan_loss not in get_args(NanLoss):
            raise ValueError(f"loop: nan_loss is {self.nan_loss!r}; use 'stop', 'skip' or 'ignore'")
        if self.compile is not None and self.compile not in (known := _compilers()):
            raise ValueError(f"loop: compile is {self.compile!r}; torch here has {', '.join(known)}, or null for none")
        if self.feature_views < 0 or (self.feature_views and self.feature_cache is None):
            raise ValueError(
                f"loop: feature_views is {self.feature_views} and feature_cache {self.feature_cache}; at least 0, and "
                "above 0 with a folder, or 'memory', to keep the features in"
            )
        if not self.feature_cache_gb > 0:
            raise ValueError(f"loop: feature_cache_gb is {self.feature_cache_gb}; it must be above 0, such as 8")
        if self.stop_after_task is not None and self.stop_after_task < 0:
            raise ValueError(f"loop: stop_after_task is {self.stop_after_task}; give the index of a task, or null")


def _compilers() -> list[str]:
    import torch._dynamo  # slow to import, and for those only who compile

    return list(torch._dynamo.list_backends(exclude_tags=()))


def check_trainer(trainer: Trainer, options: LoopOptions) -> int:
    """Set a Trainer up for a stream.

    Returns:
        Epochs per task.

    Raises:
        ValueError: If it is given options that a stream cannot be learnt with.
    """
    if trainer.max_epochs is None or trainer.max_epochs < 1:
        raise ValueError(f"trainer.max_epochs is {trainer.max_epochs}; it is the number of epochs per task, at least 1")
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise ValueError(
            "trainer.fast_dev_run takes no stream to its end; for a quick look use trainer.max_epochs 1 and "
            "trainer.limit_train_batches 2"
        )
    if trainer.max_steps != -1:
        raise ValueError(
            f"trainer.max_steps is {trainer.max_steps}; it would count over the whole stream: use "
            "trainer.max_epochs, or trainer.limit_train_batches for fewer steps per epoch"
        )
    if trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
        raise ValueError("trainer.reload_dataloaders_every_n_epochs must stay 0: loaders are made per phase")
    if str(trainer.precision) not in _PRECISIONS:
        raise ValueError(
            f"trainer.precision is {trainer.precision!r}; images are normalised in single precision, so use one of "
            f"{', '.join(_PRECISIONS)}"
        )
    cpu = trainer.strategy.root_device.type == "cpu"
    if options.compile == "inductor" and cpu and not any(map(shutil.which, _CXX)):
        raise ValueError("loop: compile is 'inductor', which needs a C++ compiler on the CPU, such as g++; set CXX")
    kind = trainer.strategy
    spawned = isinstance(kind, DDPStrategy) and kind._start_method != "popen"
    if spawned or not isinstance(kind, (DDPStrategy, SingleDeviceStrategy)):
        raise ValueError(
            f"trainer.strategy {type(kind).__name__} keeps its state where a next task cannot find it; use "
            "'auto' or 'ddp' (also 'ddp_find_unused_parameters_true')"
        )
    if isinstance(kind, DDPStrategy):
        # Statistics of normalisation layers are averaged between epochs instead (see _Driver). Sent with every
        # forward pass, they would carry prototypes with them, and those of the first process would win.
        kind._ddp_kwargs.setdefault("broadcast_buffers", False)
    trainer._accelerator_connector.use_distributed_sampler = False  # batches are shared out by the data module
    return trainer.max_epochs


def check_phases(strategy: ContinualStrategy, stream: Stream, phase_epochs: Mapping[str, int]) -> None:
    """Tell of epochs for a phase that no task has, and of phases that a stream has not got the data for."""
    names = [strategy.phase_names(task) for task in stream.tasks] if stream.one_pass else []
    if several := next((phases for phases in names if len(phases) > 1), None):
        warnings.warn(
            f"loop: samples of this stream are seen once, but a task of {type(strategy).__name__} has the "
            f"phases {', '.join(several)}: each goes through its data once",
            stacklevel=2,
        )
    known = {name for task in stream.tasks for name in strategy.phase_names(task)} if phase_epochs else set()
    for name in phase_epochs:
        if name not in known:
            raise ValueError(
                f"loop: phase_epochs names a phase {name!r}; {type(strategy).__name__} has "
                f"{', '.join(sorted(known)) or 'none'}"
            )


def check_watched(trainer: Trainer, strategy: ContinualStrategy, stream: Stream) -> None:
    """Tell of callbacks that watch a validation metric which will not be there."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        watched = getattr(callback, "monitor", None) or ""
        if not isinstance(callback, (EarlyStopping, ModelCheckpoint)) or not watched.startswith("val"):
            continue
        name = type(callback).__name__
        own = type(strategy).__module__.startswith("cl_lightning.")  # others may log what they like
        if own and watched not in ("val/accuracy", "val/loss"):
            raise ValueError(f"{name}: monitor is {watched!r}; of validation there are val/accuracy and val/loss")
        if not any(len(part) for part in stream.val):
            raise ValueError(
                f"{name}: monitor is {watched!r}, and there are no validation samples; give --data.val_fraction 0.1"
            )
