"""A progress bar for a stream of tasks."""

import math
import time
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.live import Live
from rich.text import Text

from cl_lightning.texts import printable

if TYPE_CHECKING:
    from cl_lightning.strategy import ContinualStrategy

_SHORTEST, _LONGEST = 6, 30  # characters of the bar


class StreamProgress(ProgressBar):
    """Tells in one line which task, epoch and step a run is at, the terms of the loss, the accuracy and the time left.

    The line stands below what is printed, and a further one stays for each finished task. Where the output is not a
    terminal, only the latter are printed. The time left is that of the whole stream, by the samples (times epochs) that
    are still to be trained on and those trained on since the start, with all that was done in between.

    Args:
        refresh_rate: Times per second, at most, that the line is drawn; each time waits for the device once.
    """

    def __init__(self, refresh_rate: float = 4.0) -> None:
        super().__init__()
        if not 0 < refresh_rate < math.inf:
            raise ValueError(f"StreamProgress: refresh_rate is {refresh_rate}; it must be above 0")
        self.refresh_rate = refresh_rate
        self.console = Console()
        self.clock = time.monotonic
        self._enabled = True
        self._live: Live | None = None
        self._drawn = -math.inf  # when
        self._start: tuple[float, float] | None = None  # time, and work ahead, when the run began
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
        strategy.on_pass = self._on_pass

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        strategy: Any = pl_module
        strategy.on_pass = None
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    # ------------------------------------------------------------------ stages

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._start is None:
            self._task_start = self.clock()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._start is None and (ahead := work_ahead(pl_module, trainer, batch_idx)) is not None:
            self._start = self.clock(), ahead

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._is_due():
            self._ahead = work_ahead(pl_module, trainer, batch_idx + 1)
            self._draw("", batch_idx + 1, trainer.num_training_batches)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ahead = work_ahead(pl_module, trainer, None)
        # What closes a task comes before the first batch of its evaluation.
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
        row, progress = strategy.row, strategy.progress
        now = self.clock()
        seconds, self._task_start = now - self._task_start, now
        if not self._enabled or progress is None or row is None:
            return
        index = strategy.task.index
        told = f"{heading(strategy)}: accuracy {100 * share(row.correct, row.totals):.1f} %"
        if index > 0 and row.totals[index] > 0:
            told += f" (new {100 * share(row.correct[index], row.totals[index]):.1f} %)"
        words = [told, clock_time(seconds) if seconds >= 60 else f"{seconds:.1f} s"]
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
        """Seconds to the end of the stream, at the pace so far; None before there is a pace."""
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
        """The line, as long as the terminal is wide; what matters least is left out where it is narrow.

        Args:
            strategy: Says where it is, and its loss terms.
            stage: What is done; empty for training.
            done: Batches so far.
            total: Batches in all; 0 if not known.
        """
        progress = strategy.progress
        place = bare = phase = accuracy = ""
        if progress is not None:
            place, bare = heading(strategy), heading(strategy, name=False)
            phase = f"{strategy.phase.name} {progress.phase + 1}/{progress.phases}" if progress.phases > 1 else ""
            accuracy = f"A {100 * progress.accuracy:.1f} %" if progress.accuracy is not None else ""
        step = stage or f"epoch {strategy.epoch + 1}/{strategy.phase_epochs}"
        counts = f" {done:.0f}/{total:.0f}" if 0 < total < math.inf else ""
        seconds = self.time_left()
        left = f"{clock_time(seconds)} left" if seconds is not None else ""
        terms = [] if stage else loss_terms(strategy)
        # Shorter and shorter, until there is room for the bar.
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


def heading(strategy: "ContinualStrategy", *, name: bool = True) -> str:
    """``task 3/10``, with its name where that says more."""
    task, progress = strategy.task, strategy.progress
    tasks = f"/{progress.tasks}" if progress is not None else ""
    named = f" ({printable(task.name)})" if name and task.name != f"task {task.index}" else ""
    return f"task {task.index + 1}{tasks}{named}"


def loss_terms(strategy: "ContinualStrategy") -> list[str]:
    """Means of the loss terms since they were last logged, one by one."""
    terms = strategy.mean_terms()
    if not terms:  # they were logged just now
        logged = {name.removeprefix("train/"): value for name, value in strategy.shown_terms.items() if "/" in name}
        terms = {name: value for name, value in logged.items() if name not in ("loss", "lr")}
    return [f"{name} {value:.3f}" if abs(value) < 1000 else f"{name} {value:.2e}" for name, value in terms.items()]


def work_ahead(strategy: Any, trainer: Trainer, batches: int | None) -> float | None:
    """Samples, times epochs, still to be trained on; None where the loop does not say.

    Args:
        strategy: Knows its progress.
        trainer: Knows the number of batches.
        batches: Done in this epoch; None if the phase is over.
    """
    progress = strategy.progress
    if progress is None:
        return None
    if batches is None:
        done = 1.0
    else:
        epochs = strategy.epoch + batches / max(trainer.num_training_batches, 1)
        done = min(epochs / max(strategy.phase_epochs, 1), 1.0)
    return float(progress.ahead - done * progress.work)


def sum_of(batches: Any) -> float:
    """Number of batches of all loaders."""
    return float(sum(batches) if isinstance(batches, list) else batches)


def share(correct: Any, totals: Any) -> float:
    return float(correct.sum()) / max(float(totals.sum()), 1.0)


def clock_time(seconds: float) -> str:
    """``1:02:03``, or ``2:03`` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
