"""k-means clustering, the same on every process and device up to rounding."""

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import Draw
from cl_lightning.checks import at_least


@torch.no_grad()
def kmeans(points: Tensor, count: int, *, key: int = 0, iterations: int = 100) -> Tensor:
    """Centres of clusters whose sum of squared distances to their points is at a local minimum (Lloyd 1982).

    The first centres are drawn by k-means++ (Arthur & Vassilvitskii, SODA 2007). With fewer distinct points than
    centres, centres are equal. With one centre it is the mean.

    Args:
        points: ``(n, d)``, at least one; the computation is in float64.
        count: Number of centres, at least 1.
        key: Key of the random numbers.
        iterations: Largest number of assignments, at least 1.

    Returns:
        Centres, float64 ``(count, d)``.

    Raises:
        ValueError: If there are no points, or numbers are out of range.
    """
    at_least("kmeans", 1, count=count, iterations=iterations)
    if not len(points):
        raise ValueError("kmeans: there are 0 points; give at least one")
    points = points.double()
    if count == 1:
        return points.mean(dim=0, keepdim=True)
    centres = spread_points(points, Draw.of(count, key).rand().tolist())
    for _ in range(iterations):
        nearest = (points[:, None] - centres).square().sum(dim=2).argmin(dim=1)
        members = F.one_hot(nearest, count).to(points.dtype)  # a product, since sums by index depend on their order
        counts = members.sum(dim=0)[:, None]
        moved = torch.where(counts > 0, members.T @ points / counts.clamp(min=1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def spread_points(points: Tensor, uniform: list[float], given: Tensor | None = None) -> Tensor:
    """A point for each number in [0, 1), by k-means++: each drawn with probability proportional to its squared distance
    to the given and the drawn ones, or uniformly where all distances are 0.

    Args:
        points: ``(n, d)``.
        uniform: Numbers in [0, 1).
        given: Centres that are there already, ``(k, d)``; None for none.

    Returns:
        ``(len(uniform), d)``.
    """
    nearest, measured = torch.ones_like(points[:, 0]), given is not None and len(given) > 0
    if given is not None and measured:
        nearest = torch.cdist(points, given).square().amin(dim=1)
    chosen: list[Tensor] = []
    for number in uniform:
        weights = nearest if nearest.sum() > 0 else torch.ones_like(nearest)
        bounds = weights.cumsum(dim=0)
        row = torch.searchsorted(bounds, number * bounds[-1], right=True).clamp(max=len(points) - 1)
        distance = (points - points[row]).square().sum(dim=1)
        nearest = torch.minimum(nearest, distance) if chosen or measured else distance
        chosen.append(points[row])
    return torch.stack(chosen)
