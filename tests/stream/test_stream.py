"""Class-incremental streams, and what holds for all."""

import json
import os
import subprocess
import sys
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ROOT
from support.streams import all_of, data, folders, images

from cl_lightning.batch import mix as scalar_mix
from cl_lightning.hashing import hash64
from cl_lightning.stream import (
    Blurry,
    ClassIncremental,
    DatasetInfo,
    FewShot,
    LabelFraction,
    LongTailed,
    Online,
    PermutedDomains,
    RotatedDomains,
    Scenario,
    SingleTask,
    Stream,
    Subset,
)
from cl_lightning.stream.draws import rank_in_group, split

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
