from functools import partial

import pytest
import torch
from support.fakes import normal
from support.runs import assert_resumes, assert_same_run, plain_net, run, sgd
from torch import nn

from cl_lightning.callbacks.continual_backprop import ContinualBackprop, activity, outgoing_size, units_of
from cl_lightning.models import MLP, ConvNet, LinearHead, Network, ResNet20
from cl_lightning.strategies.baselines.finetune import Finetune

FINETUNE = partial(Finetune, backbone=plain_net, optimizer=sgd)


def network(backbone, columns=3):
    torch.manual_seed(0)
    made = Network(backbone, LinearHead(backbone.num_features))
    made.head.grow(columns)
    return made


def ready(made, callback, optimizer=None):
    """The callback on a network, as at the start of a fit."""
    callback._units = units_of(made, list(made.head.blocks))
    for units in callback._units:
        callback.utility[units.name] = torch.zeros(len(units))
        callback.age[units.name] = torch.zeros(len(units))
    return callback._units


def test_units_of_chains_are_found_with_the_layers_that_take_them():
    mlp = network(MLP((1, 2, 2), hidden=(5, 4)))
    found = units_of(mlp, list(mlp.head.blocks))
    layers = [layer for layer in mlp.backbone.layers if isinstance(layer, nn.Linear)]
    assert [units.layer for units in found] == layers
    assert [units.takers for units in found] == [[layers[1]], list(mlp.head.blocks)]
    conv = network(ConvNet((1, 9, 9), channels=(3, 4), kernels=(3, 2), hidden=(6,)))
    assert [len(units) for units in units_of(conv, list(conv.head.blocks))] == [3, 4, 6]
    assert units_of(network(ResNet20((3, 8, 8), width=4)), []) == []


def test_batch_normalisation_between_two_layers_belongs_to_the_units():
    chain = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    chain.num_features = 2
    made = Network(nn.ModuleDict({"chain": chain}), LinearHead(2))  # type: ignore[arg-type]
    (units,) = units_of(made, [])
    assert units.norm is chain[1]
    assert units.takers == [chain[4]]


def test_the_contribution_is_the_activation_times_the_outgoing_weights():
    first, second = nn.Linear(6, 4).double(), nn.Linear(6, 2).double()
    activations = normal(5, 3, 1, 2)
    rows, outgoing = activity(activations, 3), outgoing_size([first, second], 3)
    for i in range(3):
        total = sum(activations[b, i].abs().mean() for b in range(5))
        assert rows[i] == pytest.approx(float(total), rel=1e-6)
        columns = torch.cat([first.weight, second.weight])[:, 2 * i : 2 * i + 2]
        assert outgoing[i] == pytest.approx(float(columns.abs().sum()), rel=1e-6)
    torch.testing.assert_close(activity(activations.flatten(1), 3), rows)


