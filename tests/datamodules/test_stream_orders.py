"""Streams for test-time adaptation: shifts of labels, walks between corruptions, rounds, images of unknown classes."""

from typing import Any

import numpy as np
import pytest
import torch
from support.adaptation import adapt, stream, watching
from support.corrupted import TEST, begun, labels, raw

from cl_lightning.data import corrupt
from cl_lightning.data.joined import JoinedSource
from cl_lightning.datamodules.digits import Digits
from cl_lightning.datamodules.orders import arranged, interleaved, walk
from cl_lightning.measures import unknown_auroc
from cl_lightning.strategies.test_time.source import Source
from cl_lightning.strategies.test_time.tent import Tent


def test_under_label_shift_each_slot_has_a_frequent_class_of_its_own():
    values = np.repeat(np.arange(4), 60)
    chosen = arranged(values, "label_shift", np.random.default_rng(0), imbalance=9.0)
    assert sorted(chosen.tolist()) == list(range(240))
    counts = np.stack([np.bincount(slot, minlength=4) for slot in values[chosen].reshape(4, 60)])
    assert sorted(counts.flatten().tolist()) == [5] * 12 + [45] * 4  # 60 samples in shares 9 : 1 : 1 : 1
    assert sorted(counts.argmax(1).tolist()) == [0, 1, 2, 3]
    even = values[arranged(values, "label_shift", np.random.default_rng(0), imbalance=1.0)].reshape(4, 60)
    assert all(np.bincount(slot).tolist() == [15] * 4 for slot in even)


def test_groups_are_spread_evenly():
    assert interleaved(2, 4).tolist() == [2, 0, 3, 4, 1, 5]
    assert interleaved(3, 0).tolist() == [0, 1, 2]
    assert interleaved(2, 2).tolist() == [0, 2, 1, 3]


def test_a_walk_changes_one_severity_by_one_at_a_time():
    assert walk("fog", "snow", 2) == [
        (("fog", 2),),
        (("fog", 2), ("snow", 1)),
        (("fog", 1), ("snow", 1)),
        (("fog", 1), ("snow", 2)),
        (("snow", 2),),
    ]


def test_a_stream_walks_from_corruption_to_corruption():
    data = begun(2, setting="walk", severity=1, speed=8, samples=30, corruptions=["contrast", "fog", "brightness"])
    assert [task.name for task in data.stream.tasks] == ["source", "contrast to fog", "fog to brightness"]
    assert [len(part) for part in data.stream.train[1:]] == [24, 16]  # the second walk begins where the first one ends
    images = TEST.images[:30]
    both = corrupt(corrupt(images, "fog", 1), "brightness", 1)
    last = corrupt(images, "brightness", 1)
    places = torch.arange(24, 40) % 30  # the test images come again when all have been seen
    assert torch.equal(raw(data), torch.cat([both[places[:8]], last[places[8:]]]))
    assert labels(data) == TEST.labels[:30][places].tolist()
    tested = begun(1, setting="walk", severity=2, speed=5, corruptions=["contrast", "fog"], evaluated="all")
    assert len(tested.stream.test[1]) == 10  # those with one corruption


def test_rounds_repeat_all_corruptions():
    data = begun(3, rounds=2, samples=20, corruptions=["contrast", "fog"])
    assert [task.name for task in data.stream.tasks[1:]] == ["contrast", "fog", "contrast, round 2", "fog, round 2"]
    assert torch.equal(raw(data), corrupt(TEST.images, "contrast", 5)[:20])
    mixed = begun(1, setting="mixed", rounds=2, samples=20, corruptions=["contrast", "fog"])
    assert len(mixed.stream.train[1]) == 80


def test_unknown_classes_come_in_the_stream_alone():
    data = begun(1, unknown_classes=[7, 3], samples=100, corruptions=["fog"], evaluated="all")
    source = data.samples(train=True).labels
    assert {3, 7} & set(source[data.stream.train[0]].tolist()) == set()
    assert data.stream.tasks[0].num_new == 8
    assert [data.stream.class_names[column] for column in (8, 9)] == ["3", "7"]
    columns = torch.tensor(labels(data))
    expected = np.isin(TEST.labels[:100], [3, 7])
    assert ((columns >= 8).numpy() == expected).all()
    tested = data.samples(train=False).labels
    assert not any({3, 7} & set(tested[part].tolist()) for part in data.stream.test)
    assert len(data.stream.test[1]) == (~expected).sum()


