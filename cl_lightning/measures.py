"""What was learnt and what was forgotten: counts of one evaluation, the accuracy matrix, and what follows from it.

Conventions of all functions here; all tensors are on the CPU, save those that ``StreamAccuracy`` is given:

- ``R`` is the accuracy matrix ``(T, T)``, R[t, i] in [0, 1] the accuracy on the test data of task i after task t,
  counted from 0. Entries that were not measured are nan, usually all above the diagonal (future tasks).
- ``totals`` are numbers of test samples per task ``(T,)``. A mean weighted by them is the accuracy on the pooled data.
- Results are Python floats. nan in an entry that a measure needs makes the measure nan. A mean over nothing is nan: so
  is every measure of forgetting and transfer at T = 1. Weighted means leave out tasks without samples.
- ``curve`` is ``(N,)``, ``curves`` is ``(N, T)``: accuracies at N successive evaluations during training, on T tasks.
  There, nan is a task not evaluated at that point, and is passed over.

The online error of a test-time stream is that of predictions that are made before the batch is learnt from.
"""
# ruff: noqa: N803, N806 - R is the name of the matrix in every paper

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

_BINS = 15  # of the calibration error, as in Guo et al. 2017
_ONE = 2**32  # a confidence of 1 in fixed point: integer sums depend neither on order nor on the number of processes
_NAN = float("nan")


class Row:
    """Result of one evaluation pass over T tasks with C columns; all tensors on the CPU.

    Neither a dataclass nor a tuple, since torchmetrics looks into these and squeezes tensors of one element (T = 1).

    Attributes:
        totals, correct, correct_task_aware: Samples per task; of these, samples whose class has the top score of all
            columns, and of the columns of their own task; int64 ``(T,)``.
        accuracy, task_aware: The shares of these, float64 ``(T,)``, nan for a task without samples.
        prefix: Cumulative accuracy per prefix of the columns, float64 ``(P,)``; None unless asked for.
        confusion: Samples by true (rows) and predicted column, int64 ``(C, C)``; None unless asked for.
        ece: Expected calibration error per task, float64 ``(T,)``; None unless asked for.
        online_error: Of the task just learnt, where it is a test-time stream (:func:`online_error`); else None.
    """

    online_error: float | None = None

    def __init__(
        self,
        totals: Tensor,
        correct: Tensor,
        correct_task_aware: Tensor,
        prefix: Tensor | None = None,
        confusion: Tensor | None = None,
        ece: Tensor | None = None,
    ) -> None:
        self.totals, self.correct, self.correct_task_aware = totals, correct, correct_task_aware
        self.accuracy = correct.double() / totals  # 0 / 0 is nan
        self.task_aware = correct_task_aware.double() / totals
        self.prefix, self.confusion, self.ece = prefix, confusion, ece


