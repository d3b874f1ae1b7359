"""Callbacks, transforms and checkpoints on a device that is not the CPU, and proof that it sees what a GPU refuses."""

from functools import partial

import pytest
import torch
from support import remote_device
from support.cases import case
from support.remote_device import MAY_WAIT, assert_like, on_the_cpu, running, trainer_options, waits
from support.runs import NormNet, plain_net
from support.subjects import SUBJECTS
from support.together import all_callbacks, with_callbacks
from torch import nn

from cl_lightning.callbacks.continual_evaluation import ContinualEvaluation
from cl_lightning.callbacks.importance_penalty import ImportancePenalty
from cl_lightning.callbacks.teacher_adaptation import TeacherAdaptation
from cl_lightning.data import ColorJitter, Cutout, RandAugment, RandomCrop, RandomGrayscale, RandomRotation
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.exemplar_free.lwf import LwF
from cl_lightning.testing import Subject, TinyDigits, difference, run

pytestmark = pytest.mark.skipif(not remote_device.AVAILABLE, reason="this torch has no devices written in Python")

FINETUNE = partial(Finetune, backbone=plain_net)
OTHERS = {
    "callbacks": Subject(with_callbacks, callbacks=all_callbacks),
    "ContinualEvaluation": Subject(FINETUNE, callbacks=lambda: [ContinualEvaluation(every_n_steps=2)]),
    "fisher": Subject(FINETUNE, callbacks=lambda: [ImportancePenalty(estimator="fisher")]),
    "mas": Subject(FINETUNE, callbacks=lambda: [ImportancePenalty(estimator="mas")]),
    "TeacherAdaptation": Subject(
        partial(LwF, backbone=NormNet),
        callbacks=lambda: [TeacherAdaptation()],
        data=lambda: TinyDigits(batch_size=11),
    ),
    "transforms": Subject(
        FINETUNE,
        data=lambda: TinyDigits(
            transforms=[
                RandomCrop(1),
                RandAugment(2, 9),
                ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
                RandomGrayscale(),
                RandomRotation(10),
                Cutout(2),
            ]
        ),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_with_callbacks_on_a_device_is_that_on_the_cpu(name, monkeypatch):
    expected = run(OTHERS[name])
    with running(monkeypatch):
        assert_like(expected, run(OTHERS[name], **trainer_options()))
    assert set(waits) - MAY_WAIT == {"ContinualEvaluation": {"_flush"}}.get(name, set())  # of its accuracies


@pytest.mark.parametrize("name", ["ER", "EWC", "ICaRL"])
def test_a_run_on_a_device_is_resumed_from_a_checkpoint(name, tmp_path, monkeypatch):
    subject = SUBJECTS[name]
    expected = case(name).reference
    places = [place for place in expected.snapshots if place.task == 1]
    with running(monkeypatch):
        run(subject, folder=tmp_path, kill_at=places[len(places) // 2], **trainer_options())
        outcome = run(subject, folder=tmp_path, resume="last", **trainer_options())
        assert difference(expected.state, on_the_cpu(outcome.state), rtol=1e-5, atol=1e-6) is None


class Asking(Finetune):
    """Looks at numbers in each step."""

    def losses(self, batch, output):
        terms = super().losses(batch, output)
        self.seen = sum(term.item() for term in terms.values())
        return terms

    def on_train_batch_end(self, outputs, batch, batch_idx):
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.seen = float(outputs["loss"])


class Mixing(Finetune):
    """Forgets to move what it made."""

    def losses(self, batch, output):
        return {"mixed": output.logits.square().mean(dim=0) @ torch.ones(output.logits.shape[1])}


class FarNorm(nn.Module):
    """Draws from a generator of the CPU on the device."""

    def forward(self, images):
        return images + torch.randn(images.shape, generator=torch.Generator(), device=images.device)


def test_the_device_sees_what_a_gpu_would_not_take(monkeypatch):
    with running(monkeypatch):
        run(Subject(partial(Asking, backbone=plain_net)), **trainer_options())
        assert waits["losses"] > 0
        assert waits["on_train_batch_end"] > 0
        with pytest.raises(RuntimeError, match="same device"):
            run(Subject(partial(Mixing, backbone=plain_net)), **trainer_options())
        images = torch.zeros(2, 1, 4, 4, device=remote_device.NAME)
        with pytest.raises(RuntimeError, match="generator"):
            FarNorm()(images)
        with pytest.raises(TypeError, match="numpy"):
            images.numpy()
        with pytest.raises(RuntimeError, match="same device"):
            torch.zeros(2, 1, 4, 4).add_(images)
        with pytest.raises(RuntimeError, match="tensor of the CPU"):
            torch.distributed.all_reduce(torch.zeros(2))
        assert images[torch.tensor([0])].device.type == remote_device.NAME
