"""Scores of targets that are not one class: mean average precision, mean intersection over union, explained variance.

Each score of a task is at most 1 and larger for better predictions, and fills the matrix R[t, i] as accuracies do, so
that all measures (average, forgetting, transfer) are defined as for accuracies.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multilabel_average_precision

from cl_lightning.measures.accuracy import EvaluationResult

IGNORED = 255
"""Pixel without annotation."""


class Score(NamedTuple):
    """What an evaluation counts.

    Attributes:
        name: Key in results.
        title: Name in tables and plots.
        over: What the score of a task is a mean over, and average scores are weighted by.
    """

    name: str
    title: str
    over: str


SCORES = {
    "class": Score("accuracy", "accuracy", "test samples"),
    "labels": Score("mean_average_precision", "mAP", "classes"),
    "number": Score("explained_variance", "R2", "test samples"),
    "pixels": Score("mean_iou", "mIoU", "classes"),
}
"""Score of each kind of target."""


class ScoreMetric(Metric):
    """Base class of the scores of one evaluation pass over the test data of all seen tasks.

    Args:
        task_columns: Columns of each task, bool ``(T, C)``. The score of a task that brought new columns is over these
            columns, on the samples of all tasks of the pass, as published tables have it; otherwise over all columns of
            the task, on its own samples.
    """

    full_state_update = False

    def __init__(self, task_columns: Tensor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        columns = task_columns.cpu()
        before = (columns.long().cumsum(dim=0) - columns.long()) > 0
        self.new_columns = columns & ~before
        self.brings = self.new_columns.any(dim=1)
        self.columns = torch.where(self.brings[:, None], self.new_columns, columns)
        self.num_tasks, self.num_columns = columns.shape


class MeanAveragePrecision(ScoreMetric):
    """Mean over classes of the average precision of a multi-label classifier, exact on any number of processes.

    The average precision of a class is the area under its precision-recall curve (``torchmetrics``, no thresholds). A
    class without positive samples is left out.
    """

    scores: list[Tensor]
    labels: list[Tensor]
    tasks: list[Tensor]

    def __init__(self, task_columns: Tensor, **kwargs: Any) -> None:
        super().__init__(task_columns, **kwargs)
        for name in ("scores", "labels", "tasks"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, outputs: Tensor, targets: Tensor, tasks: Tensor) -> None:
        """Add a batch.

        Args:
            outputs: Logits ``(B, C)``.
            targets: int8 ``(B, C' >= C)``: 1, 0, or -1 for a label that is not known.
            tasks: Task of each sample, int64 ``(B,)``.
        """
        self.scores.append(outputs.double().sigmoid())
        self.labels.append(targets[:, : outputs.shape[1]].long())
        self.tasks.append(tasks)

    def compute(self) -> EvaluationResult:
        """Scores over all processes. Collective: call it on every process."""
        scores, labels, tasks = (_all(rows).cpu() for rows in (self.scores, self.labels, self.tasks))
        values, weights = [], []
        for task in range(self.num_tasks):
            rows = torch.ones_like(tasks, dtype=torch.bool) if self.brings[task] else tasks == task
            found = [
                self._average_precision(scores[rows, c], labels[rows, c]) for c in self.columns[task].nonzero()[:, 0]
            ]
            present = [value for value in found if value == value]
            values.append(sum(present) / len(present) if present else float("nan"))
            weights.append(len(present))
        return EvaluationResult.of_scores(torch.tensor(values, dtype=torch.float64), torch.tensor(weights))

    @staticmethod
    def _average_precision(scores: Tensor, labels: Tensor) -> float:
        known = labels >= 0
        scores, labels = scores[known], labels[known]
        if not (labels == 1).any():
            return float("nan")
        pairs = torch.stack([scores, 1 - scores], dim=1), torch.stack([labels, 1 - labels], dim=1)  # needs two labels
        return float(multilabel_average_precision(*pairs, num_labels=2, average="none")[0])


class MeanIoU(ScoreMetric):
    """Mean over classes of intersection over union of the classes of pixels, exact on any number of processes.

    A class that neither occurs nor is predicted is left out.
    """

    confusion: Tensor

    def __init__(self, task_columns: Tensor, **kwargs: Any) -> None:
        super().__init__(task_columns, **kwargs)
        shape = (self.num_tasks, self.num_columns, self.num_columns)
        self.add_state("confusion", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, outputs: Tensor, targets: Tensor, tasks: Tensor) -> None:
        """Add a batch.

        Args:
            outputs: Logits ``(B, C, H, W)``.
            targets: Columns of the pixels, uint8 ``(B, H, W)``; 255 and classes without a logit are left out.
            tasks: Task of each sample, int64 ``(B,)``.
        """
        predicted, true = outputs.argmax(dim=1), targets.long()
        valid = true < self.num_columns
        places = (tasks[:, None, None] * self.num_columns + true.where(valid, 0)) * self.num_columns + predicted
        self.confusion.view(-1).index_add_(0, places.flatten(), valid.flatten().long())

    def compute(self) -> EvaluationResult:
        """Scores over all processes. Collective: call it on every process."""
        counts = self.confusion.cpu().double()
        values, weights = [], []
        for task in range(self.num_tasks):
            matrix = counts.sum(dim=0) if self.brings[task] else counts[task]
            hits = matrix.diagonal()
            union = matrix.sum(dim=0) + matrix.sum(dim=1) - hits
            present = self.columns[task] & (union > 0)
            values.append(float((hits / union)[present].mean()) if present.any() else float("nan"))
            weights.append(int(present.sum()))
        return EvaluationResult.of_scores(torch.tensor(values, dtype=torch.float64), torch.tensor(weights))


class ExplainedVariance(ScoreMetric):
    """R2 of predicted numbers on each task, ``1 - sum (y - f)^2 / sum (y - mean of y)^2``.

    1 for exact predictions, 0 for the mean of the task, below 0 for worse ones; nan for a task of equal numbers. Sums
    are in float64: several processes differ from one by rounding.
    """

    sums: Tensor

    def __init__(self, task_columns: Tensor, **kwargs: Any) -> None:
        super().__init__(task_columns, **kwargs)
        self.add_state("sums", torch.zeros(self.num_tasks, 4, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, outputs: Tensor, targets: Tensor, tasks: Tensor) -> None:
        """Add a batch.

        Args:
            outputs: Predicted numbers ``(B, 1)``.
            targets: Numbers ``(B,)``.
            tasks: Task of each sample, int64 ``(B,)``.
        """
        true, found = targets.double(), outputs[:, 0].double()
        rows = torch.stack([torch.ones_like(true), true, true**2, (true - found) ** 2], dim=1)
        self.sums.index_add_(0, tasks, rows)

    def compute(self) -> EvaluationResult:
        """Scores over all processes. Collective: call it on every process."""
        count, total, squares, errors = self.sums.cpu().unbind(1)
        spread = squares - total**2 / count
        values = torch.where(spread > 1e-12 * squares, 1 - errors / spread, float("nan"))
        return EvaluationResult.of_scores(values, count.long())


METRICS: dict[str, type[ScoreMetric]] = {
    "labels": MeanAveragePrecision,
    "number": ExplainedVariance,
    "pixels": MeanIoU,
}
"""Metric of each kind of target."""


def _all(rows: Any) -> Tensor:
    """Rows of a state that torchmetrics keeps as a list until processes exchange it."""
    return torch.cat(rows) if isinstance(rows, list) else rows
