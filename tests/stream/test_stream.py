import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from support import ROOT

from cl_lightning.batch import mix as scalar_mix
from cl_lightning.hashing import hash64
from cl_lightning.stream import (
    Blurry,
    ClassIncremental,
    DatasetInfo,
    DomainIncremental,
    FewShot,
    FromManifest,
    LabelFraction,
    LongTailed,
    NoisyLabels,
    Online,
    PermutedDomains,
    PowerLawRehearsal,
    RotatedDomains,
    Scenario,
    Shift,
    SingleTask,
    Split,
    Splitter,
    Stream,
    Subset,
)
from cl_lightning.stream.draws import rank_in_group, split

# CIFAR-100, 5-way 5-shot: the first two of the index lists that few-shot tables are made with (TOPIC split).
FEW_SHOT_LISTS = [
    [int(index) for index in session.split()]
    for session in (
        "29774 33344 4815 6772 48317 29918 33262 5138 7342 47874 28864 32471 4316 6436 47498 "
        "29802 33159 3730 5093 47740 30548 34549 2845 4996 47866",
        "28855 32834 4603 6914 48126 29932 33300 3860 5424 47055 29434 32604 4609 6380 47844 "
        "30456 34217 4361 6550 46896 29664 32857 4923 7502 47270",
    )
]


def data(
    classes: int = 10, per_class: int = 20, test: int = 4, names: str = "class {}", shuffle: int = 0
) -> DatasetInfo:
    """A balanced data set in shuffled order."""
    labels = np.random.default_rng(shuffle).permutation(np.repeat(np.arange(classes), per_class))
    return DatasetInfo(labels, np.repeat(np.arange(classes), test), tuple(names.format(c) for c in range(classes)))


def folders(sizes: dict[str, int], test: int = 2) -> DatasetInfo:
    """A data set of one folder per class, in the order of their names, as image folders come."""
    names, counts = tuple(sorted(sizes)), [sizes[name] for name in sorted(sizes)]
    return DatasetInfo(np.repeat(np.arange(len(names)), counts), np.repeat(np.arange(len(names)), test), names)


def domains(*names: str, classes: int = 3, per_group: int = 4) -> DatasetInfo:
    grid = np.array([(d, c) for d in range(len(names)) for c in range(classes) for _ in range(per_group)])
    return DatasetInfo(
        grid[:, 1], grid[::2, 1], tuple(f"c{c}" for c in range(classes)), grid[:, 0], grid[::2, 0], tuple(names)
    )


def images(stream: Stream, info: DatasetInfo, task: int, which: str = "train") -> set[tuple[str, int]]:
    """Samples by class name and place in their class: what stays the same when labels and indices shift."""
    place, _ = rank_in_group(info.train_labels)
    rows = getattr(stream, which)[task]
    return {(info.class_names[info.train_labels[row]], int(place[row])) for row in rows}


def all_of(*arrays: tuple[np.ndarray, ...]) -> list[int]:
    return sorted(int(index) for group in arrays for array in group for index in array)


# Numbers and choices


@given(st.lists(st.integers(-(2**70), 2**70), min_size=1, max_size=4))
def test_hash_of_arrays_is_the_hash_of_batches(numbers: list[int]) -> None:
    assert hash64(*numbers).tolist() == [scalar_mix(*numbers)]


def test_hash_is_taken_element_by_element() -> None:
    many = hash64(3, np.array([-1, 5]), np.array([7, 2**62], np.int64))
    assert many.tolist() == [scalar_mix(3, -1, 7), scalar_mix(3, 5, 2**62)]


def test_place_in_group_is_the_rank_of_the_key() -> None:
    place, size = rank_in_group(np.array([1, 0, 1, 1]), np.array([5, 9, 3, 4]))
    assert place.tolist() == [2, 0, 0, 1]
    assert size.tolist() == [3, 1, 3, 3]


def test_split_leaves_negative_groups_out() -> None:
    assert [part.tolist() for part in split(np.array([1, -1, 0, 1]), 3)] == [[2], [0, 3], []]


# Class-incremental streams


def test_order_of_1993_is_that_of_published_tables() -> None:
    stream = ClassIncremental(first=50, increment=10, class_order=1993)(data(100, 2), seed=0)
    assert stream.order[:20] == (68, 56, 78, 8, 23, 84, 90, 65, 74, 76, 40, 89, 3, 92, 55, 9, 26, 80, 43, 38)
    assert [task.num_new for task in stream.tasks] == [50, 10, 10, 10, 10, 10]
    assert stream.tasks[1].columns == tuple(range(50, 60))
    assert stream.tasks[1].classes == stream.order[50:60]


def test_global_random_state_is_neither_read_nor_written() -> None:
    state = np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    np.random.seed(5)
    first = ClassIncremental(tasks=5, class_order=7)(data(), seed=0, val_fraction=0.3)
    np.random.seed(6)
    assert ClassIncremental(tasks=5, class_order=7)(data(), seed=0, val_fraction=0.3) == first
    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    Blurry(class_order="random")(data(), seed=3, val_fraction=0.2)
    assert np.random.rand() == expected
    assert state is not None


def test_a_task_has_all_samples_of_its_classes() -> None:
    info = data(6)
    stream = ClassIncremental(tasks=3, class_order=[4, 1, 0, 5, 3, 2])(info, seed=0)
    for task, classes in enumerate([(4, 1), (0, 5), (3, 2)]):
        assert stream.tasks[task].classes == stream.tasks[task].new_classes == classes
        np.testing.assert_array_equal(stream.train[task], np.flatnonzero(np.isin(info.train_labels, classes)))
        np.testing.assert_array_equal(stream.test[task], np.flatnonzero(np.isin(info.test_labels, classes)))
    assert stream.columns_of([4, 1, 0, 5, 3, 2]).tolist() == list(range(6))
    assert stream.column_table.tolist() == [2, 1, 5, 4, 0, 3]
    assert stream.columns_of([6, -1]).tolist() == [-1, -1]
    assert stream.class_names == ("class 4", "class 1", "class 0", "class 5", "class 3", "class 2")
    assert [task.is_first for task in stream.tasks] == [True, False, False]
    assert [task.num_seen for task in stream.tasks] == [2, 4, 6]


