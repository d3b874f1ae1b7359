"""Data sets that are read once and shared."""

import numpy as np
import pytest
import torch

from cl_lightning.data.shared import sharing_sources
from cl_lightning.datamodules.folder import ImageFolder
from cl_lightning.datamodules.npz import NpzData


@pytest.fixture
def file(tmp_path):
    arrays = {f"{kind}_{part}": np.arange(20) % 4 for part in ("train", "test") for kind in ("y",)}
    arrays |= {f"x_{part}": np.zeros((20, 8, 8), np.uint8) for part in ("train", "test")}
    np.savez(tmp_path / "a.npz", **arrays)
    return str(tmp_path / "a.npz")


def test_equal_options_of_the_data_share_a_source_and_others_do_not(file):
    with sharing_sources():
        first = NpzData(path=file, batch_size=4).samples(train=True)
        assert NpzData(path=file, batch_size=8, seed=5, val_fraction=0.5).samples(train=True) is first
        assert NpzData(path=file).samples(train=False) is not first
        assert NpzData(path=file, inputs="image").samples(train=True) is not first
    assert NpzData(path=file, batch_size=4).samples(train=True) is not first


def test_decoded_files_are_shared(tmp_path):
    from PIL import Image

    for name in "ab":
        for index in range(4):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("L", (8, 8), color=index).save(tmp_path / name / f"{index}.png")
    with sharing_sources():
        modules = [ImageFolder(root=str(tmp_path), in_memory=True, seed=seed) for seed in (0, 1)]
        first, second = (module.samples(train=True) for module in modules)
        assert first.in_memory
        assert first is second
    again = ImageFolder(root=str(tmp_path), in_memory=True).samples(train=True)
    assert again is not first
    rows = torch.arange(len(first.labels))
    assert torch.equal(again.take(rows), first.take(rows))
