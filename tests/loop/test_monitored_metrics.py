"""Metrics that callbacks and schedules monitor, schedules per step, and steps of what a method logs itself."""

import csv
import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau
from support.runs import plain_net
from torch import Tensor
from torch.optim import lr_scheduler

from cl_lightning.batch import Batch
from cl_lightning.cli import main
from cl_lightning.datamodules.digits import Digits
from cl_lightning.loop import LoopOptions, TaskLoop
from cl_lightning.models import Output
from cl_lightning.strategies.base.schedules import CosineOverPhase
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.rehearsal.er import ER
from cl_lightning.strategies.rehearsal.icarl import ICaRL
from cl_lightning.stream import RotatedDomains


class Crash(Callback):
    """Raises before a step of the stream, as a kill does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step and not batch_idx % trainer.accumulate_grad_batches:
            raise KeyError("crash")


def loop(strategy: Any, *callbacks: Callback, folder: Path | None = None, **options: Any) -> TaskLoop:
    of_loop = {name: options.pop(name) for name in list(options) if name in LoopOptions.__dataclass_fields__}
    data = {"batch_size": 64, **options.pop("data", {})}
    trainer = Trainer(
        **{"max_epochs": 2, "accelerator": "cpu", "logger": False, "log_every_n_steps": 1, **options},
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return TaskLoop(trainer, strategy, Digits(**data), options=LoopOptions(**of_loop), run_dir=folder)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


class Mine(Callback):
    def __init__(self, monitor: str) -> None:
        self.monitor = monitor


def plateau(optimizer: Any) -> Any:
    return ReduceLROnPlateau(optimizer, monitor="val/accuracy")


class OwnPlateau(Finetune):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = lr_scheduler.ReduceLROnPlateau(optimizer)
        return [optimizer], [{"scheduler": schedule, "monitor": "val/accuracy"}]


@pytest.mark.parametrize(
    ("strategy", "callbacks", "name"),
    [
        (Finetune, [EarlyStopping("val/accuracy")], "EarlyStopping"),
        (Finetune, [ModelCheckpoint(monitor="val/accuracy")], "ModelCheckpoint"),
        (Finetune, [Mine("val/accuracy")], "Mine"),
        (partial(Finetune, scheduler=plateau), [], "ReduceLROnPlateau"),
        (partial(Finetune, first_scheduler=plateau), [], "ReduceLROnPlateau"),
        (OwnPlateau, [], "ReduceLROnPlateau"),
    ],
)
def test_all_that_monitor_give_the_same_hint_without_validation_samples(strategy, callbacks, name):
    made = loop(strategy(backbone=plain_net), *callbacks)
    hint = f"^{name}: monitor is 'val/accuracy', but there are no validation samples; give --data.val_fraction 0.1"
    with pytest.raises(ValueError, match=hint):
        made.fit()
    assert not made.started


def test_evaluations_that_are_switched_off_are_no_validation():
    made = loop(
        Finetune(backbone=plain_net), EarlyStopping("val/loss"), data={"val_fraction": 0.1}, limit_val_batches=0
    )
    with pytest.raises(ValueError, match=r"trainer.limit_val_batches is 0; give at least 1"):
        made.fit()


class Noted(Callback):
    """Means of the training loss over each epoch, as callbacks see them and as the steps give them."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.seen: list[float] = []
        self.expected: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append(float(outputs["loss"]))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(float(trainer.callback_metrics["train/loss"]))
        self.expected.append(sum(self.steps) / len(self.steps))
        self.steps = []


@pytest.mark.parametrize("every", [1, 3, 1000])
def test_the_training_loss_of_an_epoch_is_the_mean_over_its_steps(every):
    noted = Noted()
    made = loop(Finetune(backbone=plain_net), noted, log_every_n_steps=every, data={"val_fraction": 0.1})
    made.fit()
    assert len(noted.seen) == 10
    assert noted.seen == pytest.approx(noted.expected, rel=1e-5)


