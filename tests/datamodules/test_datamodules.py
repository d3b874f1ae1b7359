"""Data modules: what they read, what they refuse, and that a stream stays the same when the data grow."""

import contextlib
import copy
import io
import re
import shlex
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from support import ROOT
from torch.nn import functional as F
from torch.utils.data import Dataset

from cl_lightning.batch import Draw
from cl_lightning.cli import main
from cl_lightning.data import (
    DecodedSource,
    FileSource,
    RandomCrop,
    RandomHorizontalFlip,
    RandomResizedCrop,
    TensorSource,
    permute_pixels,
    rotate_images,
)
from cl_lightning.datamodules.base import ContinualDataModule
from cl_lightning.datamodules.cifar import SplitCIFAR10, SplitCIFAR100
from cl_lightning.datamodules.dataset import UserDataset
from cl_lightning.datamodules.digits import Digits
from cl_lightning.datamodules.domains import DomainFolder
from cl_lightning.datamodules.folder import ImageFolder, share
from cl_lightning.datamodules.mnist import SplitFashionMNIST, SplitMNIST
from cl_lightning.datamodules.npz import NpzData
from cl_lightning.datamodules.torchvision_data import TorchvisionData, held_out
from cl_lightning.loop import LoopOptions, TaskLoop
from cl_lightning.memory import Memory, Ring
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.stream import (
    ClassIncremental,
    DomainIncremental,
    LabelFraction,
    Online,
    PermutedDomains,
    RotatedDomains,
    Stream,
)

EXPERIMENTS = ROOT / "experiments" / "data"


class Toy(ContinualDataModule):
    """80 training and 20 test images of 4 classes, told apart by their brightness."""

    mean: ClassVar[tuple[float, ...]] = (0.5,)
    std: ClassVar[tuple[float, ...]] = (0.25,)

    def source(self, *, train: bool) -> TensorSource:
        chance, count = np.random.default_rng(int(train)), 80 if train else 20
        labels = np.arange(count) % 4
        noise = chance.integers(0, 40, (count, 1, 6, 6))
        images = (labels[:, None, None, None] * 60 + noise).astype(np.uint8)
        return TensorSource(images, labels, class_names=["a", "b", "c", "d"], name="toy")


def begun(data: ContinualDataModule, task: int = 0, seed: int = 0, **options: Any) -> ContinualDataModule:
    """The data module at the start of a task."""
    if not hasattr(data, "stream"):
        data.make_stream(seed)
    data.begin(data.stream.tasks[task], **options)
    data.begin_phase(0, None, 0)
    return data


def loop(data: ContinualDataModule, folder: Path | None, epochs: int = 2, **options: Any) -> TaskLoop:
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    return TaskLoop(trainer, Finetune(), data, run_dir=folder, options=LoopOptions(**options))


def image(value: int, size: tuple[int, int] = (8, 8), seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 30, (size[1], size[0], 3))
    return Image.fromarray((value + noise).astype(np.uint8))


def class_folder(root: Path, name: str, count: int = 12, value: int = 60) -> None:
    (root / name).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        image(value, seed=index).save(root / name / f"{index:03}.png")


def names_of(data: ImageFolder, *, train: bool) -> set[str]:
    source = data.samples(train=train)
    files = source.origin if isinstance(source, DecodedSource) else source
    assert isinstance(files, FileSource)
    return {path.relative_to(data.root).as_posix() for path in files.paths}


# ---------------------------------------------------------------------- the base


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "Toy: batch_size is 0; it must be at least 1"),
        ({"eval_batch_size": 0}, "Toy: eval_batch_size is 0"),
        ({"workers": -1}, "Toy: workers is -1; it must be at least 0"),
        ({"resize": 0}, "Toy: resize is 0; it must be at least 1"),
        ({"center_crop": 5}, "Toy: center_crop is 5, resize is None"),
        ({"interpolation": "bicubic"}, "Toy: give resize; interpolation is 'bicubic'"),
        ({"resize": 8, "interpolation": "cubic"}, "Toy: interpolation is 'cubic'; use 'bilinear' or 'bicubic'"),
        ({"val_fraction": 1.0}, r"Toy: val_fraction is 1\.0; it must be in \[0, 1\)"),
        ({"mean": [128.0]}, "divide by 255"),
        ({"std": [0.0]}, "std above 0"),
    ],
)
def test_options_of_the_base_are_checked_by_the_constructor(options, message):
    with pytest.raises(ValueError, match=message):
        Toy(**options)


