"""Momentum-based weight interpolation: evaluation of a slow copy of the weights, for pretrained networks."""

import math
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer

from cl_lightning.callbacks._swap import live_tensors
from cl_lightning.callbacks.ema_ensemble import EMAEnsemble
from cl_lightning.checks import above, within
from cl_lightning.memory import write_weights
from cl_lightning.stream import Task

if TYPE_CHECKING:
    from cl_lightning.strategy import ContinualStrategy


class MomentumInterpolation(EMAEnsemble):
    """Evaluates weights that follow the trained ones slowly, from the pretrained weights on, with any strategy.

    A strategy trains the fast weights theta_f. Every k optimizer steps the slow weights theta_s, which begin with the
    pretrained ones theta_0, are interpolated with them, and evaluations use theta_s:

        theta_s <- tau theta_s + (1 - tau) theta_f
        theta_s = tau^n theta_0 + (1 - tau) sum_{j=1..n} tau^(n-j) theta_f(j)   after n updates

    (Stojanovski, Roth & Akata, "Momentum-based Weight Interpolation of Strong Zero-Shot Models for Continual Learning",
    NeurIPS 2022 workshop INTERPOLATE, arXiv:2211.03186). tau -> momentum, k -> interval. Training does not use theta_s
    unless ``reset_fast``. The values of the paper are not published; with S optimizer steps of a fit the default is

        tau = 1 - k / (c S)

    so that the part of theta_s from before a task is exp(-1 / c) after it, 37 % for c = 1. c -> tasks_covered. This
    default, k = 1 and no reset are our choice. Interpolated are all trained weights, the head included, and the running
    statistics of batch normalisation. New weights (rows of new classes) start with their first value. In contrast to
    :class:`EMAEnsemble` there is no warm-up, and tau may be 1.

    Args:
        momentum: tau, in [0, 1]: 0 evaluates theta_f, 1 the pretrained weights; None for the default above.
        tasks_covered: c, above 0; ignored if ``momentum`` is given.
        interval: k, at least 1.
        reset_fast: Whether each task begins its training with theta_f = theta_s.
    """

    paper: str = "Stojanovski et al., NeurIPS 2022 workshop INTERPOLATE, arXiv:2211.03186"

    def __init__(
        self,
        *,
        momentum: float | None = None,
        tasks_covered: float = 1.0,
        interval: int = 1,
        reset_fast: bool = False,
    ) -> None:
        super().__init__(warmup_steps=0, interval=interval)
        within(self, "[0, 1]", momentum=momentum, optional=True)
        above(self, 0, tasks_covered=tasks_covered)
        self.given, self.tasks_covered, self.reset_fast = momentum, tasks_covered, reset_fast
        self._steps = 1

    def on_task_start(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        super().on_task_start(trainer, strategy, task)
        if self.reset_fast:
            live = live_tensors(strategy)
            write_weights(strategy.network, {name: value for name, value in self.average.items() if name in live})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        phase: Any = pl_module.phase
        self._steps = per_epoch * (phase.options.epochs or 1)

    def _momentum(self, strategy: Any) -> float:
        if self.given is not None:
            return self.given
        return max(0.0, 1 - self.interval / (self.tasks_covered * self._steps))
