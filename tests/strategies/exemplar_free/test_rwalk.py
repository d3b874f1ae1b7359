from functools import partial

import pytest
import torch
from support.runs import assert_same_run, plain_net, run, sgd

from cl_lightning.callbacks.importance_penalty import ImportancePenalty
from cl_lightning.models import MLP
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.exemplar_free.rwalk import RWalk
from cl_lightning.stream import PermutedDomains
from cl_lightning.testing import Subject, small

SUBJECTS = {"RWalk": Subject(small(RWalk, interval=3))}

RWALK_SMALL = partial(RWalk, backbone=plain_net, optimizer=sgd)


def test_with_weight_0_it_is_finetuning_to_the_bit():
    assert_same_run(run(RWALK_SMALL(penalty_weight=0.0)), run(Finetune(backbone=plain_net, optimizer=sgd)))


def test_importances_come_from_the_gradients_of_the_loss_without_the_penalty():
    """F with alpha = 1 is the last squared gradient; the penalty pulls strongly, and must not count."""
    gradients = {}

    class Look(RWalk):
        def losses(self, batch, output):
            terms = super().losses(batch, output)
            weights = {name: value for name, value in self.network.named_parameters() if name.startswith("backbone.")}
            last = torch.autograd.grad(terms["ce"], list(weights.values()), retain_graph=True)
            gradients.update(zip(weights, last, strict=True))
            return terms

    # Steps so small that no score counts beside eps: each weight's share is F / max F plus its share of the scores.
    tiny = partial(torch.optim.SGD, lr=1e-3)
    options = {"penalty_weight": 20.0, "fisher_rate": 1.0, "interval": 1, "on": "backbone"}
    made = run(Look(backbone=plain_net, optimizer=tiny, **options), max_epochs=1, options={"stop_after_task": 1})
    consolidation = made.strategy.consolidation
    fisher = {name: gradient.square() for name, gradient in gradients.items()}
    top = max(value.max() for value in fisher.values())
    found = consolidation.path._get("fisher")
    for name, value in fisher.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5 * top.item())


def test_its_importances_are_between_0_and_2_and_replace_the_earlier_ones():
    made = run(RWALK_SMALL(interval=2))
    omegas, weights = made.strategy.consolidation.importance.omegas, dict(made.strategy.network.named_parameters())
    assert omegas.keys() == weights.keys()
    assert all(omega.min() >= 0 and omega.max() <= 2 for omega in omegas.values())
    assert max(omega.max() for omega in omegas.values()) >= 1
    for name, anchor in made.strategy.consolidation.importance.anchors.items():
        assert torch.equal(anchor, weights[name])


def test_options_reach_the_penalty_that_it_shares_with_the_callback():
    callback = ImportancePenalty(estimator="rwalk", weight=0.2, rate=0.5, interval=2, xi=0.01, on="backbone")
    options = {"fisher_rate": 0.5, "interval": 2, "xi": 0.01, "on": "backbone"}
    mine = run(RWALK_SMALL(penalty_weight=0.2, **options))
    assert_same_run(mine, run(Finetune(backbone=plain_net, optimizer=sgd), callback))
    assert mine.strategy.bytes_kept() == callback.bytes_kept()


def test_it_forgets_less_than_finetuning_on_permuted_images():
    options = {"data": {"scenario": PermutedDomains(tasks=3), "batch_size": 32}, "max_epochs": 4}
    common = {"backbone": partial(MLP, hidden=(64,)), "optimizer": partial(torch.optim.SGD, lr=0.02, momentum=0.5)}
    rwalk, finetune = run(RWalk(**common, penalty_weight=20.0), **options), run(Finetune(**common), **options)
    # Measured: .91 against .77.
    assert rwalk.matrix.R_ci[2, 0] > finetune.matrix.R_ci[2, 0] + 0.065


@pytest.mark.parametrize(
    ("option", "value"), [("interval", 0), ("fisher_rate", 1.5), ("xi", 0.0), ("penalty_weight", -1.0)]
)
def test_options_outside_their_range_are_refused(option, value):
    with pytest.raises(ValueError, match=f"is {value}; it must be"):
        RWalk(**{option: value})
