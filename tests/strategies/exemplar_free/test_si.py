from functools import partial

import torch
from support.runs import assert_same_run, plain_net, run, sgd

from cl_lightning.callbacks.importance_penalty import ImportancePenalty
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.exemplar_free.si import SI
from cl_lightning.testing import Subject, small

SUBJECTS = {"SI": Subject(small(SI))}

SI_SMALL = partial(SI, backbone=plain_net, optimizer=sgd)


def test_with_weight_0_it_is_finetuning_to_the_bit():
    assert_same_run(run(SI_SMALL(penalty_weight=0.0)), run(Finetune(backbone=plain_net, optimizer=sgd)))


def test_the_first_task_integrates_gradient_times_change_and_the_second_pays_for_it():
    c, xi = 0.3, 0.02

    class Look(SI):
        def before(self):
            return {name: value.detach().clone() for name, value in self.network.named_parameters()}

        def begin_task(self, task):
            super().begin_task(task)
            if task.is_first:
                self.start, self.work = self.before(), dict.fromkeys(self.before(), 0.0)

        def edit_gradients(self, batch):
            self.at = self.before()
            self.gradients = {name: value.grad.clone() for name, value in self.network.named_parameters()}
            super().edit_gradients(batch)

        def after_step(self, batch):
            super().after_step(batch)
            if self.task.is_first:
                for name, value in self.before().items():
                    self.work[name] = self.work[name] - self.gradients[name] * (value - self.at[name])

        def losses(self, batch, output):
            terms = super().losses(batch, output)
            if not self.task.is_first:
                moved = {name: self.anchor[name] - value for name, value in self.start.items()}
                omegas = {name: w.clamp(min=0) / (moved[name].square() + xi) for name, w in self.work.items()}
                weights = dict(self.network.named_parameters())
                gaps = {name: weights[name] - value for name, value in self.anchor.items()}
                expected = c * sum((omegas[name] * gap.square()).sum() for name, gap in gaps.items())
                torch.testing.assert_close(terms["penalty"], expected, rtol=1e-4, atol=1e-7)
                self.compared = True
            return terms

        def end_task(self, task):
            super().end_task(task)
            if task.is_first:
                self.anchor = self.before()

    made = run(Look(backbone=plain_net, optimizer=sgd, penalty_weight=c, xi=xi), options={"stop_after_task": 1})
    assert made.strategy.compared


def test_options_reach_the_penalty_that_it_shares_with_the_callback():
    options = {"xi": 0.01, "clamp": False, "on": "backbone"}
    callback = ImportancePenalty(estimator="si", weight=0.2, **options)
    mine = run(SI_SMALL(penalty_weight=0.2, **options))
    assert_same_run(mine, run(Finetune(backbone=plain_net, optimizer=sgd), callback))
    assert mine.strategy.bytes_kept() == callback.bytes_kept()
