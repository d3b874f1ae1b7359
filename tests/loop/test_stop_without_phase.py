"""A request to stop in evaluations and in passes of statistics, also in tasks that have no phase."""

import json
import os
import signal

import pytest
import torch
from lightning.pytorch import Callback
from support import kills
from support.forks import start
from support.runs import assert_same_run, loop, plain_net, run, sgd

from cl_lightning.loop import Interrupted
from cl_lightning.strategies.base.passes import Passes
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.pretrained.simplecil import SimpleCIL


def simplecil():
    return SimpleCIL(backbone=plain_net)


def finetune():
    return Finetune(backbone=plain_net, optimizer=sgd)


class SignalInEvaluation(Callback):
    def __init__(self, task, batch=0):
        self.task, self.batch = task, batch

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if pl_module.task.index == self.task and batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("make", [simplecil, finetune])
@pytest.mark.parametrize("task", [0, 1])
def test_a_signal_in_an_evaluation_stops_there_and_the_run_resumes_exactly(tmp_path, make, task):
    data = {"eval_batch_size": 16}
    broken = loop(make(), SignalInEvaluation(task), folder=tmp_path, data=data)
    with pytest.raises(Interrupted) as stop:
        broken.fit()
    assert (stop.value.signum, stop.value.path) == (signal.SIGTERM, tmp_path / "checkpoints" / "last.ckpt")
    assert json.loads((tmp_path / "results.json").read_text())["finished"] == task
    place = torch.load(stop.value.path, weights_only=True)["cl_lightning"]["place"]
    assert (place["task"], place["learnt"], place["done"]) == (task, True, False)
    ended = []

    class Resumed(type(make())):
        def end_task(self, task):
            ended.append(task.index)
            super().end_task(task)

    Resumed.__module__, Resumed.__qualname__ = type(make()).__module__, type(make()).__qualname__
    strategy = make()
    strategy.__class__ = Resumed
    resumed = loop(strategy, folder=tmp_path, data=data)
    resumed.fit("last")
    assert ended == list(range(task + 1, 3))  # the statistics of the task are not computed twice
    strategy.__class__ = type(make())
    assert_same_run(run(make(), data=data), resumed)


def test_a_signal_in_the_last_batch_of_an_evaluation_stops_before_the_next_task(tmp_path):
    broken = loop(simplecil(), SignalInEvaluation(1), folder=tmp_path, data={"eval_batch_size": 1000})
    with pytest.raises(Interrupted):
        broken.fit()
    assert json.loads((tmp_path / "results.json").read_text())["finished"] in (1, 2)
    resumed = loop(simplecil(), folder=tmp_path, data={"eval_batch_size": 1000})
    resumed.fit("last")
    assert_same_run(run(simplecil(), data={"eval_batch_size": 1000}), resumed)


@pytest.mark.parametrize("number", [2, 15])
def test_a_signal_in_a_pass_stops_in_the_pass_once_there_is_a_checkpoint(tmp_path, monkeypatch, number):
    data = {"eval_batch_size": 64}
    whole = run(simplecil(), data=data)
    original, seen, ends = Passes.batches, [], []

    def batches(self, **options):
        for batch in original(self, **options):
            seen.append(None)
            if len(seen) == number:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch
        ends.append(len(seen))

    monkeypatch.setattr(Passes, "batches", batches)
    with pytest.raises(Interrupted) as stop:
        loop(simplecil(), folder=tmp_path, data=data).fit()
    assert len(ends) == 1  # the pass of the first task: before it there is no checkpoint to resume from
    assert len(seen) == max(number, ends[0])
    assert stop.value.path.is_file()
    resumed = loop(simplecil(), folder=tmp_path, data=data)
    resumed.fit("last")
    assert_same_run(whole, resumed)


def signalled(arguments, folder):
    from cl_lightning.strategy import ContinualStrategy

    original, seen = ContinualStrategy.test_step, []

    def step(self, *args, **kwargs):
        seen.append(None)
        if len(seen) == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(self, *args, **kwargs)

    ContinualStrategy.test_step = step
    kills.fit(arguments, folder, None, None)


def test_slurm_gets_its_requeue_from_a_task_without_a_phase(tmp_path):
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls.txt\n')
    program.chmod(0o755)
    options = f"--model SimpleCIL {kills.DATA} {kills.TRAINER} --run_dir run"
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    process = start(signalled, options.split(), str(tmp_path), SLURM_JOB_ID="123", PATH=path)
    process.join(120)
    assert process.exitcode == 128 + signal.SIGUSR1, kills.tail(tmp_path)
    assert (tmp_path / "calls.txt").read_text() == "requeue 123\n"
    assert "stopped; resume with: python -m cl_lightning fit --ckpt_path run/checkpoints/last.ckpt" in kills.tail(
        tmp_path
    )
