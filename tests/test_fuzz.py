"""Properties of streams, memories and measures.

``HYPOTHESIS_PROFILE=stress`` tries twenty times as many examples.
"""

import io
import itertools
import json
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT
from support.fuzzing import cases, check_message
from torch import Tensor

from cl_lightning import measures
from cl_lightning.batch import Draw
from cl_lightning.measures import AccuracyMatrix, EvaluationResult
from cl_lightning.memory import ClassBalanced, HerdingPolicy, Memory, Policy, Reservoir, Ring
from cl_lightning.stream import (
    Blurry,
    ClassIncremental,
    DatasetInfo,
    DomainIncremental,
    FewShot,
    LabelFraction,
    LongTailed,
    Online,
    RotatedDomains,
    Scenario,
    SingleTask,
    Stream,
    Subset,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@st.composite
def catalogues(draw: st.DrawFn, classes: int | None = None) -> DatasetInfo:
    """Three or more samples of each class in each of two domains."""
    classes = draw(st.integers(1, 6)) if classes is None else classes
    counts = draw(st.lists(st.integers(3, 7), min_size=2 * classes, max_size=2 * classes))
    train = np.repeat(np.arange(2 * classes), counts)
    order = np.random.default_rng(draw(st.integers(0, 99))).permutation(len(train))
    test = np.arange(2 * classes)
    names = draw(st.lists(st.text(max_size=3), min_size=classes, max_size=classes, unique=True))
    train = train[order]
    return DatasetInfo(train // 2, test // 2, tuple(names), train % 2, test % 2, ("x", "y"))


@st.composite
def scenarios(draw: st.DrawFn, classes: int) -> Scenario:
    """A scenario in which no sample comes in two tasks."""
    order: Any = draw(st.sampled_from(["natural", "random", 1993]))
    kinds: list[Scenario] = [
        ClassIncremental(increment=1, class_order=order),
        SingleTask(),
        DomainIncremental(draw(st.sampled_from([None, ["y", "x"]]))),
        RotatedDomains(degrees=[0.0, 30.0], share="split"),
        Blurry(tasks=2, disjoint=50, blurry=30, class_order=order),
        FewShot(base=draw(st.integers(1, classes)), way=1, shot=2, class_order=order),
    ]
    scenario = draw(st.sampled_from(kinds))
    if draw(st.booleans()):
        scenario = LongTailed(scenario, 3.0, draw(st.sampled_from(["ordered", "shuffled"])))
    if draw(st.booleans()):
        scenario = Subset(scenario, per_class=draw(st.integers(1, 4)), test_per_class=draw(st.sampled_from([None, 1])))
    if draw(st.booleans()):
        scenario = LabelFraction(scenario, fraction=0.5)
    return Online(scenario, batch_size=3) if draw(st.booleans()) else scenario


def keeps_all(scenario: Any) -> bool:
    """Whether every sample has a task."""
    while hasattr(scenario, "base") and not isinstance(scenario, FewShot):
        if isinstance(scenario, LongTailed | Subset):
            return False
        scenario = scenario.base
    return not isinstance(scenario, FewShot)


@cases(60)
@given(st.data(), catalogues(), st.integers(0, 2**32), st.sampled_from([0.0, 0.3]))
def test_no_sample_comes_in_two_tasks_and_the_order_is_a_permutation(
    folder: Path, data: st.DataObject, info: DatasetInfo, seed: int, val_fraction: float
) -> None:
    scenario = data.draw(scenarios(info.num_classes))
    try:
        stream = scenario(info, seed=seed, val_fraction=val_fraction)
    except ValueError as error:
        check_message(error, "training samples")  # there are too few to deal out
        return
    dealt = np.concatenate([*stream.train, *stream.val]).tolist()
    assert len(dealt) == len(set(dealt))
    assert not keeps_all(scenario) or len(dealt) == len(info.train_labels)
    tested = np.concatenate(stream.test).tolist()
    assert "test_per_class=1" in repr(scenario) or sorted(set(tested)) == list(range(len(info.test_labels)))
    assert sorted(stream.order) == list(range(info.num_classes))
    stream.check(info)
    stream.save(folder / "stream.json")
    again = Stream.load(folder / "stream.json")
    assert again == stream
    assert again.hashes == stream.hashes
    assert scenario(info, seed=seed, val_fraction=val_fraction) == stream


@cases(40)
@given(st.data(), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32))
def test_a_stream_that_is_extended_keeps_each_sample_in_its_task(
    data: st.DataObject, before: int, more: int, seed: int
) -> None:
    whole = data.draw(catalogues(before + more))
    old = whole.train_labels < before
    first = DatasetInfo(whole.train_labels[old], np.arange(before), whole.class_names[:before])
    grown = DatasetInfo(whole.train_labels, np.arange(before + more), whole.class_names)
    made = [ClassIncremental(increment=1, class_order="random"), SingleTask(), Blurry(tasks=1), FewShot(before, 1, 2)]
    scenario = data.draw(st.sampled_from(made))
    stream = scenario(first, seed=seed)
    try:
        longer = scenario.extend(stream, grown, seed=seed + 1)
    except ValueError as error:
        check_message(error, "has no training samples")  # there are too few to deal out
        return
    rows = np.flatnonzero(old)
    for task in stream.tasks:
        assert longer.train[task.index].tolist() == rows[stream.train[task.index]].tolist()
    dealt = np.concatenate(longer.train).tolist()
    assert len(dealt) == len(set(dealt))
    assert sorted(longer.order) == list(range(before + more))
    assert Stream.from_dict(json.loads(json.dumps(longer.to_dict()))) == longer


PROBE = """
import hashlib, json, random, sys
import numpy as np
from cl_lightning.stream import *
chance, made = random.Random(0), []
for _ in range(int(sys.argv[1])):
    classes = chance.randint(1, 12)
    labels = np.repeat(np.arange(classes), [chance.randint(4, 20) for _ in range(classes)])
    data = DatasetInfo(labels, np.arange(classes), tuple(f"{chance.random()} \\u00e4" for _ in range(classes)))
    tasks = chance.randint(1, classes)
    for scenario in (Blurry(tasks, blurry=40), ClassIncremental(increment=1, class_order="random"), FewShot(1, 1, 3),
                     LabelFraction(LongTailed(SingleTask(), 3, "shuffled"), 0.5), PermutedDomains(2, share="split")):
        try:
            made.append(scenario(data, seed=chance.randint(0, 2**40), val_fraction=0.25).to_dict())
        except ValueError as error:  # too few classes
            made.append(str(error))
print(hashlib.sha256(json.dumps(made).encode()).hexdigest())
"""


def test_a_class_that_a_tail_takes_out_of_a_task_leaves_its_validation_samples_too() -> None:
    train = np.array([0, 1, 0, 2, 0, 0, 1, 0, 2, 2, 2, 1, 1, 1, 2, 1, 0, 2])
    assign_tests = np.array([0, 1, 1, 0, 0, 1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 0, 0, 1])
    pairs = np.arange(6)
    info = DatasetInfo(train, pairs // 2, ("", "1", "0"), assign_tests, pairs % 2, ("x", "y"))
    stream = LongTailed(DomainIncremental(), 3.0)(info, seed=0, val_fraction=0.3)
    stream.check(info)
    assert Stream.from_dict(stream.to_dict()) == stream


def test_the_hash_seed_of_python_changes_no_stream() -> None:
    digests = set()
    for hash_seed in ("0", "1", "4294967295"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", PROBE, "30"]
        digests.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(digests) == 1


# ---------------------------------------------------------------------- memories


class Scripted(Policy):
    """A policy with keys given by the test."""

    def __init__(self, policy: Policy, keys: tuple[int, ...]) -> None:
        self.policy, self.script = policy, torch.tensor(keys)

    def keys(self, count: int, seen: int, draw: Draw) -> Tensor:
        return self.script[seen : seen + count]

    def priority(self, keys: Tensor, labels: Tensor, tasks: Tensor) -> Tensor:
        return self.policy.priority(keys, labels, tasks)


def offer(memory: Memory, labels: list[int], step: int, start: int = 0) -> None:
    """Add samples whose images tell their numbers."""
    numbers = torch.arange(start, start + len(labels))
    images = (numbers[:, None, None, None] >> torch.tensor([0, 8])[:, None, None]).to(torch.uint8)
    memory.add(images, torch.tensor(labels, dtype=torch.int64), numbers % 3, Draw.of(len(labels), 7, step))


def held(memory: Memory) -> list[int]:
    images = memory.images.long()
    return sorted((images[:, 0] + 256 * images[:, 1]).flatten().tolist()) if len(memory) else []


def chances(total: int, size: int, batch: int, labels: list[int], policy: Policy) -> list[Fraction]:
    """Exact probability that each sample is held, over all orders of the keys."""
    times = [0] * total
    for keys in itertools.permutations(range(total)):
        memory = Memory(size, Scripted(policy, keys))
        for start in range(0, total, batch):
            offer(memory, labels[start : start + batch], start, start)
        for number in held(memory):
            times[number] += 1
    return [Fraction(count, math.factorial(total)) for count in times]


@pytest.mark.parametrize(("total", "size", "batch"), [(4, 1, 1), (4, 2, 3), (5, 3, 2), (5, 2, 5), (5, 4, 1)])
def test_a_reservoir_holds_every_sample_with_exactly_the_same_probability(total: int, size: int, batch: int) -> None:
    assert chances(total, size, batch, [0] * total, Reservoir()) == [Fraction(size, total)] * total


def test_a_balanced_memory_is_exactly_uniform_within_each_class() -> None:
    labels = [0, 0, 0, 1, 1]
    found = chances(5, 3, 2, labels, ClassBalanced())
    assert found[:3] == [found[0]] * 3
    assert found[3:] == [found[3]] * 2
    assert sum(found) == 3
    assert Fraction(1, 3) < found[0] < Fraction(2, 3)  # each class has one sample, and one of them the third


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(st.integers(0, 4), min_size=1, max_size=12)),
        st.tuples(st.just("replace"), st.lists(st.integers(0, 4), min_size=1, max_size=6)),
        st.tuples(st.just("resize"), st.integers(0, 12)),
        st.tuples(st.just("reduce"), st.integers(0, 4)),
        st.tuples(st.just("restore"), st.none()),
    ),
    min_size=1,
    max_size=10,
)


