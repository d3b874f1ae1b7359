"""Continual-learning measures as functions of the accuracy matrix.

Conventions of all functions in ``functional`` and ``curves``; all tensors are on the CPU:

- ``R`` is the accuracy matrix ``(T, T)``: R[t, i] in [0, 1] is the accuracy on the test data of task i after training
  on task t, both counted from 0. Entries that were not measured are nan, usually all entries above the diagonal (future
  tasks).
- ``totals`` are the numbers of test samples per task, ``(T,)``. A mean weighted by ``totals`` is the accuracy on the
  pooled test data.
- Results are Python floats. If an entry that a measure needs is nan, the measure is nan. The mean of no values is nan:
  every measure of forgetting and transfer is nan at T = 1. Weighted means ignore tasks without samples.
- ``tested`` says which tasks have test samples, bool ``(T,)``; None for all. Means over tasks ignore the others, whose
  columns of R are nan. For an unweighted mean, a function with ``totals`` takes ``tested`` in its place.
- ``curve`` is ``(N,)``, ``curves`` is ``(N, T)``: accuracies at N successive evaluations during training, on T tasks.
  In a curve, nan means that the task was not evaluated at that point; it is ignored.

The online error of a test-time stream is the error of predictions made before the model is updated with the batch.
"""

# ruff: noqa: N803, N806 - R is the name of the matrix in every paper

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

_NAN = float("nan")


def online_error(counts: Tensor) -> Tensor:
    """Share of the samples of a test-time stream that were predicted wrongly, float64 ``(...)`` in [0, 1].

    Each batch of the stream is first predicted, then used for the update; each image is predicted once (continual
    test-time adaptation: Wang et al., CVPR 2022, arXiv:2203.13591).

    Args:
        counts: Samples, and correctly predicted samples, ``(..., 2)``.

    Returns:
        float64 ``(...)``, nan where there are no samples.
    """
    samples, right = counts.cpu().unbind(-1)
    return 1 - right.double() / samples


CONFIDENCE_BINS = 2048
_MOST_LOG_ODDS = 16.0


def confidence_counts(scores: Tensor, unknown: Tensor) -> Tensor:
    """Samples by the confidence of their prediction, for :func:`unknown_auroc`; sums over batches and processes add up.

    The confidence is the largest probability of a softmax over the scores (Hendrycks & Gimpel, ICLR 2017,
    arXiv:1610.02136). Bins are equally wide in its log-odds, from -16 to 16, so that confidences near 1 are separated.

    Args:
        scores: ``(B, C)``, at least two classes.
        unknown: Whether each sample is of an unknown class, bool ``(B,)``.

    Returns:
        Counts of known and of unknown samples, int64 ``(2, 2048)``.
    """
    top = scores.double().topk(scores.shape[1]).values
    odds = top[:, 0] - top[:, 1:].logsumexp(dim=1)
    places = (odds.clamp(-_MOST_LOG_ODDS, _MOST_LOG_ODDS) / _MOST_LOG_ODDS + 1) * (CONFIDENCE_BINS / 2)
    bins = places.long().clamp(max=CONFIDENCE_BINS - 1) + CONFIDENCE_BINS * unknown
    return torch.bincount(bins, minlength=2 * CONFIDENCE_BINS).view(2, CONFIDENCE_BINS)


def unknown_auroc(counts: Tensor) -> float:
    """Area under the ROC curve of rejecting samples of unknown classes by a low confidence, in [0, 1].

    It is the probability that a known sample has a larger confidence than an unknown one; equal bins count half.

    Args:
        counts: Counts of known and unknown samples by confidence, int64 ``(2, bins)``; see :func:`confidence_counts`.

    Returns:
        The area; nan without a sample of either kind.
    """
    known, unknown = counts.double()
    below = unknown.cumsum(0) - unknown / 2
    return float((known * below).sum() / (known.sum() * unknown.sum()))


