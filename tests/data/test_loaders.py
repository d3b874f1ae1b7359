"""Plans share every batch out over the processes; loaders fetch the same batches however many workers they have."""

import time
from contextlib import closing
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cl_lightning.batch import Batch, Draw
from cl_lightning.data import MEMORY_ROWS, FileSource, Plan, StreamLoader, TensorSource
from cl_lightning.memory import Memory, Ring


def plan(count: int, batch_size: int, **options: object) -> Plan:
    return Plan(torch.arange(count) + 100, torch.arange(count) % 3, batch_size=batch_size, key=7, **options)


def tensors(count: int = 20, classes: int = 4) -> TensorSource:
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
    return TensorSource(images.contiguous(), np.arange(count) % classes, class_names=[str(c) for c in range(classes)])


@pytest.fixture(scope="module")
def picture_files(tmp_path_factory: pytest.TempPathFactory) -> FileSource:
    folder = tmp_path_factory.mktemp("files")
    chance = np.random.default_rng(0)
    paths = []
    for index in range(24):
        paths.append(folder / f"{index:02}.png")
        Image.fromarray(chance.integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(paths[-1])
    return FileSource(paths, np.arange(24) % 3, class_names=list("abc"), root=folder, size=6)


# ---------------------------------------------------------------------- plans


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(1, 40),
    batch_size=st.integers(1, 12),
    world=st.integers(1, 5),
    passes=st.integers(1, 3),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_the_shares_of_all_processes_are_the_batches_of_one(
    count, batch_size, world, passes, shuffle, drop_last, epoch
):
    options = {"passes": passes, "shuffle": shuffle, "drop_last": drop_last}
    single = list(plan(count, batch_size, **options).epoch(epoch))
    shares = [list(plan(count, batch_size, rank=r, world=world, **options).epoch(epoch)) for r in range(world)]
    assert {len(share) for share in shares} == {len(single)} == {len(plan(count, batch_size, **options))}
    for rows, *parts in zip(single, *shares, strict=True):
        assert torch.cat([part.indices for part in parts]).equal(rows.indices)
        assert torch.cat([part.tasks for part in parts]).equal(rows.tasks)
        assert torch.cat([part.draw.rand(2) for part in parts]).equal(rows.draw.rand(2))
        # A mean over processes of weighted means is the mean over the rows.
        assert sum(part.weight for part in parts) == pytest.approx(world)
        values = rows.indices.double()
        means = [part.indices.double().mean() * part.weight for part in parts if len(part.indices)]
        assert float(sum(means) / world) == pytest.approx(float(values.mean()))
        sizes = [len(part.indices) for part in parts]
        assert max(sizes) - min(sizes) <= 1


@settings(deadline=None)
@given(count=st.integers(0, 30), batch_size=st.integers(1, 8), world=st.integers(1, 5))
def test_processes_that_skip_empty_batches_miss_no_sample(count, batch_size, world):
    seen = []
    for rank in range(world):
        share = plan(count, batch_size, rank=rank, world=world, shuffle=False, skip_empty=True)
        rows = list(share.epoch(0))
        assert len(rows) == len(share)
        # Lightning leaves out the whole pass of a process that has no batch, while the others wait for it.
        assert len(rows) == 1 if 0 < count < world else all(len(row.indices) for row in rows)
        seen += [index for row in rows for index in row.indices.tolist()]
    assert sorted(seen) == list(range(100, 100 + count))


def test_an_epoch_has_every_sample_once_in_an_order_of_its_own():
    orders = [torch.cat([rows.indices for rows in plan(23, 5).epoch(epoch)]) for epoch in (0, 1, 0)]
    assert orders[0].sort().values.equal(torch.arange(23) + 100)
    assert not orders[0].equal(orders[1])
    assert orders[0].equal(orders[2])


def test_passes_repeat_a_batch_with_other_random_numbers():
    first, second, third = list(plan(6, 3, passes=2).epoch(0))[:3]
    assert first.indices.equal(second.indices)
    assert not first.indices.equal(third.indices)
    assert first.draw.key != second.draw.key


def test_an_epoch_can_begin_at_any_step():
    whole = list(plan(23, 5, passes=2).epoch(4))
    rest = list(plan(23, 5, passes=2).epoch(4, first=7))
    assert len(rest) == 3
    for expected, rows in zip(whole[7:], rest, strict=True):
        assert rows.indices.equal(expected.indices)
        assert rows.draw == expected.draw


@pytest.mark.parametrize(
    ("count", "drop_last", "sizes"),
    [(7, False, [3, 3, 1]), (7, True, [3, 3]), (2, True, [2]), (6, True, [3, 3]), (0, False, [])],
)
def test_a_last_batch_is_left_out_only_if_another_one_stays(count, drop_last, sizes):
    assert [len(rows.indices) for rows in plan(count, 3, drop_last=drop_last).epoch(0)] == sizes


# ---------------------------------------------------------------------- fetching


def same(first: Batch, second: Batch) -> bool:
    names = ("raw", "images", "labels", "tasks", "indices")
    equal = all(torch.equal(getattr(first, name), getattr(second, name)) for name in names)
    return equal and first.draw == second.draw and first.weight == second.weight


def test_labels_are_columns_and_hidden_ones_minus_one():
    source = tensors(8)
    hidden = torch.zeros(8, dtype=torch.bool)
    hidden[5] = True
    loader = StreamLoader(source, torch.tensor([2, 0, 1]), hidden=hidden)  # class 3 never comes
    (batch,) = loader.over(Plan(torch.arange(8), torch.zeros(8, dtype=torch.int64), batch_size=8, shuffle=False))
    assert batch.labels.tolist() == [2, 0, 1, -1, 2, -1, 1, -1]
    assert batch.raw[:, 0, 0, 0].tolist() == list(range(8))
    assert batch.raw is batch.images


def test_workers_change_nothing(picture_files):
    columns, indices = torch.tensor([1, 2, 0]), torch.randperm(24, generator=torch.Generator().manual_seed(0))
    results = []
    for workers in (0, 1, 2):
        loader = StreamLoader(picture_files, columns, shift=lambda images, tasks: images + 1, workers=workers)
        state = torch.get_rng_state()
        epochs = []
        for task in range(2):  # the workers live on from task to task
            pool = indices[task * 12 : task * 12 + 12]
            chosen = Plan(pool, torch.full((12,), task), batch_size=5, key=task)
            epochs += [list(loader.over(chosen, place=lambda epoch=epoch: (epoch, 0))) for epoch in range(2)]
        assert torch.get_rng_state().equal(state)
        results.append(epochs)
        loader.close()
    for other in results[1:]:
        for expected, batches in zip(results[0], other, strict=True):
            assert len(batches) == 3
            assert all(same(a, b) for a, b in zip(expected, batches, strict=True))
            assert all(batch.raw is batch.images for batch in batches)


def test_an_epoch_that_is_broken_off_does_not_leak_into_the_next(picture_files):
    loader = StreamLoader(picture_files, torch.arange(3), workers=2)
    chosen = Plan(torch.arange(24), torch.zeros(24, dtype=torch.int64), batch_size=3)
    planned = loader.over(chosen)
    for _ in range(3):
        iterator = iter(planned)
        next(iterator)
        del iterator
    direct = StreamLoader(picture_files, torch.arange(3)).over(chosen)
    assert all(same(a, b) for a, b in zip(planned, direct, strict=True))
    loader.close()


def test_workers_end_at_once_when_they_are_closed_and_start_again_when_needed(picture_files):
    loader = StreamLoader(picture_files, torch.arange(3), workers=2)
    planned = loader.over(Plan(torch.arange(24), torch.zeros(24, dtype=torch.int64), batch_size=3))
    before = set(active_children())
    for _ in range(2):
        batches = iter(planned)  # kept, as a Trainer keeps them
        next(batches)
        assert len(set(active_children()) - before) == 2
        start = time.monotonic()
        loader.close()
        assert not set(active_children()) - before
        assert time.monotonic() - start < 4
    loader.close()
    assert len(list(planned)) == 8


def test_an_error_of_a_worker_names_the_file(picture_files, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"x")
    source = FileSource([tmp_path / "bad.png"], [0], class_names=["a"], root=tmp_path)
    chosen = Plan(torch.arange(1), torch.zeros(1, dtype=torch.int64), batch_size=1)
    refused = pytest.raises(ValueError, match=r"bad\.png: not a readable image")
    with closing(StreamLoader(source, torch.arange(1), workers=1)) as loader, refused:
        list(loader.over(chosen))


def test_the_place_is_asked_for_when_an_epoch_begins():
    place = [(0, 0)]
    chosen = Plan(torch.arange(20), torch.zeros(20, dtype=torch.int64), batch_size=6)
    planned = StreamLoader(tensors(), torch.arange(4)).over(chosen, place=lambda: place[0])
    whole = list(planned)
    place[0] = (0, 2)
    assert all(same(a, b) for a, b in zip(planned, whole[2:], strict=True))
    place[0] = (1, 0)
    assert not same(next(iter(planned)), whole[0])


# ---------------------------------------------------------------------- memory among the data


def filled(count: int, shape: tuple[int, ...]) -> Memory:
    memory = Memory(count, Ring())
    images = (200 + torch.arange(count, dtype=torch.uint8))[:, None, None, None].expand(-1, *shape).contiguous()
    memory.add(images, torch.arange(count) + 50, torch.arange(count) + 30, Draw.of(count, 0))
    return memory


def test_samples_of_a_memory_are_mixed_with_the_data():
    memory = filled(7, (3, 4, 4))
    indices, tasks = torch.arange(27), torch.cat([torch.full((20,), 5), torch.full((7,), -1)])
    planned = StreamLoader(tensors(), torch.tensor([3, 2, 1, 0])).over(
        Plan(indices, tasks, batch_size=8), memory=memory
    )
    seen = []
    for batch in planned:
        replayed = batch.indices < 0
        values = batch.raw[:, 0, 0, 0].long()
        assert values[~replayed].equal(batch.indices[~replayed])
        assert batch.labels[~replayed].equal(3 - batch.indices[~replayed] % 4)
        assert (batch.tasks[~replayed] == 5).all()
        assert batch.labels[replayed].equal(values[replayed] - 150)
        assert batch.tasks[replayed].equal(values[replayed] - 170)
        assert batch.extra[MEMORY_ROWS].equal(torch.where(replayed, values - 200, -1))
        seen += values.tolist()
    assert sorted(seen) == [*range(20), *range(200, 207)]


def test_a_memory_is_mixed_equally_by_workers_and_over_processes(picture_files):
    memory = filled(9, (3, 6, 6))
    indices, tasks = torch.arange(33), torch.cat([torch.zeros(24, dtype=torch.int64), torch.full((9,), -1)])
    batches = {}
    for workers, world in ((0, 1), (2, 1), (0, 3)):
        loader = StreamLoader(picture_files, torch.arange(3), workers=workers)
        for rank in range(world):
            chosen = Plan(indices, tasks, batch_size=5, key=1, rank=rank, world=world)
            batches[workers, world, rank] = list(loader.over(chosen, memory=memory))
        loader.close()
    assert all(same(a, b) for a, b in zip(batches[0, 1, 0], batches[2, 1, 0], strict=True))
    for whole, *parts in zip(batches[0, 1, 0], *(batches[0, 3, rank] for rank in range(3)), strict=True):
        for name in ("raw", "labels", "tasks", "indices"):
            assert torch.cat([getattr(part, name) for part in parts]).equal(getattr(whole, name))


def test_a_batch_without_a_sample_of_the_data_is_fine(picture_files: FileSource, tmp_path: Path):
    memory = filled(4, (3, 6, 6))
    planned = StreamLoader(picture_files, torch.arange(3)).over(
        Plan(torch.arange(24, 28), torch.full((4,), -1), batch_size=2), memory=memory
    )
    assert sorted(value for batch in planned for value in batch.raw[:, 0, 0, 0].tolist()) == [200, 201, 202, 203]
