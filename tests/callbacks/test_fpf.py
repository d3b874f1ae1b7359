"""FPF, fine-tuning of the modules that forget most."""

import pytest
import torch
from support.runs import NormNet, assert_resumes, assert_same, loop, plain_net, run, sgd

from cl_lightning.callback import ContinualCallback
from cl_lightning.callbacks.fpf import FPF
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.rehearsal.derpp import DERpp
from cl_lightning.strategies.rehearsal.er import ER
from cl_lightning.testing import check_strategy, small

HEAD = ["head.blocks.0.weight", "head.blocks.0.bias", "head.blocks.1.weight", "head.blocks.1.bias"]
HEAD += ["head.blocks.2.weight", "head.blocks.2.bias"]


def er(**options):
    return ER(**{"backbone": plain_net, "optimizer": sgd, "memory_size": 60, **options})


def fpf():
    return [FPF(steps=3, share=0.5)]


class Looks(ContinualCallback):
    """Notes what is in the network in a test, and after it."""

    observer_only = True

    def __init__(self):
        self.tested, self.after = [], []

    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 0:
            self.tested.append({name: value.clone() for name, value in pl_module.network.state_dict().items()})

    def on_train_start(self, trainer, pl_module):
        self.after.append({name: value.clone() for name, value in pl_module.network.state_dict().items()})


@pytest.mark.parametrize("backbone", [plain_net, NormNet])
def test_tests_are_of_the_tuned_copy_and_training_is_the_same_without_it(backbone):
    callback, looks = FPF(steps=5, lr=0.2), Looks()
    made = run(er(backbone=backbone), callback, looks, max_epochs=1)
    plain = run(er(backbone=backbone), max_epochs=1)
    live = made.strategy.network.state_dict()
    assert_same(live, plain.strategy.network.state_dict())
    layers = [f"backbone.layers.2.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
    layers = [*layers, "backbone.layers.2.num_batches_tracked"] if backbone is NormNet else []
    assert callback.tuned.keys() == {*layers, *HEAD}
    assert len(looks.tested) == 3
    assert_same(looks.tested[-1], {**live, **callback.tuned})
    assert callback.bytes_kept()["tuned weights"] == sum(value.nbytes for value in callback.tuned.values())


def test_without_steps_the_network_itself_is_evaluated():
    callback = FPF(steps=0)
    made, plain = run(er(), callback, max_epochs=1), run(er(), max_epochs=1)
    assert callback.tuned == {}
    assert torch.equal(made.matrix.R_ci.nan_to_num(-1), plain.matrix.R_ci.nan_to_num(-1))


def test_a_share_of_the_parameters_has_the_modules_of_the_largest_change():
    callback = FPF(steps=2, share=0.3)
    made = run(er(backbone=NormNet), callback, max_epochs=2)
    parameters = dict(made.strategy.network.named_parameters())
    assert callback.scores.keys() == {"backbone.layers.1", "backbone.layers.2", "head"}
    assert min(callback.scores.values()) > 0
    chosen = callback.chosen(made.strategy)
    room = 0.3 * sum(value.numel() for value in parameters.values())
    assert sum(parameters[name].numel() for name in chosen) <= room
    callback.scores = {"backbone.layers.1": 3.0, "backbone.layers.2": 2.0, "head": 1.0}
    callback.share = 0.1  # 32 of 1242 parameters; the 1040 of the first layer and the 170 of the head do not fit
    assert callback.chosen(made.strategy) == ["backbone.layers.2.weight", "backbone.layers.2.bias"]
    callback.share = 1.0
    assert callback.chosen(made.strategy) == list(parameters)


def test_patterns_of_names_choose_parameters_and_wrong_ones_are_refused_before_training():
    callback = FPF(steps=2, names=["backbone.*.bias"])
    run(er(), callback, max_epochs=1)
    assert callback.tuned.keys() == {"backbone.layers.1.bias"}
    with pytest.raises(ValueError, match=r"FPF: names has 'conv\*'"):
        loop(er(), FPF(names=["conv*"])).fit()


def test_the_stored_logits_need_a_strategy_that_stores_them():
    with pytest.raises(ValueError, match=r"FPF: logit_weight is 0\.5, but ER stores no logits"):
        run(er(), FPF(logit_weight=0.5), max_epochs=1)
    both = [FPF(steps=5, logit_weight=weight) for weight in (0.5, 0.0)]
    for callback in both:
        run(DERpp(backbone=plain_net, optimizer=sgd, memory_size=60), callback, max_epochs=1)
    assert not torch.equal(both[0].tuned[HEAD[0]], both[1].tuned[HEAD[0]])
    with pytest.raises(ValueError, match="FPF: Finetune has no memory"):
        loop(Finetune(backbone=plain_net), FPF()).fit()


def test_it_resumes_to_the_bit(tmp_path):
    assert_resumes(lambda: (er(backbone=NormNet), fpf()), tmp_path)


@pytest.mark.slow
def test_two_processes_give_what_one_gives():
    check_strategy(small(ER), callbacks=fpf, checks=["processes"], first_task_is_finetuning=False)


def test_a_network_that_forgets_is_better_with_it():
    tuned, plain = (
        run(er(memory_size=200, replay_size=8), *callbacks, max_epochs=2).matrix.measures()["average_accuracy"]
        for callbacks in ([FPF(steps=60)], [])
    )
    # Measured: .67 against .27.
    assert tuned > plain + 0.2


@pytest.mark.parametrize(
    "options",
    [
        {"steps": -1},
        {"batch_size": 0},
        {"lr": 0},
        {"logit_weight": -1},
        {"share": 0},
        {"share": 0.5, "names": ["head*"]},
    ],
)
def test_wrong_options_are_errors(options):
    with pytest.raises(ValueError, match="FPF"):
        FPF(**options)
