import math
from functools import partial

import pytest
import torch
from support.adaptation import adapt, batches, online_errors, scores, source_network, tiny_resnet, watching
from support.fakes import batch_of, normal
from torch import nn
from torch.nn import functional as F

from cl_lightning.losses import entropy
from cl_lightning.strategies.test_time import santa
from cl_lightning.strategies.test_time.bn_adapt import BNAdapt
from cl_lightning.strategies.test_time.parts.contrast import PrototypeContrast
from cl_lightning.strategies.test_time.santa import SANTA, anchored
from cl_lightning.strategies.test_time.source import Source
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "SANTA": Subject(small(SANTA, backbone=tiny_resnet)),
}

PUBLISHED = {
    "santa": {
        "source": "mariodoebler/test-time-adaptation: cfgs/cifar10_c/santa.yaml",
        "contrast_weight": 1.0,
        "temperature": 0.1,
        "backbone": "CifarResNet(depth=8, width=8)",
        "optimizer": "Adam(lr=0.001)",
    },
}

sgd = partial(torch.optim.SGD, lr=0.05)


def test_the_anchor_weights_its_log_probabilities_with_the_network():
    z, anchor = normal(4, 3).requires_grad_(), normal(4, 3, seed=1).requires_grad_()
    found = anchored(z, anchor)
    p, q = z.softmax(1), anchor.log_softmax(1)
    torch.testing.assert_close(found, -(p * q).sum(1))
    torch.testing.assert_close(anchored(z, z), entropy(z))
    (gradient,) = torch.autograd.grad(found.sum(), z)
    torch.testing.assert_close(gradient, -p * (q - (p * q).sum(1, keepdim=True)))
    assert anchor.grad is None


def made_contrast(classes: int = 3, d: int = 4) -> PrototypeContrast:
    part = PrototypeContrast(temperature=0.3, width=5)
    torch.manual_seed(0)
    part.projector = nn.Sequential(nn.Linear(d, 5), nn.ReLU(), nn.Linear(5, 5)).double()
    part.prototypes = normal(classes, d, seed=3)
    return part


def test_the_contrast_is_that_of_plain_loops():
    part, h, views = made_contrast(), normal(5, 4), normal(5, 4, seed=1)
    found = part(batch_of(torch.zeros(5, dtype=torch.int64)), h, views)
    nearest = [max(part.prototypes, key=lambda row, h=row_h: float(row @ h / row.norm() / h.norm())) for row_h in h]
    v = [[F.normalize(part.projector(x), dim=0) for x in triple] for triple in zip(nearest, h, views, strict=True)]
    flat = [(i, vector) for i, triple in enumerate(v) for vector in triple]
    total = 0.0
    for a, (image, one) in enumerate(flat):
        below = sum(math.exp(float(one @ other) / 0.3) for b, (_, other) in enumerate(flat) if b != a)
        for b, (again, other) in enumerate(flat):
            if b != a and again == image:
                total -= math.log(math.exp(float(one @ other) / 0.3) / below) / 2
    assert float(found) == pytest.approx(total / len(flat))
    single = part(batch_of(torch.zeros(1, dtype=torch.int64)), part.prototypes[:1], part.prototypes[:1])
    assert float(single) == pytest.approx(math.log(2))  # two equal positives share the mass


def test_steps_without_contrast_are_those_of_a_plain_loop(monkeypatch):
    monkeypatch.setattr(santa, "viewed", lambda strategy, batch, draw: batch.images.flip(-1))
    strategy = watching(SANTA, contrast_weight=0.0, optimizer=sgd)
    made = adapt(strategy)
    plain, source = source_network(), source_network()
    optimizer = sgd([p for m in plain.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()])
    expected = []
    for images, _ in batches(made.datamodule):
        z, view = plain(images).logits, plain(images.flip(-1)).logits
        with torch.no_grad():
            q = source(images).logits.log_softmax(1)
        expected.append(z.detach())
        optimizer.zero_grad()
        (-(z.softmax(1) * q).sum(1) / 2 - (view.softmax(1) * q).sum(1) / 2).mean().backward()
        optimizer.step()
    torch.testing.assert_close(scores(strategy), torch.cat(expected), rtol=1e-3, atol=1e-3)


def test_the_projector_is_trained_and_reset_and_prototypes_are_means_of_classes():
    strategy = watching(SANTA, reset="domain", optimizer=sgd)
    adapt(strategy)
    part = strategy.contrast
    now = nn.utils.parameters_to_vector(part.projector.parameters())
    assert not torch.equal(now, part.start)
    part.reset()
    assert torch.equal(nn.utils.parameters_to_vector(part.projector.parameters()), part.start)
    assert part.prototypes.shape == (10, 16)
    assert strategy.bytes_kept()["parts"] == part.num_bytes() > 0


def test_without_a_learning_rate_it_is_batch_norm_adaptation():
    made = [watching(SANTA, optimizer=partial(torch.optim.SGD, lr=0.0)), watching(BNAdapt)]
    for strategy in made:
        adapt(strategy)
    assert torch.equal(*(scores(strategy) for strategy in made))


def test_it_adapts_to_corruptions():
    errors = online_errors((Source, {}), (SANTA, {"optimizer": partial(torch.optim.Adam, lr=1e-3)}))
    assert errors[1] < errors[0] - 0.15


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"contrast_weight": -1.0}, r"contrast_weight is -1\.0"),
        ({"temperature": 0.0}, r"temperature is 0\.0"),
        ({"source_samples": 0}, "samples is 0"),
    ],
)
def test_options_out_of_range_are_errors(given, words):
    with pytest.raises(ValueError, match=words):
        SANTA(**given)