def test_utilities_are_moving_averages_and_the_smallest_mature_unit_is_replaced():
    made = network(MLP((1, 2, 2), hidden=(5,)))
    callback = ContinualBackprop(rate=0.1, decay=0.8, maturity=3)
    (units,) = ready(made, callback)
    outgoing = made.head.blocks[0].weight.detach().abs().sum(0)
    utility = torch.zeros(5)
    for step in range(1, 6):
        rows = normal(5, seed=step).abs().float()
        callback._seen, callback._rows = {units.name: 4 * rows}, {units.name: 4}
        before = made.backbone.layers[1].weight.detach().clone()
        callback.update([], step)
        utility = 0.8 * utility + 0.2 * rows * outgoing
        changed = (made.backbone.layers[1].weight.detach() != before).any(1)
        if step < 5:  # 5 mature units from step 4 on, a tenth of them per step: one unit after two steps
            torch.testing.assert_close(callback.utility[units.name], utility)
            assert not changed.any()
    assert changed.nonzero().flatten().tolist() == [int(utility.argmin())]  # all have one age
    unit = int(utility.argmin())
    assert callback.utility[units.name][unit] == callback.age[units.name][unit] == 0
    assert callback.age[units.name].sum() == 4 * 5
    assert (made.head.blocks[0].weight[:, unit] == 0).all()
    assert (made.head.blocks[0].weight[:, [i for i in range(5) if i != unit]] != 0).all()
    assert made.backbone.layers[1].bias[unit] == 0
    assert made.backbone.layers[1].weight[unit].abs().max() <= 0.5  # 1 / sqrt(4)
    assert callback.results() == {"replaced": {units.name: 1}}
    assert callback.due[units.name] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    "make", [partial(torch.optim.SGD, lr=0.1, momentum=0.9), torch.optim.Adam, torch.optim.RMSprop]
)
def test_the_state_of_any_optimizer_is_cleared_for_a_replaced_unit(make):
    made = network(ConvNet((1, 9, 9), channels=(3,), kernels=(2,), hidden=(6,)))
    optimizer = make(made.parameters())
    made(normal(4, 1, 9, 9).float()).logits.sum().backward()
    optimizer.step()
    callback = ContinualBackprop()
    units, last = ready(made, callback)
    callback._replace(units, torch.tensor([1]), [optimizer], 0)
    for weight, rows in ((units.layer.weight, [1]), (units.layer.bias, [1])):
        for state in optimizer.state[weight].values():
            if state.shape == weight.shape:
                assert (state[rows] == 0).all()
                assert (state[[0, 2]] != 0).any()
    taken = last.layer.weight.view(6, 3, -1)
    assert (taken[:, 1] == 0).all()
    assert (taken[:, [0, 2]] != 0).any()
    for state in optimizer.state[last.layer.weight].values():
        if state.shape == last.layer.weight.shape:
            assert (state.view(6, 3, -1)[:, 1] == 0).all()
            assert (state.view(6, 3, -1)[:, 0] != 0).any()


def test_a_replaced_unit_changes_no_output_but_its_own():
    made = network(MLP((1, 2, 2), hidden=(5, 4)))
    callback, images = ContinualBackprop(), normal(6, 1, 2, 2).float()
    first, _ = ready(made, callback)
    with torch.no_grad():
        first.takers[0].weight[:, 2] = 0  # a unit without use
        before = made(images).logits
        callback._replace(first, torch.tensor([2]), [], 3)
        torch.testing.assert_close(made(images).logits, before)


def test_normalisation_of_a_replaced_unit_starts_again():
    chain = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        for tensor in (chain[1].weight, chain[1].bias, chain[1].running_mean, chain[1].running_var):
            tensor.fill_(7.0)
    made = Network(nn.ModuleDict({"chain": chain}), LinearHead(2))  # type: ignore[arg-type]
    (units,) = units_of(made, [])
    with torch.no_grad():
        ContinualBackprop()._replace(units, torch.tensor([0]), [], 1)
    found = [float(t[0]) for t in (chain[1].weight, chain[1].bias, chain[1].running_mean, chain[1].running_var)]
    assert found == [1.0, 0.0, 0.0, 1.0]
    assert chain[1].weight[1] == 7


def test_with_rate_0_it_is_its_host_and_it_resumes(tmp_path):
    assert_same_run(run(FINETUNE(), ContinualBackprop(rate=0.0)), run(FINETUNE()))
    assert_resumes(lambda: (FINETUNE(), [ContinualBackprop(rate=0.02, maturity=2)]), tmp_path)


def test_units_are_counted_in_a_run_and_other_networks_are_refused():
    callback = ContinualBackprop(rate=0.01, maturity=3)
    made = run(FINETUNE(), callback)
    (name,) = callback.replaced
    steps, units = made.trainer.global_step, len(callback.utility[name])
    assert 0 < callback.replaced[name] <= 0.01 * units * (steps - 3)
    assert made.results()["continual_backprop"]["replaced"] == callback.replaced
    with pytest.raises(ValueError, match="ResNet20 has no trained chain of layers; use MLP"):
        run(Finetune(backbone=partial(ResNet20, width=4), optimizer=sgd), ContinualBackprop())
    for options in ({"rate": 1.1}, {"decay": 1.0}, {"maturity": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ContinualBackprop(**options)
