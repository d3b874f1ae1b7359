from functools import partial
from types import SimpleNamespace

import pytest
import torch
from support.fakes import normal
from support.runs import assert_resumes, assert_same_run, plain_net, run, sgd
from torch.nn import functional as F

from cl_lightning.callbacks.self_distillation import SelfDistillation
from cl_lightning.models import Output
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.exemplar_free.lwf import LwF

FINETUNE = partial(Finetune, backbone=plain_net, optimizer=sgd)


class Fixed:
    """A teacher with given logits."""

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, images):
        return SimpleNamespace(logits=self.logits)


@pytest.mark.parametrize(("epoch", "share"), [(1, 0.4), (3, 0.8)])
def test_with_the_cross_entropy_it_is_the_cross_entropy_of_the_refined_target(epoch, share):
    callback = SelfDistillation(final_weight=0.8)
    logits, before = normal(5, 4).requires_grad_(), normal(5, 4, seed=1)
    callback.teacher = Fixed(before)
    labels = torch.tensor([3, 0, 1, 1, -1])
    options = SimpleNamespace(options=SimpleNamespace(epochs=4))
    strategy = SimpleNamespace(epoch=epoch, phase=options)
    batch = SimpleNamespace(images=None, labels=labels)
    term = callback.losses(strategy, batch, Output(None, logits))["self_distill"]
    total = term + F.cross_entropy(logits, labels, ignore_index=-1)
    target = (1 - share) * F.one_hot(labels[:4], 4).double() + share * before[:4].softmax(1)
    torch.testing.assert_close(total, -(target * logits[:4].log_softmax(1)).sum(1).mean())
    (gradient,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(gradient[:4], (logits[:4].softmax(1) - target) / 4)
    assert not gradient[4].any()


class Look(SelfDistillation):
    """Keeps the weights of the teacher of each step, and of the network after each epoch, by task and epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.teachers, self.networks = {}, {}

    def losses(self, strategy, batch, output):
        weight = self.teacher.network and self.teacher.network.backbone.layers[1].weight.clone()
        self.teachers.setdefault((strategy.task.index, strategy.epoch), []).append(weight)
        return super().losses(strategy, batch, output)

    def on_train_epoch_end(self, trainer, pl_module):
        place = (pl_module.task.index, pl_module.epoch)
        self.networks[place] = pl_module.network.backbone.layers[1].weight.detach().clone()
        super().on_train_epoch_end(trainer, pl_module)


def test_the_teacher_is_the_network_of_the_previous_epoch_of_the_phase():
    look = Look()
    run(FINETUNE(), look, max_epochs=3)
    for task in range(3):
        assert all(weight is None for weight in look.teachers[task, 0])
        for epoch in (1, 2):
            assert all(torch.equal(weight, look.networks[task, epoch - 1]) for weight in look.teachers[task, epoch])


def test_with_weight_0_or_one_epoch_it_is_its_host_and_it_resumes(tmp_path):
    assert_same_run(run(FINETUNE(), SelfDistillation(final_weight=0.0)), run(FINETUNE()))
    assert_same_run(run(FINETUNE(), SelfDistillation(), max_epochs=1), run(FINETUNE(), max_epochs=1))
    assert_resumes(lambda: (FINETUNE(), [SelfDistillation()]), tmp_path)


def test_losses_over_some_classes_are_refused():
    with pytest.raises(ValueError, match=r"over the classes 'current'; give --model\.loss_classes all"):
        run(LwF(backbone=plain_net, optimizer=sgd), SelfDistillation())
    with pytest.raises(ValueError, match="final_weight"):
        SelfDistillation(final_weight=1.0)