def mean_online_error(errors: Tensor) -> float:
    """Mean of the online errors of the domains, unweighted as in the literature; in [0, 1].

    Args:
        errors: Online error per task, ``(T,)``; nan for tasks that are no test-time stream, such as the source domain.

    Returns:
        The mean without the nan entries; nan if all entries are nan.
    """
    return float(errors.double().nanmean())


def average_accuracy(R: Tensor, t: int = -1, totals: Tensor | None = None) -> float:
    """A_t = sum_{i <= t} w_i R[t, i], w_i = 1 / (t + 1), or n_i / sum_{j <= t} n_j given ``totals``; in [0, 1].

    With ``totals``, the accuracy on all test samples of the seen classes, A_t of class-incremental papers (iCaRL,
    arXiv:1611.07725). Without ``totals`` and after the last task, ACC of GEM (arXiv:1706.08840).
    """
    R = _square(R)
    t = range(len(R))[t]
    return _mean(R[t, : t + 1], None if totals is None else totals[: t + 1])


def headline_accuracy(measures: Mapping[str, float]) -> float:
    """Average accuracy of a run in one number: class-incremental, or task-aware where a method needs the task.

    Args:
        measures: By name, as ``AccuracyMatrix.measures`` gives them; nan where both are missing.
    """
    return measures.get("average_accuracy", measures.get("task_aware/average_accuracy", _NAN))


def last_accuracy(R: Tensor, totals: Tensor | None = None) -> float:
    """A_{T-1}, the average accuracy after the last task; in [0, 1]."""
    return average_accuracy(R, -1, totals)


def average_incremental_accuracy(R: Tensor, totals: Tensor | None = None) -> float:
    """Average incremental accuracy (1/T) sum_t A_t (Rebuffi et al. 2017, arXiv:1611.07725); in [0, 1], A_0 at T = 1."""
    R = _square(R)
    weights = torch.ones(len(R), dtype=torch.float64) if totals is None else totals.double()
    terms = (R * weights).where(~_past(R).T & (weights > 0), 0.0)  # [t, i]: w_i R[t, i] for i <= t, else 0
    total = weights.cumsum(0)
    return float((terms.sum(1) / total)[total > 0].mean())


def learning_accuracy(R: Tensor, totals: Tensor | None = None) -> float:
    """Mean of R[t, t], the accuracy on each task right after training on it (Riemer et al. 2019, arXiv:1810.11910).

    In [0, 1]. With ``totals``, weighted by samples: 1 minus this value is the average error of NEVIS'22
    (arXiv:2211.11747).
    """
    return _mean(_square(R).diagonal(), totals)


def performance_drop(R: Tensor, totals: Tensor | None = None) -> float:
    """PD = A_0 - A_{T-1} (few-shot protocol, Tao et al. 2020, arXiv:2004.10956); in [-1, 1], 0 at T = 1."""
    return average_accuracy(R, 0, totals) - average_accuracy(R, -1, totals)


def old_new_accuracy(R: Tensor, t: int = -1, totals: Tensor | None = None) -> tuple[float, float]:
    """Accuracy after task t on the tasks before t (weighted given ``totals``; nan at t = 0), and on task t."""
    R = _square(R)
    t = range(len(R))[t]
    return _mean(R[t, :t], None if totals is None else totals[:t]), float(R[t, t])


def per_class_accuracy(confusion: Tensor) -> Tensor:
    """Recall of each class, float64 ``(C,)`` in [0, 1]; nan for a class without samples.

    Args:
        confusion: Confusion matrix ``(C, C)``, true columns as rows, predicted columns as columns.
    """
    confusion = _square(confusion)
    return confusion.diagonal() / confusion.sum(1)


class BaseNovel(NamedTuple):
    """Accuracy on the base classes, on the novel classes, and their harmonic mean; in [0, 1]."""

    base: float
    novel: float
    harmonic: float


