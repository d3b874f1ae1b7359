"""What of Lightning works with a stream: one table of callbacks and one of options of the Trainer.

A stream is many fits of one Trainer, whose counters of epochs and steps run on. What Lightning offers starts again with
each fit, or measures the whole run, or is refused before training with what to use instead.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch import callbacks as of_lightning
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler, XLAProfiler
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from cl_lightning.lightning_private import is_spawned, set_properties
from cl_lightning.loop.checkpoint import CheckpointFiles

_PRECISIONS = ("32-true", "32", "bf16-mixed", "16-mixed")
_AVERAGES = "it counts the epochs or steps of one fit; use the callback EMAEnsemble"
_FREEZES = "it counts the epochs of one fit; use --model.freeze_backbone true, or Phase.freezes in a method of your own"

CALLBACKS: Mapping[type[Callback], str | None] = {
    Callback: None,
    of_lightning.BackboneFinetuning: _FREEZES,
    of_lightning.BaseFinetuning: _FREEZES,
    of_lightning.BasePredictionWriter: None,
    of_lightning.BatchSizeFinder: "it would change the batch size of the first fit alone; use --data.batch_size",
    of_lightning.Checkpoint: None,
    of_lightning.DeviceStatsMonitor: None,
    of_lightning.EarlyStopping: None,  # starts again with each phase and ends it
    of_lightning.GradientAccumulationScheduler: (
        "it counts the epochs of one fit; use --trainer.accumulate_grad_batches, which is the same in all epochs"
    ),
    of_lightning.LambdaCallback: None,
    of_lightning.LearningRateFinder: (
        "it would train before the first task and set the learning rate of one fit; use --model.optimizer.lr"
    ),
    of_lightning.LearningRateMonitor: None,
    of_lightning.ModelCheckpoint: None,  # with a monitor: the best of each phase
    of_lightning.ModelPruning: (
        "it renames the weights of a network that grows; use torch.nn.utils.prune on the network of the finished run"
    ),
    of_lightning.ModelSummary: None,
    of_lightning.OnExceptionCheckpoint: (
        "the Trainer would load its file at the start of each fit; use --loop.save_every_n_steps, and resume with "
        "--ckpt_path last"
    ),
    of_lightning.ProgressBar: None,
    of_lightning.RichModelSummary: None,
    of_lightning.RichProgressBar: None,
    of_lightning.SpikeDetection: (
        "the first loss of a new task would be a spike; use --loop.nan_loss stop or skip for losses that are not finite"
    ),
    of_lightning.StochasticWeightAveraging: _AVERAGES,
    of_lightning.ThroughputMonitor: None,
    of_lightning.Timer: None,  # measures all fits together, and ends the run
    of_lightning.TQDMProgressBar: None,
    of_lightning.EMAWeightAveraging: _AVERAGES,
    of_lightning.WeightAveraging: _AVERAGES,
}
"""Callbacks of Lightning: None if they work with a stream, else the reason why they do not, and what to use. The entry
of the nearest base class holds for a class that is not in the table."""


def _max_epochs(trainer: Any) -> str | None:
    if trainer.max_epochs is None or trainer.max_epochs < 1:
        return f" is {trainer.max_epochs}; it is the number of epochs per task, at least 1"
    return None


def _fast_dev_run(trainer: Any) -> str | None:
    if trainer.fast_dev_run:
        return (
            " does not work with a stream; for a short run use trainer.max_epochs 1 and trainer.limit_train_batches 2"
        )
    return None


def _max_steps(trainer: Any) -> str | None:
    if trainer.max_steps != -1:
        return (
            f" is {trainer.max_steps}; it would count over the whole stream: use trainer.max_epochs, or "
            "trainer.limit_train_batches for fewer steps per epoch"
        )
    return None


def _min_steps(trainer: Any) -> str | None:
    if trainer.min_steps:
        return f" is {trainer.min_steps}; it would count over the whole stream: use trainer.min_epochs, per phase"
    return None


def _reload(trainer: Any) -> str | None:
    if trainer.reload_dataloaders_every_n_epochs:
        return " must stay 0: loaders are created for each phase"
    return None


def _precision(trainer: Any) -> str | None:
    if str(trainer.precision) not in _PRECISIONS:
        return (
            f" is {trainer.precision!r}; images are normalised in single precision, so use one of "
            f"{', '.join(_PRECISIONS)}"
        )
    return None


def _strategy(trainer: Any) -> str | None:
    kind = trainer.strategy
    spawned = isinstance(kind, DDPStrategy) and is_spawned(kind)
    if spawned or not isinstance(kind, (DDPStrategy, SingleDeviceStrategy)):
        return (
            f" {type(kind).__name__} does not keep its state in this process, where the next task needs it; use 'auto' "
            "or 'ddp' (also 'ddp_find_unused_parameters_true')"
        )
    return None


def _profiler(trainer: Any) -> str | None:
    if isinstance(trainer.profiler, (SimpleProfiler, AdvancedProfiler, PyTorchProfiler, XLAProfiler)):
        return (
            f" {type(trainer.profiler).__name__} ends with the first fit; use cProfile or torch.profiler around the "
            "run; the seconds of each task are in results.json"
        )
    return None


def _overfit(trainer: Any) -> str | None:
    if trainer.overfit_batches:
        return (
            f" is {trainer.overfit_batches}; it would replace the loaders of the stream: use "
            "trainer.limit_train_batches for fewer steps per epoch"
        )
    return None


def _limit(name: str, remedy: str) -> Callable[[Any], str | None]:
    def check(trainer: Any) -> str | None:
        return f" is 0; {remedy}" if getattr(trainer, name) == 0 else None

    return check


BAREBONES = (
    " leaves out what the run writes; use trainer.logger false, trainer.enable_progress_bar false and "
    "trainer.enable_checkpointing false"
)


def _barebones(trainer: Any) -> str | None:
    return BAREBONES if trainer.barebones else None


def _plugins(trainer: Any) -> str | None:
    files = trainer.strategy.checkpoint_io
    if type(files) not in (TorchCheckpointIO, CheckpointFiles):
        return f" has {type(files).__name__}; the run writes its checkpoints itself: leave it out"
    return None


TRAINER: Mapping[str, Callable[[Any], str | None] | None] = {
    "accelerator": None,
    "strategy": _strategy,
    "devices": None,
    "num_nodes": None,
    "precision": _precision,
    "logger": None,
    "callbacks": None,  # see CALLBACKS
    "fast_dev_run": _fast_dev_run,
    "max_epochs": _max_epochs,
    "min_epochs": None,  # per phase
    "max_steps": _max_steps,
    "min_steps": _min_steps,
    "max_time": None,  # see Timer
    "limit_train_batches": _limit("limit_train_batches", "nothing would be trained: give at least 1"),
    "limit_val_batches": None,
    "limit_test_batches": _limit("limit_test_batches", "a task ends with its evaluation: give at least 1"),
    "limit_predict_batches": None,
    "overfit_batches": _overfit,
    "val_check_interval": None,
    "check_val_every_n_epoch": None,  # counts the epochs of the whole stream
    "num_sanity_val_steps": None,
    "log_every_n_steps": None,
    "enable_checkpointing": None,
    "enable_progress_bar": None,
    "enable_model_summary": None,
    "accumulate_grad_batches": None,
    "gradient_clip_val": None,
    "gradient_clip_algorithm": None,
    "deterministic": None,
    "benchmark": None,
    "inference_mode": None,  # the loop sets it for each evaluation
    "use_distributed_sampler": None,  # the loop switches it off
    "profiler": _profiler,
    "detect_anomaly": None,
    "barebones": _barebones,
    "plugins": _plugins,
    "sync_batchnorm": None,
    "reload_dataloaders_every_n_epochs": _reload,
    "default_root_dir": None,
    "enable_autolog_hparams": None,
    "model_registry": None,
}
"""Options of the Trainer: None if each value works with a stream, else a function that returns what is wrong with the
value, or None."""


def check_support(trainer: Trainer) -> None:
    """Check options and callbacks of a Trainer against the tables.

    Raises:
        ValueError: If an option or a callback does not work with a stream.
    """
    for name, check in TRAINER.items():
        if check is not None and (wrong := check(trainer)) is not None:
            raise ValueError(f"trainer.{name}{wrong}")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        reason = next((CALLBACKS[kind] for kind in type(callback).__mro__ if kind in CALLBACKS), None)
        if reason is not None:
            raise ValueError(f"trainer.callbacks: {type(callback).__name__} does not work with a stream: {reason}")


def reset_best(callbacks: Iterable[Callback]) -> None:
    """Reset what callbacks keep of the best value of their metric; called at the beginning of each phase."""
    for callback in callbacks:
        if isinstance(callback, of_lightning.EarlyStopping):
            callback.wait_count, callback.stopped_epoch = 0, 0
            callback.best_score = _worst(callback.mode)
        elif isinstance(callback, of_lightning.ModelCheckpoint) and callback.monitor is not None:
            callback.best_k_models, callback.kth_value = {}, _worst(callback.mode)
            callback.best_model_path = callback.kth_best_model_path = ""
            callback.best_model_score = callback.current_score = None


def _worst(mode: str) -> Tensor:
    return torch.tensor(math.inf if mode == "min" else -math.inf)


def count_steps_per_fit(trainer: Trainer, origin: Callable[[], int]) -> None:
    """Make ``estimated_stepping_batches`` of this Trainer the steps of the current fit.

    Args:
        trainer: Trainer of the stream, whose ``max_epochs`` are those of all fits up to the end of the current one.
        origin: Returns the epoch of the Trainer at which the current fit began.
    """
    kind = type(trainer)

    def estimated_stepping_batches(self: Trainer) -> int | float:
        loop, last = self.fit_loop, self.fit_loop.max_epochs
        loop.max_epochs = None if last is None else last - origin()
        try:
            return kind.estimated_stepping_batches.fget(self)  # type: ignore[attr-defined, no-any-return]
        finally:
            loop.max_epochs = last

    set_properties(trainer, estimated_stepping_batches=property(estimated_stepping_batches))
