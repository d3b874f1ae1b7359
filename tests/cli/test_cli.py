"""The command line, as a user meets it."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from support import ROOT, selection

from cl_lightning import cli, report
from cl_lightning.cli import main
from cl_lightning.loop import TaskLoop, results

METHODS = sorted((ROOT / "experiments" / "methods").rglob("*.yaml"))
ORDER = "--data.scenario ClassIncremental --data.scenario.tasks 5 --data.scenario.class_order"
SHORT = ("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--loop.stop_after_task", "1")


class Said(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Said]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys) -> Run:
    """Runs a command in an empty folder: one string, or arguments one by one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("COLUMNS", "80")

    def command(line: str, *more: str) -> Said:
        capsys.readouterr()
        code = main([*shlex.split(line), *more])
        return Said(code, *capsys.readouterr())

    return command


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Folder of a run of two tasks."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main(["fit", *SHORT, "--data.val_fraction", "0.1", "--run_dir", str(folder)]) == 0
    return folder


def config_of(said: Said) -> dict[str, Any]:
    assert said.code == 0, said.err
    return yaml.safe_load(said.out)


def is_one_line(said: Said) -> bool:
    return said.code == 2 and said.err.count("\n") == 1 and said.err.startswith("error: ")


# ------------------------------------------------------------------ fit


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


# ------------------------------------------------------------------ test, validate


def test_a_checkpoint_is_tested_without_naming_its_data(run, finished):
    said = run(f"test --ckpt_path {finished}/checkpoints/last.ckpt")
    assert said.code == 0
    assert said.err == ""
    found = json.loads((finished / "results.json").read_text())
    for task, accuracy in enumerate(found["matrix"]["R_ci"][1][:2]):
        names = ", ".join(found["tasks"][task]["classes"])
        assert re.search(rf"^{task} +{names} +71 +{100 * accuracy:.1f} ", said.out, re.MULTILINE), said.out
    assert f"average accuracy {100 * found['measures']['average_accuracy']:.1f} %" in said.out


def test_a_checkpoint_is_validated_on_what_was_held_out(run, finished):
    said = run(f"validate --ckpt_path {finished}/checkpoints/last.ckpt")
    assert said.code == 0
    assert re.fullmatch(r"val/accuracy: 0\.\d+\nval/loss: \d+\.\d+\n", said.out)
    without = run(f"validate --ckpt_path {finished}/checkpoints/last.ckpt --data.val_fraction 0")
    assert is_one_line(without)


def test_callbacks_that_change_what_is_evaluated_do_so_when_a_checkpoint_is_tested(run):
    run("fit --run_dir r --trainer.callbacks+=EMAEnsemble --trainer.max_epochs 2 --loop.stop_after_task 1")
    accuracy = json.loads(Path("r/results.json").read_text())["measures"]["average_accuracy"]
    assert f"average accuracy {100 * accuracy:.1f} %" in run("test --ckpt_path r/checkpoints/last.ckpt").out


