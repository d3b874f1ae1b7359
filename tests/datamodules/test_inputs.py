"""Data modules with samples that are no images, and what has to fit them."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.samples import OtherDigits
from torch.utils.data import TensorDataset

from cl_lightning import cli
from cl_lightning.data import RandomCrop, RandomHorizontalFlip, ToFloat
from cl_lightning.data.standardize import Standardize, Unchanged
from cl_lightning.datamodules.dataset import UserDataset
from cl_lightning.datamodules.npz import NpzData
from cl_lightning.models import ConvNet1d, TableResNet
from cl_lightning.strategies.rehearsal.derpp import DERpp
from cl_lightning.strategies.rehearsal.er import ER
from cl_lightning.strategies.rehearsal.icarl import ICaRL
from cl_lightning.testing import check_strategy

LABELS = np.arange(40) % 4
VALUES: dict[str, Any] = {
    "vector": np.random.default_rng(0).normal(50, 10, (40, 6)),
    "sequence": np.random.default_rng(0).normal(50, 10, (40, 2, 6)).astype(np.float32),
    "image": np.random.default_rng(0).normal(50, 10, (40, 6, 9)).astype(np.float32),
    "tokens": np.random.default_rng(0).integers(0, 20, (40, 6)),
}


def npz(folder, values: Any, **options: Any) -> NpzData:
    path = folder / "data.npz"
    np.savez(path, x_train=values, y_train=LABELS, x_test=values[:8], y_test=LABELS[:8])
    return NpzData(str(path), **options)


def user(folder, values: Any, **options: Any) -> UserDataset:
    parts = (TensorDataset(torch.as_tensor(values[:n]), torch.as_tensor(LABELS[:n])) for n in (40, 8))
    return UserDataset(*parts, **options)


@pytest.mark.parametrize("module", [npz, user])
@pytest.mark.parametrize("kind", VALUES)
def test_samples_of_each_kind_reach_the_network_standardised_by_the_first_task(tmp_path, module, kind):
    values = VALUES[kind]
    data = module(tmp_path, values, **({} if kind == "vector" else {"inputs": kind}))
    data.make_stream(0)
    assert data.input_kind == kind
    first = data.stream.train[0]
    loader = data.evaluation_loader("test", [0, 1, 2, 3])
    found = data.finish(next(iter(loader)), augment=False).images
    rows = torch.as_tensor(values[:8])[loader.plan.indices]
    if kind == "tokens":
        assert isinstance(data.normalize, Unchanged)
        assert torch.equal(found, rows)
        return
    known = torch.as_tensor(values[first]).double()
    known = known.unsqueeze(1) if kind == "image" else known
    per = known.transpose(0, 1).flatten(1)
    shape = (-1, *[1] * (known.dim() - 2))
    mean, std = per.mean(1).view(shape), per.std(1, correction=0).view(shape)
    assert isinstance(data.normalize, Standardize)
    expected = (rows.double().view(8, *known.shape[1:]) - mean) / std
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("module", [npz, user])
def test_what_has_several_readings_asks_for_inputs(tmp_path, module):
    for kind in ("sequence", "image", "tokens"):
        with pytest.raises(ValueError, match=r"data\.inputs"):
            module(tmp_path, VALUES[kind]).make_stream(0)
    with pytest.raises(ValueError, match="inputs is 'table'; use 'image', 'vector', 'sequence' or 'tokens'"):
        module(tmp_path, VALUES["vector"], inputs="table")


def test_pixels_stay_pixels_when_images_are_asked_for(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 6, 6), dtype=np.uint8)
    for module in (npz, user):
        data = module(tmp_path, pixels, inputs="image")
        data.make_stream(0)
        assert data.samples(train=True).take(torch.tensor([0])).dtype == torch.uint8


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("vector", {"transforms": [RandomHorizontalFlip()]}, "RandomHorizontalFlip is for images, and a sample is of"),
        ("image", {"transforms": [RandomCrop(), ToFloat()]}, ""),
        ("vector", {"resize": 8}, "resize is for images, and a sample is a vector; remove resize"),
        (
            "vector",
            {"mean": [0.0] * 5, "std": [1.0] * 5},
            "mean has 5 numbers, samples have 64 features; give one per f",
        ),
        ("sequence", {"mean": [0.0] * 5, "std": [1.0] * 5}, "mean has 5 numbers, samples have 8 channels"),
    ],
)
def test_processing_that_is_not_made_for_the_samples_is_refused(kind, options, message):
    data = OtherDigits(kind, **options)
    if not message:
        data.make_stream(0)
        return
    with pytest.raises(ValueError, match=message):
        data.make_stream(0)


def test_colours_need_pixels_of_8_bits():
    from cl_lightning.data import ColorJitter

    with pytest.raises(ValueError, match="ColorJitter is for pixels of 8 bits, and images are floating point; remove"):
        OtherDigits("image", transforms=[ColorJitter(0.1)]).make_stream(0)


def fit(tmp_path, values: Any, *options: str) -> int:
    npz(tmp_path, values)
    fixed = ("--data.batch_size", "8", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu")
    path, run = str(tmp_path / "data.npz"), str(tmp_path / "run")
    return cli.main(["fit", "--data", "NpzData", "--data.path", path, *fixed, *options, "--run_dir", run])


def test_predictions_of_files_are_for_images(tmp_path, capsys):
    assert fit(tmp_path, VALUES["vector"], "--model", "ER", "--model.backbone", "MLP") == 0
    checkpoint = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    options = ["--images", str(tmp_path / "a.png"), "--output", str(tmp_path / "p.csv"), "--trainer.accelerator", "cpu"]
    assert cli.main(["predict", "--ckpt_path", checkpoint, *options]) == 2
    assert "it classifies images, and the run learnt samples of shape (6,)" in capsys.readouterr().err


def test_methods_and_backbones_for_images_say_so_before_training(tmp_path, capsys):
    assert fit(tmp_path, VALUES["vector"], "--model", "PASS", "--model.backbone", "MLP") == 2
    assert "PASS takes inputs of the kind image, NpzData gives vector" in capsys.readouterr().err
    assert fit(tmp_path, VALUES["vector"], "--model", "ER", "--model.backbone", "ResNet20") == 2
    assert "image_shape (6,); it takes samples (channels, height, width)" in capsys.readouterr().err
    tokens = ("--model", "ER", "--data.inputs", "tokens", "--model.backbone", "ConvNet1d")
    assert fit(tmp_path, VALUES["tokens"], *tokens, "--model.backbone.vocabulary", "19") == 2
    assert "vocabulary is 19, and the training samples have the token 19; give a vocabulary of at least 20" in (
        capsys.readouterr().err
    )


TABLE = partial(TableResNet, width=16, blocks=1)
CONV = partial(ConvNet1d, channels=(8, 8), kernel=3)


@pytest.mark.parametrize(
    ("factory", "kind", "backbone"),
    [
        (partial(ER, memory_size=30), "vector", TABLE),
        (partial(DERpp, memory_size=30), "tokens", partial(CONV, vocabulary=17)),
        (partial(ICaRL, memory_size=30), "sequence", CONV),
    ],
)
def test_the_suite_holds_for_other_samples(factory, kind, backbone):
    check_strategy(
        partial(factory, backbone=backbone, optimizer=partial(torch.optim.SGD, lr=0.05)),
        data=partial(OtherDigits, kind),
        name=f"{factory.func.__name__} on {kind}",
        checks=("trains", "resume", "restores", "options", "data", "bytes"),
        first_task_is_finetuning=False,
    )
