"""Odd streams and odd files: each is learnt, with the right result, or told in one line before training starts."""

import os
import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from support.forks import pair
from support.odd import fast, learnt, loop, told
from support.runs import plain_net
from torch import Tensor
from torch.utils.data import Dataset

from cl_lightning.data import TensorSource
from cl_lightning.datamodules.base import ContinualDataModule
from cl_lightning.datamodules.dataset import UserDataset
from cl_lightning.datamodules.npz import NpzData
from cl_lightning.loop import results
from cl_lightning.report import command as report
from cl_lightning.strategies.rehearsal.er import ER
from cl_lightning.stream import (
    Blurry,
    ClassIncremental,
    DomainIncremental,
    LabelFraction,
    Online,
    PermutedDomains,
    RotatedDomains,
    Scenario,
    SingleTask,
)


class Labels(ContinualDataModule):
    """Gray images of some labels; the brighter, the higher the label."""

    mean: ClassVar[tuple[float, ...]] = (0.5,)
    std: ClassVar[tuple[float, ...]] = (0.25,)

    def __init__(self, train: Any, test: Any, *, side: int = 4, domains: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.parts = {True: np.asarray(train, np.int64), False: np.asarray(test, np.int64)}
        self.side, self.domains = side, domains

    def source(self, *, train: bool) -> TensorSource:
        labels = self.parts[train]
        count = int(max(part.max(initial=0) for part in self.parts.values())) + 1
        images = np.zeros((len(labels), 1, self.side, self.side), np.uint8)
        images += (labels * (255 // count)).astype(np.uint8)[:, None, None, None]
        return TensorSource(
            images,
            labels,
            class_names=[str(label) for label in range(count)],
            domains=np.arange(len(labels)) % self.domains if self.domains else None,
            domain_names=[f"domain {index}" for index in range(self.domains)],
        )


# ---------------------------------------------------------------------- streams

THREE = np.repeat(np.arange(3), 6)


@pytest.mark.parametrize(
    ("labels", "scenario"),
    [
        (THREE, ClassIncremental(increment=1)),
        (THREE, SingleTask()),
        (np.arange(4), ClassIncremental(tasks=2)),
        (np.arange(4), ClassIncremental(increment=1)),
        (np.zeros(1), SingleTask()),
        (np.zeros(5), PermutedDomains(tasks=3)),
        (np.repeat(np.arange(3), 40), Blurry(tasks=6, disjoint=0, blurry=50)),
        (np.repeat(np.arange(2), 40), Blurry(tasks=4, disjoint=50, blurry=60)),
        (THREE, RotatedDomains(tasks=3)),
        (THREE, Online(ClassIncremental(increment=1), batch_size=100)),
        (THREE, Online(ClassIncremental(increment=1), batch_size=1)),
        (THREE, LabelFraction(ClassIncremental(increment=1), per_class=1)),
    ],
    ids=[
        "one class in a task",
        "one task",
        "one image in a class",
        "one image in a task",
        "one image of one class",
        "one class in all tasks",
        "classes that come back, with tasks that bring nothing new",
        "sharp and blurry classes",
        "nothing new but the angle",
        "batches larger than a task",
        "batches of one",
        "one label in a class",
    ],
)
@pytest.mark.filterwarnings("ignore:give --model.memory_size")
def test_small_and_repeating_tasks_are_learnt(labels: np.ndarray, scenario: Scenario) -> None:
    for data in ({}, {"batch_size": 1000, "drop_last": True}, {"batch_size": 2, "eval_batch_size": 1}):
        learnt(Labels(labels, np.unique(labels), scenario=scenario, **data))
    learnt(Labels(labels, np.unique(labels), scenario=scenario), ER(memory_size=2, backbone=plain_net))


def test_a_domain_that_lacks_classes_and_brings_none_is_learnt() -> None:
    data = Labels([0, 1, 0, 0, 1, 0], [0, 1, 1, 0], domains=2, scenario=DomainIncremental(["domain 1", "domain 0"]))
    assert [task.num_new for task in learnt(data).stream.tasks] == [2, 0]


def test_few_validation_samples_leave_one_to_train_on() -> None:
    made = learnt(Labels(np.arange(4), np.arange(4), scenario=ClassIncremental(tasks=2), val_fraction=0.9))
    assert [len(part) for part in made.stream.train] == [2, 2]
    made = learnt(Labels(THREE, np.arange(3), scenario=ClassIncremental(increment=1), val_fraction=0.9))
    assert [(len(a), len(b)) for a, b in zip(made.stream.train, made.stream.val, strict=True)] == [(1, 5)] * 3


def test_a_later_task_without_test_samples_is_learnt_and_a_first_one_is_reported() -> None:
    made = learnt(Labels(np.arange(4), [0, 1, 0], scenario=ClassIncremental(tasks=2)))
    assert made.matrix.R_ci[1].isnan().tolist() == [False, True]
    assert "forgetting" in made.results()["measures"]
    for tests in ([], [2, 3]):
        said = told(Labels(np.arange(4), tests, scenario=ClassIncremental(tasks=2)))
        assert said == (
            "Labels: the first task (task 0) has no test samples; add some, since each task "
            "ends with an evaluation, or begin with other classes"
        )


def test_a_thousand_classes_in_two_hundred_tasks_are_learnt(tmp_path: Path) -> None:
    labels = np.arange(1000)
    data = Labels(labels, labels, side=2, scenario=ClassIncremental(tasks=200, class_order="random"))
    made = learnt(data)
    assert made.matrix.R_ci.shape == (200, 200)
    assert made.matrix.per_class.shape == (200, 1000)
    assert made.trainer.global_step == 200
    results.write(tmp_path / "results.json", made.results())
    assert len(report.read([str(tmp_path)]).runs[0].class_names) == 1000


def _in_a_process(kind: str, target: str) -> None:
    """Learn tasks of few samples, in one of two processes or alone, and write what came out."""
    warnings.simplefilter("ignore")
    data = {
        "one test image": Labels(np.arange(3), np.arange(3), scenario=ClassIncremental(increment=1)),
        "one validation image": Labels(
            [0, 0, 1, 1], [0, 0, 1], scenario=ClassIncremental(increment=1), val_fraction=0.5, eval_batch_size=2
        ),
        "short tasks": Labels(
            [0, 0, 0, 1, 2, 2], [0, 0, 0, 1, 1, 2], scenario=ClassIncremental(increment=1), batch_size=4
        ),
        "classes that come back": Labels(
            np.repeat(np.arange(2), 20), [0, 1, 1], scenario=Blurry(tasks=4, disjoint=0, blurry=50)
        ),
    }[kind]
    two = {"devices": 2, "strategy": "ddp"} if "LOCAL_RANK" in os.environ else {}
    strategy = ER(memory_size=2, replay_size=3, backbone=plain_net, optimizer=fast)
    made = loop(data, strategy, max_epochs=2, **two)
    made.fit()
    parts = [made.matrix.R_ci, made.matrix.totals, *strategy.network.parameters(), strategy.memory.keys.sort().values]
    torch.save([part.detach().clone() for part in parts], f"{target}.{made.trainer.global_rank}")


@pytest.mark.parametrize("kind", ["one test image", "one validation image", "short tasks", "classes that come back"])
def test_two_processes_learn_tasks_shorter_than_a_batch_as_one_does(kind: str, tmp_path: Path) -> None:
    pair(_in_a_process, kind, str(tmp_path / "two"))
    _in_a_process(kind, str(tmp_path / "one"))
    alone = torch.load(tmp_path / "one.0", weights_only=True)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"two.{rank}", weights_only=True)
        for mine, other in zip(found, alone, strict=True):
            torch.testing.assert_close(mine, other, equal_nan=True)


# ---------------------------------------------------------------------- arrays


def archive(path: Path, **changes: Any) -> NpzData:
    chance = np.random.default_rng(0)
    parts = {
        "x_train": chance.integers(0, 256, (12, 4, 4), dtype=np.uint8),
        "y_train": np.arange(12) % 4,
        "x_test": chance.integers(0, 256, (8, 4, 4), dtype=np.uint8),
        "y_test": np.arange(8) % 4,
        **changes,
    }
    np.savez(path / "data.npz", **{key: value for key, value in parts.items() if value is not None})
    return NpzData(str(path / "data.npz"), scenario=ClassIncremental(tasks=2))


Y = np.arange(12) % 4


@pytest.mark.parametrize("dtype", ["i1", "u1", "<i2", ">i4", "u4", "i8", ">u8"])
def test_labels_of_any_integers_are_learnt(tmp_path: Path, dtype: str) -> None:
    made = learnt(archive(tmp_path, y_train=Y.astype(dtype), y_test=Y[:8].astype(dtype)[:, None]))
    assert made.stream.order == (0, 1, 2, 3)


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_train": Y > 1}, "y_test: label 2 of sample 2 is no class of the training samples (False, True)"),
        ({"y_train": Y / 2}, "y_train: the label of sample 1 is 0.5, a value to be predicted (regression)"),
        ({"y_train": np.where(Y > 1, np.nan, 1.0)}, "y_train: the label of sample 2 is nan; remove such samples"),
        ({"y_train": Y.astype("m8[s]")}, "y_train: labels are timedelta64[s]"),
        ({"y_train": Y.astype("M8[s]")}, "y_train: labels are datetime64[s]"),
        ({"y_train": Y.astype("S")}, "y_test: labels are numbers, labels of the training samples strings"),
        ({"y_train": np.zeros(12, [("a", "i4")])}, "y_train: labels are [('a', '<i4')]"),
        (
            {"y_train": np.eye(4, dtype=int)[Y][:, [0, 0, 1]]},
            "y_train: the label of sample 0, (1, 1, 0), has 2 classes",
        ),
        ({"y_train": np.zeros((3, 4), int)}, "y_train: the label of sample 0, (0, 0, 0, 0), has 0 classes"),
        ({"y_train": np.int64(3)}, "y_train: labels are int64 of shape ()"),
        ({"y_train": Y.astype("u8") + np.uint64(2**63)}, "label 9223372036854775808 of sample 0 is outside the range"),
        (
            {"y_test": np.full(8, 10**13)},
            "y_test: label 10000000000000 of sample 0 is no class of the training samples",
        ),
        ({"y_train": Y * 2}, "y_test: label 1 of sample 1 is no class of the training samples (0, 2, 4, 6)"),
        ({"class_names": np.array([], str)}, "labels are limited to class names, of which there are none"),
        ({"class_names": np.array(list("abcdef"))}, "class 'e' has no training samples"),
        (
            {"x_train": np.full((12, 4, 4), np.nan)},
            "x_train is float64 from nan to nan: normalised images or measurements",
        ),
        ({"x_train": zeros(12, 4, 4).astype("V1")}, "save images as uint8"),
        ({"x_train": zeros(12, 4, 4, 3, 1)}, "x_train has shape (12, 4, 4, 3, 1); save images as (N, H, W)"),
        ({"x_train": zeros(12, 9, 9, 2)}, "x_train: images have shape (9, 9, 2); neither the first nor the last side"),
        ({"x_train": zeros(11, 4, 4)}, "y_train: labels are int64 of shape (12,); give 11 labels"),
        ({"x_train": np.array([object()] * 12)}, "x_train is refused: it holds pickled objects"),
        ({"x_test": None}, "x_test is missing; the file has x_train, y_test, y_train"),
        ({"x_test": zeros(8, 5, 5)}, "test images have shape (1, 5, 5), training images (1, 4, 4)"),
    ],
)
def test_arrays_that_cannot_be_learnt_from_are_reported(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    assert message in told(archive(tmp_path, **changes))


def test_a_label_that_would_make_a_million_million_classes_takes_no_memory(tmp_path: Path) -> None:
    names_ = np.array([f"class {label}" for label in range(4)])
    assert learnt(archive(tmp_path, y_train=Y * 2**60, y_test=Y[:8] * 2**60)).stream.class_names[1] == str(2**60)
    assert "0 .. 3, or 1 .. 4 throughout, as there are 4 class names" in told(
        archive(tmp_path, y_train=np.full(12, 2**62), class_names=names_)
    )


@pytest.mark.parametrize(
    ("shape", "image"),
    [
        ((1, 1), (1, 1, 1)),
        ((1, 1, 3), (3, 1, 1)),
        ((3, 1, 1), (3, 1, 1)),
        ((4, 4, 3), (3, 4, 4)),
        ((3, 4, 4), (3, 4, 4)),
        ((3, 3, 3), (3, 3, 3)),
        ((9, 5, 1), (1, 9, 5)),
        ((1, 28, 28), (1, 28, 28)),
        ((4, 9, 3), (4, 9, 3)),
    ],
)
def test_the_channels_of_small_images_are_found(tmp_path: Path, shape: tuple[int, ...], image: Any) -> None:
    data = archive(tmp_path, x_train=zeros(12, *shape), x_test=zeros(8, *shape))
    assert learnt(data).datamodule.image_shape == image


def test_names_that_are_no_text_in_utf8_stay_different(tmp_path: Path) -> None:
    data = archive(tmp_path, class_names=np.array([b"\xff", b"\xfe", b"a", b"b"]))
    assert learnt(data).stream.class_names == ("\\xff", "\\xfe", "a", "b")


# ---------------------------------------------------------------------- data sets of a user


class Items(Dataset[Any]):
    def __init__(self, items: Any, **attributes: Any) -> None:
        self.items = items
        vars(self).update(attributes)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def user(items: Any, attributes: dict[str, Any], **options: Any) -> UserDataset:
    return UserDataset(Items(items, **attributes), Items(items, **attributes), scenario=SingleTask(), **options)


BLACK = torch.zeros(3, 4, 4, dtype=torch.uint8)
GOOD: list[tuple[Tensor, int]] = [(BLACK, 0), (BLACK, 1)]


@pytest.mark.filterwarnings("ignore:.*every item is read once")
@pytest.mark.parametrize(
    ("items", "attributes", "message"),
    [
        ([("x", 0), ("y", 1)], {}, "train: item 0 is the str 'x'; give (image, label), the image a PIL image"),
        ([None, None], {"targets": [0, 1]}, "train: item 0 is of the type NoneType; give (image, label)"),
        ([3, 4], {"targets": [0, 1]}, "train: item 0 is of the type int; give (image, label)"),
        ([(), ()], {"targets": [0, 1]}, "train: items are empty; return (image, label)"),
        ([([[1], [1, 2]], 0)] * 2, {"targets": [0, 1]}, "train: item 0 is of the type list; give"),
        ([(BLACK[:, :0], 0)] * 2, {"targets": [0, 1]}, "item 0 is torch.uint8 of shape (3, 0, 4)"),
        ([(BLACK * torch.nan, 0)] * 2, {"targets": [0, 1]}, "item 0 is float32 from nan to nan: normalised images"),
        ([(Image.new("F", (4, 4)), 0)] * 2, {"targets": [0, 1]}, "item 0 cannot be read (pixels of mode F"),
        (GOOD, {"targets": [[0], [1, 2]]}, "train: labels are no array of numbers (setting an array element"),
        (GOOD, {"targets": [None, 1]}, "train: the label of sample 0 is None; remove such samples"),
        (GOOD, {"targets": {0, 1}}, "train: labels are no array of numbers (a set is not in the order of the images)"),
        (GOOD, {"targets": torch.tensor([0.0, 0.5], requires_grad=True)}, "train: the label of sample 1 is 0.5"),
        (GOOD, {"classes": 2}, "train: the attribute `classes` is a int; make it a list of names"),
        ([(BLACK, 0.5), (BLACK, 1.0)], {}, "the label of sample 0 is 0.5, a value to be predicted (regression)"),
        ([(BLACK, 2**70), (BLACK, 1)], {}, "labels are of the types int; give 2 labels"),
        ([{"image": BLACK}] * 2, {}, "items are dicts of 'image', and none is the label; give data.label_key"),
    ],
)
def test_data_sets_that_cannot_be_learnt_from_are_reported(
    items: Any, attributes: dict[str, Any], message: str
) -> None:
    said = told(user(items, attributes))
    assert said.startswith("UserDataset: train")
    assert message in said


@pytest.mark.filterwarnings("ignore:.*every item is read once")
@pytest.mark.parametrize(
    "attributes",
    [
        {"targets": [torch.tensor(0), torch.tensor(1)]},
        {"targets": np.array([0, 1], np.uint16)},
        {"targets": (0, 1)},
        {"targets": 3},  # no labels: the items tell them
        {"classes": lambda: 3},  # a method of that name
        {"classes": {"left": 0, "right": 1}},
        {"classes": [1, 2]},
    ],
)
def test_labels_and_names_of_all_sorts_are_learnt(attributes: dict[str, Any]) -> None:
    assert learnt(user(GOOD, attributes)).matrix.totals.tolist() == [2]


def test_gray_among_colours_is_reported_with_the_remedy_or_converted() -> None:
    mixed = [(Image.new("L", (5, 5)), 0), (Image.new("RGB", (5, 5)), 1)]
    assert "give `size` to scale and crop them, `mode` if only the channels differ" in told(
        user(mixed, {"targets": [0, 1]})
    )
    for mode in ("RGB", "L"):
        learnt(user(mixed, {"targets": [0, 1]}, mode=mode))
