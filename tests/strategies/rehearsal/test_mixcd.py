"""mix-cd: rehearsal of collateral damage."""

import pytest
import torch
from support.baselines import finetuning
from support.runs import NormNet, plain_net, run, sgd
from torch.nn import functional as F

from cl_lightning.batch import Draw
from cl_lightning.strategies.rehearsal.mixcd import DamageBins, MixCD, loss_quantiles
from cl_lightning.stream import ClassIncremental, Subset
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "MixCD": Subject(small(MixCD, replay_size=10, refresh_every=3, num_bins=4, partition="both")),
}
FEW = {"scenario": Subset(ClassIncremental(sizes=[4, 3, 3]), per_class=24), "batch_size": 16}


def filled(bins, rates, counts=None):
    damage = DamageBins()
    damage.reset(torch.tensor(bins), len(rates))
    damage.rates = torch.tensor(rates, dtype=torch.float64)
    if counts is not None:
        damage.counts = torch.tensor(counts, dtype=torch.float64)
    return damage


def test_rates_are_smoothed_shares_of_damaged_samples_and_counts_decay():
    damage = filled([0, 1, 2], [1.0, 1.0, 1.0], [[8.0, 2.0], [0.0, 0.0], [3.0, 3.0]])
    damage.refresh(1.0, 0.9)
    torch.testing.assert_close(damage.rates, torch.tensor([3 / 10, 1 / 2, 4 / 5], dtype=torch.float64))
    torch.testing.assert_close(damage.counts, torch.tensor([[7.2, 1.8], [0, 0], [2.7, 2.7]], dtype=torch.float64))
    damage.counts = torch.tensor([[8.0, 2.0], [0.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    damage.refresh(0.0, 1.0)
    assert damage.rates.tolist() == [0.25, 1.0, 0.0]


def test_bins_are_drawn_by_their_size_times_their_rate():
    damage = filled([0, 0, 1, 1, 1, -1, 2], [0.5, 0.1, 0.2])
    torch.testing.assert_close(damage.shares(), torch.tensor([1.0, 0.3, 0.2], dtype=torch.float64) / 1.5)
    assert filled([0, 0, 1, 2], [0.0, 0.0, 0.0]).shares().tolist() == [0.5, 0.25, 0.25]
    assert filled([0, 0, 1, 2], [0.0, 0.4, 0.0]).shares().tolist() == [0, 1, 0]
    assert filled([-1, -1], [1.0]).shares().tolist() == [0]


def test_with_exact_rates_the_expected_damage_is_at_least_that_of_uniform_rehearsal():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        sizes = torch.randint(1, 9, (5,), generator=generator)
        rates = torch.rand(5, generator=generator, dtype=torch.float64)
        damage = filled(torch.arange(5).repeat_interleave(sizes).tolist(), rates.tolist())
        uniform = (sizes * rates).sum() / sizes.sum()
        assert (damage.shares() * rates).sum() >= uniform


def test_the_first_draw_has_these_probabilities_and_wrong_samples_come_last():
    damage, count = filled([0, 0, 1, 1, 1, -1, 2], [0.5, 0.1, 0.2]), 4000
    firsts = torch.cat([damage.draw(1, key) for key in range(count)]).bincount(minlength=7) / count
    expected = torch.tensor([0.5, 0.5, 0.1, 0.1, 0.1, 0.0, 0.2]) / 1.5
    torch.testing.assert_close(firsts, expected, atol=0.03, rtol=0)
    assert sorted(damage.draw(6, 3).tolist()) == [0, 1, 2, 3, 4, 6]
    assert damage.draw(7, 3)[-1] == 5
    undamaged = filled([0, 1, -1, 1], [0.0, 0.5])
    assert all(undamaged.draw(4, key).tolist()[2:] == [0, 2] for key in range(20))
    equal = filled([0, 0, 1, 2], [0.3, 0.3, 0.3])
    firsts = torch.cat([equal.draw(1, key) for key in range(count)]).bincount(minlength=4) / count
    torch.testing.assert_close(firsts, torch.full((4,), 0.25), atol=0.03, rtol=0)


def test_quantiles_are_of_the_chosen_losses_alone():
    losses = torch.tensor([5.0, 0.1, 3.0, 9.0, 1.0, 2.0, 4.0])
    chosen = torch.tensor([True, True, True, False, True, True, True])
    assert loss_quantiles(losses, chosen, 3).tolist() == [2, 0, 1, -1, 0, 1, 2]
    assert loss_quantiles(losses, chosen, 1).tolist() == [0, 0, 0, -1, 0, 0, 0]
    assert loss_quantiles(losses, torch.zeros(7, dtype=torch.bool), 3).tolist() == [-1] * 7


class Watched(MixCD):
    """Recounts the replayed and the damaged samples of each bin from the terms of each step."""

    def __init__(self, **kwargs):
        super().__init__(**{"backbone": NormNet, "optimizer": sgd, **kwargs})
        self.recount, self.refreshes = torch.zeros(0, 2), []

    def losses(self, batch, output):
        if "replay" in batch.parts:
            samples, of_part, _ = batch.part("replay", output)
            for row, scores, label in zip(self._rows, of_part.logits, samples.labels, strict=True):
                assert torch.equal(self.memory.labels[row], label)
                if (place := int(self.damage.bins[row])) >= 0:
                    self.recount[place, 0] += 1
                    self.recount[place, 1] += float(scores.max() > scores[label])
        return super().losses(batch, output)

    def after_step(self, batch):
        super().after_step(batch)
        if len(self.memory):
            if self.trainer.global_step % self.refresh_every == 0:
                seen, damaged = self.recount.unbind(1)
                torch.testing.assert_close(self.damage.rates, (damaged + self.prior) / (seen + 2 * self.prior))
                self.recount *= self.decay
                self.refreshes.append(self.task.index)
            torch.testing.assert_close(self.damage.counts, self.recount)

    def end_task(self, task):
        super().end_task(task)
        self.recount = torch.zeros_like(self.damage.counts)
        images = self.memory.images
        with torch.no_grad():
            batch = self.memory.at(torch.arange(len(images)), Draw.of(len(images), 0))
            logits = self.network(self.data.finish(batch).images).logits
        right = logits.argmax(1) == self.memory.labels
        assert torch.equal(self.damage.bins >= 0, right)
        losses = F.cross_entropy(logits, self.memory.labels, reduction="none")
        expected = loss_quantiles(losses, right, self.num_bins)
        if self.partition != "loss":
            expected = self.memory.labels * (self.num_bins if self.partition == "both" else 1) + (
                expected if self.partition == "both" else 0
            )
        assert torch.equal(self.damage.bins[right], expected[right])


@pytest.mark.parametrize("partition", ["loss", "class", "both"])
def test_counts_equal_a_recount_and_bins_are_of_the_network_before_the_task(partition):
    made = run(Watched(memory_size=60, replay_size=6, refresh_every=3, num_bins=3, partition=partition), data=FEW)
    strategy = made.strategy
    assert {1, 2} == set(strategy.refreshes)
    columns = {"loss": 3, "class": 10, "both": 30}[partition]
    assert strategy.damage.rates.shape == (columns,)
    assert strategy.damage.counts.sum() == 0
    assert len(strategy.memory) == 60


def test_it_is_above_fine_tuning_and_replays_more_damaged_samples_than_uniform_draws():
    # Measured with 4 epochs and seed 0: last accuracy .91 by classes or both, .83 by the loss, uniform draws .86;
    # damaged were .34 of the replayed samples, of uniform draws .31.
    shares = {}

    class Notes(MixCD):
        def losses(self, batch, output):
            terms = super().losses(batch, output)
            if self._damaged is not None:
                known = self.damage.bins[self._rows] >= 0
                shares.setdefault(self.refresh_every, []).append(self._damaged[known].double())
            return terms

    options = {"backbone": plain_net, "memory_size": 5000, "replay_size": 8, "partition": "both"}
    data = {"batch_size": 32}
    mine = run(Notes(refresh_every=4, **options), data=data, max_epochs=3).matrix.measures()["average_accuracy"]
    run(Notes(refresh_every=10**9, **options), data=data, max_epochs=3)
    plain = finetuning({"backbone": plain_net}, data=data, max_epochs=3).measures()["average_accuracy"]
    damaged, uniform = (float(torch.cat(part).mean()) for part in shares.values())
    assert mine > plain + 0.2
    assert damaged > uniform + 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partition": "domain"}, "partition is 'domain'"),
        ({"num_bins": 0}, "num_bins is 0"),
        ({"prior": -1.0}, "prior is -1"),
        ({"decay": 1.5}, "decay is 1.5"),
        ({"refresh_every": 0}, "refresh_every is 0"),
        ({"loss_classes": "current"}, "loss_classes is 'current'"),
    ],
)
def test_wrong_options_are_errors(options, message):
    with pytest.raises(ValueError, match=f"MixCD: {message}"):
        MixCD(**options)
