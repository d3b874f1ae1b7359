"""Accuracy counts of one evaluation pass, exact on any number of processes.

The accuracy matrix is in ``matrix``; the measures computed from it, and their conventions, are in ``functional``.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torchmetrics import Metric

from cl_lightning.measures.functional import expected_calibration_error

_BINS = 15  # number of bins of the calibration error, as in Guo et al. 2017
_ONE = 2**32  # confidence 1 in fixed point: integer sums depend neither on their order nor on the number of processes


class EvaluationResult:
    """Result of one evaluation pass over T tasks with C columns; all tensors on the CPU.

    Neither a dataclass nor a tuple: torchmetrics descends into both and squeezes tensors with one element (T = 1).

    Attributes:
        totals: Test samples per task, int64 ``(T,)``; for scores that are means over classes, their number.
        correct: Samples whose class has the highest score of all columns, int64 ``(T,)``.
        correct_task_aware: Samples whose class has the highest score of the columns of its task, int64 ``(T,)``.
        accuracy: ``correct / totals``, float64 ``(T,)`` in [0, 1]; nan for a task without samples.
        task_aware: ``correct_task_aware / totals``, likewise.
        prefix: Cumulative accuracy per prefix of the columns, float64 ``(P,)``; None if it was not requested.
        confusion: Samples by true (rows) and predicted column, int64 ``(C, C)``; None if it was not requested.
        ece: Expected calibration error per task, float64 ``(T,)``; None if it was not requested.
        online_error: Online error of the current task, in [0, 1], if the task is a test-time stream
            (:func:`~cl_lightning.measures.online_error`); else None.
        unknown_auroc: How well the confidence rejects samples of unknown classes in this stream, in [0, 1]
            (:func:`~cl_lightning.measures.unknown_auroc`); None without such samples.
    """

    online_error: float | None = None
    unknown_auroc: float | None = None

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

    @classmethod
    def of_scores(cls, values: Tensor, weights: Tensor) -> Self:
        """Result of another score than accuracy: no counts of correct predictions, and no task-aware reading.

        Args:
            values: Score of each task, float64 ``(T,)``; nan where it is not defined.
            weights: Weight of each task in averages, such as its number of classes, int64 ``(T,)``.
        """
        result = cls(weights, torch.zeros_like(weights), torch.zeros_like(weights))
        result.accuracy = values.double()
        result.task_aware = torch.full_like(result.accuracy, float("nan"))
        return result

    def average(self, *, task_aware: bool = False) -> float:
        """Average over the tasks, weighted by ``totals``; tasks without a value are left out; 0 without any."""
        values = self.task_aware if task_aware else self.accuracy
        weights = self.totals.where(~values.isnan(), 0)
        return float((values.nan_to_num() * weights).sum() / weights.sum().clamp(min=1))

    def leave_out_class_incremental(self) -> None:
        """Mark the class-incremental reading as not measured: ``accuracy`` is nan, for a method that needs the task."""
        self.accuracy = torch.full_like(self.task_aware, float("nan"))
        self.prefix = self.confusion = self.ece = None


class StreamAccuracy(Metric):
    """Accuracy of one evaluation pass over the test data of all seen tasks, exact on any number of processes.

    Create a new metric for each evaluation, with the number of tasks and columns at that time. A label outside the
    columns (a class of a future task) counts as wrong and is left out of the confusion matrix. Ties go to the first
    column.

    Args:
        num_tasks: Number of tasks in the evaluation, T, at least 1.
        num_classes: Number of columns of the scores, C, at least 1.
        confusion: Whether to compute the confusion matrix.
        calibration: Whether to compute the expected calibration error of softmax(scores), per task.
        prefixes: Numbers of columns, not decreasing, usually the numbers of classes seen after each task. For each
            number p, the accuracy on the samples of the first p columns, with predictions restricted to these columns
            (cumulative accuracy, Soutif-Cormerais et al. 2021, arXiv:2106.11930).

    Raises:
        ValueError: If a size is below 1, or the prefixes decrease or lie outside 1 .. num_classes.
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
                f"StreamAccuracy: {num_tasks} tasks and {num_classes} classes; both must be at least 1; "
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

    def update(
        self, scores: Tensor, labels: Tensor, tasks: Tensor, task_columns: Tensor, task_aware: Tensor | None = None
    ) -> None:
        """Add a batch to the counts.

        Args:
            scores: One score per column, higher is more likely, float ``(B, C)``.
            labels: True columns, int64 ``(B,)``.
            tasks: Task of each sample in 0 .. T - 1, int64 ``(B,)``.
            task_columns: Columns of each task, bool ``(T, C)``.
            task_aware: Scores with the task of each sample known, float ``(B, C)``; None for ``scores``.

        Raises:
            ValueError: If the shape of ``scores`` or ``task_columns`` does not match the sizes of the metric.
        """
        if scores.shape[1:] != (self.num_classes,) or task_columns.shape != (self.num_tasks, self.num_classes):
            raise ValueError(
                f"StreamAccuracy: scores {tuple(scores.shape)} and task_columns {tuple(task_columns.shape)}; expected "
                f"(batch, {self.num_classes}) and ({self.num_tasks}, {self.num_classes}); make a new metric when the "
                "head has grown"
            )
        allowed = task_columns[tasks]  # (B, C)
        predicted = scores.argmax(1)
        aware = (scores if task_aware is None else task_aware).masked_fill(~allowed, float("-inf")).argmax(1)
        correct = predicted == labels
        # for a task without columns no prediction is correct, although argmax returns column 0
        correct_aware = (aware == labels) & allowed.gather(1, aware[:, None])[:, 0]
        ones = torch.ones_like(labels)
        # index_add_ of integers is exact on every device and, unlike bincount, needs no copy to the host
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
            running = scores.cummax(1).values  # highest score of columns 0 .. c
            own = scores.gather(1, columns[:, None])  # (B, 1)
            first = (columns[:, None] == 0) | (running.gather(1, (columns[:, None] - 1).clamp(min=0)) < own)
            inside = known[:, None] & (labels[:, None] < self.prefix_columns)  # (B, P)
            hit = inside & first & (own >= running[:, self.prefix_columns - 1])
            self.prefix += torch.stack([inside.sum(0), hit.sum(0)], 1)

    def compute(self) -> EvaluationResult:
        """Counts and accuracies over all processes. Collective: call it on every process."""
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
        return EvaluationResult(totals, correct, correct_aware, prefix, confusion, ece)
