import functools
import os
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from cl_lightning import checksums
from cl_lightning.data import FeatureCache, FeatureStore, RandomCrop, RandomHorizontalFlip, TensorSource
from cl_lightning.data.feature_cache import identities
from cl_lightning.datamodules.base import ContinualDataModule
from cl_lightning.loop import LoopOptions, TaskLoop
from cl_lightning.models import MLP, Backbone
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.exemplar_free.fetril import FeTrIL
from cl_lightning.strategies.pretrained.ranpac import RanPAC
from cl_lightning.strategies.pretrained.simplecil import SimpleCIL
from cl_lightning.stream import ClassIncremental, RotatedDomains

SHAPE = (1, 4, 4)


class Counting(Backbone):
    """A fixed map of the pixels that counts the images it has seen."""

    seen = 0

    def __init__(self, image_shape, *, scale=1.0):
        super().__init__(image_shape)
        generator = torch.Generator().manual_seed(3)
        self.map = nn.Linear(16, 8, bias=False)
        self.map.weight.data = torch.randn(8, 16, generator=generator)
        self.scale, self.num_features = scale, 8

    def forward(self, images):
        if len(images) > 4:  # else it is a dry run, or FLOPs are counted
            Counting.seen += len(images)
        return (self.scale * self.map(images.flatten(1))).relu()


class Images(ContinualDataModule):
    """Six classes of noise around patterns of their own; 20 training and 7 test images each."""

    mean, std = (0.5,), (0.5,)

    def __init__(self, *, shade=0, **options):
        super().__init__(
            **{"scenario": ClassIncremental(increment=2), "batch_size": 8, "eval_batch_size": 14, **options}
        )
        self.shade = shade

    def source(self, *, train):
        rng, count = np.random.default_rng(train), 20 if train else 7
        patterns = np.random.default_rng(7).integers(0, 120, (6, 1, *SHAPE))
        images = patterns + rng.integers(0, 100, (6, count, *SHAPE)) + self.shade
        return TensorSource(images.reshape(-1, *SHAPE).astype(np.uint8), np.arange(6).repeat(count))


def run(strategy, cache, *, data=None, epochs=1, seed=0, **options):
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loop = TaskLoop(
        trainer,
        strategy,
        data or Images(),
        options=LoopOptions(feature_cache=None if cache is None else str(cache), **options),
        seed=seed,
    )
    Counting.seen = 0
    loop.fit()
    return loop.matrix.R_ci.clone(), Counting.seen


def simple(**options):
    return SimpleCIL(backbone=functools.partial(Counting, **options))


TRAIN, TEST, ALL_TESTS = 6 * 20, 6 * 7, 2 * 7 + 4 * 7 + 6 * 7


def test_each_image_passes_once_per_stream_and_not_at_all_in_the_next_run(tmp_path):
    expected, seen = run(simple(), None)
    assert seen == TRAIN + ALL_TESTS
    found, seen = run(simple(), tmp_path)
    assert seen == TRAIN + TEST
    assert torch.equal(found.nan_to_num(-1), expected.nan_to_num(-1))
    found, seen = run(simple(), tmp_path)
    assert seen == 0
    assert torch.equal(found.nan_to_num(-1), expected.nan_to_num(-1))


def test_kept_in_memory_it_lasts_as_long_as_the_run():
    assert run(simple(), "memory")[1] == TRAIN + TEST
    assert run(simple(), "memory")[1] == TRAIN + TEST


@pytest.mark.parametrize(
    "other",
    [
        lambda folder: run(simple(), folder, seed=5, data=Images(scenario=ClassIncremental(tasks=2, class_order=3))),
        lambda folder: run(RanPAC(backbone=Counting, projection=30, ridge=1.0, adapt=False), folder),
    ],
    ids=["another class order, seed and cut", "another method"],
)
def test_other_runs_on_the_same_backbone_start_at_once(tmp_path, other):
    run(simple(), tmp_path)
    assert other(tmp_path)[1] == 0


@pytest.mark.parametrize(
    "other",
    [
        lambda folder: run(simple(scale=2.0), folder),
        lambda folder: run(simple(), folder, data=Images(mean=[0.2], std=[0.5])),
        lambda folder: run(simple(), folder, data=Images(shade=1)),
    ],
    ids=["another backbone with the same weights", "another scaling", "other pixels"],
)
def test_what_would_give_other_features_does_not_find_them(tmp_path, other):
    run(simple(), tmp_path)
    assert other(tmp_path)[1] == TRAIN + TEST


def test_a_linear_head_is_trained_on_stored_features(tmp_path):
    def probe():
        return Finetune(backbone=Counting, freeze_backbone=True)

    expected, seen = run(probe(), None, epochs=3)
    assert seen == 3 * TRAIN + ALL_TESTS
    found, seen = run(probe(), tmp_path, epochs=3)
    assert seen == TRAIN + TEST
    torch.testing.assert_close(found, expected, equal_nan=True, atol=0.08, rtol=0)
    assert run(probe(), tmp_path, epochs=3)[1] == 0


