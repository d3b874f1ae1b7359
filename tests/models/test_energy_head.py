"""Energies with gated hidden layers."""

import pytest
import torch
from support.fakes import normal
from torch.nn import functional as F

from cl_lightning.models import EnergyHead


def filled(*sizes: int, **options) -> EnergyHead:
    torch.manual_seed(0)
    head = EnergyHead(5, **options)
    for size in sizes:
        head.grow(size)
    return head.double()


def by_hand(head: EnergyHead, features: torch.Tensor, units: list[int]) -> torch.Tensor:
    """Energy of each class, class after class and layer after layer, as the paper writes it."""
    columns = []
    for row in head.weight():
        h = features
        parts = row.split(units) if head.gate == "binary" else [row] * len(units)
        for layer, own in zip(head.layers, parts, strict=True):
            a = h @ layer.weight.T + layer.bias
            if head.gate == "residual":
                h = (a + a * (own / own.pow(2).sum().sqrt())).relu()
            elif head.gate == "softmax":
                h = a * (units[0] * own.exp() / own.exp().sum())
            else:
                h = (a * own).relu()
        columns.append(h @ head.output.weight[0])
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("gate", ["residual", "softmax", "binary"])
@pytest.mark.parametrize("hidden", [(7,), (7, 7)])
def test_logits_are_the_negative_energies_of_the_paper(gate, hidden):
    head, features = filled(2, 3, gate=gate, hidden=hidden, off=0.4), normal(6, 5)
    torch.testing.assert_close(head(features), -by_hand(head, features, list(hidden)))
    torch.testing.assert_close(head.classify(features), head(features))


def test_layers_of_other_sizes_have_binary_gates_of_their_own():
    head, features = filled(4, hidden=(3, 6), gate="binary", off=0.5), normal(2, 5)
    assert head.weight().shape == (4, 9)
    assert [gate.shape for gate in head.gates()] == [(4, 3), (4, 6)]
    torch.testing.assert_close(head(features), -by_hand(head, features, [3, 6]))


def test_binary_gates_are_fixed_and_switch_off_the_given_share():
    head = filled(50, gate="binary", hidden=(400,), off=0.85)
    assert sorted({float(value) for value in head.weight().unique()}) == [0.0, 1.0]
    assert float(head.weight().mean()) == pytest.approx(0.15, abs=0.01)
    assert {name for name, _ in head.named_parameters()} == {"layers.0.weight", "layers.0.bias", "output.weight"}
    assert float(filled(3, gate="binary", off=0.0).weight().min()) == 1.0


def test_only_the_embeddings_of_classes_in_the_loss_have_a_gradient():
    head = filled(3, 2)
    F.cross_entropy(head(normal(6, 5))[:, 3:], torch.tensor([0, 1, 0, 1, 0, 1])).backward()
    assert not head.blocks[0].weight.grad.any()
    assert head.blocks[1].weight.grad.any(dim=1).all()
    assert head.layers[0].weight.grad.any()


def test_a_state_restores_the_gates_and_no_class_has_no_logits():
    head, fresh = filled(2, 1, gate="binary"), EnergyHead(5, gate="binary").double()
    assert fresh(normal(4, 5)).shape == (4, 0)
    fresh.load_state_dict(head.state_dict())
    torch.testing.assert_close(fresh.double()(normal(4, 5)), head(normal(4, 5)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": ()}, "EnergyHead: hidden is empty"),
        ({"hidden": (4, 0)}, "EnergyHead: hidden is 0"),
        ({"hidden": (4, 5)}, r"EnergyHead: hidden is \[4, 5\]; give the same number of units"),
        ({"gate": "sigmoid"}, "EnergyHead: gate is 'sigmoid'"),
        ({"off": 1.0}, "EnergyHead: off is 1.0"),
    ],
)
def test_options_out_of_range_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        EnergyHead(5, **options)
