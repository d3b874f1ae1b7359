import math
from functools import partial

import pytest
import torch
from support.adaptation import adapt, batches, scores, source_network, stream, tiny_resnet, watching
from torch import nn

from cl_lightning.losses import entropy
from cl_lightning.models import MLP, CifarResNet, Network, early_norm_parameters, norm_parameters
from cl_lightning.optim import SAM
from cl_lightning.strategies.test_time.bn_adapt import BNAdapt
from cl_lightning.strategies.test_time.parts.filters import EntropyFilter
from cl_lightning.strategies.test_time.parts.restoration import EntropyReset
from cl_lightning.strategies.test_time.sar import SAR
from cl_lightning.strategies.test_time.tent import Tent
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "SAR": Subject(small(SAR, backbone=tiny_resnet, margin=0.999, reset_threshold=1e-3)),
}
WAITS = {"SAR": {"step_moves", "forward"}}  # is a sample selected? does the entropy collapse?

PUBLISHED = {
    "sar": {
        "source": "mr-eggplant/SAR: sar.py, and cfgs/cifar10_c of test-time-adaptation benchmarks",
        "margin": 0.4,
        "radius": 0.05,
        "reset_threshold": 0.2,
        "backbone": "CifarResNet(depth=8, width=8)",
        "optimizer": "Adam(lr=0.001)",
    },
}

sgd = partial(torch.optim.SGD, lr=0.1)


def test_the_last_stage_is_left_out():
    network = Network(CifarResNet((3, 16, 16), depth=8, width=4), lambda features: nn.Linear(features, 2))
    early, all_norms = early_norm_parameters(network), norm_parameters(network)
    assert set(early) < set(all_norms)
    assert all("layer3" in name for name in set(all_norms) - set(early))
    assert not any("layer3" in name for name in early)

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm_pre = nn.LayerNorm(3)
            self.blocks = nn.Sequential(*(nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3)) for _ in range(12)))
            self.norm = nn.LayerNorm(3)

    kept = {name.rpartition(".")[0] for name in early_norm_parameters(Transformer())}
    assert kept == {"norm_pre", *(f"blocks.{number}.0" for number in range(9))}
    with pytest.raises(ValueError, match="MLP has no stages"):
        SAR(backbone=MLP).build((1, 8, 8))


@pytest.mark.parametrize("radius", [0.05, 0.5])
def test_steps_are_those_of_a_plain_loop(radius):
    bound = 0.5 * math.log(10)
    strategy = watching(SAR, margin=0.5, radius=radius, reset_threshold=None, params="norm", optimizer=sgd)
    made = adapt(strategy)
    plain = source_network()
    norms = [p for m in plain.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    optimizer, expected, sizes = sgd(norms), [], []
    for images, _ in batches(made.datamodule):
        logits = plain(images).logits
        expected.append(logits.detach())
        first = entropy(logits) < bound
        gradients = torch.autograd.grad(entropy(logits)[first].mean(), norms)
        length = sum(g.square().sum() for g in gradients).sqrt()
        steps = [radius * g / length for g in gradients]
        assert float(sum(e.square().sum() for e in steps).sqrt()) == pytest.approx(radius)
        with torch.no_grad():
            for value, e in zip(norms, steps, strict=True):
                value += e
        other = entropy(plain(images).logits)
        second = first & (other < bound)
        optimizer.zero_grad()
        other[second].mean().backward()
        with torch.no_grad():
            for value, e in zip(norms, steps, strict=True):
                value -= e
        optimizer.step()
        sizes.append((int(second.sum()), int(first.sum()), len(images)))
    assert any(second < first < count for second, first, count in sizes) or radius < 0.1
    torch.testing.assert_close(scores(strategy), torch.cat(expected), rtol=1e-2, atol=1e-2)


def test_without_radius_and_threshold_it_is_tent_on_the_same_parameters():
    options = {"params": "early_norm", "optimizer": sgd}
    made = [
        watching(SAR, margin=math.inf, radius=0.0, reset_threshold=None, **options),
        watching(Tent, **options),
    ]
    for strategy in made:
        adapt(strategy)
    torch.testing.assert_close(*(scores(strategy) for strategy in made), rtol=1e-5, atol=1e-5)
    state, before = made[0].network.state_dict(), source_network("source").state_dict()
    moved = {name for name in before if name in state and not torch.equal(state[name], before[name])}
    assert moved
    assert not any("layer3" in name for name in moved)


def test_gradients_of_accumulated_batches_are_taken_at_the_moved_weights_too():
    strategy = watching(SAR, margin=math.inf, radius=0.3, reset_threshold=None, params="norm", optimizer=sgd)
    data = stream(corruptions=["contrast"], samples=120)
    made = adapt(strategy, data, accumulate_grad_batches=2)
    plain = source_network()
    norms = [p for m in plain.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    parts = [images for images, _ in batches(made.datamodule)]
    assert len(parts) == 2
    gradients = torch.autograd.grad(sum(entropy(plain(x).logits).mean() for x in parts) / 2, norms)
    length = sum(g.square().sum() for g in gradients).sqrt()
    with torch.no_grad():
        for value, g in zip(norms, gradients, strict=True):
            value += 0.3 * g / length
    second = torch.autograd.grad(sum(entropy(plain(x).logits).mean() for x in parts) / 2, norms)
    source = source_network("source").state_dict()
    for (name, value), g in zip(strategy.trained_parameters().items(), second, strict=True):
        torch.testing.assert_close(value.detach(), source[name] - 0.1 * g, rtol=1e-4, atol=1e-5)


def test_a_step_that_selects_nothing_at_the_moved_weights_moves_nothing(monkeypatch):
    real, calls = EntropyFilter.forward, []

    def every_other(self, strategy, batch, output):
        calls.append(batch.draw.key)
        weights = real(self, strategy, batch, output)
        return weights if calls.count(batch.draw.key) == 1 else 0.0 * weights

    monkeypatch.setattr(EntropyFilter, "forward", every_other)
    momentum = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    state = adapt(watching(SAR, margin=0.9, optimizer=momentum)).strategy.network.state_dict()
    before = source_network("source").state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items() if name in state)
    assert all(calls.count(key) == 2 for key in calls)


def test_tent_with_the_same_parts_is_the_same():
    rules = {"filters": [EntropyFilter(0.5)], "restoration": [EntropyReset(0.2)], "params": "norm"}
    made = [
        watching(SAR, margin=0.5, radius=0.3, reset_threshold=0.2, params="norm", optimizer=sgd),
        watching(Tent, optimizer=partial(SAM, base=sgd, rho=0.3), **rules),
    ]
    for strategy in made:
        adapt(strategy)
    assert torch.equal(*(scores(strategy) for strategy in made))


def test_a_collapse_resets_to_the_source():
    made = [watching(SAR, margin=0.9, reset_threshold=100.0, optimizer=sgd), watching(BNAdapt)]
    for strategy in made:
        adapt(strategy)
    assert torch.equal(*(scores(strategy) for strategy in made))
    noted = watching(SAR, margin=0.9, reset_threshold=1e-9, optimizer=sgd)
    adapt(noted)
    assert 0 < float(noted.parts.rules[0].moving) < 0.9 * math.log(10)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"margin": 0.0}, r"margin is 0\.0"),
        ({"radius": -0.1}, r"radius is -0\.1"),
        ({"reset_threshold": 0.0}, r"reset_threshold is 0\.0"),
    ],
)
def test_options_out_of_range_are_errors(given, words):
    with pytest.raises(ValueError, match=f"SAR: .*{words}"):
        SAR(**given)
