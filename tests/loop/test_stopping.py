"""Signals: a stop after the current step on all processes, with a checkpoint, and jobs that SLURM starts again."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from support import kills
from support.forks import free_port, start
from support.runs import assert_same

from cl_lightning.loop import is_lost_peer, requeue, slurm_job

OPTIONS = f"--model ER {kills.DATA} {kills.TRAINER} --loop.save_every_seconds 1000 --run_dir run"
PAIR = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "tests", "GROUP_RANK": "0"}
SLURM = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert kills.run(OPTIONS, folder) == 0, kills.tail(folder)
    return folder


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A program of that name that notes how it is called."""
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls.txt\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "calls.txt"


def _interrupt(folder: Path, number: int, **environment: str) -> int:
    """Exit code of a run that gets a signal in the middle of an epoch."""
    process = start(signalled, OPTIONS.split(), str(folder), 20, number, **environment)
    process.join(120)
    assert process.exitcode is not None, kills.tail(folder)
    code: int = process.exitcode
    return code


def signalled(arguments, folder, step, number):
    """A fit that sends itself a signal while it trains."""
    from cl_lightning.loop.hooks import LoopHooks

    original, seen = LoopHooks.on_train_batch_end, []

    def watched(self, *args):
        seen.append(None)
        if len(seen) == step:
            os.kill(os.getpid(), number)
        return original(self, *args)

    LoopHooks.on_train_batch_end = watched
    kills.fit(arguments, folder, None, None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_writes_a_checkpoint_to_resume_from(whole, tmp_path, number):
    assert _interrupt(tmp_path, number) == 128 + number
    assert "stopped; resume with: python -m cl_lightning fit --ckpt_path run/checkpoints/last.ckpt" in kills.tail(
        tmp_path
    )
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 20
    assert kills.run(OPTIONS + " --ckpt_path last", tmp_path) == 0, kills.tail(tmp_path)
    assert_same(kills.left(whole / "run"), kills.left(tmp_path / "run"))


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_slurm_job_that_gets_the_signal_of_its_end_is_queued_again(whole, tmp_path, scontrol, number):
    code = _interrupt(tmp_path, number, SLURM_JOB_ID="123", PATH=os.environ["PATH"])
    assert code == 128 + number, kills.tail(tmp_path)
    assert scontrol.read_text() == "requeue 123\n"
    assert "job 123 is requeued" in kills.tail(tmp_path)
    assert kills.run(OPTIONS + " --ckpt_path auto", tmp_path) == 0, kills.tail(tmp_path)
    assert_same(kills.left(whole / "run"), kills.left(tmp_path / "run"))


def test_outside_slurm_these_signals_are_left_as_they_are(tmp_path, scontrol):
    assert _interrupt(tmp_path, signal.SIGUSR1) == -signal.SIGUSR1
    assert not scontrol.exists()


def test_jobs_of_arrays_go_by_their_place_in_the_array(monkeypatch, scontrol):
    for name in SLURM:
        monkeypatch.delenv(name, raising=False)
    assert slurm_job() is None
    assert requeue(signal.SIGUSR1) is None
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert requeue(signal.SIGTERM) is None  # a cancelled job stays cancelled
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert requeue(signal.SIGUSR1) == "job 70_3 is requeued"
    assert scontrol.read_text() == "requeue 70_3\n"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70; rm -r x")
    assert slurm_job() is None


def test_a_job_that_cannot_be_queued_again_is_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "could not be requeued" in str(requeue(signal.SIGUSR1))
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho not allowed >&2\nexit 1\n")
    (tmp_path / "scontrol").chmod(0o755)
    assert requeue(signal.SIGUSR1) == "job 77 could not be requeued: not allowed"


def test_one_of_two_processes_gets_the_signal_and_both_stop_at_the_same_step(tmp_path):
    common = {**PAIR, "MASTER_ADDR": "127.0.0.1", "CUDA_VISIBLE_DEVICES": ""}
    given = (OPTIONS + " --trainer.devices 2 --trainer.strategy ddp").split()
    port = str(free_port())
    first = start(kills.fit, given, str(tmp_path), None, None, **common, MASTER_PORT=port, RANK="0", LOCAL_RANK="0")
    second = start(
        signalled, given, str(tmp_path), 9, signal.SIGTERM, **common, MASTER_PORT=port, RANK="1", LOCAL_RANK="1"
    )
    for process in (first, second):
        process.join(120)
    assert [first.exitcode, second.exitcode] == [143, 143], kills.tail(tmp_path)
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert 9 <= saved["global_step"] < 80


def test_a_second_signal_does_not_wait(tmp_path):
    process = start(stubborn, [*OPTIONS.split(), "--loop.dry_run", "false"], str(tmp_path))
    flag = tmp_path / "in_step"
    deadline = time.monotonic() + 60
    while not flag.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.2)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 130
    assert "the steps since the last checkpoint are lost" in kills.tail(tmp_path)


def stubborn(arguments, folder):
    """A fit whose steps take minutes."""
    from cl_lightning.strategies.rehearsal.er import ER

    def losses(self, batch, output):
        (Path(folder) / "in_step").touch()
        time.sleep(300)

    ER.losses = losses
    kills.fit(arguments, folder, None, None)


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("[../third_party/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234", True),
        ("Connection reset by peer", True),
        ("NCCL error: remote process exited or there was a network error", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_errors_that_come_from_a_lost_process_are_known(message, lost):
    assert is_lost_peer(RuntimeError(message)) is lost
    assert not is_lost_peer(ValueError(message))
