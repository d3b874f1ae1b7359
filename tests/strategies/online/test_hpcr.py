"""Holistic Proxy-based Contrastive Replay."""

import math
from functools import partial

import pytest
import torch
from support.baselines import finetuning
from support.fakes import normal
from support.runs import assert_same_run, plain_net, run
from torch.nn import functional as F

from cl_lightning.strategies.online.hpcr import (
    HPCR,
    gradient_scale,
    proxy_distillation,
    structure_distillation,
)
from cl_lightning.strategies.online.pcr import PCR, proxy_contrastive
from cl_lightning.stream import Blurry, ClassIncremental, Online, Subset
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "HPCR": Subject(
        small(HPCR, memory_size=30, replay_size=8, proxy_weight=0.01, period=5),
        first_task_is_finetuning=False,
        reason="a proxy-based contrastive loss takes the place of cross-entropy",
    ),
}

PUBLISHED = {
    "hpcr_cifar100": {
        "source": "FelixHuiweiLin/PCR: README and general_main.py (HPCR on CIFAR-100), agents/hpcr.py",
        "memory_size": 1000,
        "temperature": 0.09,
        "low_temperature": 0.05,
        "high_temperature": 0.16,
        "period": 500,
        "proxy_weight": 0.1,
        "structure_weight": 0.5,
        "separate_passes": True,
        "optimizer": "SGD(lr=0.1)",
        "data.scenario": "Online(base=ClassIncremental(tasks=10), batch_size=10)",
        "data.batch_size": 10,
    },
}

FIVE = {"scenario": Online(ClassIncremental(tasks=5), batch_size=10)}
FEW = {"scenario": Online(Subset(ClassIncremental(tasks=5), per_class=12), batch_size=10)}


def plain_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


OPTIONS = {"backbone": plain_net, "optimizer": plain_sgd, "memory_size": 60}


# ---------------------------------------------------------------------- the terms


def test_the_factor_moves_between_the_gradients_of_two_temperatures():
    for step, expected in ((0, 0.5625), (250, 1.8), (500, 0.5625), (125, (0.5625 + 1.8) / 2)):
        assert float(gradient_scale(torch.tensor(step), 0.5625, 1.8, 500)) == pytest.approx(expected, rel=1e-5)
    assert HPCR().scales == pytest.approx((0.5625, 1.8))


def test_proxies_are_distilled_in_the_columns_of_the_labels_of_the_step():
    logits, stored, labels = normal(4, 5), normal(4, 5, seed=1), torch.tensor([3, 0, 3, 3, 1, 0])
    counts = torch.bincount(labels, minlength=5)
    expected = F.mse_loss(logits[:, labels], stored[:, labels])
    torch.testing.assert_close(proxy_distillation(logits, stored, counts), expected)


def test_columns_that_were_not_stored_are_left_out():
    logits, stored = normal(3, 5), normal(3, 4, seed=1)
    stored[0, 2:] = torch.nan
    counts = torch.tensor([1, 0, 2, 3, 4])
    errors = (logits[:, :4] - stored).square()
    rows = [errors[0, 0], *((errors[i, 0] + 2 * errors[i, 2] + 3 * errors[i, 3]) / 6 for i in (1, 2))]
    torch.testing.assert_close(proxy_distillation(logits, stored, counts), torch.stack(rows).mean())
    leaf = logits.clone().requires_grad_()
    proxy_distillation(leaf, stored, torch.tensor([0, 0, 0, 0, 4])).backward()  # no stored column at all
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_the_structure_is_a_distribution_over_the_other_rows():
    new, old = normal(5, 3), normal(5, 3, seed=1)
    expected = 0.0
    for i in range(5):
        shares = []
        for rows in (new, old):
            cosines = {j: float(F.cosine_similarity(rows[i], rows[j], dim=0)) / 0.2 for j in range(5) if j != i}
            total = sum(math.exp(value) for value in cosines.values())
            shares.append({j: math.exp(value) / total for j, value in cosines.items()})
        expected -= sum(shares[1][j] * math.log(shares[0][j]) for j in shares[0]) / 5
    assert float(structure_distillation(new, old, 0.2)) == pytest.approx(expected)
    leaf = old.clone().requires_grad_()
    structure_distillation(leaf, 3 * old, 0.2).backward()
    assert leaf.grad.abs().max() < 1e-12  # the same structure


