"""Continual backprop: utilities, the choice of units, what a replacement changes, and runs with it."""

from functools import partial

import pytest
import torch
from support.fakes import normal
from support.runs import NormNet, assert_resumes, assert_same_run, plain_net, run, sgd
from torch import nn
from torch.nn import functional as F

from cl_lightning.batch import Draw
from cl_lightning.callback import ContinualCallback
from cl_lightning.callbacks.continual_backprop import ContinualBackprop, hidden_layers, replace_units
from cl_lightning.models import MLP, ConvNet, LinearHead, Network, ResNet20
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.testing import check_strategy, small


def fast():
    return [ContinualBackprop(rate=0.02, maturity=2)]


def network_of(backbone=None):
    network = Network(backbone or MLP((1, 2, 2), hidden=(6, 5)), LinearHead(5 if backbone is None else 8)).double()
    network.head.grow(2)
    network.head.grow(3)
    return network.double()


def conv_net():
    return ConvNet((1, 8, 8), channels=(3, 4), kernels=(3, 2), hidden=(8,), conv_dropout=0.0, dropout=0.0)


def inputs_of(network, layer, images):
    """What the outgoing layer reads, and its output."""
    seen = []
    handle = layer.outgoing.register_forward_hook(lambda module, inputs, output: seen.extend([inputs[0], output]))
    network(images)
    handle.remove()
    return seen


def test_layers_are_found_in_chains_and_residual_blocks():
    network = network_of()
    first, second = hidden_layers(network)
    assert first.incoming is network.backbone.layers[1]
    assert first.outgoing is second.incoming is network.backbone.layers[3]
    assert second.outgoing is network.head
    names = [layer.name for layer in hidden_layers(network_of(conv_net()))]
    assert names == ["backbone.layers.0", "backbone.layers.4", "backbone.layers.9"]
    norm = Network(NormNet((1, 2, 2)), LinearHead(16))
    assert hidden_layers(norm)[0].norm is norm.backbone.layers[2]
    residual = hidden_layers(Network(ResNet20((3, 8, 8)), LinearHead(64)))
    assert len(residual) == 9
    assert all(layer.outgoing.weight.shape[1] == len(layer.incoming.weight) for layer in residual)


@pytest.mark.parametrize("utility", ["contribution", "adaptable"])
def test_utility_age_and_mean_are_their_equations(utility):
    network = network_of()
    callback, layer = ContinualBackprop(utility=utility, decay=0.8), hidden_layers(network)[1]
    callback._begin([layer])
    f = u = torch.zeros(5, dtype=torch.float64)
    w = layer.incoming.weight.detach().abs().sum(1)
    for step in range(1, 4):
        h = normal(7, 5, seed=step)
        centre = f / (1 - 0.8 ** (step - 1)) if step > 1 else f
        outgoing = network.head.weight().detach().abs().sum(0)
        centred = (h - centre).abs().mean(0) / w
        y = (h.abs().mean(0) if utility == "contribution" else centred) * outgoing
        f, u = 0.8 * f + 0.2 * h.mean(0), 0.8 * u + 0.2 * y
        hook = callback._hook(layer)
        hook(layer.outgoing, (h[:3],))
        hook(layer.outgoing, (h[3:],))
        callback.measure(layer, callback._sums.pop(layer.name))
        callback._begin([layer])
        state = callback.units[layer.name]
        torch.testing.assert_close(state["mean"], f)
        torch.testing.assert_close(state["utility"], u)
        assert state["age"].tolist() == [step] * 5


def test_a_constant_contribution_is_its_corrected_utility_at_every_age():
    network = network_of()
    callback, layer = ContinualBackprop(maturity=0, rate=1.0), hidden_layers(network)[1]
    callback._begin([layer])
    for _ in range(5):
        callback.measure(layer, torch.tensor([[6.0], [6.0], [2.0]], dtype=torch.float64).expand(3, 5))
        state = callback.units[layer.name]
        corrected = state["utility"] / (1 - 0.99 ** state["age"])
        torch.testing.assert_close(corrected, 3 * network.head.weight().detach().abs().sum(0))


