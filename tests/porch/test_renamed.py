"""Names of earlier releases, in saved files and on the command line, lead to what they are called today."""

import itertools
import json

import pytest
import torch
import yaml

from cl_lightning import renamed
from cl_lightning.cli import main
from cl_lightning.cli.arguments import complete


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("cl_lightning.backbones.ResNet32", "cl_lightning.models.ResNet32"),
        ("cl_lightning.heads.PrototypeHead", "cl_lightning.memory.PrototypeHead"),
        ("cl_lightning.memory.Herding", "cl_lightning.memory.HerdingPolicy"),
        ("cl_lightning.transforms.RandomCrop", "cl_lightning.data.RandomCrop"),
        ("cl_lightning.schedules.CosineOverPhase", "cl_lightning.strategies.base.schedules.CosineOverPhase"),
        (
            "cl_lightning.strategies.exemplar_free.prototype_augmentation.PASS",
            "cl_lightning.strategies.exemplar_free.pass_.PASS",
        ),
        ("cl_lightning.strategies.rehearsal.er.ER", "cl_lightning.strategies.rehearsal.er.ER"),
        ("torch.optim.SGD", "torch.optim.SGD"),
        ("mine.backbones.ResNet32", "mine.backbones.ResNet32"),
    ],
)
def test_a_class_is_found_under_its_earlier_path(old, new):
    assert renamed.class_path(old) == new


def test_every_new_path_of_a_class_can_be_imported():
    import importlib

    for new in renamed.CLASSES.values():
        module, _, name = f"cl_lightning.{new}".rpartition(".")
        assert hasattr(importlib.import_module(module), name), new


def test_a_configuration_gets_the_names_of_today_and_says_which_changed():
    told = []
    content = {
        "model": {
            "class_path": "cl_lightning.strategies.rehearsal.er.ER",
            "init_args": {"mix": "loader", "visible": "all", "backbone": {"class_path": "cl_lightning.backbones.MLP"}},
        },
        "data": {"class_path": "Digits", "init_args": {"mix": 1}},
    }
    changed = renamed.config(content, told.append)
    assert changed["model"]["init_args"] == {
        "replay_by": "loader",
        "loss_classes": "all",
        "backbone": {"class_path": "cl_lightning.models.MLP"},
    }
    assert changed["data"] == content["data"]  # another class has an option of this name
    assert len(told) == 3
    assert renamed.config(changed) == changed


def test_options_of_another_strategy_keep_their_names():
    content = {"model": {"class_path": "mine.Mine", "init_args": {"mix": 1, "feed": 2}}}
    assert renamed.config(content) == content


def test_options_and_configs_of_the_command_line_get_the_names_of_today(tmp_path, capsys):
    path = tmp_path / "old.yaml"
    path.write_text(yaml.safe_dump({"model": {"class_path": "ER", "init_args": {"mix": "loader"}}}))
    arguments, _ = complete(["fit", "--config", str(path), "--model.visible", "task", "--data", "Digits"])
    (config,) = [value for option, value in itertools.pairwise(arguments) if option == "--config"]
    assert json.loads(config) == {"model": {"class_path": "ER", "init_args": {"replay_by": "loader"}}}
    assert arguments[arguments.index("--model.loss_classes") + 1] == "task"
    said = capsys.readouterr().err
    assert "option 'mix' of the strategy is now called 'replay_by'" in said
    assert "option 'visible' of the strategy is now called 'loss_classes'" in said


def test_a_run_takes_an_option_under_its_earlier_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--model", "ER", "--model.mix", "loader", "--print_config"]) == 0
    out, err = capsys.readouterr()
    assert yaml.safe_load(out)["model"]["init_args"]["replay_by"] == "loader"
    assert err.count("note:") == 1


def test_keys_of_a_state_dict_get_the_names_of_today():
    state = {"network.head.session.blocks.0.weight": torch.ones(1), "turned_head.blocks.0.weight": torch.ones(1)}
    assert list(renamed.state_dict(state)) == [
        "network.head.temporary.blocks.0.weight",
        "rotation_head.blocks.0.weight",
    ]
    assert renamed.state_dict({"memory.images": 1}) == {"memory.images": 1}


def test_a_configuration_of_many_aliases_is_looked_at_once_and_one_that_contains_itself_stays():
    content = "cl_lightning.backbones.MLP"
    shared: object = [content]
    for _ in range(60):  # 2 ** 60 strings, if each place were looked at
        shared = [shared, shared]
    told: list[str] = []
    changed = renamed.config({"a": shared}, told.append)
    assert len(told) == 1
    while isinstance(changed, (dict, list)):
        changed = changed["a"] if isinstance(changed, dict) else changed[-1]
    assert changed == "cl_lightning.models.MLP"
    loop: dict[str, object] = {}
    loop["a"] = loop
    assert renamed.config(loop) is loop
    plain = {"model": {"class_path": "ER", "init_args": {"replay_by": "step"}}}
    assert renamed.config(plain) is plain