def test_a_class_order_by_name_is_that_by_label() -> None:
    by_label = ClassIncremental(tasks=2, class_order=[3, 0, 1, 2])(data(4), seed=0)
    by_name = ClassIncremental(tasks=2, class_order=["class 3", "class 0", "class 1", "class 2"])(data(4), seed=0)
    assert by_label.hashes == by_name.hashes


@pytest.mark.parametrize(
    ("scenario", "sizes"),
    [
        (ClassIncremental(tasks=5), [2, 2, 2, 2, 2]),
        (ClassIncremental(increment=5), [5, 5]),
        (ClassIncremental(first=4, increment=3), [4, 3, 3]),
        (ClassIncremental(first=4, tasks=3), [4, 3, 3]),
        (ClassIncremental(tasks=2, increment=5), [5, 5]),
        (ClassIncremental(tasks=1, first=10), [10]),
        (ClassIncremental(sizes=[1, 7, 2]), [1, 7, 2]),
        (SingleTask(), [10]),
    ],
)
def test_sizes_of_tasks(scenario: Scenario, sizes: list[int]) -> None:
    assert [task.num_new for task in scenario(data(), seed=0).tasks] == sizes


@pytest.mark.parametrize(
    ("options", "classes", "message"),
    [
        ({"increment": 7}, 100, "100 classes do not split into tasks of 7; use a divisor of 100 or give sizes"),
        ({"tasks": 7}, 100, "100 classes do not split into 7 equal tasks; use a divisor of 100 or give sizes"),
        ({"first": 50, "increment": 7}, 100, "50 classes after the first 50 do not split into tasks of 7"),
        ({"first": 11, "increment": 1}, 10, "the first task has 11 classes"),
        ({"tasks": 3, "increment": 5}, 10, "are 2 tasks, not 3"),
        ({"first": 10, "tasks": 3}, 10, "too few for 2 tasks"),
        ({"sizes": [4, 5]}, 10, "add up to 9; the data has 10 classes"),
        ({"tasks": 5, "class_order": [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]}, 10, "class 8 .* more than once"),
        ({"tasks": 5, "class_order": [0, 1, 2, 3, 4, 5, 6, 7, 8]}, 10, "lacks class 9"),
        ({"tasks": 5, "class_order": [*range(9), 10]}, 10, "has 10, which is no class"),
        ({"tasks": 5, "class_order": ["dog"]}, 10, "has 'dog', which is no class"),
    ],
)
def test_options_that_do_not_fit_the_data_are_an_error(options: Any, classes: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^ClassIncremental: .*{message}"):
        ClassIncremental(**options)(data(classes, 2), seed=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ClassIncremental(),
        lambda: ClassIncremental(first=5),
        lambda: ClassIncremental(tasks=0),
        lambda: ClassIncremental(sizes=[1, 0]),
        lambda: ClassIncremental(sizes=[]),
        lambda: ClassIncremental(sizes=[1], tasks=1),
        lambda: ClassIncremental(tasks=2, class_order="backwards"),  # type: ignore[arg-type]
        lambda: ClassIncremental(tasks=2, class_order=-1),
        lambda: FewShot(base=0, way=1, shot=1),
        lambda: PermutedDomains(tasks=0),
        lambda: PermutedDomains(share="some"),  # type: ignore[arg-type]
        lambda: RotatedDomains(),
        lambda: RotatedDomains(degrees=[]),
        lambda: RotatedDomains(degrees=[float("nan")]),
        lambda: Blurry(disjoint=101),
        lambda: Blurry(tasks=0),
        lambda: LongTailed(SingleTask(), imbalance=0.5),
        lambda: LongTailed(SingleTask(), arrangement="random"),  # type: ignore[arg-type]
        lambda: LabelFraction(SingleTask()),
        lambda: LabelFraction(SingleTask(), fraction=0.1, per_class=1),
        lambda: LabelFraction(SingleTask(), fraction=0.0),
        lambda: LabelFraction(SingleTask(), per_class=0),
        lambda: Online(SingleTask(), batch_size=0),
        lambda: Subset(SingleTask(), fraction=0.1, per_class=1),
        lambda: Subset(SingleTask(), fraction=1.5),
        lambda: Subset(SingleTask(), per_class=0),
        lambda: Subset(SingleTask(), test_per_class=0),
    ],
)
def test_impossible_options_are_reported_by_the_constructor(make: Any) -> None:
    with pytest.raises(ValueError, match=r"^\w+: [^\n]+$"):
        make()


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 2.0, float("nan")])
def test_validation_share_outside_its_range_is_reported(fraction: float) -> None:
    with pytest.raises(ValueError, match="val_fraction must be at least 0 and below 1"):
        SingleTask()(data(), seed=0, val_fraction=fraction)


