"""Differentiable ensembles with nearest-neighbour routing."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from support.baselines import finetuning
from support.fakes import batch_of, normal
from support.runs import run
from torch.nn import functional as F

from cl_lightning.models import MLP, Output
from cl_lightning.strategies.online.dee import DEE, DomainAgnosticMoE, GatedExpertsHead, SignDescent, soft_top_k
from cl_lightning.stream import ClassIncremental, Online, Subset
from cl_lightning.testing import Subject, small

SGD = partial(torch.optim.SGD, lr=0.01)  # signs of gradients near 0 differ between one process and two

SUBJECTS = {
    "DEE": Subject(
        small(DEE, experts=4, neighbours=2, epsilon=0.05, optimizer=SGD),
        first_task_is_finetuning=False,
        reason="the loss is another and the backbone is frozen",
    ),
    "DomainAgnosticMoE": Subject(
        small(DomainAgnosticMoE, experts=4, neighbours=2, epsilon=0.05, key_lr=0.01, optimizer=SGD),
        first_task_is_finetuning=False,
        reason="the loss is another and the backbone is frozen",
    ),
}
PUBLISHED = {
    "dee_mnist": {
        "source": "mateusz-wojcik-97/neural-architecture-for-online-ensemble-cl: Split-MNIST, 128 experts of which 16",
        "backbone": "MLP(hidden=[])",
        "experts": 128,
        "neighbours": 16,
        "tau": 250.0,
        "epsilon": 0.0005,
        "optimizer": "SignDescent(growth=0.0001, lr=0.0001)",
        "data.scenario": "Online(base=ClassIncremental(tasks=10), batch_size=60)",
        "data.batch_size": 60,
        "trainer.max_epochs": 1,
    },
}

WIDTH, EXPERTS, NEAR, CLASSES = 5, 7, 3, 4
pixels = partial(MLP, hidden=())  # feature vectors as they are


def head_of(*, classes=CLASSES, **options):
    torch.manual_seed(0)
    head = GatedExpertsHead(WIDTH, **{"experts": EXPERTS, "neighbours": NEAR, "epsilon": 0.05, **options})
    head.grow(classes)
    return head.double()


def close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=tolerance, atol=tolerance)


def sinkhorn(cost, rows, columns, epsilon, steps=20_000):
    """The plan of an entropic optimal transport, by the plain iteration."""
    kernel = np.exp(-cost / epsilon)
    v = np.ones(len(columns))
    for _ in range(steps):
        u = rows / (kernel @ v)
        v = columns / (kernel.T @ u)
    return u[:, None] * kernel * v


def test_the_gates_are_the_plan_of_the_transport():
    head, features = head_of(threshold=0.0), normal(4, WIDTH)
    gates, cosines = head.gates(features)
    for row, (h, found) in enumerate(zip(features.numpy(), gates.detach().numpy(), strict=True)):
        keys = head.keys.numpy()
        cosine = keys @ h / np.linalg.norm(h) / np.linalg.norm(keys, axis=1)
        close(cosines[row], cosine)
        cost = np.stack([(1 - cosine) ** 2, cosine**2], axis=1)
        plan = sinkhorn(
            cost / cost.max(), np.full(EXPERTS, 1 / EXPERTS), np.array([NEAR, EXPERTS - NEAR]) / EXPERTS, 0.05
        )
        np.testing.assert_allclose(found, EXPERTS * plan[:, 0], atol=1e-9)
    close(gates.sum(dim=1), torch.full((4,), float(NEAR)).double(), 1e-9)


def test_gates_below_the_threshold_are_0_and_the_others_as_before():
    features = normal(20, WIDTH)
    whole, cut = head_of(threshold=0.0).gates(features)[0], head_of(threshold=0.3).gates(features)[0]
    assert (cut == 0).any()
    assert torch.equal(cut, torch.where(whole >= 0.3, whole, 0.0))


def test_towards_epsilon_0_the_routing_is_the_nearest_keys():
    features = normal(20, WIDTH)
    gates, cosines = head_of(epsilon=1e-6).gates(features)
    nearest = torch.zeros(20, EXPERTS).double().scatter(1, cosines.topk(NEAR, dim=1).indices, 1.0)
    close(gates, nearest, 1e-6)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_the_gradient_of_the_smooth_choice_is_that_of_its_equation(k):
    values, temperature = normal(2, 7, requires_grad=True), torch.tensor([[0.7], [0.2]]).double()
    chosen = soft_top_k(values, k, temperature)
    close(chosen.sum(dim=1), torch.full((2,), float(k)).double())
    assert torch.equal(chosen.argsort(dim=1), values.argsort(dim=1))
    torch.autograd.gradcheck(lambda v: soft_top_k(v, k, temperature), values, atol=1e-7)
    close(soft_top_k(values + 3.0, k, temperature), chosen, 1e-10)  # a common shift changes nothing
    close(soft_top_k(torch.zeros(1, 7).double(), k, temperature[:1]), torch.full((1, 7), k / 7, dtype=torch.float64))
    far = soft_top_k(torch.tensor([[9.0, 5.0, 1.0, -3.0]]).double(), 2, torch.tensor([[1e-3]]).double())
    close(far, torch.tensor([[1.0, 1.0, 0.0, 0.0]]).double())


def test_the_output_is_the_weighted_mean_of_bounded_experts():
    head, features = head_of(tau=1.5), 3 * normal(6, WIDTH, seed=2)
    head.blocks[0].bias.data = normal(CLASSES, EXPERTS, seed=4)
    gates, cosines = (part.detach().numpy() for part in head.gates(features))
    found, weight, bias = head(features), head.weight().detach().numpy(), head.blocks[0].bias.detach().numpy()
    for b in range(6):
        for c in range(CLASSES):
            above = below = 0.0
            for i in range(EXPERTS):
                f = 1.5 * math.tanh((weight[c, i] @ features[b].numpy() + bias[c, i]) / 1.5)
                above += gates[b, i] ** 2 * cosines[b, i] * f
                below += gates[b, i] * cosines[b, i]
            assert float(found[b, c]) == pytest.approx(above / below, rel=1e-10)
    assert torch.equal(head.classify(features), found)


def test_with_all_experts_and_equal_keys_it_is_the_plain_mean():
    head, features = head_of(neighbours=EXPERTS, tau=1e9), normal(6, WIDTH)
    head.keys.copy_(torch.ones(EXPERTS, WIDTH))
    expected = F.linear(features, head.weight().mean(dim=1), head.blocks[0].bias.mean(dim=1))
    close(head(features), expected, 1e-9)


def test_initial_weights_are_truncated_normal_of_variance_1_by_d():
    torch.manual_seed(0)
    weights = GatedExpertsHead(100, experts=50, neighbours=5).new_block(20).weight
    assert float(weights.std()) == pytest.approx(0.1, rel=0.02)
    assert float(weights.abs().max()) < 0.2275  # 2 / 0.8796 of it
    close(F.normalize(head_of().keys, dim=1), head_of().keys, 1e-6)


def stepped(strategy, features, labels):
    output = Output(features, strategy.network.head(features))
    return strategy.losses(batch_of(labels), output)


def strategy_with(cls=DEE, **options):
    torch.manual_seed(0)
    strategy = cls(backbone=pixels, experts=EXPERTS, neighbours=NEAR, epsilon=0.05, **options)
    strategy.build((1, 1, WIDTH))
    strategy.network.head.grow(CLASSES)
    return strategy.double()


def test_the_loss_is_the_output_of_the_true_class_and_the_distance_of_the_keys():
    features, labels = normal(6, WIDTH), torch.tensor([0, 3, -1, 2, 2, 1])
    plain, moving = strategy_with(), strategy_with(DomainAgnosticMoE)
    output = plain.network.head(features)
    kept = labels >= 0
    own = output[kept, labels[kept]].mean()
    found = stepped(plain, features, labels)
    assert found.keys() == {"ensemble"}
    close(found["ensemble"], -own)
    found = stepped(moving, features, labels)
    gates, cosines = moving.network.head.gates(features)
    close(found["ensemble"], -own)
    close(found["keys"], ((1 - cosines) * gates).sum(dim=1)[kept].mean())
    assert torch.autograd.grad(sum(found.values()), moving.network.head.keys)[0].abs().sum() > 0
    assert stepped(plain, features[:0], labels[:0])["ensemble"] == 0


def test_a_step_changes_the_chosen_experts_and_the_row_of_the_class_alone():
    strategy, features, labels = strategy_with(), normal(1, WIDTH), torch.tensor([2])
    head = strategy.network.head
    before = head.weight().detach().clone(), head.blocks[0].bias.detach().clone()
    stepped(strategy, features, labels)["ensemble"].backward()
    SignDescent(head.parameters(), lr=0.01, growth=0.5).step()
    gates, cosines = head.gates(features)
    chosen = gates[0] > 0
    assert 0 < int(chosen.sum()) < EXPERTS
    after = head.weight()
    for c in range(CLASSES):
        for i in range(EXPERTS):
            if c == 2 and chosen[i]:  # -sign of the gradient of -o: along the features, for a positive factor
                factor = torch.sign(cosines[0, i] / (gates * cosines).sum())
                expected = before[0][c, i] + 0.01 * (factor * features[0].sign() + 0.5 * before[0][c, i])
                close(after[c, i].detach(), expected.detach())
            else:
                assert torch.equal(after[c, i], before[0][c, i])
                assert head.blocks[0].bias[c, i] == before[1][c, i]


def test_keys_have_their_own_learning_rate():
    moving = strategy_with(DomainAgnosticMoE, key_lr=0.02)
    weights, keys = moving.parameter_groups(list(moving.network.head.parameters()))
    assert keys["params"] == [moving.network.head.keys]
    assert keys["lr"] == 0.02
    assert keys["growth"] == 0
    assert len(weights["params"]) == 2
    plain = strategy_with()
    assert len(plain.parameter_groups(list(plain.network.head.parameters()))) == 1


# ---------------------------------------------------------------------- behaviour

TEN = {"scenario": Online(Subset(ClassIncremental(tasks=10), per_class=60), batch_size=10)}


@pytest.mark.parametrize("cls", [DEE, DomainAgnosticMoE])
def test_feature_vectors_are_learnt_one_class_at_a_time_without_a_memory(cls):
    # Measured, one pass, one class a task: .81 for DEE, .82 with trained keys; of fine-tuning .19.
    make = partial(cls, backbone=pixels, experts=16, neighbours=4, optimizer=partial(SignDescent, lr=0.03))
    found = run(make(), data=TEN, max_epochs=1).matrix.measures()["average_accuracy"]
    plain = finetuning({"backbone": pixels}, data=TEN, max_epochs=1).measures()["average_accuracy"]
    assert found > plain + 0.4


def test_options_out_of_range_are_errors():
    for options, message in (
        ({"experts": 0}, "GatedExpertsHead: experts is 0"),
        ({"experts": 4, "neighbours": 5}, r"GatedExpertsHead: neighbours is 5; it must be in \[1, 4\]"),
        ({"tau": 0.0}, "GatedExpertsHead: tau is 0"),
        ({"epsilon": 0.0}, "GatedExpertsHead: epsilon is 0"),
        ({"threshold": 1.0}, "GatedExpertsHead: threshold is 1"),
        ({"key_lr": -1.0}, "DEE: key_lr is -1"),
        ({"loss_classes": "current"}, "DEE: loss_classes is 'current'"),
    ):
        with pytest.raises(ValueError, match=message):
            DEE(**options)
    with pytest.raises(ValueError, match="SignDescent: lr is -1"):
        SignDescent([torch.zeros(1)], lr=-1.0)
