"""Learning-rate schedules over the epochs of a phase.

Tasks may have different numbers of epochs (the first task is often longer), and each phase builds a schedule of its
own. These schedules get the number of epochs from the strategy, not from the configuration.
"""

import math
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from cl_lightning.checks import above, at_least, within
from cl_lightning.strategies.base.evaluation import check_monitor
from cl_lightning.strategies.base.phases import Interval


def scheduled(
    optimizer: Optimizer, build: LRSchedulerCallable, interval: Interval | None, epochs: int, trainer: Any
) -> OptimizerLRScheduler:
    """An optimizer with its schedule, as ``configure_optimizers`` returns them.

    Args:
        optimizer: The optimizer of a phase.
        build: Builds its schedule.
        interval: Whether the schedule is stepped after each ``epoch`` or each optimizer ``step``; None for ``step``
            with OneCycleLR and CyclicLR, which count batches, and for ``epoch`` with all others.
        epochs: Length of the phase.
        trainer: Trainer of the fit; its data module has the stream.

    Raises:
        ValueError: If the schedule ends before the phase does, or follows a metric that does not exist.
    """
    scheduler = build(optimizer)
    name = type(scheduler).__name__
    if isinstance(scheduler, ReduceLROnPlateau):
        if interval == "step":  # Lightning would look for the metric after each step
            raise ValueError(f"{name}: it follows a metric of each epoch; give scheduler_interval epoch")
        monitor = getattr(scheduler, "monitor", "val/loss")
        check_monitor(name, monitor, trainer.datamodule.stream)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": monitor}}
    if interval is None:
        interval = "step" if isinstance(scheduler, OneCycleLR | CyclicLR) else "epoch"
    length = epochs if interval == "epoch" else int(trainer.estimated_stepping_batches)
    if isinstance(scheduler, PhaseSchedule):
        scheduler.begin(length, trainer.lightning_module.task.index, len(trainer.datamodule.stream))
    if isinstance(scheduler, OneCycleLR) and scheduler.total_steps < length:
        raise ValueError(
            f"{name}: total_steps is {scheduler.total_steps}, but the phase has {length} {interval}s; give at least "
            f"{length}, another scheduler_interval, or CosineOverPhase, which has the length of each phase"
        )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}


class PhaseSchedule(LRScheduler):
    """Base of schedules over the epochs of one phase; a subclass implements :meth:`factor`.

    Where the schedule is stepped after each optimizer step, "epoch" means step in this class and its subclasses.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.epochs, self.task, self.tasks = 1, 0, 1
        super().__init__(optimizer)

    def begin(self, epochs: int, task: int = 0, tasks: int = 1) -> None:
        """Set the length of the phase, its task and the number of tasks.

        Called by the strategy before the first step.
        """
        self.epochs, self.task, self.tasks = max(epochs, 1), task, tasks
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate
        self._last_lr = self.get_lr()

    def factor(self, epoch: int) -> float:
        """Factor of the base learning rate in an epoch, counted from 0."""
        raise NotImplementedError

    def get_lr(self) -> list[float | Tensor]:
        return [base * self.factor(self.last_epoch) for base in self.base_lrs]


class CosineOverPhase(PhaseSchedule):
    """Cosine annealing over the phase, without restarts (SGDR: Loshchilov & Hutter, ICLR 2017, arXiv:1608.03983).

        factor(e) = final + (1 - final) (1 + cos(pi (e - warmup) / (E - warmup))) / 2,   e = warmup .. E - 1

    Args:
        optimizer: Optimizer whose learning rates are scheduled.
        warmup: Number of epochs of linear warm-up before the cosine, at least 0.
        final: Factor of the learning rate after the last epoch, in [0, 1].
    """

    def __init__(self, optimizer: Optimizer, *, warmup: int = 0, final: float = 0.0) -> None:
        at_least(self, 0, warmup=warmup)
        within(self, "[0, 1]", final=final)
        self.warmup, self.final = warmup, final
        super().__init__(optimizer)

    def factor(self, epoch: int) -> float:
        if epoch < self.warmup:
            return (epoch + 1) / (self.warmup + 1)
        done = min((epoch - self.warmup) / max(self.epochs - self.warmup, 1), 1.0)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done))


class QuarterCosineOverPhase(PhaseSchedule):
    """The first quarter of a cosine: slow decay at first, to 0.016 of the base rate (CODA-Prompt, arXiv:2211.13218).

        factor(e) = cos( 0.99 pi / 2 * max(e - late, 0) / (E - 1) ),   e = 0 .. E - 1

    In the released code of CODA-Prompt the schedule is one epoch late (``late=1``): the last of 20 epochs has the
    factor 0.097.

    Args:
        optimizer: Optimizer whose learning rates are scheduled.
        late: Number of epochs by which the schedule is delayed, at least 0.
    """

    def __init__(self, optimizer: Optimizer, *, late: int = 0) -> None:
        at_least(self, 0, late=late)
        self.late = late
        super().__init__(optimizer)

    def factor(self, epoch: int) -> float:
        return math.cos(0.99 * math.pi / 2 * min(max(epoch - self.late, 0) / max(self.epochs - 1, 1), 1.0))


class StepsOverPhase(PhaseSchedule):
    """The learning rate is multiplied by ``gamma`` at given fractions of the phase.

    Args:
        optimizer: Optimizer whose learning rates are scheduled.
        at: Fractions of the phase in (0, 1), increasing; 0.5 of 200 epochs is before epoch 100, counted from 0.
        gamma: Factor of each step, above 0.
    """

    def __init__(self, optimizer: Optimizer, *, at: Sequence[float] = (0.5, 0.75), gamma: float = 0.1) -> None:
        above(self, 0, gamma=gamma)
        if list(at) != sorted(at) or any(not 0 < fraction < 1 for fraction in at):
            raise ValueError(f"StepsOverPhase: at is {list(at)}; give fractions in (0, 1) in increasing order")
        self.at, self.gamma = tuple(at), gamma
        super().__init__(optimizer)

    def factor(self, epoch: int) -> float:
        return float(self.gamma ** sum(epoch >= round(fraction * self.epochs) for fraction in self.at))


class WarmRestarts(PhaseSchedule):
    """Cosine annealing with restarts in epochs 1, 2, 4, 8, ..., after one epoch at a tenth of the base rate.

    Each cosine goes from the base rate towards ``final`` times the base rate (SGDR: Loshchilov & Hutter, ICLR 2017,
    arXiv:1608.03983, with T_0 = 1 and T_mult = 2), as in GDumb (Prabhu et al., ECCV 2020).

        factor(0) = 0.1,   factor(e) = final + (1 - final) (1 + cos(pi (e - s) / s)) / 2,   s = 2^floor(log2 e)

    Args:
        optimizer: Optimizer whose learning rates are scheduled.
        final: Factor towards which each cosine goes, in [0, 1].
    """

    def __init__(self, optimizer: Optimizer, *, final: float = 0.01) -> None:
        within(self, "[0, 1]", final=final)
        self.final = final
        super().__init__(optimizer)

    def factor(self, epoch: int) -> float:
        if epoch == 0:
            return 0.1
        start = 1 << (epoch.bit_length() - 1)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * (epoch - start) / start))
