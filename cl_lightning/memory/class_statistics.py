"""Mean and covariance of the features of each class, and classification by the nearest mean."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.distributed import all_sum, is_distributed

Metric = Literal["euclidean", "cosine"]


class ClassStatistics(NamedTuple):
    """Statistics of the features of each class; all 0 for a class without features.

    Attributes:
        counts: Number of samples, int64 ``(C,)``.
        means: float64 ``(C, d)``.
        covariances: Unbiased (divided by count - 1; 0 for a single sample), float64 ``(C, d, d)``; None
            with ``covariance=False``.
    """

    counts: Tensor
    means: Tensor
    covariances: Tensor | None


@torch.no_grad()
def class_statistics(
    features: Tensor, labels: Tensor, num_classes: int, *, covariance: bool = True, reduce: bool = True
) -> ClassStatistics:
    """Count, mean and covariance of the features of each class.

        mu_c = 1/n_c sum_{y_i = c} f_i,   Sigma_c = 1/(n_c - 1) sum_{y_i = c} (f_i - mu_c)(f_i - mu_c)^T

    Args:
        features: ``(n, d)``; n may be 0.
        labels: Columns, int64 ``(n,)``; rows with label -1 are left out.
        num_classes: C.
        covariance: Whether to compute covariances, which take ``C * d * d`` numbers of 8 bytes.
        reduce: Whether ``features`` is this process's share of the rows. The sums are then reduced over all processes,
            and the result, of all rows, is the same on every process. False if each process has all rows.

    Returns:
        The statistics; for features ``(500, 64)`` of 10 classes: counts ``(10,)``, means ``(10, 64)`` and covariances
        ``(10, 64, 64)``.
    """
    d = features.shape[1]
    sums = torch.zeros(num_classes, d, dtype=torch.float64, device=features.device)
    scatters = sums.new_zeros(num_classes, d, d) if covariance else sums.new_zeros(0)
    features, labels = features[labels >= 0], labels[labels >= 0]
    counts = labels.bincount(minlength=num_classes)
    # One matrix product per class: index_add_ sums in an order that varies on a GPU.
    for column, rows in enumerate(torch.split(features[labels.argsort(stable=True)], counts.tolist())):
        sums[column] = rows.double().sum(dim=0)
        if covariance and len(rows):
            centred = rows.double() - sums[column] / len(rows)
            scatters[column] = centred.T @ centred
    local_counts, local_sums = counts, sums
    if reduce:
        counts, sums = all_sum(counts.clone()), all_sum(sums.clone())
    means = sums / counts.clamp(min=1)[:, None]
    if not covariance:
        return ClassStatistics(counts, means, None)
    if reduce and is_distributed():
        # Each process has centred on its local mean: add the difference to scatters around the common mean.
        gap = local_sums / local_counts.clamp(min=1)[:, None] - means
        scatters += local_counts[:, None, None] * gap[:, :, None] * gap[:, None, :]
        all_sum(scatters)
    return ClassStatistics(counts, means, scatters.div_((counts - 1).clamp(min=1)[:, None, None]))


def class_means(features: Tensor, labels: Tensor, num_classes: int, *, reduce: bool = True) -> Tensor:
    """Mean feature of each class, 0 for a class without features.

    Args:
        features: ``(n, d)``.
        labels: Columns, int64 ``(n,)``; rows with label -1 are left out.
        num_classes: C.
        reduce: Whether ``features`` is this process's share of the rows, as in :func:`class_statistics`.

    Returns:
        ``(C, d)`` in the dtype of the features, or float32 if that is a narrower type.
    """
    means = class_statistics(features, labels, num_classes, covariance=False, reduce=reduce).means
    return means.to(torch.promote_types(features.dtype, torch.float32))


def dense_columns(labels: Tensor, num_classes: int, *, reduce: bool = True) -> tuple[Tensor, Tensor]:
    """Columns that occur in labels, and the labels as places in the list of these columns.

    For columns ``[5, 2, -1, 5]`` these are ``[2, 5]`` and ``[1, 0, -1, 1]``.

    Args:
        labels: Columns, int64 ``(n,)``; -1 for unlabelled rows.
        num_classes: C.
        reduce: Whether ``labels`` is this process's share of the rows. A column then counts if it occurs on any
            process, and the list is the same on all of them.

    Returns:
        Columns in ascending order, int64 ``(m,)``, and places, int64 ``(n,)``, -1 for -1.
    """
    present = labels[labels >= 0].bincount(minlength=num_classes)
    columns = (all_sum(present) if reduce else present).nonzero().squeeze(1)
    place = torch.full((num_classes + 1,), -1, device=labels.device)  # the last entry is for label -1
    place[columns] = torch.arange(len(columns), device=labels.device)
    return columns, place[labels]


def shrink(covariances: Tensor, diagonal: float, others: float, *, skip_zeros: bool = False) -> Tensor:
    """Covariances shrunk towards equal variances and equal covariances: ``Sigma + a1 V1 I + a2 V2 (1 1^T - I)``.

    ``shrink(shrink(S, a, a), -a / (1 + a), -a / (1 + a))`` is S, without ``skip_zeros``.

    Args:
        covariances: Sigma, ``(..., d, d)``.
        diagonal: a1, weight of the mean variance V1.
        others: a2, weight of V2, the mean of the entries off the diagonal; 0 for d = 1.
        skip_zeros: Whether V2 is the mean of the entries that are not 0 only, as for features of which some are always
            0.

    Returns:
        ``(..., d, d)``.
    """
    size = covariances.shape[-1]
    identity = torch.eye(size, dtype=covariances.dtype, device=covariances.device)
    rest = covariances * (1 - identity)
    variance = covariances.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
    number = (rest != 0).sum(dim=(-2, -1)) if skip_zeros else torch.full_like(variance[..., 0, 0], size * (size - 1))
    mean = (rest.sum(dim=(-2, -1)) / number.clamp(min=1))[..., None, None]
    return covariances + diagonal * variance * identity + others * mean * (1 - identity)


def squared_distances(rows: Tensor, columns: Tensor, metric: Tensor | None = None) -> Tensor:
    """``(r - c)^T M (r - c)`` of all pairs, by one matrix product.

    The difference of large products rounds: give points near the origin, or float64.

    Args:
        rows: r, ``(n, d)``.
        columns: c, ``(m, d)``.
        metric: M, symmetric, ``(d, d)``; None for the identity.

    Returns:
        ``(n, m)``, at least 0.
    """
    mapped = columns if metric is None else columns @ metric
    own = rows if metric is None else rows @ metric
    distances = (own * rows).sum(dim=1)[:, None] - 2 * rows @ mapped.T + (mapped * columns).sum(dim=1)
    return distances.clamp(min=0)


def nearest_mean_scores(
    features: Tensor, means: Tensor, metric: Metric = "euclidean", *, block_size: int = 8192
) -> Tensor:
    """Classification by the nearest class mean: a score per class, whose maximum is the prediction.

    Args:
        features: ``(n, d)``.
        means: ``(C, d)``.
        metric: ``euclidean``: minus the squared distance; ``cosine``: the cosine of the angle, in [-1, 1].
        block_size: Number of features whose scores are computed at a time; it bounds memory.

    Returns:
        ``(n, C)`` in the dtype of the features, or float32 if that is a narrower type.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    means = means.to(dtype)
    # Distances do not depend on the origin; the rounding error of their expansion into products does.
    origin = means.mean(dim=0)

    def score(block: Tensor) -> Tensor:
        if metric == "cosine":
            return F.normalize(block, dim=1) @ F.normalize(means, dim=1).T
        return -squared_distances(block - origin, means - origin)

    with torch.autocast(features.device.type, enabled=False):
        return torch.cat([score(block.to(dtype)) for block in torch.split(features, block_size)])
