"""Batch normalisation on two processes: its running statistics, which differ within an epoch, in checkpoints."""

from pathlib import Path

import pytest
import torch
from support.forks import pair
from support.runs import NormNet, StopAt, assert_resumes, assert_same, assert_same_run, loop, run, sgd

from cl_lightning.callbacks.ema_ensemble import EMAEnsemble
from cl_lightning.loop.checkpoint import load
from cl_lightning.loop.process_state import own
from cl_lightning.strategies.baselines.finetune import Finetune

TWO = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False, "data": {"drop_last": True}}
MEAN = "network.backbone.layers.2.running_mean"


def finetune():
    return Finetune(backbone=NormNet, optimizer=sgd)


def with_averages():
    return finetune(), [EMAEnsemble(momentum=0.9)]


SAVING = {"save_every_n_steps": 1, "save_every_seconds": 0.0}


def on_two_processes(folder: str) -> None:
    """On each process a run with and without checkpoints between steps, one that resumes, and one that crashes."""
    whole = run(finetune(), **TWO)
    saved = run(finetune(), folder=Path(folder) / "saved", options=SAVING, **TWO)
    assert_same_run(whole, saved)
    assert_same(whole.strategy.state_dict(), saved.strategy.state_dict())
    assert_resumes(with_averages, Path(folder) / "resumed", **TWO)
    crash = StopAt(0, 3)
    with pytest.raises(crash.CrashError):
        loop(finetune(), crash, folder=Path(folder) / "crashed", options=SAVING, **TWO).fit()


def test_two_processes_resume_to_the_bit_and_checkpoints_do_not_change_them(tmp_path):
    pair(on_two_processes, str(tmp_path))
    folder = tmp_path / "crashed"
    saved = load(folder / "checkpoints" / "last.ckpt")
    parts = saved["cl_lightning"]["process_statistics"]
    means = parts["state_dict"][MEAN]
    assert means.shape == (2, 16)
    assert (means[0] != means[1]).any()
    torch.testing.assert_close(saved["state_dict"][MEAN], means.double().mean(0).float(), rtol=0, atol=0)
    for rank in range(2):
        assert torch.equal(own(saved, rank, 2)["state_dict"][MEAN], means[rank])
    assert own(saved, 0, 1) is saved  # another number of processes: the mean
    assert "process_statistics" not in load(tmp_path / "saved" / "checkpoints" / "last.ckpt")["cl_lightning"]
    resumed = loop(finetune(), folder=folder, data=TWO["data"])
    with pytest.warns(UserWarning, match="a run with 2 processes, this one has 1"):
        resumed.fit("last")
    assert resumed.matrix.learned == 3


def test_statistics_that_do_not_fit_the_network_are_refused():
    statistics = {"state_dict": {MEAN: torch.zeros(2, 3)}}
    saved = {
        "state_dict": {MEAN: torch.zeros(4), "network.weight": torch.ones(1)},
        "cl_lightning": {"processes": 2, "process_statistics": statistics},
    }
    with pytest.raises(ValueError, match="process_statistics does not have the statistics of each process"):
        own(saved, 0, 2)
    statistics["state_dict"][MEAN] = torch.arange(8.0).view(2, 4)
    assert own(saved, 1, 2)["state_dict"][MEAN].tolist() == [4, 5, 6, 7]
    assert saved["state_dict"][MEAN].tolist() == [0] * 4