def test_a_random_order_follows_the_seed_and_the_names_alone() -> None:
    scenario = ClassIncremental(tasks=5, class_order="random")
    first, again, other = (scenario(data(), seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.order != other.order
    backwards = DatasetInfo(9 - data().train_labels, 9 - data().test_labels, data().class_names[::-1])
    assert scenario(backwards, seed=0).class_names == first.class_names


def test_every_class_is_first_about_equally_often() -> None:
    firsts = [ClassIncremental(tasks=4, class_order="random")(data(4, 1), seed=seed).order[0] for seed in range(400)]
    assert min(np.bincount(firsts, minlength=4)) > 70  # expected 100, standard deviation 8.7


# What a ``DatasetInfo`` refuses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 3], [0], ("a", "b")), "train_labels has label 3 at index 1"),
        (([0, 1], [-1], ("a", "b")), "test_labels has label -1 at index 0"),
        (([0, 1], [0], ("a", "a")), "'a' is given twice"),
        (([], [], ()), "class_names is empty"),
        (([0.5], [0], ("a",)), "flat array of integers"),
        (([[0]], [0], ("a",)), "flat array of integers"),
        (([0], [0], ("a",), [0], None, ("d",)), "give both or neither"),
        (([0], [0], ("a",), [1], [0], ("d",)), "train_domains has domain 1"),
        (([0], [0], ("a",), [0, 0], [0], ("d",)), "1 train labels but 2 train domains"),
    ],
)
def test_dataset_info_refuses_what_does_not_fit(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^DatasetInfo: .*{message}"):
        DatasetInfo(*arguments)


def test_a_class_without_training_samples_is_reported() -> None:
    with pytest.raises(ValueError, match="class 'b' has no training samples"):
        SingleTask()(DatasetInfo(np.array([0, 2]), np.array([0]), ("a", "b", "c")), seed=0)


def test_a_class_without_test_samples_is_fine() -> None:
    stream = ClassIncremental(tasks=2)(DatasetInfo(np.array([0, 1]), np.array([0]), ("a", "b")), seed=0)
    assert [len(rows) for rows in stream.test] == [1, 0]


def test_index_arrays_cannot_be_changed() -> None:
    stream = SingleTask()(data(), seed=0)
    with pytest.raises(ValueError, match="read-only"):
        stream.train[0][0] = 1


# Validation samples


def test_validation_takes_the_nearest_share_of_each_class_and_leaves_one() -> None:
    sizes = {"a": 1, "b": 2, "c": 4, "d": 5, "e": 100}
    info = folders(sizes)
    stream = SingleTask()(info, seed=0, val_fraction=0.1)
    assert np.bincount(info.train_labels[stream.val[0]], minlength=5).tolist() == [0, 0, 0, 1, 10]
    stream = SingleTask()(info, seed=0, val_fraction=0.99)
    assert np.bincount(info.train_labels[stream.train[0]], minlength=5).tolist() == [1, 1, 1, 1, 1]


def test_every_sample_is_held_out_about_equally_often() -> None:
    info, counts = data(1, 5), np.zeros(5, int)
    for seed in range(500):
        counts[SingleTask()(info, seed=seed, val_fraction=0.2).val[0]] += 1
    assert counts.sum() == 500
    assert counts.min() > 65  # expected 100, standard deviation 9


def test_pairs_of_samples_are_held_out_about_equally_often() -> None:
    info, counts = data(1, 4), dict.fromkeys(combinations(range(4), 2), 0)
    for seed in range(600):
        counts[tuple(SingleTask()(info, seed=seed, val_fraction=0.5).val[0].tolist())] += 1  # type: ignore[index]
    assert min(counts.values()) > 65  # expected 100, standard deviation 9


def test_validation_samples_do_not_depend_on_the_other_classes() -> None:
    few, more = folders({"b": 9, "d": 7}), folders({"a": 5, "b": 9, "c": 3, "d": 7})
    before, after = (SingleTask()(info, seed=4, val_fraction=0.3) for info in (few, more))
    assert images(before, few, 0, "val") <= images(after, more, 0, "val")
    assert images(before, few, 0) <= images(after, more, 0)


# Properties of all scenarios


@st.composite
def catalogues(draw: st.DrawFn) -> DatasetInfo:
    classes = draw(st.integers(1, 8))
    train = draw(st.permutations([*range(classes), *draw(st.lists(st.integers(0, classes - 1), max_size=40))]))
    test = draw(st.lists(st.integers(0, classes - 1), max_size=20))
    names = draw(st.lists(st.text(max_size=4), min_size=classes, max_size=classes, unique=True))
    return DatasetInfo(np.array(train), np.array(test, np.int64), tuple(names))


@st.composite
def scenarios(draw: st.DrawFn, classes: int) -> Scenario:
    """A scenario in which each sample has one task."""
    order: Any = draw(st.sampled_from(["natural", "random", 1993, "list"]))
    order = draw(st.permutations(range(classes))) if order == "list" else order
    sizes, rest = [], classes
    while rest:
        sizes.append(draw(st.integers(1, rest)))
        rest -= sizes[-1]
    scenario: Scenario = draw(
        st.sampled_from(
            [
                ClassIncremental(sizes=sizes, class_order=order),
                ClassIncremental(increment=1, class_order=order),
                SingleTask(),
                Blurry(tasks=draw(st.integers(1, classes)), disjoint=100, class_order=order),
                Blurry(tasks=draw(st.integers(1, 4)), disjoint=30, blurry=40, class_order=order),
                PermutedDomains(tasks=draw(st.integers(1, 3)), share="split"),
            ]
        )
    )
    if draw(st.booleans()):
        scenario = LabelFraction(scenario, fraction=0.3)
    return Online(scenario, batch_size=3) if draw(st.booleans()) else scenario


@settings(max_examples=150, deadline=None)
@given(st.data(), catalogues(), st.integers(-(2**63), 2**64), st.floats(0, 0.9))
def test_each_sample_is_in_one_task_and_manifests_come_back(
    draw: st.DataObject, info: DatasetInfo, seed: int, val_fraction: float
) -> None:
    scenario = draw.draw(scenarios(info.num_classes))
    try:
        stream = scenario(info, seed=seed, val_fraction=val_fraction)
    except ValueError as error:
        if "has no training samples" not in str(error):  # there are too few to deal out
            raise
        return
    assert all_of(stream.train, stream.val) == list(range(len(info.train_labels)))
    if not isinstance(scenario, PermutedDomains) and not any(stream.shifts):
        whole = [row for rows in stream.test for row in rows]
        assert sorted(set(whole)) == list(range(len(info.test_labels)))
    assert sorted(stream.order) == list(range(info.num_classes))
    seen: set[int] = set()
    for task, train, val, test, hidden in zip(
        stream.tasks, stream.train, stream.val, stream.test, stream.unlabelled, strict=True
    ):
        present = set(info.train_labels[train].tolist())
        assert set(task.classes) == present >= set(info.train_labels[val].tolist())
        assert set(task.new_classes) == present - seen
        seen |= present
        assert task.num_seen == len(seen)
        assert set(info.test_labels[test].tolist()) <= seen
        assert set(hidden.tolist()) <= set(train.tolist())
        assert set(info.train_labels[np.setdiff1d(train, hidden)].tolist()) == present
    stream.check(info)
    again = Stream.from_dict(json.loads(json.dumps(stream.to_dict())))
    assert again == stream
    assert (again.hashes, again.parts, again.order) == (stream.hashes, stream.parts, stream.order)
    assert scenario(info, seed=seed, val_fraction=val_fraction) == stream


PROBE = """
import hashlib, json
import numpy as np
from cl_lightning.stream import *
labels = np.arange(200) * 7 % 20
names = tuple(f"n\\u00e4me {i * 13 % 20}" for i in range(20))
data = DatasetInfo(labels, labels, names, labels % 3, labels % 3, ("x", "y", "z"))
made = [
    scenario(data, seed=11, val_fraction=0.2).hashes
    for scenario in (
        LongTailed(ClassIncremental(tasks=5, class_order="random"), 4, "shuffled"), FewShot(10, 5, 3), Blurry(),
        LabelFraction(PermutedDomains(3, share="split"), 0.5), DomainIncremental(),
    )
]
print(hashlib.sha256(json.dumps(made).encode()).hexdigest())
"""


def test_streams_are_the_same_in_every_python() -> None:
    found = set()
    for hash_seed in ("0", "1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", PROBE], env=env, capture_output=True, text=True, check=True)
        found.add(done.stdout.strip())
    assert found == {"9ce5a030c298977b180ccfd37acb1c81c4489823af20a950b150c2eadebfcac5"}  # on every platform