def test_what_a_command_needs_may_stand_in_a_config(run, finished):
    shutil.copy(finished / "config.yaml", "config.yaml")
    said = run("test --config config.yaml")
    assert is_one_line(said)
    assert said.err == "error: give --ckpt_path\n"
    with open("config.yaml", "a", encoding="utf-8") as file:
        file.write(f"ckpt_path: {finished}/checkpoints/last.ckpt\n")
    assert "average accuracy" in run("test --config config.yaml").out


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--modle LwF", "unknown option '--modle'; did you mean '--model'?"),
        ("--trainer.max_epoch 2", "unknown option '--trainer.max_epoch'; did you mean '--trainer.max_epochs'?"),
        ("--max_epochs 2", "unknown option '--max_epochs'; did you mean '--trainer.max_epochs'?"),
        ("--loop.stop_after 2", "did you mean '--loop.stop_after_task'?"),
        ("extra", "unknown key or argument 'extra'"),
        ("--model.memory_sise 9", "model: ER takes no 'memory_sise'; did you mean 'memory_size'?"),
        ("--model.foo 3", "model: ER takes no 'foo'; leave it out, or use replay_by, reduction, memory_size,"),
        (
            "--data.scenario ClassIncremental --data.scenario.class_order [0,1]",
            "ClassIncremental: give tasks, increment or sizes",
        ),
        ("--model Source --model.reset domain", "model: Source sets 'reset' itself; leave it out"),
        ("--model Lwf", "model: there is no class 'Lwf'; did you mean 'LwF'?"),
        ("--model Zebra", "model: there is no class 'Zebra'; give an import path, or one of AGEM, APER, "),
        ("--model nosuch.Thing", "model: cannot import nosuch.Thing: No module named 'nosuch'"),
        ("--model torch.nn.Linear", "model: Import path"),
        ("--data Digit", "data: there is no class 'Digit'; did you mean 'Digits'?"),
        ("--model.backbone ResNet31", "model.backbone: there is no class 'ResNet31'; did you mean 'ResNet32'"),
        ("--model.optimizer SDG", "model.optimizer: there is no class 'SDG'; did you mean 'SGD'?"),
        ("--model.optimizer SGD --model.optimizer.lrs 1", "model.optimizer: SGD takes no 'lrs'; did you mean 'lr'?"),
        (
            "--trainer.callbacks+=EMAEnsembl",
            "trainer.callbacks: there is no class 'EMAEnsembl'; did you mean 'EMAEnsemble'?",
        ),
        (
            "--data.scenario ClassIncremental --data.scenario.taks 3",
            "data.scenario: ClassIncremental takes no 'taks'; did you mean 'tasks'?",
        ),
        ("--data.scenario FewShot --data.scenario.way 2", "data.scenario: FewShot needs 'base', 'shot'"),
        ("--data.batch_size many", "data.batch_size: 'many' is not allowed; give int"),
        ("--data.batch_size -3", "Digits: batch_size is -3; it must be at least 1"),
        ("--trainer.max_epochs 1.5", "trainer.max_epochs: '1.5' is not allowed; give int or null"),
        ("--model.loss_classes some", "model.loss_classes: 'some' is not allowed; give 'all' or 'current' or 'task'"),
        (
            "--data.scenario.class_order [0,1]",
            "data.scenario: '[0, 1]' is not allowed; give the name of a kind of Scenario",
        ),
        ("--trainer.precision 99", "trainer.precision: '99' is not allowed; give 64 or 32 or 16 or"),
        ("--config nosuch.yaml", "config: File does not exist"),
        ("--trainer.max_epochs 0", "trainer.max_epochs is 0; it is the number of epochs per task, at least 1"),
        ("--trainer.max_epochs -1", "trainer.max_epochs is -1;"),
        ("--trainer.fast_dev_run true", "trainer.fast_dev_run does not work with a stream"),
        ("--trainer.devices none", "trainer: `devices`"),
        ("--loop.stop_after_task 5", "loop: stop_after_task is 5; the stream has 5 tasks, so at most 4"),
        ("--loop.stop_after_task -1", "loop: stop_after_task is -1"),
        ("--loop.first_task_epochs 0", "loop: first_task_epochs is 0; it must be at least 1, or null"),
        (
            "--data.scenario ClassIncremental --data.scenario.tasks 3",
            "ClassIncremental: 10 classes do not split into 3 equal tasks; use a divisor of 10 or give sizes",
        ),
        (
            f"{ORDER} [0,1,2,3,4,5,6,7,8,8]",
            "class_order has class 8 (8) more than once",
        ),
        (
            f"{ORDER} [0,1,2,3,4,5,6,7,8]",
            "class_order lacks class 9 (9)",
        ),
        (
            "--model.backbone Timm --model.backbone.name resnet18s",
            "has no model 'resnet18s'; the closest are ['resnet18'",
        ),
        ("--model.backbone Timm", "model.backbone: it needs 'name'"),
        ("--trainer.callbacks+=DriftCompensation", "its head, LinearHead, keeps no class means; use PrototypeHead"),
        ("--trainer.strategy ddp_spawn", "trainer.strategy DDPStrategy does not keep its state"),
    ],
)
def test_an_error_is_one_line_and_comes_before_anything_is_written(run, options, message):
    said = run(f"fit {options}")
    assert is_one_line(said), said
    assert message in said.err
    assert said.out == ""
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"modle": {"class_path": "LwF"}}, "unknown key or argument 'modle.class_path'; did you mean 'model'?"),
        ({"trainer": {"max_epoch": 3}}, "'trainer.max_epoch'; did you mean 'trainer.max_epochs'?"),
        ({"trainer": {"max_epochs": "three"}}, "trainer.max_epochs: 'three' is not allowed; give int or null"),
        (
            {"model": {"class_path": "LwF", "init_args": {"distil_weight": 1}}},
            "model: LwF takes no 'distil_weight'; did you mean 'distill_weight'?",
        ),
        (
            {"trainer": {"callbacks": [{"class_path": "EMAEnsembles"}]}},
            "there is no class 'EMAEnsembles'; did you mean",
        ),
    ],
)
def test_an_error_in_a_config_is_one_line(run, content, message):
    Path("config.yaml").write_text(yaml.safe_dump(content))
    said = run("fit --config config.yaml")
    assert is_one_line(said), said
    assert message in said.err


