import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support.fakes import normal
from support.sensitivity import batch, batches, network
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import Batch, Draw
from cl_lightning.memory import Consolidation, Importance, fisher_diagonal, output_norm
from cl_lightning.models import MLP, LinearHead, Network


def quadratic(theta: dict[str, Tensor], anchor: dict[str, Tensor], omega: dict[str, Tensor]) -> Tensor:
    return sum((omega[name] * (theta[name] - anchor[name]).square()).sum() for name in omega)


def three_terms() -> tuple[dict[str, Tensor], list[tuple[dict[str, Tensor], dict[str, Tensor]]]]:
    shapes = {"conv.weight": (3, 2), "head.0.bias": (4,)}
    theta = {name: normal(*shape, seed=9).requires_grad_() for name, shape in shapes.items()}
    terms = []
    for k in range(3):
        anchor = {name: normal(*shape, seed=k) for name, shape in shapes.items()}
        omega = {name: normal(*shape, seed=10 + k).square() for name, shape in shapes.items()}
        omega["conv.weight"][0] = 0  # weights that never matter
        terms.append((anchor, omega))
    return theta, terms


# --- the penalty -----------------------------------------------------------------------------------------------------


def test_one_quadratic_is_exactly_the_sum_of_one_per_task():
    theta, terms = three_terms()
    importance = Importance()
    for anchor, omega in terms:
        importance.add(anchor, omega)
    expected = sum(quadratic(theta, *term) for term in terms)
    value = importance.penalty(theta)
    torch.testing.assert_close(value, expected, rtol=1e-14, atol=0)
    for ours, plain in zip(
        torch.autograd.grad(3 * value, list(theta.values())),
        torch.autograd.grad(3 * expected, list(theta.values())),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-13, atol=1e-13)
    one = Importance()
    one.add(*terms[0])
    assert importance.num_bytes() - importance.offset.nbytes == one.num_bytes() - one.offset.nbytes == 2 * 10 * 8


def test_the_analytic_gradient_is_that_of_the_backward_pass():
    theta, terms = three_terms()
    importance = Importance()
    importance.add(*terms[0])
    importance.penalty(theta).backward()
    for name, gradient in importance.gradient(theta).items():
        torch.testing.assert_close(gradient, theta[name].grad)


def test_online_ewc_decays_the_past_and_moves_the_anchor():
    theta, ((first, f), (second, g), _) = three_terms()
    importance = Importance()
    importance.add(first, f)
    importance.add(second, g)
    importance.merge(first, f, 0.5)
    expected = {name: 0.5 * (f[name] + g[name]) + f[name] for name in f}
    torch.testing.assert_close(importance.omegas, expected)
    torch.testing.assert_close(importance.penalty(theta), quadratic(theta, first, expected))
    torch.testing.assert_close(importance.anchors, first)
    assert importance.penalty(first).item() == 0  # nothing is left of the constant either
    importance.merge(second, g)  # by default the past does not decay
    torch.testing.assert_close(importance.omegas, {name: expected[name] + g[name] for name in f})


def test_merging_keeps_old_names_and_takes_in_new_ones():
    importance = Importance()
    importance.merge({"a": torch.zeros(2)}, {"a": torch.ones(2)})
    importance.merge({"a": torch.ones(2), "b": torch.ones(1)}, {"b": torch.ones(1)}, decay=0.5)
    torch.testing.assert_close(importance.omegas, {"a": torch.full((2,), 0.5), "b": torch.ones(1)})
    torch.testing.assert_close(importance.anchors, {"a": torch.ones(2), "b": torch.ones(1)})


def test_averaging_starts_from_nothing_as_facil_does():
    _, ((anchor, f), (_, g), _) = three_terms()
    importance = Importance()
    importance.average(anchor, f, alpha=0.25)
    importance.average(anchor, g, alpha=0.25)
    torch.testing.assert_close(importance.omegas, {n: 0.25 * 0.75 * f[n] + 0.75 * g[n] for n in f})
    half = Importance()
    half.average(anchor, f)
    torch.testing.assert_close(half.omegas, {n: 0.5 * f[n] for n in f})


def test_l2_is_ewc_with_equal_importances_and_keeps_one_number_for_them():
    theta, ((anchor, _), (second, g), _) = three_terms()
    importance = Importance()
    importance.anchor_at(second)
    importance.anchor_at(anchor, omega=0.5)
    ones = {name: torch.full_like(value, 0.5) for name, value in anchor.items()}
    value = importance.penalty(theta)
    torch.testing.assert_close(value, quadratic(theta, anchor, ones))
    value.backward()
    torch.testing.assert_close(theta["conv.weight"].grad, theta["conv.weight"] - anchor["conv.weight"])
    assert importance.omegas["conv.weight"].shape == ()
    importance.add(second, g)
    torch.testing.assert_close(importance.penalty(theta), quadratic(theta, anchor, ones) + quadratic(theta, second, g))