def base_novel_harmonic(classes: Tensor, num_base: int) -> BaseNovel:
    """Mean per-class accuracies a of the first ``num_base`` classes and b of all others, and HM = 2ab / (a + b).

    The measure of few-shot class-incremental learning. Classes without samples are ignored. Before the first novel
    class, ``novel`` and ``harmonic`` are nan; the harmonic mean is 0 if a or b is 0.

    Args:
        classes: Accuracies per class ``(C,)``, or a confusion matrix ``(C, C)``.
        num_base: Number of classes of the first task.
    """
    accuracies = (per_class_accuracy(classes) if classes.ndim == 2 else classes).double()
    base, novel = (float(part.nanmean()) for part in (accuracies[:num_base], accuracies[num_base:]))
    return BaseNovel(base, novel, 0.0 if base + novel == 0 else 2 * base * novel / (base + novel))


def expected_calibration_error(totals: Tensor, correct: Tensor, confidence: Tensor) -> Tensor:
    """ECE = sum_b (n_b / n) |accuracy_b - mean confidence_b| (Guo et al. 2017, arXiv:1706.04599); in [0, 1].

    Args:
        totals: Samples per bin n_b, ``(..., bins)``.
        correct: Correctly predicted samples per bin, ``(..., bins)``.
        confidence: Sum of the confidences per bin, ``(..., bins)``.

    Returns:
        float64 ``(...)``, nan where there are no samples.
    """
    return (correct.double() - confidence.double()).abs().sum(-1) / totals.sum(-1)


def forgetting_max(R: Tensor, tested: Tensor | None = None) -> float:
    """F = 1/(T-1) sum_{i < T-1} (max_{i <= l <= T-2} R[l, i] - R[T-1, i]) (Chaudhry et al. 2018, arXiv:1801.10112).

    In [-1, 1]; negative if the final accuracy on old tasks exceeds all earlier ones. nan at T = 1.
    """
    R = _square(R)
    if len(R) == 1:
        return _NAN
    return _mean_of_old(R.masked_fill(_past(R).T, -torch.inf)[:-1].amax(0) - R[-1], tested)


def forgetting_last(R: Tensor, tested: Tensor | None = None) -> float:
    """1/(T-1) sum_{i < T-1} (R[i, i] - R[T-1, i]); in [-1, 1], nan at T = 1.

    Local forgetting (arXiv:2203.17269) for the task-aware matrix; mean cumulative forgetting (arXiv:2106.11930) for the
    matrix of cumulative accuracies.
    """
    R = _square(R)
    return _mean_of_old(R.diagonal() - R[-1], tested)


def backward_transfer(R: Tensor, tested: Tensor | None = None) -> float:
    """BWT = 1/(T-1) sum_{i < T-1} (R[T-1, i] - R[i, i]) (Lopez-Paz & Ranzato 2017, arXiv:1706.08840).

    In [-1, 1], negative if tasks are forgotten; nan at T = 1. The mean of the paper; the authors' code divides by T.
    """
    R = _square(R)
    return _mean_of_old(R[-1] - R.diagonal(), tested)


def forward_transfer(R: Tensor, baseline: Tensor, tested: Tensor | None = None) -> float:
    """FWT = 1/(T-1) sum_{i >= 1} (R[i-1, i] - b_i) (arXiv:1706.08840, the paper's mean); in [-1, 1], nan at T = 1.

    Args:
        R: The accuracy matrix, with its entries directly above the diagonal.
        baseline: b, the accuracies of the untrained network, ``(T,)``; the first entry is not used.
        tested: Which tasks have test samples, bool ``(T,)``; None for all.
    """
    return _mean(_square(R).diagonal(1) - baseline[1:].double(), None if tested is None else tested[1:])


def intransigence(R: Tensor, reference: Tensor) -> float:
    """I = (1/T) sum_t (a_t - R[t, t]); in [-1, 1], negative if the stream improved the accuracy.

    Chaudhry et al. 2018 (arXiv:1801.10112) report the individual terms.

    Args:
        R: The accuracy matrix.
        reference: a, the accuracy on task t of a model trained jointly on the tasks 0 .. t, ``(T,)``.
    """
    return _mean(reference.double() - _square(R).diagonal())