def test_an_error_in_the_data_is_one_line_and_comes_before_anything_is_written(run):
    for name in ("cat", "dog"):
        for index in range(6):
            path = Path("photos") / name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), 30 * index, np.uint8)).save(path)
    Path("photos/dog/3.png").write_bytes(Path("photos/dog/3.png").read_bytes()[:30])
    Path("empty").mkdir()
    pixels, labels = np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 2, 9])
    names = np.array(["a", "b", "c"])
    np.savez("wrong.npz", x_train=pixels, y_train=labels, x_test=pixels, y_test=labels % 3, class_names=names)
    for options, message in (
        ("--data ImageFolder --data.root photos --data.size 8", "dog/3.png"),
        ("--data ImageFolder --data.root empty", "empty holds no folders"),
        ("--data ImageFolder --data.root nowhere", "no folder at nowhere"),
        ("--data ImageFolder", "data: ImageFolder needs 'root'"),
        ("--data NpzData --data.path wrong.npz", "label 9 of sample 3 is outside the range"),
        ("--data NpzData --data.path nowhere.npz", "nowhere.npz"),
    ):
        said = run(f"fit {options}")
        assert is_one_line(said), said
        assert message in said.err
        assert not Path("runs").exists()


class Hidden:
    """Something that only a pickle can hold."""


def test_checkpoints_that_cannot_be_trusted_or_do_not_fit_are_refused_in_one_line(run, finished):
    good = finished / "checkpoints" / "last.ckpt"
    content = torch.load(good, weights_only=True)
    torch.save({**content, "hidden": Hidden()}, "pickled.ckpt")
    torch.save({"state_dict": {}}, "foreign.ckpt")
    Path("torn.ckpt").write_bytes(good.read_bytes()[:5000])
    Path("text.ckpt").write_text("hello")
    other_data = f"{ORDER} random"
    for options, message in (
        ("fit --ckpt_path pickled.ckpt", "pickled.ckpt: refused, it holds pickled objects"),
        ("test --ckpt_path pickled.ckpt", "refused"),
        ("fit --ckpt_path torn.ckpt", "torn.ckpt: not a readable checkpoint"),
        ("fit --ckpt_path text.ckpt", "text.ckpt: not a readable checkpoint"),
        ("fit --ckpt_path foreign.ckpt", "not written by this framework"),
        ("fit --ckpt_path nosuch.ckpt", "there is no such file"),
        ("fit --ckpt_path .", "there is no such file"),
        (f"fit --ckpt_path {good} --model Finetune", "of another strategy"),
        (f"fit --ckpt_path {good} {other_data}", "another"),
        (f"fit --ckpt_path {good} --data.val_fraction 0.5", "another"),
        (f"test --ckpt_path {good} --model.backbone ResNet20", "of another network or other options"),
    ):
        said = run(options)
        assert is_one_line(said), said
        assert message in said.err, said.err
    assert not Path("runs").exists()