def test_an_empty_store_has_no_penalty_and_new_blocks_have_none_either():
    importance = Importance()
    head = {"head.0.weight": torch.ones(2, requires_grad=True)}
    assert not importance
    assert importance.penalty(head).item() == 0
    assert importance.gradient(head) == {}
    importance.merge(head, {"head.0.weight": torch.ones(2)})
    grown = {**head, "head.1.weight": torch.ones(3, requires_grad=True)}
    importance.penalty(grown).backward()
    assert grown["head.1.weight"].grad is None
    assert torch.equal(head["head.0.weight"].grad, torch.zeros(2))


def test_a_wrong_prefix_and_a_layer_that_grew_in_place_are_errors():
    importance = Importance()
    importance.merge({"head.weight": torch.ones(1, 2)}, {"head.weight": torch.ones(1, 2)})
    with pytest.raises(ValueError, match=r"head\.weight.*network\.head\.weight"):
        importance.penalty({"network.head.weight": torch.ones(1, 2)})
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(1, 2\)"):
        importance.penalty({"head.weight": torch.ones(3, 2)})


def test_a_fresh_store_takes_names_shapes_and_types_from_the_state_dict(tmp_path: Path):
    theta, terms = three_terms()
    owner = nn.ModuleDict({"importance": Importance()})
    for term in terms:
        owner["importance"].add(*term)
    torch.save(owner.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = Importance()
    other.merge({"conv.weight": torch.ones(7), "gone": torch.ones(1)}, {"conv.weight": torch.ones(7)})
    for fresh in (Importance(), other):
        nn.ModuleDict({"importance": fresh}).load_state_dict(state, strict=True)
        assert fresh.penalty(theta).item() == owner["importance"].penalty(theta).item()
        torch.testing.assert_close(fresh.anchors, owner["importance"].anchors, rtol=0, atol=0)


def test_loading_an_empty_store_empties_and_a_state_without_one_changes_nothing():
    importance = Importance()
    importance.merge({"a": torch.ones(2)}, {"a": torch.ones(2)})
    importance.load_state_dict({}, strict=False)
    assert importance
    importance.load_state_dict(Importance().state_dict(), strict=True)
    assert not importance


# --- consolidation ---------------------------------------------------------------------------------------------------


def small_network() -> Network:
    torch.manual_seed(0)
    net = Network(MLP((2, 4, 4), hidden=(6,)), LinearHead(6)).double()
    net.head.grow(4)
    net.head.double()
    return net


def data_of(task: int) -> list[Batch]:
    return batches(normal(9, 2, 4, 4, seed=task), torch.arange(9) % 4)


def copied(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in parameters.items()}


def learn(net: Network, part: Consolidation, task: int) -> dict[str, Tensor]:
    """Two steps of a task; returns the work of its loss, without the penalty, on each weight."""
    parameters, images, labels = dict(net.named_parameters()), normal(9, 2, 4, 4, seed=task), torch.arange(9) % 4
    work = {name: torch.zeros_like(value) for name, value in parameters.items()}
    part.begin_task(net)
    part.begin_phase(net)
    for step in range(2):
        loss = F.cross_entropy(net(images).logits, labels)
        slopes = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
        net.zero_grad()
        (loss + part.penalty()).backward()
        part.before_step()
        with torch.no_grad():
            for k, (slope, (name, value)) in enumerate(zip(slopes, parameters.items(), strict=True)):
                move = 0.3 * normal(*value.shape, seed=100 * task + 10 * step + k)  # uphill for some
                value += move
                work[name] -= slope * move
        part.after_step()
    return work


@torch.no_grad()
def measured(net: Network, part: Consolidation, work: dict[str, Tensor], start: dict[str, Tensor], task: int) -> Any:
    """Importances of a task by what the estimators are defined with."""
    parameters = dict(net.named_parameters())
    if part.estimator == "fisher":
        return fisher_diagonal(net, parameters, data_of(task), labels="predicted")
    if part.estimator == "mas":
        return output_norm(net, parameters, data_of(task))
    if part.estimator == "l2":
        return {name: torch.ones_like(value) for name, value in parameters.items()}
    kept = {name: value.clamp(min=0) if part.path.clamp else value for name, value in work.items()}
    return {name: kept[name] / ((parameters[name] - start[name]).square() + 0.02) for name in work}


@pytest.mark.parametrize(
    ("estimator", "factor", "merge", "clamp"),
    [
        ("fisher", 0.5, "decay", True),
        ("fisher", 0.5, "average", True),
        ("mas", 0.5, "decay", True),
        ("si", 1.0, "decay", True),
        ("si", 1.0, "decay", False),
        ("l2", 1.0, "decay", True),
    ],
)
def test_the_penalty_is_weight_times_factor_times_the_quadratic_of_decayed_importances(estimator, factor, merge, clamp):
    net = small_network()
    part = Consolidation(estimator, 3.0, merge=merge, decay=0.3, labels="predicted", xi=0.02, clamp=clamp)
    keep, take = (0.0, 1.0) if estimator == "l2" else (0.3, 0.7 if merge == "average" else 1.0)
    parameters = dict(net.named_parameters())
    omega = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for task in range(2):
        start = copied(parameters)
        work = learn(net, part, task)
        part.end_task(net, data_of(task))
        new = measured(net, part, work, start, task)
        omega = {name: keep * omega[name] + take * new[name] for name in omega}
    if estimator == "si":
        assert any((value < 0).any() for value in omega.values()) == (not clamp)
    anchor = copied(parameters)
    net.head.grow(2)  # the rows of a next task are free
    net.head.double()
    part.begin_phase(net)
    with torch.no_grad():
        for k, parameter in enumerate(net.parameters()):
            parameter += normal(*parameter.shape, seed=k)
    expected = 3.0 * factor * quadratic(parameters, anchor, omega)
    torch.testing.assert_close(part.penalty(), expected)
    every = list(net.parameters())
    ours, plain = (
        torch.autograd.grad(value, every, allow_unused=True, materialize_grads=True)
        for value in (part.penalty(), expected)
    )
    torch.testing.assert_close(ours, plain)
    assert all((gradient != 0).any() for gradient in plain[: len(parameters)])


@pytest.mark.parametrize("labels", ["exact", "sampled", "predicted", "empirical"])
def test_the_fisher_information_is_that_of_the_labels_and_classes_asked_for(labels):
    net, visible = small_network(), torch.tensor([True, True, True, False])
    data = batches(normal(9, 2, 4, 4), torch.arange(9) % 3)
    part = Consolidation("fisher", labels=labels)
    part.end_task(net, data, visible)
    found = {}
    for kind in ("exact", "sampled", "predicted", "empirical"):
        found[kind] = fisher_diagonal(net, dict(net.named_parameters()), data, labels=kind, loss_classes=visible)
    torch.testing.assert_close(part.importance.omegas, found[labels])
    for kind in found.keys() - {labels}:
        other = found[kind]["backbone.layers.1.weight"]
        assert not torch.allclose(part.importance.omegas["backbone.layers.1.weight"], other, rtol=0.01)


@pytest.mark.parametrize("estimator", ["fisher", "mas", "si", "l2"])
def test_with_weight_0_nothing_is_measured(estimator):
    def no_data():
        raise AssertionError("data was asked for")
        yield

    part = Consolidation(estimator, 0.0)
    part.begin_task(net := small_network())
    part.end_task(net, no_data())
    assert not part.importance


# --- two processes ---------------------------------------------------------------------------------------------------


def _on_two_processes(rank: int, folder: str) -> None:
    # torch.func loads it lazily; loaded while a process group is up it keeps that alive, with threads that can abort
    # the process at its end.
    importlib.import_module("torch._dynamo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    net, images = network(), normal(7, 2, 4, 4)
    labels = torch.tensor([0, 1, -1, 3, 3, 1, 0])
    parameters = dict(net.named_parameters())
    share = slice(0, 5) if rank == 0 else slice(5, 7)
    draw = Draw(1, share.start, share.stop, 7)
    ours = [batch(images[share], labels[share]).replace(draw=draw)]
    results = [
        *(fisher_diagonal(net, parameters, ours, labels=kind) for kind in ("exact", "sampled", "empirical")),
        output_norm(net, parameters, ours),
    ]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_give_what_one_gives(tmp_path: Path):
    mp.spawn(_on_two_processes, (str(tmp_path),), nprocs=2)
    net, images = network(), normal(7, 2, 4, 4)
    parameters = dict(net.named_parameters())
    whole = [batch(images, torch.tensor([0, 1, -1, 3, 3, 1, 0])).replace(draw=Draw(1, 0, 7, 7))]
    expected = [
        *(fisher_diagonal(net, parameters, whole, labels=kind) for kind in ("exact", "sampled", "empirical")),
        output_norm(net, parameters, whole),
    ]
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt", weights_only=True), expected)
