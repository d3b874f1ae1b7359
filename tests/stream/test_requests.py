"""Requests to hold, keep and forget: which samples they ask for, what a stream refuses, and manifests."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.streams import all_of, data

from cl_lightning.stream import (
    Blurry,
    ClassIncremental,
    FromManifest,
    LabelFraction,
    NoisyLabels,
    Request,
    Requests,
    Stream,
    Subset,
)

FIVE = ClassIncremental(tasks=5)


def made(*requests: Request, held: tuple[int, ...] = (), val: float = 0.0, base: Any = FIVE) -> Stream:
    return Requests(base, list(requests), held=list(held))(data(), seed=0, val_fraction=val)


def test_a_request_is_a_task_of_its_own_after_the_task_that_it_names() -> None:
    stream = made(Request(after=1, classes=["class 3"]), Request(tasks=[2, 4]), held=(2,), val=0.2)
    plain, info = FIVE(data(), seed=0, val_fraction=0.2), data()
    kinds = [task.request for task in stream.tasks]
    assert kinds == ["learn", "learn", "forget", "hold", "learn", "learn", "forget"]
    assert [task.learns for task in stream.tasks] == [True, True, False, True, True, True, False]
    assert [task.name for task in stream.tasks if not task.learns] == ["forget class class 3", "forget task 2, task 4"]
    base = [stream.train[task.index] for task in stream.tasks if task.learns]
    for mine, its in zip(base, plain.train, strict=True):
        np.testing.assert_array_equal(mine, its)
    held_out = set(all_of(plain.val))
    of_3 = set(np.flatnonzero(info.train_labels == 3).tolist()) - held_out
    assert set(stream.train[2].tolist()) == of_3
    assert set(stream.train[6].tolist()) == set(all_of((plain.train[2], plain.train[4])))
    for index in (2, 6):
        assert stream.tasks[index].num_new == 0
        assert not stream.val[index].size
        assert not stream.test[index].size
    assert stream.order == plain.order
    assert [part.tasks for part in stream.parts] == [7]
    stream.check(info)


def test_forgotten_samples_add_up_and_tasks_are_emptied_by_the_last_of_them() -> None:
    stream = made(Request(after=0, classes=[0]), Request(after=1, classes=[1, 2]), Request(tasks=[4]))
    assert [t.request for t in stream.tasks] == ["learn", "forget", "learn", "forget", *["learn"] * 3, "forget"]
    sizes = [len(stream.forgotten(index)) for index in range(-1, 8)]
    assert sizes == [0, 0, 20, 20, 60, 60, 60, 60, 100]
    assert stream.emptied(1) == ()
    assert stream.emptied(3) == (0,)  # class 2 is half of task 2
    assert stream.emptied(7) == (6,)


def test_a_share_is_drawn_from_each_class_by_the_seed_and_the_request() -> None:
    scenario = Requests(FIVE, [Request(fraction=0.25), Request(fraction=0.2, after=0), Request(fraction=0.25)])
    info = data()
    stream = scenario(info, seed=0)
    drawn = [info.train_labels[stream.train[task.index]] for task in stream.tasks if not task.learns]
    found = [np.bincount(labels, minlength=10).tolist() for labels in drawn]
    assert found == [[4, 4] + [0] * 8, [4, 4] + [5] * 8, [3, 3] + [4] * 8]  # of 20, of 16 or 20, of 12 or 15
    other = scenario(info, seed=1)
    assert set(other.train[-2].tolist()) != set(stream.train[-2].tolist())


def test_a_request_for_less_than_a_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="request 0: it asks for no sample that is left after task 4"):
        made(Request(fraction=0.01))


def test_a_manifest_keeps_the_requests_and_has_no_trace_of_them_without(tmp_path: Any) -> None:
    stream = made(Request(after=3, tasks=[1], kind="keep"), Request(classes=[0]), held=(1,))
    stream.save(tmp_path / "stream.json")
    again = FromManifest(str(tmp_path / "stream.json"))(data(), seed=5)
    assert again == stream
    assert [task.request for task in again.tasks] == [task.request for task in stream.tasks]
    assert stream.hashes[1] != FIVE(data(), seed=0).hashes[1]  # task 1 is held
    assert stream.hashes[0] == FIVE(data(), seed=0).hashes[0]
    assert "request" not in json.dumps(FIVE(data(), seed=0).to_dict()["tasks"])
    json.dumps(stream.scenario)
    broken = stream.to_dict()
    broken["tasks"][-1]["request"] = "revoke"
    with pytest.raises(ValueError, match="task 6: request is 'revoke'; use learn, hold, keep, forget"):
        Stream.from_dict(broken)


@pytest.mark.parametrize(
    ("requests", "held", "message"),
    [
        ([], (), "there are no requests"),
        ([Request()], (), "request 0: give one of classes, tasks and fraction, not 0"),
        ([Request(classes=[1], tasks=[0])], (), "give one of classes, tasks and fraction, not 2"),
        ([Request(fraction=1.0)], (), "fraction must be above 0 and below 1, got 1.0"),
        ([Request(fraction=0.5, kind="keep")], (), "whole tasks are kept; give tasks"),
        ([Request(classes=[1], kind="revoke")], (), "kind is 'revoke'; use forget or keep"),  # type: ignore[arg-type]
        ([Request(classes=[9], after=1)], (), "no samples of class 9 are learnt, or left, after task 1"),
        ([Request(classes=["none"])], (), "no samples of class 'none' are learnt"),
        ([Request(classes=[1]), Request(classes=[1])], (), "request 1: no samples of class 1 are learnt, or left"),
        ([Request(tasks=[3], after=2)], (), "task 3 is learnt after task 2, when the request arrives"),
        ([Request(tasks=[5])], (), "task 5 is none of the base, which has the tasks 0 to 4"),
        ([Request(tasks=[0], after=-1)], (), "task -1 is none of the base"),
        ([Request(tasks=[0], after=0)], (), "it asks to forget all samples that are left after task 0"),
        ([Request(tasks=[1], kind="keep")], (2,), "task 1 is not held after task 4; add it to held"),
        ([Request(tasks=[1], kind="keep"), Request(tasks=[1], kind="keep")], (1,), "task 1 is not held"),
        ([Request(tasks=[1])], (1, 1), "held has task 1 twice"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(requests: Any, held: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        made(*requests, held=held)
    assert "\n" not in str(caught.value)


def test_requests_are_put_around_other_modifiers_of_samples_with_labels() -> None:
    asked = Requests(FIVE, [Request(classes=[1])])
    for outer in (Subset(asked, 0.5), NoisyLabels(asked, 0.1), asked.__class__(asked, [Request(classes=[2])])):
        with pytest.raises(ValueError, match="put Requests around all other modifiers"):
            outer(data(), seed=0)
    assert len(made(Request(classes=[1]), base=Subset(FIVE, 0.5)).train[-1]) == 10
    for base in (LabelFraction(FIVE, 0.5), NoisyLabels(FIVE, 0.1)):
        with pytest.raises(ValueError, match="labels are hidden or wrong, or images are shifted"):
            made(Request(classes=[1]), base=base)
    with pytest.raises(ValueError, match="cannot be extended"):
        asked.extend(asked(data(), seed=0), data(12), seed=0)


def test_samples_are_not_learnt_again_after_a_request() -> None:
    with pytest.raises(ValueError, match="it asks to forget samples that a later task learns again"):
        replaced(made(Request(after=1, classes=[0])), 3, 0)
    with pytest.raises(ValueError, match="samples that no earlier task has, or that are forgotten already"):
        replaced(made(Request(after=1, classes=[0])), 2, 3)
    made(Request(after=1, classes=[0]), base=Blurry(tasks=5, disjoint=100, blurry=0))


def replaced(stream: Stream, task: int, by: int) -> Stream:
    """The stream with further samples of task ``by`` in a task."""
    train = list(stream.train)
    train[task] = np.union1d(train[task], train[by])
    classes = sorted({*stream.tasks[task].classes, *stream.tasks[by].classes})
    tasks = list(stream.tasks)
    columns = tuple(stream.order.index(label) for label in classes)
    tasks[task] = replace(tasks[task], classes=tuple(classes), columns=columns)
    return replace(stream, train=tuple(train), tasks=tuple(tasks))