def test_the_mean_of_an_epoch_is_the_same_after_a_resumption(tmp_path):
    def learnt(folder: Path, **options: Any) -> tuple[list[float], TaskLoop]:
        noted = Noted()
        stop = [Crash(options.pop("crash"))] if "crash" in options else []
        return noted.seen, loop(
            Finetune(backbone=plain_net), noted, *stop, folder=folder, log_every_n_steps=3, save_every_n_steps=1
        )

    whole, made = learnt(tmp_path / "whole")
    made.fit()
    _, made = learnt(tmp_path / "cut", crash=13)
    with pytest.raises(KeyError, match="crash"):
        made.fit()
    rest, made = learnt(tmp_path / "cut")
    made.fit("last")
    assert rest == whole[-len(rest) :]
    assert len(rest) == 8  # step 13 is in the first epoch of the second task


def test_early_stopping_and_plateaus_follow_the_training_loss():
    stopping = EarlyStopping("train/loss", patience=0, min_delta=100.0)
    made = loop(Finetune(backbone=plain_net), stopping, max_epochs=5)
    made.fit()
    assert made.trainer.current_epoch == 2 * 5  # no epoch is better by 100: each task ends after its second
    patient = partial(ReduceLROnPlateau, monitor="train/loss", patience=0, threshold=100.0, factor=0.1)
    made = loop(Finetune(backbone=plain_net, scheduler=patient), max_epochs=3)
    made.fit()
    assert made.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * 0.1**3)  # after each epoch


def rates(folder: Path) -> list[float]:
    return [float(row["train/lr"]) for row in rows(folder) if row.get("train/lr")]


def test_a_schedule_per_step_has_its_rate_in_each_step(tmp_path):
    schedule = partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 / (1 + step))
    loop(Finetune(backbone=plain_net, scheduler=schedule, scheduler_interval="step"), folder=tmp_path).fit()
    assert rates(tmp_path) == pytest.approx([0.05 / (1 + step) for _ in range(5) for step in range(10)])


def test_a_schedule_that_counts_batches_is_stepped_per_batch_by_default(tmp_path):
    schedule = partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=10)
    loop(Finetune(backbone=plain_net, scheduler=schedule), folder=tmp_path).fit()
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.05, momentum=0.9)
    alone, expected = schedule(optimizer), []
    for _ in range(10):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        alone.step()
    assert rates(tmp_path) == pytest.approx(expected * 5)


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_a_schedule_over_the_phase_spans_epochs_or_steps(tmp_path, interval):
    strategy = Finetune(backbone=plain_net, scheduler=CosineOverPhase, scheduler_interval=interval)
    loop(strategy, folder=tmp_path, accumulate_grad_batches=1).fit()
    expected = torch.arange(10) / 10 if interval == "step" else torch.arange(2).repeat_interleave(5) / 2
    assert rates(tmp_path)[:10] == pytest.approx((0.025 * (1 + (torch.pi * expected).cos())).tolist())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheduler": partial(lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=9)}, "has 10 steps; give at least 10"),
        (
            {"scheduler": partial(lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=1), "scheduler_interval": "epoch"},
            "has 2 epochs; give at least 2",
        ),
        ({"scheduler": lr_scheduler.ReduceLROnPlateau, "scheduler_interval": "step"}, "give scheduler_interval epoch"),
    ],
)
def test_schedules_that_do_not_fit_the_phase_are_refused_before_training(options, message):
    made = loop(Finetune(backbone=plain_net, **options))
    with pytest.raises(ValueError, match=message):
        made.fit()
    assert not made.started


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_with_a_schedule_per_step_is_resumed_to_the_bit(tmp_path, accumulate):
    def made(folder: Path, *callbacks: Callback) -> TaskLoop:
        strategy = ER(backbone=plain_net, memory_size=20, scheduler=CosineOverPhase, scheduler_interval="step")
        return loop(
            strategy, *callbacks, folder=tmp_path / folder, save_every_n_steps=1, accumulate_grad_batches=accumulate
        )

    whole = made(Path("whole"))
    whole.fit()
    with pytest.raises(KeyError, match="crash"):
        made(Path("cut"), Crash(9)).fit()
    rest = made(Path("cut"))
    rest.fit("last")
    for name, value in whole.strategy.state_dict().items():
        assert torch.equal(rest.strategy.state_dict()[name], value), name
    assert rates(tmp_path / "cut") == rates(tmp_path / "whole")


