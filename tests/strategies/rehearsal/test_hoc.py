import math
from functools import partial

import pytest
import torch
from support.baselines import finetuning
from support.fakes import normal
from support.runs import assert_same_run, plain_net, run, sgd
from torch.nn import functional as F

from cl_lightning.models import SimplexHead
from cl_lightning.strategies.rehearsal.cl2r import CL2R
from cl_lightning.strategies.rehearsal.hoc import HOC, higher_order_compatibility
from cl_lightning.testing import Subject, small

head = partial(SimplexHead, size=12)
SUBJECTS = {
    "HOC": Subject(
        small(HOC, head=head, memory_per_class=4),
        first_task_is_finetuning=False,
        reason="the cross-entropy is over all corners of the simplex",
    )
}
SMALL = partial(HOC, backbone=plain_net, optimizer=sgd, head=head, memory_per_class=5)


def test_the_loss_on_three_samples_worked_out_by_hand():
    old = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, -3.0]], dtype=torch.float64)
    new = torch.tensor([[0.0, 1.0], [5.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    labels = torch.tensor([4, 4, 7])
    # mu <b_i, a_j> with mu = 2: rows (0, 2, 0), (2, 0, -2), (-2, 0, 2)
    rows = [
        -0.0 + math.log(1 + 1 + math.exp(0)),  # sample 0: pairs of its class count as exp(0)
        -0.0 + math.log(1 + 1 + math.exp(-2)),
        -2.0 + math.log(math.exp(-2) + math.exp(0) + 1),
    ]
    loss = higher_order_compatibility(new, old, labels, 2.0)
    assert float(loss) == pytest.approx(sum(rows) / 3)


def test_the_loss_does_not_depend_on_norms_and_has_no_gradient_in_the_old_features():
    new, old, labels = normal(6, 4, requires_grad=True), normal(6, 4, seed=1, requires_grad=True), torch.arange(6) % 3
    loss = higher_order_compatibility(new, old, labels, 10.0)
    scales = normal(6, 1, seed=2).abs() + 0.1
    torch.testing.assert_close(higher_order_compatibility(scales * new, old / scales, labels, 10.0), loss)
    assert torch.autograd.grad(loss, old, allow_unused=True, retain_graph=True)[0] is None
    (gradient,) = torch.autograd.grad(loss, new)
    torch.testing.assert_close((gradient * new).sum(1), torch.zeros(6, dtype=torch.float64))  # along the sphere


def test_with_as_many_classes_as_samples_it_is_the_contrastive_loss_with_one_extra_term():
    new, old = normal(5, 4), normal(5, 4, seed=1)
    s = 10 * F.normalize(old, dim=1) @ F.normalize(new, dim=1).T
    others = s.masked_fill(torch.eye(5, dtype=torch.bool), 0.0)
    expected = (-s.diagonal() + others.exp().sum(1).log()).mean()
    torch.testing.assert_close(higher_order_compatibility(new, old, torch.arange(5), 10.0), expected)


class Notes(HOC):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.noted = []

    def losses(self, batch, output):
        terms = super().losses(batch, output)
        features = output.features @ self.head.projection.weight.T
        ce = F.cross_entropy(features @ self.head.targets.T, batch.labels)
        has = "compatibility" in terms
        torch.testing.assert_close(terms["ce"], (0.3 if has else 1.0) * ce)
        if has:
            before = self.teacher.network
            old = before.backbone(batch.images) @ before.head.projection.weight.T
            expected = 0.7 * higher_order_compatibility(features, old, batch.labels, 5.0)
            torch.testing.assert_close(terms["compatibility"], expected)
        self.noted.append((self.task.index, has, bool(batch.parts)))
        return terms


@pytest.mark.parametrize("align_first", [False, True])
def test_the_terms_of_each_step(align_first):
    made = run(
        Notes(
            backbone=plain_net,
            optimizer=sgd,
            head=head,
            memory_per_class=5,
            compatibility_weight=0.7,
            scale=5.0,
            align_first=align_first,
        ),
        max_epochs=1,
        options={"stop_after_task": 1},
    )
    assert {(0, align_first, False), (1, True, True)} == set(made.strategy.noted)


def test_without_compatibility_it_is_replay_as_in_cl2r_without_alignment():
    options = {"backbone": plain_net, "optimizer": sgd, "head": head, "memory_per_class": 5}
    ours = run(HOC(compatibility_weight=0.0, **options), max_epochs=1)
    other = run(CL2R(alignment_weight=0.0, **options), max_epochs=1)
    assert_same_run(ours, other)


def test_it_forgets_less_than_finetuning():
    options = {"data": {"batch_size": 32}, "max_epochs": 3}
    common = {"backbone": plain_net, "optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9)}
    plain = finetuning(common, **options).R_ci[2].mean()
    ours = run(HOC(**common, head=head, memory_per_class=20), **options).matrix.R_ci[2].mean()
    # Measured: .68 against .30.
    assert ours > plain + 0.2, (ours, plain)


def test_options_out_of_range_are_errors():
    with pytest.raises(ValueError, match="HOC: compatibility_weight is 2"):
        HOC(compatibility_weight=2.0)
    with pytest.raises(ValueError, match="HOC: scale is 0"):
        HOC(scale=0)
