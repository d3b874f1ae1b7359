"""Gradient Episodic Memory, GEM (Lopez-Paz & Ranzato, NeurIPS 2017, arXiv:1706.08840), and Averaged GEM, A-GEM
(Chaudhry et al., ICLR 2019, arXiv:1812.00420).

A memory stores samples of each past task. In each step the gradient g of the batch is projected onto the nearest
gradient g~ along which no loss on the memory increases, to first order. GEM has one constraint for each past task
k < t. With the gradients g_k of the mean loss on the samples of task k as the rows of G,

    min 1/2 ||g~ - g||^2   such that   <g~, g_k> >= 0 for all k            if some <g, g_k> < 0; else g~ = g

is solved by its dual problem in t - 1 variables,

    g~ = G^T v + g,   v = argmin 1/2 v^T (G G^T + eps I) v + (G g)^T v   such that   v >= gamma

gamma -> memory_strength (a larger gamma adds more of the past tasks' gradients to g), eps -> ridge. A-GEM has a single
constraint, with the gradient g_ref of the mean loss on samples of all past tasks:

    g~ = g - <g, g_ref> / <g_ref, g_ref> g_ref                             if <g, g_ref> < 0; else g~ = g

The projection is applied to the mean gradient over all processes and accumulated batches, before gradient clipping. Use
SGD without momentum and weight decay: they are added after the projection and can violate the constraints.
Both methods are designed for streams with task ids (``loss_classes="task"``) or domains. In class-incremental streams
their published accuracies are hardly above fine-tuning. GEM gains there by ``memory_strength``, which acts like replay.
Departs from the papers: a memory of M samples is shared equally among the tasks seen so far, while GEM fixes the share
of each task in advance. Batches are offered to the memory in the first epoch of a task. Samples of the memory are
augmented at each step. As in the authors' code, forward passes over the memory update the running statistics of batch
normalisation: otherwise the statistics would be of the current task alone, which lowers the accuracy on earlier tasks.
With ``16-mixed`` these passes run in single precision, since half precision would need a separate loss scale.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cl_lightning.batch import Draw
from cl_lightning.checks import at_least
from cl_lightning.distributed import all_sum
from cl_lightning.memory import Policy, Ring
from cl_lightning.strategies.base import check_loss_classes, flat_gradient, set_gradient, without_conflict
from cl_lightning.strategy import Batch, Replay, Traits

_PAST = 0x6E3  # salt of the draws from the memory
_COLUMNS = 2**20  # columns of G per product


def nonnegative_minimum(matrix: Tensor, slope: Tensor) -> Tensor:
    """Minimiser of ``1/2 u^T A u + c^T u`` over ``u >= 0``, by an active-set method (Lawson & Hanson 1974, ch. 23).

    Args:
        matrix: A, symmetric positive semi-definite, float64 ``(n, n)``, on the CPU; for n up to some tens.
        slope: c, float64 ``(n,)``; in the span of A if A is singular.

    Returns:
        u, ``(n,)``, with ``A u + c >= 0`` and ``u_i (A u + c)_i = 0``, up to rounding.
    """
    u, free = torch.zeros_like(slope), torch.zeros_like(slope, dtype=torch.bool)
    least = -1e-12 * float(slope.abs().max()) if len(slope) else 0.0
    for _ in range(10 * len(slope)):  # more iterations than needed; the bound stops cycles due to rounding
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
            share = (u / (u - best)).where(below, torch.inf).min().nan_to_num(0.0)  # largest step with u >= 0
            u = u + share * (best - u)
            free &= ~(below & (u <= 1e-15 * u.max()))
            u = u.where(free, 0.0)
    return u


def gem_projection(gradient: Tensor, past: Tensor, *, memory_strength: float = 0.5, ridge: float = 1e-3) -> Tensor:
    """g~ of GEM: projection onto the nearest gradient along which no past task's loss increases, to first order.

    Products are computed in float64, and the dual problem is solved on the CPU, after a synchronisation.

    Args:
        gradient: g, ``(P,)``.
        past: G, the gradients of the past tasks, ``(t, P)``.
        memory_strength: gamma, at least 0.
        ridge: eps, at least 0. With 0, <g~, g_k> is at least 0 up to rounding; otherwise it is at least -eps v_k.

    Returns:
        g~, ``(P,)``; ``gradient`` itself if no <g, g_k> is negative.
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


