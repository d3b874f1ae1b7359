"""Streams of samples with several classes, against sets made by hand."""

import numpy as np
import pytest

from cl_lightning.stream import DatasetInfo, DomainIncremental, LabelSets, PowerLawRehearsal, SingleTask, Stream, Subset

NAMES = ("background", "a", "b", "c", "d")


def info(train, test, domains=None, background=True):
    """Data whose samples have the given classes."""

    def sets(samples):
        found = np.zeros((len(samples), 5), bool)
        for row, classes in enumerate(samples):
            found[row, list(classes)] = True
            found[row, 0] |= background
        return found

    parts = [sets(train), sets(test)]
    labels = [np.where(part[:, 1:].any(1), part[:, 1:].argmax(1) + 1, 0) for part in parts]
    more = {}
    if domains is not None:
        more = {"train_domains": np.array(domains), "test_domains": np.array([0, 1]), "domain_names": ("x", "y")}
    return DatasetInfo(*labels, NAMES, train_sets=parts[0], test_sets=parts[1], **more)


DATA = info([{1}, {2}, {3}, {4}, {1, 3}, {2, 4}, {3, 4}, {1, 2, 3, 4}], [{1}, {3}, {1, 4}, {2, 3}, {2}])


def test_overlapped_tasks_have_each_sample_with_a_class_of_theirs():
    stream = LabelSets(tasks=2, background="background")(DATA, seed=0)
    assert [task.classes for task in stream.tasks] == [(0, 1, 2), (0, 3, 4)]
    assert [task.columns for task in stream.tasks] == [(0, 1, 2), (0, 3, 4)]
    assert [part.tolist() for part in stream.train] == [[0, 1, 4, 5, 7], [2, 3, 4, 5, 6, 7]]
    assert [part.tolist() for part in stream.test] == [[0, 4], [1, 2, 3]]
    assert Stream.from_dict(stream.to_dict()) == stream
    stream.check(DATA)


def test_disjoint_tasks_have_no_sample_with_a_later_class():
    stream = LabelSets(tasks=2, background="background", setting="disjoint")(DATA, seed=0)
    assert [part.tolist() for part in stream.train] == [[0, 1], [2, 3, 4, 5, 6, 7]]


def test_the_order_is_of_the_classes_and_the_background_stays_first():
    stream = LabelSets(sizes=[1, 3], background="background", class_order=[4, 2, 0, 1, 3])(DATA, seed=0)
    assert stream.order == (0, 4, 2, 1, 3)
    assert [task.classes for task in stream.tasks] == [(0, 4), (0, 2, 1, 3)]
    assert [part.tolist() for part in stream.train] == [[3, 5, 6, 7], [0, 1, 2, 4, 5, 6, 7]]
    assert [part.tolist() for part in stream.test] == [[], [0, 1, 2, 3, 4]]


def test_without_background_all_classes_make_members():
    data = info([{0}, {1}, {2}, {3}, {4}, {0, 4}], [{0}, {4, 1}], background=False)
    stream = LabelSets(sizes=[2, 3])(data, seed=0)
    assert [part.tolist() for part in stream.train] == [[0, 1, 5], [2, 3, 4, 5]]
    assert [part.tolist() for part in stream.test] == [[0], [1]]


def test_a_sample_is_held_out_in_all_its_tasks_or_in_none():
    data = info([{1, 3}] * 40 + [{2, 4}] * 40, [{1}])
    stream = LabelSets(tasks=2, background="background")(data, seed=0, val_fraction=0.25)
    held, trained = (set(np.concatenate(parts).tolist()) for parts in (stream.val, stream.train))
    assert len(held) == 20
    assert not held & trained
    assert stream.val[0].tolist() == stream.val[1].tolist()


def test_other_scenarios_have_all_classes_of_the_samples():
    stream = SingleTask()(DATA, seed=0)
    assert stream.tasks[0].classes == (0, 1, 2, 3, 4)
    assert len(stream.test[0]) == 5
    data = info([{1, 2}, {3}, {4}, {1}], [{1}, {4, 2}], domains=[0, 0, 1, 1])
    stream = DomainIncremental()(data, seed=0)
    assert [task.classes for task in stream.tasks] == [(0, 1, 2, 3), (0, 1, 4)]


def test_an_extension_keeps_the_earlier_tasks():
    first = LabelSets(increment=2, background="background")
    part = info([{1}, {2}, {3}, {4}, {1, 3}], [{1}, {3}])
    stream = first(part, seed=0)
    names = (*NAMES, "e", "f")
    sets = [np.pad(each, ((0, 0), (0, 2))) for each in (part.train_sets, part.test_sets)]
    sets[0] = np.concatenate([sets[0], np.array([[1, 0, 0, 0, 0, 1, 1]], bool)])
    labels = [np.append(part.train_labels, 5), part.test_labels]
    longer = DatasetInfo(*labels, names, train_sets=sets[0], test_sets=sets[1])
    extended = first.extend(stream, longer, seed=0)
    assert [task.classes for task in extended.tasks] == [(0, 1, 2), (0, 3, 4), (0, 5, 6)]
    assert extended.train[2].tolist() == [5]


def test_a_subset_adds_no_class_to_a_task():
    stream = Subset(LabelSets(tasks=2, background="background"), fraction=0.5)(
        info([{1, 3}, {2, 4}] * 8, [{1}]), seed=0
    )
    assert [task.classes for task in stream.tasks] == [(0, 1, 2), (0, 3, 4)]
    assert [len(part) for part in stream.train] == [8, 8]


def two(train, test, *sets):
    """Data of two classes."""
    return DatasetInfo(np.array(train), np.array(test), ("a", "b"), train_sets=sets[0], test_sets=sets[1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LabelSets(tasks=2, setting="all"), "use overlapped or disjoint"),
        (lambda: LabelSets(tasks=2, background="sky")(DATA, seed=0), "background is 'sky'"),
        (
            lambda: LabelSets(tasks=2)(DatasetInfo(np.arange(2), np.arange(2), ("a", "b")), seed=0),
            "one class each; use ClassIncremental",
        ),
        (lambda: PowerLawRehearsal(LabelSets(tasks=2, background="background"))(DATA, seed=0), "several classes"),
        (
            lambda: two([0, 0], [0], np.eye(2), np.eye(2)[:1]),
            "sample 1 has label 0, which is not in its set",
        ),
        (lambda: two([0], [0], np.ones((1, 2)), None), "give both"),
        (
            lambda: two([0], [0], np.ones((1, 3)), np.ones((1, 2))),
            r"shape \(1, 3\); expected \(1, 2\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
