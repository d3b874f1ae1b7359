"""Temporal ensembles: evaluation of an exponential moving average of the weights."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from cl_lightning.callback import ContinualCallback
from cl_lightning.callbacks._swap import Swap, live_tensors
from cl_lightning.checks import at_least, within
from cl_lightning.distributed import all_sum, is_distributed, world_size
from cl_lightning.memory import move_towards
from cl_lightning.stream import Task

if TYPE_CHECKING:
    from cl_lightning.strategy import ContinualStrategy


class EMAEnsemble(ContinualCallback):
    """Evaluates an exponential moving average of the weights, an ensemble over the time of training.

    After each optimizer step, with theta the weights of the network and phi their average,

        phi <- m phi + (1 - m) theta,   so   phi_t = m^t theta_0 + sum_{s=1..t} (1 - m) m^(t-s) theta_s

    and phi replaces theta during validation, test and prediction (Soutif-Cormerais et al., CoLLAs 2023,
    arXiv:2306.16817). m -> momentum; the average covers about 1 / (1 - m) steps. As in the authors' code, m is 0.9 at
    first (``warmup_momentum``), and ``momentum`` after the first task or after ``warmup_steps``. Training does not use
    phi: theta is the same with and without this callback, to the bit.

    The average includes the trained weights and the floating-point buffers of the backbone (statistics of batch
    normalisation). Counters and frozen weights are taken from the network. New weights (the rows of new classes) start
    with their first value. What a strategy computes from the network when a task ends (class means, Fisher information,
    teachers, statistics of heads) is computed with theta. Weights that the strategy changes at the end of a task,
    without an optimizer, replace their average.

    Args:
        momentum: m, in [0, 1); with 0 phi is theta.
        warmup_momentum: m at first, in [0, 1); ignored where ``momentum`` is smaller.
        warmup_steps: Number of updates with ``warmup_momentum``, at least 0; None for the first task.
        restart: Whether the average starts again from theta at each task. Needed for a strategy that builds a new
            network for each task.
        interval: Number of optimizer steps from one update of the average to the next, at least 1.
    """

    paper: str = "Soutif-Cormerais et al., CoLLAs 2023, arXiv:2306.16817"

    def __init__(
        self,
        *,
        momentum: float = 0.99,
        warmup_momentum: float = 0.9,
        warmup_steps: int | None = None,
        restart: bool = False,
        interval: int = 1,
    ) -> None:
        within(self, "[0, 1)", momentum=momentum, warmup_momentum=warmup_momentum)
        at_least(self, 0, warmup_steps=warmup_steps, optional=True)
        at_least(self, 1, interval=interval)
        self.momentum, self.warmup_momentum = momentum, warmup_momentum
        self.warmup_steps, self.restart, self.interval = warmup_steps, restart, interval
        self.average: dict[str, Tensor] = {}
        """phi: tensors by the names of the network's parameters and buffers, at least float32."""
        self.updates = 0
        self._global_step = 0
        self._theta: list[Tensor] = []  # tensors of the network, in the order of `average`
        self._swap = Swap()  # theta, while phi replaces it
        self._unclosed: dict[str, Tensor] = {}  # theta before the end of a task

    # ------------------------------------------------------------------ the average

    def on_task_start(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        if self.restart:
            self.average, self.updates = {}, 0

    @torch.no_grad()
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        live = live_tensors(pl_module)
        averages: dict[str, Tensor] = {}
        for name, value in live.items():
            average = self.average.get(name)
            if average is not None and average.shape == value.shape:
                averages[name] = average.to(value.device)
            elif value.requires_grad or (name.startswith("backbone.") and _is_statistic(value)):
                # At least float32: the updates of an average are too small for half precision.
                averages[name] = value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)
        self.average, self._theta = averages, [live[name] for name in averages]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._global_step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._global_step:  # gradients are being accumulated
            return
        self._global_step = trainer.global_step
        if trainer.global_step % self.interval == 0:
            move_towards(list(self.average.values()), self._theta, self._momentum(pl_module))
            self.updates += 1

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not is_distributed():
            return
        # Each process normalises by its share of each batch. The statistics of the network are averaged here too.
        for prefix, layer in pl_module.network.named_modules():  # type: ignore[union-attr]
            for name in ("running_mean", "running_var") if isinstance(layer, _BatchNorm) else ():
                if (average := self.average.get(f"{prefix}.{name}")) is not None:
                    all_sum(average).div_(world_size())

    def _momentum(self, strategy: Any) -> float:
        warming = strategy.task.is_first if self.warmup_steps is None else self.updates < self.warmup_steps
        return min(self.momentum, self.warmup_momentum) if warming else self.momentum

    # ------------------------------------------------------------------ evaluation

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "test" and self.average:
            live = live_tensors(pl_module)
            self._unclosed = {name: live[name].detach().clone() for name in self.average if name in live}

    @torch.no_grad()
    def on_task_end(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        live = live_tensors(strategy)
        for name, before in self._unclosed.items():
            if not torch.equal(before.to(strategy.device), live[name]):
                self.average[name].copy_(live[name])

    def _swap_in(self, strategy: object) -> None:
        self._unclosed = {}
        self._swap.into(live_tensors(strategy), self.average)

    def _swap_out(self, strategy: object) -> None:
        self._swap.back(live_tensors(strategy))

    # The callback of the task loop is called first, so the end of a task, which is part of a test, uses theta.
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_in(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_in(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_in(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_out(pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_out(pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_out(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._swap_out(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._swap_out(pl_module)

    # ------------------------------------------------------------------ state

    def bytes_kept(self) -> dict[str, int]:
        return {"averages": sum(value.numel() * value.element_size() for value in self.average.values())}

    def state_dict(self) -> dict[str, Any]:
        return {"average": dict(self.average), "updates": self.updates} if self.average else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.average = {name: value.clone() for name, value in state_dict["average"].items()}
        self.updates = state_dict["updates"]


def _is_statistic(value: Tensor) -> bool:
    return not isinstance(value, torch.nn.Parameter) and value.is_floating_point()
