"""Data sets of torchvision and of users."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.data_modules import Toy, begun, class_folder, image, loop
from torch.utils.data import Dataset

from cl_lightning.data import (
    RandomCrop,
    RandomHorizontalFlip,
    TensorSource,
)
from cl_lightning.datamodules.cifar import SplitCIFAR10, SplitCIFAR100
from cl_lightning.datamodules.dataset import UserDataset
from cl_lightning.datamodules.mnist import SplitFashionMNIST, SplitMNIST
from cl_lightning.datamodules.torchvision_data import TorchvisionData, held_out
from cl_lightning.stream import (
    ClassIncremental,
)


def idx(path: Path, array: np.ndarray) -> None:
    """A file in the format of MNIST."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    )


def mnist_files(root: Path, name: str = "MNIST", prefix: str = "", labels: int = 10, first: int = 0) -> None:
    chance = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k" if not prefix else "test", 20)):
        raw = root / name / "raw"
        idx(raw / f"{prefix}{part}-images-idx3-ubyte", chance.integers(0, 256, (count, 28, 28)))
        idx(raw / f"{prefix}{part}-labels-idx1-ubyte", first + np.arange(count) % labels)


@pytest.mark.parametrize(("data", "name"), [(SplitMNIST, "MNIST"), (SplitFashionMNIST, "FashionMNIST")])
def test_mnist_is_read_from_its_files(tmp_path, data, name):
    mnist_files(tmp_path, name)
    module = begun(data(root=str(tmp_path)))
    assert len(module.stream) == 5
    assert module.image_shape == (1, 28, 28)
    assert module.augmentation.transforms == []
    assert sum(len(batch) for batch in module.train_dataloader()) == 8
    by_name = TorchvisionData(name, root=str(tmp_path))
    assert by_name.make_stream(0).class_names == module.stream.class_names
    assert by_name.normalize.mean == module.normalize.mean
    with pytest.raises(ValueError, match=rf"TorchvisionData {name}: leave size out, .* arrays of 28 x 28"):
        TorchvisionData(name, root=str(tmp_path), size=32).make_stream(0)


def test_labels_that_begin_with_one_are_numbered_anew(tmp_path):
    mnist_files(tmp_path, "EMNIST", "emnist-letters-", labels=26, first=1)
    mnist_files(tmp_path, "EMNIST", "emnist-balanced-", labels=20)
    for split in ("byclass", "bymerge", "digits", "mnist"):
        mnist_files(tmp_path, "EMNIST", f"emnist-{split}-")
    data = TorchvisionData("EMNIST", root=str(tmp_path), options={"split": "letters"})
    assert data.dataset_info().class_names[:3] == ("a", "b", "c")
    assert data.samples(train=True).labels[:3].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"TorchvisionData EMNIST: options are \{\}, .*'split'"):
        TorchvisionData("EMNIST", root=str(tmp_path)).make_stream(0)
    with pytest.raises(ValueError, match=r"TorchvisionData EMNIST: .*'runes'"):
        TorchvisionData("EMNIST", root=str(tmp_path), options={"split": "runes"}).make_stream(0)


class FakeCIFAR:
    """As torchvision's class looks from outside."""

    def __init__(self, root: str, train: bool = True, transform: Any = None, download: bool = False) -> None:
        if root == "nowhere":
            raise RuntimeError("Dataset not found or corrupted. You can use download=True to download it")
        chance = np.random.default_rng(int(train))
        count = 200 if train else 100
        self.data = chance.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        self.targets = [index % 100 for index in range(count)]
        self.classes = [f"class {index}" for index in range(100)]

    def __len__(self) -> int:
        return len(self.targets)


def test_cifar_has_ten_tasks_its_statistics_and_its_augmentation(monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR100", FakeCIFAR)
    data = SplitCIFAR100()
    stream = data.make_stream(0)
    assert len(stream) == 10
    assert data.image_shape == (3, 32, 32)
    assert data.normalize.mean == (0.5071, 0.4865, 0.4409)
    assert [type(step) for step in data.augmentation.transforms] == [RandomCrop, RandomHorizontalFlip]
    expected = torch.from_numpy(FakeCIFAR("data").data).permute(0, 3, 1, 2)
    assert data.samples(train=True).take(torch.arange(5)).equal(expected[:5])
    monkeypatch.setattr("torchvision.datasets.CIFAR10", FakeCIFAR)
    assert SplitCIFAR10(mean=[0.5], std=[0.5]).normalize.mean == (0.5,)


def test_data_that_are_not_there_are_told_with_root_and_remedy(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"SplitMNIST: no data under nowhere \(Dataset not found.*set download: true"):
        SplitMNIST(root="nowhere").make_stream(0)
    monkeypatch.setattr("torchvision.datasets.CIFAR10", FakeCIFAR)
    with pytest.raises(ValueError, match=r"SplitCIFAR10: no data under nowhere .*check the network"):
        SplitCIFAR10(root="nowhere", download=True).prepare_data()
    with pytest.raises(ValueError, match="TorchvisionData ImageNet: download it by hand"):
        TorchvisionData("ImageNet", root=str(tmp_path), download=True).prepare_data()
    SplitMNIST(root="nowhere").prepare_data()  # without download nothing is looked for


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("cifar100", "did you mean .*CIFAR100"),
        ("Flowers", "did you mean Flowers102"),
        ("CocoDetection!", "known are CIFAR10"),
    ],
)
def test_an_unknown_data_set_is_told_with_the_nearest(name, hint):
    with pytest.raises(ValueError, match=f"'{name}', not a classification data set of torchvision; {hint}"):
        TorchvisionData(name)


