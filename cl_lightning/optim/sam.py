"""Sharpness-aware minimisation around any optimizer.

SAM (Foret et al., ICLR 2021, arXiv:2010.01412, algorithm 1) minimises the largest loss near the weights:

    e = rho g / ||g||,   g = grad L(w)        the norm is over all parameters together
    w <- step of the base optimizer with the gradient g_s = grad L(w + e)

GSAM (Zhuang et al., ICLR 2022, arXiv:2203.08065, algorithm 1) also reduces the surrogate gap L(w + e) - L(w). The step
has the gradient

    g_s - alpha g_v,   g_v = g - <g, g_s> / ||g_s||^2 g_s

where g_v is the part of g that is orthogonal to g_s, so that L(w + e) is not increased to first order. The radius may
follow the learning rate: rho_t = min_rho + (rho - min_rho) lr_t / lr_0.

Departs from the papers: ||g|| + 1e-12 instead of ||g||, as in released implementations. GSAM interpolates rho between
the smallest and the largest learning rate of the schedule; here the smallest one is 0, and lr_0 is the initial learning
rate of the first group.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from cl_lightning.checks import at_least
from cl_lightning.optim.default import default_optimizer

_TINY = 1e-12


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation: steps with the gradient at the weights that are moved along the gradient.

    Each step takes two gradients. As the ``optimizer`` of a strategy, the second gradient comes from the same losses on
    the same batches: also with accumulated gradients, several processes, a memory and callbacks that add losses.
    Gradients are edited by the method, and clipped, after the second pass. Loss terms are logged at the weights before
    the step, and batch normalisation counts the first pass alone. In a loop of one's own, ``step(closure)`` calls the
    closure twice, and ``perturbed`` makes the second pass explicit::

        loss(model(x), y).backward()
        with optimizer.perturbed():
            optimizer.zero_grad()
            loss(model(x), y).backward()
        optimizer.step()

    Groups, learning rates and state belong to the base optimizer; nothing else is kept between two steps.

    Args:
        params: Parameters or groups.
        base: Builds the optimizer that takes the steps; None for SGD with learning rate 0.05 and momentum 0.9.
        rho: Length of the perturbation of all weights together, at least 0; 0 is the base optimizer.
        foreach: Whether the arithmetic is over lists of tensors; False for a loop over tensors.

    Raises:
        ValueError: If ``rho`` is out of range, or if ``step`` is called without a closure and without a second pass.
    """

    def __init__(
        self, params: Any, base: OptimizerCallable | None = None, rho: float = 0.05, foreach: bool = True
    ) -> None:
        at_least(self, 0, rho=rho)
        # Not a default of the signature: the command line would pass its options on to a class that replaces it.
        self.base: torch.optim.Optimizer = (base or default_optimizer)(params)
        super().__init__(self.base.param_groups, self.base.defaults)
        self.rho, self.foreach = rho, foreach
        self._second_pass_done = False
        self._share()

    def _share(self) -> None:
        self.param_groups, self.state = self.base.param_groups, self.base.state

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """The weights are w + e inside, from the present gradients, and w to the bit afterwards.

        On leaving, the gradients must be those at w + e. The next ``step`` uses them. Parameters without a gradient do
        not move. With several processes, gradients must be the same on all of them.
        """
        weights = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = [weight.detach().clone() for weight in weights]
        first = [cast(Tensor, weight.grad).detach().clone() for weight in weights]
        self._move(weights, first)
        try:
            yield
            self._second_pass_done = True
        finally:
            with torch.no_grad():
                for weight, value in zip(weights, before, strict=True):
                    weight.copy_(value)
        with torch.no_grad():
            self._combine(weights, first)

    @torch.no_grad()
    def _move(self, weights: list[Tensor], gradients: list[Tensor]) -> None:
        """w += rho g / ||g||, without a synchronisation."""
        if not weights:
            return
        rho = self.radius()
        if self.foreach:
            scale = rho / (_stacked(torch._foreach_norm(gradients)).norm() + _TINY)
            torch._foreach_add_(weights, [part * scale.to(part) for part in gradients])
        else:
            scale = rho / (_inner(gradients, gradients).sqrt() + _TINY)
            for weight, part in zip(weights, gradients, strict=True):
                weight.add_(part * scale.to(part))

    def _combine(self, weights: list[Tensor], first: list[Tensor]) -> None:
        """Gradient of the step, in place, from the one at w + e in ``.grad`` and the first one."""

    def radius(self) -> float:
        """Length of the perturbation of the next step."""
        return self.rho

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """A step of the base optimizer with the gradient at the perturbed weights.

        Args:
            closure: Computes gradients of the loss, and returns it; called twice, unless it ran the second pass itself.

        Returns:
            The loss at the weights before the step; None without a closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._second_pass_done:
            if closure is None:
                raise ValueError(
                    f"{type(self).__name__}: step() has no closure for the second gradient; give one, or compute the "
                    "gradient inside `with optimizer.perturbed():` before the step"
                )
            with self.perturbed(), torch.enable_grad():
                closure()
        self._second_pass_done = False
        self.base.step()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "rho"):
            self.base.add_param_group(param_group)
        else:  # in the constructor of torch's class, which adds the groups that the base optimizer has
            super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """State of the base optimizer."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base.load_state_dict(state_dict)
        self._share()


