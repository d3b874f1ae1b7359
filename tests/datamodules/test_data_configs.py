"""Configurations of data."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from support.data_modules import EXPERIMENTS, Toy, arrays

from cl_lightning.cli import main
from cl_lightning.datamodules.base import ContinualDataModule
from cl_lightning.datamodules.digits import Digits


def parsed(arguments: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_of_data_is_accepted_with_the_command_that_it_names(path, monkeypatch):
    monkeypatch.chdir(EXPERIMENTS.parents[1])
    text = path.read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line and line[0] not in "# "] == ["data:"]
    comment = re.sub(r"\\\n#", "", text)
    command = re.search(r"^#   python -m cl_lightning (fit .*)$", comment, re.MULTILINE)
    assert command is not None
    assert f"--config {path.stem} " in command[1]
    code, out, err = parsed([*shlex.split(command[1]), "--print_config"])
    assert (code, err) == (0, "")
    assert "class_path: cl_lightning.datamodules." in out


def test_a_configuration_with_a_mistake_is_not_accepted(tmp_path):
    text = (EXPERIMENTS / "fashion_mnist_npz.yaml").read_text(encoding="utf-8")
    (tmp_path / "bad.yaml").write_text(text.replace("batch_size", "bach_size"), encoding="utf-8")
    code, _, err = parsed(["fit", "--config", str(tmp_path / "bad.yaml"), "--print_config"])
    assert code != 0
    assert "batch_size" in err


def test_a_folder_is_found_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("CL_LIGHTNING_DATA", str(tmp_path))
    _, out, _ = parsed(["fit", "--config", str(EXPERIMENTS / "fashion_mnist_npz.yaml"), "--print_config"])
    assert f"path: {tmp_path}/fashion_mnist.npz" in out


def test_transforms_and_statistics_come_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("data.npz", **arrays())
    (tmp_path / "data.yaml").write_text(
        """
data:
  class_path: NpzData
  init_args:
    path: data.npz
    mean: [0.1, 0.2, 0.3]
    std: [0.5, 0.5, 0.5]
    resize: 7
    transforms:
      - {class_path: RandomCrop, init_args: {padding: 1}}
      - {class_path: cl_lightning.data.RandomHorizontalFlip, init_args: {p: 0.25}}
    scenario: {class_path: ClassIncremental, init_args: {tasks: 2}}
""",
        encoding="utf-8",
    )
    seen: list[ContinualDataModule] = []
    make_stream = ContinualDataModule.make_stream
    monkeypatch.setattr(
        ContinualDataModule, "make_stream", lambda self, *a: (seen.append(self), make_stream(self, *a))[1]
    )
    code, _, err = parsed(["fit", "--config", "data.yaml", "--model", "Finetune", "--trainer.max_epochs", "1"])
    assert (code, err.count("error")) == (0, 0)
    data = seen[0]
    assert data.normalize.mean == (0.1, 0.2, 0.3)
    crop, flip = data.augmentation.transforms
    assert (crop.padding, flip.p, data.image_shape) == (1, 0.25, (3, 7, 7))


def test_a_mistake_in_the_data_is_one_line_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = parsed(["fit", "--data", "ImageFolder", "--data.root", "nowhere", "--model", "Finetune"])
    assert code == 2
    assert err.strip().splitlines()[-1].startswith("error: ImageFolder: no folder at nowhere")
    assert not list(Path("runs").rglob("*")) if Path("runs").exists() else True


def test_the_digits_of_scikit_learn_need_no_file():
    data = Digits()
    stream = data.make_stream(0)
    assert (len(stream), sum(map(len, stream.train)), sum(map(len, stream.test))) == (5, 1442, 355)
    everything = torch.cat([data.samples(train=part).images for part in (True,)]).double() / 255
    assert float(everything.mean()) == pytest.approx(data.normalize.mean[0], abs=0.01)
    assert float(everything.std()) == pytest.approx(data.normalize.std[0], abs=0.01)


def test_batches_of_larger_images_are_smaller_where_no_gradient_is_taken() -> None:
    data = Toy()
    assert [data.eval_batch_size_for(shape) for shape in ((1, 8, 8), (3, 32, 32), (3, 96, 96), (3, 224, 224))] == [
        512,
        512,
        56,
        32,
    ]
    assert Toy(eval_batch_size=70).eval_batch_size_for((3, 96, 96)) == 70
