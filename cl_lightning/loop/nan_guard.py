"""Detects losses and gradients that are NaN or infinite."""

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from cl_lightning import distributed
from cl_lightning.callback import ContinualCallback

NanLoss = Literal["stop", "skip", "ignore"]


class NotFiniteError(RuntimeError):
    """The loss is NaN or infinite; the message names the task, the phase, the epoch and the batch."""


class NanGuard(ContinualCallback):
    """Stops a run whose loss is NaN or infinite, or skips optimizer steps whose gradients are not finite.

    With ``stop`` losses are kept on the device and checked every 50 steps and before each checkpoint, with the
    weights. No step synchronises with the device, and no checkpoint is written of a network that is lost.
    With ``skip`` the gradients, reduced over all processes, are checked before each optimizer step, which synchronises
    with the device. Other effects of a skipped step are not undone: statistics of normalisation layers, samples that
    were added to a memory.

    Args:
        action: ``stop`` or ``skip``.

    Attributes:
        skipped: Descriptions of the steps that were skipped.
    """

    _EVERY = 50

    @property
    def state_key(self) -> str:
        return "FiniteLoss"  # name of the class in earlier releases, whose checkpoints are still read

    def __init__(self, action: Literal["stop", "skip"] = "stop") -> None:
        self.action = action
        self.skipped: list[str] = []
        self._losses: list[Tensor] = []
        self._places: list[tuple[int, int]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.action != "stop":
            return
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            self._losses.append(loss.detach())
            self._places.append((trainer.current_epoch, batch_idx))
        if (batch_idx + 1) % self._EVERY == 0:
            self.check(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check(pl_module)

    def check(self, pl_module: LightningModule) -> None:
        """Check the losses of the steps since the last check; called on all processes.

        Raises:
            NotFiniteError: On all processes, if the loss of any process is not finite.
        """
        losses, places = self._losses, self._places
        self._losses, self._places = [], []
        bad = torch.stack(losses).isfinite().logical_not() if losses else torch.zeros(1, dtype=torch.bool)
        first = torch.where(bad.any(), bad.int().argmax(), len(bad)).to(pl_module.device, torch.float32)
        if distributed.is_distributed():
            torch.distributed.all_reduce(first, torch.distributed.ReduceOp.MIN)
        if losses and (index := int(first)) < len(losses):
            value = f"{float(losses[index])}" if bad[index] else "not finite on another process"
            raise NotFiniteError(
                f"the loss is {value} {_place(pl_module, *places[index])}; lower the learning rate, clip gradients "
                "(--trainer.gradient_clip_val 1), or skip such steps (--loop.nan_loss skip)"
            )

    def check_weights(self, pl_module: LightningModule) -> None:
        """Check the parameters, and the running statistics of normalisation layers; called on all processes.

        The loss of a step shows what the steps before it have done; the weights show what this step has done.

        Raises:
            NotFiniteError: On all processes, if a weight of any process is not finite.
        """
        weights: dict[str, Tensor] = dict(pl_module.named_parameters())
        weights |= {name: value for name, value in pl_module.named_buffers() if "running_" in name}
        names = [name for name, value in weights.items() if value.is_floating_point()]
        finite = torch.stack([weights[name].isfinite().all() for name in names]) if names else torch.ones(1).bool()
        lost = finite.all().logical_not().to(pl_module.device, torch.float32)
        if distributed.is_distributed():
            torch.distributed.all_reduce(lost, torch.distributed.ReduceOp.MAX)
        if lost:
            bad = [name for name, good in zip(names, finite.tolist(), strict=False) if not good]
            where = bad[0] if bad else "a weight of another process"
            raise NotFiniteError(
                f"{where} is not finite in task {pl_module.task.index}, so no checkpoint is written of this network; "
                "resume from the last one with a lower learning rate, or clip gradients "
                "(--trainer.gradient_clip_val 1)"
            )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        if self.action != "skip":
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not parameters or bool(torch.nn.utils.get_total_norm([p.grad for p in parameters]).isfinite()):
            return
        for parameter in parameters:
            parameter.grad = None  # optimizers skip parameters without a gradient
        pl_module._arrived = None  # there are no gradients to edit
        batch = trainer.fit_loop.epoch_loop.batch_idx
        self.skipped.append(_place(pl_module, trainer.current_epoch, batch))
        rank_zero_warn(f"gradients are not finite {self.skipped[-1]}: the step is skipped", stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": list(self.skipped)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = list(state_dict["skipped"])

    def results(self) -> dict[str, Any]:
        return {"skipped_steps": self.skipped} if self.skipped else {}


def _place(pl_module: Any, epoch: int, batch: int) -> str:
    task, phase = pl_module.task.index, pl_module.phase.name
    return f"in task {task}, phase {phase!r}, epoch {pl_module.epoch}, batch {batch}"