def test_missing_gpus_are_an_error(run, monkeypatch):
    for count, options, message in (
        (0, "--trainer.accelerator gpu", "trainer.accelerator is 'gpu', but torch finds no usable GPU"),
        (0, "--trainer.accelerator cuda --trainer.devices 2", "torch finds no usable GPU"),
        (1, "--trainer.accelerator gpu --trainer.devices 2", "trainer.devices is 2, but there are 1 GPUs here"),
        (2, "--trainer.devices [0,2]", "but there are 2 GPUs here"),
        (2, "--trainer.devices 1,2 --trainer.accelerator gpu", "but there are 2 GPUs here"),
    ):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        said = run(f"fit {options}")
        assert is_one_line(said), said
        assert message in said.err


def test_a_step_with_one_image_under_batch_normalisation_is_an_error_of_one_line(run):
    said = run("fit --model Finetune --model.backbone ResNet18 --data.batch_size 1 --run_dir r")
    assert said.code == 1
    assert said.err.count("\n") == 1
    assert said.err.startswith("error: task 'task 0': a step has one image")
    assert "give --data.drop_last true" in said.err


def test_an_error_of_python_inside_of_the_package_keeps_its_traceback(run, monkeypatch):
    def wrong(*_: Any) -> Any:
        return int("not a number")

    wrong = types.FunctionType(wrong.__code__, {"__name__": "cl_lightning.wrong", "int": int})
    monkeypatch.setattr("cl_lightning.strategies.rehearsal.er.ER.prepare_batch", wrong)
    with pytest.raises(ValueError, match="not a number"):
        run("fit", *SHORT)


@pytest.mark.parametrize("place", ["show", "write"])
def test_ctrl_c_while_the_report_is_drawn_loses_nothing_and_says_so(run, monkeypatch, place):
    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(results if place == "show" else report, place, stop)
    said = run("fit --run_dir 'r 1'", *SHORT)
    assert said.code == 130
    assert said.err == (
        "stopped; the run is complete and saved, without its report; write it with: "
        "python -m cl_lightning report 'r 1'\n"
    )
    monkeypatch.undo()


def test_ctrl_c_says_that_steps_are_lost_for_fit_alone(run, monkeypatch):
    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["cl_lightning.cli.main"], "check_required", stop)
    assert run("fit").err == "stopped; the steps since the last checkpoint are lost\n"
    assert run("test --config x.yaml") == (130, "", "stopped\n")


def test_a_bug_in_a_users_class_keeps_its_traceback(run):
    Path("buggy_method.py").write_text(
        "from cl_lightning.strategies.baselines.finetune import Finetune\n"
        "class Buggy(Finetune):\n"
        "    def losses(self, batch, output):\n"
        "        raise ValueError('shapes do not match')\n"
    )
    with pytest.raises(ValueError, match="shapes do not match"):
        run("fit --model buggy_method.Buggy")
    assert not Path("runs").exists()  # it took no step


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("fti", "unknown command 'fti'; did you mean 'fit'?"),
        ("test", "test: give --ckpt_path, a checkpoint file or 'last'"),
        ("predict --images .", "predict: give --ckpt_path"),
        ("methods --fromat json", "methods: '--fromat json' is not known; use --format table, markdown or json"),
        ("methods --format html", "methods: 'html' is not known"),
    ],
)
def test_the_error_of_an_unknown_command_is_one_line(run, line, message):
    said = run(line)
    assert is_one_line(said)
    assert message in said.err


def test_without_a_command_the_help_is_shown(run):
    assert run("").code == 2
    said = run("--help")
    assert said.code == 0
    for command in ("fit", "validate", "test", "predict", "methods"):
        assert re.search(rf"^  {command} ", said.out, re.MULTILINE)
    assert max(map(len, said.out.splitlines())) <= 90
    assert "--model" in run("fit --help").out
    assert "--model.distill_weight" in run("fit --model.help LwF").out


