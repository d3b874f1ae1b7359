"""Resuming with other options: they hold, or the run says that they do not, and results have what held."""

import json
import warnings

import pytest
import torch
from support.runs import StopAt, loop, plain_net

from cl_lightning.checksums import seal
from cl_lightning.strategies.rehearsal.er import ER


def rate(lr):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def er(size=20, lr=0.05):
    return ER(backbone=plain_net, optimizer=rate(lr), memory_size=size)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder whose run crashed in the second task."""
    folder = tmp_path_factory.mktemp("run")
    made = loop(er(), StopAt(1, 4), folder=folder, options={"save_every_n_steps": 2, "save_every_seconds": 0.0})
    with pytest.raises(StopAt.CrashError):
        made.fit()
    return folder / "checkpoints" / "last.ckpt"


def resumed(checkpoint, folder, *args, **options):
    """Results of a run that is resumed, and what it said of options and processes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop(er(*args, **options), folder=folder).fit(checkpoint)
    said = [str(entry.message) for entry in caught if "checkpoint" in str(entry.message)]
    return json.loads((folder / "results.json").read_text()), said


def test_the_same_options_are_not_reported(stopped, tmp_path):
    results, said = resumed(stopped, tmp_path)
    assert not said
    assert not [change for change in results["option_changes"] if change["option"].startswith("model.")]


def test_a_size_of_the_memory_that_does_not_hold_is_reported_and_not_recorded(stopped, tmp_path):
    results, [said] = resumed(stopped, tmp_path, size=30)
    assert "model.memory_size 20 -> 30 (no effect: the memory keeps the size that it has in the checkpoint)" in said
    assert results["config"]["model"]["init_args"]["memory_size"] == results["protocol"]["memory_samples"] == 20
    [change] = [change for change in results["option_changes"] if change["option"] == "model.init_args.memory_size"]
    assert change["holds"] == "checkpoint"
    _, said = resumed(tmp_path / "checkpoints" / "last.ckpt", tmp_path, size=20)  # what the files say holds
    assert not said


def test_another_optimizer_holds_from_the_next_phase_on(stopped, tmp_path):
    results, [said] = resumed(stopped, tmp_path, lr=0.5)
    assert "[0.05] -> [0.5] (from the next phase on" in said
    assert results["protocol"]["optimizers"][0]["lr"] == 0.5
    assert {change["holds"] for change in results["option_changes"] if "optimizer" in change["option"]} == {
        "next phase"
    }


def test_another_number_of_processes_is_reported(stopped, tmp_path):
    saved = torch.load(stopped, weights_only=True)
    saved["cl_lightning"]["processes"] = 2
    torch.save(saved, tmp_path / "two.ckpt")
    seal(tmp_path / "two.ckpt")
    _, [said] = resumed(tmp_path / "two.ckpt", tmp_path / "run")
    assert said.startswith("the checkpoint is of a run with 2 processes, this one has 1; the results may differ")
