"""The callbacks with one another: killed and resumed at any place, and on two processes."""

from functools import partial

import pytest

from cl_lightning.backbones import MLP
from cl_lightning.callbacks.distillation import Distillation
from cl_lightning.callbacks.drift_compensation import DriftCompensation
from cl_lightning.callbacks.ema_ensemble import EMAEnsemble
from cl_lightning.callbacks.importance_penalty import ImportancePenalty
from cl_lightning.heads import PrototypeHead
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.testing import check_strategy


def together():
    penalty = ImportancePenalty(estimator="si", weight=0.1)
    return [Distillation(), Distillation(space="features"), penalty, DriftCompensation(), EMAEnsemble()]


strategy = partial(Finetune, backbone=partial(MLP, hidden=(16,)), head=PrototypeHead)


@pytest.mark.parametrize("check", ["seed", "resume", "restores", "bytes"])
def test_together_they_keep_the_contract_of_a_strategy(check):
    check_strategy(strategy, callbacks=together, checks=[check], name="all callbacks")


@pytest.mark.slow
def test_two_processes_give_what_one_gives():
    check_strategy(strategy, callbacks=together, checks=["processes"], name="all callbacks")