def test_as_many_means_as_channels_are_needed():
    with pytest.raises(ValueError, match="Toy: mean has 3 numbers, images have 1 channels; give one per channel"):
        Toy(mean=[0.1, 0.2, 0.3], std=[1.0, 1.0, 1.0]).make_stream(0)


def test_training_and_test_images_must_have_one_shape():
    class Odd(Toy):
        def source(self, *, train: bool) -> TensorSource:
            source = super().source(train=train)
            return source if train else TensorSource(source.images[..., :5], source.labels, channels_last=False)

    with pytest.raises(ValueError, match=r"Odd: test images have shape \(1, 6, 5\), training images \(1, 6, 6\)"):
        Odd().make_stream(0)


def test_each_loader_gives_its_part_of_the_stream():
    data = begun(Toy(scenario=ClassIncremental(tasks=2), batch_size=7, eval_batch_size=9, val_fraction=0.2), task=1)
    stream = data.stream
    seen = {
        name: torch.cat([batch.indices for batch in getattr(data, f"{name}_dataloader")()])
        for name in ("train", "val", "test", "statistics")
    }
    assert sorted(seen["train"].tolist()) == stream.train[1].tolist()
    assert seen["statistics"].tolist() == stream.train[1].tolist()
    assert seen["val"].tolist() == [*stream.val[0], *stream.val[1]]
    assert seen["test"].tolist() == [*stream.test[0], *stream.test[1]]
    for batch in data.test_dataloader():
        assert batch.labels.equal(torch.as_tensor(data.samples(train=False).labels)[batch.indices])
        assert batch.tasks.equal(batch.labels // 2)


def test_without_a_validation_share_there_is_no_validation_loader():
    assert begun(Toy()).val_dataloader() == []


def test_all_tasks_so_far_are_served_where_a_strategy_asks_for_them():
    data = begun(Toy(scenario=ClassIncremental(tasks=4)), task=2, cumulative=True)
    batch = next(iter(data.train_dataloader()))
    assert len(data.train_dataloader()) == 1
    assert batch.labels.bincount().tolist() == [20, 20, 20]
    assert batch.tasks.equal(batch.labels)


def test_hidden_labels_reach_only_a_strategy_that_uses_them_and_only_as_minus_one():
    scenario = LabelFraction(ClassIncremental(tasks=2), per_class=3)
    (few,) = begun(Toy(scenario=scenario)).train_dataloader()
    assert few.labels.bincount().tolist() == [3, 3]
    data = begun(Toy(scenario=scenario), with_unlabelled=True)
    (batch,) = data.train_dataloader()
    assert len(batch) == 40
    assert (batch.labels + 1).bincount().tolist() == [34, 3, 3]
    assert sum(len(batch) for batch in data.statistics_dataloader()) == 6


def test_a_pass_for_statistics_draws_other_numbers_in_each_task_and_with_each_seed():
    tasks = [begun(Toy(), task=task) for task in (0, 1)]
    keys = [next(iter(data.statistics_dataloader())).draw.key for data in (*tasks, begun(Toy(), seed=1))]
    assert len(set(keys)) == 3
    assert keys[0] == next(iter(tasks[0].statistics_dataloader())).draw.key


def test_a_one_pass_stream_has_its_own_batches_and_passes():
    data = begun(Toy(scenario=Online(ClassIncremental(tasks=2), batch_size=10, passes=3), batch_size=16))
    batches = list(data.train_dataloader())
    assert [len(batch) for batch in batches] == [10] * 12
    assert batches[0].indices.equal(batches[2].indices)


def test_a_memory_is_mixed_with_the_task():
    memory = Memory(6, Ring())
    memory.add(
        torch.full((6, 1, 6, 6), 7, dtype=torch.uint8), torch.zeros(6).long(), torch.zeros(6).long(), Draw.of(6, 0)
    )
    data = begun(Toy(scenario=ClassIncremental(tasks=2), batch_size=23), task=1)
    data.begin_phase(0, memory, 0)
    batches = list(data.train_dataloader())
    assert [len(batch) for batch in batches] == [23, 23]
    replayed = torch.cat([batch.indices for batch in batches]) < 0
    assert replayed.sum() == 6
    assert torch.cat([batch.tasks for batch in batches])[replayed].tolist() == [0] * 6


def test_the_order_depends_on_seed_task_phase_and_epoch():
    def order(seed: int = 0, phase: int = 0, resume: tuple[int, int] | None = None) -> list[int]:
        data = begun(Toy(scenario=ClassIncremental(tasks=2), batch_size=10), seed=seed)
        data.begin_phase(phase, None, 0, resume)
        return [index for batch in data.train_dataloader() for index in batch.indices.tolist()]

    assert order() == order()
    assert len({tuple(order(seed=1)), tuple(order(phase=1)), tuple(order())}) == 3
    assert order(resume=(0, 3)) == order()[30:]
    assert order(resume=(5, 3)) == order()  # a place in another epoch


def test_only_training_batches_are_augmented():
    data = begun(Toy(transforms=[RandomCrop(padding=2)]))
    batch = next(iter(data.train_dataloader()))
    plain, augmented = data.finish(batch, augment=False), data.finish(batch, augment=True)
    torch.testing.assert_close(plain.images, (batch.raw / 255 - 0.5) / 0.25)
    assert not augmented.images.equal(plain.images)
    assert augmented.images.equal(data.finish(batch, augment=True).images)
    assert augmented.raw is batch.raw


def test_images_are_resized_after_augmentation_and_stay_small_in_raw():
    data = begun(Toy(resize=12, transforms=[RandomHorizontalFlip()]))
    assert data.image_shape == (1, 12, 12)
    batch = data.finish(next(iter(data.train_dataloader())), augment=True)
    assert batch.images.shape[1:] == (1, 12, 12)
    assert batch.raw.shape[1:] == (1, 6, 6)
    assert data.finish(batch.select(slice(0, 0)).replace(draw=Draw.of(0, 0)), augment=True).images.shape == (
        0,
        1,
        12,
        12,
    )
    constant = batch.replace(raw=torch.full_like(batch.raw, 51))
    torch.testing.assert_close(
        data.finish(constant, augment=False).images, torch.full((len(batch), 1, 12, 12), (0.2 - 0.5) / 0.25)
    )


def test_the_middle_is_cut_out_of_images_that_are_not_cropped_already():
    options = {"resize": 16, "center_crop": 14, "interpolation": "bicubic", "mean": [0.0], "std": [1.0]}
    data = begun(Toy(transforms=[RandomResizedCrop(14)], **options))
    assert data.image_shape == (1, 14, 14)
    batch = next(iter(data.train_dataloader()))
    for images, found in zip(batch.raw, data.finish(batch, augment=False).images, strict=True):
        large = F.interpolate(images[None].float() / 255, (16, 16), mode="bicubic", antialias=True).clamp(0, 1)
        torch.testing.assert_close(found, large[0, :, 1:15, 1:15])
    cropped = data.augmentation(batch.raw, batch.draw, None)
    torch.testing.assert_close(data.finish(batch, augment=True).images, data.normalize(cropped, batch.draw))
    flipped = begun(Toy(transforms=[RandomHorizontalFlip(1.0)], **options)).finish(batch, augment=True).images
    torch.testing.assert_close(flipped, data.finish(batch, augment=False).images.flip(3), rtol=1e-4, atol=1e-5)
    assert data.scaling != begun(Toy(resize=16, mean=[0.0], std=[1.0])).scaling


class Unmeasured(Toy):
    mean = std = None


def test_mean_and_standard_deviation_are_measured_on_the_first_task_where_none_are_known():
    data = Unmeasured(scenario=ClassIncremental(tasks=2))
    data.make_stream(0)
    first = data.samples(train=True).images[data.stream.train[0].copy()].double() / 255
    assert data.normalize.mean == (round(float(first.mean()), 4),)
    assert data.normalize.std == (round(float(first.std(correction=0)), 4),)
    assert Unmeasured(mean=[0.25]).statistics() == ([0.25], None)
    half = Unmeasured(scenario=ClassIncremental(tasks=2), mean=[0.25])
    half.make_stream(0)
    assert (half.normalize.mean, half.normalize.std) == ((0.25,), data.normalize.std)


def test_measured_numbers_travel_with_the_checkpoint_and_given_ones_win():
    data = Unmeasured()
    data.make_stream(0)
    other = Unmeasured()
    other.load_state_dict(data.state_dict())
    assert other.normalize.mean == data.normalize.mean  # without any data
    assert Toy().state_dict() == {}
    given = Unmeasured(mean=[0.1], std=[0.2])
    given.load_state_dict(data.state_dict())
    assert (given.normalize.mean, given.normalize.std) == ((0.1,), (0.2,))
    with pytest.raises(ValueError, match=r"Unmeasured: give data\.mean and data\.std; neither the configuration"):
        _ = Unmeasured().normalize


def test_permuted_and_rotated_domains_change_the_raw_images():
    permuted = begun(Toy(scenario=PermutedDomains(tasks=3), eval_batch_size=64), task=2)
    rotated = begun(Toy(scenario=RotatedDomains(degrees=[0, 45, 90]), eval_batch_size=64), task=2)
    for data, change in ((permuted, permute_pixels), (rotated, rotate_images)):
        images = data.samples(train=False).images
        batches = list(data.test_dataloader())
        assert len(batches) == 1
        for task in range(3):
            shift = data.stream.tasks[task].domain
            rows = batches[0].tasks == task
            expected = images if shift is None else change(images, shift.value)
            assert batches[0].raw[rows].equal(expected)
    assert not batches[0].raw[:20].equal(batches[0].raw[20:40])


def test_a_permutation_is_drawn_once(monkeypatch):
    data = begun(Toy(scenario=PermutedDomains(tasks=2), batch_size=5), task=1)
    calls = []
    monkeypatch.setattr("cl_lightning.data.shifts.permute_pixels", lambda *a: calls.append(1) or permute_pixels(*a))
    assert len(list(data.train_dataloader())) == 16
    assert len(calls) == 1


def test_a_fingerprint_follows_content_classes_and_task_and_not_the_place_of_a_sample():
    def prints(change: Callable[[TensorSource], TensorSource] = lambda source: source, **options: Any) -> list[str]:
        class Changed(Toy):
            def source(self, *, train: bool) -> TensorSource:
                return change(super().source(train=train))

        data = Changed(scenario=ClassIncremental(tasks=2), **options)
        data.make_stream(0)
        return [data.fingerprint(task) for task in range(2)]

    def brighter(source: TensorSource) -> TensorSource:
        images = source.images.clone()
        images[2] += 1  # of class c, in task 1
        return TensorSource(images, source.labels, class_names=source.class_names)

    def swapped(source: TensorSource) -> TensorSource:
        labels = source.labels.copy()
        labels[[0, 1]] = labels[[1, 0]]  # between the classes of task 0
        return TensorSource(source.images, labels, class_names=source.class_names)

    def behind_another_class(source: TensorSource) -> TensorSource:
        images = torch.cat([source.images[:3], source.images])
        labels = np.concatenate([np.full(3, 4), source.labels])
        return TensorSource(images, labels, class_names=[*source.class_names, "e"])

    plain = prints()
    assert plain == prints()
    assert prints(brighter)[0] == plain[0]
    assert prints(brighter)[1] != plain[1]
    assert prints(swapped)[0] != plain[0]
    assert prints(val_fraction=0.2)[0] != plain[0]
    longer = type("Longer", (Toy,), {"source": lambda self, train: behind_another_class(Toy.source(self, train=train))})
    grown = longer(scenario=ClassIncremental(sizes=[2, 2, 1]))
    grown.make_stream(0)
    assert [grown.fingerprint(task) for task in range(2)] == plain


# ---------------------------------------------------------------------- continuing a stream


class Growing(Toy):
    """As many of the classes as were asked for."""

    def __init__(self, classes: str, **options: Any) -> None:
        super().__init__(scenario=ClassIncremental(increment=2), **options)
        self.classes = classes

    def source(self, *, train: bool) -> TensorSource:
        everything = super().source(train=train)
        kept = np.isin(everything.labels, ["abcd".index(name) for name in self.classes])
        table = np.array([self.classes.find(name) for name in "abcd"])
        return TensorSource(
            everything.images[torch.as_tensor(kept)], table[everything.labels[kept]], class_names=list(self.classes)
        )


def again(stream: Stream) -> Stream:
    return Stream.from_dict(copy.deepcopy(stream.to_dict()))


def test_the_same_data_give_the_same_stream_again():
    data = Growing("ab", val_fraction=0.1)
    stream = data.make_stream(3)
    assert Growing("ab", val_fraction=0.1).make_stream(3, again(stream)) == stream


@pytest.mark.parametrize(("classes", "tasks"), [("abc", 2), ("cab", 2), ("abcd", 2)])
def test_new_classes_make_further_tasks_also_where_the_sizes_do_not_divide(classes, tasks):
    data = Growing("ab")
    stream = data.make_stream(0)
    larger = Growing(classes)
    longer = larger.make_stream(0, again(stream))
    assert len(longer) == tasks
    assert longer.class_names[:2] == ("a", "b")
    assert larger.fingerprint(0) == data.fingerprint(0)
    # A run that was extended is resumed with the data of that day, and extended again.
    assert Growing(classes).make_stream(0, again(longer)) == longer
    if classes == "abc":
        assert len(Growing("abcd").make_stream(0, again(longer))) == 3


@pytest.mark.parametrize("change", [{"seed": 1}, {"val_fraction": 0.2}, {"scenario": ClassIncremental(tasks=1)}])
def test_a_stream_of_other_options_is_not_continued(change):
    stream = Growing("ab").make_stream(0)
    other = Growing("ab")
    other.scenario = change.get("scenario", other.scenario)
    other.seed, other.val_fraction = change.get("seed", 0), change.get("val_fraction", 0.0)
    with pytest.raises(ValueError, match=r"stream learnt so far is another one: .*ClassIncremental"):
        other.make_stream(0, again(stream))


def test_a_lost_class_is_told():
    stream = Growing("abcd").make_stream(0)
    with pytest.raises(ValueError, match="lacks"):
        Growing("abc").make_stream(0, again(stream))


# ---------------------------------------------------------------------- .npz


def arrays(**changes: Any) -> dict[str, Any]:
    chance = np.random.default_rng(0)
    whole = {
        "x_train": chance.integers(0, 256, (20, 5, 5, 3), dtype=np.uint8),
        "y_train": (np.arange(20) % 4).astype(np.uint8),
        "x_test": chance.integers(0, 256, (8, 5, 5, 3), dtype=np.uint8),
        "y_test": np.arange(8) % 4,
        "class_names": np.array(["a", "b", "\u00fc", "d"]),
        "yc_train": np.arange(20) % 4 // 2,
        "yc_test": np.arange(8) % 4 // 2,
        "coarse_names": np.array([b"left", b"right"]),
    }
    whole.update(changes)
    return {key: value for key, value in whole.items() if value is not None}


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


# ---------------------------------------------------------------------- folders


def test_both_layouts_of_folders_are_read(tmp_path):
    for part, count in (("train", 5), ("test", 2)):
        for name in ("cat", "dog"):
            class_folder(tmp_path / "split" / part, name, count)
    data = ImageFolder(str(tmp_path / "split"), size=8, scenario=ClassIncremental(tasks=2))
    assert data.make_stream(0).class_names == ("cat", "dog")
    assert [len(part) for part in (*data.stream.train, *data.stream.test)] == [5, 5, 2, 2]
    for name in ("cat", "dog"):
        class_folder(tmp_path / "whole", name, 40)
    data = ImageFolder(str(tmp_path / "whole"), size=8, test_fraction=0.25, mode="L")
    tested, trained = names_of(data, train=False), names_of(data, train=True)
    assert len(tested | trained) == 80
    assert not tested & trained
    assert 8 <= len(tested) <= 32
    assert data.image_shape == (1, 8, 8)


def test_test_images_stay_test_images_when_files_and_classes_are_added(tmp_path):
    class_folder(tmp_path, "cat", 30)
    class_folder(tmp_path, "dog", 30)
    before = ImageFolder(str(tmp_path), size=4)
    tested, trained = names_of(before, train=False), names_of(before, train=True)
    class_folder(tmp_path, "bird", 30)
    for index in range(30, 50):
        image(9).save(tmp_path / "cat" / f"{index:03}.png")
    after = ImageFolder(str(tmp_path), size=4, seed=5)  # the seed of the run has no say
    assert tested <= names_of(after, train=False)
    assert trained <= names_of(after, train=True)
    assert names_of(ImageFolder(str(tmp_path), size=4, test_seed=1), train=False) != names_of(after, train=False)


def test_the_share_of_a_name_is_the_same_everywhere():
    assert share(0, "", "cat", "001.png") == pytest.approx(0.5, abs=0.5)
    assert share(0, "", "cat", "e\u0301.png") == share(0, "", "cat", "\u00e9.png")  # two ways to write one letter
    values = [share(0, "", "cat", f"{index}.png") for index in range(2000)]
    assert np.mean(np.array(values) < 0.2) == pytest.approx(0.2, abs=0.03)


def test_small_classes_have_an_image_on_either_side(tmp_path):
    for name, count in (("two", 2), ("three", 3), ("one", 1)):
        class_folder(tmp_path, name, count)
    for fraction in (0.001, 0.999):
        data = ImageFolder(str(tmp_path), size=4, test_fraction=fraction)
        with pytest.warns(UserWarning, match="ImageFolder: one: a single image, so there is no test image"):
            tested = {name.split("/")[0] for name in names_of(data, train=False)}
        assert tested == {"two", "three"}
        assert {name.split("/")[0] for name in names_of(data, train=True)} == {"one", "two", "three"}


def test_names_and_kinds_of_all_sorts_are_read(tmp_path):
    class_folder(tmp_path / "real", "caf\u00e9 au lait", 2)
    class_folder(tmp_path / "real", "b", 2)  # the same file names again
    big = Image.new("RGB", (4000, 3000), (10, 200, 30))
    big.save(tmp_path / "real" / "b" / "PHOTO.JPG")
    Image.new("RGB", (1, 1), (10, 200, 30)).save(tmp_path / "real" / "b" / "dot.bmp")
    Image.fromarray(np.full((6, 6), 1000, np.uint16)).save(tmp_path / "real" / "b" / "deep.png")
    image(5).quantize(8).save(tmp_path / "real" / "b" / "palette.gif")
    image(5).convert("L").save(tmp_path / "real" / "b" / "gray.png")
    class_folder(tmp_path / "elsewhere", "nested/deeper", 2)
    (tmp_path / "real" / "linked").symlink_to(tmp_path / "elsewhere" / "nested")
    (tmp_path / "real" / ".thumbnails").mkdir()
    (tmp_path / "real" / "readme.txt").touch()
    for options in ({"in_memory": True}, {"in_memory": False}):
        with pytest.warns(UserWarning, match="Left out: files that are not read as images: 1 .txt$"):
            data = begun(ImageFolder(str(tmp_path / "real"), size=16, scenario=ClassIncremental(tasks=1), **options))
        assert data.stream.class_names == ("b", "caf\u00e9 au lait", "linked")
        assert len(names_of(data, train=True) | names_of(data, train=False)) == 11
        assert sum(len(batch) for batch in data.train_dataloader()) == len(names_of(data, train=True))
        assert data.samples(train=True).in_memory == options["in_memory"]


def test_a_folder_gives_the_same_with_and_without_memory_and_with_workers(tmp_path):
    for value, name in ((20, "a"), (120, "b"), (200, "c")):
        class_folder(tmp_path, name, 8, value)
    results = []
    for options in ({"in_memory": True}, {"in_memory": False}, {"in_memory": False, "workers": 2}):
        data = ImageFolder(str(tmp_path), size=4, scenario=ClassIncremental(increment=1), batch_size=3, **options)
        run = loop(data, None)
        matrix = run.fit()
        results.append((matrix.R_ci, run.strategy.state_dict(), run.fingerprints, data.normalize.mean))
    for accuracies, state, prints, mean in results[1:]:
        assert accuracies.nan_to_num().equal(results[0][0].nan_to_num())
        assert all(value.equal(results[0][1][name]) for name, value in state.items())
        assert (prints, mean) == results[0][2:]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "ImageFolder: no folder at .*photos; give the folder that holds the images"),
        (lambda root: root.mkdir(), "photos holds no folders; make one for each class"),
        (lambda root: (root / "cat").mkdir(parents=True), r"no images in .*cat; add images \(allowed suffixes: \.jpg"),
        (
            lambda root: [class_folder(root / "train", "cat", 2), class_folder(root / "val", "dog", 2)],
            "val has the class 'dog', which is missing in .*train",
        ),
        (
            lambda root: class_folder(root / "train", "cat", 2),
            "photos has `train` but no `test`; add `test`, or give .*train as",
        ),
    ],
)
def test_folders_without_what_is_needed_are_refused(tmp_path, make, message):
    make(tmp_path / "photos")
    with pytest.raises(ValueError, match=message):
        ImageFolder(str(tmp_path / "photos")).make_stream(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "ImageFolder: size is 0"),
        ({"mode": "CMYK"}, "ImageFolder: mode is 'CMYK'; use 'RGB', or 'L'"),
        ({"test_fraction": 0.0}, r"ImageFolder: test_fraction is 0\.0; it must be in \(0, 1\)"),
    ],
)
def test_options_of_folders_are_checked_by_the_constructor(options, message):
    with pytest.raises(ValueError, match=message):
        ImageFolder("photos", **options)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_damaged_file_is_told_before_training_or_left_out(tmp_path, in_memory):
    class_folder(tmp_path / "train", "a", 4)
    class_folder(tmp_path / "train", "b", 4, value=150)
    class_folder(tmp_path / "test", "a", 2)
    class_folder(tmp_path / "test", "b", 2)
    whole = (tmp_path / "train" / "a" / "001.png").read_bytes()
    (tmp_path / "train" / "a" / "001.png").write_bytes(whole[:-30])
    options = {"size": 4, "in_memory": in_memory, "scenario": ClassIncremental(tasks=2)}
    with pytest.raises(ValueError, match=r"ImageFolder: 1 of 8 files cannot be read: .*001\.png.*set skip_unreadable"):
        loop(ImageFolder(str(tmp_path), **options), tmp_path / "run").fit()
    assert not (tmp_path / "run").exists()
    data = ImageFolder(str(tmp_path), skip_unreadable=True, **options)
    with pytest.warns(UserWarning, match=r"001\.png.*They are left out"):
        stream = data.make_stream(0)
    assert [len(part) for part in stream.train] == [3, 4]


