from functools import partial

import pytest
import torch
from support.adaptation import (
    adapt,
    batches,
    normalised,
    online_errors,
    scores,
    source_network,
    stream,
    tiny_resnet,
    watching,
)
from torch import nn
from torch.nn import functional as F

from cl_lightning.strategies.test_time import rmt
from cl_lightning.strategies.test_time.mean_teacher import move_teacher
from cl_lightning.strategies.test_time.rmt import RMT
from cl_lightning.strategies.test_time.source import Source
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "RMT": Subject(small(RMT, backbone=tiny_resnet, memory_size=20, teacher_momentum=0.9)),
}

PUBLISHED = {
    "rmt": {
        "source": "mariodoebler/test-time-adaptation: cfgs/cifar10_c/rmt.yaml",
        "teacher_momentum": 0.999,
        "contrast_weight": 1.0,
        "source_weight": 1.0,
        "memory_size": 2000,
        "temperature": 0.1,
        "backbone": "CifarResNet(depth=8, width=8)",
        "optimizer": "Adam(lr=0.001)",
    },
}

sgd = partial(torch.optim.SGD, lr=0.02)


def sce(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return (F.cross_entropy(first, second.softmax(1)) + F.cross_entropy(second, first.softmax(1))) / 2


def test_steps_without_contrast_and_source_are_those_of_a_plain_loop(monkeypatch):
    monkeypatch.setattr(rmt, "viewed", lambda strategy, batch, draw: batch.images.flip(-1))
    options = {"contrast_weight": 0.0, "memory_size": 0, "teacher_momentum": 0.9, "params": "norm"}
    strategy = watching(RMT, **options, optimizer=sgd)
    made = adapt(strategy)
    student, teacher = source_network(), source_network()
    norms = [p for m in student.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    optimizer, expected = sgd(norms), []
    for images, _ in batches(made.datamodule):
        z, view = student(images).logits, student(images.flip(-1)).logits
        with torch.no_grad():
            target = teacher(images).logits
        expected.append((z + target).detach())
        optimizer.zero_grad()
        (sce(z, target) / 2 + sce(view, target) / 2).backward()
        optimizer.step()
        move_teacher(teacher, student, 0.9)
    torch.testing.assert_close(scores(strategy), torch.cat(expected), rtol=1e-3, atol=2e-3)


def test_source_images_are_stored_and_replayed_with_their_labels():
    strategy = watching(RMT, contrast_weight=0.0, memory_size=100, optimizer=partial(torch.optim.SGD, lr=0.0))
    adapting, noted = strategy.adapt, []
    strategy.adapt = lambda batch, output: (noted.append((batch.draw, adapting(batch, output))), noted[-1][1])[1]
    adapt(strategy)
    assert len(strategy.memory) == 100
    assert strategy.bytes_kept()["exemplars"] > 0
    assert len(noted) == 8
    plain = source_network()
    for draw, (_, terms) in noted:
        drawn = strategy.memory.sample(draw.total, draw.fork(rmt._SOURCE))
        assert len(drawn) == draw.total
        logits = plain(normalised(drawn.raw)).logits
        assert float(terms["source"]) == pytest.approx(float(F.cross_entropy(logits, drawn.labels)), rel=1e-3)
        assert float(terms["source"]) < 0.5  # the source is known; by chance it were 2.3


def test_labels_of_test_images_are_not_trained_on():
    with pytest.raises(ValueError, match=r"memory_size is 20, but the source images .* give --model\.memory_size 0"):
        adapt(watching(RMT, memory_size=20), stream(source_part="test"))
    adapt(watching(RMT, memory_size=0), stream(source_part="test", corruptions=["contrast"]))


@pytest.mark.parametrize(("option", "term"), [("contrast_weight", "contrast"), ("source_weight", "source")])
def test_weights_weight_their_terms(option, term):
    values = {}
    for weight in (1.0, 3.0, 0.0):
        strategy, noted = watching(RMT, **{option: weight}, optimizer=partial(torch.optim.SGD, lr=0.0)), []
        losses = strategy.adapt
        strategy.adapt = lambda *given, losses=losses, noted=noted: (noted.append(losses(*given)), noted[-1])[1]
        torch.manual_seed(0)
        adapt(strategy)
        values[weight] = noted[0][1].get(term)
    assert values[0.0] is None
    assert float(values[3.0]) == pytest.approx(3 * float(values[1.0]), rel=1e-4)


def test_without_steps_the_score_is_twice_that_of_the_source():
    strategy = watching(RMT, optimizer=partial(torch.optim.SGD, lr=0.0))
    made = adapt(strategy)
    plain = source_network()
    with torch.no_grad():
        expected = torch.cat([plain(images).logits for images, _ in batches(made.datamodule)])
    torch.testing.assert_close(scores(strategy), 2 * expected, rtol=1e-3, atol=1e-3)


def test_it_adapts_to_corruptions():
    errors = online_errors((Source, {}), (RMT, {"optimizer": partial(torch.optim.Adam, lr=1e-3)}))
    assert errors[1] < errors[0] - 0.15


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"contrast_weight": -1.0}, r"contrast_weight is -1\.0"),
        ({"source_weight": -1.0}, r"source_weight is -1\.0"),
        ({"memory_size": -1}, "-1"),
        ({"teacher_momentum": 2.0}, r"teacher_momentum is 2\.0"),
    ],
)
def test_options_out_of_range_are_errors(given, words):
    with pytest.raises(ValueError, match=words):
        RMT(**given)
