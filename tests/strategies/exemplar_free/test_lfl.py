from functools import partial

import pytest
import torch
from support.runs import assert_same_run, plain_net, run, sgd

from cl_lightning.callbacks.distillation import Distillation
from cl_lightning.measures import last_accuracy
from cl_lightning.models import MLP
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.exemplar_free.lfl import LFL
from cl_lightning.stream import RotatedDomains
from cl_lightning.testing import Subject, TinyDigits, small

DOMAINS = RotatedDomains(degrees=[0.0, 30.0, 60.0])

SUBJECTS = {
    "LFL": Subject(small(LFL, distill_weight=1.0), data=partial(TinyDigits, scenario=DOMAINS)),
}

PUBLISHED = {
    "lfl_permuted_mnist": {
        "source": "Avalanche's reproduction: 4 tasks, hidden 256, lr 0.01, 3 epochs, lambda 1e-4",
        "backbone": "MLP(hidden=[256])",
        "distill_weight": 0.0001,
        "optimizer": "SGD(lr=0.01, momentum=0.9)",
        "data.scenario": "PermutedDomains(tasks=4)",
        "data.batch_size": 128,
        "trainer.max_epochs": 3,
    },
}

LESS = partial(LFL, backbone=plain_net, optimizer=sgd)
ROTATED = {"data": {"scenario": DOMAINS}}


def test_with_weight_0_and_a_trained_head_it_is_finetuning_to_the_bit():
    assert_same_run(
        run(LESS(distill_weight=0.0, freeze_head=False), **ROTATED),
        run(Finetune(backbone=plain_net, optimizer=sgd), **ROTATED),
    )


def test_with_a_trained_head_it_is_finetuning_with_distilled_features():
    ours = run(LESS(distill_weight=0.5, freeze_head=False), **ROTATED)
    plain = run(Finetune(backbone=plain_net, optimizer=sgd), Distillation(space="features", weight=0.5 / 16), **ROTATED)
    for mine, other in zip(ours.strategy.network.parameters(), plain.strategy.network.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_the_distillation_is_the_mean_over_all_features_and_the_head_is_frozen():
    seen, heads = [], []

    class Look(LFL):
        def losses(self, batch, output):
            terms = super().losses(batch, output)
            if not self.task.is_first:
                gap = output.features - self.teacher(batch.images).features
                torch.testing.assert_close(terms["distill"], 3 * (gap**2).mean())
                seen.append(float(terms["distill"]))
            return terms

        def end_task(self, task):
            super().end_task(task)
            heads.append(self.network.head.weight().detach().clone())

    run(Look(backbone=plain_net, optimizer=sgd, distill_weight=3.0), **ROTATED)
    assert seen[0] == 0.0  # before the first step the network is the teacher
    assert max(seen) > 0
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[0], heads[2])


def test_it_forgets_less_than_finetuning():
    options = {"data": {"scenario": DOMAINS, "batch_size": 32}, "max_epochs": 5}
    common = {"backbone": partial(MLP, hidden=(100, 100)), "optimizer": partial(torch.optim.SGD, lr=0.02, momentum=0.9)}
    plain = last_accuracy(run(Finetune(**common), **options).matrix.R_ci)
    ours = last_accuracy(run(LFL(**common, distill_weight=10.0), **options).matrix.R_ci)
    # Measured: .82 against .65.
    assert ours > plain + 0.1


def test_new_classes_are_refused():
    with pytest.raises(ValueError, match=r"LFL does not take class-incremental streams.*Distillation"):
        run(LESS())


def test_a_weight_below_0_is_an_error():
    with pytest.raises(ValueError, match="LFL: distill_weight is -1"):
        LFL(distill_weight=-1.0)