def test_images_of_other_data_are_spread_over_the_stream_as_an_unknown_class():
    data = begun(1, unknown=Digits(), samples=10, corruptions=["fog"])
    assert data.stream.class_names[-1] == "unknown"
    assert labels(data)[::2] == TEST.labels[:10].tolist()
    assert labels(data)[1::2] == [10] * 10
    assert torch.equal(raw(data)[::2], corrupt(TEST.images, "fog", 5)[:10])
    assert torch.equal(raw(data)[1::2], corrupt(TEST.images[:10], "fog", 5, indices=range(len(TEST.images), 9999)[:10]))


class Narrow(Digits):
    def source(self, *, train: bool) -> Any:
        source = super().source(train=train)
        source.images = source.images[..., :7]
        return source


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"setting": "walk", "corruptions": ["fog"]}, "a walk needs two corruptions or rounds; there is fog alone"),
        ({"speed": 0}, "speed is 0"),
        ({"rounds": 0}, "rounds is 0"),
        ({"imbalance": 0.5}, "imbalance is 0.5"),
        ({"unknown_classes": [10]}, "unknown_classes has 10; give raw labels from 0 to 9"),
        ({"unknown_classes": list(range(10))}, "unknown_classes has all classes"),
        ({"unknown": Digits(), "folder": "here"}, "leave folder out with unknown"),
        ({"unknown": Narrow()}, "images of class 'unknown' have shape"),
    ],
)
def test_mistakes_are_reported(options, words):
    with pytest.raises(ValueError, match=words):
        stream(**options).make_stream(0)


def test_errors_count_known_classes_and_confidence_tells_unknown_ones_apart():
    strategy = watching(Source, source_head=None)
    made = adapt(strategy, stream(unknown_classes=[7, 3], samples=None, batch_size=71), max_epochs=4)
    data = made.datamodule
    scores = torch.cat(strategy.noted[1])
    found = torch.from_numpy(TEST.labels)
    unknown = torch.isin(found, torch.tensor([3, 7]))
    columns = torch.tensor([data.stream.class_names.index(str(label)) for label in found.tolist()])
    wrong = scores.argmax(1) != columns
    assert float(made.matrix.online_error[1]) == pytest.approx(float(wrong[~unknown].double().mean()))
    confidence = scores.softmax(1).max(1).values
    pairs = confidence[~unknown][:, None] - confidence[unknown][None]
    exact = float(((pairs > 0).double() + (pairs == 0).double() / 2).mean())
    assert float(made.matrix.unknown_auroc[1]) == pytest.approx(exact, abs=0.002)  # of bins
    assert 0.6 < exact < 1
    assert made.matrix.unknown_auroc[0].isnan()
    assert made.matrix.measures()["mean_unknown_auroc"] == pytest.approx(float(made.matrix.unknown_auroc[1:].mean()))


def test_the_area_is_half_for_equal_groups_and_one_for_separate_ones():
    counts = torch.zeros(2, 8, dtype=torch.int64)
    assert np.isnan(unknown_auroc(counts))
    counts[:, 3] = torch.tensor([5, 2])
    assert unknown_auroc(counts) == 0.5
    counts[0, 3], counts[0, 6] = 0, 4
    assert unknown_auroc(counts) == 1
    counts[1, 7] = 2
    assert unknown_auroc(counts) == 0.5


def test_counts_of_an_earlier_release_are_read():
    strategy = adapt(watching(Tent), stream(samples=60)).strategy
    state = strategy.state_dict()
    counts = state.pop("online.counts")
    del state["online.confidences"]
    other = adapt(watching(Tent), stream(samples=60, corruptions=["fog"])).strategy
    other.load_state_dict({**state, "online": counts})
    assert torch.equal(other.online.counts, counts)


def test_joined_samples_have_one_content_hash_whatever_their_place():
    source = Digits().source(train=False)
    joined = JoinedSource(source, source, "unknown")
    count = len(source.labels)
    rows = torch.tensor([count + 3, 1, 2])
    assert torch.equal(joined.take(rows), source.images[[3, 1, 2]])
    assert joined.labels[[0, count]].tolist() == [source.labels[0], 10]
    assert joined.digest(np.array([1, count + 3])) == joined.digest(np.array([1, count + 3]))
    assert joined.digest(np.array([1, count + 3])) != joined.digest(np.array([1, count + 4]))
