import copy
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes

from cl_lightning.batch import Draw, cat
from cl_lightning.memory import (
    ClassBalanced,
    HerdingPolicy,
    Memory,
    Policy,
    Reservoir,
    Ring,
    herding_indices,
    herding_per_class,
    valid_columns,
)

SHAPE = (1, 2, 2)
POLICIES: list[Policy] = [Reservoir(), ClassBalanced(), Ring(), HerdingPolicy()]


def samples(first: int, last: int, num_classes: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Samples ``first .. last - 1`` of a stream, each known by its pixels."""
    number = torch.arange(first, last)
    images = torch.stack([number % 256, number // 256, number % 7, number % 5], 1).to(torch.uint8).view(-1, *SHAPE)
    return images, number % num_classes, number // 10


def numbers(memory: Memory) -> list[int]:
    """Which samples of the stream the memory holds, in ascending order."""
    if len(memory) == 0:
        return []
    pixels = memory.images.flatten(1).long()
    return sorted((pixels[:, 0] + 256 * pixels[:, 1]).tolist())


def feed(memory: Memory, total: int, batch_size: int, seed: int = 0, num_classes: int = 3, start: int = 0) -> Memory:
    for first in range(start, total, batch_size):
        last = min(first + batch_size, total)
        memory.add(*samples(first, last, num_classes), Draw.of(last - first, seed, first))
    return memory


def same_state(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Scripted(Reservoir):
    """Keys given by the test."""

    def __init__(self, keys: Sequence[int]) -> None:
        self.script = torch.tensor(keys)

    def keys(self, count: int, seen: int, draw: Draw) -> Tensor:
        return self.script[seen : seen + count]


class ScriptedBalance(ClassBalanced):
    def __init__(self, keys: Sequence[int]) -> None:
        super().__init__()
        self.script = torch.tensor(keys)

    def keys(self, count: int, seen: int, draw: Draw) -> Tensor:
        return self.script[seen : seen + count]


# which samples are kept


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_reservoir_keeps_each_of_three_samples_equally_often_over_all_orders_of_keys(
    size: int, batch_size: int
) -> None:
    times = torch.zeros(3)
    for keys in itertools.permutations(range(3)):
        for number in numbers(feed(Memory(size, Scripted(keys)), 3, batch_size)):
            times[number] += 1
    assert times.tolist() == [6 * size / 3] * 3


@pytest.mark.parametrize(("size", "total", "batch_size"), [(1, 3, 1), (3, 4, 2), (4, 12, 5), (4, 12, 12), (4, 12, 1)])
def test_reservoir_keeps_every_position_with_probability_m_over_n(size: int, total: int, batch_size: int) -> None:
    trials, times = 1000, torch.zeros(total, dtype=torch.float64)
    for trial in range(trials):
        times[numbers(feed(Memory(size), total, batch_size, seed=trial))] += 1
    chance = size / total
    assert times.sum() == trials * size
    # sizes are fixed, so counts are negatively correlated: this sum is chi-square with total - 1 degrees of freedom
    statistic = ((times - trials * chance) ** 2).sum() / (trials * chance * (1 - chance)) * (total - 1) / total
    degrees = total - 1
    limit = degrees * (1 - 2 / (9 * degrees) + 3.09 * math.sqrt(2 / (9 * degrees))) ** 3  # 99.9 % (Wilson-Hilferty)
    assert statistic < limit
    assert (times[:size] / trials - chance).abs().max() < 4 * math.sqrt(chance * (1 - chance) / trials)


def test_reservoir_keeps_every_pair_equally_often() -> None:
    pairs = dict.fromkeys(itertools.combinations(range(5), 2), 0)
    for trial in range(2000):
        pairs[tuple(numbers(feed(Memory(2), 5, 2, seed=trial)))] += 1  # type: ignore[index]
    deviation = sum((times - 200) ** 2 / 200 for times in pairs.values())
    assert deviation < 27.88  # 99.9 % quantile of chi-square with 9 degrees of freedom


@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(0, 9),
    batch_size=st.integers(1, 12),
    keys=st.lists(st.integers(-99, 99), min_size=1, max_size=25, unique=True),
)
def test_reservoir_holds_the_largest_keys_for_any_batch_size(size: int, batch_size: int, keys: list[int]) -> None:
    memory = feed(Memory(size, Scripted(keys)), len(keys), batch_size)
    best = sorted(range(len(keys)), key=lambda number: -keys[number])[:size]
    assert numbers(memory) == sorted(best)
    assert len(memory) == min(size, len(keys))


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 9), batch_size=st.integers(1, 12), data=st.data())
def test_class_balanced_content_does_not_depend_on_order_or_batch_size(
    size: int, batch_size: int, data: st.DataObject
) -> None:
    labels = torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=25)))
    keys = torch.tensor(data.draw(st.permutations(range(len(labels)))))
    images, _, tasks = samples(0, len(labels))

    level = [int(((labels == label) & (keys > key)).sum()) for label, key in zip(labels, keys, strict=True)]
    expected = sorted(range(len(labels)), key=lambda number: (level[number], -int(keys[number])))[:size]
    for order in (torch.arange(len(labels)), torch.arange(len(labels)).flip(0)):
        memory = Memory(size, ScriptedBalance(keys[order].tolist()))
        for rows in torch.split(order, batch_size):
            memory.add(images[rows], labels[rows], tasks[rows], Draw.of(len(rows), 0))
        assert numbers(memory) == sorted(expected)


@settings(deadline=None, max_examples=60)
@given(
    policy=st.sampled_from([ClassBalanced(), Ring(), HerdingPolicy()]),
    size=st.integers(0, 12),
    batch_size=st.integers(1, 9),
    labels=st.lists(st.integers(0, 5), max_size=40),
)
def test_counts_differ_by_at_most_one_among_classes_that_delivered_enough(
    policy: Policy, size: int, batch_size: int, labels: list[int]
) -> None:
    memory = Memory(size, policy)
    images, _, tasks = samples(0, len(labels))
    column = torch.tensor(labels, dtype=torch.int64)
    for rows in torch.split(torch.arange(len(labels)), batch_size):
        memory.add(images[rows], column[rows], tasks[rows], Draw.of(len(rows), 3, len(memory)))
    offered, counts = torch.bincount(column, minlength=6), memory.counts(6)
    assert int(counts.sum()) == len(memory) == min(size, len(labels))
    assert (counts <= offered).all()
    short = counts < offered  # these could have had more
    if short.any():
        assert counts.max() - counts[short].min() <= 1


def test_class_balanced_is_uniform_within_a_class() -> None:
    times = torch.zeros(40, dtype=torch.float64)
    for trial in range(800):
        times[numbers(feed(Memory(8, ClassBalanced()), 40, 7, seed=trial, num_classes=2))] += 1
    statistic = ((times - 160) ** 2).sum() / (160 * 0.8)
    assert statistic < 38 + 3.1 * math.sqrt(2 * 38)


def test_ring_holds_the_latest_samples_of_each_group() -> None:
    assert numbers(feed(Memory(6, Ring()), 20, 4)) == [14, 15, 16, 17, 18, 19]
    assert numbers(feed(Memory(4, Ring(by="task")), 20, 3)) == [8, 9, 18, 19]
    assert numbers(feed(Memory(6, Ring(by="both")), 20, 3, num_classes=2)) == [8, 9, 16, 17, 18, 19]


def test_balance_by_class_and_task_counts_each_pair() -> None:
    memory = feed(Memory(8, ClassBalanced(by="both")), 40, 7, num_classes=2)
    pairs = memory.tasks * 2 + memory.labels
    assert torch.bincount(pairs).tolist() == [1] * 8


def test_no_memory_keeps_nothing_and_returns_nothing() -> None:
    memory = feed(Memory(0), 10, 3)
    memory.replace(*samples(0, 4), Draw.of(4, 0), gathered=True)
    batch = memory.sample(5, Draw.of(4, 0))
    assert len(memory) == len(batch) == memory.num_bytes() == 0
    assert memory.counts(3).tolist() == [0, 0, 0]
    now = memory.sample(1, Draw.of(4, 1)).replace(
        **dict(zip(("images", "labels", "tasks"), samples(0, 4), strict=True))
    )
    now = now.replace(raw=now.images, indices=torch.arange(4))
    assert torch.equal(cat([now, batch]).images, now.images)
    memory.reduce_per_class(1)
    memory.resize(3)
    assert len(feed(memory, 10, 3)) == 3


# reading


def test_sample_is_without_replacement_and_uniform() -> None:
    memory = feed(Memory(10), 10, 10)
    times = torch.zeros(10, dtype=torch.float64)
    for step in range(1500):
        batch = memory.sample(4, Draw.of(4, step))
        picked = batch.images.flatten(1)[:, 0].long()
        assert len(picked.unique()) == 4  # type: ignore[no-untyped-call]
        times[picked] += 1
    assert ((times - 600) ** 2).sum() / (600 * 0.6) * 0.9 < 27.88
    assert numbers(memory) == sorted(memory.sample(99, Draw.of(4, 0)).images.flatten(1)[:, 0].tolist())


def test_sample_keeps_the_fields_of_a_sample_together() -> None:
    memory = Memory(20)
    for first in range(0, 60, 6):
        images, labels, tasks = samples(first, first + 6)
        memory.add(images, labels, tasks, Draw.of(6, first), logits=images.flatten(1).double(), score=labels * 2)
    batch = memory.sample(8, Draw.of(8, 1))
    pixels = batch.raw.flatten(1)
    assert batch.raw is batch.images
    assert batch.images.dtype == torch.uint8
    assert torch.equal(batch.labels, (pixels[:, 0] % 3).long())
    assert torch.equal(batch.tasks, (pixels[:, 0] // 10).long())
    assert torch.equal(batch.extra["logits"], pixels.double())
    assert torch.equal(batch.extra["score"], batch.labels * 2)
    assert (batch.indices == -1).all()
    assert batch.weight == 1


def test_sample_filters_by_class_and_task() -> None:
    memory = feed(Memory(40), 40, 8)
    batch = memory.sample(99, Draw.of(8, 0), classes=[0, 2], tasks=range(2))
    assert sorted(batch.images.flatten(1)[:, 0].tolist()) == [n for n in range(20) if n % 3 != 1]
    assert len(memory.sample(5, Draw.of(8, 0), tasks=[7])) == 0
    assert len(memory.sample(5, Draw.of(8, 0), classes=[])) == 0


@pytest.mark.parametrize("classes", [None, [0, 1]])
def test_shares_of_a_draw_are_together_the_sample_of_one_process(classes: list[int] | None) -> None:
    memory = feed(Memory(30), 50, 10)
    whole = memory.sample(7, Draw.of(10, 5), classes=classes)
    parts = [Draw(Draw.of(10, 5).key, start, stop, 10) for start, stop in ((0, 4), (4, 7), (7, 10))]
    shares = [memory.sample(7, part, classes=classes) for part in parts]
    assert torch.equal(torch.cat([share.images for share in shares]), whole.images)
    noise = [share.draw.rand(2) for share in shares]
    assert torch.equal(torch.cat(noise), whole.draw.rand(2))


def test_a_draw_gives_the_same_samples_and_its_fork_others() -> None:
    memory, draw = feed(Memory(200), 200, 50), Draw.of(16, 1)
    first = memory.sample(16, draw).images
    assert torch.equal(first, memory.sample(16, draw).images)
    assert not torch.equal(first, memory.sample(16, draw.fork(1)).images)


def test_gather_returns_the_given_rows() -> None:
    memory, rows = feed(Memory(9), 30, 4), torch.tensor([3, 3, 0])
    images, labels, tasks = memory.gather(rows)
    assert torch.equal(images, memory.images[rows])
    assert torch.equal(labels, memory.labels[rows])
    assert torch.equal(tasks, memory.tasks[rows])


def test_bytes_count_what_is_held() -> None:
    memory = Memory(50)
    images, labels, tasks = samples(0, 20)
    memory.add(images, labels, tasks, Draw.of(20, 0), logits=torch.zeros(20, 3))
    assert memory.num_bytes() == 20 * (4 + 3 * 8 + 3 * 4)


# fields


def test_logits_that_grow_with_the_classes_are_padded_with_nan() -> None:
    memory = Memory(6, Ring(by="task"))
    for task, width in enumerate((2, 4, 3)):
        images, labels, _ = samples(10 * task, 10 * task + 5)
        logits = torch.full((5, width), float(task))
        memory.add(images, labels, torch.full((5,), task), Draw.of(5, task), logits=logits)
    logits = memory.fields["logits"]
    assert logits.shape == (6, 4)
    for task, width in enumerate((2, 4, 3)):
        rows = logits[memory.tasks == task]
        assert valid_columns(rows).tolist() == [[column < width for column in range(4)]] * 2
        assert (rows[:, :width] == task).all()


def test_stored_numbers_keep_their_type_when_the_module_is_cast() -> None:
    memory = Memory(4)
    memory.add(*samples(0, 4), Draw.of(4, 0), logits=torch.full((4, 2), 1 / 3))
    module = nn.ModuleDict({"memory": memory}).to(torch.bfloat16)
    assert memory.fields["logits"].dtype == torch.float32
    assert module["memory"].state_dict()["logits"][0, 0] == torch.tensor(1 / 3)


def test_memory_is_not_a_buffer_that_would_be_broadcast_at_every_step() -> None:
    assert not list(feed(Memory(4), 8, 4).buffers())


# changing


def test_a_cut_reservoir_is_a_reservoir_of_that_size() -> None:
    large = feed(Memory(20), 100, 9)
    large.resize(7)
    assert numbers(large) == numbers(feed(Memory(7), 100, 9))
    feed(large, 150, 9, start=100)
    assert numbers(large) == numbers(feed(feed(Memory(7), 100, 9), 150, 9, start=100))
    large.resize(0)
    assert len(large) == 0


def test_a_grown_memory_keeps_what_it_holds_and_takes_more() -> None:
    memory = feed(Memory(5), 50, 9)
    held = numbers(memory)
    memory.resize(8)
    assert numbers(memory) == held
    assert len(feed(memory, 53, 3, start=50)) == 8


def test_replace_changes_only_the_classes_given() -> None:
    memory = feed(Memory(12, HerdingPolicy()), 12, 12)
    memory.replace(*samples(100, 101), Draw.of(1, 0))  # of class 1
    assert numbers(memory) == [n for n in range(12) if n % 3 != 1] + [100]


def test_herded_lists_lose_their_ends_as_classes_arrive() -> None:
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images, labels, tasks = samples(0, 40, num_classes=4)
    memory = Memory(11, HerdingPolicy())
    for classes in ((0, 1), (2, 3)):
        old = (labels == classes[0]) | (labels == classes[1])
        rows = old.nonzero().flatten()
        rows = rows[herding_per_class(features[rows], labels[rows], quota=8)]
        memory.add(images[rows], labels[rows], tasks[rows], Draw.of(len(rows), 0), gathered=True)
    assert memory.counts().tolist() == [3, 3, 3, 2]  # the remainder goes to the classes that came first
    memory.reduce_per_class(2)
    for label in range(4):
        members = (labels == label).nonzero().flatten()
        assert torch.equal(memory.images[memory.rows_of(label)], images[members[herding_indices(features[members], 2)]])


def test_reduce_per_class_leaves_each_class_its_largest_keys() -> None:
    memory = feed(Memory(30), 90, 8)
    best = {label: memory.keys[memory.rows_of(label)][:4] for label in range(3)}
    memory.reduce_per_class(4)
    assert all(torch.equal(memory.keys[memory.rows_of(label)], best[label]) for label in range(3))


# state


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("seen", [0, 5, 40])
def test_a_restored_memory_is_equal_and_stays_equal(policy: Policy, seen: int, tmp_path: Path) -> None:
    def more(memory: Memory, first: int, last: int) -> None:
        for start in range(first, last, 5):
            images, labels, tasks = samples(start, start + 5)
            memory.add(images, labels, tasks, Draw.of(5, start), logits=images.flatten(1).float())

    whole = nn.ModuleDict({"memory": Memory(12, policy)})
    more(whole["memory"], 0, seen)  # type: ignore[arg-type]
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    fresh = nn.ModuleDict({"memory": Memory(99, policy)})
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    assert same_state(whole.state_dict(), fresh.state_dict())
    for module in (whole, fresh):
        more(module["memory"], seen, seen + 30)  # type: ignore[arg-type]
    assert same_state(whole.state_dict(), fresh.state_dict())
    draw = Draw.of(8, 9)
    one, other = (module["memory"].sample(8, draw) for module in (whole, fresh))  # type: ignore[operator]
    assert torch.equal(one.images, other.images)


def test_state_of_an_empty_memory_empties_a_filled_one() -> None:
    memory = feed(Memory(5), 20, 4)
    memory.load_state_dict(Memory(5).state_dict(), strict=True)
    assert len(memory) == int(memory.num_seen) == 0


def test_saved_state_holds_only_what_is_held_and_does_not_change_later(tmp_path: Path) -> None:
    memory = feed(Memory(100_000), 10, 5)
    state = memory.state_dict()
    before = copy.deepcopy(state)
    torch.save(state, tmp_path / "state.pt")
    assert (tmp_path / "state.pt").stat().st_size < 10_000
    feed(memory, 30, 5, start=10)
    assert same_state(state, before)


def test_damaged_state_is_an_error() -> None:
    state = feed(Memory(5), 20, 4).state_dict()
    with pytest.raises(RuntimeError, match="keys"):
        Memory(5).load_state_dict({name: value for name, value in state.items() if name != "keys"})
    with pytest.raises(RuntimeError, match="damaged"):
        Memory(5).load_state_dict({**state, "labels": state["labels"][:2]})


# errors, configuration, devices, processes


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="size is -1"):
        Memory(-1)
    with pytest.raises(ValueError, match="size is -2"):
        Memory(3).resize(-2)
    with pytest.raises(ValueError, match="policy is 'random'"):
        Memory(3, policy="random")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'gpu'"):
        Memory(3, device="gpu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="by is 'colour'"):
        ClassBalanced(by="colour")  # type: ignore[arg-type]
    memory, draw = feed(Memory(5), 5, 5), Draw.of(4, 0)
    images, labels, tasks = samples(0, 4)
    with pytest.raises(ValueError, match=r"\(3, 2, 2\) given, \(1, 2, 2\) held"):
        memory.add(images.expand(-1, 3, -1, -1), labels, tasks, draw)
    with pytest.raises(ValueError, match=r"labels \(3,\), images \(4, 1, 2, 2\)"):
        memory.add(images, labels[:3], tasks, draw)
    with pytest.raises(ValueError, match="raw uint8"):
        memory.add(images.float(), labels, tasks, draw)
    with pytest.raises(ValueError, match="the memory holds"):
        memory.add(images, labels, tasks, draw, logits=torch.zeros(4, 2))
    with pytest.raises(ValueError, match="which the memory uses itself"):
        memory.add(images, labels, tasks, draw, keys=labels)


def test_a_memory_is_configured_by_class_path() -> None:
    parser = ArgumentParser()
    parser.add_argument("--memory", type=Memory)
    policy = {"class_path": "cl_lightning.memory.Ring", "init_args": {"by": "task"}}
    given_args = {"class_path": "cl_lightning.memory.Memory", "init_args": {"size": 7, "policy": policy}}
    memory = parser.instantiate(parser.parse_object({"memory": given_args})).memory
    assert memory.size == 7
    assert isinstance(memory.policy, Ring)
    assert memory.policy.by == "task"


def test_host_memory_stays_on_the_host_and_samples_move_to_the_module() -> None:
    memory = feed(Memory(6, device="cpu"), 20, 4)
    memory.to("meta")
    assert memory.images.device.type == "cpu"
    assert memory.sample(3, Draw.of(3, 0)).images.device.type == "meta"
    memory = feed(Memory(6), 20, 4)
    memory.to("meta")
    assert memory.images.device.type == "meta"


def fill(memory: Memory, start: float, stop: float) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Run a stream of which this process sees the given part of each batch; its state and what was sampled."""
    drawn = []
    for step, total in enumerate((8, 7, 1, 6, 8, 8)):
        part = Draw(Draw.of(total, step).key, round(start * total), round(stop * total), total)
        images, labels, tasks = (rows[part.start : part.stop] for rows in samples(8 * step, 8 * step + total))
        memory.add(images, labels, tasks, part, logits=images.flatten(1).float())
        drawn.append(memory.sample(5, part).images)
    mine = labels == 1  # not equally many on both processes
    memory.replace(images[mine], labels[mine], tasks[mine], part.fork(1), logits=images[mine].flatten(1).float())
    return memory.state_dict(), drawn


def run_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = [fill(Memory(11, policy), rank / 2, (rank + 1) / 2) for policy in POLICIES]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_with_half_batches_equal_one_to_the_bit(tmp_path: Path) -> None:
    start_processes(run_rank, (str(tmp_path),), nprocs=2, start_method="spawn")  # type: ignore[no-untyped-call]
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for policy, (first, first_drawn), (second, second_drawn) in zip(POLICIES, *results, strict=True):
        alone, drawn = fill(Memory(11, policy), 0, 1)
        assert same_state(first, alone)
        assert same_state(second, alone)
        halves = [torch.cat(pair) for pair in zip(first_drawn, second_drawn, strict=True)]
        assert all(torch.equal(half, whole) for half, whole in zip(halves, drawn, strict=True))
