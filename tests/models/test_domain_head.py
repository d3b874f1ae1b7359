import math

import torch

from cl_lightning.models import DomainHead


def test_each_domain_has_rows_of_its_own():
    head = DomainHead(2)
    head.add_domain([0, 1], 2)
    head.add_domain([2, 1], 3)
    with torch.no_grad():
        for number, block in enumerate(head.blocks):
            block.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]) + 10 * number)
            block.bias.copy_(torch.tensor([0.5, -0.5]) * (number + 1))
    features = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    low = -math.inf
    expected = torch.tensor([[1.5, 1.5, low], [low, 10 + 22 - 1, 11 + 20 + 1]])
    torch.testing.assert_close(head(features, torch.tensor([0, 1])), expected)
    torch.testing.assert_close(head(features), expected[[1, 1]])
    assert head.num_columns == 3
    twin = DomainHead(2)
    twin.load_state_dict(head.state_dict())
    torch.testing.assert_close(twin(features, torch.tensor([0, 1])), expected)


def test_a_domain_gets_further_rows():
    head = DomainHead(2)
    head.see(2)
    assert head(torch.ones(3, 2)).shape == (3, 2)
    head.add_domain([0, 1], 2)
    head.add_domain([1], 2)
    before = list(head.blocks)
    head.extend(0, [3, 2], 4)
    assert list(head.blocks)[:2] == before
    assert head.position.tolist() == [[0, 1, 4, 3], [-1, 2, -1, -1]]
    features = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    first, second, third = (block(features) for block in head.blocks)
    expected = torch.cat([first, third[:, [1, 0]]], dim=1)
    torch.testing.assert_close(head(features, torch.tensor([0, 0])), expected)
    low = torch.full((2, 1), -math.inf)
    torch.testing.assert_close(head(features), torch.cat([low, second, low, low], dim=1))
    head.see(3)
    assert head.num_columns == 4
    twin = DomainHead(2)
    twin.load_state_dict(head.state_dict())
    torch.testing.assert_close(twin(features, torch.tensor([0, 1])), head(features, torch.tensor([0, 1])))
