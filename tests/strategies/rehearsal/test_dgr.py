import math
from functools import partial

import pytest
import torch
from support.fakes import normal, task_of
from support.runs import loop, plain_net, run, sgd
from support.teaching import losses
from torch.nn import functional as F

from cl_lightning.losses import softmax_distillation
from cl_lightning.measures import last_accuracy
from cl_lightning.models import MLP, CosineHead, LinearHead
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.rehearsal.dgr import DGR, class_factors, distribution_aware_distillation, group_factors
from cl_lightning.strategies.rehearsal.er import ER
from cl_lightning.stream import ClassIncremental, LongTailed, RotatedDomains
from cl_lightning.testing import Subject, check_strategy, small

SUBJECTS = {
    "DGR": Subject(
        small(DGR),
        first_task_is_finetuning=False,
        reason="logits are adjusted and gradients reweighted in the first task too",
    ),
}

PUBLISHED = {
    "dgr_cifar100": {
        "source": "JiangpengHe/imbalanced_cil: script/main.sh (cifar100 lt), src/datasets/dataset_config.py",
        "memory_size": 2000,
        "exemplars_per_class": 20,
        "distill_weight": 0.7,
        "temperature": 2.0,
        "backbone": "ResNet32",
        "optimizer": "SGD(lr=0.1, momentum=0.9, weight_decay=0.0005)",
        "scheduler": "MultiStepLR(gamma=0.1, milestones=[80, 120])",
        "data.scenario": "LongTailed(arrangement=shuffled, base=ClassIncremental(tasks=10), imbalance=100)",
        "data.batch_size": 128,
        "data.transforms": ["RandomCrop(padding=4)", "RandomHorizontalFlip()"],
        "trainer.max_epochs": 160,
    },
}

SMALL = partial(DGR, backbone=plain_net, optimizer=sgd, memory_size=60)
TAILED = LongTailed(ClassIncremental(sizes=[4, 3, 3]), imbalance=8, arrangement="shuffled")


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------------- factors


def test_a_class_factor_is_the_smallest_sum_of_its_group_by_its_own():
    alpha = class_factors(numbers(2, 8, 4, 9, 3), 3)
    torch.testing.assert_close(alpha, numbers(1, 0.25, 0.5, 1 / 3, 1))
    torch.testing.assert_close(class_factors(numbers(5, 5, 7, 7), 2), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(class_factors(numbers(2, 1), 0), numbers(0.5, 1))


def test_a_class_without_gradient_does_not_stop_the_others():
    torch.testing.assert_close(class_factors(numbers(0, 8, 4, 9, 0), 3), numbers(1, 0.5, 1, 1, 1))
    of_old, of_new = group_factors(numbers(0, 8, 4, 3, 0), 3, 0.5)
    assert float(of_old) == pytest.approx(3 / 6)
    assert float(of_new) == pytest.approx(3 / 6 * 0.5)


@pytest.mark.parametrize(
    ("sums", "old", "new", "inverse"),
    [
        ((4, 8, 3), 0.5, 0.3 * 0.5, 0.3 / 0.5),  # R = 1 / 2
        ((1, 2, 3), 1.0, 0.3 * 2, 0.3 / 2),  # R = 2
        ((1, 1, 4), 1.0, 1.0, 0.3 / 4),  # R = 4
        ((8, 8, 2), 0.25, 0.3 / 4, 1.0),  # R = 1 / 4
    ],
)
def test_group_factors_are_at_most_1(sums, old, new, inverse):
    of_old, of_new = group_factors(numbers(*sums), 2, 0.3)
    assert (float(of_old), float(of_new)) == pytest.approx((old, new))
    assert float(group_factors(numbers(*sums), 2, 0.3, inverse=True)[1]) == pytest.approx(inverse)


@pytest.mark.parametrize(("sums", "num_old"), [((3, 1), 0), ((3, 1, 0), 2), ((0, 0, 2), 2)])
def test_a_group_without_gradients_has_factors_of_1(sums, num_old):
    assert [float(value) for value in group_factors(numbers(*sums), num_old, 0.3)] == [1, 1]


# ---------------------------------------------------------------------- distillation


def test_distillation_where_as_many_of_each_class_were_removed_is_plain():
    z, z_old = normal(5, 4), normal(5, 4, seed=1)
    plain = softmax_distillation(z, z_old, 3.0, scale_by_temperature=True)
    for removed in (None, torch.full((4,), 7.0), torch.zeros(4)):
        torch.testing.assert_close(distribution_aware_distillation(z, z_old, removed, 3.0), plain)
    one = distribution_aware_distillation(z[:, :1], z_old[:, :1], torch.tensor([5.0]))
    assert float(one) == 0.0


def test_distillation_with_unequal_removal_is_worked_out():
    z, z_old = normal(5, 2), normal(5, 2, seed=1)
    found = distribution_aware_distillation(z, z_old, torch.tensor([1.0, 3.0]), 2.0)
    evenness = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2)
    q = numbers(1, 3) / math.sqrt(10)
    mixed = q * z + (1 - q) * z_old
    target = (z_old / 2).softmax(1)
    each = -(target * (evenness * (z / 2).log_softmax(1) + (1 - evenness) * (mixed / 2).log_softmax(1))).sum(1)
    torch.testing.assert_close(found, 4 * each.mean())


