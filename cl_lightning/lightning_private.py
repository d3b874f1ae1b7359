"""All private names of Lightning that the package uses; a test checks that each exists.

Lightning has no public interface for these functions. If a new release of Lightning renames something, only this file
has to change.
"""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization as AutomaticOptimization
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import RunningStage

__all__ = [
    "HOOK_NAME",
    "AutomaticOptimization",
    "carry_timer",
    "clip_gradients",
    "forget_wandb_run",
    "has_wandb_run",
    "ignore_signals",
    "is_spawned",
    "keep_buffers_local",
    "log_at_global_step",
    "renew_logger",
    "set_hook",
    "set_properties",
    "use_own_sampler",
    "wandb_options",
]

HOOK_NAME = "_current_fx_name"
"""Attribute of a module with the name of the running hook, which ``self.log`` reads."""


def set_hook(module: LightningModule, name: str | None) -> None:
    """Set the name of the running hook; None if no hook runs."""
    setattr(module, HOOK_NAME, name)


def set_properties(trainer: Trainer, **properties: property) -> None:
    """Give one Trainer properties of its own, by a subclass with the same name."""
    kind = type(trainer)
    trainer.__class__ = type(kind.__name__, (kind,), {**properties, "__module__": kind.__module__})


def carry_timer(timer: Timer) -> None:
    """Add the time of the last fit to the time before it, so that the timer measures all fits of a run together."""
    timer._offset = timer.time_elapsed()  # type: ignore[assignment]
    timer._start_time[RunningStage.TRAINING] = timer._end_time[RunningStage.TRAINING] = None


def log_at_global_step(trainer: Trainer) -> None:
    """Give values that ``self.log`` logs the number of optimizer steps so far, as the terms of the loss have.

    Lightning numbers the steps from 0, and the values of an epoch by its last step.
    """
    connector = trainer._logger_connector
    log_metrics = connector.log_metrics

    def log_at_step(metrics: Any, step: int | None = None) -> None:
        if step is None and metrics and "step" not in metrics:
            metrics, step = {"epoch": float(trainer.current_epoch), **metrics}, trainer.global_step
        log_metrics(metrics, step)

    connector.log_metrics = log_at_step  # type: ignore[method-assign]


def clip_gradients(trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
    """Clip gradients as ``gradient_clip_val`` of the Trainer says; None clips nothing."""
    if trainer.gradient_clip_val is not None:
        trainer.precision_plugin._clip_gradients(
            module, optimizer, trainer.gradient_clip_val, gradient_clip_algorithm=trainer.gradient_clip_algorithm
        )


def ignore_signals(trainer: Trainer) -> None:
    """Switch off Lightning's handling of SIGTERM, which sends messages between processes during other collectives."""
    trainer._signal_connector.register_signal_handlers = _nothing  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]


def is_spawned(strategy: DDPStrategy) -> bool:
    """Whether processes are spawned or forked from this process, instead of started as separate programs."""
    return strategy._start_method != "popen"


def keep_buffers_local(strategy: DDPStrategy) -> None:
    """Do not broadcast buffers from rank 0 at every forward pass, unless the user sets ``broadcast_buffers``."""
    strategy._ddp_kwargs.setdefault("broadcast_buffers", False)


def use_own_sampler(trainer: Trainer) -> None:
    """Do not replace the samplers of loaders: the data module splits each batch over the processes."""
    trainer._accelerator_connector.use_distributed_sampler = False


def has_wandb_run(logger: WandbLogger) -> bool:
    """Whether this logger has started a run of W&B."""
    return logger._experiment is not None


def forget_wandb_run(logger: WandbLogger) -> None:
    """Forget a run of W&B that has ended: a later fit starts it again, with the same id."""
    logger._experiment = None


def renew_logger(logger: Logger) -> None:
    """Open a new file for a ``TensorBoardLogger`` whose writer has failed, since that writer fails for ever."""
    if isinstance(logger, TensorBoardLogger):
        failed, logger._experiment = logger._experiment, None
        try:
            logger.experiment  # noqa: B018  # opens the file
        except BaseException:
            logger._experiment = failed  # otherwise Lightning would open the file, outside of any guard
            raise


def wandb_options(logger: WandbLogger) -> dict[str, Any]:
    """Arguments that the logger will pass to ``wandb.init``; they may be changed in place."""
    options: dict[str, Any] = logger._wandb_init
    return options


def _nothing(*_: Any, **__: Any) -> None: ...
