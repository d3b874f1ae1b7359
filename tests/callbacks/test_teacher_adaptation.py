import warnings

import pytest
import torch
from support.runs import NormNet, assert_resumes, assert_same, assert_same_run, loop, plain_net, run, sgd
from torch import nn
from torch.nn import functional as F

from cl_lightning.callback import ContinualCallback
from cl_lightning.callbacks.distillation import Distillation
from cl_lightning.callbacks.teacher_adaptation import TeacherAdaptation
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.exemplar_free.efc import EFC
from cl_lightning.strategies.exemplar_free.lwf import LwF


def lwf(**options):
    return LwF(**{"backbone": NormNet, "optimizer": sgd, **options})


def finetune(**options):
    return Finetune(**{"backbone": NormNet, "optimizer": sgd, "loss_classes": "current", **options})


class Look(ContinualCallback):
    """Compares a teacher with the copy it was made as, and notes in which mode its layers are when it teaches."""

    def __init__(self, teacher_of):
        self.teacher_of = teacher_of
        self.first, self.last, self.images = {}, {}, []
        self.training = set()

    def losses(self, strategy, batch, output):
        teacher = self.teacher_of(strategy)
        if teacher:
            self.training |= {type(module) for module in teacher.modules() if module.training}
            self.images.append(batch.images)
        return {}

    def on_train_start(self, trainer, strategy):
        self.images = []
        self.first = {name: value.clone() for name, value in self.teacher_of(strategy).state_dict().items()}

    def on_train_end(self, trainer, strategy):
        self.on_validation_start(trainer, strategy)
        self.last = {name: value.clone() for name, value in self.teacher_of(strategy).state_dict().items()}

    def on_validation_start(self, trainer, strategy):
        assert not any(module.training for module in self.teacher_of(strategy).modules())


def test_only_the_statistics_of_normalisation_change_and_by_their_formula():
    look = Look(lambda strategy: strategy.teacher)
    run(lwf(), TeacherAdaptation(), look, max_epochs=2, data={"val_fraction": 0.2})
    assert look.training == {nn.BatchNorm1d}  # not the dropout
    changed = {name for name in look.first if not torch.equal(look.first[name], look.last[name])}
    layer = "network.backbone.layers.2"
    assert changed == {f"{layer}.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    mean = look.first[f"{layer}.running_mean"].double()
    weight, bias = (look.first[f"network.backbone.layers.1.{name}"].double() for name in ("weight", "bias"))
    for images in look.images:
        mean = 0.9 * mean + 0.1 * (images.double().flatten(1) @ weight.T + bias).mean(0)
    torch.testing.assert_close(look.last[f"{layer}.running_mean"].double(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adapted", [True, False])
def test_with_momentum_0_the_teacher_takes_the_statistics_of_the_batch_and_keeps_its_own(adapted):
    class Still(NormNet):
        def __init__(self, image_shape):
            super().__init__(image_shape)
            self.layers[2].momentum = 0.0
            nn.init.normal_(self.layers[2].running_mean)

    seen = []

    def compare(teacher, args, output):
        linear, norm = teacher.network.backbone.layers[1:3]
        hidden = linear(args[0].flatten(1))
        of_batch = F.batch_norm(hidden, None, None, norm.weight, norm.bias, training=True).relu()
        kept = F.batch_norm(hidden, norm.running_mean, norm.running_var, norm.weight, norm.bias).relu()
        torch.testing.assert_close(output.features, of_batch if adapted else kept)
        assert (of_batch - kept).abs().max() > 0.1
        seen.append(norm.running_mean.clone())

    strategy = lwf(backbone=Still)
    strategy.teacher.register_forward_hook(compare)
    run(strategy, *([TeacherAdaptation()] if adapted else []), max_epochs=1)
    assert len(seen) > 4
    norm = strategy.teacher.network.backbone.layers[2]
    assert all(torch.equal(mean, norm.running_mean) for mean in seen)
    assert torch.equal(norm.running_var, torch.ones(16))


def test_a_teacher_that_measures_how_features_drift_is_not_adapted():
    with pytest.raises(ValueError, match="remove the callback; the teacher of EFC is a reference"):
        run(EFC(backbone=NormNet, optimizer=sgd), TeacherAdaptation())


def test_without_it_the_teacher_stays_what_it_was():
    look = Look(lambda strategy: strategy.teacher)
    run(lwf(), look)
    assert look.training == set()
    assert_same(look.first, look.last)


def test_the_teacher_of_a_callback_adapts_as_that_of_a_strategy():
    callback = Distillation()
    ours, theirs = run(finetune(), callback, TeacherAdaptation()), run(lwf(), TeacherAdaptation())
    assert_same_run(ours, theirs)
    assert_same(callback.teacher.state_dict(), theirs.strategy.teacher.state_dict())
    assert not torch.equal(
        ours.strategy.network.head.blocks[2].weight, run(lwf()).strategy.network.head.blocks[2].weight
    )


def test_in_front_of_the_callback_whose_teacher_it_is_all_is_the_same():
    assert_same_run(
        run(finetune(), TeacherAdaptation(), Distillation()), run(finetune(), Distillation(), TeacherAdaptation())
    )


@pytest.mark.parametrize("make", [lambda: (lwf(), []), lambda: (finetune(), [Distillation()])], ids=["lwf", "callback"])
def test_it_resumes_to_the_bit(make, tmp_path):
    def with_adaptation():
        strategy, callbacks = make()
        return strategy, [*callbacks, TeacherAdaptation()]

    assert_resumes(with_adaptation, tmp_path)


def test_validation_in_between_changes_nothing():
    made = [
        run(lwf(), TeacherAdaptation(), data={"val_fraction": 0.2}, limit_val_batches=batches, val_check_interval=2)
        for batches in (0, 1.0)
    ]
    assert_same_run(*made)


def test_networks_without_batch_normalisation_are_left_alone_with_a_warning():
    with pytest.warns(UserWarning, match="MLP has no batch normalisation"):
        made = run(lwf(backbone=plain_net), TeacherAdaptation())
    assert_same_run(made, run(lwf(backbone=plain_net)))


def test_networks_with_batch_normalisation_bring_no_warning():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="TeacherAdaptation")
        run(lwf(), TeacherAdaptation(), max_epochs=1)


def test_a_run_without_teacher_is_refused_before_training():
    made = loop(finetune(), TeacherAdaptation())
    with pytest.raises(ValueError, match="neither Finetune nor a callback has a teacher"):
        made.fit()
