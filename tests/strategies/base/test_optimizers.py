from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from support.runs import loop, plain_net
from torch import nn

from cl_lightning.models import MLP
from cl_lightning.strategies.base.optimizers import (
    apply_lr_factors,
    require_plain_sgd,
    separate_group,
    with_lr_factors,
)
from cl_lightning.strategies.base.schedules import StepsOverPhase
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.exemplar_free.lwf import LwF
from cl_lightning.strategies.exemplar_free.prd import PRD
from cl_lightning.strategies.rehearsal.icarl import ICaRL

NAMES = ("network.backbone.weight", "network.backbone.bias", "network.head.weight")


def parameters():
    return {name: nn.Parameter(torch.ones(1)) for name in NAMES}


def rates(optimizer, named):
    found = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    return [found[id(named[name])] for name in NAMES]


def made(named, groups, factors):
    optimizer = torch.optim.SGD(with_lr_factors(groups, named.items(), factors, owner="it"), lr=2.0, momentum=0.5)
    apply_lr_factors(optimizer)
    return optimizer


def test_patterns_say_the_factor_and_the_first_one_decides():
    named = parameters()
    optimizer = made(named, list(named.values()), {"*.bias": 0.0, "backbone.*": 0.01, "network.head.weight": 3.0})
    assert rates(optimizer, named) == pytest.approx([0.02, 0.0, 6.0])
    assert all("lr_factor" not in group for group in optimizer.param_groups)


def test_options_of_groups_stay_with_their_parts():
    named = parameters()
    weight, bias, head = named.values()
    groups = [{"params": [weight, head], "weight_decay": 0.3}, {"params": [bias], "lr": 8.0}]
    optimizer = made(named, groups, {"backbone.*": 0.5})
    assert rates(optimizer, named) == pytest.approx([1.0, 4.0, 2.0])
    assert [(group["weight_decay"], len(group["params"])) for group in optimizer.param_groups] == [
        (0.3, 1),
        (0.3, 1),
        (0, 1),
    ]


@pytest.mark.parametrize("factors", [{"backbones.*": 0.1}, {"head.*": -1.0}, {"*": 1.0, "head.*": 2.0}])
def test_a_pattern_that_fits_nothing_or_a_negative_factor_is_an_error(factors):
    named = parameters()
    with pytest.raises(ValueError, match="it: lr_factors has"):
        with_lr_factors(list(named.values()), named.items(), factors, owner="it")


class Watch(Callback):
    def __init__(self):
        self.rates = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def test_schedules_start_from_the_rates_of_the_groups():
    watch = Watch()
    strategy = Finetune(
        backbone=plain_net,
        lr_factors={"backbone.*": 0.1},
        optimizer=partial(torch.optim.SGD, lr=0.5),
        scheduler=partial(StepsOverPhase, at=[0.5], gamma=0.01),
    )
    loop(strategy, watch, options={"stop_after_task": 0}).fit()
    torch.testing.assert_close(torch.tensor(watch.rates), torch.tensor([[0.5, 0.05], [0.005, 0.0005]]))


def test_a_method_with_groups_of_its_own_keeps_them():
    watch = Watch()
    strategy = PRD(backbone=plain_net, prototype_lr=0.5, lr_factors={"projection.*": 0.1}, projection_hidden=8)
    loop(strategy, watch, options={"stop_after_task": 0}, max_epochs=1).fit()
    torch.testing.assert_close(torch.tensor(watch.rates), torch.tensor([[0.05, 0.005, 0.5]]))


def test_parameters_with_factor_0_are_frozen_and_the_first_pattern_that_matches_decides():
    strategy = Finetune(
        backbone=partial(MLP, hidden=(8, 8)), lr_factors={"*.layers.3.weight": 1.0, "backbone.*": 0.0, "head.*": 0.5}
    )
    watch = Watch()
    made = loop(strategy, watch, options={"stop_after_task": 0}, max_epochs=1)
    made.fit()
    trained = {name for name, parameter in strategy.network.named_parameters() if parameter.requires_grad}
    assert trained == {"backbone.layers.3.weight", "head.blocks.0.weight", "head.blocks.0.bias"}
    torch.testing.assert_close(torch.tensor(watch.rates), torch.tensor([[0.05, 0.025]]))


def test_a_separate_group_has_the_chosen_parameters_that_are_trained():
    first, second, third = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    groups = separate_group([first, second], [second, third], weight_decay=0.5)
    assert [[id(parameter) for parameter in group.pop("params")] for group in groups] == [[id(first)], [id(second)]]
    assert groups == [{}, {"weight_decay": 0.5}]


@pytest.mark.parametrize(
    ("strategy", "rate"),
    [
        (ICaRL(), 0.02),
        (ICaRL(form="softmax"), 0.05),
        (LwF(form="sigmoid"), 0.02),
        (LwF(), 0.05),
        (Finetune(), 0.05),
        (ICaRL(optimizer=partial(torch.optim.SGD, lr=0.3, momentum=0.9)), 0.3),
        (LwF(form="sigmoid", optimizer=partial(torch.optim.SGD, lr=0.3, momentum=0.9)), 0.3),
    ],
)
def test_the_sum_of_sigmoid_losses_over_classes_has_the_learning_rate_of_the_mean_over_100_classes(strategy, rate):
    """In the code of iCaRL: 2.0 for the mean over 100 classes."""
    built = strategy._options.optimizer([nn.Parameter(torch.ones(1))])
    assert isinstance(built, torch.optim.SGD)
    assert built.defaults["lr"] == rate
    assert built.defaults["momentum"] == 0.9


def test_a_method_can_require_plain_sgd():
    named, owner = list(parameters().values()), LwF()
    plain = torch.optim.SGD(named, lr=0.1)
    require_plain_sgd(owner, plain, "which is a reason")
    require_plain_sgd(owner, {"optimizer": plain, "lr_scheduler": None}, "which is a reason")
    for optimizer, what in (
        (torch.optim.SGD(named, lr=0.1, momentum=0.9), "SGD with momentum"),
        (torch.optim.SGD([{"params": named[:1]}, {"params": named[1:], "weight_decay": 0.1}]), "SGD with weight_decay"),
        (torch.optim.Adam(named), "Adam"),
    ):
        with pytest.raises(ValueError, match=f"LwF: optimizer is {what}, which is a reason; use torch.optim.SGD"):
            require_plain_sgd(owner, optimizer, "which is a reason")