def test_damage_inside_a_file_that_is_not_kept_in_memory_is_found_where_files_are_skipped(tmp_path):
    class_folder(tmp_path, "a", 6)
    class_folder(tmp_path, "b", 6)
    path = tmp_path / "a" / "001.png"
    content = bytearray(path.read_bytes())
    content[60:80] = bytes(20)
    path.write_bytes(content)
    data = ImageFolder(str(tmp_path), size=4, in_memory=False, skip_unreadable=True)
    with pytest.warns(UserWarning, match=r"001\.png"):
        assert len(names_of(data, train=True) | names_of(data, train=False)) == 11


# ---------------------------------------------------------------------- folders that grow, through the loop


def folder_run(root: Path, run: Path, **options: Any) -> TaskLoop:
    data = ImageFolder(str(root), size=6, scenario=ClassIncremental(increment=2), batch_size=4, val_fraction=0.1)
    return loop(data, run, **options)


@pytest.mark.parametrize("new", [["ape"], ["ape", "zebra"]])
def test_class_folders_that_are_added_become_a_further_task_of_a_finished_run(tmp_path, new):
    for value, name in ((10, "cat"), (210, "dog")):
        class_folder(tmp_path / "data", name, value=value)
    first = folder_run(tmp_path / "data", tmp_path / "run")
    first.fit()
    assert first.matrix.learned == 1
    mean = first.datamodule.normalize.mean
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["ImageFolder"]["mean"] == list(mean)
    for place, name in enumerate(new):  # one name that comes before the others, and shifts their labels
        class_folder(tmp_path / "data", name, value=80 + 50 * place)
    second = folder_run(tmp_path / "data", tmp_path / "run")
    with pytest.raises(ValueError, match="holds a run already"):
        second.fit()
    second = folder_run(tmp_path / "data", tmp_path / "run")
    steps = []
    second.strategy.on_train_start = lambda: steps.append(second.strategy.task.index)  # type: ignore[method-assign]
    second.fit("last")
    assert steps == [1]
    assert second.stream.class_names == ("cat", "dog", *new)
    assert second.matrix.learned == 2
    assert second.matrix.R_ci[0, 0] == first.matrix.R_ci[0, 0]
    assert second.fingerprints[0] == first.fingerprints[0]
    assert second.datamodule.normalize.mean == mean
    # Nothing new: the run stays as it is.
    third = folder_run(tmp_path / "data", tmp_path / "run")
    assert third.fit("last").learned == 2


