"""Adam for two losses that take turns."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cl_lightning.checks import above


class AlternatingAdam(torch.optim.Optimizer):
    """Two Adams over the same parameters, of which each takes every second step, with its own moments and rate.

    With the turn k in {0, 1}, the step count t of the turn and the gradient g of its loss,

        m_k <- b1 m_k + (1 - b1) g;  v_k <- b2 v_k + (1 - b2) g^2
        p <- p - lr_k * m_k / (1 - b1^t) / ( sqrt( v_k / (1 - b2^t) ) + eps )

    Args:
        params: Parameters.
        lr: Learning rate of the first turn, above 0; a schedule changes this rate alone.
        second_lr: Learning rate of the second turn, above 0.
        betas: b1, b2.
        eps: Added to the denominator.

    Attributes:
        turn: Whose turn the next step is, 0 or 1; it is kept in the state.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float = 5e-5,
        second_lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        above(self, 0, lr=lr, second_lr=second_lr)
        super().__init__(params, {"lr": lr, "second_lr": second_lr, "betas": betas, "eps": eps, "turn": 0, "steps": 0})

    @property
    def turn(self) -> int:
        return int(self.param_groups[0]["turn"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            turn, count = group["turn"], group["steps"] // 2 + 1
            first, second = group["betas"]
            rate = group["second_lr"] if turn else group["lr"]
            for parameter in group["params"]:
                if parameter.grad is not None:
                    mean, square = self._moments(parameter, turn)
                    mean.lerp_(parameter.grad, 1 - first)
                    square.mul_(second).addcmul_(parameter.grad, parameter.grad, value=1 - second)
                    scale = (square / (1 - second**count)).sqrt_().add_(group["eps"])
                    parameter.addcdiv_(mean, scale, value=-rate / (1 - first**count))
            group["turn"], group["steps"] = 1 - turn, group["steps"] + 1
        return loss

    def _moments(self, parameter: nn.Parameter, turn: int) -> tuple[Tensor, Tensor]:
        state = self.state[parameter]
        for name in (f"mean_{turn}", f"square_{turn}"):
            if name not in state:
                state[name] = torch.zeros_like(parameter)
        return state[f"mean_{turn}"], state[f"square_{turn}"]
