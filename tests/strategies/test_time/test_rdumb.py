from functools import partial

import pytest
import torch
from support.adaptation import adapt, scores, tiny_resnet, watching

from cl_lightning.strategies.test_time.bn_adapt import BNAdapt
from cl_lightning.strategies.test_time.eata import EATA
from cl_lightning.strategies.test_time.rdumb import RDumb
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "RDumb": Subject(small(RDumb, backbone=tiny_resnet, margin=0.99, diversity=0.99, reset_every=3)),
}
WAITS = {"RDumb": {"step_moves"}}  # whether a sample is selected

PUBLISHED = {
    "rdumb": {
        "source": "oripress/CCC: models/rdumb.py, and cfgs/cifar10_c of test-time-adaptation benchmarks",
        "reset_every": 1000,
        "margin": 0.4,
        "diversity": 0.4,
        "backbone": "CifarResNet(depth=8, width=8)",
        "optimizer": "Adam(lr=0.001)",
    },
}

adam = partial(torch.optim.Adam, lr=0.01)


def test_without_a_reset_in_the_stream_it_is_eata_without_a_penalty():
    made = [
        watching(RDumb, reset_every=1000, margin=0.8, optimizer=adam),
        watching(EATA, fisher_weight=0.0, margin=0.8, optimizer=adam),
    ]
    for strategy in made:
        adapt(strategy)
    assert torch.equal(*(scores(strategy) for strategy in made))


def test_with_a_reset_after_each_step_the_source_predicts_every_batch():
    made = [watching(RDumb, reset_every=1, optimizer=adam), watching(BNAdapt)]
    for strategy in made:
        adapt(strategy)
    assert torch.equal(*(scores(strategy) for strategy in made))


def test_batches_without_a_selected_sample_are_not_counted():
    strategy = watching(RDumb, reset_every=100, margin=1e-6, optimizer=adam)
    adapt(strategy)
    assert int(strategy.parts.rules[0].steps) == 0


def test_the_interval_is_in_its_range():
    with pytest.raises(ValueError, match="every is 0"):
        RDumb(reset_every=0)
