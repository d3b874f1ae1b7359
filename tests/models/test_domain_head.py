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


def test_columns_can_come_before_their_domain():
    head = DomainHead(2)
    head.see(2)
    features = torch.tensor([[1.0, -2.0], [3.0, 0.5], [0.0, 1.0]])
    assert torch.equal(head(features), torch.zeros(3, 2))
    head.add_domain([1], 2)
    head.see(4)
    head.see(3)
    assert head.position.tolist() == [[-1, 0, -1, -1]]
    low = torch.full((3, 1), -math.inf)
    torch.testing.assert_close(head(features), torch.cat([low, head.blocks[0](features), low, low], dim=1))
    twin = DomainHead(2)
    twin.load_state_dict(head.state_dict())
    torch.testing.assert_close(twin(features), head(features))
