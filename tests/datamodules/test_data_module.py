"""The base class of data modules, and streams that are continued."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.data_modules import Toy, again, begun
from torch.nn import functional as F

from cl_lightning.batch import Draw
from cl_lightning.data import (
    RandomCrop,
    RandomHorizontalFlip,
    RandomResizedCrop,
    TensorSource,
    permute_pixels,
    rotate_images,
)
from cl_lightning.memory import Memory, Ring
from cl_lightning.stream import (
    ClassIncremental,
    LabelFraction,
    Online,
    PermutedDomains,
    RotatedDomains,
)


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