@cases(60)
@given(st.integers(0, 12), st.sampled_from([Reservoir, ClassBalanced, Ring, HerdingPolicy]), OPERATIONS)
def test_a_memory_never_holds_more_than_its_size_whatever_is_done_to_it(
    size: int, policy: type[Policy], operations: list[tuple[str, Any]]
) -> None:
    memory, plain, offered = Memory(size, policy()), Memory(size, policy()), 0  # the plain one is never restored
    labels: list[int] = []
    for step, (name, argument) in enumerate(operations):
        for each in (memory, plain):
            if name == "add":
                offer(each, argument, step, offered)
            elif name == "replace":
                numbers = torch.arange(offered, offered + len(argument))
                images = (numbers[:, None, None, None] >> torch.tensor([0, 8])[:, None, None]).to(torch.uint8)
                each.replace(images, torch.tensor(argument), numbers % 3, Draw.of(len(argument), 7, step))
            elif name == "resize":
                each.resize(argument)
            elif name == "reduce":
                each.reduce_per_class(argument)
        if name in ("add", "replace"):
            offered += len(argument)
            labels += argument
        if name == "restore":
            file = io.BytesIO()
            torch.save(memory.state_dict(), file)
            file.seek(0)
            memory = Memory(3, policy())
            memory.load_state_dict(torch.load(file, weights_only=True))
        assert len(memory) <= memory.size
        assert int(memory.counts().sum()) == len(memory)
        numbers_held = held(memory)
        assert len(set(numbers_held)) == len(numbers_held) == len(memory)
        assert all(number < offered for number in numbers_held)
        images = memory.images.long()
        where = (images[:, 0] + 256 * images[:, 1]).flatten().tolist() if len(memory) else []
        assert memory.labels.tolist() == [labels[number] for number in where]
        assert held(plain) == numbers_held
        assert plain.keys.tolist() == memory.keys.tolist()


