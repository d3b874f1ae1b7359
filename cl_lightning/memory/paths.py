"""Importance of each weight measured along the path of training: Synaptic Intelligence and Riemannian Walk.

Both accumulate, at each optimizer step, the decrease of the loss that each weight contributed. Parameters are
identified by their names in ``named_parameters``.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from cl_lightning.checks import above, at_least, within
from cl_lightning.memory.importance import NamedBuffers, Tensors


class PathIntegral(NamedBuffers):
    """Path integral of Synaptic Intelligence: the contribution of each weight to the decrease of the loss.

        w_j = - sum_steps g_j delta_j,   Omega_j = relu(w_j) / ((theta_j - theta_start_j)^2 + xi)

    Zenke et al. (ICML 2017, arXiv:1703.04200): g is the gradient of the task's loss, without penalty, before a step,
    and delta the change of the weight in the step, with any optimizer. With gradient descent and a small step
    ``sum_j w_j`` is the decrease of the loss. State is in buffers, whose shapes come from the state dict that is
    loaded. It is the same on all processes if gradients are averaged over them.

    Usage: :meth:`begin` at the start of a task, :meth:`before_step` with gradients reduced and unscaled but not yet
    clipped (``on_before_optimizer_step``), :meth:`after_step` after the optimizer step, :meth:`importance` once at the
    end of the task.

    Args:
        xi: Damping, positive; 0.1 for MNIST and 1e-3 for CIFAR.
        clamp: Whether negative w are set to 0; FACIL does not, and has negative importances.

    Attributes:
        skips: Whether a gradient scaler may skip steps; a skipped step has infinite gradients and changes no weight.
    """

    steps: Tensor

    def __init__(self, xi: float = 0.1, *, clamp: bool = True) -> None:
        super().__init__()
        above(self, 0, xi=xi)
        self.xi, self.clamp = xi, clamp
        self.skips = True
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._pending: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def work(self) -> dict[str, Tensor]:
        """w by name."""
        return self._get("work")

    def begin(self, parameters: Tensors) -> None:
        """Reset: start a path at the given weights, with w = 0."""
        self.reset()
        for name, value in parameters.items():
            self._set("start", name, value)
            self._set("work", name, torch.zeros_like(value))

    def reset(self) -> None:
        """Drop what belongs to one task, after its importances are computed."""
        self._clear()
        self._pending = {}
        self.steps = torch.zeros_like(self.steps)

    @torch.no_grad()
    def before_step(self, parameters: Tensors, penalty_gradient: Tensors | None = None) -> None:
        """Store weights and gradients (``.grad``) before a step; parameters without a gradient are left out.

        Args:
            parameters: Weights by name, as in :meth:`begin`.
            penalty_gradient: Gradient of the penalty by name (:meth:`Importance.gradient` with factor c), which is
                subtracted from ``.grad``.
        """
        extra = penalty_gradient or {}
        self._pending = {
            name: (value.detach().clone(), value.grad - extra[name] if name in extra else value.grad.clone())
            for name, value in parameters.items()
            if value.grad is not None
        }

    def after_step(self, parameters: Tensors) -> None:
        """Accumulate the step since :meth:`before_step`; without a call of that, do nothing."""
        if self._pending:
            before = {name: value for name, (value, _) in self._pending.items()}
            gradients = {name: gradient for name, (_, gradient) in self._pending.items()}
            self._pending = {}
            self.accumulate(before, gradients, parameters)

    @torch.no_grad()
    def accumulate(self, before: Tensors, gradients: Tensors, after: Tensors) -> None:
        """``w <- w - g (after - before)`` for names that have a gradient and were given to :meth:`begin`."""
        work = self.work
        names = [name for name in gradients if name in work]
        moves = torch._foreach_sub([after[name].detach() for name in names], [before[name] for name in names])
        slopes = [gradients[name] for name in names]
        if self.skips:  # an infinite gradient times 0 must not become NaN
            slopes = [slope.where(move != 0, 0.0) for slope, move in zip(slopes, moves, strict=True)]
        torch._foreach_addcmul_([work[name] for name in names], slopes, moves, value=-1)
        self.steps += 1

    @torch.no_grad()
    def importance(self, parameters: Tensors) -> dict[str, Tensor]:
        """Omega of the path from :meth:`begin` to the given weights, by name; merge it with decay 1.

        Args:
            parameters: Weights at the end of the task, by name.
        """
        work, start = self.work, self._get("start")
        numerator = {name: value.clamp(min=0) if self.clamp else value for name, value in work.items()}
        return {name: numerator[name] / ((parameters[name] - start[name]).square() + self.xi) for name in work}


class RiemannianWalk(PathIntegral):
    """Path score and running Fisher information of RWalk: importances that a single pass over the data gives.

    Chaudhry et al. (ECCV 2018, arXiv:1801.10112): with g the gradient of the task's loss before a step, without
    penalty, and delta the change of the weight in the step,

        F_j <- alpha g_j^2 + (1 - alpha) F_j                      at each step
        w_j <- w_j - g_j delta_j                                  at each step
        s_j <- s_j + w_j / (F_j (theta_j - theta'_j)^2 / 2 + eps) every delta_t steps; then w_j <- 0, theta' <- theta

    where theta' are the weights ``delta_t`` steps before. When a task ends, the score is averaged with the score of
    earlier tasks, and both parts are divided by their largest value over all weights:

        S_j <- (S_j + s_j) / 2,   omega_j = F_j / max F + relu(S_j) / max relu(S)          in [0, 2]

    F is kept over tasks; s begins at 0 in each task. Choices that the paper leaves open: F begins at the first squared
    gradient, S at the first score; the steps since the last multiple of delta_t count at the end of a task; g is the
    gradient of the mean over the batch, so that F needs no second pass.

    Usage: as :class:`PathIntegral`. The result of :meth:`importance` replaces earlier importances.

    Args:
        rate: alpha, weight of the new squared gradient, in [0, 1].
        interval: delta_t, at least 1.
        xi: eps, positive. It decides how much a weight that hardly moved can score: with F of 1e-4 and steps of 1e-3
            the first part of the denominator is 5e-11.
    """

    kept_as: ClassVar[str] = "importance"

    def __init__(self, *, rate: float = 0.9, interval: int = 10, xi: float = 0.1) -> None:
        super().__init__(xi)
        within(self, "[0, 1]", rate=rate)
        at_least(self, 1, interval=interval)
        self.rate, self.interval = rate, interval
        self._count: int | None = None

    def begin(self, parameters: Tensors) -> None:
        super().begin(parameters)
        for name, value in parameters.items():
            self._set("score", name, torch.zeros_like(value))

    def reset(self) -> None:
        kept = {kind: self._get(kind) for kind in ("fisher", "average")}
        super().reset()
        for kind, values in kept.items():
            for name, value in values.items():
                self._set(kind, name, value)
        self._count = 0

    @torch.no_grad()
    def accumulate(self, before: Tensors, gradients: Tensors, after: Tensors) -> None:
        """F, w and, every ``interval`` steps, s, for names that have a gradient and were given to :meth:`begin`."""
        if self._count is None:  # restored within a task
            self._count = int(self.steps)
        work, fisher = self.work, self._get("fisher")
        squares = {name: gradient.square() for name, gradient in gradients.items() if name in work}
        if self.skips and squares:  # a step that a gradient scaler skips has infinite gradients
            is_taken = torch.stack([square.isfinite().all() for square in squares.values()]).all()
            squares = {name: square.where(is_taken, fisher.get(name, 0.0)) for name, square in squares.items()}
        # The order is the same on all processes, which exchange buffers by position.
        for name in [name for name in squares if name not in fisher]:
            self._set("fisher", name, squares[name])
        if names := [name for name in squares if name in fisher]:
            torch._foreach_lerp_([fisher[name] for name in names], [squares[name] for name in names], self.rate)
        super().accumulate(before, gradients, after)
        self._count += 1
        if self._count % self.interval == 0:
            self._score(after)

    def _score(self, parameters: Tensors) -> None:
        """Add the quotient of the last steps to the score, and begin the next steps at the given weights."""
        work, start, score, fisher = (self._get(kind) for kind in ("work", "start", "score", "fisher"))
        for name in [name for name in parameters if name in work and name in fisher]:
            moved = parameters[name].detach() - start[name]
            score[name] += work[name] / (0.5 * fisher[name] * moved.square() + self.xi)
            work[name].zero_()
            start[name].copy_(parameters[name])

    @torch.no_grad()
    def importance(self, parameters: Tensors) -> dict[str, Tensor]:
        """omega at the end of a task, by name; it replaces the importances of earlier tasks.

        Args:
            parameters: Weights at the end of the task, by name.
        """
        self._score(parameters)
        fisher, average = self._get("fisher"), self._get("average")
        for name, score in self._get("score").items():
            self._set("average", name, (average[name] + score) / 2 if name in average else score)
        average = {name: value.clamp(min=0) for name, value in self._get("average").items()}
        fisher_scale, score_scale = (
            torch.stack([value.max() for value in values.values()]).max().clamp(min=torch.finfo(torch.float32).tiny)
            for values in (fisher, average)
        )
        return {
            name: fisher[name] / fisher_scale + average[name] / score_scale for name in parameters if name in fisher
        }

    def restore_buffers(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        super().restore_buffers(state_dict, prefix)
        self._count = None