def test_version_and_simple_mistakes_need_no_torch():
    program = (
        "import sys\nfrom cl_lightning.cli import main\n"
        "assert main(['--version']) == 0\nassert main(['fitt']) == main(['test']) == main(['predict']) == 2\n"
        "assert main(['fit', '--ckpt_path', 'nowhere']) == 2\nassert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"cl_lightning \d+\.\d+\.\d+\n", done.stdout)


def test_most_runs_do_not_import_timm_and_wandb():
    program = "import sys, cl_lightning.cli.commands; print([m for m in ('timm', 'wandb') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


# ------------------------------------------------------------------ methods


def test_methods_are_listed_as_a_table_as_markdown_and_as_json(run):
    lines = json.loads(run("methods --format json").out)
    found = {line["name"]: line for line in lines}
    assert {"Finetune", "Joint", "LwF", "EWC", "ER", "Distillation", "EMAEnsemble", "StreamProgress"} <= found.keys()
    assert found["ER"]["family"] == "rehearsal"
    assert found["ER"]["exemplars"] is True
    assert found["Joint"]["all_data"] is True
    assert "arXiv:1606.09282" in found["LwF"]["paper"]
    table = run("methods").out
    assert max(map(len, table.splitlines())) <= 80
    markdown = run("methods --format markdown").out.splitlines()
    assert len(markdown) == 2 + len(lines)
    assert len({line.count(" | ") for line in markdown[2:]}) == 1
    for name in found:
        assert re.search(rf"^{name} ", table, re.MULTILINE)
        assert f"`{name}`" in "\n".join(markdown)


def on_digits(command: str) -> bool:
    """Whether a command runs on the digits of scikit-learn, which need no download."""
    return re.search(r"--config digits(_\w+)? ", command) is not None


def commands_of(path: Path) -> list[str]:
    """The commands in the head of a method file."""
    lines = path.read_text().splitlines()
    assert re.match(r"# \w", lines[0]), "what the method is"
    start = "#   python -m cl_lightning "
    commands = [line.removeprefix(start) for line in lines if line.startswith(start)]
    assert commands, "a command that runs it"
    assert all(f"--config {path.stem}" in command for command in commands)
    return commands


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_the_command_in_the_head_of_a_method_file_is_right(run, monkeypatch, path):
    """It is parsed, and all that it names is built, where that needs no download."""

    class BuiltError(Exception):
        pass

    def fit(loop: TaskLoop, ckpt_path: str | None = None) -> None:
        loop.strategy.build(loop.datamodule.image_shape)
        raise BuiltError

    monkeypatch.setattr(TaskLoop, "fit", fit)
    Path("experiments").symlink_to(ROOT / "experiments")
    for number, command in enumerate(commands_of(path)):
        if on_digits(command):
            with pytest.raises(BuiltError):
                run(f"{command} --run_dir run_{number}")
        else:
            config_of(run(command, "--print_config"))


@pytest.mark.rotating(1, each=lambda path: path.parent.name, of=selection.files_of_config)
@pytest.mark.parametrize(
    "path", [path for path in METHODS if any(map(on_digits, commands_of(path)))], ids=lambda path: path.stem
)
def test_the_command_in_the_head_of_a_method_file_fits_and_tests(run, path):
    """For one method of each family: one that depends on what has changed, otherwise another one each day."""
    Path("experiments").symlink_to(ROOT / "experiments")
    for number, command in enumerate(filter(on_digits, commands_of(path))):
        brief = "--trainer.limit_train_batches 1 --trainer.limit_test_batches 1 --loop.stop_after_task 0"
        said = run(f"{command} {brief} --run_dir run_{number}", "--trainer.max_epochs", "1")
        assert said.code == 0, said.err
        assert run(f"test --ckpt_path run_{number}/checkpoints/last.ckpt").code == 0


def test_the_method_files_of_a_mechanism_and_of_its_strategy_give_the_same_run(run):
    Path("experiments").symlink_to(ROOT / "experiments")
    for one, other in (("lwf", "finetune_distillation"), ("ewc", "finetune_ewc")):
        for name in (one, other):
            assert run(f"fit --config {name} --run_dir {name}", *SHORT).code == 0
        found, expected = (json.loads(Path(name, "results.json").read_text())["matrix"] for name in (one, other))
        assert found == expected


# ------------------------------------------------------------------ what is printed


def content_of(tasks: int, name: Callable[[int], str] = lambda task: f"task {task}") -> dict[str, Any]:
    row = [1.0] * tasks
    return {
        "strategy": "package.Method",
        "finished": tasks,
        "tasks": [{"name": name(task)} for task in range(tasks)],
        "matrix": {"R_ci": [row] * tasks, "R_ti": [row] * tasks},
        "measures_per_task": [{"average_accuracy": 1.0, "forgetting": 0.5}] * tasks,
        "measures": {"average_accuracy": 1.0, "average_incremental_accuracy": 1.0, "forgetting": 0.5},
        "cost": {
            "seconds": [{"training": 1000.0, "statistics": 1.0, "evaluation": 1.0}] * tasks,
            "bytes_kept": {"exemplars": 3 * 2**20},
        },
    }


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("tasks", [1, 2, 5, 10, 20, 100])
def test_the_table_of_results_fits_the_terminal(tasks, width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    results.show(content_of(tasks))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    rows = [line for line in lines if re.match(r"\d+ ", line)]
    assert len(rows) == tasks  # none is broken
    for row in rows:
        assert "…" not in row
        assert row.rstrip().endswith("16.7 min")


def test_tasks_are_named_where_their_names_say_more_than_their_number(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    results.show(content_of(3, name=lambda task: f"rotated by {30 * task} degrees"))
    out = capsys.readouterr().out
    assert "0 rotated by 0 …" in out
    assert max(map(len, out.splitlines())) <= 80


def test_the_value_of_an_option_is_the_last_one_given():
    arguments = ["fit", "--run_dir", "a", "--images=b", "--run_dir=c"]
    assert cli.value_of(arguments, "--run_dir") == "c"
    assert cli.value_of(arguments, "--images") == "b"
    assert cli.value_of(arguments, "--output") is None
    assert cli.without(arguments, "--run_dir") == ["fit", "--images=b"]


def test_a_message_that_is_not_understood_is_one_line_and_complete():
    from cl_lightning.cli.parsing import explain

    assert explain("first line\nsecond line") == "first line second line"
    assert explain("word\n" * 1000) == " ".join(["word"] * 1000)


def test_what_to_do_stands_before_a_list_of_names_and_no_name_is_cut(run):
    for options, start, names in (
        ("--model Zebra", "model: there is no class 'Zebra'; give an import path, or one of", ("APER", "LwF", "WA")),
        (
            "--model.foo 3",
            "model: ER takes no 'foo'; leave it out, or use",
            ("memory_size", "freeze_norm", "optimizer"),
        ),
        ("--model.optimizer Qqqq", "model.optimizer: there is no class 'Qqqq'; give an import path", ("SGD", "Adam")),
    ):
        said = run(f"fit {options}")
        assert is_one_line(said)
        assert said.err.startswith(f"error: {start}")
        assert not said.err.endswith("...\n")
        listed = said.err.removeprefix(f"error: {start}")
        assert all(name in listed for name in names), said.err


# ------------------------------------------------------------------ configs by name


def test_a_config_is_found_by_its_name_where_that_is_unique(run):
    Path("experiments/methods/a/published").mkdir(parents=True)
    Path("experiments/methods/a/mine.yaml").write_text("model: LwF\n")
    assert config_of(run("fit --config mine", "--print_config"))["model"]["class_path"].endswith(".LwF")
    assert config_of(run("fit --config=mine", "--print_config"))["model"]["class_path"].endswith(".LwF")
    said = run("fit --config mien")
    assert (said.code, said.err) == (
        2,
        "error: --config mien: no file of this name under experiments; did you mean 'mine'?\n",
    )
    Path("experiments/methods/a/published/mine.yaml").write_text("model: ER\n")
    said = run("fit --config mine")
    assert said.code == 2
    assert "several files have this name; give the path of one: experiments/methods/a/mine.yaml, " in said.err
    Path("mine").write_text("model: EWC\n")  # a file of that very name comes first
    assert config_of(run("fit --config mine", "--print_config"))["model"]["class_path"].endswith(".EWC")


def test_a_config_name_without_a_folder_of_experiments_is_an_error(run):
    said = run("fit --config er")
    assert (said.code, said.err) == (
        2,
        "error: --config er: there is no such file, and no folder 'experiments' here; give the path of a file\n",
    )


def test_names_of_the_configs_of_the_project_are_unique():
    stems = [path.stem for path in (ROOT / "experiments").rglob("*.yaml")]
    assert len(stems) == len(set(stems))
