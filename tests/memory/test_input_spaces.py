import pytest
import torch
from support.fakes import batch_of, normal
from torch import nn

from cl_lightning.memory import InputSpaces, input_grams, linear_maps
from cl_lightning.memory.input_spaces import rows_of
from cl_lightning.models import LinearHead, Network


def grown(*parts, energy):
    spaces = InputSpaces()
    for part in parts:
        spaces.grow({"x": part @ part.T}, energy)
    return spaces


def test_the_first_directions_are_the_leading_singular_vectors_that_hold_the_energy():
    left, _ = torch.linalg.qr(normal(6, 6))
    right, _ = torch.linalg.qr(normal(9, 6, seed=1))
    sizes = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5, 0.1], dtype=torch.float64)
    inputs = left @ torch.diag(sizes) @ right.T
    total = sizes.square().sum()  # 16, 25, 29, 30, 30.25, 30.26
    for energy, count in ((16 / total, 1), (16.001 / total, 2), (25 / total, 2), (0.97, 4), (1.0, 6)):
        basis = grown(
            inputs, energy=float(energy) - (1e-9 if energy == 25 / total or energy == 16 / total else 0)
        ).bases["x"]
        assert basis.shape == (6, count)
        overlap = (left[:, :count].T @ basis.double()).abs()
        torch.testing.assert_close(overlap, torch.eye(count, dtype=torch.float64), atol=1e-6, rtol=0)


def test_a_second_task_adds_only_what_is_missing_until_the_energy_is_held():
    first, second = normal(8, 3), normal(8, 20, seed=1)
    spaces = grown(first, energy=1.0)
    before = spaces.bases["x"].clone()
    assert before.shape == (8, 3)
    spaces.grow({"x": first @ first.T}, 0.99)
    assert torch.equal(spaces.bases["x"], before)  # the same inputs again
    spaces.grow({"x": second @ second.T}, 0.9)
    basis = spaces.bases["x"].double()
    count = basis.shape[1]
    assert 3 < count < 8
    assert torch.equal(basis[:, :3], before.double())
    torch.testing.assert_close(basis.T @ basis, torch.eye(count, dtype=torch.float64), atol=1e-6, rtol=0)

    def share(columns):
        part = basis[:, :columns]
        return float((part @ (part.T @ second)).square().sum() / second.square().sum())

    assert share(count) >= 0.9 - 1e-6
    assert share(count - 1) < 0.9


def test_a_basis_never_has_more_directions_than_there_are():
    spaces = grown(normal(5, 50), normal(5, 50, seed=1), energy=1.0)
    assert spaces.bases["x"].shape == (5, 5)


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))
        self.second = nn.Linear(3 * 3 * 4, 5)

    def forward(self, images):
        return self.second(self.first(images).relu().flatten(1))


def test_projected_steps_leave_the_outputs_for_earlier_inputs_and_change_others():
    network = Network(Conv(), LinearHead(5)).double()
    network.head.grow(2)
    network.head.double()
    old, new = normal(4, 2, 5, 6), normal(4, 2, 5, 6, seed=1)
    layers = {name: network.backbone.get_submodule(name) for name in ("first", "second")}
    grams = input_grams(network, {**layers, "head": network.head}, [batch_of(torch.zeros(4).long(), images=old)])
    assert grams["head"].shape == (5, 5)
    spaces = InputSpaces()
    spaces.grow(grams, 1.0)
    assert spaces.bases["second"].shape == (36, 4)
    before_old, before_new = network(old).logits, network(new).logits
    # Only the second layer has directions left: 4 inputs of 36 are known.
    weight = network.backbone.second.weight
    gradient = normal(*weight.shape, seed=3)
    spaces.project([("second", gradient), ("unknown", normal(2, 2))])
    with torch.no_grad():
        weight -= gradient
    torch.testing.assert_close(network(old).logits, before_old, atol=1e-5, rtol=0)
    assert (network(new).logits - before_new).abs().max() > 0.1


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        nn.Conv2d(2, 3, (5, 3), padding="same", dilation=(1, 2)),
        nn.Conv2d(2, 3, 3, padding="valid"),
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"),
    ],
    ids=["numbers", "same", "valid", "reflect"],
)
def test_a_convolution_is_a_linear_map_of_its_patches(layer):
    layer, images = layer.double(), normal(2, 2, 7, 6)
    rows = rows_of(layer, images)
    mapped = rows @ layer.weight.flatten(1).T + layer.bias
    expected = layer(images).flatten(2).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(mapped, expected)