class _EpisodicMemory(Replay):
    """Cross-entropy on the batch, with its gradient projected by gradients on a memory; the base of GEM and A-GEM.

    Args:
        policy: Policy that decides which samples a full memory keeps; None for the latest samples of each task, as in
            GEM.
        kwargs: Options of ``Replay``.
    """

    traits = Traits(family="rehearsal", keeps_exemplars=True)

    def __init__(self, *, policy: Policy | None = None, **kwargs: Any) -> None:
        super().__init__(policy=policy or Ring(by="task"), **kwargs)
        check_loss_classes(self)

    def prepare_batch(self, batch: Batch) -> Batch:
        return batch  # the memory is used for gradients only

    def projected(self, gradient: Tensor, draw: Draw) -> Tensor:
        """Projection of ``gradient``, ``(P,)`` each; ``gradient`` itself if there is nothing to change."""
        raise NotImplementedError

    def edit_gradients(self, batch: Batch) -> None:
        if self.task.is_first or len(self.memory) == 0:
            return
        trained = list(self._trained())
        gradient = flat_gradient(trained)
        edited = self.projected(gradient, batch.draw.fork(_PAST))
        if edited is not gradient:
            set_gradient(trained, edited)

    def reference_gradient(self, replay: Batch) -> Tensor:
        """This process's summand ``(P,)`` of the gradient of the mean loss on samples of the memory.

        ``autograd.grad`` neither changes the gradients of the step nor calls the hooks by which DDP exchanges them.
        """
        trained = list(self._trained())
        if not len(replay):
            gradient = torch.zeros(sum(p.numel() for p in trained), dtype=trained[0].dtype, device=self.device)
        else:
            images = self.data.augment(replay).images
            with torch.enable_grad(), self._precision():
                loss = self.classification_loss(self.network(images), replay)
            found = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
            gradient = torch.cat([part.flatten() for part in found])
            if len(replay) != replay.draw.total:
                gradient *= len(replay) / replay.draw.total
            self.terms.samples = (self.terms.samples or 0) + len(replay)
        return gradient

    def _trained(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def _precision(self) -> AbstractContextManager[Any]:
        plugin = self.trainer.precision_plugin
        return plugin.forward_context() if getattr(plugin, "scaler", None) is None else nullcontext()


class GEM(_EpisodicMemory):
    """Cross-entropy, with its gradient projected so that the loss on no past task's memory increases, to first order.

    A step costs one backward pass per past task, and the gradients of all past tasks are in memory at a time.

    Args:
        memory_strength: gamma, at least 0.
        ridge: eps, at least 0.
        kwargs: Options of ``Replay``. With ``memory_size`` 0 the method is fine-tuning. ``replay_size`` is the number
            of samples of each past task per step; None for all samples. ``policy`` None keeps the latest samples of
            each task.
    """

    traits = _EpisodicMemory.traits.but(paper="Lopez-Paz & Ranzato, NeurIPS 2017, arXiv:1706.08840")

    def __init__(self, *, memory_strength: float = 0.5, ridge: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        at_least(self, 0, memory_strength=memory_strength, ridge=ridge)
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
    """Cross-entropy, with its gradient projected so that the mean loss on samples of all past tasks does not increase.

    Args:
        kwargs: Options of ``Replay``. With ``memory_size`` 0 the method is fine-tuning. ``policy`` None keeps the
            latest samples of each task.
    """

    traits = _EpisodicMemory.traits.but(paper="Chaudhry et al., ICLR 2019, arXiv:1812.00420")

    def projected(self, gradient: Tensor, draw: Draw) -> Tensor:
        replay = self.memory.sample(self.replay_size or draw.total, draw, tasks=range(self.task.index))
        return without_conflict(gradient, all_sum(self.reference_gradient(replay))) if replay.draw.total else gradient
