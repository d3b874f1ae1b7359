"""Utility-based perturbed gradient descent, UPGD (Elsayed & Mahmood, ICLR 2024, arXiv:2404.00781).

The utility of a weight estimates how much the loss rises if the weight is removed. Useful weights are protected from
change, useless ones are perturbed, so that a network neither forgets nor loses its plasticity:

    u = -g w                        first order;  u = -g w + h w^2 / 2  second order
    U <- beta U + (1 - beta) u,     U^ = U / (1 - beta^t)
    s = sigmoid(U^ / max U)         global: the maximum is over all weights
    s = sigmoid(U^ / ||U^||)        local: the norm is over the last dimension of the tensor
    w <- (1 - lr wd) w - lr (g + xi) (1 - s),   xi ~ N(0, sigma^2)

beta -> utility_decay, sigma -> noise, wd -> weight_decay. ``protects=False`` is the variant whose gradient is not
protected: ``g + xi (1 - s)``. The form of Adam has its step ``m^ / (sqrt(v^) + eps)`` in place of g, and twice the
learning rate, as the authors' class. ``doubled=True`` has twice the learning rate in the plain form too, so that a
weight of utility 0, s = 1/2, moves by lr g.
Departs from the paper: the diagonal h of the Hessian, which needs a second backward pass there (HesScale), is g^2. The
maximum is at least 1e-12: where all utilities are negative, it would change their order. Parameters without a gradient
do not move. Noise is a function of ``seed``, the step and the place of the parameter: it is the same on every process
and after a restart.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import mix
from cl_lightning.checks import above, at_least, one_of, within

Scope = Literal["global", "local"]
Order = Literal[1, 2]
_NOISE = 0x06D  # salt of the noise
_LEAST = 1e-12


class UPGD(torch.optim.Optimizer):
    """Gradient descent that protects useful weights and perturbs useless ones.

    Args:
        params: Parameters or groups.
        lr: Learning rate, at least 0.
        weight_decay: Decoupled, at least 0.
        utility_decay: beta, in [0, 1).
        noise: sigma, at least 0.
        scope: Whether utilities are compared over all weights (``global``) or within rows (``local``).
        order: 1 or 2, the order of the Taylor expansion of the utility.
        protects: Whether the gradient is protected too, not only from noise.
        doubled: Whether the learning rate is doubled.
        adam: Whether the step is that of Adam.
        betas: Decay rates of the moments of Adam, in [0, 1).
        eps: Added to the denominator of Adam, above 0.
        seed: Seed of the noise.
        foreach: Whether the arithmetic is over lists of tensors; False for a loop over tensors.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        weight_decay: float = 0.0,
        utility_decay: float = 0.999,
        noise: float = 0.001,
        scope: Scope = "global",
        order: Order = 1,
        protects: bool = True,
        doubled: bool = False,
        adam: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        seed: int = 0,
        foreach: bool = True,
    ) -> None:
        at_least(self, 0, lr=lr, weight_decay=weight_decay, noise=noise)
        within(self, "[0, 1)", utility_decay=utility_decay)
        for beta in betas:
            within(self, "[0, 1)", betas=beta)
        above(self, 0, eps=eps)
        one_of(self, get_args(Scope), scope=scope)
        one_of(self, get_args(Order), order=order)
        defaults: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "utility_decay": utility_decay}
        defaults |= {"noise": noise, "betas": tuple(betas), "eps": eps}
        super().__init__(params, defaults)
        self.scope, self.order, self.protects, self.adam = scope, order, protects, adam
        self.factor, self.seed, self.foreach = (2.0 if doubled or adam else 1.0), seed, foreach

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step.

        Args:
            closure: Computes gradients of the loss, and returns it.

        Returns:
            The loss; None without a closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        places = {id(p): place for place, p in enumerate(p for group in self.param_groups for p in group["params"])}
        found = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        found = [(group, weights) for group, weights in found if weights]
        if not found:
            return loss
        update = self._update_together if self.foreach else self._update_each
        for group, weights in found:
            for weight in weights:
                self._start(weight)
            update(group, weights)
        highest = [self.state[weight]["utility"].max() for _, weights in found for weight in weights]
        largest = torch.stack([value.to(highest[0]) for value in highest]).max().clamp(min=_LEAST)
        move = self._move_together if self.foreach else self._move_each
        for group, weights in found:
            steps = [int(self.state[weight]["step"]) for weight in weights]
            noise = [
                self._noise(weight, places[id(weight)], step, group["noise"])
                for weight, step in zip(weights, steps, strict=True)
            ]
            move(group, weights, steps, noise, largest)
        return loss

    def _start(self, weight: Tensor) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros(())  # on the CPU, as in torch's optimizers
            for name in ("utility", *(("first", "second") if self.adam else ())):
                state[name] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        state["step"] += 1

    def _of(self, weights: list[Tensor], name: str) -> list[Tensor]:
        return [self.state[weight][name] for weight in weights]

    def _noise(self, weight: Tensor, place: int, step: int, size: float) -> Tensor:
        generator = torch.Generator(weight.device).manual_seed(mix(self.seed, _NOISE, step, place))
        return torch.empty_like(weight).normal_(generator=generator).mul_(size)

    # ------------------------------------------------------------------ over lists of tensors

    def _update_together(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        """U, and the moments of Adam."""
        gradients: list[Tensor] = [weight.grad for weight in weights]  # type: ignore[misc]
        utilities, rest = self._of(weights, "utility"), 1 - group["utility_decay"]
        products = torch._foreach_mul(gradients, weights)
        torch._foreach_mul_(utilities, group["utility_decay"])
        torch._foreach_add_(utilities, products, alpha=-rest)
        if self.order == 2:
            torch._foreach_addcmul_(utilities, products, products, value=rest / 2)
        if self.adam:
            first, second = self._of(weights, "first"), self._of(weights, "second")
            one, two = group["betas"]
            torch._foreach_lerp_(first, gradients, 1 - one)
            torch._foreach_mul_(second, two)
            torch._foreach_addcmul_(second, gradients, gradients, value=1 - two)

    def _move_together(
        self, group: dict[str, Any], weights: list[Tensor], steps: list[int], noise: list[Tensor], largest: Tensor
    ) -> None:
        rate, decay = group["lr"] * self.factor, group["utility_decay"]
        scaled = torch._foreach_div(self._of(weights, "utility"), [1 - decay**step for step in steps])
        if self.scope == "global":
            torch._foreach_div_(scaled, [largest.to(part) for part in scaled])
        else:
            scaled = tuple(_rows(part) for part in scaled)
        torch._foreach_neg_(scaled)
        free = torch._foreach_sigmoid(scaled)  # 1 - s
        moves: list[Tensor] = [weight.grad for weight in weights]  # type: ignore[misc]
        if self.adam:
            one, two = group["betas"]
            moves = list(torch._foreach_div(self._of(weights, "first"), [1 - one**step for step in steps]))
            roots = torch._foreach_div(self._of(weights, "second"), [1 - two**step for step in steps])
            torch._foreach_sqrt_(roots)
            torch._foreach_add_(roots, group["eps"])
            torch._foreach_div_(moves, roots)
        if self.protects:
            moves = list(torch._foreach_mul(torch._foreach_add(moves, noise), free))
        else:
            moves = list(torch._foreach_addcmul(moves, noise, free))
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, moves, alpha=-rate)

    # ------------------------------------------------------------------ the same, one tensor after the other

    def _update_each(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        beta = group["utility_decay"]
        for weight in weights:
            state, g = self.state[weight], weight.grad
            assert g is not None
            u = -g * weight
            if self.order == 2:
                u = u + g**2 * weight**2 / 2
            state["utility"].copy_(beta * state["utility"] + (1 - beta) * u)
            if self.adam:
                one, two = group["betas"]
                state["first"].copy_(one * state["first"] + (1 - one) * g)
                state["second"].copy_(two * state["second"] + (1 - two) * g**2)

    def _move_each(
        self, group: dict[str, Any], weights: list[Tensor], steps: list[int], noise: list[Tensor], largest: Tensor
    ) -> None:
        for weight, step, xi in zip(weights, steps, noise, strict=True):
            state = self.state[weight]
            corrected = state["utility"] / (1 - group["utility_decay"] ** step)
            s = torch.sigmoid(corrected / largest.to(corrected) if self.scope == "global" else _rows(corrected))
            g = weight.grad
            assert g is not None
            if self.adam:
                one, two = group["betas"]
                g = state["first"] / (1 - one**step) / ((state["second"] / (1 - two**step)).sqrt() + group["eps"])
            move = (g + xi) * (1 - s) if self.protects else g + xi * (1 - s)
            weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * self.factor * move)


def _rows(utility: Tensor) -> Tensor:
    """Utilities divided by their norm over the last dimension."""
    return F.normalize(utility, dim=-1) if utility.dim() else utility.sign()
