"""Mistakes on the command line are errors of one line, before anything is written."""

import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from support import ROOT
from support.command import ORDER, SHORT, is_one_line

from cl_lightning import report
from cl_lightning.loop import results


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--modle LwF", "unknown option '--modle'; did you mean '--model'?"),
        ("--trainer.max_epoch 2", "unknown option '--trainer.max_epoch'; did you mean '--trainer.max_epochs'?"),
        ("--max_epochs 2", "unknown option '--max_epochs'; did you mean '--trainer.max_epochs'?"),
        ("--loop.stop_after 2", "did you mean '--loop.stop_after_task'?"),
        ("extra", "unknown key or argument 'extra'"),
        ("--model.memory_sise 9", "model: ER takes no 'memory_sise'; did you mean 'memory_size'?"),
        (
            "--model.foo 3",
            "model: ER takes no 'foo'; leave it out, or use replay_by, reduction, update_memory, memory_size,",
        ),
        (
            "--data.scenario ClassIncremental --data.scenario.class_order [0,1]",
            "ClassIncremental: give tasks, increment or sizes",
        ),
        ("--model Source --model.reset domain", "model: Source sets 'reset' itself; leave it out"),
        ("--model Lwf", "model: there is no class 'Lwf'; did you mean 'LwF'?"),
        ("--model Qqqqqq", "model: there is no class 'Qqqqqq'; give an import path, or one of A"),
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
            "ClassIncremental: class_order lacks class 2 (2); it must have each of the 10 classes once",
        ),
        ("--trainer.precision 99", "trainer.precision: '99' is not allowed; give 64 or 32 or 16 or"),
        ("--config nosuch.yaml", "config: File does not exist"),
        ("--trainer.max_epochs 0", "trainer.max_epochs is 0; it is the number of epochs per task, at least 1"),
        ("--trainer.max_epochs -1", "trainer.max_epochs is -1;"),
        ("--trainer.barebones true", "trainer.barebones leaves out what the run writes; use trainer.logger false"),
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
    assert said.code == 2
    assert said.err.count("\n") == 1
    assert "task 'task 0': a step has one image" in said.err
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
        ("methods --fromat json", "methods: '--fromat json' is not known"),
        ("methods --format html", "methods: --format 'html' is not known"),
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