def test_streams_need_neither_torch_nor_lightning() -> None:
    code = "import sys, cl_lightning.stream; assert not {'torch', 'lightning'} & set(sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


class Counted(np.ndarray):
    """Labels that count how many of them, or of what is made of them, are read by operations on whole arrays."""

    read = 0

    def __array_ufunc__(self, function: Any, method: str, *inputs: Any, **options: Any) -> Any:
        plain = [each.view(np.ndarray) if isinstance(each, Counted) else each for each in inputs]
        Counted.read += max(np.size(each) for each in plain)
        result = getattr(function, method)(*plain, **options)
        return result.view(Counted) if isinstance(result, np.ndarray) else result


def test_labels_are_not_scanned_for_each_class_or_task() -> None:
    info = data(1000, 20, test=5)
    count = len(info.train_labels)
    for name in ("train_labels", "test_labels"):
        object.__setattr__(info, name, getattr(info, name).view(Counted))
    assert (info.train_labels == 3).sum() == 20
    assert Counted.read >= count
    Counted.read = 0
    stream = LongTailed(ClassIncremental(tasks=200, class_order=1993), 10)(info, seed=0, val_fraction=0.1)
    stream.check(info)
    assert len(stream) == 200
    assert count <= Counted.read <= 10 * count


# Domains


def test_a_domain_is_a_task() -> None:
    info = domains("photo", "art", "sketch")
    stream = DomainIncremental(domains=["sketch", "photo", "art"])(info, seed=0, val_fraction=0.25)
    assert [task.name for task in stream.tasks] == ["sketch", "photo", "art"]
    assert [task.num_new for task in stream.tasks] == [3, 0, 0]
    assert [task.classes for task in stream.tasks] == [(0, 1, 2)] * 3
    for task, domain in enumerate([2, 0, 1]):
        assert info.train_domains is not None
        assert info.test_domains is not None
        rows = np.sort(np.concatenate([stream.train[task], stream.val[task]]))
        np.testing.assert_array_equal(rows, np.flatnonzero(info.train_domains == domain))
        np.testing.assert_array_equal(stream.test[task], np.flatnonzero(info.test_domains == domain))
        assert np.bincount(info.train_labels[stream.val[task]]).tolist() == [1, 1, 1]


def test_a_test_sample_waits_until_its_class_has_been_seen() -> None:
    info = DatasetInfo(
        np.array([0, 1]), np.array([0, 1, 1]), ("a", "b"), np.array([0, 1]), np.array([0, 0, 1]), ("x", "y")
    )
    stream = DomainIncremental()(info, seed=0)
    assert [rows.tolist() for rows in stream.test] == [[0], [1, 2]]
    stream.check(info)


@pytest.mark.parametrize(
    ("scenario", "info", "message"),
    [
        (DomainIncremental(), data(), "has no domains"),
        (DomainIncremental(domains=["x", "x"]), domains("x", "y"), "'x' more than once"),
        (DomainIncremental(domains=["x"]), domains("x", "y"), "lacks 'y'"),
        (DomainIncremental(domains=["x", "z"]), domains("x", "y"), "has 'z'; the data has x, y"),
    ],
)
def test_domains_that_do_not_fit_are_an_error(scenario: Scenario, info: DatasetInfo, message: str) -> None:
    with pytest.raises(ValueError, match=f"^DomainIncremental: .*{message}"):
        scenario(info, seed=0)


def test_an_empty_domain_is_reported() -> None:
    info = DatasetInfo(np.array([0]), np.array([0]), ("a",), np.array([0]), np.array([0]), ("x", "y"))
    with pytest.raises(ValueError, match=r"^DomainIncremental: task 1 \(y\) has no training samples"):
        DomainIncremental()(info, seed=0)


def test_permuted_domains_give_each_task_all_samples_and_its_own_permutation() -> None:
    info = data()
    stream = PermutedDomains(tasks=4)(info, seed=0, val_fraction=0.2)
    assert stream.shifts[0] is None
    assert len(set(stream.shifts)) == 4
    for task in range(4):
        assert all_of((stream.train[task],), (stream.val[task],)) == list(range(200))
        np.testing.assert_array_equal(stream.val[task], stream.val[0])  # never trained on in any task
        np.testing.assert_array_equal(stream.test[task], np.arange(40))
    assert [task.num_new for task in stream.tasks] == [10, 0, 0, 0]
    assert PermutedDomains(tasks=4, first_identity=False)(info, seed=0).shifts[1:] == stream.shifts[1:]
    assert PermutedDomains(tasks=4)(info, seed=1).shifts[1] != stream.shifts[1]


def test_a_split_share_divides_each_class_evenly() -> None:
    info = data(5, 12)
    stream = RotatedDomains(tasks=4, share="split")(info, seed=0)
    for rows in stream.train:
        assert np.bincount(info.train_labels[rows]).tolist() == [3] * 5
    assert all_of(stream.train) == list(range(60))


