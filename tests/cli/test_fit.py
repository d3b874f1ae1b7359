"""Fit: folders, configurations, resuming and stopping, as a user meets them."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support import ROOT
from support.command import SHORT, config_of, is_one_line


@pytest.mark.parametrize("width", [80, 120])
def test_fit_without_options_is_the_quickstart_and_says_nothing_but_its_results(run, monkeypatch, recwarn, width):
    monkeypatch.setenv("COLUMNS", str(width))
    said = run("fit")
    assert said.code == 0
    assert said.err == ""
    # Python shows deprecations to the developers of what is deprecated, not to users.
    assert [str(w.message) for w in recwarn if not issubclass(w.category, DeprecationWarning)] == []
    assert max(map(len, said.out.splitlines())) <= width
    assert re.search(r"^4 ( +\d+\.\d){8} +\d+\.\d s$", said.out, re.MULTILINE), said.out  # the last row, unbroken
    assert said.out.splitlines()[-1] == "results, checkpoints and logs are in runs/ER/0000"
    found = json.loads(Path("runs/ER/0000/results.json").read_text())
    assert found["finished"] == 5
    assert found["measures"]["average_accuracy"] > 0.85


def test_each_fit_has_a_folder_of_its_own(run):
    for number in range(2):
        assert run("fit", *SHORT).out.splitlines()[-1].endswith(f"runs/ER/000{number}")
    run("fit --model Finetune", *SHORT)
    assert sorted(str(path) for path in Path("runs").glob("*/*")) == [
        "runs/ER/0000",
        "runs/ER/0001",
        "runs/Finetune/0000",
    ]


def test_a_folder_that_another_run_takes_meanwhile_is_not_shared(run, monkeypatch):
    from cl_lightning.cli.commands import ContinualCLI

    check = ContinualCLI.configuration

    def meanwhile(self: Any) -> str:
        Path("runs/ER/0000").mkdir(parents=True)
        return check(self)

    monkeypatch.setattr(ContinualCLI, "configuration", meanwhile)
    assert run("fit", *SHORT).out.splitlines()[-1].endswith("runs/ER/0001")


def test_null_takes_away_an_option_of_a_class_in_a_class(run):
    scenario = "--data.scenario ClassIncremental --data.scenario.tasks 5 --data.scenario.sizes [4,3,3]"
    found = config_of(run(f"fit {scenario} --data.scenario.tasks null --print_config"))["data"]["init_args"]["scenario"]
    assert found["init_args"]["tasks"] is None
    assert found["init_args"]["sizes"] == [4, 3, 3]


def test_classes_go_by_their_names(run):
    config = config_of(
        run(
            "fit --model LwF --model.distill_weight 2 --data Digits --data.scenario ClassIncremental "
            "--data.scenario.tasks 5 --model.backbone ResNet32 --model.head CosineHead --model.optimizer SGD "
            "--model.optimizer.lr 0.1 --model.scheduler CosineOverPhase --trainer.callbacks+=EMAEnsemble "
            "--trainer.callbacks.momentum 0.9 --trainer.callbacks+=TeacherAdaptation --print_config"
        )
    )
    model, data = config["model"], config["data"]
    assert model["class_path"] == "cl_lightning.strategies.exemplar_free.lwf.LwF"
    assert model["init_args"]["distill_weight"] == 2
    assert model["init_args"]["backbone"]["class_path"] == "cl_lightning.models.ResNet32"
    assert model["init_args"]["head"]["class_path"] == "cl_lightning.models.CosineHead"
    assert model["init_args"]["optimizer"]["class_path"] == "torch.optim.SGD"
    assert model["init_args"]["optimizer"]["init_args"]["lr"] == 0.1
    assert model["init_args"]["scheduler"]["class_path"] == "cl_lightning.strategies.base.schedules.CosineOverPhase"
    assert data["init_args"]["scenario"]["init_args"]["tasks"] == 5
    first, second = config["trainer"]["callbacks"]
    assert first["class_path"].endswith(".EMAEnsemble")
    assert first["init_args"]["momentum"] == 0.9
    assert second["class_path"].endswith(".TeacherAdaptation")
    policy = config_of(run("fit --model.policy ClassBalanced --print_config"))["model"]["init_args"]["policy"]
    assert policy["class_path"] == "cl_lightning.memory.ClassBalanced"


def test_the_defaults_of_the_quickstart_leave_no_trace_in_other_classes(run, recwarn):
    model = config_of(run("fit --model LwF --print_config"))["model"]["init_args"]
    assert model["loss_classes"] == "current"  # of LwF; that of ER is "all"
    data = config_of(run("fit --data ImageFolder --data.root photos --print_config"))["data"]["init_args"]
    assert data["batch_size"] == 128  # of the base; that of Digits is 32
    Path("method.yaml").write_text("model: {class_path: LwF, init_args: {distill_weight: 3}}\n")
    model = config_of(run("fit --config method.yaml --print_config"))["model"]["init_args"]
    assert (model["loss_classes"], model["distill_weight"]) == ("current", 3)
    assert [str(w.message) for w in recwarn if not issubclass(w.category, DeprecationWarning)] == []


def test_a_printed_configuration_is_a_config(run):
    Path("config.yaml").write_text(run("fit --model LwF --print_config").out)
    said = run("fit --config config.yaml --run_dir r", *SHORT)
    assert said.code == 0, said.err
    assert json.loads(Path("r/results.json").read_text())["strategy"].endswith(".LwF")


def test_a_class_of_the_working_directory_goes_by_its_path(run):
    Path("my_method_here.py").write_text(
        "from typing import Any\n"
        "from cl_lightning.strategies.baselines.finetune import Finetune\n"
        "class MyMethod(Finetune):\n"
        "    def __init__(self, *, strength: float = 1.0, **kwargs: Any) -> None:\n"
        "        super().__init__(**kwargs)\n"
        "        self.strength = strength\n"
    )
    said = run("fit --model my_method_here.MyMethod --model.strength 2 --run_dir r", *SHORT)
    assert said.code == 0
    assert said.out.startswith("task 1/2")
    assert json.loads(Path("r/results.json").read_text())["strategy"] == "my_method_here.MyMethod"
    assert run("test --ckpt_path r/checkpoints/last.ckpt --trust_checkpoint").code == 0
    wrong = run("fit --model my_method_here.MyMethod --model.strenght 2")
    assert wrong.err == "error: model: MyMethod takes no 'strenght'; did you mean 'strength'?\n"


def test_configs_merge_and_refer_to_one_another(run):
    Path("data.yaml").write_text(
        "data: {class_path: Digits, init_args: {batch_size: 64, eval_batch_size: '${data.init_args.batch_size}'}}\n"
        "trainer: {max_epochs: 3}\n"
    )
    Path("method.yaml").write_text(
        "model: {class_path: ER, init_args: {replay_size: '${data.init_args.batch_size}'}}\ntrainer: {max_epochs: 2}\n"
    )
    config = config_of(run("fit --config data.yaml --config method.yaml --data.batch_size 16 --print_config"))
    assert config["data"]["init_args"]["batch_size"] == 16
    assert config["data"]["init_args"]["eval_batch_size"] == 16
    assert config["model"]["init_args"]["replay_size"] == 16
    assert config["trainer"]["max_epochs"] == 2


def test_the_saved_configuration_gives_the_same_run(run):
    options = (
        "--model.optimizer Adam --model.optimizer.lr 0.003 --loop.keep_tasks null --trainer.callbacks+=EMAEnsemble"
    )
    assert run(f"fit --run_dir a {options}", *SHORT).code == 0
    assert run("fit --config a/config.yaml --run_dir b").code == 0
    assert Path("a/config.yaml").read_text() == Path("b/config.yaml").read_text()
    assert yaml.safe_load(Path("b/config.yaml").read_text())["loop"]["keep_tasks"] is None
    assert_same_run(Path("a"), Path("b"))


def test_a_callback_whose_default_is_a_member_of_an_enumeration_is_saved_as_text(run):
    timer = "fit --trainer.callbacks+=lightning.pytorch.callbacks.Timer --trainer.callbacks.duration 00:01:00:00"
    printed = run(f"{timer} --print_config")
    assert printed.code in (0, None)
    assert yaml.safe_load(printed.out)["trainer"]["callbacks"][0]["init_args"]["interval"] == "step"
    assert run(f"{timer} --run_dir a", *SHORT).code == 0
    assert run("fit --config a/config.yaml --run_dir b").code == 0
    assert Path("a/config.yaml").read_text() == Path("b/config.yaml").read_text()


def assert_same_run(one: Path, other: Path) -> None:
    found, expected = (json.loads((folder / "results.json").read_text()) for folder in (one, other))
    assert found["matrix"] == expected["matrix"]
    mine, its = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for folder in (one, other)
    )
    assert mine.keys() == its.keys()
    for name, value in mine.items():
        assert torch.equal(value, its[name]), name


def test_a_run_is_resumed_from_its_last_checkpoint_with_the_configuration_in_it(run):
    options = "--model.memory_size 30 --trainer.max_epochs 1"
    assert run(f"fit {options} --run_dir whole").code == 0
    assert run(f"fit {options} --loop.stop_after_task 2").code == 0
    said = run("fit --ckpt_path last")
    assert said.code == 0
    assert said.err == "checkpoint: runs/ER/0000/checkpoints/last.ckpt\n"
    assert "task 4/5" in said.out
    assert "task 3/5" not in said.out
    assert said.out.splitlines()[-1].endswith("runs/ER/0000")
    assert_same_run(Path("runs/ER/0000"), Path("whole"))


def test_the_last_checkpoint_is_that_of_the_newest_run_or_of_the_folder_given(run):
    said = run("fit --ckpt_path last")
    assert is_one_line(said)
    assert "no checkpoint under runs" in said.err
    assert "no checkpoint under nowhere" in run("test --ckpt_path last --run_dir nowhere").err
    run("fit", *SHORT)
    run("fit --model Finetune", *SHORT)
    assert "runs/Finetune/0000" in run("test --ckpt_path last").err
    assert "runs/ER/0000" in run("test --ckpt_path last --run_dir runs/ER/0000").err


def test_a_folder_that_holds_a_run_is_not_overwritten(run, finished):
    said = run(f"fit --run_dir {finished}", *SHORT)
    assert is_one_line(said)
    assert "holds a run already; add --ckpt_path last" in said.err


# ------------------------------------------------------------------ stopping


@pytest.mark.slow
def test_a_stopped_run_prints_how_to_resume_and_then_ends_as_an_uninterrupted_one(run):
    options = "--trainer.max_epochs 20 --data.batch_size 16 --loop.stop_after_task 2"
    program = [sys.executable, "-u", "-m", "cl_lightning", "fit", *options.split()]
    process = subprocess.Popen(
        program,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**_environment(), "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("task 1/3")  # the second one is being learnt
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err == "stopped; resume with: python -m cl_lightning fit --ckpt_path runs/ER/0000/checkpoints/last.ckpt\n"
    assert "task 3/3" not in out
    assert json.loads(Path("runs/ER/0000/results.json").read_text())["finished"] < 3
    assert run(err.split("cl_lightning ")[1]).code == 0
    assert run(f"fit --run_dir whole {options}").code == 0
    assert_same_run(Path("runs/ER/0000"), Path("whole"))


def _environment() -> dict[str, str]:
    import os

    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