def global_forgetting(R: Tensor, class_counts: Tensor) -> float:
    """F^G = 1/(T-1) sum_{i >= 1} sum_{n < i} (c_n / sum_{m <= i} c_m) (R[n, n] - R[i, n]) (arXiv:2203.17269).

    In (-1, 1), nan at T = 1.

    Args:
        R: The class-incremental accuracy matrix.
        class_counts: c, the number of classes per task, ``(T,)``.
    """
    R, counts = _square(R), class_counts.double()
    drops = (R.diagonal() - R) * counts / counts.cumsum(0)[:, None]
    return float(drops.where(_past(R), 0.0).sum() / (len(R) - 1))


def performance_maintenance(R: Tensor) -> float:
    """PM = 1/(T-1) sum_{i < T-1} mean_{t > i} (R[t, i] - R[i, i]) (New et al. 2023, arXiv:2301.07799).

    In [-1, 1], negative if tasks are forgotten, nan at T = 1. Multiply by 100 for the scale of the paper.
    """
    R = _square(R)
    change = (R - R.diagonal()).where(_past(R), 0.0).sum(0)
    return _mean(change[:-1] / torch.arange(len(R) - 1, 0, -1))


def transfer_contrast(R: Tensor, baseline: Tensor | None = None) -> tuple[float, float]:
    """Forward and backward transfer as contrast, (after - before) / (after + before) (arXiv:2301.07799).

    ``before`` and ``after`` are the performance (on the paper's scale of 1 to 101) on task i before and after training
    on task j. Forward transfer is the mean over the pairs j < i, backward transfer the mean over the pairs j > i; both
    in (-1, 1). Pairs with nan are ignored, and pairs with accuracy 0 before and after (a class that the head does not
    have yet: prefer the task-aware matrix). nan if no pair is left.

    Args:
        R: The accuracy matrix; forward transfer needs the entries above the diagonal.
        baseline: Accuracies before any training, ``(T,)``; None leaves out the pairs with j = 0.

    Returns:
        Forward transfer and backward transfer.
    """
    R = _square(R)
    before = torch.cat([_nans(1, len(R)) if baseline is None else baseline.double()[None], R[:-1]])
    contrast = (R - before) / (R + before + 0.02)  # performance is 100 R + 1; both sides divided by 100
    contrast = contrast.where(R + before > 0, _NAN)
    return float(contrast[_past(R).T].nanmean()), float(contrast[_past(R)].nanmean())


def area_under_budget(budgets: Tensor, accuracies: Tensor) -> float:
    """Area under the curve of accuracy over memory budget, by the trapezoid rule (Zhou et al. 2024, arXiv:2302.03648).

    AUC-A for average incremental accuracies, AUC-L for last accuracies. A constant accuracy a gives a (m_max - m_min).

    Args:
        budgets: Memory budgets in MB of 2^20 bytes, ``(M,)``, in any order.
        accuracies: Accuracy in [0, 1] at each budget, ``(M,)``.

    Returns:
        The area in MB; nan for fewer than two budgets.
    """
    order = budgets.argsort()
    area = torch.trapezoid(accuracies.double()[order], budgets.double()[order])
    return float(area) if len(budgets) > 1 else _NAN


def _nans(*shape: int) -> Tensor:
    return torch.full(shape, _NAN, dtype=torch.float64)


def _past(R: Tensor) -> Tensor:
    return torch.ones_like(R, dtype=torch.bool).tril(-1)  # [t, i] with i < t


def _square(matrix: Tensor) -> Tensor:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise ValueError(f"measures: matrix has shape {tuple(matrix.shape)}; expected (T, T) with T at least 1")
    return matrix.double()


def _mean_of_old(values: Tensor, tested: Tensor | None) -> float:
    """Mean over all tasks but the last."""
    return _mean(values[:-1], None if tested is None else tested[:-1])


def _mean(values: Tensor, weights: Tensor | None = None) -> float:
    if weights is None:
        return float(values.mean())  # nan for an empty tensor
    return float((values * weights).where(weights > 0, 0.0).sum() / weights.sum())
