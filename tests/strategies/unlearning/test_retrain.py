"""Retraining without the forgotten samples."""

from functools import partial

import torch
from support.runs import assert_same, plain_net, run, sgd
from support.unlearning import assert_forgets_exactly, learnt, requests

from cl_lightning.callbacks.unlearning_measures import UnlearningMeasures
from cl_lightning.strategies.baselines.joint import Joint
from cl_lightning.strategies.unlearning.retrain import Retrain
from cl_lightning.stream import Request

SMALL = partial(Retrain, backbone=plain_net, optimizer=sgd)


def test_without_requests_it_is_joint_training():
    for scratch in (False, True):
        mine = run(SMALL(from_scratch=scratch), max_epochs=1)
        other = run(Joint(backbone=plain_net, optimizer=sgd, from_scratch=scratch), max_epochs=1)
        assert_same(dict(mine.strategy.state_dict()), dict(other.strategy.state_dict()))


def test_nothing_depends_on_the_forgotten_samples_after_a_request():
    assert Retrain.is_exact
    assert_forgets_exactly(SMALL, requests(Request(fraction=0.1), Request(classes=["3"]), Request(tasks=[1])))


def test_it_starts_again_at_a_request_to_forget_and_goes_on_from_there():
    scenario = requests(Request(tasks=[0], after=1))
    states = {}

    class Watched(Retrain):
        def begin_task(self, task):
            before = self.network.backbone.layers[1].weight.clone()
            super().begin_task(task)
            states[task.index] = torch.equal(before, self.network.backbone.layers[1].weight)

    learnt(Watched(backbone=plain_net, optimizer=sgd), scenario)
    assert states == {0: True, 1: True, 2: False, 3: True}
    learnt(Watched(backbone=plain_net, optimizer=sgd, from_scratch=True), scenario)
    assert states == {0: True, 1: False, 2: False, 3: False}


def test_a_request_to_keep_changes_nothing():
    kept = learnt(SMALL(), requests(Request(tasks=[1], kind="keep"), held=(1,)))
    plain = learnt(SMALL(), requests(held=(1,)))
    assert_same(dict(kept.strategy.network.state_dict()), dict(plain.strategy.network.state_dict()))


def test_a_class_is_forgotten_and_the_others_are_kept():
    callback = UnlearningMeasures()
    run(SMALL(), callback, data={"scenario": requests(Request(classes=["3"]))}, max_epochs=8)
    kept, forgotten, kept_test, forgotten_test, _ = callback.table[-1].tolist()
    assert (forgotten, forgotten_test) == (0.0, 0.0)
    assert min(kept, kept_test) > 0.9
