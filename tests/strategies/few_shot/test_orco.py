"""Reserved targets, orthogonality and contrast."""

import itertools
import math
from functools import partial

import pytest
import torch
from support.fakes import normal
from support.few_shot import OPTIONS, sessions
from support.runs import assert_same, loop, plain_net
from torch.nn import functional as F

from cl_lightning.batch import Draw
from cl_lightning.loop.results import measures
from cl_lightning.models import simplex
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.few_shot.orco import OrCo, ReservedTargetHead, assignment, spread, spread_targets
from cl_lightning.strategy import Phase, PhaseOptions
from cl_lightning.testing import Subject, small

SHORT = {"embedding_size": 12, "hidden_size": 16, "target_steps": 50}
SUBJECTS = {
    "OrCo": Subject(
        small(
            OrCo,
            num_targets=12,
            align_options=PhaseOptions(epochs=1),
            session_options=PhaseOptions(epochs=2),
            memory_size=20,
            **SHORT,
        ),
        first_task_is_finetuning=False,
        reason="contrastive losses, and fixed targets",
    ),
}


SMALL = partial(
    OrCo,
    num_targets=10,
    embedding_size=16,
    hidden_size=64,
    target_steps=200,
    base_weight=0.6,
    align_options=PhaseOptions(epochs=3),
    session_options=PhaseOptions(epochs=40, optimizer=partial(torch.optim.SGD, lr=0.2, momentum=0.9)),
    **OPTIONS,
)


def test_spreading_is_bounded_by_the_simplex_and_targets_attain_it():
    for count, size in ((5, 4), (7, 9)):
        bound = math.log(math.e + (count - 1) * math.exp(-1 / (count - 1)))
        assert float(spread(simplex(count))) == pytest.approx(bound, abs=1e-12)
        made = spread_targets(count, size, steps=1000)
        torch.testing.assert_close(made.norm(dim=1), torch.ones(count).double())
        assert float(spread(made)) == pytest.approx(bound, abs=1e-6)
    assert float(spread(torch.eye(5).double())) == pytest.approx(math.log(math.e + 4))
    assert float(spread(spread_targets(9, 3, steps=300))) >= math.log(math.e + 8 * math.exp(-1 / 8))


def test_a_step_of_the_targets_is_one_along_the_gradient():
    start = spread_targets(6, 4, steps=0, key=3).requires_grad_()
    v = [start[i] for i in range(6)]
    total = sum(torch.log(sum(torch.exp(v[i] @ v[j]) for j in range(6))) for i in range(6)) / 6
    torch.testing.assert_close(spread(start), total)
    (gradient,) = torch.autograd.grad(total, start)
    torch.testing.assert_close(spread_targets(6, 4, steps=1, key=3), F.normalize(start.detach() - gradient, dim=1))


def test_the_assignment_has_the_largest_sum_of_cosines():
    means, targets = 3 * normal(3, 4), F.normalize(normal(5, 4, seed=3), dim=1)
    cosines = F.cosine_similarity(means[:, None], targets[None], dim=2)
    best = max(itertools.permutations(range(5), 3), key=lambda p: float(sum(cosines[i, p[i]] for i in range(3))))
    assert tuple(assignment(means, targets).tolist()) == best
    assert cosines.argmax(1).tolist() != list(best)  # some classes prefer the same target


def test_assigned_targets_never_move_and_free_ones_follow():
    head = ReservedTargetHead(6, size=7, dimensions=5, hidden=4, steps=20)
    pool = {row.numpy().tobytes() for row in head.targets}
    head.grow(3)
    assert head.waits
    means = normal(3, 5).float()
    chosen = head.targets[assignment(means, head.targets)].clone()
    head.assign(means)
    assert not head.waits
    assert torch.equal(head.weight(), chosen)
    head.grow(2)
    head.assign(normal(2, 5, seed=1).float())
    assert torch.equal(head.weight()[:3], chosen)
    assert torch.equal(head.weight(), head.targets[:5])
    assert torch.equal(head.free, head.targets[5:])
    assert {row.numpy().tobytes() for row in head.targets} == pool
    other = ReservedTargetHead(6, size=7, dimensions=5, hidden=4, steps=20)
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.free, head.free)
    features = normal(4, 6).float()
    expected = F.cosine_similarity(head.projection(features)[:, None], head.weight()[None], dim=2)
    torch.testing.assert_close(head(features), expected)


def supcon(rows, labels, temperature):
    """A plain loop."""
    n, losses = len(rows), []
    for i in range(n):
        others = [j for j in range(n) if j != i]
        whole = sum(math.exp(float(rows[i] @ rows[j]) / temperature) for j in others)
        mine = [float(rows[i] @ rows[j]) / temperature - math.log(whole) for j in others if labels[j] == labels[i]]
        if mine:
            losses.append(-sum(mine) / len(mine))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("later", [False, True])