def test_where_one_class_was_removed_only_its_logit_is_trained():
    z, z_old = normal(5, 3, requires_grad=True), normal(5, 3, seed=1, requires_grad=True)
    distribution_aware_distillation(z, z_old, torch.tensor([0.0, 9.0, 0.0]), 2.0).backward()
    mixed = torch.stack([z_old[:, 0], z[:, 1], z_old[:, 2]], dim=1).detach()
    expected = torch.zeros(5, 3, dtype=torch.float64)
    expected[:, 1] = ((mixed / 2).softmax(1) - (z_old / 2).softmax(1))[:, 1].detach() * 2 / 5
    torch.testing.assert_close(z.grad, expected)
    assert z_old.grad is None


# ---------------------------------------------------------------------- loss


@pytest.mark.parametrize("aware", [True, False])
def test_the_loss_is_the_equation_of_the_paper(aware):
    strategy = DGR(reweight=False, distill_weight=0.5, temperature=3.0, distribution_aware=aware)
    strategy.task = task_of(2, size=2)  # 4 old and 2 new classes
    strategy._log_prior, strategy._removed = normal(6, seed=2), torch.tensor([1.0, 2.0, 3.0, 0.0])
    strategy._sizes = 90, 40
    logits, taught, labels = normal(4, 6), normal(4, 4, seed=1), torch.tensor([0, 5, 4, 2])
    found = losses(strategy, logits, labels, taught)
    torch.testing.assert_close(found["ce"], F.cross_entropy(logits + strategy._log_prior, labels))
    removed = strategy._removed if aware else None
    kd = distribution_aware_distillation(logits[:, :4], taught, removed, 3.0)
    torch.testing.assert_close(found["distill"], 0.5 * math.sqrt(90 / 40) * kd)
    first = DGR(reweight=False)
    first._log_prior = strategy._log_prior
    assert losses(first, logits, labels).keys() == {"ce"}


def counts_of(strategy, *tasks):
    module = strategy.trainer.datamodule
    stream, labels = module.stream, module.samples(train=True).labels
    chosen = torch.cat([torch.as_tensor(stream.train[task].copy()) for task in tasks])
    columns = torch.from_numpy(stream.columns_of(torch.as_tensor(labels)[chosen].numpy()))
    return columns.bincount(minlength=strategy.task.num_seen)


class Frozen(DGR):
    """Keeps the exemplars that it trains with."""

    def on_train_start(self):
        super().on_train_start()
        self.held = self.memory.labels.cpu().bincount(minlength=self.task.num_seen)


def test_shares_and_removed_samples_are_counted():
    strategy = Frozen(backbone=plain_net, optimizer=sgd, memory_size=40)
    made = loop(strategy, data={"scenario": TAILED}, options={"stop_after_task": 1}, max_epochs=1)
    made.fit()
    new, before, held = counts_of(strategy, 1), counts_of(strategy, 0), strategy.held
    assert before[:4].unique().numel() > 2
    shares = (new + held).double() / (new + held).sum()
    torch.testing.assert_close(strategy._log_prior, shares.log().float())
    assert torch.equal(strategy._removed, (before - held)[:4].float())
    assert (strategy._removed > 0).any()
    assert torch.equal(strategy.balance.counts, new + before)
    assert strategy._sizes == (int(before.sum()), int(new.sum()))


