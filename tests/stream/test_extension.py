"""Streams that are extended."""

import numpy as np
import pytest
from support.streams import data, domains, folders, images

from cl_lightning.stream import (
    Blurry,
    ClassIncremental,
    DatasetInfo,
    DomainIncremental,
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
