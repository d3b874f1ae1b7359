from functools import partial

import pytest
import torch
from support.fakes import normal
from support.runs import assert_resumes, assert_same_run, plain_net, run, sgd
from torch.nn import functional as F

from cl_lightning.callbacks.norm_direction import NormDirection
from cl_lightning.losses import norm_and_direction
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.rehearsal.er import ER

FINETUNE = partial(Finetune, backbone=plain_net, optimizer=sgd)


def test_the_loss_is_its_plain_loop():
    student, teacher, directions = normal(5, 3), normal(5, 3, seed=1), F.normalize(normal(5, 3, seed=2), dim=1)
    found = norm_and_direction(student, teacher, directions)
    rows = [1 - f @ e / max(f.norm(), t.norm()) for f, t, e in zip(student, teacher, directions, strict=True)]
    torch.testing.assert_close(found, sum(rows) / 5)
    known = torch.tensor([True, False, True, True, False])
    torch.testing.assert_close(
        norm_and_direction(student, teacher, directions, known), (rows[0] + rows[2] + rows[3]) / 5
    )


def test_its_limits_and_its_gradient_below_the_norm_of_the_teacher():
    e, teacher = F.normalize(normal(1, 4), dim=1), normal(1, 4, seed=1)
    length = teacher.norm()
    torch.testing.assert_close(norm_and_direction(2 * length * e, teacher, e), torch.zeros(()).double())
    across = normal(1, 4, seed=2)
    across = across - (across @ e.T) * e
    torch.testing.assert_close(norm_and_direction(across, teacher, e), torch.ones(()).double())
    long = 3 * length * F.normalize(normal(1, 4, seed=3), dim=1)
    torch.testing.assert_close(norm_and_direction(long, teacher, e), norm_and_direction(5 * long, teacher, e))
    short = (0.5 * length * F.normalize(normal(1, 4, seed=4), dim=1)).requires_grad_()
    (gradient,) = torch.autograd.grad(norm_and_direction(short, teacher, e), short)
    torch.testing.assert_close(gradient, -e / length)


def test_directions_are_of_the_means_of_the_network_before_the_task():
    callback, seen = NormDirection(weight=1.0), []

    class Look(NormDirection):
        def losses(self, strategy, batch, output):
            terms = super().losses(strategy, batch, output)
            if terms and not seen:
                labels, before = batch.labels, self.teacher(batch.images).features
                features, columns = strategy.passes.features(self.teacher.network)
                means = torch.stack([features[columns == y].mean(0) for y in labels.tolist()])
                expected = norm_and_direction(output.features, before, F.normalize(means, dim=1))
                seen.append((float(terms["norm_direction"]), float(expected)))
            return terms

    made = run(FINETUNE(), Look(weight=1.0), max_epochs=1)
    assert seen[0][0] == pytest.approx(seen[0][1], rel=1e-4)
    assert made.results()["cost"]["bytes_kept"]["teachers"] > 0
    assert callback.bytes_kept() == {"teachers": 0}


def test_samples_of_a_memory_have_no_term_and_it_resumes(tmp_path):
    er = partial(ER, backbone=plain_net, optimizer=sgd, memory_size=30)
    assert_resumes(lambda: (er(), [NormDirection()]), tmp_path)


def test_with_weight_0_it_is_its_host():
    assert_same_run(run(FINETUNE(), NormDirection(weight=0.0)), run(FINETUNE()))
    with pytest.raises(ValueError, match="weight"):
        NormDirection(weight=-1.0)