def test_rotations_are_even_or_as_given() -> None:
    assert RotatedDomains(tasks=4)(data(), seed=0).shifts == (None, *(Shift("rotate", d) for d in (45.0, 90.0, 135.0)))
    assert RotatedDomains(degrees=[-20, 7.5])(data(), seed=0).shifts == (Shift("rotate", -20.0), Shift("rotate", 7.5))


# Few-shot streams


def test_few_shot_sessions_have_exactly_their_shots() -> None:
    info = data(10, 20)
    stream = FewShot(base=4, way=2, shot=5)(info, seed=0, val_fraction=0.2)
    assert np.bincount(info.train_labels[stream.train[0]]).tolist() == [16] * 4
    for session in (1, 2, 3):
        rows = stream.train[session]
        assert np.bincount(info.train_labels[rows], minlength=10)[2 + 2 * session :][:2].tolist() == [5, 5]
        assert len(rows) == 10
        assert not stream.val[session].size
        assert len(stream.test[session]) == 8
    assert not np.array_equal(FewShot(base=4, way=2, shot=5)(info, seed=1).train[1], stream.train[1])


def cifar_with_lists() -> DatasetInfo:
    """70 classes of a data set of 50000 whose labels agree with the published lists."""
    labels = np.arange(50000) % 60
    for session, rows in enumerate(FEW_SHOT_LISTS):
        labels[rows] = 60 + 5 * session + np.arange(25) // 5
    return DatasetInfo(labels, np.arange(70), tuple(map(str, range(70))))


@pytest.mark.parametrize("form", ["list", "json", "text"])
def test_few_shot_takes_published_lists(form: str, tmp_path: Path) -> None:
    path = tmp_path / "lists"
    if form == "json":
        path.write_text(json.dumps(FEW_SHOT_LISTS))
    else:
        path.write_text("# session 1\n" + "\n".join(", ".join(map(str, rows)) for rows in FEW_SHOT_LISTS) + "\n")
    stream = FewShot(60, 5, 5, FEW_SHOT_LISTS if form == "list" else str(path))(cifar_with_lists(), seed=0)
    for rows, expected in zip(stream.train[1:], FEW_SHOT_LISTS, strict=True):
        assert rows.tolist() == sorted(expected)
    assert len(stream.train[0]) == 50000 - 50


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (FEW_SHOT_LISTS[:1], "has 1 lists for 2 sessions"),
        (FEW_SHOT_LISTS[::-1], r"list of session 1 has 0 samples of class 60 \(60\) instead of 5"),
        ([FEW_SHOT_LISTS[0][:-1], FEW_SHOT_LISTS[1]], "list of session 1 has 4 samples of class 64"),
        ([[50000, *FEW_SHOT_LISTS[0][1:]], FEW_SHOT_LISTS[1]], "outside 0 .. 49999"),
        ([FEW_SHOT_LISTS[0], [*FEW_SHOT_LISTS[1], 28855]], "list of session 2 has index 28855 twice"),
        ([[], []], "has 0 samples of class 60"),
    ],
)
def test_lists_of_other_data_are_an_error(lists: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=f"^FewShot: .*{message}"):
        FewShot(60, 5, 5, lists)(cifar_with_lists(), seed=0)


@pytest.mark.parametrize("text", ["[[1, 2], 3]", "[[1, true]]", "[[1.5]]", "[", "1 2\n3 x", "[" * 100000])
def test_a_file_without_lists_is_reported(text: str, tmp_path: Path) -> None:
    path = tmp_path / "lists"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"^[^\n]*lists: not lists of indices: [^\n]+$"):
        FewShot(60, 5, 5, str(path))(cifar_with_lists(), seed=0)
    with pytest.raises(ValueError, match="cannot be read"):
        FewShot(60, 5, 5, str(tmp_path / "absent"))(cifar_with_lists(), seed=0)


def test_few_shot_names_the_option_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="6 classes after the first 4 do not split into sessions of 4"):
        FewShot(base=4, way=4, shot=5)(data(), seed=0)
    with pytest.raises(ValueError, match="has 20 training samples; use at most that many shots, not 21"):
        FewShot(base=4, way=2, shot=21)(data(), seed=0)
    with pytest.raises(ValueError, match="base has 11 classes, the data 10"):
        FewShot(base=11, way=2, shot=1)(data(), seed=0)


# Blurry streams


def test_blurry_divides_majors_and_minors_by_their_percentages() -> None:
    info = data(20, 50)
    stream = Blurry(tasks=5, disjoint=50, blurry=20)(info, seed=0)
    counts = np.stack([np.bincount(info.train_labels[rows], minlength=20) for rows in stream.train])
    assert stream.one_pass
    disjoint = (counts > 0).sum(axis=0) == 1
    assert disjoint.sum() == 10
    assert (counts[:, disjoint] == 50).sum(axis=1).tolist() == [2] * 5
    majors = counts[:, ~disjoint]
    assert sorted(majors.argmax(axis=0).tolist()) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert majors.max(axis=0).tolist() == [40] * 10  # 20 percent of 50 samples are minor
    assert [len(rows) for rows in stream.train] == [200] * 5  # 20 minor samples leave each task, 5 come from each other
    first_seen = [(counts[:, label] > 0).argmax() for label in range(20)]
    for label in range(20):
        assert label in info.test_labels[stream.test[first_seen[label]]]


def test_blurry_without_blur_is_class_incremental() -> None:
    order = [3, 1, 2, 0]
    blurry = Blurry(tasks=2, disjoint=100, class_order=order)(data(4), seed=0)
    assert blurry.hashes == ClassIncremental(tasks=2, class_order=order)(data(4), seed=0).hashes
    unmixed = Blurry(tasks=2, disjoint=0, blurry=0, class_order=order)(data(4), seed=0)
    assert unmixed.hashes == blurry.hashes


def test_blurry_with_one_task_has_everything() -> None:
    assert all_of(Blurry(tasks=1)(data(), seed=0).train) == list(range(200))


# Modifiers


