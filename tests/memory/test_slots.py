"""A memory whose samples are replaced one by one."""

import pytest
import torch

from cl_lightning.batch import Draw
from cl_lightning.memory import SlotMemory


def rows(*numbers):
    values = torch.tensor(numbers)
    images = values.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    return images, values % 3, values // 3


def filled():
    memory = SlotMemory(4)
    memory.add(*rows(0, 1, 2, 3), Draw.of(4, 0), score=torch.tensor([0.0, 0.1, 0.2, 0.3]))
    return memory


def test_only_accepted_samples_are_written_to_their_slots():
    memory = filled()
    keys = memory.keys.clone()
    memory.exchange(
        torch.tensor([3, 0, 1]),
        torch.tensor([True, False, True]),
        *rows(10, 11, 12),
        Draw.of(3, 1),
        score=torch.tensor([0.9, 0.8, 0.7]),
    )
    assert memory.images[:, 0, 0, 0].tolist() == [0, 12, 2, 10]
    assert memory.labels.tolist() == [0, 0, 2, 1]
    assert memory.tasks.tolist() == [0, 4, 0, 3]
    assert memory.fields["score"].tolist() == pytest.approx([0.0, 0.7, 0.2, 0.9])
    assert (memory.keys != keys).tolist() == [False, True, False, True]
    assert int(memory.num_seen) == 7


def test_nothing_is_written_where_nothing_is_accepted():
    memory = filled()
    before = {name: value.clone() for name, value in memory.state_dict().items() if name != "num_seen"}
    memory.exchange(torch.tensor([1]), torch.tensor([False]), *rows(9), Draw.of(1, 1), score=torch.ones(1))
    assert all(torch.equal(value, memory.state_dict()[name]) for name, value in before.items())


def test_fields_that_the_memory_does_not_hold_are_refused():
    with pytest.raises(ValueError, match=r"Memory\.add: fields are"):
        filled().exchange(torch.tensor([1]), torch.tensor([True]), *rows(9), Draw.of(1, 1))
