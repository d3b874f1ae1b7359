"""Data from .npz files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.data_modules import arrays

from cl_lightning.datamodules.mnist import SplitFashionMNIST
from cl_lightning.datamodules.npz import NpzData
from cl_lightning.stream import (
    ClassIncremental,
)


def test_arrays_are_read(tmp_path):
    np.savez_compressed(tmp_path / "data.npz", **arrays())
    data = NpzData(str(tmp_path / "data.npz"), scenario=ClassIncremental(tasks=2))
    stream = data.make_stream(0)
    assert stream.class_names == ("a", "b", "\u00fc", "d")
    assert data.image_shape == (3, 5, 5)
    assert len(data.normalize.mean) == 3
    assert data.augmentation.transforms == []
    expected = torch.from_numpy(arrays()["x_train"]).permute(0, 3, 1, 2)
    assert data.samples(train=True).take(torch.tensor([3, 1])).equal(expected[[3, 1]])


def test_other_labels_of_a_file_can_be_learnt(tmp_path):
    np.savez(tmp_path / "data.npz", **arrays())
    coarse = NpzData(str(tmp_path / "data.npz"), labels="yc", domains="y")
    assert coarse.dataset_info().class_names == ("left", "right")
    assert coarse.dataset_info().domain_names == ("y 0", "y 1", "y 2", "y 3")
    assert NpzData(str(tmp_path / "data.npz"), labels="yc", names="class_names").dataset_info().num_classes == 4
    np.savez(tmp_path / "plain.npz", **arrays(class_names=None))
    assert NpzData(str(tmp_path / "plain.npz")).samples(train=True).class_names == ("0", "1", "2", "3")


@pytest.mark.parametrize("keys", [("{}_images", "{}_labels"), ("x_{}", "y_{}"), ("X_{}", "y_{}"), ("{}_x", "{}_y")])
def test_validation_samples_of_a_file_are_training_samples(tmp_path, keys):
    images, labels = keys
    content = {}
    for part, count, value in (("train", 6, 1), ("val", 3, 2), ("test", 4, 3)):
        content[images.format(part)] = np.full((count, 4, 4), value, np.uint8)
        content[labels.format(part)] = np.arange(count)[:, None] % 3 + 5  # columns, as MedMNIST has them
    np.savez(tmp_path / "data.npz", **content)
    data = NpzData(str(tmp_path / "data.npz"))
    train, test = data.samples(train=True), data.samples(train=False)
    assert train.class_names == test.class_names == ("5", "6", "7")
    assert train.labels.tolist() == [0, 1, 2] * 3
    assert train.images[:, 0, 0, 0].tolist() == [1] * 6 + [2] * 3
    assert (test.labels.tolist(), test.images[0, 0, 0, 0].item()) == ([0, 1, 2, 0], 3)
    for array in (images, labels):
        del content[array.format("test")]
    np.savez(tmp_path / "two.npz", **content)
    two = NpzData(str(tmp_path / "two.npz"))
    assert (len(two.samples(train=True)), len(two.samples(train=False))) == (6, 3)


def test_labels_of_a_file_keep_their_values_as_names(tmp_path):
    changes = {"class_names": None, "y_train": np.array([10, 2, 7, 99] * 5), "y_test": np.array([99, 2] * 4)}
    np.savez(tmp_path / "gaps.npz", **arrays(**changes), d_train=np.array(["p", "s"] * 10), d_test=np.array(["s"] * 8))
    data = NpzData(str(tmp_path / "gaps.npz"), domains="d")
    info = data.dataset_info()
    assert info.class_names == ("2", "7", "10", "99")
    assert (info.train_labels[:4].tolist(), info.test_labels[:2].tolist()) == ([2, 0, 1, 3], [3, 0])
    assert (info.domain_names, set(info.test_domains.tolist())) == (("d p", "d s"), {1})
    np.savez(tmp_path / "one.npz", **arrays(y_train=np.arange(20) % 4 + 1, y_test=np.arange(8) % 4 + 1))
    counted = NpzData(str(tmp_path / "one.npz")).dataset_info()  # from 1 throughout, with four names
    assert (counted.class_names[0], counted.train_labels[:4].tolist()) == ("a", [0, 1, 2, 3])
    np.savez(tmp_path / "new.npz", **arrays(class_names=None, y_test=np.full(8, 4)))
    with pytest.raises(
        ValueError, match=r"y_test: label 4 of sample 0 is no class of the training samples \(0, 1, 2, 3\)"
    ):
        NpzData(str(tmp_path / "new.npz")).make_stream(0)


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_test": None}, "x_test is missing; the file has class_names, coarse_names, x_train"),
        ({"y_train": None}, "y_train is missing"),
        ({"x_train": np.full((20, 5, 5), -1, np.float32)}, "x_train is float32 from -1 to -1: .*save images as uint8"),
        ({"x_train": np.zeros((20, 5), np.uint8)}, r"x_train has shape \(20, 5\); save images as \(N, H, W\)"),
        ({"x_train": np.zeros((0, 5, 5), np.uint8)}, r"x_train has shape \(0, 5, 5\)"),
        ({"x_train": np.uint8(3)}, r"x_train has shape \(\)"),
        ({"y_train": np.arange(20) / 4}, "y_train: the label of sample 1 is 0.25, a value to be predicted"),
        ({"y_train": np.arange(19) % 4}, r"y_train: labels are int64 of shape \(19,\); give 20 labels"),
        ({"y_train": np.array(["c"] * 20)}, r"y_train: the label 'c' is not among the class names \(a, b, \u00fc, d\)"),
        (
            {"y_train": np.full(20, 5)},
            r"y_train: label 5 of sample 0 is outside the range; labels are 0 \.\. 3, or 1 \.\. 4",
        ),
        ({"y_test": np.full(8, -1)}, "y_test: label -1"),
        ({"y_train": np.eye(20, 3)[:, [0, 0, 1]]}, "y_train: the label of sample 0, .* has 2 classes: several labels"),
        (
            {"class_names": np.array([["a", "b"]])},
            r"class_names is <U1 of shape \(1, 2\); save a flat array of strings",
        ),
        ({"class_names": np.arange(4)}, "class_names is int64"),
        ({"class_names": np.array(["a", "b", "a", "d"])}, "class_names has 'a' more than once"),
        ({"y_train": np.array([Bomb()] * 20)}, "y_train is refused: it holds pickled objects"),
        ({"class_names": np.array(["a", None], dtype=object)}, "class_names is refused: it holds pickled objects"),
        (
            {"x_test": np.zeros((8, 6, 6, 3), np.uint8)},
            r"test images have shape \(3, 6, 6\), training images \(3, 5, 5\)",
        ),
    ],
)
def test_a_file_that_lacks_something_is_refused_by_key(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    np.savez("data.npz", **arrays(**changes))
    with pytest.raises(ValueError, match=message) as refusal:
        NpzData("data.npz").make_stream(0)
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).startswith("NpzData: ")
    assert not Path("exploded").exists()


def test_a_file_that_is_no_archive_or_torn_is_refused(tmp_path):
    path = tmp_path / "data.npz"
    with pytest.raises(ValueError, match=r"no file .*data\.npz; give the path of an \.npz file"):
        NpzData(str(path)).make_stream(0)
    for content in (b"", b"PK\x03\x04 torn", b"no archive"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"data\.npz is not a readable \.npz file"):
            NpzData(str(path)).make_stream(0)
    np.save(tmp_path / "single.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"holds a single array; save several by name"):
        NpzData(str(tmp_path / "single.npy")).make_stream(0)
    np.savez_compressed(path, **arrays())
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(60)  # inside the first array
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"NpzData: .*data\.npz: x_train is damaged"):
        NpzData(str(path)).make_stream(0)


def test_real_images_of_fashion_have_the_published_statistics(shared_data):
    data = NpzData(str(shared_data / "fashion_mnist.npz"), scenario=ClassIncremental(tasks=1))
    stream = data.make_stream(0)
    assert (len(stream.train[0]), len(stream.test[0]), data.image_shape) == (60000, 10000, (1, 28, 28))
    known = SplitFashionMNIST().normalize
    assert data.normalize.mean == pytest.approx(known.mean, abs=0.005)
    assert data.normalize.std == pytest.approx(known.std, abs=0.005)