@pytest.mark.parametrize("arrangement", ["ordered", "shuffled"])
def test_long_tail_has_its_published_size(arrangement: Any) -> None:
    info = data(100, 500, test=1)
    base = ClassIncremental(tasks=10, class_order=1993)
    stream = LongTailed(base, 100, arrangement)(info, seed=0)
    counts = np.bincount(info.train_labels[np.concatenate(stream.train)])
    assert counts.sum() == 10847  # CIFAR-100-LT with an imbalance of 100
    assert (counts.max(), counts.min()) == (500, 5)
    falls = (np.diff(counts[list(stream.order)]) <= 0).all()
    assert falls == (arrangement == "ordered")
    assert stream.order == base(info, seed=0).order
    np.testing.assert_array_equal(np.concatenate(stream.test), np.concatenate(base(info, seed=0).test))


def test_imbalance_of_one_changes_nothing() -> None:
    plain = Blurry()(data(), seed=0, val_fraction=0.1)
    assert LongTailed(Blurry(), 1.0)(data(), seed=0, val_fraction=0.1).hashes == plain.hashes


def test_long_tail_keeps_a_sample_of_each_class_and_columns_follow() -> None:
    info = data(10, 20)
    stream = LongTailed(Blurry(tasks=5, disjoint=0, blurry=50), 1000)(info, seed=0, val_fraction=0.2)
    assert sorted(stream.order) == list(range(10))
    stream.check(info)
    shared = LongTailed(PermutedDomains(3), 10)(info, seed=0)
    np.testing.assert_array_equal(shared.train[0], shared.train[2])


def test_a_subset_has_so_many_samples_of_each_class() -> None:
    info = data(10, 20, test=6)
    base = ClassIncremental(tasks=5, class_order=1993)
    stream = Subset(base, per_class=4, test_per_class=2)(info, seed=0, val_fraction=0.25)
    stream.check(info)
    assert stream.order == base(info, seed=0).order
    assert np.bincount(info.train_labels[all_of(stream.train)]).tolist() == [4] * 10
    assert np.bincount(info.train_labels[all_of(stream.val)]).tolist() == [1] * 10  # 5 of 20, and 4 of 15 stay
    assert np.bincount(info.test_labels[all_of(stream.test)]).tolist() == [2] * 10
    other = Subset(base, per_class=4)(info, seed=1, val_fraction=0.25)
    assert all_of(other.train) != all_of(stream.train)
    assert len(all_of(other.test)) == 60
    halves = Subset(base, fraction=0.5)(info, seed=0)
    assert np.bincount(info.train_labels[all_of(halves.train)]).tolist() == [10] * 10


def test_a_subset_of_small_classes_keeps_them() -> None:
    info = folders({"a": 1, "b": 9})
    stream = Subset(SingleTask(), per_class=3)(info, seed=0)
    assert np.bincount(info.train_labels[stream.train[0]]).tolist() == [1, 3]
    assert (
        Subset(Blurry())(data(), seed=0, val_fraction=0.1).hashes == Blurry()(data(), seed=0, val_fraction=0.1).hashes
    )


def test_label_fraction_hides_all_but_its_share_in_each_class_of_each_task() -> None:
    info = data(10, 20)
    stream = LabelFraction(ClassIncremental(tasks=5), fraction=0.25)(info, seed=0, val_fraction=0.2)
    for train, hidden, val in zip(stream.train, stream.unlabelled, stream.val, strict=True):
        labelled = np.setdiff1d(train, hidden)
        assert sorted(np.bincount(info.train_labels[labelled], minlength=10))[-2:] == [4, 4]
        assert (len(train), len(hidden), len(val)) == (32, 24, 8)
    few = LabelFraction(SingleTask(), per_class=3)(folders({"a": 1, "b": 9}), seed=0)
    assert len(few.unlabelled[0]) == 6
    everything = LabelFraction(ClassIncremental(tasks=5), fraction=1.0)(info, seed=0)
    assert everything.hashes == ClassIncremental(tasks=5)(info, seed=0).hashes


def test_a_tail_of_hidden_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="put LabelFraction around LongTailed"):
        LongTailed(LabelFraction(SingleTask(), per_class=1))(data(), seed=0)


def test_online_streams_set_the_batch_size() -> None:
    stream = Online(ClassIncremental(tasks=5), batch_size=16, passes=2)(data(), seed=0)
    assert (stream.one_pass, stream.batch_size, stream.passes) == (True, 16, 2)
    plain = ClassIncremental(tasks=5)(data(), seed=0)
    assert (plain.one_pass, plain.batch_size, plain.passes) == (False, None, 1)
    assert stream.hashes == plain.hashes
    assert stream != plain


@dataclass(frozen=True)
class Halves(Splitter):
    """A user's scenario: the first and the second half of the data."""

    def split(self, info: DatasetInfo, seed: int, earlier: Stream | None) -> Split:
        rows = np.arange(len(info.train_labels))
        return Split(np.split(rows, 2), np.arange(info.num_classes), ["first", "second"])


def test_a_new_scenario_is_one_method() -> None:
    stream = LabelFraction(Halves(), per_class=1)(folders({"a": 6, "b": 2}), seed=0)
    assert [task.classes for task in stream.tasks] == [(0,), (0, 1)]
    assert [rows.tolist() for rows in stream.test] == [[0, 1], [2, 3]]


# Extension


