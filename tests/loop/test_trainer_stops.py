"""Stops of the Trainer: early stopping ends a phase; ``max_time``, ``Timer`` and other callbacks end the run."""

import json
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, Timer
from support.runs import assert_same_run, loop, plain_net, run, sgd

from cl_lightning.cli import main
from cl_lightning.loop import Interrupted
from cl_lightning.loop.stopping import NO_SIGNAL
from cl_lightning.strategies.baselines.finetune import Finetune


def finetune():
    return Finetune(backbone=plain_net, optimizer=sgd)


class StopsTrainer(Callback):
    """Sets ``trainer.should_stop`` in one hook of one task."""

    def __init__(self, hook, task, batch=3):
        def stop(trainer, pl_module, *args):
            if pl_module.task.index == task and (not args or args[-1] == batch or hook != "on_train_batch_end"):
                trainer.should_stop = True

        setattr(self, hook, stop)


@pytest.mark.parametrize(
    ("hook", "task"),
    [
        ("on_fit_start", 0),
        ("on_train_batch_end", 1),
        ("on_train_epoch_end", 1),
        ("on_validation_end", 1),
        ("on_train_end", 1),
        ("on_test_end", 0),
    ],
)
def test_a_callback_that_stops_the_trainer_stops_the_run_and_it_resumes_exactly(tmp_path, hook, task):
    data = {"val_fraction": 0.1}
    broken = loop(finetune(), StopsTrainer(hook, task), folder=tmp_path, data=data)
    with pytest.raises(Interrupted) as stop:
        broken.fit()
    assert stop.value.signum == NO_SIGNAL
    assert stop.value.path == tmp_path / "checkpoints" / "last.ckpt"
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["finished"] < len(content["tasks"])
    resumed = loop(finetune(), folder=tmp_path, data=data)
    resumed.fit("last")
    assert_same_run(run(finetune(), data=data), resumed)


def test_the_stop_is_at_the_step_and_not_at_the_end_of_the_epoch(tmp_path):
    broken = loop(finetune(), StopsTrainer("on_train_batch_end", 0, batch=2), folder=tmp_path)
    with pytest.raises(Interrupted):
        broken.fit()
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3


class StopsAtOnce(EarlyStopping):
    """Stops each phase after its first epoch."""

    def __init__(self):
        super().__init__("val/accuracy", mode="max", stopping_threshold=-1.0)


def test_early_stopping_ends_the_phase_and_the_next_phase_begins():
    made = run(finetune(), StopsAtOnce(), data={"val_fraction": 0.1}, max_epochs=3)
    assert made.trainer.current_epoch == 3
    assert made.matrix.learned == 3


def test_min_epochs_count_in_each_phase():
    made = run(finetune(), StopsAtOnce(), data={"val_fraction": 0.1}, max_epochs=4, min_epochs=2)
    assert made.trainer.current_epoch == 3 * 2


def test_the_time_of_a_timer_is_that_of_all_tasks(tmp_path):
    timer = Timer(duration=timedelta(hours=1))
    seconds = []

    class Notes(Callback):
        def on_train_end(self, trainer, pl_module):
            timer._start_time["train"] -= 100  # 100 seconds more in each fit
            seconds.append(timer.time_elapsed())

    run(finetune(), Notes(), timer)
    assert [int(value) // 100 for value in seconds] == [1, 2, 3]


def test_a_timer_that_ends_in_a_later_task_stops_there(tmp_path):
    timer = Timer(duration=timedelta(seconds=150))

    class Ages(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch % 2 == 0:
                timer._start_time["train"] -= 100  # 100 seconds more in each fit of two epochs

    broken = loop(finetune(), Ages(), timer, folder=tmp_path)
    with pytest.raises(Interrupted):
        broken.fit()
    assert broken.position.task == 1
    resumed = loop(finetune(), Timer(duration=timedelta(hours=1)), folder=tmp_path)
    resumed.fit("last")
    assert_same_run(run(finetune()), resumed)


def test_max_time_ends_a_run_of_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = "--trainer.max_epochs 5000 --trainer.max_time 00:00:00:01 --trainer.accelerator cpu"
    code = main(["fit", *options.split(), "--trainer.enable_progress_bar", "false", "--run_dir", "run"])
    assert code == 128 + NO_SIGNAL
    expected = "stopped; resume with: python -m cl_lightning fit --ckpt_path run/checkpoints/last.ckpt"
    assert expected in capsys.readouterr().err
    content = json.loads((tmp_path / "run" / "results.json").read_text())
    assert content["finished"] == 0
