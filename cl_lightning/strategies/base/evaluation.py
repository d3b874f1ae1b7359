"""Evaluation of a strategy on the test or validation samples of the tasks seen so far."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cl_lightning.batch import Batch
from cl_lightning.data import TARGETS, FeatureStore
from cl_lightning.data.feature_cache import KEYS, STORED
from cl_lightning.distributed import all_sum
from cl_lightning.losses import at_size, target_loss
from cl_lightning.measures import METRICS as SCORE_METRICS
from cl_lightning.measures import EvaluationResult, ScoreMetric, StreamAccuracy
from cl_lightning.strategies.base.host import Host
from cl_lightning.stream import Stream

METRICS = ("val/accuracy", "val/loss")
"""Metrics of an evaluation on the validation samples, for callbacks and schedules that monitor one."""


def check_monitor(owner: str, monitor: str, stream: Stream, *, only: Sequence[str] = ()) -> None:
    """Check that a metric that a callback or a schedule monitors will exist.

    Args:
        owner: Name of the class that monitors it, for the error.
        monitor: Name of the metric.
        stream: Stream with its validation samples.
        only: All validation metrics that there are; empty if a strategy may log more of them.

    Raises:
        ValueError: If the metric is of validation samples, and the first task has none, or is none of ``only``.
    """
    if not monitor.startswith("val"):
        return
    if only and monitor not in only:
        raise ValueError(f"{owner}: monitor is {monitor!r}; the validation metrics are {' and '.join(only)}")
    if not any(len(part) for part in stream.val):
        raise ValueError(
            f"{owner}: monitor is {monitor!r}, but there are no validation samples; give --data.val_fraction 0.1, or "
            "monitor train/loss"
        )
    if not len(stream.val[0]):
        raise ValueError(
            f"{owner}: monitor is {monitor!r}, but the first task has no validation samples; give a larger "
            "--data.val_fraction, or monitor train/loss"
        )


class Evaluation:
    """Counts correct predictions over one evaluation pass. Counts are exact for any number of processes.

    Attributes:
        result: Result of the last finished pass; None before the first.
        loss: Mean loss of the last finished pass, for classes the cross-entropy in nats; nan for a method that needs
            task ids, which has no class-incremental scores.
    """

    def __init__(self, strategy: Host) -> None:
        self._strategy = strategy
        self._accuracy: StreamAccuracy | None = None
        self._score: ScoreMetric | None = None
        self._loss_sum = self._samples = torch.zeros((), dtype=torch.float64)
        self._store: FeatureStore | None = None
        self.result: EvaluationResult | None = None
        self.loss = float("nan")

    def begin(self, *, confusion: bool) -> None:
        """Start a pass.

        Args:
            confusion: Whether to compute the confusion matrix, the calibration and the accuracies over the classes of
                the first 1, 2, ... tasks as well. Ignored for a method that needs task ids.
        """
        strategy = self._strategy
        self._store = strategy.passes.store(evaluation=True)
        tasks, columns = strategy.task_columns.shape
        counts = [int(marks.nonzero().max()) + 1 for marks in strategy.task_columns.cpu()]
        without_tasks = strategy.traits.task_ids != "needed"
        prefixes = [max(counts[: t + 1]) for t in range(tasks)] if confusion and without_tasks else None
        confusion = confusion and without_tasks
        self._accuracy = self._score = None
        if (kind := strategy.data.target_kind) == "class":
            self._accuracy = StreamAccuracy(
                tasks, columns, confusion=confusion, calibration=confusion, prefixes=prefixes
            ).to(strategy.device)
        else:
            self._score = SCORE_METRICS[kind](strategy.task_columns).to(strategy.device)
        self._loss_sum = torch.zeros((), device=strategy.device, dtype=torch.float64)
        self._samples = torch.zeros((), device=strategy.device, dtype=torch.float64)

    def update(self, batch: Batch) -> None:
        """Predict the samples of a batch and count the correct predictions."""
        strategy = self._strategy
        self._samples += len(batch)
        if self._score is not None:
            outputs, targets = strategy.predict(batch.images).float(), batch.extra[TARGETS]
            if outputs.dim() == 4:
                outputs = at_size(outputs, targets.shape[-2:])
            self._score.update(outputs, targets, batch.tasks)
            self._loss_sum += target_loss(outputs, targets) * len(batch)
            return
        assert self._accuracy is not None
        aware: Tensor | None = None
        if KEYS in batch.extra or STORED in batch.extra:
            features = strategy.passes.features_of(batch, strategy.network, self._store)
            scores = strategy.network.head.classify(features).float()
        elif strategy.traits.task_ids == "needed":
            scores = strategy.predict(batch.images, batch.tasks).float()
        else:
            scores = strategy.predict(batch.images).float()
            if strategy.traits.task_ids == "inferred":
                aware = strategy.predict(batch.images, batch.tasks).float()
        scores = strategy.data.within_level(scores, batch.labels)
        aware = aware if aware is None else strategy.data.within_level(aware, batch.labels)
        self._accuracy.update(scores, batch.labels, batch.tasks, strategy.task_columns, aware)
        self._loss_sum += nn.functional.cross_entropy(scores, batch.labels, reduction="sum")

    def finish(self) -> EvaluationResult:
        """End the pass and sum the counts over all processes. Called on all processes."""
        metric = self._accuracy if self._score is None else self._score
        assert metric is not None
        result: EvaluationResult = metric.compute()
        loss, samples = all_sum(torch.stack([self._loss_sum, self._samples])).tolist()
        self.loss = loss / max(samples, 1)
        if self._strategy.traits.task_ids == "needed":
            result.leave_out_class_incremental()
            self.loss = float("nan")
        self._accuracy, self._score, self.result = None, None, result
        return result

    def accuracy(self) -> float:
        """Score of the last finished pass, for classes the accuracy in [0, 1], task-aware for a method that needs task
        ids."""
        assert self.result is not None
        return self.result.average(task_aware=self._strategy.traits.task_ids == "needed")
