"""Quantile-risk rehearsal."""

import math

import pytest
import torch
from support.baselines import finetuning
from support.fakes import batch_of, normal
from support.runs import plain_net, run
from torch.nn import functional as F

from cl_lightning.batch import join
from cl_lightning.data import RandomCrop
from cl_lightning.models import Output
from cl_lightning.strategies.rehearsal.eqrm_replay import EQRMReplay, normal_quantile, quantile_weights
from cl_lightning.stream import RotatedDomains
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "EQRMReplay": Subject(
        small(EQRMReplay, environments=2, replay_size=8, quantile=0.8),
        first_task_is_finetuning=False,
        reason="a quantile of the cross-entropies takes the place of their mean",
    ),
}

PUBLISHED = {
    "eqrm_replay_rotated_mnist": {
        "source": "news-vt/ICASSP_2024_Are_continual_learners_robust: README.md; 150 degrees are held out",
        "memory_size": 500,
        "replay_size": 64,
        "quantile": 0.9999,
        "environments": 3,
        "balance": 0.5,
        "backbone": "MLP(hidden=[100, 100])",
        "optimizer": "SGD(lr=0.1)",
        "data.scenario": "RotatedDomains(degrees=[0, 25, 50, 75, 100, 125])",
        "data.batch_size": 512,
        "trainer.max_epochs": 1,
    },
}

DOMAINS = {"scenario": RotatedDomains(degrees=[0, 30, 60], share="split"), "batch_size": 32}


def plain_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


# ---------------------------------------------------------------------- the maths


def test_the_quantile_is_the_mean_and_z_deviations():
    losses = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)  # mean 3, variance (4 + 1 + 9) / 2 = 7
    weights = quantile_weights(losses, 2.0)
    assert float((weights * losses).sum()) == pytest.approx(3 + 2 * math.sqrt(7))
    s = math.sqrt(7)
    assert weights.tolist() == pytest.approx([1 / 3 - 2 / s, 1 / 3 - 1 / s, 1 / 3 + 3 / s])


@pytest.mark.parametrize(("level", "z"), [(0.5, 0.0), (0.9999, 3.719016485), (0.975, 1.959963985), (-8.0, 4.0)])
def test_levels_are_quantiles_of_the_normal_distribution_or_logarithms(level, z):
    assert normal_quantile(level) == pytest.approx(z)


@pytest.mark.parametrize("z", [0.0, 1.5, 3.7])
def test_the_weights_are_the_gradient_of_the_quantile_and_sum_to_1(z):
    losses = normal(12).abs().requires_grad_()
    weights = quantile_weights(losses, z)
    q = losses.mean() + z * (losses.var() + 1e-16).sqrt()
    torch.testing.assert_close(weights, torch.autograd.grad(q, losses)[0])
    torch.testing.assert_close((weights * losses).sum(), q)
    assert float(weights.sum()) == pytest.approx(1.0)
    assert not weights.requires_grad
    assert bool((weights < 0).any()) == (z > 1)


def test_equal_losses_and_a_single_one_have_equal_weights():
    for losses in (torch.full((4,), 0.7), torch.tensor([2.0])):
        torch.testing.assert_close(quantile_weights(losses, 3.0), torch.full_like(losses, 1 / len(losses)).double())
    assert quantile_weights(torch.zeros(0), 3.0).shape == (0,)


def test_the_pool_has_the_batch_and_the_environments_and_the_last_draw_is_a_mean():
    labels, logits = torch.tensor([0, 1, 2, 1, 0, 2, 1, 1]), normal(8, 3)
    names = {"stream": slice(0, 3), "environment 0": slice(3, 5), "environment 1": slice(5, 6), "replay": slice(6, 8)}
    parts = {name: batch_of(labels[rows]) for name, rows in names.items()}
    parts["replay"] = parts["replay"].replace(weight=0.5)
    strategy = EQRMReplay(quantile=0.9, balance=0.3)
    found = strategy.losses(join(parts), Output(logits, logits))
    per_row = F.cross_entropy(logits, labels, reduction="none")
    z = 1.2815515655446004
    torch.testing.assert_close(found["quantile"], 0.3 * (per_row[:6].mean() + z * per_row[:6].std()))
    torch.testing.assert_close(found["replay"], 0.5 * per_row[6:].mean())
    first = strategy.losses(join({"stream": parts["stream"]}), Output(logits[:3], logits[:3]))
    torch.testing.assert_close(first, {"quantile": per_row[:3].mean() + z * per_row[:3].std()})


