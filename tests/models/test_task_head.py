import pytest
import torch
from torch.nn import functional as F

from cl_lightning.models import LinearHead, TaskHead


def made(*tasks):
    """A head of tasks with these columns and all columns up to the largest one, and random features."""
    torch.manual_seed(0)
    head, seen = TaskHead(3).double(), 0
    for columns in tasks:
        seen = max(seen, *(column + 1 for column in columns))
        head.add_task(columns, seen)
        head.double()
    return head, torch.randn(5, 3, dtype=torch.float64)


def test_each_task_has_rows_of_its_own_for_its_classes():
    head, features = made([0, 1], [1, 0], [2, 1])
    assert head.block_sizes() == [2, 2, 2]
    assert head.num_columns == 3
    assert head.has_shared_classes
    first, second, third = (F.linear(features, block.weight, block.bias) for block in head.blocks)
    # Columns 0 and 1 are rows 0 and 1 of the first task, 1 and 0 of the second one. A class that a task does not have
    # has the row of the last earlier task with it, or of the first later one.
    expected = [
        torch.stack([first[:, 0], first[:, 1], third[:, 0]], dim=1),
        torch.stack([second[:, 1], second[:, 0], third[:, 0]], dim=1),
        torch.stack([second[:, 1], third[:, 1], third[:, 0]], dim=1),
    ]
    for task, logits in enumerate(expected):
        head.task = task
        torch.testing.assert_close(head(features), logits)
        torch.testing.assert_close(head.classify(features), logits)
    head.task = None
    torch.testing.assert_close(head(features), expected[2])


def test_with_new_classes_in_each_task_it_is_a_linear_head():
    head, features = made([0, 1], [2], [3, 4, 5])
    assert not head.has_shared_classes
    torch.manual_seed(0)
    plain = LinearHead(3).double()
    for count in (2, 1, 3):
        plain.grow(count)
        plain.double()
    for task in (None, 0, 1, 2):
        head.task = task
        assert torch.equal(head(features), plain(features))
    grown = TaskHead(3).double()
    for count in (2, 0, 1, 3):
        grown.grow(count)
        grown.double()
    grown.load_state_dict(head.state_dict())
    assert torch.equal(grown.position, head.position)


def test_the_gradient_reaches_the_rows_of_the_task_alone():
    head, features = made([0, 1], [0, 1])
    head(features).square().sum().backward()
    assert head.blocks[0].weight.grad is None or not head.blocks[0].weight.grad.any()
    assert head.blocks[1].weight.grad.any()
    assert head.blocks[1].bias.grad.any()


@pytest.mark.parametrize("bias", [True, False])
def test_it_takes_its_shape_from_a_state_dict_also_of_a_linear_head(bias):
    head = TaskHead(3, bias=bias)
    for columns in ([0, 1], [1, 0]):
        head.add_task(columns, 2)
    other = TaskHead(3, bias=bias)
    other.load_state_dict(head.state_dict())
    features = torch.randn(5, 3)
    for task in (0, 1):
        head.task = other.task = task
        assert torch.equal(other(features), head(features))
    plain = LinearHead(3, bias=bias)
    for count in (2, 3):
        plain.grow(count)
    other = TaskHead(3, bias=bias)
    other.load_state_dict(plain.state_dict())
    assert torch.equal(other(features), plain(features))
    assert other.num_columns == 5


def test_a_head_without_tasks_has_no_columns():
    assert TaskHead(3)(torch.randn(2, 3)).shape == (2, 0)


def test_new_columns_belong_to_the_task():
    with pytest.raises(ValueError, match="TaskHead: column 1 is new, but not a column of the task"):
        TaskHead(3).add_task([0, 2], 3)
