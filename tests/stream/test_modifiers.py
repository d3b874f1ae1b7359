"""Modifiers of scenarios."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from support.streams import all_of, data, folders

from cl_lightning.stream import (
    Blurry,
    ClassIncremental,
    DatasetInfo,
    LabelFraction,
    LongTailed,
    Online,
    PermutedDomains,
    SingleTask,
    Split,
    Splitter,
    Stream,
    Subset,
)

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
