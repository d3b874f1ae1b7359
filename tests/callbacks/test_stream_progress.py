"""The progress bar of a stream."""

import io
import itertools
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from rich.console import Console

from cl_lightning.callback import Progress
from cl_lightning.callbacks.stream_progress import StreamProgress, clock_time
from cl_lightning.cli import main
from cl_lightning.datamodules.digits import Digits
from cl_lightning.loop import LoopOptions, TaskLoop
from cl_lightning.strategies.base.terms import LossTerms
from cl_lightning.strategies.exemplar_free.fetril import FeTrIL
from cl_lightning.strategies.exemplar_free.lwf import LwF
from cl_lightning.strategies.pretrained.simplecil import SimpleCIL
from cl_lightning.strategy import ContinualStrategy, Phase, PhaseOptions


def bar_on(width: int, *, terminal: bool, ticks: float = 0.0) -> tuple[StreamProgress, io.StringIO]:
    """A bar, and what it writes; with ``ticks`` its clock goes on by so many seconds whenever it is asked."""
    bar, written = StreamProgress(), io.StringIO()
    bar.console = Console(
        file=written, width=width, force_terminal=terminal, force_interactive=terminal, legacy_windows=False
    )
    if ticks:
        counter = itertools.count()
        bar.clock = lambda: next(counter) * ticks
    return bar, written


def learn(
    bar: StreamProgress, strategy: ContinualStrategy | None = None, data: Digits | None = None, **options: Any
) -> TaskLoop:
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[bar],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    loop = TaskLoop(
        trainer, strategy or LwF(), data or Digits(), options=LoopOptions(stop_after_task=2, dry_run=False, **options)
    )
    loop.fit()
    return loop


def plain(text: str) -> list[str]:
    """The lines that were drawn, one after another, without control characters."""
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").splitlines()
    return [line.rstrip() for line in lines if line.strip()]


def test_a_terminal_shows_task_epoch_step_loss_terms_accuracy_and_time_left():
    bar, written = bar_on(120, terminal=True, ticks=1.0)  # each look at the clock is a second: every step is drawn
    learn(bar)
    lines = plain(written.getvalue())
    first = r"task 1/3 · epoch 1/2 ━+ 1/10 · ce \d\.\d{3}( · \d+:\d\d left)?"
    later = r"task 3/3 · epoch 2/2 ━+ 4/10 · ce \d\.\d{3} distill \d\.\d{3} · A \d+\.\d % · \d+:\d\d left"
    assert any(re.fullmatch(first, line) for line in lines), lines[:5]
    assert any(re.fullmatch(later, line) for line in lines)
    assert any(re.match(r"task 2/3 · statistics", line) for line in lines)
    assert any(re.match(r"task 2/3 · evaluation ━+ 1/1", line) for line in lines)


def test_a_pass_over_the_data_after_training_has_a_bar():
    bar, written = bar_on(120, terminal=True, ticks=1.0)
    learn(bar, SimpleCIL(), data=Digits(eval_batch_size=64))
    assert any(re.match(r"task 2/3 · statistics ━+ 3/5", line) for line in plain(written.getvalue()))


def test_one_line_stays_for_each_finished_task():
    for terminal in (True, False):
        bar, written = bar_on(80, terminal=terminal)
        loop = learn(bar)
        lines = [line for line in plain(written.getvalue()) if ": accuracy" in line]
        assert len(lines) == 3
        values = [100 * loop.matrix.measures(task)["average_accuracy"] for task in range(3)]
        for task, (line, value) in enumerate(zip(lines, values, strict=True), 1):
            assert line.startswith(f"task {task}/3: accuracy {value:.1f} %")
        assert re.search(r"\(new \d+\.\d %\)", lines[2])


def test_nothing_but_these_lines_is_written_where_there_is_no_terminal():
    bar, written = bar_on(80, terminal=False)
    learn(bar)
    assert written.getvalue().count("\n") == 3
    assert "\x1b" not in written.getvalue()


def test_the_line_is_drawn_a_few_times_a_second_whatever_the_number_of_steps(monkeypatch):
    bar, _ = bar_on(80, terminal=True)
    now = itertools.count()
    bar.clock = lambda: next(now) * 0.001  # a thousand looks at the clock make a second
    waits: list[int] = []
    means = LossTerms.means
    monkeypatch.setattr(LossTerms, "means", lambda self: (waits.append(1), means(self))[1])
    learn(bar, save_every_seconds=1e9)
    assert 0 < len(waits) <= 1 + 4 * next(now) * 0.001


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_the_line_fits_the_width(width):
    bar, _ = bar_on(width, terminal=True)
    strategy: Any = SimpleNamespace(
        task=SimpleNamespace(index=8, name="rotated by 240 degrees"),
        phase=Phase("balancing", PhaseOptions(epochs=20)),
        epoch=3,
        terms=SimpleNamespace(means=lambda: {"ce": 0.4321, "distill": 12345.678, "penalty": 0.001}, shown={}),
    )
    bar.progress = Progress(tasks=10, phase=1, phases=2, work=100.0, ahead=300.0, accuracy=0.8125)
    line = bar.line(strategy, "", 37, 79).plain
    assert len(line) <= width
    assert line.startswith("task 9/10")
    assert "37/79" in line or width < 60
    if width == 200:
        assert line.startswith("task 9/10 (rotated by 240 degrees) · balancing 2/2 · epoch 4/20 ━")
        assert line.endswith("37/79 · ce 0.432 distill 1.23e+04 penalty 0.001 · A 81.2 %")


