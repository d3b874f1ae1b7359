"""Clusterings that take known classes into account, for the discovery of new ones."""

import math

import torch
from torch import Tensor

from cl_lightning.batch import Draw
from cl_lightning.checks import at_least, within
from cl_lightning.models.kmeans import kmeans, spread_points


@torch.no_grad()
def ncd_kmeans(
    points: Tensor,
    known: Tensor,
    count: int,
    *,
    key: int = 0,
    starts: int = 10,
    iterations: int = 100,
    among_known: bool = True,
) -> Tensor:
    """New centres beside known ones that do not move (NCD k-means: Troisemaine et al., arXiv:2311.05440).

    The first new centres are drawn by k-means++ with distances to known and drawn centres. In each iteration points are
    assigned to their nearest centre, and each new centre moves to the mean of its points: the sum of squared distances
    never rises. The best of several starts is returned.

    Args:
        points: Samples without labels, ``(n, d)``, at least one; the computation is in float64.
        known: Centres of known classes, ``(k, d)``; k may be 0.
        count: Number of new centres, at least 1.
        key: Key of the random numbers.
        starts: Number of starts, at least 1.
        iterations: Largest number of assignments, at least 1.
        among_known: Whether points may be assigned to known centres; else all points are of new classes.

    Returns:
        New centres, float64 ``(count, d)``.
    """
    at_least("ncd_kmeans", 1, count=count, starts=starts, iterations=iterations)
    points, known = points.double(), known.double()
    fixed = known if among_known else known[:0]
    best, least = points[:0], math.inf
    for start in range(starts):
        numbers = Draw.of(count, key, start).rand().tolist()
        centres = spread_points(points, numbers, known)
        for _ in range(iterations):
            nearest = distances(points, torch.cat([fixed, centres])).argmin(dim=1) - len(fixed)
            members = (nearest[:, None] == torch.arange(count, device=points.device)).to(points.dtype)
            counts = members.sum(dim=0)[:, None]
            moved = torch.where(counts > 0, members.T @ points / counts.clamp(min=1), centres)
            if torch.equal(moved, centres):
                break
            centres = moved
        inertia = float(distances(points, torch.cat([fixed, centres])).amin(dim=1).square().sum())
        if inertia < least:
            best, least = centres, inertia
    return best


@torch.no_grad()
def spectral_embedding(points: Tensor, size: int, least_similarity: float = 1e-3) -> Tensor:
    """Rows of the eigenvectors of the normalised Laplacian of a kernel on the points.

        w_ij = exp(- d_ij^2 / (2 s^2)),   s^2 = - d_max^2 / (2 ln m),   L = 1 - D^(-1/2) W D^(-1/2)

    with d_max the longest edge of the minimum spanning tree, whose ends then have the similarity m (Troisemaine et al.,
    arXiv:2311.05440). The released code has s^2 = - d_max^2 / ln m, which gives them the square root of m.

    Args:
        points: ``(n, d)``, at least two different ones; the computation is in float64.
        size: Number c of eigenvectors, from the second smallest eigenvalue on.
        least_similarity: m, in (0, 1).

    Returns:
        float64 ``(n, c)``; c is at most n - 1.
    """
    within("spectral_embedding", "(0, 1)", least_similarity=least_similarity)
    weights = kernel(points, least_similarity)
    scale = weights.sum(dim=1).rsqrt()
    laplacian = torch.eye(len(points), dtype=weights.dtype, device=weights.device) - scale[:, None] * weights * scale
    vectors: Tensor = torch.linalg.eigh(laplacian).eigenvectors
    return vectors[:, 1 : size + 1]


def kernel(points: Tensor, least_similarity: float) -> Tensor:
    """W of :func:`spectral_embedding`, float64 ``(n, n)``."""
    squares = distances(points.double(), points.double()).square()
    longest = longest_edge(squares)
    return torch.exp(squares * math.log(least_similarity) / longest)


def distances(rows: Tensor, others: Tensor) -> Tensor:
    """Distances of rows to others, ``(n, m)``, not from products: these are inexact where points are close."""
    return torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist")


def longest_edge(table: Tensor) -> Tensor:
    """Longest edge of the minimum spanning tree of a table of distances, ``(n, n)`` (Prim 1957)."""
    nearest, longest = table[0].clone(), table.new_zeros(())
    outside = torch.ones_like(nearest, dtype=torch.bool)
    outside[0] = False
    for _ in range(len(table) - 1):
        row = nearest.masked_fill(~outside, torch.inf).argmin()
        longest = torch.maximum(longest, nearest[row])
        outside = outside & (torch.arange(len(nearest), device=nearest.device) != row)
        nearest = torch.minimum(nearest, table[row])
    return longest


def silhouette(points: Tensor, labels: Tensor) -> float:
    """Mean silhouette of a clustering, in [-1, 1] (Rousseeuw 1987); samples alone in their cluster have 0.

        s_i = (b_i - a_i) / max(a_i, b_i)

    with a_i the mean distance to the others of the cluster and b_i the smallest mean distance to another cluster.

    Args:
        points: ``(n, d)``.
        labels: Cluster of each sample, int64 ``(n,)``.
    """
    clusters, places = labels.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    if len(clusters) < 2:
        return -1.0
    members = torch.nn.functional.one_hot(places, len(clusters)).double()
    sums = distances(points.double(), points.double()) @ members
    sizes = members.sum(dim=0)
    own = members.bool()
    inside = sums[own] / (sizes[places] - 1).clamp(min=1)
    others = (sums / sizes).masked_fill(own, torch.inf).amin(dim=1)
    values = (others - inside) / torch.maximum(inside, others).clamp(min=1e-12)
    return float(torch.where(sizes[places] > 1, values, 0.0).mean())


def plain_kmeans(points: Tensor, known: Tensor, count: int, *, key: int = 0, among_known: bool = True) -> Tensor:
    """New centres by k-means without known centres: of the ``k + count`` centres, those that no known one claims.

    Each known centre claims one of them, by the assignment of the smallest sum of squared distances. With
    ``among_known=False`` all points are of new classes, and k-means has ``count`` centres.

    Args:
        points, known, count, key, among_known: As for :func:`ncd_kmeans`.
    """
    from scipy.optimize import linear_sum_assignment

    if not among_known or not len(known):
        return kmeans(points, count, key=key)
    centres = kmeans(points, len(known) + count, key=key)
    claimed = linear_sum_assignment(distances(known.double(), centres).square().cpu().numpy())[1]
    free = torch.ones(len(centres), dtype=torch.bool)
    free[claimed] = False
    return centres[free.to(centres.device)]
