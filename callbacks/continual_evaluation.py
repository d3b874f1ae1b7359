"""Continual evaluation: accuracy on all tasks so far, every few optimizer steps or samples during training."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from cl_lightning import measures
from cl_lightning.batch import Batch, Draw, cat
from cl_lightning.callback import ContinualCallback
from cl_lightning.checks import at_least, one_of
from cl_lightning.distributed import all_sum
from cl_lightning.losses import classes_present
from cl_lightning.measures import MEBIBYTE, Stopwatch
from cl_lightning.models import in_eval_mode
from cl_lightning.stream import Task

if TYPE_CHECKING:
    from cl_lightning.strategy import ContinualStrategy

_HOST = 8  # limit of the subset in main memory, as a multiple of its limit on the device


class ContinualEvaluation(ContinualCallback):
    """Evaluates a fixed subset of the test data of each task so far, every few optimizer steps.

    The accuracy on old tasks drops at the start of a new task and mostly recovers before its end. This stability gap is
    not visible in evaluations at the ends of tasks (De Lange et al., ICLR 2023, arXiv:2205.13452). With A_i(n) the
    accuracy on the subset of task i at evaluation n, and k the current task, ``results.json`` and the loggers get

        min-ACC      mean over i < k of the minimum of A_i(n) after the end of task i    ``min_accuracy``
        WC-ACC       A_k / k + (1 - 1/k) min-ACC                                         ``worst_case_accuracy``
        WF^w, WP^w   largest drop, rise within w evaluations, mean over tasks            ``windowed_forgetting_10``, ...
        AAA          mean over n of the accuracy on all classes seen at evaluation n     ``average_anytime_accuracy``
        LCA_beta     mean accuracy on each task in its first beta + 1 evaluations        ``learning_curve_area``
        A_AUC        mean accuracy on the classes that the stream had so far             ``area_under_accuracy``

    (AAA: Soutif-Cormerais et al., ICCV-W 2023, arXiv:2308.10328; LCA: Chaudhry et al., ICLR 2019, arXiv:1812.00420, in
    evaluations instead of batches; A_AUC: Koh et al., ICLR 2022, arXiv:2110.10031). Each task is evaluated before its
    first optimizer step, with the grown head, then every ``every_n_steps`` steps, and at its end, after the strategy's
    ``end_task``.

    With ``every_n_samples`` the evaluations during a task follow the samples of the stream instead of the steps, and
    A_AUC is measured: the mean over the evaluations at n, 2 n, 3 n, ... samples. It counts the test samples of classes
    of which a training sample has arrived, and predictions are among these classes; the other measures count all
    classes of the tasks so far, also where the first sample of a class arrives in the middle of its task. An
    evaluation follows the step, with several passes the last pass, of the batch that completes its samples. A sample
    that is seen again in later epochs or phases counts once; samples of a memory that the loader mixes in count too.

    Training is the same with and without this callback, to the bit: evaluations are in eval mode without gradient, and
    the states of the random generators are restored. All tasks are evaluated in one pass. Each process evaluates its
    share, and counts are summed over processes. The time counts as evaluation, not as training. Curves are saved in
    checkpoints. If another callback evaluates other weights (``EMAEnsemble``), these weights are evaluated here too.
    For a method whose classifier is computed at the end of a task (``ICaRL``), the scores are from
    ``predict_within_task``.

    An evaluation costs a forward pass of ``samples`` images for each task so far. With 1000 samples per task and an
    evaluation every 10 steps of 64 images, it costs more than the training from the third task on. Reduce ``samples``
    or increase ``every_n_steps`` to lower the cost.

    Args:
        every_n_steps: Number of optimizer steps between two evaluations, at least 1; 1 is the protocol of the paper.
        every_n_samples: n, number of samples of the stream, over all processes, between two evaluations, at least 1; it
            replaces ``every_n_steps``. None for evaluations by steps, without A_AUC. The paper has 100.
        samples: Number of samples per task, drawn once, at least 1; None for all samples.
        split: ``test`` for test data as in the paper, or ``val`` for the samples that ``data.val_fraction`` holds out,
            so that test data are used only at the ends of tasks.
        windows: Lengths w of the windows, in evaluations, each at least 2.
        beta: Number of evaluations in the learning-curve area apart from the first, at least 0.
        seed: Seed of the subset. It is independent of the seed of the run.
        cache_mb: Limit in MiB, at least 0, up to which the subset is kept on the device, as raw images. Up to 8 times
            the limit it is kept in main memory; a larger subset is loaded again at each evaluation.

    Raises:
        ValueError: If an option is out of range, or for ``split="val"`` without validation samples.
    """

    paper: str = "De Lange et al., ICLR 2023, arXiv:2205.13452"
    observer_only: bool = True

    def __init__(
        self,
        *,
        every_n_steps: int = 10,
        every_n_samples: int | None = None,
        samples: int | None = 1000,
        split: Literal["test", "val"] = "test",
        windows: Sequence[int] = (10, 100),
        beta: int = 10,
        seed: int = 0,
        cache_mb: float = 256.0,
    ) -> None:
        at_least(self, 1, every_n_steps=every_n_steps)
        at_least(self, 1, every_n_samples=every_n_samples, samples=samples, optional=True)
        one_of(self, ("test", "val"), split=split)
        at_least(self, 2, optional=False, **{f"windows[{i}]": window for i, window in enumerate(windows)})
        at_least(self, 0, beta=beta, cache_mb=cache_mb)
        self.every_n_steps, self.samples, self.windows, self.beta = every_n_steps, samples, tuple(windows), beta
        self.every_n_samples = every_n_samples
        self.split: Literal["test", "val"] = split
        self.seed, self.cache_mb = seed, cache_mb
        self.test_data_use = "continual evaluation during training" if split == "test" else None
        self.steps: list[int] = []
        """Number of optimizer steps before each evaluation, over the whole stream."""
        self.tasks: list[int] = []
        """Index of the current task at each evaluation."""
        self.arrived: list[int] = []
        """Number of samples of the stream before each evaluation, over all processes."""
        self.seen_counts: list[Tensor] = []
        """Correct predictions among the classes that have arrived, and number of their samples, int32 ``(2,)``, for
        each evaluation with ``every_n_samples``."""
        self.counts: list[Tensor] = []
        """Correct predictions on each task, without and with task ids, int32 ``(tasks, 2)``, for each evaluation."""
        self.ends: list[int] = []
        """Index of the last evaluation of each finished task."""
        self.totals = torch.zeros(0, dtype=torch.int64)
        """Number of samples in the subset of each task so far, int64 ``(tasks,)``."""
        self._measured: list[dict[str, float]] = []  # measures at the end of each task
        self._pending: list[Tensor] = []  # counts that are still on the device
        self._pending_seen: list[Tensor] = []
        self._samples = 0  # of the stream so far
        self._classes = torch.zeros(0, dtype=torch.bool)  # whether a sample of the class has arrived, for each column
        self._num_logged = 0
        self._subset: Batch | None = None  # this process's share if it is kept; None also if the share is empty
        self._kept = False
        self._closing = False
        self._watch = Stopwatch(torch.device("cpu"))

    # ------------------------------------------------------------------ hooks

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy: Any = pl_module
        self._flush(trainer)
        self._watch = Stopwatch(strategy.device)
        self._draw_subset(trainer, strategy)
        if strategy.task.index not in self.tasks:
            self._evaluate(trainer, strategy, in_training=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self._is_due(trainer, pl_module, batch, batch_idx):
            self._evaluate(trainer, pl_module, in_training=True)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step % every == 0:
            self._flush(trainer)

    def _is_due(self, trainer: Trainer, strategy: Any, batch: Batch, batch_idx: int) -> bool:
        """Count the samples and classes of a batch; returns whether an evaluation follows its step."""
        if self.every_n_samples is None:
            return trainer.global_step - self.steps[-1] >= self.every_n_steps
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if batch.first_pass and data.phase_index == 0:
            self._samples += batch.draw.total
            among = self._among(strategy)
            self._classes = among | classes_present(batch.labels, len(among))
        over = (batch_idx + 1) % data.stream.passes == 0
        return over and self._samples // self.every_n_samples > self.arrived[-1] // self.every_n_samples

    def _among(self, strategy: Any) -> Tensor:
        """Whether a sample of the class has arrived, for each column of the strategy, bool ``(C,)``, on its device."""
        among = torch.zeros(strategy.task_columns.shape[1], dtype=torch.bool, device=strategy.device)
        among[: len(self._classes)] = self._classes
        return among

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note_seconds()
        self._flush(trainer, before=trainer.global_step)  # the last evaluation may be replaced at the end of the task

    def on_task_end(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        self._closing = True  # evaluate after `on_task_end` of all other callbacks

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._closing:
            return
        self._closing = False
        strategy: Any = pl_module
        self._draw_subset(trainer, strategy)
        first = self.ends[-1] + 1 if self.ends else 0  # index of this task's first evaluation
        if len(self.steps) > first + 1 and self.steps[-1] == trainer.global_step:
            # Replace the evaluation of the same step by an evaluation after the end of the task.
            self._flush(None)
            for part in (self.steps, self.tasks, self.counts, self.arrived, self.seen_counts):
                del part[-1:]
            self._num_logged = min(self._num_logged, len(self.counts))
        self._evaluate(trainer, strategy, in_training=False)
        self.ends.append(len(self.steps) - 1)
        self._flush(trainer)
        self._measured.append(self.measures(strategy.task.index))
        values = {f"continual/{name}": value for name, value in self._measured[-1].items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    # ------------------------------------------------------------------ evaluation

    def _draw_subset(self, trainer: Trainer, strategy: Any) -> None:
        """Draw the subsets of new tasks, and keep their images if they are within the limit of ``cache_mb``."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if data.target_kind != "class":
            raise ValueError(
                f"ContinualEvaluation counts correct predictions of classes, and {type(data).__name__} has the target "
                f"{data.target_kind}; remove the callback"
            )
        known, seen = len(self.totals), strategy.task.index + 1
        if known < seen:
            fresh = self._loader(trainer, range(known, seen)).plan.tasks.bincount(minlength=seen)
            self.totals = torch.cat([self.totals, fresh[known:]])
            if self.split == "val" and int(self.totals[-1]) == 0:
                raise ValueError(
                    f"ContinualEvaluation: task {seen - 1} has no validation samples; give data.val_fraction or use "
                    "split: test"
                )
        size = int(self.totals.sum()) * math.prod(data.image_shape) / trainer.world_size / MEBIBYTE
        self._kept = size <= _HOST * self.cache_mb
        if not self._kept:
            self._subset = None
            return
        device = strategy.device if size <= self.cache_mb else torch.device("cpu")
        parts = [self._subset] if self._subset is not None and known else []
        missing = range(known, seen) if parts else range(seen)
        parts += list(self._loader(trainer, missing)) if missing else []
        self._subset = cat([part.to(device) for part in parts]) if parts else None

    def _loader(self, trainer: Trainer, tasks: range) -> Any:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        return data.evaluation_loader(self.split, tasks, samples=self.samples, key=self.seed)

    def _batches(self, trainer: Trainer, strategy: Any) -> Iterator[Batch]:
        """This process's share of the subsets of all tasks so far, in large batches on the device."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        source: Iterable[Batch]
        if self._kept:
            subset, size = self._subset, max(data.eval_batch_size // trainer.world_size, 1)
            if subset is None:
                return
            source = (subset.select(slice(start, start + size)) for start in range(0, len(subset), size))
        else:
            source = self._loader(trainer, range(strategy.task.index + 1))
        for batch in source:
            rows = batch.to(strategy.device)
            yield data.finish(rows.replace(draw=Draw.of(len(rows), 0)), augment=False)

    def _evaluate(self, trainer: Trainer, strategy: Any, *, in_training: bool) -> None:
        """Count the correct predictions on each task so far, without a synchronisation with the device.

        Args:
            trainer: Trainer of the strategy.
            strategy: Strategy to be evaluated.
            in_training: Whether the validation hooks of other callbacks are called, which may replace the weights; in a
                test Lightning has called their hooks.
        """
        callbacks: list[Any] = trainer.callbacks if in_training else []  # type: ignore[attr-defined]
        others = [callback for callback in callbacks if isinstance(callback, ContinualCallback)]
        devices = [strategy.device] if strategy.device.type == "cuda" else []
        needs_tasks = strategy.traits.task_ids == "needed"
        counts = torch.zeros(strategy.task.index + 1, 2, dtype=torch.int64, device=strategy.device)
        among = self._among(strategy)
        seen_counts = torch.zeros(2, dtype=torch.int64, device=strategy.device)
        timed = self._watch if in_training else nullcontext()  # a test counts as evaluation
        with torch.no_grad(), torch.random.fork_rng(devices=devices), timed:
            for callback in others:
                callback.on_validation_start(trainer, strategy)
            try:
                with in_eval_mode(strategy):
                    for batch in self._batches(trainer, strategy):
                        with trainer.precision_plugin.forward_context():
                            tasks = batch.tasks if needs_tasks else None
                            scores = strategy.predict_within_task(batch.images, tasks).float()
                        if needs_tasks:  # task-aware predictions only
                            scores = scores.masked_fill(~strategy.task_columns[batch.tasks], -torch.inf)
                        scores = strategy.data.within_level(scores, batch.labels)
                        count_correct(counts, scores, batch, strategy.task_columns)
                        if self.every_n_samples is not None:
                            count_among(seen_counts, scores, batch.labels, among)
            finally:
                for callback in others:
                    callback.on_validation_end(trainer, strategy)
            all_sum(counts)
        self.steps.append(trainer.global_step)
        self.tasks.append(strategy.task.index)
        self._pending.append(counts)
        if self.every_n_samples is not None:
            self.arrived.append(self._samples)
            self._pending_seen.append(all_sum(seen_counts))

    def _note_seconds(self) -> None:
        seconds = self._watch.take()
        if self.meter is not None and seconds:
            self.meter.move("evaluation", seconds, source="training")

    def _flush(self, trainer: Trainer | None, *, before: int | None = None) -> None:
        """Copy counts from the device to the CPU, and log evaluations that are not logged yet, each with its step.

        Args:
            trainer: Trainer whose loggers are used; None to log nothing.
            before: Log only evaluations before this step; None for all.
        """
        if self._pending:  # all of the same task, so of the same shape
            self.counts += list(torch.stack(self._pending).cpu().int())
            self._pending = []
        if self._pending_seen:
            self.seen_counts += list(torch.stack(self._pending_seen).cpu().int())
            self._pending_seen = []
        if trainer is None:
            return
        for place in range(self._num_logged, len(self.counts)):
            if before is not None and self.steps[place] >= before:
                return
            self._num_logged = place + 1
            correct = self.counts[place][:, 0].double()
            totals = self.totals[: len(correct)]
            values = {f"continual/task_{i:02d}": v for i, v in enumerate((correct / totals).tolist()) if v == v}
            values["continual/average_accuracy"] = float(correct.sum() / totals.sum())
            for logger in trainer.loggers:
                logger.log_metrics(values, step=self.steps[place])

    # ------------------------------------------------------------------ results

    def curves(self, *, task_aware: bool = False) -> Tensor:
        """Accuracy on each task at each evaluation, in [0, 1], float64 ``(evaluations, tasks)``; nan before a task.

        Args:
            task_aware: Whether predictions are among the classes of each sample's task instead of among all classes.
        """
        correct = self._table()[:, :, int(task_aware)].double()
        return correct.masked_fill(correct < 0, torch.nan) / self.totals

    def accuracies_among_seen(self) -> Tensor:
        """Accuracy on the classes that have arrived, among these classes, in [0, 1], float64 ``(evaluations,)``.

        It is nan for evaluations that are not at a multiple of ``every_n_samples``, such as the start of a task.
        """
        self._flush(None)
        if self.every_n_samples is None:
            return torch.full((len(self.steps),), torch.nan, dtype=torch.float64)
        periods = torch.tensor([0, *self.arrived]) // self.every_n_samples
        correct, totals = torch.stack(self.seen_counts).double().unbind(1)
        return (correct / totals).masked_fill(periods[1:] == periods[:-1], torch.nan)

    def _table(self) -> Tensor:
        """Counts, int32 ``(evaluations, tasks, 2)``; -1 before a task."""
        self._flush(None)
        return torch.nn.utils.rnn.pad_sequence(
            [*self.counts, torch.zeros(len(self.totals), 2, dtype=torch.int32)], batch_first=True, padding_value=-1
        )[:-1]

    def measures(self, task: int) -> dict[str, float]:
        """Measures over all evaluations up to the end of a task, by name; ``task_aware/...`` with task ids.

        Measures that are not defined are omitted, such as the minimum over old tasks in the first task.
        """
        if task >= len(self.ends) or self.tasks[0] != 0:  # the run began without this callback
            return {}
        ends = self.ends[: task + 1]
        starts = [0, *(end + 1 for end in ends[:-1])]
        places = torch.arange(ends[-1] + 1)
        values: dict[str, float] = {}
        for mark, aware in (("", False), ("task_aware/", True)):
            curves = self.curves(task_aware=aware)[: len(places), : task + 1]
            seen, totals = ~curves.isnan(), self.totals[: task + 1]
            anytime = (curves.nan_to_num() * totals).sum(1) / (seen * totals).sum(1)
            values[f"{mark}min_accuracy"] = measures.min_accuracy(curves, torch.tensor(ends))
            values[f"{mark}worst_case_accuracy"] = measures.worst_case_accuracy(curves, torch.tensor(ends))
            for window in self.windows:
                values[f"{mark}windowed_forgetting_{window}"] = measures.windowed_forgetting(curves, window)
                values[f"{mark}windowed_plasticity_{window}"] = measures.windowed_plasticity(curves, window)
            values[f"{mark}average_anytime_accuracy"] = measures.average_anytime_accuracy(anytime)
            learning = curves.masked_fill(places[:, None] > torch.tensor(ends), torch.nan)
            values[f"{mark}learning_curve_area"] = measures.lca(learning, torch.tensor(starts), self.beta + 1)
        if self.every_n_samples is not None:
            accuracies = self.accuracies_among_seen()[: len(places)]
            values["area_under_accuracy"] = measures.average_anytime_accuracy(accuracies)
        return {name: value for name, value in values.items() if value == value}

    def results(self) -> dict[str, Any]:
        if not self.steps:
            return {}
        per_task = self._measured
        curves, aware = (self.curves(task_aware=known).tolist() for known in (False, True))
        return {
            "split": self.split,
            "every_n_steps": self.every_n_steps,
            "every_n_samples": self.every_n_samples,
            "seed": self.seed,
            "beta": self.beta,
            "samples": self.totals.tolist(),
            "steps": self.steps,
            "tasks": self.tasks,
            "accuracy": [[_rounded(value) for value in row] for row in curves],
            "task_aware_accuracy": [[_rounded(value) for value in row] for row in aware],
            "ends": self.ends,
            "measures": per_task[-1] if per_task else {},
            "measures_per_task": per_task,
        }

    # ------------------------------------------------------------------ state

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._flush(trainer)  # a run resumed from here does not log these again

    def state_dict(self) -> dict[str, Any]:
        if not self.steps:
            return {}
        return {
            "steps": torch.tensor(self.steps),
            "tasks": torch.tensor(self.tasks),
            "counts": self._table(),
            "ends": torch.tensor(self.ends, dtype=torch.int64),
            "totals": self.totals,
            **self._state_of_samples(),
        }

    def _state_of_samples(self) -> dict[str, Tensor]:
        if self.every_n_samples is None:
            return {}
        return {
            "arrived": torch.tensor(self.arrived),
            "seen_counts": torch.stack(self.seen_counts),
            "num_samples": torch.tensor(self._samples),
            "classes": self._classes.cpu(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if not state_dict:
            return
        self.steps, self.tasks = state_dict["steps"].tolist(), state_dict["tasks"].tolist()
        self.ends, self.totals = state_dict["ends"].tolist(), state_dict["totals"].clone()
        self.counts = [row[: task + 1].clone() for row, task in zip(state_dict["counts"], self.tasks, strict=True)]
        if self.every_n_samples is not None:
            if "arrived" not in state_dict:
                raise ValueError(
                    "ContinualEvaluation: resume without every_n_samples: the run began with evaluations by steps, so "
                    f"its samples were not counted; every_n_samples is {self.every_n_samples}"
                )
            self.arrived, self._samples = state_dict["arrived"].tolist(), int(state_dict["num_samples"])
            self.seen_counts, self._classes = list(state_dict["seen_counts"]), state_dict["classes"].clone()
        self._pending, self._pending_seen, self._num_logged, self._subset = [], [], len(self.counts), None
        self._measured = [self.measures(task) for task in range(len(self.ends))]


def count_correct(counts: Tensor, scores: Tensor, batch: Batch, task_columns: Tensor) -> None:
    """Add the numbers of correct predictions on each task, without and with task ids, to ``counts``, in place.

    Args:
        counts: Counts, int64 ``(T, 2)``.
        scores: Scores of all columns, ``(B, C)``.
        batch: Batch with true columns and task indices.
        task_columns: Whether a column belongs to a task, bool ``(T, C)``.
    """
    allowed = task_columns[batch.tasks]
    correct = scores.argmax(1) == batch.labels
    aware = scores.masked_fill(~allowed, -torch.inf).argmax(1) == batch.labels
    counts.index_add_(0, batch.tasks, torch.stack([correct, aware & allowed.any(1)], 1).long())


def count_among(counts: Tensor, scores: Tensor, labels: Tensor, classes: Tensor) -> None:
    """Add the number of correct predictions among some classes, and the number of their samples, to ``counts``.

    Args:
        counts: Counts, int64 ``(2,)``.
        scores: Scores of all columns, ``(B, C)``.
        labels: True columns, int64 ``(B,)``; samples of other classes do not count.
        classes: Whether a column is one of the classes, bool ``(C,)``.
    """
    counted = classes[labels]
    correct = scores.masked_fill(~classes, -torch.inf).argmax(1) == labels
    counts += torch.stack([(correct & counted).sum(), counted.sum()])


def _rounded(value: float) -> float | None:
    return round(value, 6) if value == value else None
