"""Continual evaluation: accuracy on every task so far, every few steps, which shows what happens between task ends."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from cl_lightning import measures
from cl_lightning.batch import Batch, Draw, cat
from cl_lightning.cost import MEBIBYTE, Stopwatch
from cl_lightning.distributed import all_sum
from cl_lightning.hooks import ContinualCallback
from cl_lightning.stream import Task

if TYPE_CHECKING:
    from cl_lightning.strategy import ContinualStrategy

_HOST = 8  # times the room on the device that the subset may take in main memory


class ContinualEvaluation(ContinualCallback):
    """Evaluates a fixed subset of each seen task's test data every few optimizer steps.

    The accuracy on old tasks drops when a new one begins, and mostly recovers before it ends: the stability gap, which
    an evaluation at the ends of tasks cannot see (De Lange et al., ICLR 2023, arXiv:2205.13452). With A_i(n) the
    accuracy on the subset of task i at evaluation n, and k the task being learnt, ``results.json`` and the loggers get

        min-ACC      mean over i < k of the least A_i(n) after task i has ended          ``min_accuracy``
        WC-ACC       A_k / k + (1 - 1/k) min-ACC                                         ``worst_case_accuracy``
        WF^w, WP^w   largest drop, rise within w evaluations, mean over tasks            ``windowed_forgetting_10``, ...
        AAA          mean over n of the accuracy on all classes seen by then             ``average_anytime_accuracy``
        LCA_beta     mean over tasks of their first beta + 1 evaluations while learnt    ``learning_curve_area``

    (AAA: Soutif-Cormerais et al., ICCV-W 2023, arXiv:2308.10328; LCA: Chaudhry et al., ICLR 2019, arXiv:1812.00420, in
    evaluations instead of batches). There is an evaluation before the first update of each task, with its new columns
    in place, one every ``every_n_steps`` from there on, and one when the task is over, statistics included.

    Training is the same, to the bit, with and without it: the network is in eval mode without gradient, and random
    numbers are put back. All tasks are evaluated in one pass; on many processes each takes its share, and counts are
    summed. Its seconds count as evaluation, not as training. Curves are part of checkpoints. Where other callbacks
    evaluate other weights (``EMAEnsemble``), these are what is evaluated here. Of a method that classifies in another
    way when a task is over (``ICaRL``) it is the classifier that is there all along, ``predict_within_task``.

    An evaluation costs a forward pass of ``samples`` images per seen task: with a thousand of each, every ten steps of
    64 images, more than the training itself from the third task on. Fewer samples or evaluations make it cheap.

    Args:
        every_n_steps: Optimizer steps between two evaluations; 1 is the protocol of the paper.
        samples: Samples per task, drawn once; None for all of them.
        split: ``test`` data as in the paper, or ``val``: what ``data.val_fraction`` holds out, so that test data are
            looked at only when a task is over.
        windows: Lengths w of the windows, in evaluations.
        beta: Evaluations of the learning curve area beside the first.
        seed: Of the subset; it is the same for all seeds of a run.
        cache_mb: The subset is kept on the device, as raw images, while it takes at most so many MB there, and in main
            memory up to eight times as much; a larger one is read anew at each evaluation.

    Raises:
        ValueError: For numbers out of range, and for ``split="val"`` without validation samples.
    """

    paper: str = "De Lange et al., ICLR 2023, arXiv:2205.13452"
    looks_on: bool = True

    def __init__(
        self,
        *,
        every_n_steps: int = 10,
        samples: int | None = 1000,
        split: Literal["test", "val"] = "test",
        windows: Sequence[int] = (10, 100),
        beta: int = 10,
        seed: int = 0,
        cache_mb: float = 256.0,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"ContinualEvaluation: every_n_steps is {every_n_steps}; it must be at least 1")
        if samples is not None and samples < 1:
            raise ValueError(f"ContinualEvaluation: samples is {samples}; it must be at least 1, or null for all")
        if split not in ("test", "val"):
            raise ValueError(f"ContinualEvaluation: split is {split!r}; use 'test' or 'val'")
        if wrong := [window for window in windows if window < 2]:
            raise ValueError(f"ContinualEvaluation: a window of {wrong[0]}; a change needs at least 2 evaluations")
        if beta < 0 or cache_mb < 0:
            raise ValueError(f"ContinualEvaluation: beta is {beta}, cache_mb is {cache_mb}; both must be at least 0")
        self.every_n_steps, self.samples, self.windows, self.beta = every_n_steps, samples, tuple(windows), beta
        self.split: Literal["test", "val"] = split
        self.seed, self.cache_mb = seed, cache_mb
        self.test_data_use = "continual evaluation during training" if split == "test" else None
        self.steps: list[int] = []
        """Optimizer steps at each evaluation, over the whole stream."""
        self.tasks: list[int] = []
        """Task that was being learnt."""
        self.counts: list[Tensor] = []
        """Correct ones of each seen task, and correct ones with the task known, int32 ``(tasks, 2)`` on the CPU."""
        self.ends: list[int] = []
        """Place of the last evaluation of each task that is over."""
        self.totals = torch.zeros(0, dtype=torch.int64)
        """Samples of each seen task's subset."""
        self._measured: list[dict[str, float]] = []  # at the end of each task
        self._pending: list[Tensor] = []  # the last counts, still on the device
        self._num_logged = 0
        self._subset: Batch | None = None  # this process's share, where it is kept; None also if there is nothing
        self._kept = False
        self._closing = False
        self._watch = Stopwatch(torch.device("cpu"))

    # ------------------------------------------------------------------ when

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
        if step - self.steps[-1] >= self.every_n_steps:
            self._evaluate(trainer, pl_module, in_training=True)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step % every == 0:
            self._flush(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note_seconds()
        self._flush(trainer, before=trainer.global_step)  # the last one may be taken anew when the task is closed

    def on_task_end(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        self._closing = True  # other callbacks may still have something to do at the end of this task

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._closing:
            return
        self._closing = False
        strategy: Any = pl_module
        self._draw_subset(trainer, strategy)
        first = self.ends[-1] + 1 if self.ends else 0  # place of this task's first evaluation
        if len(self.steps) > first + 1 and self.steps[-1] == trainer.global_step:
            # The same step again, now with what was done at the end of the task: that is what counts.
            self._flush(None)
            del self.steps[-1], self.tasks[-1], self.counts[-1]
            self._num_logged = min(self._num_logged, len(self.counts))
        self._evaluate(trainer, strategy, in_training=False)
        self.ends.append(len(self.steps) - 1)
        self._flush(trainer)
        self._measured.append(self.measures(strategy.task.index))
        values = {f"continual/{name}": value for name, value in self._measured[-1].items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    # ------------------------------------------------------------------ how

    def _draw_subset(self, trainer: Trainer, strategy: Any) -> None:
        """Draw the subset of each task that has none yet, and keep the images if they are few enough."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        known, seen = len(self.totals), strategy.task.index + 1
        if known < seen:
            fresh = self._loader(trainer, range(known, seen)).plan.tasks.bincount(minlength=seen)
            self.totals = torch.cat([self.totals, fresh[known:]])
            if self.split == "val" and int(self.totals[-1]) == 0:
                raise ValueError(
                    f"ContinualEvaluation: task {seen - 1} has no validation samples; give data.val_fraction, or use "
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
        """This process's share of the subsets of all seen tasks, on the device, a few large batches."""
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
        """Count the correct ones of each seen task, without waiting for the device.

        Args:
            trainer: Of the strategy.
            strategy: What is evaluated.
            in_training: Whether other callbacks have to be told, which may put other weights in place; in a test they
                know already.
        """
        callbacks: list[Any] = trainer.callbacks if in_training else []  # type: ignore[attr-defined]
        others = [callback for callback in callbacks if isinstance(callback, ContinualCallback)]
        devices = [strategy.device] if strategy.device.type == "cuda" else []
        modes = [(module, module.training) for module in strategy.modules()]
        counts = torch.zeros(strategy.task.index + 1, 2, dtype=torch.int64, device=strategy.device)
        timed = self._watch if in_training else nullcontext()  # else its seconds are counted as evaluation anyway
        with torch.no_grad(), torch.random.fork_rng(devices=devices), timed:
            for callback in others:
                callback.on_validation_start(trainer, strategy)
            strategy.eval()
            try:
                for batch in self._batches(trainer, strategy):
                    with trainer.precision_plugin.forward_context():
                        scores = strategy.predict_within_task(batch.images)
                    count_correct(counts, scores.float(), batch, strategy.task_columns)
            finally:
                for module, mode in modes:
                    module.training = mode
                for callback in others:
                    callback.on_validation_end(trainer, strategy)
            all_sum(counts)
        self.steps.append(trainer.global_step)
        self.tasks.append(strategy.task.index)
        self._pending.append(counts)

    def _note_seconds(self) -> None:
        seconds = self._watch.take()
        if self.meter is not None and seconds:
            self.meter.move("evaluation", seconds, source="training")

    def _flush(self, trainer: Trainer | None, *, before: int | None = None) -> None:
        """Bring the counts that are still on the device here, and log what is not logged yet against its step.

        Args:
            trainer: Whose loggers get it; None for none.
            before: Log evaluations of earlier steps than this only; None for all.
        """
        if self._pending:  # all of one task
            self.counts += list(torch.stack(self._pending).cpu().int())
            self._pending = []
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

    # ------------------------------------------------------------------ what it found

    def curves(self, *, task_aware: bool = False) -> Tensor:
        """Accuracy on each task at each evaluation, float64 ``(evaluations, tasks)``, nan before a task has come.

        Args:
            task_aware: With the task of each sample known, instead of among all classes.
        """
        correct = self._table()[:, :, int(task_aware)].double()
        return correct.masked_fill(correct < 0, torch.nan) / self.totals

    def _table(self) -> Tensor:
        """Counts, int32 ``(evaluations, tasks, 2)``, -1 before a task has come."""
        self._flush(None)
        return torch.nn.utils.rnn.pad_sequence(
            [*self.counts, torch.zeros(len(self.totals), 2, dtype=torch.int32)], batch_first=True, padding_value=-1
        )[:-1]

    def measures(self, task: int) -> dict[str, float]:
        """Measures over all evaluations up to the end of a task, by name; ``task_aware/...`` with the task known.

        Measures that are not defined, such as the minimum over old tasks during the first one, are left out.
        """
        if task >= len(self.ends) or self.tasks[0] != 0:  # it was added to a run that had begun without it
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
        return {name: value for name, value in values.items() if value == value}

    def results(self) -> dict[str, Any]:
        if not self.steps:
            return {}
        per_task = self._measured
        curves, aware = (self.curves(task_aware=known).tolist() for known in (False, True))
        return {
            "split": self.split,
            "every_n_steps": self.every_n_steps,
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

    # ------------------------------------------------------------------ what is kept

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._flush(trainer)  # a run that goes on from here will not log these again

    def state_dict(self) -> dict[str, Any]:
        if not self.steps:
            return {}
        return {
            "steps": torch.tensor(self.steps),
            "tasks": torch.tensor(self.tasks),
            "counts": self._table(),
            "ends": torch.tensor(self.ends, dtype=torch.int64),
            "totals": self.totals,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if not state_dict:
            return
        self.steps, self.tasks = state_dict["steps"].tolist(), state_dict["tasks"].tolist()
        self.ends, self.totals = state_dict["ends"].tolist(), state_dict["totals"].clone()
        self.counts = [row[: task + 1].clone() for row, task in zip(state_dict["counts"], self.tasks, strict=True)]
        self._pending, self._num_logged, self._subset = [], len(self.counts), None
        self._measured = [self.measures(task) for task in range(len(self.ends))]


def count_correct(counts: Tensor, scores: Tensor, batch: Batch, task_columns: Tensor) -> None:
    """Add to ``counts``, int64 ``(T, 2)``, the correct samples of each task, without and with the task known.

    Args:
        counts: Changed in place.
        scores: One per column, ``(B, C)``.
        batch: Gives true columns and tasks.
        task_columns: Which columns belong to which task, bool ``(T, C)``.
    """
    allowed = task_columns[batch.tasks]
    correct = scores.argmax(1) == batch.labels
    aware = scores.masked_fill(~allowed, -torch.inf).argmax(1) == batch.labels
    counts.index_add_(0, batch.tasks, torch.stack([correct, aware & allowed.any(1)], 1).long())


def _rounded(value: float) -> float | None:
    return round(value, 6) if value == value else None