def test_an_extended_run_can_be_stopped_and_resumed(tmp_path):
    for value, name in ((10, "cat"), (210, "dog")):
        class_folder(tmp_path / "data", name, value=value)
    folder_run(tmp_path / "data", tmp_path / "run").fit()
    class_folder(tmp_path / "data", "ape", value=100)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    whole = folder_run(tmp_path / "data", tmp_path / "run")
    whole.fit("last")

    stopped = folder_run(tmp_path / "data", tmp_path / "other", save_every_n_steps=1)
    save, count = stopped.files.save, []

    def killed(*, needed: bool = True) -> Path | None:
        path = save(needed=needed)
        count.append(path)
        if len(count) == 2:
            raise KeyboardInterrupt
        return path

    stopped.files.save = killed  # type: ignore[method-assign]
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        stopped.fit("last")
    resumed = folder_run(tmp_path / "data", tmp_path / "other")
    resumed.fit("last")
    expected = whole.strategy.state_dict()
    assert all(value.equal(expected[name]) for name, value in resumed.strategy.state_dict().items())


def test_files_that_are_added_to_a_learnt_class_are_told(tmp_path):
    for value, name in ((10, "cat"), (210, "dog")):
        class_folder(tmp_path / "data", name, value=value)
    folder_run(tmp_path / "data", tmp_path / "run").fit()
    for index in range(40, 50):
        image(10).save(tmp_path / "data" / "cat" / f"{index}.png")
    with pytest.raises(ValueError, match=r"task 0 \(task 0\) has other classes or other samples"):
        folder_run(tmp_path / "data", tmp_path / "run").fit("last")


