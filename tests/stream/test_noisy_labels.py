"""Streams with wrong labels: how many, which, and that they stay the same in manifests and extensions."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from cl_lightning.hashing import IntArray
from cl_lightning.stream import (
    Blurry,
    ClassIncremental,
    DatasetInfo,
    LabelFraction,
    LongTailed,
    NoisyLabels,
    Online,
    PermutedDomains,
    SingleTask,
    Split,
    Splitter,
    Stream,
    Subset,
)
from cl_lightning.stream.draws import rank_in_group


def folders(sizes: dict[str, int], test: int = 2) -> DatasetInfo:
    """One folder per class, in the order of their names."""
    names, counts = tuple(sorted(sizes)), [sizes[name] for name in sorted(sizes)]
    return DatasetInfo(np.repeat(np.arange(len(names)), counts), np.repeat(np.arange(len(names)), test), names)


DATA = folders(dict.fromkeys("abcdef", 20))
THREES = ClassIncremental(tasks=2, class_order=[2, 0, 5, 1, 4, 3])


def transitions(stream: Stream, info: DatasetInfo, task: int) -> IntArray:
    """Number of wrong labels from each class of the data (rows) to each given class (columns)."""
    table = np.zeros((info.num_classes, info.num_classes), np.int64)
    np.add.at(table, (info.train_labels[stream.noisy[task]], stream.given[task]), 1)
    return table


def test_asymmetric_noise_gives_the_next_class_of_the_task_and_the_last_class_the_first():
    stream = NoisyLabels(THREES, rate=0.3, kind="asymmetric")(DATA, seed=0)
    for task, cycle in enumerate([(2, 0, 5, 2), (1, 4, 3, 1)]):
        expected = np.zeros((6, 6), np.int64)
        for label, other in pairwise(cycle):
            expected[label, other] = 6  # 0.3 of 20
        assert transitions(stream, DATA, task).tolist() == expected.tolist()
    changed = stream.given_labels(DATA.train_labels)
    assert (changed != DATA.train_labels).sum() == 36
    assert np.array_equal(np.flatnonzero(changed != DATA.train_labels), np.sort(np.concatenate(stream.noisy)))


def test_symmetric_noise_is_uniform_over_the_other_classes_of_the_task():
    info = folders(dict.fromkeys("abcdef", 3000))
    stream = NoisyLabels(THREES, rate=0.5)(info, seed=0)
    for task, classes in enumerate([(2, 0, 5), (1, 4, 3)]):
        table = transitions(stream, info, task)
        assert table.sum(1).tolist() == [1500 if label in classes else 0 for label in range(6)]
        others = table[np.ix_(classes, classes)][~np.eye(3, dtype=bool)]
        assert np.abs(others - 750).max() < 80  # four standard deviations of a binomial
        assert table.diagonal().sum() == 0


def test_the_number_of_wrong_labels_is_rounded_and_a_class_keeps_one_correct_label():
    info = folders({"a": 1, "b": 2, "c": 5, "d": 10})
    stream = NoisyLabels(SingleTask(), rate=0.9)(info, seed=0)
    assert transitions(stream, info, 0).sum(1).tolist() == [0, 1, 4, 9]
    assert transitions(NoisyLabels(SingleTask(), rate=0.5)(info, seed=0), info, 0).sum(1).tolist() == [0, 1, 3, 5]
    clean = NoisyLabels(THREES, rate=0.0)(DATA, seed=0)
    assert clean.hashes == THREES(DATA, seed=0).hashes
    assert clean.given_labels(DATA.train_labels) is DATA.train_labels


def test_hidden_labels_and_validation_samples_are_not_counted_and_not_changed():
    scenario = NoisyLabels(LabelFraction(THREES, fraction=0.5), rate=0.25)
    stream = scenario(DATA, seed=0, val_fraction=0.2)
    for task in range(2):
        assert transitions(stream, DATA, task).sum() == 3 * 2  # 16 of 20 in training, 8 labelled, a quarter is wrong
        assert not np.isin(stream.noisy[task], stream.unlabelled[task]).any()
        assert not np.isin(stream.noisy[task], stream.val[task]).any()
    labels = stream.given_labels(DATA.train_labels)
    rest = np.concatenate([*stream.val, *stream.unlabelled])
    assert np.array_equal(labels[rest], DATA.train_labels[rest])


def test_seeds_choose_other_samples_and_further_modifiers_keep_the_noise():
    stream = NoisyLabels(THREES, rate=0.3)(DATA, seed=0)
    other = NoisyLabels(THREES, rate=0.3)(DATA, seed=1)
    assert stream.noisy[0].tolist() != other.noisy[0].tolist()
    online = Online(NoisyLabels(THREES, rate=0.3))(DATA, seed=0)
    assert online.hashes == stream.hashes
    assert NoisyLabels(Online(THREES), rate=0.3)(DATA, seed=0).one_pass


def test_a_class_that_comes_back_has_wrong_labels_of_each_task():
    info = folders(dict.fromkeys("abcdef", 40))
    scenario = NoisyLabels(Blurry(tasks=2, disjoint=0, blurry=30), rate=0.3)
    stream = scenario(info, seed=0)
    for task in stream.tasks:
        labels, table = info.train_labels[stream.train[task.index]], transitions(stream, info, task.index)
        expected = np.minimum(np.floor(np.bincount(labels, minlength=6) * 0.3 + 0.5), np.bincount(labels, minlength=6))
        assert table.sum(1).tolist() == expected.tolist()
        assert set(np.flatnonzero(table.sum(0))) <= set(task.classes)
    assert any(not task.num_new or len(task.classes) > task.num_new for task in stream.tasks)


def test_a_sample_of_several_tasks_has_one_label():
    before = NoisyLabels(PermutedDomains(2), rate=0.3)(DATA, seed=0)
    assert np.array_equal(before.noisy[0], before.noisy[1])
    assert np.array_equal(before.given[0], before.given[1])
    after = NoisyLabels(PermutedDomains(4), rate=0.3).extend(before, DATA, seed=0)
    assert after.hashes[:2] == before.hashes
    for task in range(4):
        assert np.array_equal(after.noisy[task], before.noisy[0])


class Overlapping(Splitter):
    """The same samples of class a in two tasks."""

    def split(self, info: DatasetInfo, seed: int, earlier: Stream | None) -> Split:
        rows = [np.flatnonzero(np.isin(info.train_labels, labels)) for labels in ([0, 1], [0, 2])]
        return Split(rows, np.arange(3), ["first", "second"])

    def describe(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NoisyLabels(SingleTask(), rate=1.0), "rate must be at least 0 and below 1, got 1.0"),
        (lambda: NoisyLabels(SingleTask(), rate=-0.1), "rate must be at least 0 and below 1, got -0.1"),
        (lambda: NoisyLabels(SingleTask(), rate=float("nan")), "rate must be at least 0 and below 1, got nan"),
        (lambda: NoisyLabels(SingleTask(), 0.1, "pair"), "kind 'pair'; use symmetric or asymmetric"),  # type: ignore
        (lambda: NoisyLabels(ClassIncremental(increment=1), 0.1)(DATA, seed=0), r"task 0 \(.*\) has one class, and no"),
        (lambda: NoisyLabels(NoisyLabels(THREES, 0.1), 0.1)(DATA, seed=0), "noisy already; put .* only once"),
        (lambda: LabelFraction(NoisyLabels(THREES, 0.1), 0.5)(DATA, seed=0), "put NoisyLabels around LabelFraction"),
        (lambda: LongTailed(NoisyLabels(THREES, 0.1))(DATA, seed=0), "put NoisyLabels around LongTailed"),
        (lambda: Subset(NoisyLabels(THREES, 0.1), 0.5)(DATA, seed=0), "put NoisyLabels around Subset"),
        (
            lambda: NoisyLabels(Overlapping(), 0.5)(folders({"a": 9, "b": 9, "c": 9}), seed=0),
            r"task 1 \(second\) has samples of an earlier task with labels that are no classes of task 1",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_manifest_keeps_the_noise_and_has_no_trace_of_it_without():
    stream = NoisyLabels(THREES, rate=0.3)(DATA, seed=0)
    content = stream.to_dict()
    again = Stream.from_dict(content)
    assert again == stream
    again.check(DATA)
    assert np.array_equal(again.given_labels(DATA.train_labels), stream.given_labels(DATA.train_labels))
    plain = THREES(DATA, seed=0)
    assert not {"noisy", "given"} & set(plain.to_dict()["tasks"][0])
    assert all(one != other for one, other in zip(stream.hashes, plain.hashes, strict=True))
    content["tasks"][1]["given"][0] = content["tasks"][1]["given"][0] ^ 1
    with pytest.raises(ValueError, match=r"task 1: (given has labels that are no classes|hash: does not match)"):
        Stream.from_dict(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noisy": ([0], []), "given": ([1, 0], [])}, "task 0: given has 2 labels for 1 samples of noisy"),
        ({"noisy": ([12], []), "given": ([1], [])}, "task 0: noisy has samples that are not in train"),
        ({"noisy": ([5], []), "given": ([1], [])}, "task 0: noisy has samples whose label is hidden"),
        ({"noisy": ([0], []), "given": ([3], [])}, "task 0: given has labels that are no classes of the task"),
        ({"noisy": ([0, 0], []), "given": ([1, 1], [])}, "task 0: noisy has an index twice"),
    ],
)
def test_a_stream_with_contradicting_labels_is_refused(change: dict[str, Any], message: str):
    stream = ClassIncremental(tasks=2)(folders(dict.fromkeys("abcd", 5)), seed=0)
    arrays = {name: tuple(np.array(part, np.int64) for part in parts) for name, parts in change.items()}
    with pytest.raises(ValueError, match=message):
        replace(stream, unlabelled=(np.array([5]), np.array([], np.int64)), **arrays)


def test_a_sample_with_two_labels_is_refused():
    stream = PermutedDomains(2)(folders(dict.fromkeys("abc", 5)), seed=0)
    noisy = (np.array([0]), np.array([0]))
    with pytest.raises(ValueError, match="a sample of several tasks has different labels"):
        replace(stream, noisy=noisy, given=(np.array([1]), np.array([2])))
    with pytest.raises(ValueError, match="task 1: noisy lacks samples of train that are noisy in another task"):
        replace(stream, noisy=(noisy[0], noisy[0][:0]), given=(np.array([1]), noisy[0][:0]))


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_an_extension_keeps_the_given_labels_though_raw_labels_shift(kind: Any):
    sizes = {"dog": 20, "cat": 30, "eel": 10, "fox": 16}
    old = folders(sizes)
    scenario = NoisyLabels(ClassIncremental(increment=2, class_order="random"), rate=0.4, kind=kind)
    before = scenario(old, seed=1, val_fraction=0.2)
    new = folders({**sizes, "ape": 20, "bee": 21})
    after = scenario.extend(Stream.from_dict(before.to_dict()), new, seed=2)
    assert len(after) == 3

    def named(stream: Stream, info: DatasetInfo, task: int) -> set[tuple[str, int, str]]:
        place, _ = rank_in_group(info.train_labels)
        return {
            (info.class_names[info.train_labels[row]], int(place[row]), info.class_names[label])
            for row, label in zip(stream.noisy[task], stream.given[task], strict=True)
        }

    for task in range(2):
        assert named(after, new, task) == named(before, old, task)
    assert len(named(after, new, 2)) == 16  # 8 of 20 and 8 of 21
