"""Streams whose later tasks are sessions without labels that mix old and new classes."""

import numpy as np
import pytest
from support.streams import data

from cl_lightning.stream import ClassIncremental, Discovery, LabelFraction, NoisyLabels, Stream


def test_sessions_have_new_classes_and_shares_of_all_old_ones_without_labels():
    info = data(classes=6, per_class=20)
    stream = Discovery(ClassIncremental(tasks=3, class_order="natural"), later=0.4)(info, seed=0)
    counts = [np.bincount(info.train_labels[part], minlength=6).tolist() for part in stream.train]
    assert counts == [[12, 12, 0, 0, 0, 0], [4, 4, 12, 12, 0, 0], [4, 4, 8, 8, 20, 20]]
    assert [len(part) for part in stream.unlabelled] == [0, 32, 64]
    assert all(
        np.array_equal(hidden, part) for hidden, part in zip(stream.unlabelled[1:], stream.train[1:], strict=True)
    )
    assert sorted(np.concatenate(stream.train).tolist()) == list(range(120))
    assert [task.new_classes for task in stream.tasks] == [(0, 1), (2, 3), (4, 5)]
    assert [np.unique(info.test_labels[part]).tolist() for part in stream.test] == [[0, 1], [2, 3], [4, 5]]
    assert Stream.from_dict(stream.to_dict()) == stream
    other = Discovery(ClassIncremental(tasks=3, class_order="natural"), later=0.4)(info, seed=1)
    assert not np.array_equal(other.train[0], stream.train[0])


def test_without_old_samples_a_session_has_new_classes_alone():
    info = data(classes=6, per_class=20)
    stream = Discovery(ClassIncremental(tasks=3, class_order="natural"), later=0.0)(info, seed=0)
    assert [np.unique(info.train_labels[part]).tolist() for part in stream.train] == [[0, 1], [2, 3], [4, 5]]


def test_an_extended_stream_keeps_its_sessions():
    scenario = Discovery(ClassIncremental(increment=2, class_order="natural"), later=0.4)
    few, more = data(classes=4, per_class=20), data(classes=8, per_class=20)
    short = scenario(few, seed=0)
    longer = scenario.extend(short, more, seed=1)
    for task in range(2):
        assert len(longer.train[task]) == len(short.train[task])
    assert [np.unique(more.train_labels[part]).tolist() for part in longer.train[2:]] == [[4, 5], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        (lambda: Discovery(ClassIncremental(tasks=2), later=1.0), "later must be at least 0 and below 1"),
        (lambda: Discovery(LabelFraction(ClassIncremental(tasks=2), per_class=1)), "labels are already hidden"),
        (lambda: Discovery(NoisyLabels(ClassIncremental(tasks=2), rate=0.4)), "labels are noisy already"),
    ],
)
def test_what_does_not_fit_is_refused(scenario, message):
    with pytest.raises(ValueError, match=f"Discovery: {message}"):
        scenario()(data(), seed=0)
