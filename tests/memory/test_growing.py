import pytest
import torch
from torch import nn

from cl_lightning.memory import GrowingBuffers, restore_shapes


class Rows(GrowingBuffers):
    def __init__(self, rows: int = 0, width: int = 3, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(rows * width, dtype=dtype).view(rows, width))
        self.register_buffer("seen", torch.tensor(rows))
        self.register_buffer("cached", torch.ones(1), persistent=False)


@pytest.mark.parametrize("rows", [0, 2, 5])
@pytest.mark.parametrize("inside", [False, True])
def test_rows_come_from_the_state_dict(rows, inside):
    def wrap(module):
        return nn.Sequential(nn.Linear(2, 2), nn.Sequential(module)) if inside else module

    state = wrap(Rows(rows)).state_dict()
    for other in (Rows(), Rows(3), Rows(9)):
        wrap(other).load_state_dict(state, strict=True)
        assert other.table.equal(Rows(rows).table)
        assert other.seen == rows
        assert other.cached.equal(torch.ones(1))
        assert "cached" not in other.state_dict()


def test_a_buffer_keeps_its_dtype_and_the_state_stays_as_it_is():
    state = Rows(4, dtype=torch.float64).state_dict()
    other = Rows()
    other.load_state_dict(state)
    assert other.table.dtype == torch.float32
    assert state["table"].dtype == torch.float64
    other.table.zero_()
    assert state["table"].equal(Rows(4, dtype=torch.float64).table)


@pytest.mark.parametrize("saved", [torch.zeros(2, 4), torch.zeros(2), torch.zeros(2, 3, 1)])
def test_another_width_or_number_of_dimensions_is_reported_as_a_mismatch(saved):
    with pytest.raises(RuntimeError, match="size mismatch for table"):
        Rows(1).load_state_dict({**Rows(1).state_dict(), "table": saved})
    with pytest.raises(RuntimeError, match="size mismatch for seen"):  # a scalar does not become a vector
        Rows(1).load_state_dict({**Rows(1).state_dict(), "seen": torch.zeros(5, dtype=torch.int64)})


def test_a_missing_key_is_reported_and_leaves_its_buffer():
    module, state = Rows(2), Rows(4).state_dict()
    del state["table"]
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict(state)
    assert module.table.equal(Rows(2).table)


def test_named_buffers_are_created_in_the_saved_shape_and_dtype():
    module = nn.Module()
    for name in ("a", "b", "c"):
        module.register_buffer(name, torch.ones(2), persistent=name != "b")
    state = {"x.a": torch.ones(3, 4, dtype=torch.int64), "x.b": torch.ones(()), "a": torch.ones(9)}
    restore_shapes(module, state, "x.", ["a", "b", "c"])
    assert module.a.equal(torch.zeros(3, 4, dtype=torch.int64))
    assert module.a.dtype == torch.int64
    assert module.b.equal(torch.zeros(()))
    assert module.c.equal(torch.ones(2))
    assert list(module.state_dict()) == ["a", "c"]  # a buffer that is not saved stays one
    restore_shapes(module, {"a": torch.ones(1, dtype=torch.float64)}, "", ["a"], keep_dtype=True)
    assert module.a.dtype == torch.int64
    assert module.a.shape == (1,)
    with pytest.raises(KeyError, match="typo"):
        restore_shapes(module, state, "x.", ["typo"])


@pytest.mark.parametrize("name", ["a", "b"])
def test_the_buffers_keep_their_device(name):
    module = nn.Module()
    module.register_buffer("a", torch.ones(2, device="meta"))
    module.register_buffer("b", torch.ones(2))
    device = module.get_buffer(name).device
    restore_shapes(module, {name: torch.ones(3)}, "", [name])
    assert module.get_buffer(name).device == device
    assert module.get_buffer(name).shape == (3,)
