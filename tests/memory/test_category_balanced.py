"""A memory balanced over predicted classes that prefers recent and certain samples."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cl_lightning.batch import Draw
from cl_lightning.memory import CategoryBalancedMemory, category_balanced
from cl_lightning.memory.category_balanced import Arrivals


def one_after_another(stream, size, num_classes, time_weight, uncertainty_weight):
    """The published rule on lists of the items of each class, whose ages are counted."""
    of_class = [[] for _ in range(num_classes)]

    def score(age, unsure):
        return time_weight / (1 + math.exp(-age / size)) + uncertainty_weight * unsure / math.log(num_classes)

    for place, (label, unsure) in enumerate(stream):
        counts = [len(items) for items in of_class]
        rivals = None
        if counts[label] >= size / num_classes:
            rivals = [label]
        elif sum(counts) == size:
            rivals = [c for c in range(num_classes) if counts[c] == max(counts)]
        stored = rivals is None
        if rivals is not None:
            items = [(score(item.age, item.unsure), c, n) for c in rivals for n, item in enumerate(of_class[c])]
            worst, c, n = max(items)
            if worst > score(0, unsure):
                del of_class[c][n]
                stored = True
        if stored:
            of_class[label].append(SimpleNamespace(age=0, unsure=unsure, place=place))
        for item in (item for items in of_class for item in items):
            item.age += 1
    return sorted((item.place, c, item.age) for c, items in enumerate(of_class) for item in items)


def arrivals(stream):
    labels, unsure = zip(*stream, strict=True)
    return Arrivals(np.array(labels), np.arange(len(stream)), np.array(unsure, dtype=np.float64))


def held(stream, size, num_classes, **weights):
    """Indices of the samples that a memory holds after a stream."""
    return sorted(category_balanced(arrivals(stream), 0, size, num_classes, **weights))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.3, 2.0)])
@pytest.mark.parametrize(("size", "num_classes"), [(7, 3), (12, 4), (3, 5), (1, 2)])
def test_it_follows_the_rule_of_the_paper_for_each_sample_in_turn(size, num_classes, weights):
    generator = np.random.default_rng(size)
    for _ in range(4):
        share = generator.dirichlet(np.ones(num_classes))
        labels = generator.choice(num_classes, 60, p=share).tolist()
        unsure = (generator.integers(0, 9, 60) / 8 * math.log(num_classes)).tolist()  # with ties
        stream = list(zip(labels, unsure, strict=True))
        expected = one_after_another(stream, size, num_classes, *weights)
        found = held(stream, size, num_classes, time_weight=weights[0], uncertainty_weight=weights[1])
        assert found == [place for place, _, _ in expected]
        counts = np.bincount(np.array(labels)[found], minlength=num_classes)
        assert counts.max() <= math.ceil(size / num_classes)


def test_among_equally_certain_samples_the_oldest_of_the_fullest_class_leaves():
    # Room for 5 items of 2 classes: 3 of a class at most.
    stream = [(1, 0.1), (0, 0.1), (0, 0.1), (0, 0.1), (1, 0.1)]
    assert held(stream, 5, 2) == [0, 1, 2, 3, 4]
    for label in (0, 1):  # class 0 is full; class 1 has room, but the memory has none
        assert held([*stream, (label, 0.1)], 5, 2) == [0, 2, 3, 4, 5]


def test_a_sample_less_certain_than_age_makes_up_for_is_dropped():
    # One class of two, room for one item of each. The item is one sample older: 1 / (1 + exp(-1/2)) - 1/2 = .12246.
    ln2 = math.log(2)
    assert held([(0, 0.3 * ln2), (0, (0.3 + 0.1224) * ln2)], 2, 2) == [1]
    assert held([(0, 0.3 * ln2), (0, (0.3 + 0.1225) * ln2)], 2, 2) == [0]
    assert held([(0, 0.3 * ln2), (0, (0.3 + 0.1225) * ln2)], 2, 2, time_weight=1.1) == [1]
    assert held([(0, 0.3 * ln2), (0, (0.3 + 0.1224) * ln2)], 2, 2, uncertainty_weight=1.1) == [0]
    assert held([(0, 0.3), (0, 0.3)], 2, 2, time_weight=0.0) == [0]  # an equal score is not larger


def test_a_single_class_has_the_whole_memory():
    assert held([(0, 0.0)] * 5, 3, 1) == [2, 3, 4]


def fed(memory, stream, num_classes, pieces=(1000,)):
    labels, unsure = (torch.tensor(values) for values in zip(*stream, strict=True))
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    start = 0
    for piece in pieces:
        rows = slice(start, start + piece)
        batch = (images[rows], labels[rows], labels[rows] + 10, unsure[rows].float())
        memory.arrive(*batch, Draw.of(len(labels[rows]), start), num_classes)
        start += piece
    return memory


def contents(memory):
    order = memory.fields["places"].argsort()
    rows = (memory.images[:, 0, 0, 0], memory.fields["places"], memory.labels, memory.tasks)
    return [values[order].tolist() for values in rows], memory.fields["uncertainties"][order]


def test_pieces_of_a_stream_give_the_memory_of_the_whole_and_a_restored_one_continues():
    generator = np.random.default_rng(0)
    labels = np.sort(generator.integers(0, 4, 50)).tolist()
    stream = list(zip(labels, generator.random(50).tolist(), strict=True))
    whole = fed(CategoryBalancedMemory(10), stream, 4)
    parts = fed(CategoryBalancedMemory(10), stream, 4, (3, 0, 20, 1, 26))
    expected = [place for place, _, _ in one_after_another(stream, 10, 4, 1.0, 1.0)]
    for memory in (whole, parts):
        rows, unsure = contents(memory)
        assert rows == [expected, expected, [labels[n] for n in expected], [labels[n] + 10 for n in expected]]
        torch.testing.assert_close(unsure, torch.tensor([stream[n][1] for n in expected]))
        assert int(memory.num_seen) == 50
        # Each item: 4 pixels, label, task, key, place, uncertainty; and the number of arrivals.
        assert memory.num_bytes() == len(expected) * (4 + 8 + 8 + 8 + 8 + 4) + 8
    first = fed(CategoryBalancedMemory(10), stream[:30], 4)
    restored = CategoryBalancedMemory(3)
    restored.load_state_dict(first.state_dict())
    for memory in (first, restored):
        memory.arrive(
            torch.zeros(2, 1, 2, 2, dtype=torch.uint8),
            *torch.tensor([[0, 3], [0, 0]]),
            torch.zeros(2),
            Draw.of(2, 1),
            4,
        )
    assert contents(first)[0] == contents(restored)[0]


def test_a_cleared_memory_starts_the_stream_again():
    stream = [(n % 3, 0.1 * n) for n in range(9)]
    memory = fed(CategoryBalancedMemory(5), stream, 3)
    memory.clear()
    assert len(memory) == int(memory.num_seen) == 0
    assert contents(fed(memory, stream, 3))[0] == contents(fed(CategoryBalancedMemory(5), stream, 3))[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 0}, "size is 0"),
        ({"size": 4, "time_weight": -1.0}, r"time_weight is -1\.0"),
        ({"size": 4, "uncertainty_weight": -0.5}, r"uncertainty_weight is -0\.5"),
    ],
)
def test_options_out_of_range_are_errors(options, words):
    with pytest.raises(ValueError, match=f"CategoryBalancedMemory: {words}"):
        CategoryBalancedMemory(**options)