def test_a_balanced_sampler_has_equal_shares():
    strategy = SMALL()
    loop(strategy, data={"scenario": TAILED, "sampler": "balanced"}, options={"stop_after_task": 1}, max_epochs=1).fit()
    torch.testing.assert_close(strategy._log_prior, torch.full((7,), -math.log(7)))


# ---------------------------------------------------------------------- gradients


class Recording(DGR):
    """Keeps what a step begins with, and the gradients before and after they are reweighted."""

    def losses(self, batch, output):
        taught = self.teacher(batch.images).logits if self.teacher else None
        parts = output.features.detach(), output.logits.detach(), batch.labels, taught
        self.seen = [*getattr(self, "seen", []), parts]
        return super().losses(batch, output)

    def edit_gradients(self, batch):
        before = self._grads()
        seen, self.seen = self.seen, []
        super().edit_gradients(batch)
        record = seen, before, self._grads(), self._log_prior.clone(), self._removed.clone(), self._sizes
        self.steps = [*getattr(self, "steps", []), (self.task.index, *record)]

    def _grads(self):
        blocks = self.network.head.blocks
        whole = torch.cat([torch.cat([block.weight.grad, block.bias.grad[:, None]], dim=1) for block in blocks])
        rest = [p.grad.clone() for p in self.network.backbone.parameters()]
        return whole.double(), rest


def of_parts(seen, log_prior, removed, sizes, num_old, num_new):
    """Gradients of CE and KD for each row and its bias, means over the batches of a step, in closed form."""
    of_ce, of_kd = 0.0, 0.0
    for features, logits, labels, taught in seen:
        inputs = torch.cat([features, torch.ones(len(features), 1)], dim=1).double()
        z = logits.double()
        error = (z + log_prior.double()).softmax(1) - F.one_hot(labels, z.shape[1])
        of_ce = of_ce + error.T @ inputs / len(z) / len(seen)
        if taught is not None:
            old = z[:, :num_old].clone().requires_grad_()
            weight = 0.7 * math.sqrt(sizes[0] / sizes[1])
            (weight * distribution_aware_distillation(old, taught.double(), removed)).backward()
            of_kd = of_kd + F.pad(old.grad.T @ inputs, (0, 0, 0, num_new)) / len(seen)
    return of_ce, of_kd


@pytest.mark.parametrize(("accumulate", "inverse"), [(1, False), (2, True)])
def test_gradients_of_the_rows_are_reweighted_and_the_backbone_gets_the_plain_ones(accumulate, inverse):
    strategy = Recording(backbone=plain_net, optimizer=sgd, memory_size=40, inverse_ratio=inverse)
    data = {"scenario": TAILED, "batch_size": 32, "drop_last": True}
    made = loop(strategy, data=data, options={"stop_after_task": 2}, max_epochs=2, accumulate_grad_batches=accumulate)
    made.fit()
    sums, last, changed = None, None, 0.0
    for task, seen, (before, rest), (after, same), log_prior, removed, sizes in strategy.steps:
        num_old, num_new = [(0, 4), (4, 3), (7, 3)][task]
        if first := task != last:
            sums, last = torch.zeros(num_old + num_new, dtype=torch.float64), task
        assert len(seen) <= accumulate
        of_ce, of_kd = of_parts(seen, log_prior, removed, sizes, num_old, num_new)
        if len(seen) < accumulate:  # the last step of an epoch: Lightning divides by the number all the same
            of_ce, of_kd = of_ce * len(seen) / accumulate, of_kd * len(seen) / accumulate
        torch.testing.assert_close(before, of_ce + of_kd, rtol=1e-4, atol=1e-6)
        lengths = of_ce[:, :-1].norm(dim=1)
        sums += lengths
        alpha = torch.cat([group.min() / group for group in (sums[:num_old], sums[num_old:]) if len(group)])
        factors = alpha.clone()
        if num_old:
            ratio, gamma = sums[num_old:].mean() / sums[:num_old].mean(), math.exp(-sizes[0] / sum(sizes))
            factors[:num_old] *= min(1.0, ratio)
            factors[num_old:] *= min(1.0, gamma / ratio if inverse else gamma * ratio)
        expected = factors[:, None] * of_ce
        if num_old:
            rho = (factors * lengths).norm() / of_kd[:num_old, :-1].norm()
            if first:  # the network is its teacher: there is nothing but rounding to scale
                assert rho > 1e6
                rho = 0.0
            expected[:num_old] += rho * of_kd[:num_old]
        torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-5)
        changed = max(changed, float((after - before).abs().max()))
        assert all(torch.equal(one, other) for one, other in zip(rest, same, strict=True))
    assert changed > 0.01
    torch.testing.assert_close(strategy.balance.sums.double(), sums, rtol=1e-4, atol=1e-6)


