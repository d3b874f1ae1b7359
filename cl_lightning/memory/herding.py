"""Choice of exemplars of each class: by herding (Rebuffi et al., CVPR 2017), or at random."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_lightning.batch import Draw
from cl_lightning.memory.policies import rank_in_group


def herding_indices(features: Tensor, count: int, *, normalize: bool = True, normalize_mean: bool = False) -> Tensor:
    """Herding: rows whose running mean is nearest to the mean of all rows (iCaRL, Rebuffi et al., CVPR 2017, alg. 4).

    With S the sum of the rows chosen so far, the k-th choice is

        argmin_i || mu - (S + phi_i) / k ||  =  argmin_i  ||phi_i||^2 + 2 <S, phi_i> - 2 k <mu, phi_i>,

    since k^2 times the squared distance differs from the right side by terms without i. Each choice costs one product
    of the feature matrix and a vector. The first m choices equal ``herding_indices(features, m)``.

    Rows that are equally good go by their order: two rows are always equally far from their mean, and rounding, which
    depends on the batch in which a feature was computed and on the number of processes, must not decide. Equally good
    is a right side within 1e-6 k max ||phi||^2, ten times the rounding of features in float32.

    Args:
        features: Features of one class, ``(n, d)``; the computation is in float64.
        count: Number of rows to choose; all rows if there are fewer.
        normalize: Whether rows are first divided by their norms.
        normalize_mean: Whether the mean of the rows is divided by its norm too.

    Returns:
        Distinct rows in order of choice, int64 ``(min(count, n),)``.
    """
    phi = features.detach().double()
    phi = F.normalize(phi, dim=1) if normalize else phi
    mu = phi.mean(0)
    mu = F.normalize(mu, dim=0) if normalize_mean else mu
    square, with_mean, with_sum = phi.square().sum(1), phi @ mu, torch.zeros_like(phi[:, 0])  # (n,)
    tolerance = 1e-6 * square.max() if len(square) else 0.0
    chosen = []
    for k in range(1, min(count, phi.shape[0]) + 1):
        cost = square + 2 * with_sum - 2 * k * with_mean
        equal = cost <= cost.amin() + k * tolerance
        row = equal.byte().argmax(0, keepdim=True)  # the first; a tensor: no synchronisation
        chosen.append(row)
        with_sum += phi @ phi.index_select(0, row)[0]
        square.index_fill_(0, row, float("inf"))  # a row is chosen once
    return torch.cat(chosen) if chosen else torch.empty(0, dtype=torch.int64, device=phi.device)


def herding_per_class(features: Tensor, labels: Tensor, quota: int, **options: bool) -> Tensor:
    """Herding of each class: rows class by class, in order of choice, for a memory with ``HerdingPolicy()``.

    With 100 rows of each of 3 classes and a quota of 20, the result has 60 rows, 20 per class.

    Args:
        features: ``(n, d)``.
        labels: Columns, int64 ``(n,)``.
        quota: Number of rows to choose in each class; all rows of a class that has fewer.
        options: Options of :func:`herding_indices`.

    Returns:
        Rows, int64, ``(at most quota * number of classes,)``.
    """
    members = [(labels == label).nonzero().flatten() for label in torch.bincount(labels).nonzero()]
    return torch.cat(
        [labels.new_empty(0), *(rows[herding_indices(features[rows], quota, **options)] for rows in members)]
    )


def random_per_class(labels: Tensor, quota: int | Tensor, key: int) -> Tensor:
    """Random choice of rows of each class, without replacement, every subset with equal probability.

    Args:
        labels: Columns, int64 ``(n,)``; rows with -1 are never chosen.
        quota: Number of rows to choose in each class, at least 0, or the number in the class of each row, ``(n,)``; all
            rows of a class that has fewer.
        key: Key of the random numbers.

    Returns:
        Mask of the chosen rows, bool ``(n,)``.
    """
    level, _ = rank_in_group(Draw.of(len(labels), key).randint((1 << 63) - 1).to(labels.device), labels)
    return (level < quota) & (labels >= 0)