def test_the_units_of_lowest_corrected_utility_above_the_maturity_are_chosen():
    layer = hidden_layers(network_of())[0]
    callback = ContinualBackprop(rate=0.25, maturity=10, decay=0.9)
    callback._begin([layer])
    state = callback.units[layer.name]
    state["age"].copy_(torch.tensor([11.0, 10.0, 50.0, 11.0, 0.0, 60.0]))
    # Corrected: .29, -, .2, .73, -, 1. The lowest utility of an eligible unit is of unit 2.
    state["utility"].copy_(torch.tensor([0.2, 0.0, 0.2, 0.5, 0.0, 1.0]))
    chosen, certain = callback.choose(layer)  # four eligible: the counter is 1
    assert chosen[certain].tolist() == [2]
    assert float(state["counter"]) == 0
    state["counter"].fill_(0.9)
    state["age"][1] = 11.0
    chosen, certain = callback.choose(layer)  # 0.9 + 1.25
    assert chosen[certain].tolist() == [1, 2]
    assert float(state["counter"]) == pytest.approx(0.15)
    state["age"].fill_(10.0)
    for _ in range(9):
        assert not callback.choose(layer)[1].any()
    assert float(state["replaced"]) == 3


@pytest.mark.parametrize("backbone", [None, conv_net], ids=["mlp", "conv"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_replacement_keeps_the_mean_output_and_renews_the_unit(backbone, place):
    network = network_of(backbone() if backbone else None)
    if place >= len(hidden_layers(network)):
        return
    layer = hidden_layers(network)[place]
    images = normal(20, *network.backbone.image_shape, seed=4)
    before, output = inputs_of(network, layer, images)
    units = len(layer.incoming.weight)
    mean = before.detach().reshape(len(before), units, -1).mean((0, 2))
    old = layer.incoming.weight.detach().clone()
    columns = [layer.columns(reader.weight).detach().clone() for reader in layer.readers()]
    replace_units(layer, torch.tensor([1, 2]), torch.tensor([True, False]), mean, Draw.of(1, 0), [])
    _, after = inputs_of(network, layer, images)
    axes = tuple(axis for axis in range(output.dim()) if axis != 1)
    if before.dim() == 2 and before.shape[1] == units:
        torch.testing.assert_close(after.mean(axes), output.mean(axes))
    new = layer.incoming.weight.detach()
    kept = [unit for unit in range(units) if unit != 1]
    assert torch.equal(new[kept], old[kept])
    bound = (6 / old[0].numel()) ** 0.5
    assert not torch.equal(new[1], old[1])
    assert float(new[1].abs().max()) <= bound
    assert float(layer.incoming.bias[1]) == 0
    for reader, earlier in zip(layer.readers(), columns, strict=True):
        assert float(layer.columns(reader.weight)[:, 1].detach().abs().max()) == 0
        assert torch.equal(layer.columns(reader.weight).detach()[:, kept], earlier[:, kept])


def test_new_weights_fill_the_interval_of_he():
    layer = hidden_layers(network_of(MLP((1, 20, 20), hidden=(30, 8))))[0]
    everything = torch.arange(30)
    mean = torch.zeros(30, dtype=torch.float64)
    replace_units(layer, everything, torch.ones(30, dtype=torch.bool), mean, Draw.of(1, 0), [])
    bound = (6 / 400) ** 0.5
    assert 0.999 * bound < float(layer.incoming.weight.abs().max()) <= bound
    torch.testing.assert_close(float(layer.incoming.weight.std()), bound / 3**0.5, rtol=0.02, atol=0)


def test_the_output_of_a_unit_that_is_constant_stays_for_every_image():
    network = network_of()
    first = hidden_layers(network)[0]
    with torch.no_grad():
        first.incoming.weight[2] = 0
        first.incoming.bias[2] = 0.7
    images = normal(9, 1, 2, 2, seed=2)
    before = network(images).logits
    mean = torch.full((6,), 0.7, dtype=torch.float64)
    replace_units(first, torch.tensor([2]), torch.tensor([True]), mean, Draw.of(1, 0), [])
    torch.testing.assert_close(network(images).logits, before)


@pytest.mark.parametrize("kind", [partial(torch.optim.SGD, lr=0.1, momentum=0.9), torch.optim.Adam])
def test_moments_of_the_weights_of_a_unit_are_cleared_and_no_others(kind):
    network = network_of()
    optimizer = kind(network.parameters())
    network(normal(4, 1, 2, 2)).logits.square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        for state in optimizer.state.values():
            for value in state.values():
                if value.dim():
                    value.fill_(1.0)
    layer = hidden_layers(network)[1]
    mean = torch.zeros(5, dtype=torch.float64)
    replace_units(layer, torch.tensor([3]), torch.tensor([True]), mean, Draw.of(1, 0), [optimizer])
    for name, parameter in network.named_parameters():
        expected = torch.ones_like(parameter)
        if name.startswith("backbone.layers.3"):
            expected[3] = 0
        elif name in ("head.blocks.0.weight", "head.blocks.1.weight"):
            expected[:, 3] = 0
        moments = [value for value in optimizer.state[parameter].values() if value.dim()]
        assert moments
        assert all(torch.equal(value, expected) for value in moments), name


def test_statistics_of_a_normalised_unit_are_those_of_a_new_layer():
    network = Network(NormNet((1, 2, 2)), LinearHead(16))
    network.head.grow(2)
    layer, norm = hidden_layers(network)[0], network.backbone.layers[2]
    norm.running_mean.fill_(3.0)
    norm.running_var.fill_(5.0)
    with torch.no_grad():
        norm.weight.fill_(7.0)
        norm.bias.fill_(9.0)
    replace_units(layer, torch.tensor([4]), torch.tensor([True]), torch.zeros(16).double(), Draw.of(1, 0), [])
    for value, new, old in (
        (norm.running_mean, 0, 3),
        (norm.running_var, 1, 5),
        (norm.weight, 1, 7),
        (norm.bias, 0, 9),
    ):
        assert value.tolist() == [new if unit == 4 else old for unit in range(16)]


def test_rate_0_is_its_host_to_the_bit_and_young_units_stay():
    host = partial(Finetune, backbone=NormNet, optimizer=sgd)
    plain = run(host(), max_epochs=1)
    assert_same_run(run(host(), ContinualBackprop(rate=0.0), max_epochs=1), plain)
    assert_same_run(run(host(), ContinualBackprop(rate=1.0, maturity=1000), max_epochs=1), plain)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_number_of_replaced_units_is_the_rate_times_the_eligible_ones(accumulated):
    counted = []

    class Count(ContinualCallback):
        def on_train_end(self, trainer, pl_module):
            counted.append(trainer.global_step)

    callback = ContinualBackprop(rate=0.01, maturity=0)
    made = run(Finetune(backbone=plain_net, optimizer=sgd), callback, Count(), accumulate_grad_batches=accumulated)
    expected = 0.01 * 16 * counted[-1]
    assert made.strategy.network.backbone.layers[1].weight.isfinite().all()
    assert abs(callback.results()["replaced"]["backbone.layers.1"] - expected) <= 1


def test_it_resumes_to_the_bit(tmp_path):
    adam = partial(torch.optim.Adam, lr=0.01)
    assert_resumes(lambda: (Finetune(backbone=NormNet, optimizer=adam), fast()), tmp_path)


@pytest.mark.slow
def test_two_processes_give_what_one_gives():
    check_strategy(small(Finetune), callbacks=fast, checks=["processes"])


class NoLayers(MLP):
    def __init__(self, image_shape):
        super().__init__(image_shape, hidden=(4,))
        self.layers, self.weight = nn.Sequential(), nn.Parameter(normal(4, 64).float())

    def forward(self, images):
        return F.linear(images.flatten(1), self.weight)


def test_a_network_without_layers_of_units_is_refused():
    with pytest.raises(ValueError, match="ContinualBackprop: NoLayers has no layers whose units can be replaced"):
        run(Finetune(backbone=NoLayers), ContinualBackprop())


@pytest.mark.parametrize("options", [{"rate": 2.0}, {"maturity": -1}, {"decay": 1.0}, {"utility": "random"}])
def test_wrong_options_are_errors(options):
    with pytest.raises(ValueError, match="ContinualBackprop"):
        ContinualBackprop(**options)
