"""Progress bar for a stream of tasks."""

import math
import time
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.live import Live
from rich.text import Text

from cl_lightning.callback import ContinualCallback, Progress
from cl_lightning.checks import within
from cl_lightning.escape_control import printable
from cl_lightning.measures import SCORES

if TYPE_CHECKING:
    from cl_lightning.strategy import ContinualStrategy

_SHORTEST, _LONGEST = 6, 30  # length of the bar, in characters


class StreamProgress(ProgressBar, ContinualCallback):
    """Progress bar in one line: task, phase, epoch, step, terms of the loss, accuracy and remaining time.

    The line is redrawn below the printed output. After each task a line with its accuracy is printed. If the output is
    not a terminal, only the lines of finished tasks are printed. The remaining time is of the whole stream. It is
    estimated from the time since the start, including evaluations, and the numbers of samples (times epochs) that are
    trained on since the start and still to be trained on.

    Args:
        refresh_rate: Maximum number of redraws per second, above 0; each redraw synchronises with the device once.
    """

    def __init__(self, refresh_rate: float = 4.0) -> None:
        super().__init__()
        within(self, "(0, inf)", refresh_rate=refresh_rate)
        self.refresh_rate = refresh_rate
        self.console = Console()
        self.clock = time.monotonic
        self._enabled = True
        self._live: Live | None = None
        self._drawn = -math.inf  # time of the last redraw
        self._start: tuple[float, float] | None = None  # time and remaining work at the start of the run
        self._task_start = self.clock()
        self._ahead: float | None = None

    # ------------------------------------------------------------------ Lightning's interface of progress bars

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False
        self._close()

    def print(self, *args: Any, **kwargs: Any) -> None:
        self.console.print(*args, **kwargs)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self._enabled and self._live is None and self.console.is_interactive:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        strategy: Any = pl_module
        strategy.passes.on_batch.append(self._on_pass)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        strategy: Any = pl_module
        strategy.passes.on_batch.remove(self._on_pass)
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    # ------------------------------------------------------------------ stages

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._start is None:
            self._task_start = self.clock()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._start is None and (ahead := work_ahead(pl_module, self.progress, trainer, batch_idx)) is not None:
            self._start = self.clock(), ahead

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._is_due():
            self._ahead = work_ahead(pl_module, self.progress, trainer, batch_idx + 1)
            self._draw("", batch_idx + 1, trainer.num_training_batches)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ahead = work_ahead(pl_module, self.progress, trainer, None)
        # The statistics at the end of a task are computed before the first batch of its evaluation.
        self._draw("statistics")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw("validation")

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if self._is_due():
            self._draw("validation", batch_idx + 1, sum_of(trainer.num_val_batches))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw("evaluation")

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if self._is_due():
            self._draw("evaluation", batch_idx + 1, sum_of(trainer.num_test_batches))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy: Any = pl_module
        row, progress = strategy.evaluation.result, self.progress
        now = self.clock()
        seconds, self._task_start = now - self._task_start, now
        if not self._enabled or progress is None or row is None:
            return
        index = strategy.task.index
        needs_tasks = strategy.traits.task_ids == "needed"
        values = row.task_aware if needs_tasks else row.accuracy
        title = SCORES[strategy.data.target_kind].title
        summary = f"{heading(strategy, progress)}: {title} {100 * row.average(task_aware=needs_tasks):.1f} %"
        if index > 0 and float(values[index]) == float(values[index]):
            summary += f" (new {100 * float(values[index]):.1f} %)"
        words = [summary, clock_time(seconds) if seconds >= 60 else f"{seconds:.1f} s"]
        if (left := self.time_left() or 0.0) >= 1 and index + 1 < progress.tasks:
            words.append(f"{clock_time(left)} left")
        self.console.print(", ".join(words), soft_wrap=True, highlight=False, markup=False)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if self._is_due():
            self._draw("prediction", batch_idx + 1, sum_of(trainer.num_predict_batches))

    # ------------------------------------------------------------------ the line

    def time_left(self) -> float | None:
        """Estimated seconds to the end of the stream; None before the first steps."""
        if self._start is None or self._ahead is None:
            return None
        begin, ahead = self._start
        done, seconds = ahead - self._ahead, self.clock() - begin
        return seconds * self._ahead / done if done > 0 else None

    def _on_pass(self, done: int, total: int) -> None:
        if self._is_due():
            self._draw("statistics", done, total)

    def _is_due(self) -> bool:
        return self._live is not None and self.clock() - self._drawn >= 1 / self.refresh_rate

    def _draw(self, stage: str, done: float = 0, total: float = 0) -> None:
        if self._live is None:
            return
        self._drawn = self.clock()
        strategy: Any = self.trainer.lightning_module
        self._live.update(self.line(strategy, stage, done, total), refresh=True)

    def _close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def line(self, strategy: "ContinualStrategy", stage: str, done: float, total: float) -> Text:
        """Text of the line, of the width of the terminal; on a narrow terminal the less important parts are omitted.

        Args:
            strategy: Strategy with its task, epoch and loss terms.
            stage: Name of the stage, such as ``evaluation``; empty for training.
            done: Number of finished batches.
            total: Number of all batches; 0 if unknown.
        """
        progress = self.progress
        place = bare = phase = accuracy = ""
        if progress is not None:
            place, bare = heading(strategy, self.progress), heading(strategy, self.progress, name=False)
            phase = f"{strategy.phase.name} {progress.phase + 1}/{progress.phases}" if progress.phases > 1 else ""
            accuracy = f"A {100 * progress.accuracy:.1f} %" if progress.accuracy is not None else ""
        step = stage or f"epoch {strategy.epoch + 1}/{strategy.phase.options.epochs}"
        counts = f" {done:.0f}/{total:.0f}" if 0 < total < math.inf else ""
        seconds = self.time_left()
        left = f"{clock_time(seconds)} left" if seconds is not None else ""
        terms = [] if stage else loss_terms(strategy)
        # Omit one part after the other until there is room for the bar.
        shorter: list[dict[str, Any]] = [{"terms": terms[:count]} for count in reversed(range(len(terms)))]
        shorter += [{"place": bare}, {"phase": ""}, {"accuracy": ""}, {"left": ""}]
        parts: dict[str, Any] = {"place": place, "phase": "" if stage else phase, "terms": terms}
        parts |= {"accuracy": accuracy, "left": left}
        for change in [{}, *shorter]:
            parts |= change
            begin = " · ".join(filter(None, [parts["place"], parts["phase"], step]))
            end = " · ".join(filter(None, ["", " ".join(parts["terms"]), parts["accuracy"], parts["left"]]))
            end = f" · {end}" if end else ""
            room = self.console.width - 2 - len(begin) - len(counts) - len(end)
            if room >= (_SHORTEST if counts else 0):
                break
        text = Text(begin, no_wrap=True, overflow="ellipsis")
        if counts:
            length = max(min(room, _LONGEST), 0)
            filled = round(length * min(done / total, 1))
            full, empty = ("-", " ") if self.console.options.ascii_only else ("━", "━")
            text.append(" ").append(full * filled, "bar.complete").append(empty * (length - filled), "bar.back")
        return text.append(counts).append(end, "dim")


