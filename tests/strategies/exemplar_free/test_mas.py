from functools import partial

import torch
from support.runs import assert_same_run, plain_net, run, sgd

from cl_lightning.callbacks.importance_penalty import ImportancePenalty
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.exemplar_free.mas import MAS
from cl_lightning.testing import Subject, small

SUBJECTS = {"MAS": Subject(small(MAS))}

PUBLISHED = {
    "mas": {"source": "Aljundi et al. 2018: lambda 1", "penalty_weight": 1.0, "trainer.gradient_clip_val": 1.0},
}

MAS_SMALL = partial(MAS, backbone=plain_net, optimizer=sgd)


def test_with_weight_0_it_is_finetuning_to_the_bit():
    assert_same_run(run(MAS_SMALL(penalty_weight=0.0)), run(Finetune(backbone=plain_net, optimizer=sgd)))


def test_the_penalty_is_the_sensitivity_of_the_squared_norm_of_the_logits_without_a_factor_one_half():
    seen = []

    class Look(MAS):
        def losses(self, batch, output):
            terms = super().losses(batch, output)
            if not self.task.is_first:
                weights = dict(self.network.named_parameters())
                gaps = {name: (weights[name] - anchor).square() for name, anchor in self.anchors.items()}
                expected = 0.5 * sum((self.omegas[name] * gap).sum() for name, gap in gaps.items())
                seen.append((terms["penalty"], expected))
            return terms

        def end_task(self, task):
            super().end_task(task)
            weights, images = dict(self.network.named_parameters()), [b.images for b in self.passes.batches(samples=9)]
            new = {name: torch.zeros_like(value) for name, value in weights.items()}
            for image in torch.cat(images):
                with torch.enable_grad():
                    norm = self.network(image[None]).logits.square().sum()
                gradients = torch.autograd.grad(norm, list(weights.values()))
                new = {name: new[name] + g.abs() / 9 for name, g in zip(new, gradients, strict=True)}
            old = getattr(self, "omegas", {})
            self.omegas = {name: 0.5 * old.get(name, 0) + value for name, value in new.items()}
            self.anchors = {name: value.detach().clone() for name, value in weights.items()}

    run(Look(backbone=plain_net, optimizer=sgd, penalty_weight=0.5, decay=0.5, samples=9), max_epochs=1)
    assert seen[-1][0] > 0
    for penalty, expected in seen:
        torch.testing.assert_close(penalty, expected)


def test_options_reach_the_penalty_that_it_shares_with_the_callback():
    options = {"merge": "average", "decay": 0.5, "per_sample": False, "on": "backbone", "samples": 40}
    callback = ImportancePenalty(estimator="mas", weight=0.2, **options)
    mine = run(MAS_SMALL(penalty_weight=0.1, **options))
    assert_same_run(mine, run(Finetune(backbone=plain_net, optimizer=sgd), callback))
    assert mine.strategy.bytes_kept() == callback.bytes_kept()
