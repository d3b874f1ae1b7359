"""Results that tests share within a session, over its processes."""

from functools import partial

import pytest
import torch
from support import shared
from support.baselines import finetuning
from support.forks import start
from support.runs import plain_net, run, sgd

from cl_lightning.data import RandomCrop
from cl_lightning.models import MLP
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.stream import ClassIncremental


def made_in_a_process(folder):
    shared.made_once("seven", lambda: {"value": torch.tensor(7)})


def test_one_process_makes_what_all_processes_read(tmp_path, monkeypatch):
    monkeypatch.setenv(shared.FOLDER, str(tmp_path))
    process = start(made_in_a_process, str(tmp_path), **{shared.FOLDER: str(tmp_path)})
    process.join(120)
    assert process.exitcode == 0
    assert shared.made_once("seven", lambda: pytest.fail("it is made a second time")) == {"value": torch.tensor(7)}
    assert shared.made_once("eight", lambda: 8) == 8


def test_other_options_have_another_description():
    options = [
        {"backbone": plain_net},
        {"backbone": partial(MLP, hidden=(16,))},
        {"backbone": partial(MLP, hidden=(32,))},
        {"optimizer": sgd},
        {"data": {"scenario": ClassIncremental(tasks=5)}},
        {"data": {"scenario": ClassIncremental(tasks=2)}},
        {"data": {"transforms": [RandomCrop(padding=1)]}},
        {"data": {"transforms": [RandomCrop(padding=2)]}},
    ]
    assert len({shared.words(one) for one in options}) == len(options)
    assert shared.words({"a": 1, "b": ClassIncremental(tasks=2)}) == shared.words(
        {"b": ClassIncremental(tasks=2), "a": 1}
    )
    with pytest.raises(TypeError, match="has no description"):
        shared.words({"backbone": lambda shape: MLP(shape)})


def test_shared_fine_tuning_is_that_of_a_run_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv(shared.FOLDER, str(tmp_path))
    expected = run(Finetune(backbone=plain_net, optimizer=sgd), max_epochs=1).matrix.state_dict()
    for _ in range(2):
        torch.manual_seed(hash(object()) % 100)  # wherever the global generator stands
        found = finetuning({"backbone": plain_net, "optimizer": sgd}, max_epochs=1).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key].nan_to_num(-1), value.nan_to_num(-1)) for key, value in expected.items())
    assert len(list(tmp_path.glob("*.pt"))) == 1
