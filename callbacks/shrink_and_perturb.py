"""Shrink and perturb: weights are moved towards 0 and noise is added, at each task or at each step."""

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from cl_lightning.batch import Draw
from cl_lightning.callback import ContinualCallback
from cl_lightning.checks import at_least, one_of, within
from cl_lightning.stream import Task

if TYPE_CHECKING:
    from cl_lightning.strategy import ContinualStrategy

When = Literal["task", "step"]

_NOISE = 0x5E4B  # salt of the noise


class ShrinkAndPerturb(ContinualCallback):
    """Moves the weights towards 0 and adds noise, so that a trained network learns the next data as a new one does.

    With theta the weights and xi ~ N(0, sigma^2 I):

        task   theta <- s theta + xi                                     before each task but the first
        step   theta <- (1 - eta d) theta - eta (g + xi)                 at each step of an optimizer with update eta g

    (Ash & Adams, "On Warm-Starting Neural Network Training", NeurIPS 2020, arXiv:1910.08475; the form per step is the
    baseline of Elsayed & Mahmood, ICLR 2024, arXiv:2404.00781). s -> shrink, sigma -> noise, d -> decay, eta is the
    learning rate of the parameter. Per step the weights are shrunk and moved before the step of the optimizer, which
    gives the equation for SGD, and weight decay that is decoupled from the gradient for every other optimizer.

    The noise has one standard deviation for all weights, and is the same on all processes. Per task, the parameters of
    the head and, unless it is frozen, of the backbone are changed, apart from the rows of the classes of the new task.
    Per step, the parameters with a gradient are changed.

    Args:
        when: ``task`` or ``step``.
        shrink: s, in [0, 1]; used with ``task``.
        noise: sigma, at least 0.
        decay: d, at least 0; used with ``step``.
    """

    paper: str = "Ash & Adams, NeurIPS 2020, arXiv:1910.08475"

    def __init__(self, *, when: When = "task", shrink: float = 0.6, noise: float = 0.01, decay: float = 0.001) -> None:
        one_of(self, get_args(When), when=when)
        within(self, "[0, 1]", shrink=shrink)
        at_least(self, 0, noise=noise, decay=decay)
        self.when: When = when
        self.shrink, self.noise, self.decay = shrink, noise, decay

    @torch.no_grad()
    def on_task_start(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        if self.when == "step" or task.is_first:
            return
        network = strategy.network
        fresh = {id(value) for block in network.head.blocks[-1:] if task.num_new for value in block.parameters()}
        generator = Draw.of(1, strategy.seed, _NOISE, task.index).generator()
        for value in (network.head if network.backbone_is_frozen else network).parameters():
            if id(value) not in fresh:
                xi = torch.randn(value.shape, generator=generator).to(value)
                value.mul_(self.shrink).add_(xi, alpha=self.noise)

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.when == "task":
            return
        strategy: Any = pl_module
        step = Draw.of(1, strategy.seed, _NOISE, strategy.task.index, trainer.global_step)
        generator = step.generator(strategy.device)
        for group in optimizer.param_groups:
            weights = [value for value in group["params"] if value.grad is not None]
            noise = [
                torch.randn(value.shape, generator=generator, device=value.device, dtype=value.dtype)
                for value in weights
            ]
            if not weights:
                continue
            torch._foreach_mul_(weights, 1 - group["lr"] * self.decay)
            torch._foreach_add_(weights, noise, alpha=-group["lr"] * self.noise)