@pytest.mark.parametrize(
    "scenario",
    [
        ClassIncremental(increment=2),
        ClassIncremental(tasks=2, class_order="random"),
        ClassIncremental(sizes=[2, 2], class_order=7),
        FewShot(base=2, way=2, shot=3),
        SingleTask(),
        Blurry(tasks=2, disjoint=50, blurry=30),
        LongTailed(Blurry(tasks=2, disjoint=0, blurry=30), 30),
        LabelFraction(LongTailed(ClassIncremental(increment=2), 4, "shuffled"), 0.5),
        Online(ClassIncremental(increment=2)),
        Subset(ClassIncremental(increment=2), fraction=0.5, test_per_class=1),
    ],
)
def test_an_extension_keeps_the_earlier_tasks_though_labels_shift(scenario: Scenario) -> None:
    sizes = {"dog": 20, "cat": 30, "eel": 10, "fox": 16}
    old = folders(sizes)
    before = scenario(old, seed=1, val_fraction=0.2)
    stages = [{"ape": 20, "bee": 21, "gnu": 9, "cod": 8, "yak": 9}, {"ant": 8, "elk": 10}]
    for seed, stage in enumerate(stages, 2):
        sizes = {**sizes, **stage}
        new = folders(sizes)
        after = scenario.extend(Stream.from_dict(before.to_dict()), new, seed=seed, val_fraction=0.3)
        after.check(new)
        assert len(after) > len(before)
        assert after.class_names[: len(before.class_names)] == before.class_names
        assert [p.seed for p in after.parts] == [1, *range(2, seed + 1)]
        for task in range(len(before)):
            assert after.tasks[task].name == before.tasks[task].name
            assert after.tasks[task].columns == before.tasks[task].columns
            for which in ("train", "val", "unlabelled"):
                assert images(after, new, task, which) == images(before, old, task, which)
        assert set(after.class_names) == set(sizes)
        assert (after.one_pass, after.batch_size) == (before.one_pass, before.batch_size)
        before, old = after, new


def test_an_extension_splits_by_the_same_increment_and_a_remainder() -> None:
    before = ClassIncremental(first=4, increment=2)(data(8), seed=0)
    after = ClassIncremental(first=4, increment=2).extend(before, data(13), seed=0)
    assert [task.num_new for task in after.tasks] == [4, 2, 2, 2, 2, 1]
    before = ClassIncremental(tasks=2)(data(8), seed=0)
    assert [t.num_new for t in ClassIncremental(tasks=2).extend(before, data(13), seed=0).tasks] == [4, 4, 4, 1]


def test_domains_are_added_by_name() -> None:
    before = DomainIncremental()(domains("photo", "sketch"), seed=0, val_fraction=0.25)
    new = domains("art", "photo", "quilt", "sketch")
    after = DomainIncremental().extend(before, new, seed=0, val_fraction=0.25)
    assert [task.name for task in after.tasks] == ["photo", "sketch", "art", "quilt"]
    for task, shift in ((0, 12), (1, 24)):
        np.testing.assert_array_equal(after.train[task], before.train[task] + shift)
        np.testing.assert_array_equal(after.val[task], before.val[task] + shift)


def test_further_permutations_extend_permuted_domains() -> None:
    before = PermutedDomains(3)(data(), seed=5, val_fraction=0.1)
    after = PermutedDomains(5).extend(before, data(), seed=5, val_fraction=0.1)
    assert after.hashes[:3] == before.hashes
    assert len(after) == 5
    longer = RotatedDomains(degrees=[0, 10, 20])
    assert len(longer.extend(RotatedDomains(degrees=[0, 10])(data(), seed=0), data(), seed=0)) == 3