def test_grams_are_sums_over_batches_and_hooks_are_removed():
    network = Network(Conv(), LinearHead(5)).double()
    network.head.grow(2)
    network.head.double()
    images = normal(6, 2, 5, 6)
    layers = linear_maps(network.backbone, "it")
    assert list(layers) == ["first", "second"]
    parts = [
        batch_of(torch.zeros(n).long(), images=part) for n, part in ((4, images[:4]), (2, images[4:]), (0, images[:0]))
    ]
    grams = input_grams(network, layers, parts)
    rows = network.backbone.first(images).relu().flatten(1)
    torch.testing.assert_close(grams["second"], (rows.T @ rows).detach())
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_groups_are_refused_and_state_is_restored(tmp_path):
    with pytest.raises(ValueError, match="it: convolution '0' has 2 groups; use a backbone without groups"):
        linear_maps(nn.Sequential(nn.Conv2d(2, 2, 1, groups=2)), "it")
    spaces = grown(normal(6, 2), energy=1.0)
    torch.save(spaces.state_dict(), tmp_path / "state.pt")
    other = InputSpaces()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other.bases["x"], spaces.bases["x"])
    with pytest.raises(ValueError, match=r"energy is 1\.2"):
        spaces.grow({}, 1.2)


def test_old_and_new_directions_compete_for_the_basis_of_a_task():
    """Squares along the axes: 9, 4, 1 in the first task; 1/4, 16, 0, 4, 1 in the second, of 21.25 in all."""
    spaces = InputSpaces()
    first, second = (torch.diag(torch.tensor(x).double().sqrt()) for x in ([9, 4, 1, 0, 0], [0.25, 16, 0, 4, 1]))
    spaces.grow({"x": first @ first.T}, 1.0, task=0)
    spaces.grow({"x": second @ second.T}, 0.95, task=1)  # 20.19: axes 1 and 3 have 20, with axis 4 it is 21
    axes = [spaces.of(task)["x"].abs().argmax(dim=0).tolist() for task in (0, 1)]
    assert axes == [[0, 1, 2], [1, 3, 4]]
    assert spaces.bases["x"].abs().argmax(dim=0).tolist() == [0, 1, 2, 3, 4]
    assert spaces.of(2) == {}
    gpm = InputSpaces()
    gpm.grow({"x": first @ first.T}, 1.0)
    gpm.grow({"x": second @ second.T}, 0.95)  # the old axes have 16.25, with axis 3 it is 20.25
    assert gpm.bases["x"].abs().argmax(dim=0).tolist() == [0, 1, 2, 3]
    assert gpm.of(0) == gpm.of(1) == {}
    restored = InputSpaces()
    restored.load_state_dict(spaces.state_dict())
    assert torch.equal(restored.of(1)["x"], spaces.of(1)["x"])
    assert spaces.num_bytes() == 4 * 25 + 8 * (3 + 3) + 8  # a task has indices


@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
def test_the_basis_of_a_task_is_the_smallest_part_of_the_joint_one_that_holds_the_energy(energy):
    spaces, parts = InputSpaces(), [normal(7, n, seed=n) for n in (3, 4, 20)]
    for task, part in enumerate(parts):
        spaces.grow({"x": part @ part.T}, energy, task=task)
        own, joint = (found["x"].double() for found in (spaces.of(task), spaces.bases))
        assert all((joint.T @ column).abs().max() > 1 - 1e-6 for column in own.T)
        torch.testing.assert_close(joint.T @ joint, torch.eye(joint.shape[1]).double(), rtol=0, atol=1e-6)
        held = (own.T @ part).square().sum(dim=1).cumsum(0) / part.square().sum()
        assert held[-1] >= energy - 1e-6
        assert (held[:-1] < energy).all()
        unused = (joint.T @ part).square().sum(dim=1) / part.square().sum()
        assert sorted(unused.tolist(), reverse=True)[: own.shape[1]] == pytest.approx(
            [float(held[0]), *held.diff().tolist()], abs=1e-6
        )
