"""A run folder is written by one run at a time."""

import os
import signal
import time

import pytest
from lightning.pytorch import Callback
from support import kills
from support.forks import start
from support.runs import loop, plain_net, sgd

from cl_lightning.loop.run_lock import hold
from cl_lightning.strategies.baselines.finetune import Finetune


def finetune():
    return Finetune(backbone=plain_net, optimizer=sgd)


def holding(folder):
    with hold(folder):
        (folder / "held").touch()
        time.sleep(300)


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert path.exists()


def test_a_second_run_says_who_holds_the_folder_and_a_dead_holder_does_not_count(tmp_path):
    process = start(holding, tmp_path)
    try:
        wait_for(tmp_path / "held")
        before = {path.name for path in tmp_path.iterdir()}
        with pytest.raises(ValueError, match=f"process {process.pid} on .* is writing a run there; wait .* --run_dir"):
            loop(finetune(), folder=tmp_path).fit()
        assert {path.name for path in tmp_path.iterdir()} == before
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
    assert loop(finetune(), folder=tmp_path).fit().learned == 3
    assert not (tmp_path / ".lock_holder").exists()


class StartsAnother(Callback):
    """Starts a second run in the same folder in the middle of the first one."""

    def __init__(self, folder, **options):
        self.folder, self.errors = folder, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if pl_module.task.index == 1 and batch_idx == 2:
            for path in (None, "last"):
                with pytest.raises(ValueError, match="another --run_dir") as raised:
                    loop(finetune(), folder=self.folder).fit(path)
                self.errors.append(str(raised.value))


def test_a_run_that_is_resumed_while_it_is_running_is_an_error(tmp_path):
    another = StartsAnother(tmp_path)
    assert loop(finetune(), another, folder=tmp_path).fit().learned == 3
    assert "holds a run already" in another.errors[0]
    assert f"process {os.getpid()} on" in another.errors[1]
    loop(finetune(), folder=tmp_path).fit("last")  # the lock is released


def test_the_command_line_reports_it_in_one_line(tmp_path):
    options = f"--model Finetune {kills.DATA} {kills.TRAINER} --run_dir run"
    with hold(tmp_path / "run"):
        assert kills.run(options, tmp_path) == 2
    assert f"error: run: process {os.getpid()} on" in kills.tail(tmp_path)
    assert not (tmp_path / "run" / "results.json").exists()
    assert kills.run(options, tmp_path) == 0, kills.tail(tmp_path)
