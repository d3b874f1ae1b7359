"""Task-agnostic learning with multiple experts."""

from functools import partial

import numpy as np
import pytest
import torch
from support.baselines import finetuning
from support.fakes import batch_of, normal
from support.runs import plain_net, run, sgd
from torch.nn import functional as F

from cl_lightning.models import MLP
from cl_lightning.strategies.online.tame import TAME, LossDetector
from cl_lightning.stream import ClassIncremental
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "TAME": Subject(
        small(TAME, max_experts=3, warmup=3, window=6, deviations=1.0, selector=partial(MLP, hidden=(8,))),
        first_task_is_finetuning=False,
        reason="the network has several experts",
    ),
}
WAITS = {"TAME": {"choose_expert"}}  # whether the expert changes


def fed(losses, experts=2, **options):
    detector = LossDetector(experts, **options)
    for loss in losses:
        detector.append(0, torch.tensor(loss, dtype=torch.float64))
    return detector


def test_the_threshold_is_of_the_last_losses_of_an_expert():
    losses = normal(17).tolist()
    for count in (3, 5, 8, 17):
        detector = fed(losses[:count], window=8, warmup=3, deviations=2.5)
        last = np.array(losses[:count][-8:])
        assert float(detector.thresholds()[0]) == pytest.approx(last.mean() + 2.5 * last.std(), rel=1e-12)
        assert sorted(detector.losses[0, : min(count, 8)].tolist()) == pytest.approx(sorted(last))
        assert detector.thresholds()[1] == torch.inf
    assert fed(losses[:2], window=8, warmup=3).thresholds()[0] == torch.inf


def test_the_smoothed_loss_is_an_exponential_average_from_the_first_loss_on():
    detector, losses = LossDetector(1, smoothing=0.2), normal(6)
    expected = float(losses[0])
    for loss in losses:
        expected = 0.2 * float(loss) + 0.8 * expected
        assert float(detector.smooth(loss)) == pytest.approx(expected, rel=1e-12)
    detector.restart()
    assert float(detector.smooth(losses[2])) == pytest.approx(float(losses[2]))


def test_a_constant_loss_is_no_change_and_steady_noise_is_none_either():
    detector = fed([0.75] * 30)
    for _ in range(50):
        assert not detector.smooth(torch.tensor(0.75)) > detector.thresholds()[0]
    detector = LossDetector(1)
    changes = 0
    for loss in 2 + normal(1000):
        changes += bool(detector.smooth(loss) > detector.thresholds()[0])
        detector.append(0, loss)
    assert changes == 0


@pytest.mark.parametrize("jump", [4.0, 6.0, 20.0])
def test_a_jump_is_seen_after_the_smallest_number_of_batches_that_the_average_needs(jump):
    losses = torch.tensor([1.0, -1.0] * 50).double()  # mean 0, deviation 1
    detector = fed(losses.tolist())
    detector.smooth(torch.tensor(0.0))
    needed = next(n for n in range(1, 100) if jump * (1 - 0.8**n) > 3)
    for n in range(1, needed + 1):
        assert bool(detector.smooth(torch.tensor(jump)) > detector.thresholds()[0]) == (n == needed)


def strategy_with(*, experts=3, **options):
    torch.manual_seed(0)
    strategy = TAME(backbone=plain_net, max_experts=experts, warmup=2, window=4, **options)
    strategy.build((1, 2, 2))
    strategy.network.grow(3)
    return strategy.double()


BATCH = batch_of(torch.tensor([0, 2, -1, 1]), images=normal(4, 1, 2, 2))


def test_losses_of_a_batch_are_the_mean_cross_entropies_of_its_labelled_samples():
    strategy = strategy_with()
    found = strategy.batch_losses(BATCH, [0, 2])
    for loss, number in zip(found, (0, 2), strict=True):
        logits = strategy.network.members[number](BATCH.images).logits
        kept = BATCH.labels >= 0
        torch.testing.assert_close(loss, F.cross_entropy(logits[kept], BATCH.labels[kept]).detach())


def choosing(losses, *, used, current=0, experts=3, smoothed=0.0):
    """A strategy after a batch on which the experts have these losses; each has had losses 1 and 3 before."""
    strategy = strategy_with(experts=experts, smoothing=0.5)
    for number in range(used):
        strategy.network.choose(number)
        for loss in (1.0, 3.0):  # threshold 2 + 3 * 1
            strategy.detector.append(number, torch.tensor(loss))
    strategy.network.choose(current)
    strategy.detector.smooth(torch.tensor(smoothed))
    strategy.batch_losses = lambda batch, numbers: torch.tensor([losses[n] for n in numbers]).double()
    strategy.choose_expert(BATCH)
    return strategy


def test_below_its_threshold_an_expert_stays_and_its_loss_is_kept():
    strategy = choosing([10.0, 0.0, 0.0], used=3, smoothed=0.0)  # smoothed: 5, not above 5
    assert strategy.network.current == 0
    assert strategy.detector.counts.tolist() == [3, 2, 2]
    assert 10.0 in strategy.detector.losses[0]


