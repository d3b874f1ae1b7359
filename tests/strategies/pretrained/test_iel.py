from functools import cache, partial

import pytest
import torch
from support.pretrained import finetuning_in_tasks, in_tasks, samples_right
from support.runs import loop, plain_net

from cl_lightning.models import MLP, LoRA
from cl_lightning.strategies.pretrained.iel import IEL
from cl_lightning.strategies.pretrained.ita import ITA
from cl_lightning.strategy import PhaseOptions
from cl_lightning.stream import ClassIncremental, Subset
from cl_lightning.testing import Subject, small

LOW_RANK = partial(LoRA, rank=2, scale=0.5, targets=["*"])
NO_HEAD = {"probe_options": PhaseOptions(epochs=0), "align_options": PhaseOptions(epochs=0)}
SUBJECTS = {
    "IEL": Subject(
        small(IEL, peft=LOW_RANK, pull_weight=5.0, fisher_labels="sampled", **NO_HEAD),
        first_task_is_finetuning=False,
        reason="the backbone is frozen",
    ),
}

SMALL = Subset(ClassIncremental(tasks=5), per_class=12)
LAYER, UP, DOWN = (f"backbone.{name}" for name in ("base.layers.1.weight", "peft.sites.0.up", "peft.sites.0.down"))
PULL = 2000.0
adam = partial(torch.optim.Adam, lr=0.05)


def weights(strategy):
    return {name: value.detach().clone() for name, value in strategy.network.named_parameters()}


def tau(found):
    return 0.5 * found[UP][0].double() @ found[DOWN][0].double()


class Looks:
    """Keeps the weights at the first step of the phase ``train``, around each pull and when each task ends."""

    def begin_task(self, task):
        if task.is_first:
            self.first, self.begun, self.ends, self.pulls, self.logits = weights(self), [], [], [], []
        super().begin_task(task)

    def on_train_start(self):
        super().on_train_start()
        if self.phase.name == "train":
            self.begun.append(weights(self))

    def losses(self, batch, output):
        if self.phase.name == "train":
            self.logits.append((weights(self), batch.images, output.features.detach()))
        return super().losses(batch, output)

    def edit_gradients(self, batch):
        before = weights(self)
        super().edit_gradients(batch)
        self.pulls.append((self.task.index, before, weights(self)))

    def end_task(self, task):
        self.ends.append(weights(self))
        super().end_task(task)
        self.omegas = {name: value.clone() for name, value in self.importance.omegas.items()}


class Look(Looks, IEL):
    pass


class LookAlone(Looks, ITA):
    pass


@cache
def learnt(tasks=3, cls=Look, **options):
    common = {"backbone": plain_net, "peft": LOW_RANK, "pull_weight": PULL, "optimizer": adam, **NO_HEAD}
    made = loop(
        cls(**{**common, **options}),
        data={"scenario": SMALL, "batch_size": 16},
        options={"stop_after_task": tasks - 1},
        max_epochs=1,
    )
    made.fit()
    return made.strategy


def test_the_composition_is_trained_by_the_newest_module():
    strategy = learnt()
    start = strategy.first[LAYER].double()
    taus = [tau(end) for end in strategy.ends]
    assert all(one.any() for one in taus)
    expected = [start, start + taus[0] / 2, start + (taus[0] + taus[1]) / 3]
    for begun, ended, base in zip(strategy.begun, strategy.ends, expected, strict=True):
        torch.testing.assert_close(begun[LAYER].double(), base, rtol=1e-5, atol=1e-6)
        assert torch.equal(begun[LAYER], ended[LAYER])
        assert not begun[UP].any()
    torch.testing.assert_close(weights(strategy)[LAYER].double(), start + sum(taus) / 3, rtol=1e-5, atol=1e-6)
    assert not weights(strategy)[UP].any()
    assert float(strategy.share) == 1.0


def test_the_loss_is_of_the_mean_of_all_modules():
    strategy = learnt()
    found, images, features = strategy.logits[-1]  # a step of the third task
    assert found[UP].any()
    bias = found["backbone.base.layers.1.bias"].double()
    weight = found[LAYER].double() + tau(found) / 3
    expected = (images.flatten(1).double() @ weight.T + bias).relu()
    torch.testing.assert_close(features.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_pull_is_the_gradient_of_the_spread_of_the_modules():
    strategy = learnt()
    _, before, after = [entry for entry in strategy.pulls if entry[0] == 2][1]
    up, down = (before[name].double().requires_grad_() for name in (UP, DOWN))
    assert up.any()
    omega = strategy.omegas[LAYER].double()  # of all three tasks
    modules = [tau(strategy.ends[0]), tau(strategy.ends[1]), 0.5 * up[0] @ down[0]]
    mean = sum(modules) / 3
    spread = sum((omega * one.square()).sum() for one in modules) / 3 - (omega * mean.square()).sum()
    (3 * PULL * spread / 2).backward()
    for name, value in ((UP, up), (DOWN, down)):
        assert 0.01 < value.grad.norm() < 100
        moved = before[name].double() - after[name].double()
        torch.testing.assert_close(moved, value.grad, rtol=1e-3, atol=1e-6)


def test_the_first_task_is_the_one_of_ita():
    alone, together = (learnt(tasks=1, cls=cls) for cls in (LookAlone, Look))
    for name, value in weights(alone).items():
        assert torch.equal(weights(together)[name], value)
    assert all(torch.equal(before[name], after[name]) for _, before, after in together.pulls for name in before)


def test_a_task_that_is_left_out_has_no_effect_apart_from_the_shares():
    strategy = learnt()
    strategy.compose([0, 2])
    found = weights(strategy)[LAYER].double()
    strategy.compose([0, 1, 2])
    expected = strategy.first[LAYER].double() + (tau(strategy.ends[0]) + tau(strategy.ends[2])) / 2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_share_of_the_newest_module_is_restored():
    strategy = learnt()
    state = strategy.state_dict()
    strategy.load_state_dict({**state, "share": torch.tensor(0.25)})
    assert [site.share for site in strategy.lora.sites] == [0.25]
    strategy.load_state_dict({**state, "share": torch.tensor(1.0)})


def test_it_forgets_less_than_fine_tuning():
    wide = partial(MLP, hidden=(64,))
    plain = finetuning_in_tasks({"backbone": wide}, 5, max_epochs=3)
    options = {
        "backbone": wide,
        "probe_options": PhaseOptions(epochs=1),
        "align_options": PhaseOptions(epochs=2),
        "align_samples": 64,
        "align_more": 0,
        "fisher_samples": 100,
        "peft": partial(LoRA, rank=4, targets=["*"]),
        "pull_weight": 0.5,
    }
    made = in_tasks(partial(IEL, **options), 5, max_epochs=3)
    # Measured: 62 and 303 of 360.
    right = [samples_right(matrix) for matrix in (plain, made.matrix)]
    assert right[1] > right[0] + 50


@pytest.mark.parametrize(("options", "words"), [({"pull_weight": -1.0}, r"IEL: pull_weight is -1\.0")])
def test_options_out_of_range_are_errors(options, words):
    with pytest.raises(ValueError, match=words):
        IEL(**options)