# ---------------------------------------------------------------------- a step


class Compares(HPCR):
    """Compares the terms of each step with the equations, and stored outputs with the outputs of the stream."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.compared, self.count, self.kept = 0, 0, {}

    def begin_task(self, task):
        super().begin_task(task)
        self.count = 0

    def losses(self, batch, output):
        terms = super().losses(batch, output)
        labels, parts = batch.labels, batch.parts
        scale = 0.2 / 0.5 + (0.2 / 0.1 - 0.2 / 0.5) * (1 - math.cos(2 * math.pi * self.count / 7)) / 2
        counts = torch.bincount(labels, minlength=output.logits.shape[1])
        expected = {"pcr": scale * float(proxy_contrastive(output.logits, labels, counts))}
        for image, logits, features in zip(
            parts["stream"][1].raw, output.logits[parts["stream"][0]], output.features[parts["stream"][0]], strict=True
        ):
            self.kept[image.numpy().tobytes()] = logits.detach(), features.detach()
        if not self.task.is_first and "replay" in parts:
            rows = [*range(len(labels))[parts["replay"][0]], *range(len(labels))[parts["strong replay"][0]]]
            stored = [self.kept[image.numpy().tobytes()] for image in parts["replay"][1].raw] * 2
            proxies = 0.0
            for row, (logits, _) in zip(rows, stored, strict=True):
                own = [c for c in labels.tolist() if c < len(logits)]
                proxies += sum(float(output.logits[row, c] - logits[c]) ** 2 for c in own) / max(len(own), 1)
            expected["proxies"] = 0.3 * proxies / len(rows)
            before = torch.stack([features for _, features in stored])
            expected["structure"] = 0.6 * float(structure_distillation(output.features[rows], before, 0.2))
            self.compared += 1
        assert {name: float(term.detach()) for name, term in terms.items()} == pytest.approx(expected, 1e-4, 1e-5)
        self.count += 1
        return terms


def test_the_terms_of_a_step_are_the_equations():
    options = {"temperature": 0.2, "low_temperature": 0.1, "high_temperature": 0.5, "period": 7}
    strategy = run(Compares(**OPTIONS, **options, proxy_weight=0.3, structure_weight=0.6), data=FEW).strategy
    assert strategy.compared > 8
    assert int(strategy.steps) == strategy.count


def test_without_distillation_and_with_equal_temperatures_it_is_pcr():
    options = {"proxy_weight": 0.0, "structure_weight": 0.0, "low_temperature": 0.09, "high_temperature": 0.09}
    assert_same_run(run(HPCR(**OPTIONS, **options), data=FEW), run(PCR(**OPTIONS), data=FEW))


def test_classes_that_come_back_and_tasks_of_one_class_are_learnt():
    for scenario in (Blurry(tasks=3, disjoint=40, blurry=20), ClassIncremental(tasks=10)):
        data = {"scenario": Online(Subset(scenario, per_class=40), batch_size=10)}
        assert run(HPCR(**OPTIONS, proxy_weight=0.01), data=data).matrix.measures()["average_accuracy"] > 0.3


def test_it_is_far_above_finetuning_on_a_stream_that_is_seen_once():
    plain = {"backbone": plain_net, "optimizer": plain_sgd}
    hpcr = run(HPCR(**plain, memory_size=200, proxy_weight=0.01), data=FIVE).matrix.measures()["average_accuracy"]
    none = finetuning(plain, data=FIVE).measures()["average_accuracy"]
    assert hpcr > none + 0.35


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"proxy_weight": -1.0}, "HPCR: proxy_weight is -1"),
        ({"structure_weight": -1.0}, "HPCR: structure_weight is -1"),
        ({"low_temperature": 0.0}, "HPCR: low_temperature is 0"),
        ({"high_temperature": 0.0}, "HPCR: high_temperature is 0"),
        ({"temperature": 0.0}, "HPCR: temperature is 0"),
        ({"period": 0}, "HPCR: period is 0"),
    ],
)
def test_wrong_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        partial(HPCR, **options)()
