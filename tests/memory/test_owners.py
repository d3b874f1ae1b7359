import pytest
import torch
from support.fakes import normal
from torch import nn

from cl_lightning.memory import FREE, Held, Owners, PastMasks


def test_a_task_frees_the_smallest_of_its_own_weights_in_each_tensor():
    weights = {"a.b": torch.tensor([[0.5, -0.1, 3.0, -2.0], [0.2, 0.0, -4.0, 1.0]]), "c": torch.arange(1.0, 6.0)[None]}
    owners = Owners()
    owners.claim(weights, 0)
    owners.prune(weights, 0, 0.5)
    assert owners.owner["a.b"].tolist() == [[FREE, FREE, 0, 0], [FREE, FREE, 0, 0]]
    assert weights["a.b"].tolist() == [[0, 0, 3, -2], [0, 0, -4, 1]]
    assert owners.owner["c"].tolist() == [[FREE, FREE, 0, 0, 0]]  # round(2.5) = 2
    owners.claim(weights, 1)
    weights["a.b"][0, 0], weights["a.b"][1, 1], weights["a.b"][0, 1] = 0.01, -0.02, 0.03  # all smaller than task 0's
    owners.prune(weights, 1, 0.5)
    assert owners.owner["a.b"].tolist() == [[FREE, 1, 0, 0], [FREE, 1, 0, 0]]
    torch.testing.assert_close(weights["a.b"], torch.tensor([[0, 0.03, 3, -2], [0, -0.02, -4, 1]]))
    assert owners.used_by(0)["a.b"].tolist() == [[False, False, True, True]] * 2
    assert owners.used_by(1)["a.b"].tolist() == [[False, True, True, True]] * 2
    assert owners.owned_by(1)["a.b"].tolist() == [[False, True, False, False]] * 2


def test_each_task_owns_a_smaller_share():
    weights, owners, share = {"w": normal(25, 40)}, Owners(), 0.6
    for task in range(4):
        owners.claim(weights, task)
        free = owners.owned_by(task)["w"]
        weights["w"][free] = normal(25, 40, seed=task + 1)[free]
        owners.prune(weights, task, share)
    counts = [int((owners.owner["w"] == task).sum()) for task in range(4)]
    assert counts == [400, 240, 144, 86]  # (1 - p) p^k of 1,000, rounded in each task
    assert int((owners.owner["w"] == FREE).sum()) == 1000 - sum(counts)


def test_ties_free_the_number_that_is_asked_for():
    weights, owners = {"w": torch.ones(3, 4)}, Owners()
    owners.claim(weights, 0)
    owners.prune(weights, 0, 0.25)
    assert int((weights["w"] == 0).sum()) == 3
    with pytest.raises(ValueError, match=r"Owners: share is 1.5; it must be in \[0, 1\]"):
        owners.prune(weights, 0, 1.5)


def test_there_are_no_more_tasks_than_owners():
    owners = Owners()
    owners.claim({"w": torch.ones(1, 2)}, 254)
    assert owners.used_by(254)["w"].all()
    with pytest.raises(ValueError, match="task 255; there are owners for 255 tasks"):
        owners.claim({"w": torch.ones(1, 2)}, 255)


def test_owners_are_restored_with_their_shapes(tmp_path):
    weights, owners = {"layer.weight": normal(3, 4)}, Owners()
    owners.claim(weights, 0)
    owners.prune(weights, 0, 0.5)
    torch.save(owners.state_dict(), tmp_path / "state.pt")
    other = Owners()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other.owner["layer.weight"], owners.owner["layer.weight"])
    assert owners.num_bytes() == 3 * 4 + 8


def test_held_weights_do_not_move_with_any_optimizer():
    weight, free = nn.Parameter(normal(3, 4)), nn.Parameter(normal(2))
    trained = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    start = weight.detach().clone()
    optimizer = torch.optim.Adam([weight, free], lr=0.1, weight_decay=0.5)
    (weight.square().sum() + free.sum()).backward()
    optimizer.step()  # moments that were there before
    with torch.no_grad():
        weight.copy_(start)
    held = Held({"w": weight, "free": free}, {"w": trained})
    for _ in range(3):
        optimizer.zero_grad()
        (weight.square().sum() + free.sum()).backward()
        held.mask_gradients()
        assert weight.grad[~trained].eq(0).all()
        assert weight.grad[trained].ne(0).all()
        optimizer.step()
        held.restore()
    assert torch.equal(weight[~trained], start[~trained])
    assert (weight[trained] != start[trained]).all()


def test_past_masks_are_the_largest_of_all_tasks():
    past = PastMasks([2, 3])
    assert [mask.tolist() for mask in past.masks()] == [[0, 0], [0, 0, 0]]
    past.merge([torch.tensor([0.5, 1.0]), torch.tensor([0.0, 0.25, 1.0])])
    past.merge([torch.tensor([0.75, 0.0]), torch.tensor([0.0, 0.5, 0.0])])
    assert [mask.tolist() for mask in past.masks()] == [[0.75, 1], [0, 0.5, 1]]
    assert past.num_bytes() == 5 * 4
