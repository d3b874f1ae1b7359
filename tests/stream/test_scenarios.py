"""Domains, few-shot and blurry streams."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.streams import FEW_SHOT_LISTS, all_of, data, domains

from cl_lightning.stream import (
    Blurry,
    ClassIncremental,
    DatasetInfo,
    DomainIncremental,
    FewShot,
    PermutedDomains,
    RotatedDomains,
    Scenario,
    Shift,
)

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