def test_a_loss_of_a_subclass_still_sees_images(tmp_path):
    class Looking(Finetune):
        def losses(self, batch, output):
            assert batch.images.ndim == 4
            return super().losses(batch, output)

    _, seen = run(Looking(backbone=Counting, freeze_backbone=True), tmp_path, epochs=2)
    assert seen == 2 * TRAIN + TEST


def test_augmented_images_and_domains_and_networks_that_learn_are_not_stored(tmp_path):
    data = Images(transforms=[RandomHorizontalFlip()])
    assert run(Finetune(backbone=Counting, freeze_backbone=True), tmp_path, data=data, epochs=2)[1] == 2 * TRAIN + TEST
    assert run(Finetune(backbone=Counting), tmp_path / "a", epochs=2)[1] == 2 * TRAIN + ALL_TESTS
    data = Images(scenario=RotatedDomains(degrees=[0, 40]))
    assert run(simple(), tmp_path / "b", data=data)[1] > TRAIN + TEST
    assert not (tmp_path / "a").exists()


def test_views_that_stay_are_seen_once(tmp_path):
    def learnt(views, epochs=4, cache=tmp_path, **options):
        data = Images(transforms=[RandomCrop(1), RandomHorizontalFlip()], **options)
        strategy = Finetune(backbone=Counting, freeze_backbone=True)
        return run(strategy, cache, data=data, epochs=epochs, feature_views=views)

    first, seen = learnt(2)
    assert seen == 2 * TRAIN + TEST  # and 4 epochs
    again, seen = learnt(2)
    assert seen == 0
    torch.testing.assert_close(again, first, equal_nan=True)
    assert learnt(3)[1] == TRAIN  # the third view alone
    assert learnt(1, epochs=1, batch_size=5)[1] == 0  # views are those of an image, in whatever batch
    assert learnt(1, epochs=1, seed=5)[1] == TRAIN  # of another seed
    assert learnt(0)[1] == 4 * TRAIN


