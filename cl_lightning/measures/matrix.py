"""The accuracy matrix R[t, i] of a run."""

# ruff: noqa: N806 - R is the name of the matrix in every paper

from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_lightning.measures.accuracy import EvaluationResult
from cl_lightning.measures.functional import (
    _NAN,
    _nans,
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    forgetting_last,
    forgetting_max,
    forward_transfer,
    learning_accuracy,
    mean_online_error,
    old_new_accuracy,
    per_class_accuracy,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class AccuracyMatrix:
    """Accuracies after each task on each task, nan where not measured. Grows as evaluations are entered.

    Attributes:
        R_ci: Class-incremental accuracy matrix, float64 ``(T, T)``.
        R_ti: Task-aware (task-incremental) accuracy matrix, float64 ``(T, T)``.
        R_prefix: Cumulative accuracy after task t on the classes of tasks 0 .. k, float64 ``(T, T)``.
        R_ece: Expected calibration error after task t on task i, float64 ``(T, T)``.
        per_class: Accuracy after task t on the class of each column, float64 ``(T, C)``.
        confusion: Samples by true (rows) and predicted column in the latest evaluation, int64 ``(C, C)``.
        start_ci: Class-incremental accuracies before any training, float64 ``(T,)``.
        start_ti: Task-aware accuracies before any training, float64 ``(T,)``.
        online_error: Online error of each task that is a test-time stream, float64 ``(T,)``.
        unknown_auroc: Area under the ROC curve of rejecting unknown classes in each such task, float64 ``(T,)``.
        totals: Test samples per task in its latest evaluation, int64 ``(T,)``.
    """

    _FIELDS = ("R_ci", "R_ti", "R_prefix", "R_ece", "start_ci", "start_ti", "online_error", "unknown_auroc", "totals")
    _OF_CLASSES = ("per_class", "confusion")

    def __init__(self, num_tasks: int = 0) -> None:
        self.R_ci, self.R_ti, self.R_prefix, self.R_ece = (_nans(num_tasks, num_tasks) for _ in range(4))
        self.per_class, self.confusion = _nans(num_tasks, 0), torch.zeros(0, 0, dtype=torch.int64)
        self.start_ci, self.start_ti, self.online_error, self.unknown_auroc = (_nans(num_tasks) for _ in range(4))
        self.totals = torch.zeros(num_tasks, dtype=torch.int64)

    @property
    def learned(self) -> int:
        """Number of tasks learnt: 1 plus the index of the last row with an entry."""
        rows = (~(self.R_ci.isnan() & self.R_ti.isnan())).any(1).nonzero()
        return int(rows[-1]) + 1 if len(rows) else 0

    def fill(self, task: int, row: EvaluationResult) -> None:
        """Enter the evaluation after a task; it replaces an earlier evaluation after the same task.

        Args:
            task: Index of the task; -1 for the evaluation before any training.
            row: Result on the tasks 0 .. n - 1. Entries from ``task + 1`` on, if any, are used for forward transfer.

        Raises:
            ValueError: If ``task`` is below -1.
        """
        if task < -1:
            raise ValueError(f"AccuracyMatrix: task {task}; give an index from 0, or -1 for the state before training")
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
            if row.unknown_auroc is not None:
                self.unknown_auroc[task] = row.unknown_auroc
        for line, values in lines:
            line.fill_(_NAN)[: len(values)] = values
        self.totals[: len(row.totals)] = row.totals
        classes = 0 if row.confusion is None else max(len(row.confusion) - self.per_class.shape[1], 0)
        self.per_class = F.pad(self.per_class, (0, classes, 0, grow), value=_NAN)
        if task >= 0 and row.confusion is not None:
            self.confusion = row.confusion
            self.per_class[task].fill_(_NAN)[: len(row.confusion)] = per_class_accuracy(row.confusion)

    def __repr__(self) -> str:
        """The matrix in percent, a row after each task; task-aware where there is no class-incremental reading."""
        if not (size := self.learned):
            return "AccuracyMatrix: no task is finished"
        values, kind = self._shown()
        lines = [f"AccuracyMatrix, {kind}, in % on each task (columns) after each task (rows)"]
        lines.append("   " + "".join(f"{column:7d}" for column in range(size)))
        for t in range(size):
            cells = (f"{100 * value:7.1f}" if value == value else " " * 7 for value in values[t, : t + 1].tolist())
            lines.append(f"{t:3d}" + "".join(cells))
        return "\n".join(lines)

    def plot(self, *, title: str = "") -> "Figure":
        """The matrix as a picture with its values in percent.

        Args:
            title: Text above it.

        Returns:
            A figure of matplotlib: ``matrix.plot().savefig("matrix.pdf")``.

        Raises:
            ValueError: If no task is finished.
        """
        from matplotlib.figure import Figure

        if not (size := self.learned):
            raise ValueError("AccuracyMatrix: no task is finished; there is nothing to draw")
        values = 100 * self._shown()[0][:size, :size]
        side = 1.4 + 0.45 * size
        figure = Figure(figsize=(side + 0.6, side), layout="constrained")
        axes = figure.subplots()
        shown = values.masked_fill(torch.ones_like(values, dtype=torch.bool).triu(1), _NAN)
        known = shown[~shown.isnan()]
        low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 100.0)
        span = max(high - low, 1e-9)
        axes.imshow(shown.numpy(), cmap="viridis", vmin=low, vmax=low + span)
        for t, row in enumerate(shown.tolist()):
            for i, value in enumerate(row):
                if value == value:
                    dark = (value - low) / span < 0.6
                    axes.text(i, t, f"{value:.1f}", ha="center", va="center", fontsize=8, color="w" if dark else "k")
        axes.set(xlabel="on task", ylabel="after task", title=title, xticks=range(size), yticks=range(size))
        return figure

    def _shown(self) -> tuple[Tensor, str]:
        """The class-incremental reading, or the task-aware one where there is none, and its name."""
        if self.R_ci.isnan().all():
            return self.R_ti, "with the task known"
        return self.R_ci, "among all classes seen so far"

    def measures(self, t: int | None = None) -> dict[str, float]:
        """Measures after task ``t`` (None: after the last task learnt), by name; undefined measures (nan) are left out.

        Names without prefix: class-incremental, average accuracies weighted by test samples. ``task_aware/...``:
        task-aware, unweighted over tasks, as published. Tasks without test samples are left out of all means.

        Raises:
            ValueError: If no evaluation after task ``t`` was entered.
        """
        size = self.learned if t is None else t + 1
        if not 1 <= size <= self.learned:
            raise ValueError(
                f"AccuracyMatrix: no measures after task {size - 1}; {self.learned} tasks are filled in; evaluate first"
            )
        samples = self.totals[:size]
        tested = samples > 0
        values = {
            "cumulative_forgetting": forgetting_last(self.R_prefix[:size, :size], tested),
            "mean_online_error": mean_online_error(self.online_error[:size]),
            "mean_unknown_auroc": mean_online_error(self.unknown_auroc[:size]),
        }
        for mark, matrix, start, totals in (
            ("", self.R_ci, self.start_ci, samples),
            ("task_aware/", self.R_ti, self.start_ti, tested),
        ):
            R = matrix[:size, :size]
            values[f"{mark}average_accuracy"] = average_accuracy(R, totals=totals)
            values[f"{mark}average_incremental_accuracy"] = average_incremental_accuracy(R, totals)
            values[f"{mark}forgetting"] = forgetting_max(R, tested)
            values[f"{mark}backward_transfer"] = backward_transfer(R, tested)
            values[f"{mark}forward_transfer"] = forward_transfer(R, start[:size], tested)
            values[f"{mark}learning_accuracy"] = learning_accuracy(R, tested)
            values[f"{mark}old_accuracy"], values[f"{mark}new_accuracy"] = old_new_accuracy(R, totals=totals)
        return {name: value for name, value in values.items() if value == value}

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors, for a checkpoint."""
        return {name: getattr(self, name).clone() for name in self._FIELDS + self._OF_CLASSES}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a state; it may have any number of tasks.

        Raises:
            ValueError: If a tensor has another shape or kind than the numbers of tasks and classes make it.
        """
        fresh = type(self)(len(state["totals"]))
        classes = state["per_class"].shape[-1:] if "per_class" in state else torch.Size([0])
        for name in self._FIELDS + self._OF_CLASSES:
            value: Tensor = getattr(fresh, name)
            found = state.get(name, value).cpu()
            expected = value.shape if name in self._FIELDS else (*value.shape[:1], *classes)
            if name == "confusion":  # of the latest evaluation, which may have had fewer classes
                expected = (found.shape[:1] * 2) if found.ndim else classes
            if found.shape != torch.Size(expected) or found.is_floating_point() != value.is_floating_point():
                raise ValueError(
                    f"{name} of the accuracy matrix has {found.dtype} {tuple(found.shape)}, not {tuple(expected)}"
                )
            setattr(self, name, found.clone())

    def to_dict(self) -> dict[str, Any]:
        """Nested lists for JSON, None for nan; without the confusion matrix, which has C^2 entries."""
        return {name: _listed(getattr(self, name).tolist()) for name in (*self._FIELDS, "per_class")}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`."""
        result = cls(len(data["totals"]))
        for name in cls._FIELDS:
            if name in data:
                old: Tensor = getattr(result, name)
                setattr(result, name, torch.tensor(_unlisted(data[name]), dtype=old.dtype).reshape(old.shape))
        if data.get("per_class"):
            result.per_class = torch.tensor(_unlisted(data["per_class"]), dtype=torch.float64)
        return result


def _listed(value: list[Any]) -> list[Any]:
    if value and isinstance(value[0], list):
        return [_listed(item) for item in value]
    end = len(value)
    while end and value[end - 1] != value[end - 1]:  # half of a matrix of many tasks
        end -= 1
    return [None if item != item else item for item in value[:end]] + [None] * (len(value) - end)


def _unlisted(value: Any) -> Any:
    return [_unlisted(item) for item in value] if isinstance(value, list) else _NAN if value is None else value
