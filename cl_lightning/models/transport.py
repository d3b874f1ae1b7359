"""Optimal transport with entropy between the classes of two tasks or domains."""

import math

import torch
from torch import Tensor


def transport(cost: Tensor, reg: float, iterations: int = 1000) -> Tensor:
    """Plan of optimal transport with entropy between two uniform distributions (Sinkhorn: Cuturi, NeurIPS 2013).

    Args:
        cost: Q, ``(n, m)``.
        reg: eps, above 0.
        iterations: Largest number of rescalings of the rows and of the columns; they end when they change nothing.

    Returns:
        T, at least 0, ``(n, m)``, float64. Its columns sum to 1 / m exactly and, after enough iterations, its rows to
        1 / n.
    """
    scores = -cost.double() / reg
    n, m = scores.shape
    rows, columns = scores.new_zeros(n, 1), scores.new_zeros(1, m)
    rounding = 2 * torch.finfo(scores.dtype).eps * scores.abs().max().clamp(min=1)
    for _ in range(iterations):
        before, rows = rows, -math.log(n) - (scores + columns).logsumexp(dim=1, keepdim=True)
        columns = -math.log(m) - (scores + rows).logsumexp(dim=0, keepdim=True)
        if (rows - before).abs().max() <= rounding:
            break
    return (scores + rows + columns).exp()
