"""Measures of accuracy curves during training; conventions as in ``functional``."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_lightning.measures.functional import _NAN, _mean


def min_accuracy(curves: Tensor, ends: Tensor) -> float:
    """min-ACC = 1/(T-1) sum_{i < T-1} min_{n > ends[i]} curves[n, i] (De Lange et al. 2023, arXiv:2205.13452).

    In [0, 1]; nan at T = 1, or if an old task was not evaluated after its training ended.

    Args:
        curves: ``(N, T)``, of the tasks seen so far; the last column, the current task, is not used.
        ends: Index ``(T,)`` of the last evaluation during training on task i; the last entry is not used.
    """
    after = torch.arange(len(curves))[:, None] > ends
    lowest = curves.double().where(after & ~curves.isnan(), torch.inf)[:, :-1].amin(0)
    return _mean(lowest.where(lowest < torch.inf, _NAN))


def worst_case_accuracy(curves: Tensor, ends: Tensor) -> float:
    """WC-ACC = (1/T) curves[-1, T-1] + (1 - 1/T) min-ACC (arXiv:2205.13452); arguments as in :func:`min_accuracy`.

    In [0, 1], at most the mean accuracy of the last evaluation; at T = 1 the accuracy on the current task.
    """
    tasks, current = curves.shape[1], float(curves[-1, -1])
    return current / tasks + (1 - 1 / tasks) * min_accuracy(curves, ends) if tasks > 1 else current


def windowed_forgetting(curve: Tensor, window: int) -> float:
    """WF^w: largest drop A(a) - A(b), a < b, within ``window`` >= 2 successive evaluations (arXiv:2205.13452).

    In [0, 1]; 0 if the accuracy never drops, as in the authors' code; nan for a task that was never evaluated. For
    curves ``(N, T)``, the mean over tasks.

    Args:
        curve: ``(N,)`` or ``(N, T)``.
        window: w, number of evaluations in a window.

    Raises:
        ValueError: If the window is below 2.
    """
    if window < 2:
        raise ValueError(
            f"windowed measure: window {window}; it must be at least 2, since a change needs 2 evaluations"
        )
    columns = (curve[:, None] if curve.ndim == 1 else curve).double().T  # (T, N)
    missing = columns.isnan()
    padded = F.pad(columns.masked_fill(missing, -torch.inf), (window - 1, 0), value=-torch.inf)
    highest = F.max_pool1d(padded[:, None], window, stride=1)[:, 0]  # maximum of the window that ends at n
    drops = (highest - columns).masked_fill(missing, 0.0).amax(1)
    return _mean(drops.masked_fill(missing.all(1), _NAN))


def windowed_plasticity(curve: Tensor, window: int) -> float:
    """WP^w: largest rise within ``window`` successive evaluations; otherwise as :func:`windowed_forgetting`."""
    return windowed_forgetting(-curve, window)


def average_anytime_accuracy(accuracies: Tensor) -> float:
    """AAA: mean over evaluations ``(N,)`` of the accuracy on all classes seen so far (arXiv:2308.10328); in [0, 1]."""
    return float(accuracies.double().nanmean())


def lca(curves: Tensor, starts: Tensor, beta: int = 10) -> float:
    """Learning curve area: mean over tasks of the mean of a task's first ``beta`` >= 1 evaluations; in [0, 1].

    As in arXiv:2205.13452. LCA_beta of A-GEM (arXiv:1812.00420) has beta + 1 evaluations, the first before any update.

    Args:
        curves: ``(N, T)``.
        starts: Index of the first evaluation that counts for each task, ``(T,)``.
        beta: Number of evaluations per task. Tasks with fewer evaluations, or with a nan among them, are ignored.
    """
    padded = F.pad(curves.double(), (0, 0, 0, beta), value=_NAN)
    rows = (starts + torch.arange(beta)[:, None]).clamp(max=len(padded) - 1)  # (beta, T)
    return float(padded.gather(0, rows).mean(0).nanmean())