def test_positive_weights_leave_out_samples_of_a_small_loss():
    labels, logits = torch.tensor([0, 0, 0]), torch.tensor([[5.0, 0], [3.0, 0], [-4.0, 0]]).double().requires_grad_()
    batch = join({"stream": batch_of(labels)})
    for positive, sign in ((True, 0.0), (False, 1.0)):
        loss = EQRMReplay(quantile=0.99, positive_weights=positive).losses(batch, Output(logits, logits))["quantile"]
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient[:2, 0].sign().tolist() == [sign, sign]  # 1: a smaller logit of the label, so it is unlearned
        assert float(gradient[2, 0]) < 0


# ---------------------------------------------------------------------- runs


class Notes(EQRMReplay):
    """Notes the parts of each step."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.steps = []

    def prepare_batch(self, batch):
        joint = super().prepare_batch(batch)
        self.steps.append({name: part for name, (_, part) in joint.parts.items()})
        return joint


def test_the_environments_are_independent_draws_without_augmentation():
    strategy = Notes(backbone=plain_net, optimizer=plain_sgd, memory_size=100, environments=2, replay_size=9)
    made = run(strategy, max_epochs=1, data={**DOMAINS, "transforms": [RandomCrop(padding=1)]}, limit_train_batches=4)
    first, *_, last = strategy.steps
    assert list(first) == ["stream"]
    assert {name: len(part) for name, part in last.items()} == {
        "stream": 32,
        "environment 0": 9,
        "environment 1": 9,
        "replay": 9,
    }
    plain, other, replay = (last[name] for name in ("environment 0", "environment 1", "replay"))
    assert not torch.equal(plain.raw, other.raw)
    assert torch.equal(plain.images, made.datamodule.normalize(plain.raw, plain.draw))
    assert not torch.equal(replay.images, made.datamodule.normalize(replay.raw, replay.draw))


def test_at_the_median_without_environments_it_is_replay_with_two_weights():
    logits, labels = normal(5, 3), torch.tensor([0, 1, 2, 0, 1])
    parts = {"stream": batch_of(labels[:3]), "replay": batch_of(labels[3:])}
    found = EQRMReplay(quantile=0.5, balance=0.3).losses(join(parts), Output(logits, logits))
    expected = {"quantile": 0.3 * F.cross_entropy(logits[:3], labels[:3])}
    expected["replay"] = F.cross_entropy(logits[3:], labels[3:])
    torch.testing.assert_close(found, expected)


def test_it_forgets_less_than_finetuning_on_rotated_images():
    options = {"backbone": plain_net, "optimizer": plain_sgd}
    finetune = finetuning(options, max_epochs=4, data=DOMAINS).measures()
    eqrm = run(EQRMReplay(memory_size=100, quantile=0.9, **options), max_epochs=4, data=DOMAINS).matrix.measures()
    # Measured: accuracy .69 against .64, forgetting .13 against .23.
    assert eqrm["average_accuracy"] > finetune["average_accuracy"] + 0.02
    assert eqrm["forgetting"] < finetune["forgetting"] - 0.05


@pytest.mark.parametrize(
    "options",
    [{"quantile": 1.0}, {"quantile": 0.0}, {"balance": -1}, {"environments": -1}, {"loss_classes": "task"}],
)
def test_wrong_options_are_errors(options):
    with pytest.raises(ValueError, match="EQRMReplay"):
        EQRMReplay(**options)
