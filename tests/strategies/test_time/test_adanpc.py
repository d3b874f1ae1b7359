import math
from functools import partial
from typing import Any

import pytest
import torch
from support.adaptation import (
    adapt,
    batches,
    normalised,
    scores,
    source_network,
    stream,
    tiny_resnet,
    watching,
)
from support.fakes import normal
from torch.nn import functional as F

from cl_lightning.datamodules.digits import Digits
from cl_lightning.models import Output
from cl_lightning.strategies.test_time.adanpc import AdaNPC, NeighbourMemory, neighbour_shares
from cl_lightning.strategies.test_time.tent import Tent
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "AdaNPC": Subject(small(AdaNPC, backbone=tiny_resnet, neighbours=3, capacity=30)),
}


def share(z: list[float], memory: list[tuple[list[float], int]], classes: int, k: int, t: float) -> list[float]:
    """p of one feature, from the card of the method."""
    similar = sorted(((sum(a * b for a, b in zip(z, m, strict=True)), y) for m, y in memory), reverse=True)[:k]
    weights = [math.exp(s / t) for s, _ in similar]
    p = [0.0] * classes
    for weight, (_, label) in zip(weights, similar, strict=True):
        p[label] += weight / sum(weights)
    return [min(1.0, value + 1e-5) for value in p]


@pytest.mark.parametrize(("k", "t"), [(1, 0.1), (4, 0.1), (4, 1.0), (50, 0.5)])
def test_shares_are_the_weights_of_the_labels_of_the_nearest(k, t):
    memory, z = (F.normalize(normal(n, 3, seed=n), dim=1) for n in (12, 5))
    labels = torch.arange(12) % 3
    found = neighbour_shares(z, memory, labels, 4, neighbours=k, temperature=t)
    pairs = list(zip(memory.tolist(), labels.tolist(), strict=True))
    expected = torch.tensor([share(row, pairs, 4, k, t) for row in z.tolist()], dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    assert (found[:, 3] == 1e-5).all()


def by_hand(made: Any, threshold: float, capacity: int | None) -> torch.Tensor:
    """The scores of a stream with 5 neighbours and t = 0.2, and what is stored."""
    plain, source = source_network("source"), Digits().source(train=True)
    with torch.no_grad():
        features = F.normalize(plain(normalised(torch.as_tensor(source.images))).features, dim=1)
    labels = torch.from_numpy(source.labels).long()
    late, found = [], []
    for images, _ in batches(made.datamodule):
        kept = late if capacity is None else late[max(0, len(late) - capacity) :]
        memory = torch.cat([features, *(z[None] for z, _ in kept)])
        known = torch.cat([labels, torch.tensor([y for _, y in kept], dtype=torch.int64)])
        with torch.no_grad():
            z = F.normalize(plain(images).features, dim=1)
        near = (z @ memory.T).sort(dim=1, descending=True)
        weights = (near.values[:, :5] / 0.2).softmax(1)
        hits = F.one_hot(known[near.indices[:, :5]], 10) * weights[..., None]
        p = (hits.sum(1) + 1e-5).clamp(max=1)
        found.append(p.log())
        late = kept + [(a, int(b.argmax())) for a, b in zip(z, p, strict=True) if b.softmax(0).max() >= threshold]
    return torch.cat(found)


@pytest.mark.parametrize(("threshold", "capacity"), [(0.0, None), (0.2, None), (1.1, None), (0.0, 70), (0.0, 0)])
def test_scores_are_those_of_plain_loops(threshold, capacity):
    strategy = watching(AdaNPC, neighbours=5, temperature=0.2, threshold=threshold, capacity=capacity)
    made = adapt(strategy)
    torch.testing.assert_close(scores(strategy), by_hand(made, threshold, capacity), rtol=1e-3, atol=1e-3)
    head = strategy.parts.output
    stored = (len(head.labels), len(head.latest_labels))
    if threshold == 0.2:
        assert 0 < stored[0] < 380
    else:
        assert stored == ((0, 0) if threshold else (380 if capacity is None else capacity, 20))
    assert strategy.bytes_kept()["parts"] == head.num_bytes() > 0


def test_one_neighbour_of_a_source_image_is_itself():
    head, features = NeighbourMemory(neighbours=1), F.normalize(normal(6, 3).float(), dim=1)
    head.source, head.source_labels = features, torch.tensor([2, 0, 1, 1, 2, 0])
    head.reset()
    found = head(Output(7 * features, torch.zeros(6, 3)))  # the length does not matter
    assert found.argmax(dim=1).tolist() == [2, 0, 1, 1, 2, 0]


def test_a_batch_is_stored_when_the_next_one_arrives():
    head, features = NeighbourMemory(neighbours=1), torch.eye(3)
    head.source, head.source_labels = features[:2], torch.tensor([0, 1])
    head.reset()
    new = Output(torch.tensor([[0.6, 0.0, 0.8], [0.0, 0.6, 0.8]]), torch.zeros(2, 2))
    before = head(new)
    head.learn(new)
    assert torch.equal(head(new), before)
    assert head.latest_labels.tolist() == [0, 1]
    head.learn(Output(features[2:], torch.zeros(1, 2)))
    assert head.labels.tolist() == [0, 1]
    torch.testing.assert_close(head.features, new.features)
    head.reset()
    assert len(head.labels) == len(head.latest_labels) == 0


def test_a_reset_forgets_the_stream():
    both, alone = watching(AdaNPC, reset="domain"), watching(AdaNPC)
    adapt(both)
    adapt(alone, stream(corruptions=["contrast"]))
    assert torch.equal(torch.cat(both.noted[2]), torch.cat(alone.noted[1]))


def test_the_memory_goes_with_a_method_that_trains():
    adam = partial(torch.optim.Adam, lr=0.01)
    strategy = watching(Tent, optimizer=adam, output=NeighbourMemory())
    adapt(strategy, stream(corruptions=["contrast"]))
    assert strategy.parts.output.source.shape == (1442, 16)


@pytest.mark.parametrize(("threshold", "right"), [(0.0, 1.0), (1.1, 0.0)])
def test_a_growing_memory_follows_classes_that_drift(threshold, right):
    """Two classes in opposite directions turn by 120 degrees in steps of 5: each batch is near to the batch before."""
    head, labels = NeighbourMemory(threshold=threshold), torch.arange(40) % 2
    for step in range(25):
        turn = math.radians(5 * step)
        means = torch.tensor([[math.cos(turn), math.sin(turn)], [-math.cos(turn), -math.sin(turn)]])
        features = (means[labels] + 0.1 * normal(40, 2, seed=step)).float()
        if step == 0:
            head.source, head.source_labels = F.normalize(features, dim=1), labels
            head.reset()
        head.learn(Output(features, torch.zeros(40, 2)))
    found = head(Output(features, torch.zeros(40, 2))).argmax(dim=1)
    assert float((found == labels).float().mean()) == pytest.approx(right, abs=0.05)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"neighbours": 0}, "neighbours is 0"),
        ({"temperature": 0.0}, r"temperature is 0\.0"),
        ({"threshold": -0.1}, r"threshold is -0\.1"),
        ({"source_samples": 0}, "source_samples is 0"),
        ({"capacity": -1}, "capacity is -1"),
    ],
)
def test_options_out_of_range_are_errors(options, words):
    with pytest.raises(ValueError, match=words):
        AdaNPC(**options)
