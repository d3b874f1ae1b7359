"""Logging during a run: ``metrics.csv``, and the loggers of the Trainer."""

import csv
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from cl_lightning.callback import ContinualCallback
from cl_lightning.distributed import all_sum
from cl_lightning.files import replaced
from cl_lightning.lightning_private import forget_wandb_run, has_wandb_run, wandb_options
from cl_lightning.loop import results
from cl_lightning.loop.logger_guard import LoggerGuard
from cl_lightning.loop.run import Run
from cl_lightning.measures import headline_accuracy
from cl_lightning.stream import Task

if TYPE_CHECKING:
    from cl_lightning.measures import AccuracyMatrix
    from cl_lightning.strategy import ContinualStrategy

_GAP_IMAGES = 500  # number of images for the distance between prototypes and features, at the end of a task


class MetricsFile(Logger):
    """Logs to one CSV file over a whole stream: a row per step, in order of steps, with a column for each name.

    New names add columns, for example when a task has curves of its own. Lightning's ``CSVLogger`` would start a new
    file when a run is resumed; this logger keeps the rows up to the checkpoint and removes later rows, which the
    resumed run logs again.

    If the file cannot be written, ``save`` raises, keeps the rows and leaves the file as it was.

    Args:
        path: The file.
        keep: Number of rows of an earlier file to keep; None for all of them. If ``up_to`` is None as well, an earlier
            file is deleted.
        up_to: Largest step of the rows to keep; None for no limit.
        rows: Rows after them that could not be written yet.

    Attributes:
        written: Number of rows in the file.
    """

    _FLUSH = 256  # largest number of rows that are not written yet

    def __init__(
        self,
        path: str | Path,
        keep: int | None = None,
        up_to: int | None = None,
        rows: Sequence[Mapping[str, str]] = (),
    ) -> None:
        super().__init__()
        self.written = 0
        self.path = Path(path)
        self.columns = ["step"]
        self.expected: list[str] = []  # columns that later tasks will add
        self.rows = [dict(row) for row in rows]  # not written yet
        if getattr(rank_zero_only, "rank", 0) == 0:
            self._begin(keep, up_to)

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the configuration is in ``config.yaml``."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float | Tensor], step: int | None = None) -> None:
        row = {"step": str(step if step is not None else self._last_step())}
        row |= {name: repr(float(value)) for name, value in metrics.items() if name != "step"}
        last = self.rows[-1] if self.rows else {}
        if last.get("step") == row["step"] and all(last[name] == row[name] for name in last.keys() & row.keys()):
            last.update(row)
        else:
            self.rows.append(row)
        if len(self.rows) % self._FLUSH == 0:
            with suppress(OSError):  # reported by the next ``save``
                self.save()

    @rank_zero_only
    def save(self) -> None:
        """Write the rows that are not written yet."""
        if not self.rows:
            return
        seen = set(self.columns)
        new = [name for row in self.rows for name in row if name not in seen and not seen.add(name)]  # type: ignore[func-returns-value]
        if new:  # add the columns of later tasks too, so that the file is rewritten once and not after each task
            new += [name for name in self.expected if name not in seen]
        if new or not self.path.exists():
            earlier = self._read()
            before, self.columns = self.columns, self.columns + new
            try:
                self._rewrite(earlier + self.rows)
            except OSError:
                self.columns = before
                raise
        else:
            self._append()
        self.written += len(self.rows)
        self.rows = []

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()

    def _begin(self, keep: int | None, up_to: int | None) -> None:
        if (keep is None and up_to is None) or not self.path.exists():
            self.path.unlink(missing_ok=True)
            return
        rows = [row for row in self._read()[:keep] if row["step"].isdigit()]
        rows = [row for row in rows if up_to is None or int(row["step"]) <= up_to]
        self.written = len(rows)
        self._rewrite(rows)

    def _last_step(self) -> int:
        return int(self.rows[-1]["step"]) if self.rows else 0

    def _read(self) -> list[dict[str, str]]:
        """Rows of the file, without an incomplete last line."""
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = [row for row in reader if None not in row and None not in row.values()]
            self.columns = list(reader.fieldnames or ["step"])
        return rows

    def _append(self) -> None:
        size = self.path.stat().st_size
        try:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns).writerows(self.rows)
        except OSError:
            os.truncate(self.path, size)  # without the rows of which a part was written
            raise

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        with replaced(self.path) as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)


