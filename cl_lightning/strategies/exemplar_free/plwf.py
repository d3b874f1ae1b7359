"""Progressive Learning without Forgetting (arXiv:2211.15215).

The networks M_0, ..., M_{t-1} after each earlier task are kept as teachers: M_k is the most reliable on the classes C_k
of its own task, and the last one relates all old classes to each other. With z the logits on images of the new task:

    L = CE_new(z, y) + lambda L_old,   L_old = 1/t sum_{k<t} L_k + mu L_d
    L_k = T^2 KL( softmax(z^{M_k}_{C_k} / T) || softmax(z_{C_k} / T) )
    L_d = T^2 KL( softmax(z^{M_{t-1}}_old / T) || softmax(z_old / T) )

CE_new is over the classes of the new task. In each step the gradients a of CE_new and b of lambda L_old with respect to
the backbone are projected if they are in conflict, both from their originals:

    a' = a - <a, b> / <b, b> b,   b' = b - <a, b> / <a, a> a        if <a, b> < 0
    step along a' + b', whose inner product with neither a nor b is negative

Without a conflict, and for the head, the gradient is a + b. With ``per_tensor`` each tensor of the backbone has its own
conflicts. With several processes and accumulated batches, a and b are the means over all of them; losses that callbacks
add belong to a. lambda -> distill_weight, mu -> joint_weight, T -> temperature.
The paper gives no code, and its full text was not available: the loss of a teacher, the weights and which gradients are
projected are our reading of its abstract. A step costs a forward pass of each teacher and a second backward pass, and
the memory grows by one network per task.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cl_lightning.checks import above, at_least
from cl_lightning.distributed import all_sum, world_size
from cl_lightning.losses import softmax_distillation
from cl_lightning.memory import Teachers
from cl_lightning.strategies.base import AddsLosses, flat_gradient, set_gradient, without_conflict
from cl_lightning.strategy import Batch, ContinualStrategy, Output, Phase, Task, Traits

_ROUNDING = 1e-5


def surgery(total: Tensor, part: Tensor) -> Tensor:
    """``a' + b'`` for ``a + b = total`` and ``b = part``, ``(P,)`` each; ``total`` to the bit without a conflict.

    A gradient shorter than 1e-5 of the other is not in conflict: its direction is rounding, as the direction of b is in
    the first step of a task, where the network is the last teacher.
    """
    other = total - part
    own, others = torch.dot(part, part), torch.dot(other, other)
    long = (own > _ROUNDING**2 * others) & (others > _ROUNDING**2 * own)
    conflict = long & (torch.dot(other, part) < 0)  # False if it is not a number
    return torch.where(conflict, without_conflict(other, part) + without_conflict(part, other), total)


class PLwF(ContinualStrategy):
    """Distillation from the networks after all earlier tasks; conflicting gradients are projected onto each other.

    Args:
        distill_weight: lambda, at least 0.
        joint_weight: mu, at least 0.
        temperature: T, above 0.
        project: Whether conflicting gradients are projected; False for the plain sum of losses.
        per_tensor: Whether conflicts are of each tensor of the backbone, instead of all of them as one vector.
        kwargs: Options of the base class.
    """

    traits = Traits(family="exemplar-free", paper="arXiv:2211.15215", uses_old_logits=True)

    def __init__(
        self,
        *,
        distill_weight: float = 1.0,
        joint_weight: float = 1.0,
        temperature: float = 2.0,
        project: bool = True,
        per_tensor: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(loss_classes="current", **kwargs)
        at_least(self, 0, distill_weight=distill_weight, joint_weight=joint_weight)
        above(self, 0, temperature=temperature)
        self.distill_weight, self.joint_weight, self.temperature = distill_weight, joint_weight, temperature
        self.project, self.per_tensor = project, per_tensor
        self.teachers = Teachers()
        self._groups: list[list[int]] = []  # C_k
        self._old_gradient: Tensor | None = None  # b, this process's share of the accumulated batches

    def begin_phase(self, phase: Phase, origin: int, sources: Sequence[AddsLosses] = ()) -> None:
        super().begin_phase(phase, origin, sources)
        self._groups = [row.nonzero().squeeze(1).tolist() for row in self.task_columns[: len(self.teachers)].cpu()]
        self._old_gradient = None

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        terms = {"ce": self.classification_loss(output, batch)}
        if not self.teachers or not self.distill_weight:
            return terms
        terms["distill"] = self.distill_weight * self.old_loss(batch.images, output.logits)
        if self.project and self._shared():
            self._add_gradient(terms["distill"] * (batch.weight / world_size() / self.trainer.accumulate_grad_batches))
        return terms

    def old_loss(self, images: Tensor, logits: Tensor) -> Tensor:
        """L_old of images ``(B, C, H, W)`` with logits ``(B, C)``; mean over the batch, in nats times T^2."""
        form: Any = {"temperature": self.temperature, "form": "kl", "scale_by_temperature": True}
        losses = []
        for teacher, columns in zip(self.teachers, self._groups, strict=True):
            target = teacher(images).logits
            student = logits[:, : target.shape[1]]
            losses.append(softmax_distillation(student, target, groups=[columns], **form))
        # The last teacher knows all old classes.
        return torch.stack(losses).mean() + self.joint_weight * softmax_distillation(student, target, **form)

    def edit_gradients(self, batch: Batch) -> None:
        shared = self._shared()
        if not self.teachers or not self.project or not self.distill_weight or not shared:
            return
        total = flat_gradient(shared)
        part = torch.zeros_like(total) if self._old_gradient is None else self._old_gradient
        part, self._old_gradient = all_sum(part), None
        sizes = [parameter.numel() for parameter in shared] if self.per_tensor else [len(total)]
        pieces = zip(torch.split(total, sizes), torch.split(part, sizes), strict=True)
        set_gradient(shared, torch.cat([surgery(whole, old) for whole, old in pieces]))

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        self.teachers.learn_from(self.network)

    def _shared(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.network.backbone.parameters() if parameter.requires_grad]

    def _add_gradient(self, loss: Tensor) -> None:
        """Add the gradient of this process's share of lambda L_old to b."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.scale(torch.ones((), device=loss.device))  # of gradients in half
        found = torch.autograd.grad(
            loss * scale, self._shared(), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        gradient = torch.cat([part.flatten() for part in found]) / scale
        self._old_gradient = gradient if self._old_gradient is None else self._old_gradient + gradient
