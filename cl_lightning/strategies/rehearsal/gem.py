"""Gradient Episodic Memory, GEM (Lopez-Paz & Ranzato, NeurIPS 2017, arXiv:1706.08840), and Averaged GEM, A-GEM
(Chaudhry et al., ICLR 2019, arXiv:1812.00420).

A memory holds samples of each past task. Before each step the gradient g of the batch is changed as little as is needed
so that the step raises no loss on the memory, to first order. GEM asks it of each past task k < t, with the gradients
g_k of the mean loss on its samples as the rows of G:

    min 1/2 ||g~ - g||^2   such that   <g~, g_k> >= 0 for all k            wherever some <g, g_k> < 0; else g~ = g

by the dual problem in t - 1 variables,

    g~ = G^T v + g,   v = argmin 1/2 v^T (G G^T + eps I) v + (G g)^T v   such that   v >= gamma

gamma -> memory_strength (the larger, the more a step that hurts the past is turned towards it), eps -> ridge. A-GEM has
one constraint, by the gradient g_ref of a sample of all past tasks together:

    g~ = g - <g, g_ref> / <g_ref, g_ref> g_ref                             where <g, g_ref> < 0; else g~ = g

The gradient is edited as the mean over all processes and accumulated batches, before it is clipped. Use SGD without
momentum and weight decay: what they add afterwards knows no constraint.
Both are made for streams with task ids (``visible="task"``) or domains. In class-incremental streams they are hardly
above fine-tuning in published tables; what GEM gains there comes with ``memory_strength``, which makes it replay.
Departs from the papers: the tasks seen so far share a memory of M samples equally, where GEM fixes the share of each
ahead; it is fed by the first epoch of a task, and its samples are newly augmented at each step. As in the
authors' code, passes over it move the running statistics of batch normalisation: else these would be of the current
task alone, and predictions of earlier ones would suffer. With ``16-mixed`` the passes run in single precision, since
half precision would need a loss scale of their own.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cl_lightning.batch import Batch, Draw
from cl_lightning.distributed import all_sum
from cl_lightning.memory import Memory, Policy, Ring, check_replay
from cl_lightning.network import Output
from cl_lightning.strategy import ContinualStrategy

_PAST = 0x6E3  # salt of the draws from the memory
_COLUMNS = 2**20  # of G that are multiplied at a time


def nonnegative_minimum(matrix: Tensor, slope: Tensor) -> Tensor:
    """The point ``u >= 0`` at which ``1/2 u^T A u + c^T u`` is least, by an active set (Lawson & Hanson 1974, ch. 23).

    Args:
        matrix: A, symmetric positive semi-definite, float64 ``(n, n)``, on the CPU; meant for n up to some tens.
        slope: c, in the span of A where that is singular, float64 ``(n,)``.

    Returns:
        u ``(n,)``, with ``A u + c >= 0`` and ``u_i (A u + c)_i = 0``, but for rounding.
    """
    u, free = torch.zeros_like(slope), torch.zeros_like(slope, dtype=torch.bool)
    least = -1e-12 * float(slope.abs().max()) if len(slope) else 0.0
    for _ in range(10 * len(slope)):  # far more than it takes; rounding must not keep it here for ever
        fall = (matrix @ u + slope).masked_fill(free, 0.0)
        if not fall.min() < least:
            break
        free[fall.argmin()] = True
        while free.any():
            best = torch.zeros_like(u)
            best[free] = torch.linalg.pinv(matrix[free][:, free], hermitian=True) @ -slope[free]
            below = free & (best <= 0)
            if not below.any():
                u = best
                break
            share = (u / (u - best)).where(below, torch.inf).min().nan_to_num(0.0)  # as far as it stays nonnegative
            u = u + share * (best - u)
            free &= ~(below & (u <= 1e-15 * u.max()))
            u = u.where(free, 0.0)
    return u


def gem_projection(gradient: Tensor, past: Tensor, *, memory_strength: float = 0.5, ridge: float = 1e-3) -> Tensor:
    """The nearest gradient that no past task's loss rises along, where the given one is none: g~ of GEM.

    Waits for the device: products are taken in float64, and the dual problem is solved on the CPU.

    Args:
        gradient: g, ``(P,)``.
        past: G, a gradient of each past task, ``(t, P)``.
        memory_strength: gamma, at least 0.
        ridge: eps, at least 0; with 0, <g~, g_k> is at least 0 but for rounding, else at least -eps v_k.

    Returns:
        ``(P,)``; ``gradient`` itself where no <g, g_k> is negative.
    """
    products = torch.zeros(len(past), len(past) + 1, dtype=torch.float64, device=past.device)
    for rows, column in zip(torch.split(past, _COLUMNS, 1), torch.split(gradient, _COLUMNS), strict=True):
        rows = rows.double()
        products += rows @ torch.cat([rows, column.double()[None]]).T
    products = products.cpu()
    if not (products[:, -1] < 0).any() or not products.isfinite().all():
        return gradient
    dual = products[:, :-1] + ridge * torch.eye(len(past), dtype=torch.float64)
    v = memory_strength + nonnegative_minimum(dual, products[:, -1] + memory_strength * dual.sum(dim=1))
    return gradient + v.to(gradient) @ past


def agem_projection(gradient: Tensor, reference: Tensor) -> Tensor:
    """The gradient without its part against the reference: g~ of A-GEM. Does not wait for the device.

    Args:
        gradient: g, ``(P,)``.
        reference: g_ref, ``(P,)``.
    """
    product, square = torch.dot(gradient, reference), torch.dot(reference, reference)
    share = torch.where(product < 0, product / square, 0.0)
    return torch.addcmul(gradient, reference, share, value=-1)


class _EpisodicMemory(ContinualStrategy):
    """What the two have in common; a subclass says what the gradient becomes.

    Args:
        memory_size: M, in samples, over all tasks and processes; 0 is fine-tuning.
        replay_size: Samples per draw from the memory, over all processes.
        policy: Which samples a full memory keeps; None for the latest of each task, as in GEM.
        kwargs: Of the base.
    """

    family: ClassVar[str] = "rehearsal"
    keeps_exemplars: ClassVar[bool] = True

    def __init__(
        self, *, memory_size: int = 500, replay_size: int | None = None, policy: Policy | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        check_replay(type(self).__name__, self.visible, replay_size)
        self.memory = Memory(memory_size, policy or Ring(by="task"))
        self.replay_size = replay_size

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": self.classification_loss(output, batch)}

    def projected(self, gradient: Tensor, draw: Draw) -> Tensor:
        """The gradient that the step takes instead of ``gradient``, ``(P,)`` each."""
        raise NotImplementedError

    def edit_gradients(self, batch: Batch) -> None:
        if self.task.is_first or len(self.memory) == 0:
            return
        trained = list(self._trained())
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        gradient = torch.cat([part.flatten() for part in parts])
        edited = self.projected(gradient, batch.draw.fork(_PAST))
        if edited is gradient:
            return
        for parameter, part, values in zip(
            trained, parts, torch.split(edited, [p.numel() for p in trained]), strict=True
        ):
            parameter.grad = part.copy_(values.view_as(part))  # in place: with DDP it may be a part of a bucket

    def reference_gradient(self, replay: Batch) -> Tensor:
        """This process's part ``(P,)`` of the gradient of the mean loss on samples of the memory.

        ``autograd.grad`` leaves alone what the step has gathered, and the hooks by which DDP exchanges it.
        """
        trained = list(self._trained())
        if not len(replay):
            gradient = torch.zeros(sum(p.numel() for p in trained), dtype=trained[0].dtype, device=self.device)
        else:
            assert self.augment is not None
            images = self.augment(replay).images
            with torch.enable_grad(), self._precision():
                loss = self.classification_loss(self.network(images), replay)
            found = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
            gradient = torch.cat([part.flatten() for part in found])
            if len(replay) != replay.draw.total:
                gradient *= len(replay) / replay.draw.total
            self.samples_in_step = (self.samples_in_step or 0) + len(replay)
        return gradient

    def observe(self, batch: Batch) -> None:
        if self.first_sight:
            self.memory.add(batch.raw, batch.labels, batch.tasks, batch.draw)

    def _trained(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def _precision(self) -> AbstractContextManager[Any]:
        plugin = self.trainer.precision_plugin
        return plugin.forward_context() if getattr(plugin, "scaler", None) is None else nullcontext()


class GEM(_EpisodicMemory):
    """Each step is turned as little as is needed to raise the loss of no past task on a memory.

    A step costs a backward pass for each past task, and holds a gradient of each.

    Args:
        memory_size: M, in samples, over all tasks and processes; 0 is fine-tuning.
        memory_strength: gamma, at least 0.
        ridge: eps, at least 0.
        replay_size: Samples of each past task per step, over all processes; None for all that the memory holds.
        policy: Which samples a full memory keeps; None for the latest of each task.
        kwargs: Of the base.
    """

    paper: ClassVar[str] = "Lopez-Paz & Ranzato, NeurIPS 2017, arXiv:1706.08840"

    def __init__(
        self,
        *,
        memory_size: int = 500,
        memory_strength: float = 0.5,
        ridge: float = 1e-3,
        replay_size: int | None = None,
        policy: Policy | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(memory_size=memory_size, replay_size=replay_size, policy=policy, **kwargs)
        if memory_strength < 0 or ridge < 0:
            raise ValueError(f"GEM: memory_strength={memory_strength}, ridge={ridge}; at least 0 is allowed")
        self.memory_strength, self.ridge = memory_strength, ridge

    def projected(self, gradient: Tensor, draw: Draw) -> Tensor:
        count = self.replay_size or self.memory.size
        replays = (self.memory.sample(count, draw.fork(k), tasks=[k]) for k in range(self.task.index))
        past = [self.reference_gradient(replay) for replay in replays if replay.draw.total]
        if not past:
            return gradient
        return gem_projection(
            gradient, all_sum(torch.stack(past)), memory_strength=self.memory_strength, ridge=self.ridge
        )


class AGEM(_EpisodicMemory):
    """Each step loses the part that raises the loss on a sample of all past tasks, drawn anew.

    Args:
        memory_size: M, in samples, over all tasks and processes; 0 is fine-tuning.
        replay_size: Samples of past tasks per step, over all processes; None for as many as the batch has.
        policy: Which samples a full memory keeps; None for the latest of each task.
        kwargs: Of the base.
    """

    paper: ClassVar[str] = "Chaudhry et al., ICLR 2019, arXiv:1812.00420"

    def __init__(
        self, *, memory_size: int = 500, replay_size: int | None = None, policy: Policy | None = None, **kwargs: Any
    ) -> None:
        super().__init__(memory_size=memory_size, replay_size=replay_size, policy=policy, **kwargs)

    def projected(self, gradient: Tensor, draw: Draw) -> Tensor:
        replay = self.memory.sample(self.replay_size or draw.total, draw, tasks=range(self.task.index))
        return agem_projection(gradient, all_sum(self.reference_gradient(replay))) if replay.draw.total else gradient