# ---------------------------------------------------------------------- domains


def test_domains_are_tasks_and_new_ones_extend_the_stream(tmp_path):
    for domain, names in (("photo", "ab"), ("sketch", "abc")):
        for value, name in enumerate(names):
            class_folder(tmp_path / domain, name, 8, 40 * value)
    data = DomainFolder(str(tmp_path), size=4)
    stream = data.make_stream(0)
    assert [task.name for task in stream.tasks] == ["photo", "sketch"]
    assert stream.class_names == ("a", "b", "c")
    assert [task.num_new for task in stream.tasks] == [2, 1]
    assert isinstance(data.default_scenario(data.dataset_info()), DomainIncremental)
    class_folder(tmp_path / "art", "b", 8)
    later = DomainFolder(str(tmp_path), size=4)
    longer = later.make_stream(0, again(stream))
    assert [task.name for task in longer.tasks] == ["photo", "sketch", "art"]
    assert [later.fingerprint(task) for task in range(2)] == [data.fingerprint(task) for task in range(2)]
    assert names_of(data, train=False) <= names_of(later, train=False)


def test_domains_come_in_both_layouts_and_are_refused_where_empty(tmp_path):
    for part in ("train", "test"):
        for domain in ("x", "y"):
            class_folder(tmp_path / "split" / part / domain, "a", 3)
            class_folder(tmp_path / "split" / part / domain, "b", 3)
    stream = DomainFolder(str(tmp_path / "split"), size=4).make_stream(0)
    assert [len(part) for part in (*stream.train, *stream.test)] == [6, 6, 6, 6]
    class_folder(tmp_path / "split" / "test" / "z", "a", 3)
    with pytest.raises(ValueError, match=r"has the domain 'z', which is missing in .*train"):
        DomainFolder(str(tmp_path / "split"), size=4).make_stream(0)
    (tmp_path / "empty" / "x").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"DomainFolder: .*x holds no folders"):
        DomainFolder(str(tmp_path / "empty")).make_stream(0)
    with pytest.raises(ValueError, match="DomainFolder: no folder at"):
        DomainFolder(str(tmp_path / "nowhere")).make_stream(0)


# ---------------------------------------------------------------------- torchvision


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


# ---------------------------------------------------------------------- configurations


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