class StreamAccuracy(Metric):
    """Counts of one evaluation pass over the test data of all seen tasks, exact on any number of processes.

    Make a new one per evaluation, for the tasks and columns known by then. A label outside the columns (a class of a
    future task) counts as wrong, and is left out of the confusion matrix. Of equal scores the first column wins.

    Args:
        num_tasks, num_classes: Tasks whose samples will come, and columns of the scores; at least 1.
        confusion: Also count the confusion matrix.
        calibration: Also measure the expected calibration error of softmax(scores), per task.
        prefixes: Numbers of columns, not decreasing, usually those seen after each task. For each, the accuracy on the
            samples of the first so many columns with no other column allowed as prediction (cumulative accuracy,
            Soutif-Cormerais et al. 2021, arXiv:2106.11930).

    Raises:
        ValueError: For sizes below 1, and prefixes that decrease or lie outside 1 .. num_classes.
    """

    full_state_update = False
    counts: Tensor
    confusion: Tensor
    bins: Tensor
    prefix: Tensor
    prefix_columns: Tensor

    def __init__(
        self,
        num_tasks: int,
        num_classes: int,
        *,
        confusion: bool = False,
        calibration: bool = False,
        prefixes: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if num_tasks < 1 or num_classes < 1:
            raise ValueError(
                f"StreamAccuracy: {num_tasks} tasks and {num_classes} classes; both must be at least 1, "
                "evaluate after the head has grown for the first task"
            )
        ends = list(prefixes or ())
        if ends and (ends != sorted(ends) or ends[0] < 1 or ends[-1] > num_classes):
            raise ValueError(
                f"StreamAccuracy: prefixes {ends}; give numbers in 1 .. {num_classes} that do not decrease"
            )
        self.num_tasks, self.num_classes = num_tasks, num_classes
        self.with_confusion, self.with_calibration, self.with_prefixes = confusion, calibration, bool(ends)
        shapes: dict[str, tuple[int, ...]] = {"counts": (num_tasks, 3)}  # samples, correct, correct in own task
        shapes |= {"confusion": (num_classes, num_classes)} if confusion else {}
        shapes |= {"bins": (num_tasks, _BINS, 3)} if calibration else {}  # samples, correct, sum of confidences
        shapes |= {"prefix": (len(ends), 2)} if ends else {}  # samples, correct
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")
        self.register_buffer("prefix_columns", torch.tensor(ends, dtype=torch.int64), persistent=False)

    def update(self, scores: Tensor, labels: Tensor, tasks: Tensor, task_columns: Tensor) -> None:
        """Count a batch.

        Args:
            scores: One score per column, the larger the likelier, float ``(B, C)``.
            labels: True columns, int64 ``(B,)``.
            tasks: Task of each sample in 0 .. T - 1, int64 ``(B,)``.
            task_columns: Which columns belong to which task, bool ``(T, C)``.

        Raises:
            ValueError: If ``scores`` or ``task_columns`` have other sizes than the metric was made for.
        """
        if scores.shape[1:] != (self.num_classes,) or task_columns.shape != (self.num_tasks, self.num_classes):
            raise ValueError(
                f"StreamAccuracy: scores {tuple(scores.shape)} and task_columns {tuple(task_columns.shape)}; expected "
                f"(batch, {self.num_classes}) and ({self.num_tasks}, {self.num_classes}); make a new metric when the "
                "head has grown"
            )
        allowed = task_columns[tasks]  # (B, C)
        predicted = scores.argmax(1)
        aware = scores.masked_fill(~allowed, float("-inf")).argmax(1)
        correct = predicted == labels
        # a task without columns has no right answer, where argmax would name column 0
        correct_aware = (aware == labels) & allowed.gather(1, aware[:, None])[:, 0]
        ones = torch.ones_like(labels)
        # index_add_ of integers: exact on every device, and without the copy to the host that bincount makes
        self.counts.index_add_(0, tasks, torch.stack([ones, correct, correct_aware], 1))
        known = (labels >= 0) & (labels < self.num_classes)
        columns = labels.clamp(0, self.num_classes - 1)
        if self.with_confusion:
            self.confusion.view(-1).index_add_(0, columns * self.num_classes + predicted, known.long())
        if self.with_calibration:
            confidence = scores.float().softmax(1).amax(1)
            bins = ((confidence * _BINS).ceil().long() - 1).clamp(0, _BINS - 1)  # bin b is (b / 15, (b + 1) / 15]
            rows = torch.stack([ones, correct, (confidence * _ONE).round().long()], 1)
            self.bins.view(-1, 3).index_add_(0, tasks * _BINS + bins, rows)
        if self.with_prefixes:
            running = scores.cummax(1).values  # top score of columns 0 .. c
            own = scores.gather(1, columns[:, None])  # (B, 1)
            first = (columns[:, None] == 0) | (running.gather(1, (columns[:, None] - 1).clamp(min=0)) < own)
            inside = known[:, None] & (labels[:, None] < self.prefix_columns)  # (B, P)
            hit = inside & first & (own >= running[:, self.prefix_columns - 1])
            self.prefix += torch.stack([inside.sum(0), hit.sum(0)], 1)

    def compute(self) -> Row:
        """Counts and accuracies over all processes; to be called on each of them."""
        prefix = confusion = ece = None
        if self.with_prefixes:
            samples, hits = self.prefix.cpu().unbind(1)
            prefix = hits.double() / samples
        if self.with_confusion:
            confusion = self.confusion.cpu()
        if self.with_calibration:
            samples, hits, confidence = self.bins.cpu().unbind(2)
            ece = expected_calibration_error(samples, hits, confidence.double() / _ONE)
        totals, correct, correct_aware = self.counts.cpu().unbind(1)
        return Row(totals, correct, correct_aware, prefix, confusion, ece)


class AccuracyMatrix:
    """Accuracies after each task on each task, nan where unknown. Grows with what is filled in.

    Attributes:
        R_ci, R_ti: The class-incremental matrix and the one with the task known, float64 ``(T, T)``.
        R_prefix: Cumulative accuracy after task t on the classes of tasks 0 .. k, likewise.
        R_ece: Expected calibration error after task t on task i, likewise.
        per_class: Accuracy after task t on the class of each column, float64 ``(T, C)``.
        confusion: Samples by true (rows) and predicted column in the latest evaluation, int64 ``(C, C)``.
        start_ci, start_ti: Accuracies before any training, float64 ``(T,)``.
        online_error: Error on the stream of each task while it was learnt, float64 ``(T,)``.
        totals: Test samples per task in its latest evaluation, int64 ``(T,)``.
    """

    _FIELDS = ("R_ci", "R_ti", "R_prefix", "R_ece", "start_ci", "start_ti", "online_error", "totals")
    _OF_CLASSES = ("per_class", "confusion")

    def __init__(self, num_tasks: int = 0) -> None:
        self.R_ci, self.R_ti, self.R_prefix, self.R_ece = (_nans(num_tasks, num_tasks) for _ in range(4))
        self.per_class, self.confusion = _nans(num_tasks, 0), torch.zeros(0, 0, dtype=torch.int64)
        self.start_ci, self.start_ti, self.online_error = (_nans(num_tasks) for _ in range(3))
        self.totals = torch.zeros(num_tasks, dtype=torch.int64)

    @property
    def learned(self) -> int:
        """Number of tasks learnt: one more than the last row with an entry."""
        rows = (~self.R_ci.isnan()).any(1).nonzero()
        return int(rows[-1]) + 1 if len(rows) else 0

    def fill(self, task: int, row: Row) -> None:
        """Enter the evaluation after ``task`` (-1: before any training), in place of an earlier one after it.

        The row covers tasks 0 .. n - 1; those from ``task + 1`` on, if any, serve the forward transfer.
        """
        if task < -1:
            raise ValueError(f"AccuracyMatrix: task {task}; give an index from 0, or -1 for before any training")
        size = max(task + 1, len(row.totals), 0 if row.prefix is None else len(row.prefix))
        grow = max(size - len(self.totals), 0)
        for name in self._FIELDS:
            old: Tensor = getattr(self, name)
            setattr(self, name, F.pad(old, (0, grow) * old.ndim, value=0 if name == "totals" else _NAN))
        lines = [(self.start_ci, row.accuracy), (self.start_ti, row.task_aware)]
        if task >= 0:
            prefix = _nans(0) if row.prefix is None else row.prefix
            ece = _nans(0) if row.ece is None else row.ece
            lines = [(self.R_ci[task], row.accuracy), (self.R_ti[task], row.task_aware)]
            lines += [(self.R_prefix[task], prefix), (self.R_ece[task], ece)]
            if row.online_error is not None:
                self.online_error[task] = row.online_error
        for line, values in lines:
            line.fill_(_NAN)[: len(values)] = values
        self.totals[: len(row.totals)] = row.totals
        classes = 0 if row.confusion is None else max(len(row.confusion) - self.per_class.shape[1], 0)
        self.per_class = F.pad(self.per_class, (0, classes, 0, grow), value=_NAN)
        if task >= 0 and row.confusion is not None:
            self.confusion = row.confusion
            self.per_class[task].fill_(_NAN)[: len(row.confusion)] = per_class_accuracy(row.confusion)

    def measures(self, t: int | None = None) -> dict[str, float]:
        """Measures after task ``t`` (None: after the last one learnt), by name; undefined ones (nan) are left out.

        Names without prefix: class-incremental, average accuracies weighted by test samples. ``task_aware/...``: with
        the task known, unweighted over tasks, as such numbers are published.
        """
        size = self.learned if t is None else t + 1
        if not 1 <= size <= self.learned:
            raise ValueError(f"AccuracyMatrix: no measures after task {size - 1}; {self.learned} tasks are filled in")
        values = {
            "cumulative_forgetting": forgetting_last(self.R_prefix[:size, :size]),
            "mean_online_error": mean_online_error(self.online_error[:size]),
        }
        for mark, matrix, start, totals in (
            ("", self.R_ci, self.start_ci, self.totals[:size]),
            ("task_aware/", self.R_ti, self.start_ti, None),
        ):
            R = matrix[:size, :size]
            values[f"{mark}average_accuracy"] = average_accuracy(R, totals=totals)
            values[f"{mark}average_incremental_accuracy"] = average_incremental_accuracy(R, totals)
            values[f"{mark}forgetting"] = forgetting_max(R)
            values[f"{mark}backward_transfer"] = backward_transfer(R)
            values[f"{mark}forward_transfer"] = forward_transfer(R, start[:size])
            values[f"{mark}learning_accuracy"] = learning_accuracy(R)
            values[f"{mark}old_accuracy"], values[f"{mark}new_accuracy"] = old_new_accuracy(R, totals=totals)
        return {name: value for name, value in values.items() if value == value}

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors, for a checkpoint."""
        return {name: getattr(self, name).clone() for name in self._FIELDS + self._OF_CLASSES}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a state, whatever number of tasks it has."""
        fresh = type(self)(len(state["totals"]))
        for name in self._FIELDS + self._OF_CLASSES:
            setattr(self, name, state.get(name, getattr(fresh, name)).cpu().clone())

    def to_dict(self) -> dict[str, Any]:
        """Nested lists that JSON can hold, None for nan; without the confusion matrix, which may be large."""
        return {name: _listed(getattr(self, name).tolist()) for name in (*self._FIELDS, "per_class")}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Inverse of ``to_dict``."""
        result = cls(len(data["totals"]))
        for name in cls._FIELDS:
            if name in data:
                old: Tensor = getattr(result, name)
                setattr(result, name, torch.tensor(_unlisted(data[name]), dtype=old.dtype).reshape(old.shape))
        if data.get("per_class"):
            result.per_class = torch.tensor(_unlisted(data["per_class"]), dtype=torch.float64)
        return result


def online_error(counts: Tensor) -> Tensor:
    """Share of a stream that was predicted wrongly before it was learnt from; float64 ``(...)``, nan without samples.

    Each batch of a test-time stream is predicted, then learnt from; an image is predicted once (continual test-time
    adaptation: Wang et al., CVPR 2022, arXiv:2203.13591). ``counts`` ``(..., 2)`` are samples, and right ones of them.
    """
    samples, right = counts.cpu().unbind(-1)
    return 1 - right.double() / samples


def mean_online_error(errors: Tensor) -> float:
    """Mean of the online errors of the domains ``(T,)``, as papers give it, each domain counting alike; in [0, 1].

    Tasks that were no test-time stream, such as the source domain, are nan and left out; nan if all are.
    """
    return float(errors.double().nanmean())


def average_accuracy(R: Tensor, t: int = -1, totals: Tensor | None = None) -> float:
    """A_t = sum_{i <= t} w_i R[t, i], w_i = 1 / (t + 1), or n_i / sum_{j <= t} n_j given ``totals``; in [0, 1].

    With ``totals`` it is the accuracy on all test samples of the seen classes, A_t of the class-incremental papers
    (iCaRL, arXiv:1611.07725); without, at the last task, it is ACC of GEM (arXiv:1706.08840).
    """
    R = _square(R)
    t = range(len(R))[t]
    return _mean(R[t, : t + 1], None if totals is None else totals[: t + 1])


def last_accuracy(R: Tensor, totals: Tensor | None = None) -> float:
    """A_{T-1}, the average accuracy after the last task; in [0, 1]."""
    return average_accuracy(R, -1, totals)


def average_incremental_accuracy(R: Tensor, totals: Tensor | None = None) -> float:
    """(1/T) sum_t A_t (Rebuffi et al. 2017, arXiv:1611.07725); in [0, 1], A_0 at T = 1."""
    R = _square(R)
    weights = torch.ones(len(R), dtype=torch.float64) if totals is None else totals.double()
    terms = (R * weights).where(~_past(R).T & (weights > 0), 0.0)  # [t, i] of w_i R[t, i], i up to t
    return float((terms.sum(1) / weights.cumsum(0)).mean())


def learning_accuracy(R: Tensor, totals: Tensor | None = None) -> float:
    """Mean of R[t, t], each task right after it was learnt (Riemer et al. 2019, arXiv:1810.11910); in [0, 1].

    One minus it is the average error of NEVIS'22 (arXiv:2211.11747), weighted by samples if ``totals`` is given.
    """
    return _mean(_square(R).diagonal(), totals)


def performance_drop(R: Tensor, totals: Tensor | None = None) -> float:
    """PD = A_0 - A_{T-1} (few-shot protocol, Tao et al. 2020, arXiv:2004.10956); in [-1, 1], 0 at T = 1."""
    return average_accuracy(R, 0, totals) - average_accuracy(R, -1, totals)


def old_new_accuracy(R: Tensor, t: int = -1, totals: Tensor | None = None) -> tuple[float, float]:
    """Accuracy after task t on the tasks before it (by samples given ``totals``; nan if t = 0), and on task t."""
    R = _square(R)
    t = range(len(R))[t]
    return _mean(R[t, :t], None if totals is None else totals[:t]), float(R[t, t])


def per_class_accuracy(confusion: Tensor) -> Tensor:
    """Share of each class's samples that were recognised, float64 ``(C,)`` in [0, 1]; nan for a class without samples.

    ``confusion`` ``(C, C)`` has the true column as row, and the predicted one as column.
    """
    confusion = _square(confusion)
    return confusion.diagonal() / confusion.sum(1)


class BaseNovel(NamedTuple):
    """Accuracy on base classes, on novel classes, and the harmonic mean of the two; in [0, 1]."""

    base: float
    novel: float
    harmonic: float


def base_novel_harmonic(classes: Tensor, num_base: int) -> BaseNovel:
    """Mean per-class accuracies a of the first ``num_base`` classes and b of the others, and HM = 2ab / (a + b).

    The measure of few-shot class-incremental learning. Classes without samples are left out. Before a novel class
    exists, ``novel`` and ``harmonic`` are nan; the harmonic mean is 0 where a or b is.

    Args:
        classes: Accuracies per class ``(C,)``, or a confusion matrix ``(C, C)``.
        num_base: Number of classes of the first task.
    """
    accuracies = (per_class_accuracy(classes) if classes.ndim == 2 else classes).double()
    base, novel = (float(part.nanmean()) for part in (accuracies[:num_base], accuracies[num_base:]))
    return BaseNovel(base, novel, 0.0 if base + novel == 0 else 2 * base * novel / (base + novel))


def expected_calibration_error(totals: Tensor, correct: Tensor, confidence: Tensor) -> Tensor:
    """ECE = sum_b (n_b / n) |accuracy_b - mean confidence_b| (Guo et al. 2017, arXiv:1706.04599); in [0, 1].

    All three are ``(..., bins)``: samples n_b, correct ones among them, the sum of their confidences. Returns float64
    ``(...)``, nan where there are no samples.
    """
    return (correct.double() - confidence.double()).abs().sum(-1) / totals.sum(-1)


def forgetting_max(R: Tensor) -> float:
    """F = 1/(T-1) sum_{i < T-1} (max_{i <= l <= T-2} R[l, i] - R[T-1, i]) (Chaudhry et al. 2018, arXiv:1801.10112).

    In [-1, 1]; negative if old tasks end better than they ever were before. nan at T = 1.
    """
    R = _square(R)
    return _mean(R.masked_fill(_past(R).T, -torch.inf)[:-1, :-1].amax(0) - R[-1, :-1]) if len(R) > 1 else _NAN


def forgetting_last(R: Tensor) -> float:
    """1/(T-1) sum_{i < T-1} (R[i, i] - R[T-1, i]); in [-1, 1], nan at T = 1.

    Of the matrix with the task known it is local forgetting (arXiv:2203.17269); of the matrix of cumulative accuracies,
    mean cumulative forgetting (arXiv:2106.11930).
    """
    R = _square(R)
    return _mean((R.diagonal() - R[-1])[:-1])


def backward_transfer(R: Tensor) -> float:
    """BWT = 1/(T-1) sum_{i < T-1} (R[T-1, i] - R[i, i]) (Lopez-Paz & Ranzato 2017, arXiv:1706.08840).

    In [-1, 1], negative when tasks are forgotten; nan at T = 1. The mean of the paper; the authors' code divides by T.
    """
    R = _square(R)
    return _mean((R[-1] - R.diagonal())[:-1])


def forward_transfer(R: Tensor, baseline: Tensor) -> float:
    """FWT = 1/(T-1) sum_{i >= 1} (R[i-1, i] - b_i) (arXiv:1706.08840, the paper's mean); in [-1, 1], nan at T = 1.

    Needs the entries right above the diagonal, and in ``baseline`` b ``(T,)``, the untrained network's accuracies (the
    first is not used).
    """
    return _mean(_square(R).diagonal(1) - baseline[1:].double())


def intransigence(R: Tensor, reference: Tensor) -> float:
    """I = (1/T) sum_t (a_t - R[t, t]); in [-1, 1], negative if the stream helped.

    Chaudhry et al. 2018 (arXiv:1801.10112) report the single terms. ``reference`` a ``(T,)`` is the accuracy on task t
    of a model trained on the data of all tasks up to t.
    """
    return _mean(reference.double() - _square(R).diagonal())


def global_forgetting(R: Tensor, class_counts: Tensor) -> float:
    """F^G = 1/(T-1) sum_{i >= 1} sum_{n < i} (c_n / sum_{m <= i} c_m) (R[n, n] - R[i, n]) (arXiv:2203.17269).

    In (-1, 1), nan at T = 1. ``R`` is class-incremental, ``class_counts`` c ``(T,)`` the number of classes per task.
    """
    R, counts = _square(R), class_counts.double()
    drops = (R.diagonal() - R) * counts / counts.cumsum(0)[:, None]
    return float(drops.where(_past(R), 0.0).sum() / (len(R) - 1))


def performance_maintenance(R: Tensor) -> float:
    """PM = 1/(T-1) sum_{i < T-1} mean_{t > i} (R[t, i] - R[i, i]) (New et al. 2023, arXiv:2301.07799).

    In [-1, 1], negative when tasks are forgotten, nan at T = 1. Times 100, it is on the paper's scale.
    """
    R = _square(R)
    change = (R - R.diagonal()).where(_past(R), 0.0).sum(0)
    return _mean(change[:-1] / torch.arange(len(R) - 1, 0, -1))


def transfer_contrast(R: Tensor, baseline: Tensor | None = None) -> tuple[float, float]:
    """Forward and backward transfer as contrast, (after - before) / (after + before) (arXiv:2301.07799).

    Performance (on the paper's scale of 1 to 101) on task i before and after learning j; the mean over the pairs j < i
    is forward, over j > i backward transfer. Both in (-1, 1). Left out are pairs with nan, and those with accuracy 0
    before and after (a class that the head does not have yet: best read with the task known); nan if no pair is left.

    Args:
        R: The accuracy matrix; for the forward part with its entries above the diagonal.
        baseline: Accuracies before any training ``(T,)``; without them there are no pairs with j = 0.
    """
    R = _square(R)
    before = torch.cat([_nans(1, len(R)) if baseline is None else baseline.double()[None], R[:-1]])
    contrast = (R - before) / (R + before + 0.02)  # performance is 100 R + 1; both sides divided by 100
    contrast = contrast.where(R + before > 0, _NAN)
    return float(contrast[_past(R).T].nanmean()), float(contrast[_past(R)].nanmean())


def min_accuracy(curves: Tensor, ends: Tensor) -> float:
    """min-ACC = 1/(T-1) sum_{i < T-1} min_{n > ends[i]} curves[n, i] (De Lange et al. 2023, arXiv:2205.13452).

    In [0, 1]; nan at T = 1, or if an old task was not evaluated after it ended.

    Args:
        curves: ``(N, T)`` of the tasks seen so far; the last column, the task being learnt, is not looked at.
        ends: Index ``(T,)`` of the last evaluation while task i was trained; the last entry is not used.
    """
    after = torch.arange(len(curves))[:, None] > ends
    lowest = curves.double().where(after & ~curves.isnan(), torch.inf)[:, :-1].amin(0)
    return _mean(lowest.where(lowest < torch.inf, _NAN))


def worst_case_accuracy(curves: Tensor, ends: Tensor) -> float:
    """WC-ACC = (1/T) curves[-1, T-1] + (1 - 1/T) min-ACC (arXiv:2205.13452), arguments as of ``min_accuracy``.

    In [0, 1], never above the mean accuracy of the last evaluation; at T = 1 the current accuracy.
    """
    tasks, current = curves.shape[1], float(curves[-1, -1])
    return current / tasks + (1 - 1 / tasks) * min_accuracy(curves, ends) if tasks > 1 else current


def windowed_forgetting(curve: Tensor, window: int) -> float:
    """WF^w: largest drop A(a) - A(b), a < b, within ``window`` >= 2 successive evaluations (arXiv:2205.13452).

    In [0, 1]: 0 if there is no drop, as in the authors' code; nan for a task never evaluated. Of curves ``(N, T)``, the
    mean over tasks.
    """
    if window < 2:
        raise ValueError(f"windowed measure: window {window}; give at least 2, a change needs two evaluations")
    columns = (curve[:, None] if curve.ndim == 1 else curve).double().T  # (T, N)
    missing = columns.isnan()
    padded = F.pad(columns.masked_fill(missing, -torch.inf), (window - 1, 0), value=-torch.inf)
    highest = F.max_pool1d(padded[:, None], window, stride=1)[:, 0]  # of the window that ends here
    drops = (highest - columns).masked_fill(missing, 0.0).amax(1)
    return _mean(drops.masked_fill(missing.all(1), _NAN))


def windowed_plasticity(curve: Tensor, window: int) -> float:
    """WP^w: largest rise within ``window`` successive evaluations; all else as for ``windowed_forgetting``."""
    return windowed_forgetting(-curve, window)


def average_anytime_accuracy(accuracies: Tensor) -> float:
    """AAA: mean over evaluations ``(N,)`` of the accuracy on all classes seen by then (arXiv:2308.10328); in [0, 1]."""
    return float(accuracies.double().nanmean())


def lca(curves: Tensor, starts: Tensor, beta: int = 10) -> float:
    """Learning curve area: mean over tasks of the mean of a task's first ``beta`` >= 1 evaluations; in [0, 1].

    As in arXiv:2205.13452; LCA_beta of A-GEM (arXiv:1812.00420) has beta + 1, the first before the first update.
    ``starts`` ``(T,)`` are the first evaluations that count. Tasks with fewer evaluations, or a nan, are left out.
    """
    padded = F.pad(curves.double(), (0, 0, 0, beta), value=_NAN)
    rows = (starts + torch.arange(beta)[:, None]).clamp(max=len(padded) - 1)  # (beta, T)
    return float(padded.gather(0, rows).mean(0).nanmean())


def area_under_budget(budgets: Tensor, accuracies: Tensor) -> float:
    """Trapezoid area of accuracy in [0, 1] over memory budget (Zhou et al. 2024, arXiv:2302.03648), in MB.

    AUC-A with average incremental, AUC-L with last accuracies. ``budgets`` ``(M,)`` are in MB of 2^20 bytes, in any
    order; nan with fewer than two. A constant accuracy a gives a (m_max - m_min).
    """
    order = budgets.argsort()
    area = torch.trapezoid(accuracies.double()[order], budgets.double()[order])
    return float(area) if len(budgets) > 1 else _NAN


def _nans(*shape: int) -> Tensor:
    return torch.full(shape, _NAN, dtype=torch.float64)


def _past(R: Tensor) -> Tensor:
    return torch.ones_like(R, dtype=torch.bool).tril(-1)  # [t, i] with i before t


def _square(matrix: Tensor) -> Tensor:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise ValueError(f"measures: a matrix of shape {tuple(matrix.shape)}; expected (T, T) with T at least 1")
    return matrix.double()


def _mean(values: Tensor, weights: Tensor | None = None) -> float:
    if weights is None:
        return float(values.mean())  # nan of an empty tensor
    return float((values * weights).where(weights > 0, 0.0).sum() / weights.sum())


def _listed(value: list[Any]) -> list[Any]:
    if value and isinstance(value[0], list):
        return [_listed(item) for item in value]
    return [None if item != item else item for item in value]


def _unlisted(value: Any) -> Any:
    return [_unlisted(item) for item in value] if isinstance(value, list) else _NAN if value is None else value
