from functools import partial

import pytest
import torch
from support.adaptation import adapt, normalised, online_errors, scores, source_network, tiny_resnet, watching
from support.fakes import normal

from cl_lightning.datamodules.digits import Digits
from cl_lightning.strategies.test_time.bn_adapt import BNAdapt
from cl_lightning.strategies.test_time.cafa import CAFA, alignment_ratio
from cl_lightning.strategies.test_time.source import Source
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "CAFA": Subject(small(CAFA, backbone=tiny_resnet, jitter=1.0)),
}

adam = partial(torch.optim.Adam, lr=1e-3)


def test_the_ratio_is_negative_and_has_its_closed_gradient():
    means, h, label = normal(4, 3), normal(5, 3, seed=1).requires_grad_(), torch.tensor([0, 3, 1, 1, 2])
    gaps = h[:, None] - means
    distances = gaps.square().sum(2)
    found = alignment_ratio(distances, label)
    own = distances[range(5), label]
    torch.testing.assert_close(found, torch.log(own / distances.sum(1)))
    assert (found <= 0).all()
    (gradient,) = torch.autograd.grad(found.sum(), h, retain_graph=True)
    expected = 2 * gaps[range(5), label] / own[:, None] - 2 * gaps.sum(1) / distances.sum(1)[:, None]
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(alignment_ratio(7 * distances, label), found)  # a common scale does not matter
    others = alignment_ratio(distances, label, inter="others")
    torch.testing.assert_close(others, torch.log(own / (distances.sum(1) - own)))
    one = alignment_ratio(distances[:, :1], torch.zeros(5, dtype=torch.int64))
    assert float(one.abs().max()) == 0.0


@pytest.mark.parametrize(("inter", "jitter"), [("all", 0.01), ("others", 1.0)])
def test_distances_are_from_the_source_features(inter, jitter):
    strategy, noted = watching(CAFA, samples=10_000, inter=inter, jitter=jitter, optimizer=adam), []
    adapting = strategy.adapt
    strategy.adapt = lambda batch, output: (noted.append((output, adapting(batch, output))), noted[-1][1])[1]
    adapt(strategy)
    source = Digits().source(train=True)
    images, labels = normalised(source.images), torch.from_numpy(source.labels)
    plain = source_network()
    with torch.no_grad():  # batches of the pass, with their own statistics
        h = torch.cat([plain(part).features for part in images.split(60)]).double()
    means = torch.stack([h[labels == c].mean(0) for c in range(10)])
    centred = h - means[labels]
    sigma = centred.T @ centred / (len(h) - 10)
    sigma += jitter * sigma.diagonal().mean() * torch.eye(len(sigma))
    for output, (_, terms) in noted[:2]:
        gaps = output.features.double()[:, None] - means
        distances = torch.einsum("bci,ij,bcj->bc", gaps, torch.linalg.inv(sigma), gaps)
        expected = alignment_ratio(distances, output.logits.argmax(1), inter=inter).float()
        torch.testing.assert_close(terms["adaptation"], expected, rtol=2e-2, atol=2e-2)


def test_without_a_learning_rate_it_is_batch_norm_adaptation():
    made = [watching(CAFA, optimizer=partial(torch.optim.SGD, lr=0.0)), watching(BNAdapt)]
    for strategy in made:
        adapt(strategy)
    assert torch.equal(*(scores(strategy) for strategy in made))


def test_it_adapts_to_corruptions():
    errors = online_errors((Source, {}), (CAFA, {"optimizer": adam}))
    assert errors[1] < errors[0] - 0.15


@pytest.mark.parametrize(
    ("given", "words"),
    [({"samples": 1}, "samples is 1"), ({"inter": "none"}, "inter is 'none'"), ({"jitter": 0.0}, r"jitter is 0\.0")],
)
def test_options_out_of_range_are_errors(given, words):
    with pytest.raises(ValueError, match=words):
        CAFA(**given)