def test_without_reweighting_the_gradients_are_plain():
    strategy = Recording(backbone=plain_net, optimizer=sgd, memory_size=40, reweight=False)
    loop(strategy, data={"scenario": TAILED}, options={"stop_after_task": 1}, max_epochs=1).fit()
    assert all(torch.equal(before[0], after[0]) for _, _, before, after, *_ in strategy.steps)
    assert not strategy.balance.sums.any()


def test_rows_that_are_not_trained_are_left_out():
    made = run(SMALL(lr_factors={"head.blocks.0.*": 0.0}), data={"scenario": TAILED}, max_epochs=1)
    assert not made.strategy.balance.sums[:4].any()
    assert (made.strategy.balance.sums[4:] > 0).all()


def test_a_head_without_biases_is_reweighted():
    made = run(SMALL(head=partial(LinearHead, bias=False)), data={"scenario": TAILED}, max_epochs=1)
    assert (made.strategy.balance.sums > 0).all()


# ---------------------------------------------------------------------- behaviour


@pytest.mark.filterwarnings("ignore:give --model.memory_size")
def test_with_equal_shares_and_without_reweighting_the_first_task_is_fine_tuning():
    data = {"scenario": ClassIncremental(tasks=1), "sampler": "balanced"}
    bare = run(SMALL(memory_size=0, reweight=False), data=data, max_epochs=1)
    plain = run(Finetune(backbone=plain_net, optimizer=sgd), data=data, max_epochs=1)
    for mine, other in zip(bare.strategy.network.parameters(), plain.strategy.network.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


def test_it_learns_a_long_tailed_stream_better_than_replay():
    data = {"scenario": LongTailed(ClassIncremental(tasks=5), imbalance=20, arrangement="shuffled")}
    options = {"backbone": partial(MLP, hidden=(64,)), "memory_size": 50}
    strategies = DGR(**options), ER(replay_by="loader", **options)
    whole, replay = (last_accuracy(run(each, data=data, max_epochs=6).matrix.R_ci) for each in strategies)
    # Measured: .83 against .48. On these data, with another seed too, the adjusted logits and the distillation alone
    # (`reweight=False`) are as good: .79 to .89, and .87 to .89 against .90 after 12 epochs.
    assert whole > replay + 0.2


def test_its_variants_conform():
    checks = ("trains", "resume", "options")
    variant = small(DGR, inverse_ratio=True, distribution_aware=False)
    check_strategy(variant, checks=checks, first_task_is_finetuning=False)


def test_domains_without_new_classes_are_refused():
    with pytest.raises(ValueError, match="DGR"):
        run(SMALL(), data={"scenario": RotatedDomains(tasks=3)}, max_epochs=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"distill_weight": -0.1}, "distill_weight is -0.1"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"inverse_ratio": True, "reweight": False}, "inverse_ratio is True, but reweight is False"),
        ({"loss_classes": "current"}, "loss_classes"),
        ({"memory_size": -1}, "size"),
        ({"head": CosineHead}, "head is CosineHead; use a LinearHead"),
    ],
)
def test_options_out_of_range_are_errors(options, words):
    with pytest.raises(ValueError, match=words):
        DGR(**options).build((1, 8, 8))