@pytest.mark.parametrize(
    ("make", "extend", "old", "new", "message"),
    [
        (ClassIncremental(tasks=2), None, data(4), data(4), "nothing new for a task"),
        (ClassIncremental(tasks=2), None, data(4), data(3), "lacks 1 classes of the stream, the first is 'class 3'"),
        (ClassIncremental(tasks=2), FewShot(2, 2, 1), data(4), data(6), "was made by ClassIncremental"),
        (
            Online(ClassIncremental(tasks=2)),
            Online(SingleTask()),
            data(4),
            data(6),
            "was made by Online of ClassIncremental",
        ),
        (ClassIncremental(tasks=2, class_order=[0, 1, 2, 3]), None, data(4), data(5), "class_order lacks class 4"),
        (DomainIncremental(), None, domains("x", "y"), domains("x", "z"), "lacks domain 'y'"),
        (DomainIncremental(), None, domains("x"), domains("x", "y", classes=4), r"task 0 \(x\) would change: c3"),
        (PermutedDomains(2), PermutedDomains(3), data(4), data(5), r"would change: class 4"),
        (PermutedDomains(2, share="split"), PermutedDomains(3, share="split"), data(), data(), "'split' cannot"),
        (RotatedDomains(tasks=2), RotatedDomains(tasks=3), data(), data(), "keep the options of the stream"),
    ],
)
def test_impossible_extensions_are_an_error(
    make: Scenario, extend: Scenario | None, old: DatasetInfo, new: DatasetInfo, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        (extend or make).extend(make(old, seed=0), new, seed=0)


def test_permuted_domains_extend_only_by_the_seed_they_have() -> None:
    with pytest.raises(ValueError, match=r"must keep seed 0 and val_fraction 0\.1"):
        PermutedDomains(3).extend(PermutedDomains(2)(data(), seed=0, val_fraction=0.1), data(), seed=1)


# Manifests


def manifest() -> Stream:
    scenario = LabelFraction(RotatedDomains(degrees=[0, 22.5], share="split"), 0.5)
    return replace(scenario(data(3, 6), seed=-1, val_fraction=0.25), batch_size=4)


def test_a_manifest_file_comes_back_and_is_the_scenario_of_itself(tmp_path: Path) -> None:
    stream, path = manifest(), tmp_path / "stream.json"
    stream.save(path)
    stream.save(path)  # over itself
    assert Stream.load(path) == stream
    assert FromManifest(str(path))(data(3, 6), seed=9) == stream
    assert [item.name for item in tmp_path.iterdir()] == ["stream.json"]
    online = Online(FromManifest(str(path)))(data(3, 6), seed=9)
    assert online.hashes == stream.hashes
    with pytest.raises(ValueError, match="use the scenario that made the stream"):
        Online(FromManifest(str(path))).extend(online, data(4), seed=0)


def test_a_manifest_of_other_data_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "stream.json"
    info = data(4, 6)
    ClassIncremental(tasks=2)(info, seed=0).save(path)
    load = FromManifest(str(path))
    with pytest.raises(ValueError, match=r"stream\.json: Stream: task \d: train has index 23; the data has 23 samples"):
        load(replace(info, train_labels=info.train_labels[:-1]), seed=0)
    with pytest.raises(ValueError, match=r"task 1: test has index 15; the data has 15 samples"):
        load(replace(info, test_labels=info.test_labels[:-1]), seed=0)
    with pytest.raises(ValueError, match=r"class 0 \(column 0\) is 'class 0' in the stream and 'c 0' in the data"):
        load(data(4, 6, names="c {}"), seed=0)
    with pytest.raises(ValueError, match=r"class 3 \(column 3\) is 'class 3' in the stream and None in the data"):
        load(data(3, 6), seed=0)
    with pytest.raises(ValueError, match=r"task 0: train has sample \d+ of class 'class \d', which does not belong"):
        load(data(4, 6, shuffle=1), seed=0)


def _set(path: str, value: Any) -> Any:
    def change(content: dict[str, Any]) -> None:
        *way, last = [int(key) if key.isdecimal() else key for key in path.split(".")]
        place: Any = content
        for key in way:
            place = place[key]
        place[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("format", "zip"), "format: is 'zip'"),
        (_set("version", 2), "version: is 2; this release reads version 1"),
        (_set("version", True), "version: must be int, got bool"),
        (lambda content: content.pop("order"), "order: the field is missing"),
        (_set("order.0", 2), "order: is not the order"),
        (_set("class_names", ["a", "b"]), "class_names: 2 names for 3 columns"),
        (_set("class_names", ["a", "b", "b"]), "class_names: 'b' is given twice"),
        (_set("class_names.1", "x"), "task 0: hash: does not match"),
        (_set("tasks", []), "tasks: must hold at least one"),
        (_set("tasks.1.train.0", 0.5), "task 1: train: must hold int only, got float"),
        (_set("tasks.1.train.0", True), "task 1: train: must hold int only, got bool"),
        (_set("tasks.1.train.0", 10**30), "task 1: train: an index is beyond 64 bits"),
        (_set("tasks.1.train.0", -1), "task 1: train has the negative index -1"),
        (_set("tasks.1.train.0", 10**6), "task 1: unlabelled has samples that are not in train|task 1: hash"),
        (_set("tasks.1.train", []), "task 1: train is empty"),
        (_set("tasks.1.val", [0, 0]), "task 1: val has an index twice"),
        (_set("tasks.1.test", None), "task 1: test: must be list, got NoneType"),
        (_set("tasks.1.test.0", 1000), "task 1: hash: does not match"),
        (_set("tasks.1.name", "x"), "task 1: hash: does not match"),
        (_set("tasks.1.classes", [0, 0]), "task 1: classes: has a label twice"),
        (_set("tasks.1.index", 0), "task 1: index: is 0; tasks must be in order"),
        (_set("tasks.1.shift", ["rotate", 23]), "task 1: hash: does not match"),
        (_set("tasks.1.shift", ["shear", 23]), "task 1: shift: Shift: kind 'shear'"),
        (_set("tasks.1.shift", ["rotate", 10**400]), "task 1: shift: "),
        (_set("tasks.1.shift", ["rotate"]), "task 1: shift: must be null or"),
        (_set("tasks.1", 3), "tasks: must hold dict only, got int"),
        (_set("parts", []), "parts: must hold at least one"),
        (_set("parts.0.tasks", 3), "parts: their tasks add up to 3, the stream has 2"),
        (_set("parts.0.val_fraction", 1), "part 0: val_fraction: must be at least 0 and below 1"),
        (_set("passes", 0), "passes: must be at least 1"),
        (_set("batch_size", "many"), "batch_size: must be int or null, got str"),
        (_set("one_pass", 1), "one_pass: must be bool, got int"),
        (_set("scenario", []), "scenario: must be dict, got list"),
    ],
)
def test_the_error_of_a_changed_manifest_names_file_task_and_field(change: Any, message: str, tmp_path: Path) -> None:
    content, path = manifest().to_dict(), tmp_path / "stream.json"
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"^[^\n]*stream\.json: ({message})[^\n]*$"):
        Stream.load(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"NaN", b"[" * 100000, b"9" * 5000, b'{"version": 1}', b'{"passes": NaN}'],
)
def test_a_file_that_is_no_manifest_is_reported(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "stream.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^[^\n]*stream\.json: [^\n]+$"):
        Stream.load(path)
    with pytest.raises(ValueError, match=r"^[^\n]*absent\.json: cannot be read: [^\n]+$"):
        Stream.load(tmp_path / "absent.json")


def _spots(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way, *(spot for key, item in items for spot in _spots(item, (*way, key)))]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(st.data(), JSON)
def test_whatever_a_manifest_holds_nothing_but_value_error_comes_of_it(draw: st.DataObject, value: Any) -> None:
    content: Any = manifest().to_dict()
    *way, last = draw.draw(st.sampled_from(_spots(content)[1:]))
    place = content
    for key in way:
        place = place[key]
    place[last] = value
    problem = ""
    try:
        Stream.from_dict(json.loads(json.dumps(content))).check(data(3, 6))
    except ValueError as error:
        problem = str(error)
    assert "\n" not in problem


# Configuration


@pytest.mark.parametrize(
    "scenario",
    [
        ClassIncremental(first=4, increment=2, class_order=1993),
        ClassIncremental(tasks=2, class_order=["b", "a"]),
        ClassIncremental(sizes=[1, 2], class_order=[1, 0, 2]),
        FewShot(4, 2, 1, [[1, 2], [3, 4]], "random"),
        FewShot(4, 2, 1, "lists.json"),
        LabelFraction(LongTailed(Online(RotatedDomains(degrees=[0.0, 7.5])), 20.0, "shuffled"), per_class=3),
        Blurry(3, 40.0, 20.0, one_pass=False),
        FromManifest("stream.json"),
        NoisyLabels(PowerLawRehearsal(ClassIncremental(tasks=2), 0.5, "exponential", 2.0), 0.2, "asymmetric"),
    ],
)
def test_a_scenario_is_configured_by_its_description(scenario: Scenario) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--scenario", type=Scenario)
    told = json.dumps(scenario.describe())
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # renamed in jsonargparse 4.49
    assert instantiate(parser.parse_args(["--scenario", told])).scenario == scenario