def test_the_time_left_is_that_of_the_whole_stream_at_the_pace_so_far():
    bar, _ = bar_on(80, terminal=True)
    bar.clock = lambda: 10.0
    bar._start, bar._ahead = (0.0, 1000.0), 800.0  # 200 samples in 10 seconds
    assert bar.time_left() == pytest.approx(40.0)
    bar._ahead = 1000.0
    assert bar.time_left() is None


def test_the_loop_reports_the_steps_that_are_left():
    seen: list[Progress] = []

    bar = bar_on(80, terminal=False)[0]

    class Watched(LwF):
        def on_train_start(self) -> None:
            seen.append(bar.progress)

    loop = learn(bar, Watched(warmup_epochs=1), first_task_epochs=3)
    sizes = [len(part) for part in loop.stream.train[:3]]
    assert [progress.phases for progress in seen] == [1, 2, 2, 2, 2]
    assert [progress.phase for progress in seen] == [0, 0, 1, 0, 1]
    # Later tasks are taken to have the phases of the current one, so the first task knows of no warm-up.
    assert seen[0].ahead == 3 * sizes[0] + 2 * (sizes[1] + sizes[2])
    assert [progress.work for progress in seen[1:]] == [sizes[1], 2 * sizes[1], sizes[2], 2 * sizes[2]]
    assert [progress.ahead for progress in seen[1:]] == [
        3 * (sizes[1] + sizes[2]),
        2 * sizes[1] + 3 * sizes[2],
        3 * sizes[2],
        2 * sizes[2],
    ]
    assert seen[0].accuracy is None
    assert seen[1].accuracy == loop.matrix.measures(0)["average_accuracy"]


def test_joint_training_has_more_ahead_with_each_task():
    from cl_lightning.strategies.baselines.joint import Joint

    bar, _ = bar_on(80, terminal=False)
    loop = learn(bar, Joint())  # type: ignore[arg-type]
    sizes = [len(part) for part in loop.stream.train[:3]]
    assert bar.progress is not None
    assert bar.progress.work == 2 * sum(sizes)


def test_the_line_is_gone_after_an_error():
    class Broken(LwF):
        def losses(self, batch: Any, output: Any) -> dict[str, torch.Tensor]:
            raise RuntimeError("broken")

    bar, _ = bar_on(80, terminal=True)
    with pytest.raises(RuntimeError, match="broken"):
        learn(bar, Broken())
    assert bar._live is None


def test_the_bar_learns_what_the_run_learns_without_it():
    states = []
    for callbacks in ([bar_on(80, terminal=True, ticks=1.0)[0]], []):
        trainer = Trainer(
            max_epochs=1, accelerator="cpu", callbacks=callbacks, logger=False, enable_checkpointing=False,
            enable_model_summary=False, enable_progress_bar=bool(callbacks),
        )  # fmt: skip
        loop = TaskLoop(trainer, LwF(), Digits(), options=LoopOptions(stop_after_task=1))
        loop.fit()
        states.append(loop.strategy.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name])


def test_the_command_line_shows_it_unless_it_is_switched_off(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--trainer.max_epochs", "1", "--loop.stop_after_task", "0"]
    assert main(["fit", *options]) == 0
    assert "task 1/1: accuracy" in capsys.readouterr().out
    assert main(["fit", *options, "--trainer.enable_progress_bar", "false"]) == 0
    assert "task 1/1: accuracy" not in capsys.readouterr().out
    assert main(["fit", *options, "--trainer.callbacks+=TQDMProgressBar"]) == 0
    assert "task 1/1: accuracy" not in capsys.readouterr().out
    assert main(["fit", *options, "--trainer.callbacks+=StreamProgress", "--trainer.callbacks.refresh_rate", "1"]) == 0
    assert "task 1/1: accuracy" in capsys.readouterr().out


def test_a_refresh_rate_of_zero_is_refused():
    with pytest.raises(ValueError, match="refresh_rate is 0"):
        StreamProgress(refresh_rate=0)


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.4, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599, "59:59"), (3723, "1:02:03")]
)
def test_times_read_like_a_clock(seconds, told):
    assert clock_time(seconds) == told


def test_a_test_of_a_checkpoint_shows_how_far_its_pass_is():
    bar, _ = bar_on(80, terminal=True)
    strategy: Any = SimpleNamespace(task=SimpleNamespace(index=0, name="task 0"))
    assert re.fullmatch(r"evaluation ━{30} 3/4", bar.line(strategy, "evaluation", 3, 4).plain)
    assert bar.line(strategy, "evaluation", 0, 0).plain == "evaluation"


def test_an_epoch_on_features_counts_as_a_small_part_of_one_on_images():
    noted: list[tuple[str, float]] = []

    class Noting(StreamProgress):
        def on_train_start(self, trainer, pl_module):
            super().on_train_start(trainer, pl_module)
            noted.append((pl_module.phase.name, self.progress.work))

    learn(Noting(), FeTrIL(classifier="fc", head_options=PhaseOptions(epochs=50)))
    assert [name for name, _ in noted] == ["train", "head", "head", "head"]
    assert noted[0][1] / noted[1][1] == pytest.approx(2 / (50 * 0.02))
