import torch
from torch import nn

from cl_lightning.strategies.base import flat_gradient, set_gradient, without_conflict


def test_a_flat_gradient_is_written_back_in_place():
    first, second = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(3))
    first.grad = bucket = torch.arange(4.0).view(2, 2)
    assert flat_gradient([first, second]).tolist() == [0, 1, 2, 3, 0, 0, 0]
    set_gradient([first, second], torch.arange(10.0, 17.0))
    assert first.grad is bucket
    assert bucket.tolist() == [[10, 11], [12, 13]]
    assert second.grad.tolist() == [14, 15, 16]


def test_only_the_component_opposite_to_the_reference_is_removed():
    g, reference = torch.tensor([1.0, 1.0]), torch.tensor([-2.0, 0.0])
    assert without_conflict(g, reference).tolist() == [0.0, 1.0]
    assert torch.equal(without_conflict(g, -reference), g)
    assert torch.equal(without_conflict(g, 0 * reference), g)