@pytest.mark.parametrize(
    ("losses", "used", "current", "chosen", "experts"),
    [
        ([10.1, 4.0, 3.0], 3, 0, 2, 3),  # the smallest of those below their threshold
        ([10.1, 4.0, 5.1], 3, 0, 1, 3),
        ([10.1, 5.1, 9.0], 2, 0, 2, 3),  # none: a new one
        ([5.1, 10.1, 0.0], 2, 1, 2, 3),
        ([10.1, 5.1, 9.0], 3, 0, 1, 3),  # none, and no place for a new one
        ([4.9, 10.1], 2, 1, 0, 2),
    ],
)
def test_above_its_threshold_another_expert_follows(losses, used, current, chosen, experts):
    strategy = choosing(losses, used=used, current=current, experts=experts, smoothed=0.0)
    assert strategy.network.current == chosen
    assert strategy.network.used == max(used, chosen + 1)
    assert strategy.detector.counts.tolist() == [2] * used + [0] * (experts - used)  # the loss is not appended
    assert float(strategy.detector.smooth(torch.tensor(7.0))) == 7.0  # started again


def test_a_change_leaves_the_expert_also_if_its_last_loss_is_small_and_thresholds_are_their_own():
    assert choosing([4.0, 4.5, 9.0], used=3, smoothed=10.0).network.current == 1  # smoothed: 7
    strategy = choosing([4.0, 4.0, 9.0], used=3, smoothed=0.0)
    for loss in (4.0, 6.0, 4.0, 6.0):
        strategy.detector.append(2, torch.tensor(loss))  # threshold 8
    strategy.batch_losses = lambda batch, numbers: torch.tensor([[20.0, 6.0, 7.0][n] for n in numbers]).double()
    strategy.choose_expert(BATCH)
    assert strategy.network.current == 2


def test_only_the_expert_and_the_selector_are_trained_also_with_momentum_and_decay():
    strategy = strategy_with()
    strategy.network.choose(1)
    optimizer = sgd(list(strategy.trainable()))
    before = {name: value.clone() for name, value in strategy.state_dict().items()}
    strategy._drawn = batch_of(torch.tensor([0, 1]), images=normal(2, 1, 2, 2, seed=3))
    strategy._drawn.extra["expert"] = torch.tensor([0, 1])
    strategy._trained = {strategy.network.members[1], strategy.selector}
    terms = strategy.losses(BATCH, strategy.network(BATCH.images))
    logits = strategy.selector(strategy._drawn.images)[:, :2]
    torch.testing.assert_close(terms["selector"], F.cross_entropy(logits, torch.tensor([0, 1])))
    sum(terms.values()).backward()
    assert all(parameter.grad is not None for parameter in strategy.trainable())
    strategy.edit_gradients(BATCH)
    optimizer.step()
    changed = {
        name.rsplit(".", 3)[0] for name, value in strategy.state_dict().items() if not torch.equal(value, before[name])
    }
    assert {name.split(".")[2] if "members" in name else name.split(".")[0] for name in changed} == {"1", "selector"}
    assert strategy._trained == set()


def test_the_selector_chooses_the_expert_that_answers():
    strategy = strategy_with().eval()
    for number in (1, 2):
        strategy.network.choose(number)
    images = normal(40, 1, 2, 2)
    chosen = strategy.selector(images).argmax(1)
    assert len(chosen.unique()) > 1
    expected = torch.stack(
        [strategy.network.members[e].classify(x[None])[0] for e, x in zip(chosen.tolist(), images, strict=True)]
    )
    torch.testing.assert_close(strategy.predict(images), expected)


# ---------------------------------------------------------------------- behaviour


def test_each_task_gets_an_expert_and_old_tasks_are_kept():
    # Measured: .82 with 181 of the 200 stored samples of the expert of their task, of fine-tuning .28.
    options = {"data": {"scenario": ClassIncremental(sizes=[4, 3, 3]), "batch_size": 16}, "max_epochs": 2}
    made = run(TAME(backbone=plain_net, memory_size=200, warmup=15, window=30, max_experts=4), **options)
    plain = finetuning({"backbone": plain_net}, **options)
    assert made.strategy.network.used == 3
    labels, experts = made.strategy.memory.labels, made.strategy.memory.fields["expert"]
    tasks = (labels >= 4).long() + (labels >= 7)
    assert float((tasks == experts).double().mean()) > 0.8
    assert made.matrix.measures()["average_accuracy"] > plain.measures()["average_accuracy"] + 0.3


def test_options_out_of_range_are_errors():
    for options, message in (
        ({"smoothing": 0.0}, r"LossDetector: smoothing is 0.0; it must be in \(0, 1\]"),
        ({"deviations": -1.0}, "LossDetector: deviations is -1"),
        ({"window": 0}, "LossDetector: window is 0"),
        ({"window": 10, "warmup": 11}, r"LossDetector: warmup is 11; it must be in \[1, 10\]"),
        ({"max_experts": 0}, "TAME: max_experts is 0"),
        ({"freeze_backbone": True}, "TAME: freeze_backbone is True"),
        ({"loss_classes": "task"}, "TAME: loss_classes is 'task'"),
    ):
        with pytest.raises(ValueError, match=message):
            TAME(**options)
