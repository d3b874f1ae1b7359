import pytest
import torch
from support.fakes import normal
from support.few_shot import OPTIONS, sessions
from support.runs import assert_same, assert_same_run
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.callbacks.prototype_calibration import PrototypeCalibration
from cl_lightning.loop.results import measures
from cl_lightning.measures import base_novel_harmonic
from cl_lightning.memory import Prototypes, calibrate_new, calibrated
from cl_lightning.models import LinearHead
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.few_shot.proto_cosine import ProtoCosine
from cl_lightning.strategies.few_shot.teen import TEEN
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "TEEN": Subject(
        small(TEEN),
        first_task_is_finetuning=False,
        reason="class means take the place of the head when the session ends",
    ),
}

PUBLISHED = {
    "teen": {
        "source": "wangkiw/TEEN: the command for CIFAR-100",
        "shift_weight": 0.1,
        "temperature": 16.0,
        "scale": 16.0,
        "optimizer": "SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.0005)",
        "scheduler": "CosineOverPhase",
    },
}


def test_it_is_the_formula_of_a_plain_loop():
    novel, base, beta, tau = normal(3, 5), normal(4, 5, seed=1), 0.3, 7.0
    for n, moved in zip(novel, calibrated(novel, base, beta=beta, tau=tau), strict=True):
        unit = [b / b.norm() for b in base]
        exponentials = [torch.exp(tau * (n / n.norm()) @ b) for b in unit]
        weights = [e / sum(exponentials) for e in exponentials]
        delta = sum(w * b for w, b in zip(weights, unit, strict=True))
        torch.testing.assert_close(moved, (1 - beta) * n / n.norm() + beta * delta / delta.norm())


def test_with_beta_0_only_the_length_changes():
    novel = normal(3, 5)
    torch.testing.assert_close(calibrated(novel, normal(4, 5, seed=1), beta=0.0, tau=16.0), F.normalize(novel, dim=1))


def test_with_beta_1_and_a_large_tau_it_is_the_nearest_base_prototype():
    novel, base = normal(6, 5), normal(4, 5, seed=1)
    nearest = (F.normalize(novel, dim=1) @ F.normalize(base, dim=1).T).argmax(1)
    found = calibrated(novel, base, beta=1.0, tau=1e6)
    torch.testing.assert_close(found, F.normalize(base, dim=1)[nearest])


def test_with_tau_0_it_is_the_normalised_mean_of_the_base():
    novel, base = normal(2, 5), normal(4, 5, seed=1)
    mean = F.normalize(F.normalize(base, dim=1).mean(0), dim=0)
    torch.testing.assert_close(calibrated(novel, base, beta=1.0, tau=0.0), mean.expand(2, 5))


def store(means: Tensor, known: list[int]) -> Prototypes:
    made = Prototypes(means.shape[1])
    made.update(means[known].float(), torch.tensor(known), num_classes=len(means))
    return made


def test_only_new_classes_that_are_known_move_and_the_base_is_the_first_task():
    means = normal(7, 4)
    tasks = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 1, 1, 1]]).bool()
    made = store(means, [0, 1, 2, 3, 4, 5])  # class 6 has no images; class 0 comes again
    before = made.means.clone()
    calibrate_new(made, tasks, beta=0.4, tau=5.0)
    assert torch.equal(made.means[[0, 1, 2, 3, 6]], before[[0, 1, 2, 3, 6]])  # to the bit
    lengths = before.norm(dim=1, keepdim=True)
    moved = F.normalize(calibrated(before[4:6], before[:3], beta=0.4, tau=5.0), dim=1)
    torch.testing.assert_close(made.means[4:6], lengths[4:6] * moved)  # a mean keeps its length
    calibrate_new(made, tasks[:1], beta=0.4, tau=5.0)  # after the first task there is nothing to move
    assert torch.equal(made.means[:3], before[:3])


def test_a_base_bias_is_undone_in_part():
    """Few-shot means whose common part was lost: tests of new classes fall to base classes, until they are moved."""
    centres = 3 * normal(12, 16)
    centres[8:] = centres[:4] + 1.2 * normal(4, 16, seed=2)  # each new class is like a base class
    base, tests = centres[:8], torch.cat([centres[c] + 1.1 * normal(200, 16, seed=c) for c in range(12)])
    shots = torch.stack([(centres[c] + 2.5 * normal(5, 16, seed=100 + c)).mean(0) for c in range(8, 12)])
    labels = torch.arange(12).repeat_interleave(200)

    def split(novel: Tensor):
        rows = F.normalize(torch.cat([base, novel]), dim=1)
        right = (F.normalize(tests, dim=1) @ rows.T).argmax(1) == labels
        return base_novel_harmonic(right.view(12, 200).double().mean(1), 8)

    plain, moved = split(shots), split(calibrated(shots, base, beta=0.3, tau=16.0))
    assert moved.novel > plain.novel
    assert moved.harmonic > plain.harmonic
    assert plain.base - 0.1 < moved.base <= plain.base


def test_with_beta_0_it_is_proto_cosine_to_the_bit():
    assert_same_run(sessions(TEEN(**OPTIONS, shift_weight=0.0)), sessions(ProtoCosine(**OPTIONS)))


def test_the_callback_makes_it_of_proto_cosine_to_the_bit():
    callback = PrototypeCalibration(shift_weight=0.3, temperature=8.0)
    mine = sessions(TEEN(**OPTIONS, shift_weight=0.3, temperature=8.0))
    assert_same_run(sessions(ProtoCosine(**OPTIONS), callback), mine)
    plain = sessions(ProtoCosine(**OPTIONS)).strategy.prototypes.means
    assert torch.equal(mine.strategy.prototypes.means[:6], plain[:6])
    assert not torch.isclose(mine.strategy.prototypes.means[6:], plain[6:]).all(dim=1).any()


def test_a_session_leaves_the_prototypes_of_earlier_ones():
    made = sessions(TEEN(**OPTIONS), until=1)
    means = made.strategy.prototypes.means.clone()
    made._run_task(made.stream.tasks[2], None)
    assert_same({"means": means}, {"means": made.strategy.prototypes.means[:8]})


def test_sessions_are_learnt():
    made = sessions(TEEN(**OPTIONS, shift_weight=0.1))
    found, plain = measures(made.matrix, made.stream, 2), sessions(Finetune(**OPTIONS))
    assert found["harmonic_accuracy"] > measures(plain.matrix, plain.stream, 2)["harmonic_accuracy"] + 0.3


@pytest.mark.parametrize("options", [{"shift_weight": 1.5}, {"shift_weight": -0.1}, {"temperature": -1.0}])
@pytest.mark.parametrize("cls", [TEEN, PrototypeCalibration])
def test_options_out_of_range_are_errors(cls, options):
    with pytest.raises(ValueError, match=rf"{cls.__name__}: (shift_weight|temperature) is "):
        cls(**options)


def test_a_head_without_prototypes_is_reported_at_the_start():
    with pytest.raises(ValueError, match="LinearHead, keeps no class means"):
        sessions(Finetune(**OPTIONS, head=LinearHead), PrototypeCalibration())