def test_every_known_data_set_is_one_of_torchvision():
    from torchvision import datasets

    from cl_lightning.datamodules.torchvision_data import _SETS

    assert not [name for name in _SETS if not hasattr(datasets, name)]


def test_a_set_of_files_without_official_test_samples_holds_out_a_share(tmp_path):
    for value, name in ((10, "Forest"), (90, "River"), (180, "SeaLake")):
        class_folder(tmp_path / "eurosat" / "2750", name, 10, value)
    data = begun(TorchvisionData("EuroSAT", root=str(tmp_path), size=8, scenario=ClassIncremental(increment=1)))
    assert [len(part) for part in (*data.stream.train, *data.stream.test)] == [8, 8, 8, 2, 2, 2]
    assert data.stream.class_names == ("Forest", "River", "SeaLake")
    assert data.samples(train=True).in_memory
    assert data.image_shape == (3, 8, 8)
    other = TorchvisionData("EuroSAT", root=str(tmp_path), size=8, test_seed=1, in_memory=False, workers=1)
    other.make_stream(0)
    assert not other.samples(train=True).in_memory
    assert TorchvisionData("EuroSAT", root=str(tmp_path)).samples(train=False).image_shape == (3, 224, 224)


def test_validation_samples_of_a_set_are_joined_to_its_training_samples(tmp_path):
    base = tmp_path / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True)
    for place, name in enumerate(("banded", "dotted")):
        class_folder(base / "images", name, 6, 80 * place)
    for split, numbers in (("train", (0, 1)), ("val", (2, 3, 4)), ("test", (5,))):
        lines = [f"{name}/{number:03}.png" for name in ("banded", "dotted") for number in numbers]
        (base / "labels" / f"{split}1.txt").write_text("\n".join(lines) + "\n")
    data = TorchvisionData("DTD", root=str(tmp_path), size=6, scenario=ClassIncremental(tasks=2))
    stream = data.make_stream(0)
    assert [len(part) for part in (*stream.train, *stream.test)] == [5, 5, 1, 1]
    other = TorchvisionData("DTD", root=str(tmp_path), options={"partition": 2})
    with pytest.raises(ValueError, match=r"TorchvisionData DTD: no data under .*train2\.txt.*set download: true"):
        other.make_stream(0)


def test_the_held_out_share_is_of_every_class_and_never_all():
    labels = np.repeat([0, 1, 2, 3], [10, 5, 2, 1])
    held = held_out(labels, 0.2, 0)
    assert np.bincount(labels[held], minlength=4).tolist() == [2, 1, 1, 0]
    assert np.bincount(labels[held_out(labels, 0.99, 0)], minlength=4).tolist() == [9, 4, 1, 0]
    assert (held == held_out(labels, 0.2, 0)).all()
    assert (held != held_out(labels, 0.2, 1)).any()


# ---------------------------------------------------------------------- data sets of one's own


class Pictures(Dataset):
    def __init__(self, count: int = 12, classes: int = 3, size: int = 8) -> None:
        self.targets = [index % classes for index in range(count)]
        self.size = size

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return image(40 * self.targets[index], (self.size, self.size), index), self.targets[index]


def test_a_data_set_of_ones_own_is_learnt():
    data = UserDataset(Pictures(), Pictures(6), scenario=ClassIncremental(increment=1))
    matrix = loop(data, None, epochs=1).fit()
    assert matrix.learned == 3
    assert data.stream.class_names == ("0", "1", "2")
    assert data.samples(train=True).in_memory
    direct = UserDataset(Pictures(), Pictures(6), in_memory=False, workers=1, class_names=["x", "y", "z"])
    direct.make_stream(0)
    assert direct.fingerprint(0) != data.fingerprint(0)
    assert direct.samples(train=True).take(torch.arange(3)).equal(data.samples(train=True).take(torch.arange(3)))


def test_data_sets_that_do_not_fit_together_are_refused():
    train, test = Pictures(), Pictures()
    train.classes, test.classes = ["a", "b", "c"], ["a", "c", "b"]
    with pytest.raises(ValueError, match="the same classes in the same order"):
        UserDataset(train, test).make_stream(0)

    class Unlike(Toy):
        def source(self, *, train: bool) -> TensorSource:
            source = super().source(train=train)
            source.class_names = ("a", "b", "c", "d") if train else ("a", "c", "b", "d")
            return source

    with pytest.raises(
        ValueError, match=r"Unlike: raw labels of test samples count the classes \['a', 'c', 'b', 'd'\]"
    ):
        Unlike().make_stream(0)
    with pytest.raises(
        ValueError, match=r"UserDataset: test: label 3 .* is no class of the training samples \(0, 1, 2\)"
    ):
        UserDataset(Pictures(), Pictures(classes=4)).make_stream(0)
    with pytest.raises(ValueError, match=r"test images have shape \(3, 9, 9\), training images \(3, 8, 8\)"):
        UserDataset(Pictures(), Pictures(size=9)).make_stream(0)
    with pytest.raises(ValueError, match="UserDataset: size is 0"):
        UserDataset(train, test, size=0)