# ---------------------------------------------------------------------- measures


@st.composite
def rows(draw: st.DrawFn) -> list[EvaluationResult]:
    """Evaluations after each task of a stream of one to five, with tasks and classes that have no test samples."""
    count = draw(st.integers(1, 5))
    classes = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    classes[0] = max(classes[0], 1)
    found = []
    for t in range(count):
        columns = sum(classes[: t + 1])
        owner = [task for task in range(t + 1) for _ in range(classes[task])]
        cells = draw(st.lists(st.integers(0, 9), min_size=columns**2, max_size=columns**2))
        confusion = torch.tensor(cells).reshape(columns, columns)
        if draw(st.booleans()):
            confusion[draw(st.integers(0, columns - 1))] = 0
        totals, correct, aware = (torch.zeros(t + 1, dtype=torch.int64) for _ in range(3))
        for column, task in enumerate(owner):
            totals[task] += confusion[column].sum()
            correct[task] += confusion[column, column]
            aware[task] += min(int(confusion[column, column]) + draw(st.integers(0, 5)), int(confusion[column].sum()))
        ends = [max(sum(classes[: k + 1]), 1) for k in range(t + 1)]
        prefix = torch.tensor([draw(st.floats(0, 1)) for _ in ends], dtype=torch.float64)
        ece = torch.tensor(draw(st.lists(st.floats(0, 1), min_size=t + 1, max_size=t + 1)), dtype=torch.float64)
        ece[totals == 0] = math.nan
        found.append(EvaluationResult(totals, correct, aware, prefix, confusion, ece))
    return found