def test_views_differ_from_one_another_and_come_back():
    strategy = Finetune(backbone=Counting, freeze_backbone=True)
    trained = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            trained.append((batch.indices, pl_module.passes.features_of(batch, pl_module.network, None).detach()))

    trainer = Trainer(
        max_epochs=5,
        accelerator="cpu",
        logger=False,
        callbacks=[Watch()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = Images(transforms=[RandomCrop(1)], scenario=ClassIncremental(tasks=1))
    TaskLoop(trainer, strategy, data, options=LoopOptions(feature_cache="memory", feature_views=2)).fit()
    steps = len(trained) // 5
    epochs = []
    for epoch in range(5):
        indices, features = (torch.cat(part) for part in zip(*trained[epoch * steps :][:steps], strict=True))
        epochs.append(features[indices.argsort()])
    torch.testing.assert_close(epochs[0], epochs[2])
    torch.testing.assert_close(epochs[1], epochs[3])
    torch.testing.assert_close(epochs[0], epochs[4])
    assert (epochs[0] != epochs[1]).any(dim=1).float().mean() > 0.5


def test_views_without_a_place_to_keep_them_are_refused():
    with pytest.raises(ValueError, match="feature_views is 2 and feature_cache null"):
        LoopOptions(feature_views=2)


def test_a_backbone_that_is_frozen_after_the_first_task_is_seen_once_from_then_on():
    def fetril():
        return FeTrIL(backbone=functools.partial(MLP, hidden=[12]))

    expected, _ = run(fetril(), None, epochs=2)
    found, _ = run(fetril(), "memory", epochs=2)
    torch.testing.assert_close(found, expected, equal_nan=True, atol=0.08, rtol=0)


def store(folder=None, room=10**9, probe=0.0):
    return FeatureStore(3, folder, torch.full((2, 3), probe), room)


def test_a_store_gives_back_what_it_was_given(tmp_path):
    first = store(tmp_path)
    keys, rows = torch.tensor([5, -7, 2**62]), torch.arange(9.0).view(3, 3)
    first.add(keys[:2], rows[:2])
    before = first.table()
    first.add(keys, rows)  # some of them again
    assert torch.equal(first.table().take(keys.flip(0)), rows.flip(0))
    assert first.table().has(torch.tensor([5, 6])).tolist() == [True, False]
    assert before.has(keys).tolist() == [True, True, False]  # of its moment
    first.write()
    again = store(tmp_path)
    assert torch.equal(again.table().take(keys), rows)
    assert len(again) == 3
    assert again.write() == 0
    assert len(store(tmp_path, probe=1.0)) == 0  # of a backbone that gives other features


def test_damaged_files_are_left_out_and_reported(tmp_path):
    for key in range(3):
        one = store(tmp_path)
        one.add(torch.tensor([key]), torch.full((1, 3), float(key)))
        one.write()
    torn, flipped, _ = sorted(tmp_path.glob("*.pt"))
    torn.write_bytes(torn.read_bytes()[:-300])
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    with pytest.warns(UserWarning, match="left out"):
        assert len(store(tmp_path)) == 1


def test_two_that_write_at_once_lose_nothing(tmp_path):
    def write(first):
        for key in range(first, first + 20):
            one = store(tmp_path)
            one.add(torch.tensor([key]), torch.full((1, 3), float(key)))
            one.write()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        threads = [threading.Thread(target=write, args=(first,)) for first in (0, 100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(store(tmp_path)) == 40
    assert not list(tmp_path.glob(".*"))


def test_a_store_takes_no_more_than_there_is_room_for(tmp_path):
    small = store(tmp_path, room=24)
    small.add(torch.arange(2), torch.ones(2, 3))
    small.add(torch.arange(2, 4), torch.ones(2, 3))
    assert len(small) == 2


def test_folders_used_the_longest_ago_make_room(tmp_path):
    def use(scale, size):
        cache = FeatureCache(tmp_path, size)
        net = Counting(SHAPE)
        with torch.no_grad():
            net.map.weight.mul_(scale)
        made = cache.store(net, net, SHAPE, "")
        made.add(torch.arange(50), torch.ones(50, 8))
        cache.close()
        return made.folder

    first, second = use(1.0, 10**6), use(2.0, 10**6)
    assert first.is_dir()
    third = use(3.0, sum(path.stat().st_size for path in second.iterdir()) * 2)
    assert not first.exists()
    assert second.is_dir()
    assert third.is_dir()


def test_a_folder_that_cannot_be_written_to_is_reported_and_the_run_continues(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be written"):
        found, _ = run(simple(), tmp_path / "file")
    assert torch.isfinite(found[2]).all()


def test_images_are_distinguished_by_their_pixels_wherever_they_are():
    images = torch.randint(0, 256, (6, 3, 5, 5), dtype=torch.uint8)
    first = identities(TensorSource(images, np.zeros(6, dtype=int)))
    again = identities(TensorSource(images.flip(0), np.zeros(6, dtype=int)))
    assert torch.equal(again.flip(0), first)
    assert len(first.unique()) == 6


def test_samples_that_cannot_be_distinguished_are_refused():
    class Other:
        pass

    with pytest.raises(ValueError, match="feature_cache"):
        identities(Other())


def test_a_bound_below_nothing_is_refused():
    with pytest.raises(ValueError, match="feature_cache_gb"):
        LoopOptions(feature_cache_gb=0)


def test_files_are_distinguished_by_what_they_are(tmp_path: Path):
    from PIL import Image

    from cl_lightning.datamodules.folder import ImageFolder

    for name in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / name).mkdir(parents=True)
        for index in range(3):
            Image.new("L", (5, 5), 20 * index + len(name)).save(tmp_path / name / f"{index}.png")
    data = ImageFolder(str(tmp_path), in_memory=False, size=5)
    source = data.samples(train=True)
    first = identities(source)
    assert len(first.unique()) == 6
    Image.new("L", (5, 5), 250).save(source.paths[2])
    changed = identities(source) != first
    assert changed.tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda part: [1], "not a file of features"),
        (lambda part: {**part, "format": 9}, "not a file of features of this version"),
        (lambda part: {"format": 1}, "its keys are not a list of integers"),
        (lambda part: {**part, "keys": part["keys"].float()}, "its keys are not"),
        (lambda part: {**part, "rows": part["rows"][:, :2]}, "its rows are not 4 rows of 3 features"),
        (lambda part: {**part, "rows": part["rows"][1:]}, "its rows are not 4 rows"),
        (lambda part: {**part, "rows": part["rows"] * float("nan")}, "nan or infinite"),
        (lambda part: {**part, "probe": 3}, "its probe is not a tensor"),
    ],
)
def test_a_whole_file_of_other_content_is_left_out_and_named(tmp_path, change, reason):
    part = {"format": 1, "keys": torch.arange(4), "rows": torch.ones(4, 3), "probe": torch.zeros(2, 3)}
    for name, content in (("right", part), ("wrong", change(part))):
        torch.save(content, tmp_path / f"{name}.pt")
        checksums.seal(tmp_path / f"{name}.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.warns(UserWarning, match=rf"{tmp_path}/wrong.pt cannot be used and is left out: .*{reason}"):
        assert len(store(tmp_path)) == 4


def test_features_that_are_not_finite_are_not_stored(tmp_path):
    made = store(tmp_path)
    rows = torch.ones(3, 3)
    rows[1, 2] = float("nan")
    made.add(torch.arange(3), rows)
    assert made.table().has(torch.arange(3)).tolist() == [True, False, True]
    made.write()
    assert len(store(tmp_path)) == 2
