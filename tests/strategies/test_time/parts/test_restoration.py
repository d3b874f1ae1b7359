from functools import partial
from types import SimpleNamespace

import pytest
import torch
from support.adaptation import adapt, batches, scores, source_network, stream, watching
from support.fakes import normal
from torch import nn

from cl_lightning.losses import entropy
from cl_lightning.models import Output
from cl_lightning.strategies.test_time.bn_adapt import BNAdapt
from cl_lightning.strategies.test_time.parts.filters import DiversityFilter
from cl_lightning.strategies.test_time.parts.restoration import (
    EntropyReset,
    FisherRestore,
    PeriodicReset,
    StochasticRestore,
    WeightEnsembling,
    quantile,
    restore,
)
from cl_lightning.strategies.test_time.tent import Tent

adam = partial(torch.optim.Adam, lr=0.01)


def test_a_share_of_the_weights_is_restored():
    net, source = nn.Linear(300, 200), nn.Linear(300, 200)
    before, share, start = net.weight.detach().clone(), 0.01, source.state_dict()
    restore(dict(net.named_parameters()), start, share, key=3)
    back = net.weight == source.weight
    n = before.numel()
    assert abs(int(back.sum()) - share * n) < 3 * (n * share * (1 - share)) ** 0.5
    assert torch.equal(net.weight[~back], before[~back])
    again = nn.Linear(300, 200)
    again.load_state_dict({"weight": before, "bias": net.bias})
    restore({"weight": again.weight}, start, share, key=3)
    assert torch.equal(again.weight == source.weight, back)  # the key decides
    restore(dict(net.named_parameters()), start, 1.0, key=0)
    assert torch.equal(net.weight, source.weight)


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 0.77, 1.0])
def test_quantiles_are_those_of_torch(share):
    values = normal(101)
    torch.testing.assert_close(quantile(values, share), values.quantile(share))


def test_weights_of_the_smallest_squared_gradients_over_all_parameters_are_restored():
    net, unused = nn.Linear(7, 5).double(), nn.Parameter(normal(4))
    source = {"weight": normal(5, 7, seed=1), "bias": normal(5, seed=2), "unused": normal(4, seed=3)}
    net.weight.grad, net.bias.grad = normal(5, 7, seed=4), 0.1 * normal(5, seed=5)
    parameters = {**dict(net.named_parameters()), "unused": unused}
    before = {name: value.detach().clone() for name, value in parameters.items()}
    method = SimpleNamespace(trained_parameters=lambda: parameters, start=SimpleNamespace(tensors=source))
    FisherRestore(0.3)(method, None)
    gradients = {name: [0.0] * 4 if p.grad is None else p.grad.flatten().tolist() for name, p in parameters.items()}
    least = sorted(abs(g) for values in gradients.values() for g in values)[:13]  # 0.3 x 43 places between 44 numbers
    for name, value in parameters.items():
        for place, gradient in enumerate(gradients[name]):
            expected = source if abs(gradient) <= least[-1] else before
            assert float(value.flatten()[place]) == float(expected[name].flatten()[place])
    assert sum(int((value == source[name]).sum()) for name, value in parameters.items()) == 13


def after(rule, **options):
    """Largest distance of the trained parameters from the source after a stream, and the scores."""
    strategy = watching(Tent, restoration=[rule] if rule else None, optimizer=adam, **options)
    made = adapt(strategy)
    source = source_network("source").state_dict()
    moved = max(float((p - source[n]).abs().max()) for n, p in made.strategy.trained_parameters().items())
    return moved, scores(strategy)


def test_rules_reach_from_no_change_to_the_source():
    free, plain = after(None)
    assert free > 0.02
    for rule, share in ((StochasticRestore(0.0), 1.0), (FisherRestore(0.0), 1.0), (WeightEnsembling(1.0), 1.0)):
        moved, found = after(rule)
        assert torch.equal(found, plain)
        assert moved == pytest.approx(share * free)
    for rule in (StochasticRestore(1.0), WeightEnsembling(0.0), PeriodicReset(1), EntropyReset(threshold=50.0)):
        moved, found = after(rule)
        assert moved == 0.0
        still = watching(BNAdapt)
        adapt(still)
        assert torch.equal(found, scores(still))
    assert 0 < after(WeightEnsembling(0.7))[0] < 0.7 * free


def test_weight_ensembling_follows_its_equation():
    rule, sgd = WeightEnsembling(0.9), partial(torch.optim.SGD, lr=0.05)
    strategy = watching(Tent, restoration=[rule], optimizer=sgd)
    made = adapt(strategy)
    plain, source, expected = source_network(), source_network("source").state_dict(), []
    norms = {n: p for n, p in plain.named_parameters() if ".bn" in n}
    optimizer = sgd(list(norms.values()))
    for images, _ in batches(made.datamodule):
        logits = plain(images).logits
        expected.append(logits.detach())
        optimizer.zero_grad()
        entropy(logits).mean().backward()
        optimizer.step()
        with torch.no_grad():
            for name, value in norms.items():
                value.copy_(0.9 * value + 0.1 * source[name])
    torch.testing.assert_close(scores(strategy), torch.cat(expected), rtol=1e-3, atol=1e-3)


def test_a_periodic_reset_starts_the_stream_again():
    options = {"filters": [DiversityFilter(2.0)], "optimizer": adam}
    reset, plain = watching(Tent, restoration=[PeriodicReset(4)], **options), watching(Tent, **options)
    adapt(reset)  # 4 batches in each of 2 domains
    adapt(plain, stream(corruptions=["contrast"]))
    assert torch.equal(torch.cat(reset.noted[2]), torch.cat(plain.noted[1]))
    assert int(reset.parts.rules[0].steps) == 0
    assert not reset.parts.filters[0].mean.any()
    assert all(not optimizer.state for optimizer in reset.trainer.optimizers)
    never = watching(Tent, restoration=[PeriodicReset(9)], **options)
    adapt(never)
    assert int(never.parts.rules[0].steps) == 8


def test_the_entropy_of_a_reset_is_a_moving_mean_over_the_selected():
    rule, logits, rows = EntropyReset(0.2), normal(6, 4), torch.tensor([1, 1, 0, 0, 1, 0]).bool()
    values = entropy(logits)
    rule.learn(Output(logits, logits), rows)
    rule(None, None)
    assert float(rule.moving) == pytest.approx(float(values[rows].mean()))
    rule.learn(Output(logits, logits), rows)
    rule.learn(Output(logits, logits), None)  # the last pass of a step counts
    rule(None, None)
    assert float(rule.moving) == pytest.approx(float(0.9 * values[rows].mean() + 0.1 * values.mean()))
    rule.learn(Output(logits, logits), torch.zeros(6).bool())
    before = float(rule.moving)
    rule(None, None)
    assert float(rule.moving) == before
    rule.reset()
    assert float(rule.moving) < 0


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: StochasticRestore(1.5), r"StochasticRestore: share is 1\.5"),
        (lambda: FisherRestore(1.5), r"FisherRestore: share is 1\.5"),
        (lambda: WeightEnsembling(-0.1), r"WeightEnsembling: momentum is -0\.1"),
        (lambda: PeriodicReset(0), "PeriodicReset: every is 0"),
        (lambda: EntropyReset(0.0), r"EntropyReset: threshold is 0\.0"),
        (lambda: EntropyReset(momentum=2.0), r"EntropyReset: momentum is 2\.0"),
    ],
)
def test_options_out_of_range_are_errors(made, words):
    with pytest.raises(ValueError, match=words):
        made()
