"""Dependence of two variables by kernels, and the distance of two samples that it gives."""

import torch
from torch import Tensor


def square_distances(rows: Tensor) -> Tensor:
    """Squared Euclidean distances of all pairs of rows ``(N, D)``, float64 ``(N, N)``."""
    rows = rows.double()
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()


def gaussian_kernel(squares: Tensor) -> Tensor:
    """``exp(-s / m)`` of squared distances s, with m the median of the distances of different rows that are above 0.

    It is ``exp(-s / (2 w^2))`` with the width w^2 = m / 2. Without a positive distance it is 1.

    Args:
        squares: ``(N, N)``, symmetric.
    """
    values = squares.flatten().sort().values
    number = (values > 0).sum()
    place = (len(values) - number + (number - 1).clamp(min=0) // 2).clamp(max=len(values) - 1)  # the lower median
    median = values.gather(0, place[None])
    return (-squares / torch.where(median > 0, median, 1.0)).exp()


def hsic(first: Tensor, second: Tensor) -> Tensor:
    """Hilbert-Schmidt independence criterion of paired samples (Gretton et al., ALT 2005), the biased estimate.

        HSIC = trace(K H L H) / N^2,   H = I - 1 1^T / N

    It measures the dependence of pairs: two samples of the same distribution that are paired by chance are independent.

    Args:
        first, second: Kernel matrices K and L of N pairs, ``(N, N)``, symmetric.

    Returns:
        A scalar, at least 0 up to rounding; 0 if one variable is constant.
    """
    centred = first - first.mean(dim=0)
    centred = centred - centred.mean(dim=1, keepdim=True)
    return (centred * second).sum() / len(first) ** 2


def two_sample_distance(kernel: Tensor, members: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of two samples, from the dependence of the data and the sample they are in.

        MMD^2 = (N^2 / (n1 n2))^2 HSIC(K, l l^T),   l = 1 in the first sample, 0 in the second

    Args:
        kernel: Kernel matrix K of both samples together, ``(N, N)``.
        members: l, one row for each assignment, 0 or 1, float64 ``(P, N)``; at least one of both values in a row.

    Returns:
        ``(P,)``, the biased estimate, which is at least 0 up to rounding.
    """
    number, first = kernel.shape[0], members.sum(dim=1)
    centred = members - members.mean(dim=1, keepdim=True)  # HSIC(K, l l^T) = (H l)^T K (H l) / N^2
    dependence = ((centred @ kernel) * centred).sum(dim=1) / number**2
    return (number**2 / (first * (number - first))).square() * dependence