class RunLogging(ContinualCallback):
    """Logs measures at the end of each task; the task loop adds it to every run.

    All loggers get, against the optimizer steps of the whole stream: the measures of the accuracy matrix (``stream/``)
    and its last row (``accuracy/``), the bias between old and new classes (``bias/``), the norms of the head's rows
    (``head/``), the distance of features from the stored class means (``prototypes/``), and costs (``cost/``). Nothing
    is added to a training step.

    Lightning's ``WandbLogger`` also gets the accuracy matrix as a heat map, summary fields by which a sweep sorts, and
    the configuration. The run folder stores the id of the W&B run: a resumed run continues the same W&B run.
    Credentials are not written anywhere.

    At the end of its context it saves all loggers and finishes the W&B runs that it started.

    Args:
        loop: The run to log.
    """

    observer_only: bool = True

    def __init__(self, loop: Run) -> None:
        self.loop = loop
        self._prototypes: dict[str, float] = {}
        self._opened: list[WandbLogger] = []
        self._guards: list[LoggerGuard] = []

    # ------------------------------------------------------------------ open and close

    def open(self, saved: Mapping[str, Any] | None) -> None:
        """Prepare the loggers, before the first task.

        Args:
            saved: The part ``cl_lightning`` of the checkpoint from which the run resumes; None for a new run.

        Raises:
            ValueError: If a W&B run cannot be started.
        """
        loop, trainer = self.loop, self.loop.trainer
        if loop.run_dir is not None:
            path = loop.run_dir / "metrics.csv"
            others = [logger for logger in trainer.loggers if not _writes(logger, path)]
            # At the end, so that `trainer.logger` is still the logger that the user chose.
            if saved is None:
                file = MetricsFile(path)
            else:
                file = MetricsFile(path, saved.get("rows"), trainer.global_step, saved.get("unwritten_rows", ()))
            trainer.loggers = [*others, file]
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and trainer.is_global_zero:
                self._open_wandb(logger, saved is not None)
        self._guards = [LoggerGuard(logger) for logger in trainer.loggers]

    def __enter__(self) -> "RunLogging":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for guard in self._guards:
            guard.try_again()
            guard.logger.save()
            if (logger := guard.logger) in self._opened:
                guard.attempt(partial(logger.experiment.finish, exit_code=0 if error is None else 1))
                forget_wandb_run(logger)
            guard.release()
        self._opened, self._guards = [], []

    def _open_wandb(self, logger: WandbLogger, resumed: bool) -> None:
        import wandb

        foreign = wandb.run is not None or has_wandb_run(logger)  # started by the caller, who also finishes it
        place = self.loop.run_dir / "wandb.json" if self.loop.run_dir is not None else None
        if not foreign and resumed and place is not None and place.exists():
            given = wandb_options(logger).get("id") or os.environ.get("WANDB_RUN_ID")
            wandb_options(logger)["id"] = given or json.loads(place.read_text(encoding="utf-8"))["id"]
        if wandb_options(logger).get("resume") is None:  # also if a configuration spells out the default, null
            wandb_options(logger)["resume"] = "allow"  # otherwise W&B would overwrite the resumed run
        if (folder := logger.save_dir) is not None:
            # W&B writes from another process, whose working directory may differ, into a folder that must exist.
            Path(folder).mkdir(parents=True, exist_ok=True)
            wandb_options(logger)["dir"] = str(Path(folder).resolve())
        try:
            run = logger.experiment
        except wandb.errors.Error as error:
            raise ValueError(
                f"WandbLogger: no run could be started ({error}); log in with `wandb login`, or set WANDB_MODE=offline"
            ) from error
        if not foreign:
            self._opened.append(logger)
        if place is not None:
            results.write(place, {"id": run.id, "project": run.project, "name": run.name})
        stream = self.loop.stream
        config = yaml.safe_load(self.loop.config) if self.loop.config else {}
        run.config.update(
            {**(config or {}), "seed": self.loop.seed, "tasks": len(stream.tasks), "class_order": list(stream.order)},
            allow_val_change=True,
        )

    # ------------------------------------------------------------------ the end of a task

    @torch.no_grad()
    def on_task_end(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        self._prototypes = prototype_gap(trainer, strategy, task) if trainer.loggers else {}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for guard in self._guards:
            if isinstance(logger := guard.logger, MetricsFile):
                guard.try_again()
                logger.save()  # so that the file has all rows up to the checkpoint
                checkpoint["cl_lightning"]["rows"] = logger.written
                if logger.rows:
                    checkpoint["cl_lightning"]["unwritten_rows"] = logger.rows

    def task_done(self, task: Task) -> None:
        """Log the measures of a finished task, after its evaluation; called on all processes."""
        loop, trainer = self.loop, self.loop.trainer
        if not trainer.loggers:
            return
        values = results.summary(loop.matrix, loop.stream, task.index)
        values |= head_norms(loop.strategy)
        if (row := loop.strategy.evaluation.result) is not None and row.confusion is not None:
            values |= bias(row.confusion, task)
        values |= self._prototypes | loop.meter.metrics()
        values["task"] = float(task.index)
        later = [
            re.sub(r"task_\d+$", f"task_{other.index:02d}", name)
            for name in values
            if name.endswith("task_00")
            for other in loop.stream.tasks
        ]
        for guard in self._guards:
            logger = guard.logger
            if isinstance(logger, MetricsFile):
                logger.expected = later
            guard.try_again()
            logger.log_metrics(values, step=trainer.global_step)
            if isinstance(logger, WandbLogger) and trainer.is_global_zero:
                guard.attempt(partial(self._log_wandb, logger))
            logger.save()

    def _log_wandb(self, logger: WandbLogger) -> None:
        import wandb

        loop, run = self.loop, logger.experiment
        table = wandb.Table(columns=["after task", "on task", "accuracy"], data=long_form(loop.matrix))
        chart = wandb.plot_table(
            data_table=table,
            vega_spec_name="wandb/confusion_matrix/v1",  # W&B's heat map
            fields={"Actual": "after task", "Predicted": "on task", "nPredictions": "accuracy"},
            string_fields={"title": "accuracy on each task after each task"},
        )
        run.log({"accuracy_matrix": chart, "trainer/global_step": loop.trainer.global_step})
        measures = loop.matrix.measures()
        seconds = sum(cost.training + cost.statistics + cost.evaluation for cost in loop.meter.tasks)
        summary = {"last_accuracy": headline_accuracy(measures), "tasks_finished": loop.matrix.learned}
        for name in ("average_incremental_accuracy", "forgetting", "backward_transfer", "learning_accuracy"):
            summary |= {name: measures[name]} if name in measures else {}
        for name in ("average_accuracy", "forgetting"):
            key = f"task_aware/{name}"
            summary |= {key.replace("average", "last"): measures[key]} if key in measures else {}
        summary |= {"seconds": seconds, "memory_mb": loop.meter.tasks[-1].memory_mb}
        run.summary.update(summary)


def long_form(matrix: "AccuracyMatrix") -> list[list[Any]]:
    """Known entries of the class-incremental accuracy matrix, as rows (after task, on task, accuracy)."""
    rows = []
    for t, row in enumerate(matrix.R_ci[: matrix.learned].tolist()):
        # Names of equal length, so that sorting them as text gives the order of the tasks.
        rows += [[f"{t:03d}", f"{i:03d}", value] for i, value in enumerate(row) if value == value]
    return rows


def bias(confusion: Tensor, task: Task) -> dict[str, float]:
    """Bias of the predictions towards the classes of the last task, as shares in [0, 1].

    ``bias/new_predicted`` is the share of all test samples that are predicted as a class of this task. Without bias it
    is close to ``bias/new_true``, the share of test samples whose class is of this task. ``bias/old_as_new`` is the
    share of samples of earlier classes that are predicted as a class of this task, ``bias/new_as_old`` the reverse.
    Empty after the first task, and after a task without new classes.

    Args:
        confusion: Samples by true (rows) and predicted column, ``(C, C)``.
        task: The last task.
    """
    num_old = task.num_seen - task.num_new
    if num_old == 0 or task.num_new == 0:
        return {}
    counts = confusion.double()
    total, old, new = counts.sum(), counts[:num_old], counts[num_old:]
    values = {
        "bias/new_predicted": counts[:, num_old:].sum() / total,
        "bias/new_true": new.sum() / total,
        "bias/old_as_new": old[:, num_old:].sum() / old.sum(),
        "bias/new_as_old": new[:, :num_old].sum() / new.sum(),
    }
    return {name: float(value) for name, value in values.items() if value == value}


@torch.no_grad()
def head_norms(strategy: "ContinualStrategy") -> dict[str, float]:
    """Mean Euclidean norm of the head's rows for the classes of each task; empty for heads without weight rows."""
    weights = [getattr(block, "weight", None) for block in strategy.network.head.blocks]
    rows = [weight for weight in weights if isinstance(weight, Tensor) and weight.dim() == 2]
    marks = strategy.task_columns
    if not rows or len(rows) != len(weights) or sum(len(row) for row in rows) != marks.shape[1]:
        return {}
    norms = torch.cat([row.float().norm(dim=1) for row in rows]).to(marks.device)
    means = (marks * norms).sum(1) / marks.sum(1)
    values: list[float] = means.tolist()
    return {f"head/norm_task_{index:02d}": value for index, value in enumerate(values) if value == value}


@torch.no_grad()
def prototype_gap(trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> dict[str, float]:
    """Mean of 1 - cos(f(x), p_y) over test samples x of each task, p_y the stored mean of its class; in [0, 2].

    The features of earlier classes drift while the network is trained, and their stored means do not: the value of
    earlier tasks grows with the drift. It is measured on at most 500 images, always the same ones. Empty for a strategy
    without class means of the network's features. Called on all processes.
    """
    try:
        prototypes = strategy.prototypes
    except (ValueError, AttributeError):
        return {}
    means, counts = getattr(prototypes, "means", None), getattr(prototypes, "counts", None)
    width = getattr(strategy.network.backbone, "num_features", None)
    if means is None or counts is None or means.dim() != 2 or means.shape[1] != width:
        return {}
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    known_tasks = range(task.index + 1)
    samples = max(_GAP_IMAGES // len(known_tasks), 1)
    sums = torch.zeros(len(known_tasks), 2, dtype=torch.float64, device=strategy.device)
    store = strategy.passes.store()
    for batch in data.evaluation_loader("test", known_tasks, samples=samples, key=0x6A9, store=store):
        moved = data.finish(batch.to(strategy.device), augment=False)
        known = counts[moved.labels.clamp(max=len(counts) - 1)] > 0
        known &= moved.labels < len(counts)
        with trainer.precision_plugin.forward_context():
            features = strategy.passes.features_of(moved, strategy.network, store).float()
        own = means[moved.labels.clamp(max=len(means) - 1)].to(features.dtype)
        gaps = 1 - F.cosine_similarity(features, own)
        rows = torch.stack([known.double(), gaps.double().where(known, 0.0)], 1)
        sums.index_add_(0, moved.tasks, rows)
    counted, total = all_sum(sums).unbind(1)
    values: list[float] = (total / counted).tolist()
    return {f"prototypes/gap_task_{index:02d}": value for index, value in enumerate(values) if value == value}


def _writes(logger: Logger, path: Path) -> bool:
    """Whether a ``CSVLogger`` of Lightning writes into the folder of ``path``."""
    return isinstance(logger, CSVLogger) and Path(logger.log_dir).resolve() == path.parent.resolve()
