"""Linear support vector machines: solved exactly, all classes at once, on any device and any number of processes."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from cl_lightning.distributed import all_sum

Blocks = Callable[[], Iterable[tuple[Tensor, Tensor]]]

_STEPS = 0.5 ** torch.arange(12, dtype=torch.float64)  # lengths that are tried along a direction


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
    """One-vs-rest linear SVMs with squared hinge, the problem that ``sklearn.svm.LinearSVC(dual=False)`` solves.

        min_w  1/2 ||w||^2 + cost * sum_i max(0, 1 - s_i <w, x_i>)^2,   s_i = 1 for samples of the class, else -1

    for each class; with ``bias`` every x has a last entry 1, whose weight is penalised like the others. The function
    is strongly convex and piecewise quadratic: Newton's method finds the one minimum in few steps (Keerthi & DeCoste,
    JMLR 2005). The systems are solved by conjugate gradients, in float64, in some 50 passes over the samples: memory is
    that of a block and one byte per sample and class.

    Args:
        blocks: Gives this process's samples anew at each call, in the same blocks: features ``(n, d)`` and columns
            int64 ``(n,)``.
        num_classes: C.
        num_features: d.
        cost: Weight of the errors against the margin, above 0.
        bias: Whether a class has a bias.
        tolerance: Norm of the gradient, relative to that at 0, at which a class is done.
        keep: Hold all samples in float64 from the first pass on, where there is room for them, instead of asking again.
        device: Of the samples.

    Returns:
        Weights ``(C, d)`` and biases ``(C,)``, float64, the same on every process.
    """
    classes, device = torch.arange(num_classes, device=device), torch.device(device)
    steps = _STEPS.to(device)

    def fresh() -> Iterable[tuple[Tensor, Tensor]]:
        for features, labels in blocks():
            x = features.double()
            sign = 2.0 * (labels[:, None] == classes).double() - 1.0  # (n, C)
            yield torch.cat([x, x.new_ones(len(x), 1)], dim=1) if bias else x, sign

    kept = list(fresh()) if keep else None

    def samples() -> Iterable[tuple[Tensor, Tensor]]:
        return fresh() if kept is None else kept

    def slope(w: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Gradient, and which samples of each block are inside the margin."""
        total, inside = torch.zeros_like(w), []
        for x, sign in samples():
            gap = (1 - sign * (x @ w.T)).clamp(min=0)
            total -= (sign * gap).T @ x
            inside.append(gap > 0)
        return w + 2 * cost * all_sum(total), inside

    def curvature(v: Tensor, inside: list[Tensor]) -> Tensor:
        total = torch.zeros_like(v)
        for (x, _), mask in zip(samples(), inside, strict=True):
            total += ((x @ v.T) * mask).T @ x
        return v + 2 * cost * all_sum(total)

    def direction(gradient: Tensor, inside: list[Tensor], accuracy: Tensor) -> Tensor:
        """Newton's direction: conjugate gradients, for each class until its residual is small enough."""
        found, residual = torch.zeros_like(gradient), -gradient
        search, size = residual, residual.square().sum(dim=1)
        enough = accuracy.square() * size
        for _ in range(2 * gradient.shape[1]):
            if bool((size <= enough).all()):
                break
            curved = curvature(search, inside)
            length = (size / (search * curved).sum(dim=1).clamp(min=torch.finfo(torch.float64).tiny))[:, None]
            found, residual = found + length * search, residual - length * curved
            before, size = size, residual.square().sum(dim=1)
            search = residual + (size / before.clamp(min=torch.finfo(torch.float64).tiny))[:, None] * search
        return found

    def length(w: Tensor, ahead: Tensor, gradient: Tensor) -> Tensor:
        """The largest step that lowers the function enough (Armijo), of all that are tried in one pass, ``(C, 1)``."""
        errors = w.new_zeros(1 + len(steps), num_classes)
        for x, sign in samples():
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
    gradient, inside = slope(w)
    size = start = gradient.norm(dim=1)
    for _ in range(100):
        if bool((size <= tolerance * start).all()):
            break
        accuracy = (size / start.clamp(min=torch.finfo(torch.float64).tiny)).sqrt().clamp(max=0.1)
        ahead = direction(gradient, inside, accuracy)
        w = w + length(w, ahead, gradient) * ahead
        gradient, inside = slope(w)
        size = gradient.norm(dim=1)
    return w[:, :num_features], w[:, num_features] if bias else w.new_zeros(num_classes)
