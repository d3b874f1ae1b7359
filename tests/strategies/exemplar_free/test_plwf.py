import math
from functools import partial

import pytest
import torch
from support.fakes import normal
from support.runs import assert_same_run, plain_net, run, sgd

from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.exemplar_free.lwf import LwF
from cl_lightning.strategies.exemplar_free.plwf import PLwF, surgery
from cl_lightning.testing import Subject, small

SUBJECTS = {"PLwF": Subject(small(PLwF))}

PLWF = partial(PLwF, backbone=plain_net, optimizer=sgd)


def test_after_surgery_the_step_is_in_conflict_with_neither_gradient():
    for seed in range(8):
        a, b = normal(5, seed=seed), 3 * normal(5, seed=seed + 20)
        step, cosine = surgery(a + b, b), a @ b / a.norm() / b.norm()
        if cosine < 0:
            torch.testing.assert_close(step @ b, b @ b * (1 - cosine**2))
            torch.testing.assert_close(step @ a, a @ a * (1 - cosine**2))
        else:
            assert torch.equal(step, a + b)
    a, b = torch.tensor([1.0, 0.0]).double(), torch.tensor([-1.0, 2.0]).double()
    torch.testing.assert_close(surgery(a + b, b), torch.tensor([0.8 + 0.0, 0.4 + 2.0]).double())  # by hand


def test_surgery_leaves_gradients_that_are_zero_or_not_finite():
    g = normal(4)
    for part in (torch.zeros(4).double(), g, -1e-6 * g, (1 + 1e-6) * g, torch.full((4,), torch.nan).double()):
        assert torch.equal(surgery(g, part), g)


def kl(teacher, student, t):
    q, p = (teacher / t).softmax(1), (student / t).softmax(1)
    return t**2 * (q * (q / p).log()).sum(1).mean()


def test_the_loss_is_of_the_own_classes_of_each_teacher_and_of_all_old_classes():
    seen = []

    class Look(PLwF):
        def losses(self, batch, output):
            terms = super().losses(batch, output)
            own = [[0, 1, 2, 3], [4, 5, 6]][: self.task.index]
            assert len(self.teachers) == self.task.index
            if own:
                z, outputs = output.logits, [teacher(batch.images).logits for teacher in self.teachers]
                parts = [kl(y[:, columns], z[:, columns], 3.0) for y, columns in zip(outputs, own, strict=True)]
                everything = kl(outputs[-1], z[:, : outputs[-1].shape[1]], 3.0)
                torch.testing.assert_close(terms["distill"], 7 * (sum(parts) / len(parts) + 0.5 * everything))
                rows, columns = torch.arange(len(batch)), list(self.task.columns)
                places = torch.tensor([columns.index(y) for y in batch.labels.tolist()])
                torch.testing.assert_close(terms["ce"], -z[:, columns].log_softmax(1)[rows, places].mean())
            seen.append((self.task.index, set(terms)))
            return terms

    run(Look(backbone=plain_net, distill_weight=7.0, joint_weight=0.5, temperature=3.0), max_epochs=1)
    assert (0, {"ce"}) in seen
    assert (2, {"ce", "distill"}) in seen


@pytest.mark.parametrize(("batches", "per_tensor"), [(1, False), (2, False), (1, True)])
def test_gradients_of_the_backbone_are_projected_and_gradients_of_the_head_are_not(batches, per_tensor):
    conflicts = []

    class Look(PLwF):
        def losses(self, batch, output):
            terms = super().losses(batch, output)
            parameters = [*self.network.backbone.parameters(), *self.network.head.parameters()]
            for name, term in terms.items():
                found = torch.autograd.grad(
                    term, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                kept = self.kept.setdefault(name, [torch.zeros_like(part) for part in found])
                self.kept[name] = [one + part / batches for one, part in zip(kept, found, strict=True)]
            return terms

        def edit_gradients(self, batch):
            super().edit_gradients(batch)
            kept, self.kept = self.kept, {}
            if self.task.is_first:
                return
            a, b = kept["ce"], kept["distill"]
            backbone = list(self.network.backbone.parameters())
            size = len(backbone)
            flat = [torch.cat([part.flatten() for part in parts[:size]]) for parts in (a, b)]
            groups = list(zip(a[:size], b[:size], strict=True)) if per_tensor else [tuple(flat)]
            expected = []
            for one, two in ((first.flatten(), second.flatten()) for first, second in groups):
                product = one @ two
                step = one + two
                if product < 0 and two.norm() > 1e-5 * one.norm():  # shorter in the first step of a task
                    step = one - product / (two @ two) * two + two - product / (one @ one) * one
                conflicts.append(bool(product < 0))
                expected.append(step)
            found = torch.cat([parameter.grad.flatten() for parameter in backbone])
            torch.testing.assert_close(found, torch.cat(expected), rtol=1e-3, atol=1e-5)
            for parameter, one, two in zip(self.network.head.parameters(), a[size:], b[size:], strict=True):
                torch.testing.assert_close(parameter.grad, one + two)

    strategy = Look(backbone=plain_net, per_tensor=per_tensor, distill_weight=5.0)
    strategy.kept = {}
    run(strategy, max_epochs=2, accumulate_grad_batches=batches)
    assert set(conflicts) == {False, True}


def test_without_projection_and_joint_term_two_tasks_are_learning_without_forgetting():
    options = {"options": {"stop_after_task": 1}, "max_epochs": 1}
    ours = run(PLWF(project=False, joint_weight=0.0), **options)
    lwf = run(LwF(backbone=plain_net, optimizer=sgd, scale_by_temperature=True), **options)
    for mine, other in zip(ours.strategy.network.parameters(), lwf.strategy.network.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


def test_one_task_is_finetuning():
    options = {"options": {"stop_after_task": 0}}
    assert_same_run(run(PLWF(), **options), run(Finetune(backbone=plain_net, optimizer=sgd), **options))


def test_it_keeps_old_tasks_better_than_finetuning_where_the_task_is_known():
    ours = run(PLwF(backbone=plain_net), max_epochs=6)
    finetune = run(Finetune(backbone=plain_net), max_epochs=6)
    # Measured: 1.0 against .44.
    assert ours.matrix.R_ti[2, 0] > finetune.matrix.R_ti[2, 0] + 0.25


def test_each_teacher_is_the_network_after_its_task():
    kept = []

    class Look(PLwF):
        def end_task(self, task):
            super().end_task(task)
            kept.append({name: value.clone() for name, value in self.network.state_dict().items()})

    strategy = run(Look(backbone=plain_net), max_epochs=1).strategy
    for teacher, state in zip(strategy.teachers, kept, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in teacher.network.state_dict().items())
    again = PLwF(backbone=plain_net)
    again.build((1, 8, 8))
    again.load_state_dict(strategy.state_dict())
    assert [teacher.num_columns for teacher in again.teachers] == [4, 7, 10]
    assert strategy.bytes_kept()["teachers"] == sum(teacher.num_bytes() for teacher in strategy.teachers)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"distill_weight": -1.0}, {"joint_weight": math.nan}])
def test_options_out_of_range_are_errors(options: dict):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"PLwF: {name} is {value}"):
        PLwF(**options)