def test_the_terms_are_the_formulas_of_plain_loops(later):
    options = {"novel_weight": 0.7, "base_weight": 0.2, "perturbation": 0.5, "temperature": 0.3}
    made = OrCo(num_targets=6, backbone=plain_net, **SHORT, **options)
    made.build((1, 8, 8))
    for count in (2, 2):
        made.head.grow(count)
        made.head.assign(normal(count, 12, seed=count).float())
    made.task_columns = torch.tensor([[True, True, False, False], [False, False, True, True]])
    if not later:
        made.task_columns = made.task_columns[:1]
    made.phase = Phase("session" if later else "align")
    h, labels = F.normalize(normal(6, 12, seed=9), dim=1), torch.tensor([2, 0, 2, 2, 0, 1])
    draw = Draw.of(3, 5)
    found = made.alignment(h, labels, draw)
    targets = made.head.targets.double()
    noise = Draw.of(4, draw.fork(0x09C1).key).rand(12).double()
    free = [F.normalize(targets[4 + i % 2] + 0.5 * (noise[i] - 0.5), dim=0) for i in range(4)]
    joint, names = [*h, *free], [*labels.tolist(), 4, 5, 4, 5]
    assert float(found["contrast"]) == pytest.approx(supcon(joint, names, 0.3), rel=1e-6)
    each = [-float((h[i] @ targets[:4].T).log_softmax(0)[labels[i]]) for i in range(6)]
    ce = 0.7 * (each[0] + each[2] + each[3]) / 3 + 0.2 * (each[1] + each[4] + each[5]) / 3 if later else sum(each) / 6
    assert float(found["ce"]) == pytest.approx(ce, rel=1e-6)
    vectors = list(targets)
    for c in (2,) if later else (0, 1, 2):
        vectors[c] = F.normalize(h[labels == c].mean(0), dim=0)
    rows = [math.log(sum(math.exp(float(a @ b)) for b in vectors)) for a in vectors]
    assert float(found["spread"]) == pytest.approx(sum(rows) / 6, rel=1e-6)


class Pretrained(OrCo):
    """Computes the terms of the first phase again."""

    checked = 0

    def losses(self, batch, output):
        terms = super().losses(batch, output)
        if self.phase.name == "pretrain" and not self.checked:
            n = len(batch) // 2
            z = F.normalize(self.contrast_projection(output.features).double(), dim=1)
            assert torch.equal(batch.labels[:n], batch.labels[n:])
            images = list(range(n)) * 2
            by_label, by_image = supcon(z, batch.labels.tolist(), 0.07), supcon(z, images, 0.07)
            assert float(terms["supervised"]) == pytest.approx(0.8 * by_label, rel=1e-4)
            assert float(terms["views"]) == pytest.approx(0.2 * by_image, rel=1e-4)
            self.checked += 1
        return terms


def test_the_first_phase_is_a_mean_of_two_contrasts():
    made = sessions(
        Pretrained(**{**OPTIONS, **SHORT}, num_targets=10, supervised_share=0.8, align_options=PhaseOptions(epochs=0)),
        until=0,
        max_epochs=1,
        limit_train_batches=1,
    )
    assert made.strategy.checked
    assert not made.strategy.head.waits  # also without a phase that does it
    assert not made.strategy.contrast_projection


class Begins(OrCo):
    """Notes the projector with which a phase begins."""

    def on_train_start(self):
        super().on_train_start()
        self.begun = {name: value.clone() for name, value in self.head.projection.state_dict().items()}
        self.first = self.head.targets.clone()


def test_a_session_trains_the_projector_of_the_base_session_again():
    made = sessions(partial(Begins, **SMALL.keywords)(session_options=PhaseOptions(epochs=2)), until=0, max_epochs=1)
    strategy = made.strategy
    base = {name: value.clone() for name, value in strategy.head.projection.state_dict().items()}
    rows = strategy.head.weight().clone()
    backbone = {name: value.clone() for name, value in strategy.network.backbone.state_dict().items()}
    for task in made.stream.tasks[1:]:
        made._run_task(task, None)
        assert_same(base, strategy.begun)
        assert any(not torch.equal(base[name], value) for name, value in strategy.head.projection.state_dict().items())
        assert torch.equal(strategy.first, strategy.head.targets)
        assert torch.equal(strategy.head.weight()[:6], rows)
        assert strategy.memory.labels.bincount().tolist() == [5] * task.num_seen
    assert_same(backbone, strategy.network.backbone.state_dict())


def test_sessions_are_learnt_while_fine_tuning_forgets_the_base():
    mine, plain = sessions(SMALL()), sessions(Finetune(**OPTIONS))
    found, other = (measures(made.matrix, made.stream, 2) for made in (mine, plain))
    # Measured: a harmonic mean of .79 against 0.
    assert found["harmonic_accuracy"] > other["harmonic_accuracy"] + 0.4, found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_targets": 1}, "num_targets is 1"),
        ({"embedding_size": 0}, "embedding_size is 0"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"target_steps": -1}, "target_steps is -1"),
        ({"perturbation": -0.1}, "perturbation is -0.1"),
        ({"novel_weight": -1.0}, "novel_weight is -1"),
        ({"base_weight": -1.0}, "base_weight is -1"),
        ({"supervised_share": 1.1}, "supervised_share is 1.1"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"loss_classes": "task"}, "loss_classes is 'task'; use 'all'"),
    ],
)
def test_options_out_of_range_are_errors(options, message):
    with pytest.raises(ValueError, match=f"OrCo: {message}"):
        OrCo(**options)


def test_too_few_targets_are_an_error():
    with pytest.raises(ValueError, match="ReservedTargetHead: size is 9; it must be at least 10"):
        loop(OrCo(num_targets=9, **SHORT, backbone=plain_net)).fit()