class Logs(Finetune):
    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        terms = super().losses(batch, output)
        self.log("mine", terms["ce"].detach(), batch_size=len(batch))
        self.log("mean", terms["ce"].detach(), on_step=False, on_epoch=True, batch_size=len(batch))
        return terms


def test_what_a_method_logs_itself_is_at_the_step_of_its_loss(tmp_path):
    loop(Logs(backbone=plain_net), folder=tmp_path).fit()
    steps = [row for row in rows(tmp_path) if row["train/ce"]]
    assert [int(row["step"]) for row in steps] == list(range(1, 51))
    assert all(float(row["mine"]) == pytest.approx(float(row["train/ce"])) for row in steps)
    assert [int(row["step"]) for row in rows(tmp_path) if row["mean"]] == list(range(5, 51, 5))
    numbers = [int(row["step"]) for row in rows(tmp_path)]
    assert numbers == sorted(numbers)


class Manual(Finetune):
    def __init__(self) -> None:
        super().__init__(backbone=plain_net)
        self.automatic_optimization = False


def test_manual_optimisation_is_refused():
    with pytest.raises(ValueError, match=r"^Manual: automatic_optimization is False, .*edit_gradients"):
        loop(Manual()).fit()


def test_a_resumption_at_the_end_of_a_task_logs_no_further_row(tmp_path):
    def made(folder: str, **options: Any) -> TaskLoop:
        return loop(
            Finetune(backbone=plain_net),
            folder=tmp_path / folder,
            accumulate_grad_batches=3,
            log_every_n_steps=2,
            data={"batch_size": 50},
            **options,
        )

    made("whole").fit()
    made("cut", stop_after_task=1).fit()
    made("cut").fit("last")
    assert [row["step"] for row in rows(tmp_path / "cut")] == [row["step"] for row in rows(tmp_path / "whole")]
    assert [row["train/ce"] for row in rows(tmp_path / "cut")] == [row["train/ce"] for row in rows(tmp_path / "whole")]


def test_results_keep_the_optimizers_when_no_fit_follows_a_resumption(tmp_path):
    def optimizers() -> Any:
        return json.loads((tmp_path / "results.json").read_text())["protocol"]["optimizers"]

    loop(Finetune(backbone=plain_net), folder=tmp_path).fit()
    before = optimizers()
    assert before[0]["name"] == "SGD"
    loop(Finetune(backbone=plain_net), folder=tmp_path).fit("last")
    assert optimizers() == before


@pytest.mark.parametrize(
    ("strategy", "data", "expected"),
    [
        (ICaRL(memory_size=5), {}, "ICaRL has 5 samples for 10 classes, so that at least 5 of them"),
        (ER(memory_size=9), {}, "ER has 9 samples for 10 classes, so that at least 1 of them"),
        (ICaRL(memory_size=10), {}, None),
        (ER(memory_size=0), {}, None),
        (ER(memory_size=10), {"scenario": RotatedDomains(tasks=2)}, None),
    ],
)
def test_a_memory_of_fewer_samples_than_classes_warns_once_before_training(strategy, data, expected):
    made = loop(strategy, max_epochs=1, data={"batch_size": 500, **data}, limit_train_batches=1, stop_after_task=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made.fit()
    said = [str(warning.message) for warning in caught if "memory_size" in str(warning.message)]
    assert len(said) == (expected is not None)
    assert all(expected in message for message in said)


def test_a_model_checkpoint_needs_no_further_option(tmp_path):
    of_run = ["--run_dir", str(tmp_path / "run"), "--data.val_fraction", "0.2", "--trainer.max_epochs", "1"]
    of_run += ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor", "val/accuracy"]
    of_run += ["--loop.stop_after_task", "0", "--trainer.enable_progress_bar", "false"]
    assert main(["fit", *of_run]) == 0
    assert list((tmp_path / "run" / "checkpoints").glob("epoch=0*.ckpt"))
