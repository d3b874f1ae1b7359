import pytest
import torch
from support.fakes import normal

from cl_lightning.memory import DualSpaces


def diagonal(*values):
    return {"layer": torch.diag(torch.tensor(values, dtype=torch.float64))}


def used(spaces):
    """Projection onto the used space."""
    whole = torch.eye(len(spaces.bases["layer"]), dtype=torch.float64)
    return whole - spaces.free_part("layer", whole)


def axes(size, *chosen):
    return torch.diag(torch.tensor([float(axis in chosen) for axis in range(size)], dtype=torch.float64))


def random_gram(rank, size=8, seed=0):
    rows = normal(40, rank, seed=seed) @ normal(rank, size, seed=seed + 100)
    return rows.T @ rows


@pytest.mark.parametrize(("energy", "chosen"), [(0.0, [0]), (0.95, [0]), (0.99, [0, 1]), (0.999, [0, 1, 2])])
def test_the_first_task_has_directions_whose_squared_values_sum_to_less_than_the_energy(energy, chosen):
    spaces = DualSpaces()
    spaces.grow(diagonal(9, 3, 1.1, 0.5, 0.1, 0), energy)  # shares 0.8855, 0.9839, 0.9972, ...
    torch.testing.assert_close(used(spaces), axes(6, *chosen))


def test_later_tasks_add_directions_until_the_used_space_has_the_energy():
    for energy, count in ((0.6, 0), (0.75, 1), (0.85, 2), (0.95, 3), (1.0, 3)):
        spaces = DualSpaces()
        spaces.grow(diagonal(1, 0, 0, 0, 0, 0, 0, 0), 0.9)
        # Squares sum to 36.7: 0.681 of them is in the used space, then 0.790, 0.896, 1.
        spaces.grow(diagonal(5, 2, 3.9**0.5, 3.8**0.5, 0, 0, 0, 0), energy)
        torch.testing.assert_close(used(spaces), axes(8, *range(1 + count)), rtol=0, atol=1e-6)


def test_where_most_directions_are_used_the_free_ones_are_kept():
    spaces, plain = DualSpaces(), torch.zeros(8, 0, dtype=torch.float64)
    for task, rank in enumerate((3, 4, 6)):
        gram = random_gram(rank, seed=task)
        free = spaces.free_part("layer", gram) if task else gram
        vectors, values, _ = torch.linalg.svd(free)
        squares = values.square()
        if task:
            inside = 1 - squares.sum() / gram.square().sum()
            count = next(k for k in range(9) if inside + squares[:k].sum() / gram.square().sum() >= 0.99)
        else:
            count = max(int((squares.cumsum(0) / squares.sum() < 0.99).sum()), 1)
        plain = torch.linalg.qr(torch.cat([plain, vectors[:, :count]], dim=1)).Q
        spaces.grow({"layer": gram}, 0.99)
        torch.testing.assert_close(used(spaces), plain @ plain.T, rtol=0, atol=1e-5)
        assert spaces.is_free["layer"] == (plain.shape[1] > 4)
        assert spaces.bases["layer"].shape[1] == min(plain.shape[1], 8 - plain.shape[1])
    assert spaces.is_free["layer"]


def test_directions_are_orthonormal_and_outside_of_the_used_space():
    spaces = DualSpaces()
    first = random_gram(3)
    rows = spaces.directions("layer", first, 2)
    top = torch.linalg.svd(first)[0][:, :2]
    torch.testing.assert_close(rows.T @ rows, top @ top.T)
    spaces.grow({"layer": first}, 1.0)
    new = random_gram(4, seed=1)
    rows = spaces.directions("layer", new, 3)
    torch.testing.assert_close(rows @ rows.T, torch.eye(3).double())
    torch.testing.assert_close(rows @ used(spaces), torch.zeros(3, 8).double(), rtol=0, atol=1e-7)
    top = torch.linalg.svd(spaces.free_part("layer", new))[0][:, :3]
    torch.testing.assert_close(rows.T @ rows, top @ top.T, rtol=0, atol=1e-6)


def test_without_room_directions_are_0():
    spaces = DualSpaces()
    spaces.grow(diagonal(1, 1, 0, 0), 1.0)
    spaces.grow(diagonal(1, 1, 0, 0), 1.0)
    rows = spaces.directions("layer", diagonal(2, 1, 5, 0)["layer"], 3)
    assert rows.abs().tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert not spaces.directions("layer", diagonal(2, 1, 0, 0)["layer"], 2).any()


def test_the_state_makes_another_one_the_same():
    spaces, other = DualSpaces(), DualSpaces()
    for seed in range(2):
        spaces.grow({"layer": random_gram(4, seed=seed), "more": random_gram(2, size=5, seed=seed)}, 0.99)
    other.load_state_dict(spaces.state_dict())
    assert other.is_free == spaces.is_free
    assert {name: basis.shape for name, basis in other.bases.items()} == {
        name: basis.shape for name, basis in spaces.bases.items()
    }
    assert torch.equal(used(other), used(spaces))
    assert other.num_bytes() == spaces.num_bytes() > 0


def test_an_energy_out_of_range_is_an_error():
    with pytest.raises(ValueError, match=r"energy is 1\.5"):
        DualSpaces().grow(diagonal(1, 0), 1.5)