SIGNED = ("forgetting", "transfer", "drop")


@cases(100)
@given(rows(), st.booleans())
def test_all_measures_of_a_run_stay_within_their_bounds(found: list[EvaluationResult], started: bool) -> None:
    matrix = AccuracyMatrix()
    if started:
        matrix.fill(-1, EvaluationResult(found[-1].totals, found[-1].correct // 2, found[-1].correct_task_aware // 2))
    for t, row in enumerate(found):
        matrix.fill(t, row)
    for t in range(matrix.learned):
        for name, value in matrix.measures(t).items():
            low = -1 if any(part in name for part in SIGNED) else 0
            assert low - 1e-9 <= value <= 1 + 1e-9, name
    known = matrix.per_class[~matrix.per_class.isnan()]
    assert ((known >= 0) & (known <= 1)).all()
    again = AccuracyMatrix.from_dict(json.loads(json.dumps(matrix.to_dict(), allow_nan=False)))
    assert all(again.measures(t) == matrix.measures(t) for t in range(matrix.learned))


@cases(60)
@given(st.integers(1, 4), st.integers(1, 9), st.data())
def test_measures_of_curves_stay_within_their_bounds(tasks: int, points: int, data: st.DataObject) -> None:
    shares = st.floats(0, 1) | st.just(math.nan)
    values = data.draw(st.lists(shares, min_size=tasks * points, max_size=tasks * points))
    curves = torch.tensor(values, dtype=torch.float64).reshape(points, tasks)
    ends = torch.tensor(sorted(data.draw(st.lists(st.integers(0, points - 1), min_size=tasks, max_size=tasks))))
    beta, window = data.draw(st.integers(1, 12)), data.draw(st.integers(2, 12))
    sizes = torch.arange(1.0, points + 1)
    for value in (
        measures.min_accuracy(curves, ends),
        measures.worst_case_accuracy(curves, ends),
        measures.windowed_forgetting(curves, window),
        measures.windowed_plasticity(curves[:, 0], window),
        measures.average_anytime_accuracy(curves[:, 0]),
        measures.lca(curves, ends, beta),
        measures.area_under_budget(sizes, curves[:, 0]) / max(points - 1, 1),
    ):
        assert math.isnan(value) or -1e-9 <= value <= 1 + 1e-9
