"""Linear support vector machines: exact solution, all classes at once, on any device and any number of processes."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from cl_lightning.distributed import all_sum

Blocks = Callable[[], Iterable[tuple[Tensor, Tensor]]]
_STEPS = 0.5 ** torch.arange(12, dtype=torch.float64)  # step sizes of the line search


@torch.no_grad()
def linear_svm(
    blocks: Blocks,
    num_classes: int,
    num_features: int,
    *,
    cost: float = 1.0,
    bias: bool = True,
    tolerance: float = 1e-9,
    keep: bool = False,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """One-vs-rest linear SVMs with squared hinge loss, the problem of ``sklearn.svm.LinearSVC(dual=False)``.

        min_w  1/2 ||w||^2 + cost * sum_i max(0, 1 - s_i <w, x_i>)^2,   s_i = 1 for samples of the class, else -1

    for each class. With ``bias``, each x has an additional last entry 1, whose weight is penalised like the others. The
    objective is strongly convex and piecewise quadratic: Newton's method converges to its unique minimum in few steps
    (Keerthi & DeCoste, JMLR 2005), at most 100. The Newton systems are solved inexactly, by conjugate gradients in
    float32. Their preconditioner assumes that the samples inside the margin are a random subset of all samples.
    Gradients and weights are float64. Memory: one block, and 1 byte per sample and class.

    Args:
        blocks: Returns an iterator over this process's samples, with the same blocks at each call: features ``(n, d)``
            and columns, int64 ``(n,)``.
        num_classes: C.
        num_features: d.
        cost: Weight of the margin errors, above 0.
        bias: Whether each class has a bias.
        tolerance: Norm of the gradient, relative to its norm at w = 0, at which a class has converged.
        keep: Whether to keep all samples in memory after the first pass instead of calling ``blocks`` for each pass.
        device: Device of the samples.

    Returns:
        Weights ``(C, d)`` and biases ``(C,)``, float64, the same on every process.
    """
    classes, device = torch.arange(num_classes, device=device), torch.device(device)
    steps, tiny = _STEPS.to(device), torch.finfo(torch.float64).tiny

    def fresh() -> Iterable[tuple[Tensor, Tensor]]:
        for features, labels in blocks():
            sign = 2.0 * (labels[:, None] == classes).double() - 1.0  # (n, C)
            yield torch.cat([features, features.new_ones(len(features), 1)], dim=1) if bias else features, sign

    kept = list(fresh()) if keep else None

    def samples() -> Iterable[tuple[Tensor, Tensor]]:
        return fresh() if kept is None else kept

    def slope(w: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Gradient of each class, and for each block a mask ``(n, C)`` of the samples inside the margin."""
        total, inside = torch.zeros_like(w), []
        for features, sign in samples():
            x = features.double()
            gap = (1 - sign * (x @ w.T)).clamp(min=0)
            total -= (sign * gap).T @ x
            inside.append(gap > 0)
        return w + 2 * cost * all_sum(total), inside

    def curvature(v: Tensor, inside: list[Tensor]) -> Tensor:
        total = torch.zeros_like(v)
        unit = v.norm(dim=1, keepdim=True).clamp(min=tiny)
        for (features, _), mask in zip(samples(), inside, strict=True):
            x = features.float()
            total += ((x @ (v / unit).float().T) * mask).T @ x
        curved: Tensor = v + 2 * cost * unit * all_sum(total)
        return curved

    def direction(gradient: Tensor, inside: list[Tensor], accuracy: Tensor) -> Tensor:
        """Newton direction by preconditioned conjugate gradients, until the residual of every class is small enough."""
        counts = all_sum(sum((mask.sum(dim=0) for mask in inside), torch.zeros_like(classes)))
        scale = 1 + 2 * cost * (counts / number)[:, None] * spread  # (C, d)
        found, residual = torch.zeros_like(gradient), -gradient
        search, size = torch.zeros_like(gradient), gradient.new_full((num_classes,), torch.inf)
        for _ in range(2 * gradient.shape[1]):
            if bool((residual.norm(dim=1) <= accuracy * gradient.norm(dim=1)).all()):
                break
            scaled = ((residual @ axes) / scale) @ axes.T
            before, size = size, (residual * scaled).sum(dim=1)
            search = scaled + (size / before.clamp(min=tiny))[:, None] * search
            curved = curvature(search, inside)
            length = (size / (search * curved).sum(dim=1).clamp(min=tiny))[:, None]
            found, residual = found + length * search, residual - length * curved
        return found

    def length(w: Tensor, ahead: Tensor, gradient: Tensor) -> Tensor:
        """Largest step size with sufficient decrease (Armijo), ``(C, 1)``; one pass tests all step sizes."""
        errors = w.new_zeros(1 + len(steps), num_classes)
        for features, sign in samples():
            x = features.double()
            margin, change = sign * (x @ w.T), sign * (x @ ahead.T)
            errors[0] += (1 - margin).clamp(min=0).square().sum(dim=0)
            for row, step in enumerate(steps, 1):
                errors[row] += (1 - margin - step * change).clamp(min=0).square().sum(dim=0)
        tried = torch.cat([steps.new_zeros(1), steps])[:, None]
        norms = (w[None] + tried[:, :, None] * ahead).square().sum(dim=2)
        values = norms / 2 + cost * all_sum(errors)  # (1 + tried, C)
        decrease = 1e-4 * tried[1:] * (gradient * ahead).sum(dim=1)
        lower = values[1:] <= values[0] * (1 + 1e-14) + decrease
        first = torch.where(lower.any(dim=0), lower.int().argmax(dim=0), len(steps) - 1)
        return steps[first][:, None]

    w = torch.zeros(num_classes, num_features + bias, dtype=torch.float64, device=device)
    total, number = w.new_zeros(w.shape[1], w.shape[1]), w.new_zeros(())
    for features, _ in samples():
        total += features.T @ features
        number += len(features)
    number = all_sum(number).clamp(min=1)
    spread, axes = torch.linalg.eigh(all_sum(total))
    gradient, inside = slope(w)
    size = start = gradient.norm(dim=1)
    for _ in range(100):
        if bool((size <= tolerance * start).all()):
            break
        accuracy = (size / start.clamp(min=tiny)).sqrt().clamp(1e-3, 0.1)
        ahead = direction(gradient, inside, accuracy)
        w = w + length(w, ahead, gradient) * ahead
        gradient, inside = slope(w)
        size = gradient.norm(dim=1)
    return w[:, :num_features], w[:, num_features] if bias else w.new_zeros(num_classes)
