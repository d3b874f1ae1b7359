"""A memory of floating-point images."""

import pytest
import torch

from cl_lightning.batch import Draw
from cl_lightning.memory import Memory


class FloatMemory(Memory):
    dtype = torch.float32


def test_images_keep_their_values_and_their_type():
    memory = FloatMemory(3)
    assert torch.cat([memory.images, torch.rand(2)]).dtype == torch.float32
    images, zeros = torch.randn(5, 1, 2, 2), torch.zeros(5, dtype=torch.int64)
    memory.add(images, torch.arange(5), zeros, Draw.of(5, 0))
    assert torch.equal(memory.images, images[memory.labels])
    assert memory.num_bytes() == 3 * (4 * 4 + 3 * 8)
    other = FloatMemory(0)
    other.load_state_dict(memory.state_dict())
    batch = other.at(torch.tensor([2, 0]), Draw.of(2, 0))
    assert torch.equal(batch.raw, memory.images[[2, 0]])


def test_samples_that_are_no_images_keep_their_type():
    for dtype in (torch.float32, torch.int64):
        memory, zeros = Memory(3), torch.zeros(5, dtype=torch.int64)
        values = torch.arange(5 * 4).view(5, 4).to(dtype)
        memory.add(values, torch.arange(5), zeros, Draw.of(5, 0))
        assert memory.images.dtype == dtype
        assert torch.equal(memory.images, values[memory.labels])
        with pytest.raises(ValueError, match=r"Memory\.add: images are torch\.uint8; give raw"):
            memory.add(values.byte(), torch.arange(5), zeros, Draw.of(5, 0))


@pytest.mark.parametrize(("kind", "given", "needed"), [(FloatMemory, "uint8", "float32"), (Memory, "float64", "uint8")])
def test_images_of_another_type_are_refused(kind, given, needed):
    images, zeros = torch.zeros(2, 1, 2, 2, dtype=getattr(torch, given)), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"Memory.add: images are torch.{given}; give raw {needed} images"):
        kind(3).add(images, zeros, zeros, Draw.of(2, 0))
