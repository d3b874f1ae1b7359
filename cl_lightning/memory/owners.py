"""Which task owns each weight or unit of a network, for methods that isolate the parameters of tasks."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from cl_lightning.checks import within
from cl_lightning.memory.importance import NamedBuffers, Tensors

FREE = 255
"""Owner of a weight that belongs to no task; owners take one byte, so there are at most 255 tasks."""


class Owners(NamedBuffers):
    """The task that owns each weight: uint8 tensors of the shapes of the weights, ``FREE`` for free weights.

    A task claims all free weights, trains them and gives back the smallest ones (:meth:`prune`); weights of other tasks
    are held. With a share p that is given back each time, task k owns (1 - p) p^k of the weights. State is in buffers,
    whose shapes come from the state dict that is loaded; it is the same on all processes if the weights are.
    """

    kept_as: ClassVar[str] = "masks"
    tasks: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("tasks", torch.zeros((), dtype=torch.int64))

    @property
    def owner(self) -> dict[str, Tensor]:
        """Index of the owning task of each weight by parameter name, uint8; ``FREE`` for free weights."""
        return self._get("owner")

    def claim(self, weights: Tensors, task: int) -> None:
        """Give all free weights, and all weights of names that are new, to a task.

        Raises:
            ValueError: If the task has no byte of its own.
        """
        if task >= FREE:
            raise ValueError(f"Owners: task {task}; there are owners for {FREE} tasks; use a stream with fewer tasks")
        known = self.owner
        self.tasks.fill_(task + 1)
        for name, weight in weights.items():
            if name in known:
                known[name].masked_fill_(known[name] == FREE, task)
            else:
                self._set("owner", name, torch.full(weight.shape, task, dtype=torch.uint8, device=weight.device))

    @torch.no_grad()
    def prune(self, weights: Tensors, task: int, share: float) -> None:
        """Set the smallest weights of a task in each tensor to 0 and free them.

        Args:
            weights: Weights by name, changed in place.
            task: Owner of the weights that are compared.
            share: Share of these weights that is freed, in [0, 1]; their number is rounded to the nearest integer.
                Weights are ordered by absolute value, and by position where they are equal.

        Raises:
            ValueError: If ``share`` is outside [0, 1].
        """
        within(self, "[0, 1]", share=share)
        for name, owner in self.owner.items():
            (own,) = (owner.flatten() == task).nonzero(as_tuple=True)
            order = weights[name].flatten()[own].abs().argsort(stable=True)
            freed = own[order[: round(share * len(own))]]
            owner.view(-1)[freed] = FREE
            weights[name].view(-1)[freed] = 0.0

    def used_by(self, task: int) -> dict[str, Tensor]:
        """Masks of the weights with which a task predicts, bool, by name: its own and those of earlier tasks."""
        return {name: (owner != FREE) & (owner <= task) for name, owner in self.owner.items()}

    def owned_by(self, task: int) -> dict[str, Tensor]:
        """Masks of the weights that a task owns, bool, by name."""
        return {name: owner == task for name, owner in self.owner.items()}


class Held:
    """Weights that no step may change, whatever the optimizer does: gradients are masked and values restored.

    A gradient of zero is not enough: weight decay and momentum change weights without a gradient.

    Args:
        weights: Parameters by name.
        trained: Masks of the weights that are trained, bool, by name. A parameter without a mask is not held.
    """

    def __init__(self, weights: Tensors, trained: Tensors) -> None:
        names = [name for name in trained if name in weights]
        self._weights, self._trained = [weights[name] for name in names], [trained[name] for name in names]
        self._values = [weight.detach().clone() for weight in self._weights]

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Set the gradients of held weights to 0."""
        for weight, trained in zip(self._weights, self._trained, strict=True):
            if weight.grad is not None:
                weight.grad.masked_fill_(~trained, 0.0)

    @torch.no_grad()
    def restore(self) -> None:
        """Set held weights to their values at the construction."""
        for weight, trained, value in zip(self._weights, self._trained, self._values, strict=True):
            weight.copy_(torch.where(trained, weight, value))


class PastMasks(nn.Module):
    """Largest masks of all tasks so far, by layer; 0 before the first task ends.

    State is in buffers; it is the same on all processes if the masks are.

    Args:
        sizes: Number of units of each layer.
    """

    kept_as: ClassVar[str] = "masks"

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        for number, size in enumerate(sizes):
            self.register_buffer(f"layer_{number}", torch.zeros(size))

    def masks(self) -> list[Tensor]:
        return list(self.buffers())

    @torch.no_grad()
    def merge(self, masks: list[Tensor]) -> None:
        """``past <- max(past, mask)`` for each layer."""
        for past, mask in zip(self.buffers(), masks, strict=True):
            past.copy_(torch.maximum(past, mask))

    def num_bytes(self) -> int:
        """Size of all masks in bytes."""
        return sum(mask.nbytes for mask in self.buffers())
