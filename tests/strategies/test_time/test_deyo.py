import math
from functools import partial
from typing import Any

import pytest
import torch
from support.adaptation import adapt, batches, scores, source_network, tiny_resnet, watching
from torch import nn

from cl_lightning.batch import Draw
from cl_lightning.losses import entropy
from cl_lightning.strategies.test_time.deyo import DeYO
from cl_lightning.strategies.test_time.parts.filters import destroyed
from cl_lightning.strategies.test_time.tent import Tent
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "DeYO": Subject(small(DeYO, backbone=tiny_resnet, margin=0.999, threshold=-0.5)),
}
WAITS = {"DeYO": {"step_moves"}}  # whether a sample is selected

PUBLISHED = {
    "deyo": {
        "source": "Jhyun17/DeYO: main.py",
        "margin": 0.5,
        "threshold": 0.2,
        "entropy_margin": 0.4,
        "params": "early_norm",
        "backbone": "CifarResNet(depth=8, width=8)",
        "optimizer": "Adam(lr=0.001)",
    },
}

sgd = partial(torch.optim.SGD, lr=0.05)


def test_tiles_are_permuted_per_image_and_nothing_is_lost():
    images = torch.rand(5, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    found = destroyed(images, "patches", Draw.of(5, 1))
    assert not torch.equal(found, images)
    orders = []
    for before, after in zip(images, found, strict=True):
        tiles = {tuple(t.flatten().tolist()): n for n, t in enumerate(cut(before))}
        orders.append(tuple(tiles[tuple(tile.flatten().tolist())] for tile in cut(after)))  # each tile is one of them
        assert sorted(orders[-1]) == list(range(16))
    assert len(set(orders)) == 5
    part = Draw(Draw.of(5, 1).key, 2, 4, 5)  # another process's share
    assert torch.equal(destroyed(images[2:4], "patches", part), found[2:4])


def cut(image: torch.Tensor) -> list[torch.Tensor]:
    return [tile for row in image.chunk(4, dim=1) for tile in row.chunk(4, dim=2)]


def test_other_ways_to_destroy_a_shape():
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mixed = destroyed(images, "pixels", Draw.of(4, 1))
    assert torch.equal(mixed.flatten(2).sort().values, images.flatten(2).sort().values)
    place = [int((images[0, 0].flatten() == value).nonzero()) for value in mixed[0, 0].flatten()]
    assert torch.equal(mixed, images.flatten(2)[:, :, place].view_as(images))  # one permutation for all
    hidden = destroyed(images, "occlusion", Draw.of(4, 1))
    assert not torch.equal(hidden, images)
    torch.testing.assert_close(hidden[:, :, 2:6, 2:6], images.mean((2, 3), keepdim=True).expand(-1, -1, 4, 4))
    changed = (hidden != images).any(1)
    assert not changed[:, :2].any()
    assert not changed[:, :, 6:].any()
    odd = torch.rand(2, 1, 7, 9)
    assert destroyed(odd, "patches", Draw.of(2, 0)).shape == odd.shape
    assert len(destroyed(images[:0], "patches", Draw(0, 4, 4, 4))) == 0


def options(**chosen: Any) -> dict[str, Any]:
    return {
        "margin": math.inf,
        "threshold": -1.0,
        "entropy_margin": None,
        "weighted": False,
        "params": "norm",
        **chosen,
    }


def test_without_thresholds_and_weights_it_is_tent():
    made = [watching(DeYO, **options(), optimizer=sgd), watching(Tent, optimizer=sgd)]
    for strategy in made:
        adapt(strategy)
    torch.testing.assert_close(*(scores(strategy) for strategy in made), rtol=1e-4, atol=1e-4)


def test_with_an_identity_as_destruction_nothing_is_selected(monkeypatch):
    from cl_lightning.strategies.test_time.parts import filters

    monkeypatch.setattr(filters, "destroyed", lambda images, *rest: images)
    strategy = watching(DeYO, **options(threshold=1e-4), optimizer=sgd)  # rounding
    state = adapt(strategy).strategy.network.state_dict()
    before = source_network("source").state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items() if name in state)


@pytest.mark.parametrize(("entropy_margin", "weighted"), [(0.4, True), (0.7, False), (None, True)])
def test_the_first_steps_are_those_of_a_plain_loop(monkeypatch, entropy_margin, weighted):
    from cl_lightning.strategies.test_time.parts import filters

    monkeypatch.setattr(filters, "destroyed", lambda images, *rest: images.flip(-1))
    strategy = watching(
        DeYO, margin=0.9, threshold=0.05, entropy_margin=entropy_margin, weighted=weighted, params="norm", optimizer=sgd
    )
    made = adapt(strategy)
    plain = source_network()
    optimizer = sgd([p for m in plain.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()])
    expected, sizes = [], []
    for images, _ in batches(made.datamodule):
        logits = plain(images).logits
        p, h = logits.detach().softmax(1), entropy(logits)
        with torch.no_grad():
            other = plain(images.flip(-1)).logits.softmax(1)
        label = p.argmax(1)
        fall = p[range(len(p)), label] - other[range(len(p)), label]
        rows = (h < 0.9 * math.log(10)) & (fall > 0.05)
        weight = torch.zeros(len(p))
        if entropy_margin is not None:
            weight = weight + (entropy_margin * math.log(10) - h.detach()).exp()
        if weighted:
            weight = weight + fall.exp()
        expected.append(logits.detach())
        sizes.append(int(rows.sum()))
        optimizer.zero_grad()
        ((weight * h)[rows].sum() / rows.sum()).backward()
        optimizer.step()
    assert 0 < min(sizes) < 60
    torch.testing.assert_close(scores(strategy), torch.cat(expected), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"margin": 0.0}, r"margin is 0\.0"),
        ({"threshold": -2.0}, r"threshold is -2\.0"),
        ({"destruction": "fire"}, "destruction is 'fire'"),
        ({"entropy_margin": 0.0}, r"entropy_margin is 0\.0"),
    ],
)
def test_options_out_of_range_are_errors(given, words):
    with pytest.raises(ValueError, match=words):
        DeYO(**given)
