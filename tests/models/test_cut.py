"""Activations of an inner layer that enter a network again behind it."""

from functools import partial

import pytest
import torch
from support.fakes import normal
from support.runs import NormNet
from torch import nn

from cl_lightning.models import MLP, CifarResNet, ConvNet, Cut, joined_rows

SHAPE = (1, 8, 8)
CONV = partial(ConvNet, channels=(3, 4), kernels=(3, 2), hidden=(5,))


def made(build, name):
    torch.manual_seed(0)
    network = build(SHAPE).double().eval()
    return network, Cut("AR1", network, name, SHAPE)


CUTS = [
    (partial(MLP, hidden=(6, 5)), "layers.2"),
    (partial(MLP, hidden=(6, 5)), "layers.4"),
    (partial(CifarResNet, depth=8), "layer2"),
    (CONV, "layers.3"),
    (NormNet, "layers.1"),
]


@pytest.mark.parametrize(("build", "name"), CUTS)
def test_stored_activations_give_the_features_of_their_images(build, name):
    network, cut = made(build, name)
    images = normal(5, *SHAPE)
    stored = cut.activations(network, images[2:]).double()
    expected = network(images)
    cut.insert(stored)
    torch.testing.assert_close(network(images[:2]), expected, rtol=1e-5, atol=1e-6)  # activations are float32
    assert joined_rows(network) == 3
    torch.testing.assert_close(network(images), expected)  # only the next forward pass
    assert joined_rows(network) == 0


def test_what_is_below_the_cut_is_what_the_activations_depend_on():
    network, cut = made(partial(MLP, hidden=(6, 5)), "layers.2")
    assert cut.below == list(network.layers)[:3]
    assert [id(p) for p in cut.parameters_below] == [id(p) for p in network.layers[1].parameters()]
    network, cut = made(partial(CifarResNet, depth=8), "layer1")
    names = {name.split(".")[0] for name, p in network.named_parameters() if any(p is q for q in cut.parameters_below)}
    assert names == {"conv1", "bn1", "layer1"}
    below = {id(module) for module in cut.below}
    assert {name.split(".")[0] for name, module in network.named_modules() if id(module) in below} == {
        *("conv1", "bn1", "maxpool", "layer1"),
    }


def test_a_parameter_of_the_network_itself_is_found():
    class Shifted(MLP):
        def __init__(self, shape):
            super().__init__(shape, hidden=(6, 5))
            self.shift = nn.Parameter(torch.ones(1))

        def forward(self, images):
            return super().forward(images + self.shift)

    network, cut = made(Shifted, "layers.2")
    assert len(cut.parameters_below) == 3
    assert any(p is network.shift for p in cut.parameters_below)


def test_the_gradient_of_inserted_rows_ends_at_the_cut():
    network, cut = made(partial(MLP, hidden=(6, 5)), "layers.2")
    cut.insert(cut.activations(network, normal(3, *SHAPE)))
    network(normal(2, *SHAPE, seed=1))[2:].sum().backward()
    assert not network.layers[1].weight.grad.any()
    assert network.layers[3].weight.grad.any()


def test_making_a_cut_changes_nothing():
    network = NormNet(SHAPE).train()
    network.layers[1].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    Cut("AR1", network, "layers.3", SHAPE)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training
    assert network.layers.training
    assert [name for name, p in network.named_parameters() if not p.requires_grad] == ["layers.1.bias"]
    assert all(p.grad is None for p in network.parameters())


class Around(MLP):
    def forward(self, images):
        return super().forward(images) + images.flatten(1)[:, :5]


class Twice(MLP):
    def forward(self, images):
        return super().forward(images) + super().forward(2 * images)


class Unused(MLP):
    def __init__(self, shape, **options):
        super().__init__(shape, **options)
        self.unused = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("cls", "name", "message"),
    [
        (MLP, "layers.9", "AR1: latent_layer has 'layers.9', which matches none of layers, layers.0"),
        (Around, "layers.2", "AR1: latent_layer 'layers.2' does not cut the network"),
        (Twice, "layers.2", "AR1: latent_layer 'layers.2' is called more than once"),
        (Unused, "unused", "AR1: latent_layer 'unused' is not called"),
    ],
)
def test_a_module_that_does_not_cut_the_network_is_refused(cls, name, message):
    with pytest.raises(ValueError, match=message):
        Cut("AR1", cls(SHAPE, hidden=(6, 5)), name, SHAPE)
