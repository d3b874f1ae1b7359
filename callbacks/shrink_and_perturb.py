"""Shrink and perturb: weights are scaled down and noise is added."""

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from cl_lightning.batch import mix
from cl_lightning.callback import ContinualCallback
from cl_lightning.checks import at_least, one_of, within
from cl_lightning.stream import Task

if TYPE_CHECKING:
    from cl_lightning.strategy import ContinualStrategy

Every = Literal["task", "step"]
_NOISE = 0x5A9B  # salt of the noise


class ShrinkAndPerturb(ContinualCallback):
    """Scales weights down and adds Gaussian noise, at the start of each task or after each step, in any strategy.

    With xi standard normal numbers and eta the present learning rate of a weight,

        task    theta <- shrink theta + noise xi                        at the start of each task but the first one
                                                                        (Ash & Adams, NeurIPS 2020, arXiv:1910.08475)
        step    theta <- theta - eta (1 - shrink) theta - eta noise xi  after each optimizer step
                                                                        (Dohare et al., arXiv:2108.06325)

    Only weights that are trained change; at the start of a task, those that require a gradient. Noise is a function of
    the seed, the step and the name of the weight: it is the same on every process and after a restart. With shrink 1
    and noise 0 nothing changes.

    Args:
        shrink: In [0, 1].
        noise: Standard deviation, at least 0.
        every: ``task`` or ``step``.
    """

    paper: str = "Ash & Adams, NeurIPS 2020, arXiv:1910.08475"

    def __init__(self, *, shrink: float = 0.6, noise: float = 0.01, every: Every = "task") -> None:
        within(self, "[0, 1]", shrink=shrink)
        at_least(self, 0, noise=noise)
        one_of(self, get_args(Every), every=every)
        self.shrink, self.noise, self.every = shrink, noise, every
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    @torch.no_grad()
    def on_task_start(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        if self.every == "task" and not task.is_first:
            network: nn.Module = strategy.network
            for name, weight in network.named_parameters():
                if weight.requires_grad:
                    weight.mul_(self.shrink).add_(self._drawn(strategy, name, weight, task.index), alpha=self.noise)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.every != "step" or trainer.global_step == self._step:  # gradients are being accumulated
            return
        self._step = trainer.global_step
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        rates = {id(weight): group["lr"] for group in groups for weight in group["params"]}
        network: Any = pl_module.network
        for name, weight in network.named_parameters():
            if (rate := rates.get(id(weight))) is not None and weight.requires_grad:
                weight.mul_(1 - rate * (1 - self.shrink))
                weight.sub_(self._drawn(pl_module, name, weight, trainer.global_step), alpha=rate * self.noise)

    def _drawn(self, strategy: Any, name: str, weight: Tensor, number: int) -> Tensor:
        generator = torch.Generator(weight.device).manual_seed(mix(strategy.seed, _NOISE, number, *name.encode()))
        return torch.randn(weight.shape, generator=generator, device=weight.device)
