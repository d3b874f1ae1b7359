import copy

import torch
from torch import nn

from cl_lightning.models import GrowingParameters


def grown(*shapes):
    made = GrowingParameters()
    for number, shape in enumerate(shapes):
        made.append(torch.full(shape, float(number + 1)))
    return made


def test_it_is_a_list_of_parameters_that_stay_the_same_objects():
    made = grown((2,), (3, 1))
    first, second = made
    made.append(torch.zeros(4))
    assert len(made) == 3
    assert made[0] is first
    assert made[-2] is second
    assert isinstance(made[-1], nn.Parameter)
    assert [name for name, _ in made.named_parameters()] == ["0", "1", "2"]


def test_a_parameter_has_values_of_its_own():
    made = grown((2,))
    made.append(made[0])
    made[1].sum().backward()
    assert made[0].grad is None
    with torch.no_grad():
        made[1].add_(1)
    assert made[0].tolist() == [1.0, 1.0]


def test_a_state_of_another_length_or_other_shapes_is_loaded():
    state = grown((2,), (3, 1), (5,)).state_dict()
    for start in (grown(), grown((2,)), grown((2,), (3, 1), (4,)), grown((1,), (1,), (1,), (1,))):
        holder = nn.ModuleDict({"part": start})
        holder.load_state_dict({f"part.{name}": value for name, value in state.items()})
        assert [tuple(p.shape) for p in start] == [(2,), (3, 1), (5,)]
        assert all(torch.equal(one, other) for one, other in zip(start, state.values(), strict=True))


def test_a_state_of_the_same_shapes_leaves_the_objects():
    made = grown((2,), (3, 1))
    before = list(made)
    made.load_state_dict(grown((2,), (3, 1)).state_dict())
    assert all(one is other for one, other in zip(made, before, strict=True))


def test_a_copy_is_on_its_own():
    made = grown((2,))
    twin = copy.deepcopy(made)
    made.append(torch.zeros(1))
    with torch.no_grad():
        made[0].add_(1)
    assert len(twin) == 1
    assert twin[0].tolist() == [1.0, 1.0]


def test_the_last_parameter_is_removed():
    made = grown((2,), (3, 1))
    first = made[0]
    made.pop()
    assert len(made) == 1
    assert made[0] is first
    made.append(torch.zeros(4))
    assert [tuple(p.shape) for p in made] == [(2,), (4,)]
