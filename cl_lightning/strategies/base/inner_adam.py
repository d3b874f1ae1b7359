"""Adam for small modules that a method trains in steps of its own, with its state in buffers of the method."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_BETAS, _EPS = (0.9, 0.999), 1e-8


@torch.no_grad()
def adam_step(
    values: Sequence[Tensor],
    gradients: Iterable[Tensor],
    moments: tuple[Iterable[Tensor], Iterable[Tensor]],
    steps: Tensor,
    lr: float,
    weight_decay: float = 0.0,
) -> None:
    """A step of Adam (Kingma & Ba, ICLR 2015, arXiv:1412.6980, algorithm 1), in place, as of ``torch.optim.Adam``.

    Args:
        values: Tensors to change.
        gradients: A gradient for each of them, the same on every process.
        moments: Moving averages of the gradients and of their squares, which are changed; zeros before the first step.
        steps: Number of steps so far, a scalar, which is increased.
        lr: Learning rate.
        weight_decay: Factor of the values in the gradient.
    """
    steps += 1
    corrections = [-torch.expm1(steps * math.log(beta)) for beta in _BETAS]  # 1 - beta^steps
    for value, gradient, first, second in zip(values, gradients, *moments, strict=True):
        slope = gradient + weight_decay * value if weight_decay else gradient
        first.lerp_(slope, 1 - _BETAS[0])
        second.mul_(_BETAS[1]).addcmul_(slope, slope, value=1 - _BETAS[1])
        value.sub_(lr * first / corrections[0] / ((second / corrections[1]).sqrt() + _EPS))