def heading(strategy: "ContinualStrategy", progress: Progress | None, *, name: bool = True) -> str:
    """``task 3/10``, followed by the name of the task unless it is the default name."""
    task = strategy.task
    tasks = f"/{progress.tasks}" if progress is not None else ""
    named = f" ({printable(task.name)})" if name and task.name != f"task {task.index}" else ""
    return f"task {task.index + 1}{tasks}{named}"


def loss_terms(strategy: "ContinualStrategy") -> list[str]:
    """Means of the loss terms since the last logging, formatted, one string per term."""
    terms = strategy.terms.means()
    if not terms:  # they were logged just now
        logged = {name.removeprefix("train/"): value for name, value in strategy.terms.shown.items() if "/" in name}
        terms = {name: value for name, value in logged.items() if name not in ("loss", "lr")}
    return [f"{name} {value:.3f}" if abs(value) < 1000 else f"{name} {value:.2e}" for name, value in terms.items()]


def work_ahead(strategy: Any, progress: Progress | None, trainer: Trainer, batches: int | None) -> float | None:
    """Number of samples, times epochs, still to be trained on; None if the progress is unknown.

    Args:
        strategy: Strategy with its epoch and phase.
        progress: Progress at the start of the phase.
        trainer: Trainer with the number of batches per epoch.
        batches: Number of finished batches in this epoch; None if the phase is finished.
    """
    if progress is None:
        return None
    if batches is None:
        done = 1.0
    else:
        epochs = strategy.epoch + batches / max(trainer.num_training_batches, 1)
        done = min(epochs / max(strategy.phase.options.epochs or 1, 1), 1.0)
    return float(progress.ahead - done * progress.work)


def sum_of(batches: Any) -> float:
    """Total number of batches of all loaders."""
    return float(sum(batches) if isinstance(batches, list) else batches)


def clock_time(seconds: float) -> str:
    """``1:02:03``, or ``2:03`` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