class GSAM(SAM):
    """SAM that also reduces the surrogate gap, the difference of the loss at the perturbed weights and at the weights.

    Args:
        params: Parameters or groups.
        base: As in :class:`SAM`.
        rho: Length of the perturbation at the initial learning rate, at least 0.
        alpha: Weight of the part of the first gradient that is orthogonal to the second one, at least 0; 0 is SAM.
        min_rho: Length of the perturbation at learning rate 0, at least 0; None for ``rho`` at all rates.
        foreach: As in :class:`SAM`.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        params: Any,
        base: OptimizerCallable | None = None,
        rho: float = 0.05,
        alpha: float = 0.4,
        min_rho: float | None = None,
        foreach: bool = True,
    ) -> None:
        at_least(self, 0, alpha=alpha)
        at_least(self, 0, min_rho=min_rho, optional=True)
        super().__init__(params, base, rho, foreach)
        self.alpha, self.min_rho = alpha, min_rho

    def radius(self) -> float:
        group = self.param_groups[0]
        initial = float(group.get("initial_lr", group["lr"]))  # a schedule writes it; without one the rate is constant
        if self.min_rho is None or initial == 0:
            return self.rho
        return self.rho - (self.rho - self.min_rho) * (1 - float(group["lr"]) / initial)

    def _combine(self, weights: list[Tensor], first: list[Tensor]) -> None:
        pairs = [(weight.grad, part) for weight, part in zip(weights, first, strict=True) if weight.grad is not None]
        if not pairs or not self.alpha:
            return
        second, first = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        product, square = (_inner(second, other) for other in (first, second))
        share = torch.where(square > 0, product / square, 0.0)  # g_v = g - share g_s
        factor = 1 + self.alpha * share
        if self.foreach:
            torch._foreach_mul_(second, [factor.to(part) for part in second])
            torch._foreach_add_(second, first, alpha=-self.alpha)
        else:
            for gradient, part in zip(second, first, strict=True):
                gradient.mul_(factor.to(gradient)).sub_(part, alpha=self.alpha)


def _inner(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Inner product of two lists of tensors as one vector, without a synchronisation."""
    return _stacked([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def _stacked(scalars: Sequence[Tensor]) -> Tensor:
    """Scalars as a vector on the device of the first one, at least in single precision."""
    device = scalars[0].device
    return torch.stack([part.to(device, torch.promote_types(part.dtype, torch.float32)) for part in scalars])
