"""All callbacks that go together, and a strategy that has what they need."""

from functools import partial

from lightning.pytorch import Callback

from cl_lightning.callbacks.continual_backprop import ContinualBackprop
from cl_lightning.callbacks.distillation import Distillation
from cl_lightning.callbacks.drift_compensation import DriftCompensation
from cl_lightning.callbacks.ema_ensemble import EMAEnsemble
from cl_lightning.callbacks.importance_penalty import ImportancePenalty
from cl_lightning.callbacks.shrink_and_perturb import ShrinkAndPerturb
from cl_lightning.callbacks.spectral_regularization import SpectralRegularization
from cl_lightning.callbacks.wasserstein_regularization import L2Init, WassersteinRegularization
from cl_lightning.memory import PrototypeHead
from cl_lightning.models import MLP
from cl_lightning.strategies.baselines.finetune import Finetune

with_callbacks = partial(Finetune, backbone=partial(MLP, hidden=(16,)), head=PrototypeHead)


def all_callbacks() -> list[Callback]:
    penalty = ImportancePenalty(estimator="si", weight=0.1)
    return [Distillation(), Distillation(space="features"), penalty, DriftCompensation(), EMAEnsemble()]


def plasticity_callbacks() -> list[Callback]:
    return [
        SpectralRegularization(),
        WassersteinRegularization(),
        L2Init(),
        ShrinkAndPerturb(when="step"),
        ContinualBackprop(rate=0.05, maturity=1),
    ]
