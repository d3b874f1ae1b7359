import copy

import pytest
import torch
from support.fakes import normal
from torch import nn

from cl_lightning.models import CosineHead, LinearHead, Network, Temporary, head_as, in_eval_mode, perceptron


class Owner(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.part = Temporary(self.make)

    def make(self) -> nn.Module:
        return nn.Linear(self.size, 2).double()


def test_a_temporary_module_is_in_the_state_while_it_exists():
    owner = Owner(3)
    assert not owner.part
    assert not owner.state_dict()
    with pytest.raises(RuntimeError, match="Temporary: call create"):
        owner.part(normal(1, 3))
    owner.part.create()
    assert list(owner.state_dict()) == ["part.module.weight", "part.module.bias"]
    assert torch.equal(owner.part(normal(4, 3)), owner.part.module(normal(4, 3)))
    owner.part.remove()
    assert not owner.part
    assert not owner.state_dict()


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("there", [True, False])
def test_a_temporary_module_exists_as_in_the_state_that_is_loaded(saved, there):
    source, target = Owner(3), Owner(3)
    for owner, exists in ((source, saved), (target, there)):
        if exists:
            owner.part.create()
    stood = torch.get_rng_state()
    target.load_state_dict(source.state_dict())
    assert torch.equal(torch.get_rng_state(), stood)
    assert bool(target.part) == saved
    if saved:
        assert torch.equal(target.part(normal(4, 3)), source.part(normal(4, 3)))


def test_a_copy_makes_modules_for_its_own_owner():
    owner = Owner(3)
    twin = copy.deepcopy(owner)
    twin.size = 5
    twin.part.create()
    assert twin.part.module.in_features == 5
    assert not owner.part


def test_in_eval_mode_each_submodule_gets_its_mode_back_also_after_an_error():
    net = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))
    net[1][0].eval()  # a frozen layer in a module that is trained
    before = [part.training for part in net.modules()]
    with in_eval_mode(net):
        assert not any(part.training for part in net.modules())
    assert [part.training for part in net.modules()] == before
    with pytest.raises(KeyError), in_eval_mode(net):
        raise KeyError
    assert [part.training for part in net.modules()] == before == [True, True, True, False, True]


def test_a_head_of_another_kind_is_an_error_that_names_both():
    network = Network(nn.Identity(), LinearHead(3))
    owner = Owner(1)
    assert head_as(network, LinearHead, owner, "whose rows add up") is network.head
    with pytest.raises(ValueError, match=r"^Owner: head is LinearHead; use a CosineHead, whose rows have a norm$"):
        head_as(network, CosineHead, owner, "whose rows have a norm")


def test_a_perceptron_has_a_relu_between_each_two_linear_layers():
    layers = perceptron(3, 5, 4, 2).double()
    first, _, second, _, third = layers
    x = normal(6, 3)
    for layer in (first, second):
        x = (x @ layer.weight.T + layer.bias).clamp(min=0)
    torch.testing.assert_close(layers(normal(6, 3)), x @ third.weight.T + third.bias)
    assert [type(layer) for layer in perceptron(3, 2)] == [nn.Linear]
