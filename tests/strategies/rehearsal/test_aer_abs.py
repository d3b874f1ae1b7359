"""Alternate Experience Replay with Asymmetric Balanced Sampling."""

import pytest
import torch
from support.noise import wrong_labels_held
from support.runs import NormNet, assert_same_run, plain_net, run, sgd
from torch.nn import functional as F

from cl_lightning.batch import Draw
from cl_lightning.strategies.online.er_ace import ERACE
from cl_lightning.strategies.rehearsal.aer_abs import AERABS, accepted, eviction_probabilities, remaining
from cl_lightning.stream import ClassIncremental, NoisyLabels, Subset
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "AERABS": Subject(
        small(AERABS, memory_size=20, drop_share=0.5),
        first_task_is_finetuning=False,
        reason="the memory is replayed from the second epoch on",
    ),
}
SLOW = "each step also evaluates the batch and the memory without augmentation"
FEW = {"scenario": NoisyLabels(Subset(ClassIncremental(sizes=[4, 3, 3]), per_class=24), rate=0.25), "batch_size": 16}


def plain_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def test_the_current_task_evicts_large_losses_and_earlier_tasks_small_ones():
    losses = torch.tensor([1.0, 3.0, 4.0, 0.5, 2.5, 1.5, 0.5])
    current = torch.tensor([True, True, False, False, False, False, False])
    found = eviction_probabilities(losses, current)
    # 2 of 7 samples of the current task, in proportion 1 : 3; then 4 - l = 0, 3.5, 1.5, 2.5, 3.5 of 11
    first, second = 2 / 7, 5 / 7
    expected = [first / 4, first * 3 / 4, 0, second * 3.5 / 11, second * 1.5 / 11, second * 2.5 / 11, second * 3.5 / 11]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("current", [[True] * 5, [False] * 5, [True, False, True, False, False]])
@pytest.mark.parametrize("loss", [0.0, 2.0])
def test_equal_losses_are_evicted_uniformly(current, loss):
    found = eviction_probabilities(torch.full((5,), loss), torch.tensor(current))
    torch.testing.assert_close(found, torch.full((5,), 0.2, dtype=torch.float64))


def test_samples_are_evicted_one_after_the_other_with_their_probabilities():
    p, count = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64), 4000
    stay = torch.cat([remaining(p, 1, Draw.of(1, key)) for key in range(count)])
    torch.testing.assert_close(stay.bincount(minlength=4) / count, 1 - p.float(), atol=0.03, rtol=0)
    pairs = torch.stack([remaining(p, 2, Draw.of(1, key)) for key in range(count)])
    both = float((pairs == torch.tensor([2, 3])).all(1).double().mean())
    assert both == pytest.approx(0.5 * 0.3 / 0.5 + 0.3 * 0.5 / 0.7, abs=0.03)
    assert remaining(p, 3, Draw.of(1, 5)).tolist() == [3]
    assert remaining(p, 4, Draw.of(1, 5)).tolist() == []


class Watched(AERABS):
    """Notes the weights at the first step of each epoch and at its end, what is replayed, and what is offered."""

    def __init__(self, **kwargs):
        super().__init__(**{"backbone": NormNet, "optimizer": sgd, **kwargs})
        self.starts, self.ends, self.steps, self.insertions, self.momenta = {}, {}, [], [], {}
        self.refreshed = set()

    def _state(self):
        return {name: value.clone() for name, value in self.network.state_dict().items()}

    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch, batch_idx)
        if batch_idx == 0:
            self.starts[self.task.index, self.epoch] = self._state()
            self.momenta[self.task.index, self.epoch] = len(self.trainer.optimizers[0].state)

    def losses(self, batch, output):
        self.steps.append((self.task.index, self.epoch, "replay" in batch.parts))
        return super().losses(batch, output)

    def after_step(self, batch):
        self.checked = False
        super().after_step(batch)
        self.ends[self.task.index, self.epoch] = self._state()
        if not self.checked:
            self._check_losses()

    def _check_losses(self):
        """The losses in memory of the drawn samples are their present ones."""
        self.checked = True
        if self._drawn is not None:
            rows, samples = self._drawn
            self.network.eval()
            logits = self.network(self.data.finish(samples).images).logits
            self.network.train()
            expected = -logits.log_softmax(1)[torch.arange(len(rows)), samples.labels]
            torch.testing.assert_close(self.memory.fields["losses"][rows], expected)
            self.refreshed.add(self._forgets)

    def offer(self, batch, **extra):
        self._check_losses()
        before = self.memory.images.clone()
        super().offer(batch, **extra)
        self.insertions.append((self.task.index, self.epoch, batch, self.losses_of(batch, self._present), before))


def test_epochs_alternate_and_a_learning_epoch_begins_where_the_last_one_ended():
    made = run(Watched(memory_size=30), data=FEW, max_epochs=5).strategy
    learning = {(task, epoch) for task, epoch, replay in made.steps if replay}
    assert learning == {(task, epoch) for task in range(3) for epoch in (1, 3, 4)}
    assert {place[:2] for place in made.insertions} == {(task, epoch) for task in range(3) for epoch in (0, 2)}
    for task in range(3):
        for before, after in ((-1, 1), (1, 3), (3, 4)):
            start = made.starts[task, after]
            ends = {**made.ends, (task, -1): made.starts[task, 0] if task else made.ends[0, 0]}
            end = ends[task, before]  # the first learning epoch of the run continues the forgetting epoch
            assert all(torch.equal(value, end[name]) for name, value in start.items())  # and running statistics
        assert any(not torch.equal(value, made.ends[task, 2][name]) for name, value in made.starts[task, 3].items())
        assert (made.momenta[task, 1] > 0, made.momenta[task, 3]) == (task == 0, 0)
        assert made.momenta[task, 2] > 0
    assert made.refreshed == {False, True}
    assert not made.kept
    assert len(made.memory) == 30


def test_the_samples_of_the_lowest_losses_enter_a_memory_with_room():
    made = run(Watched(memory_size=500, drop_share=0.7), data=FEW, max_epochs=2).strategy
    held = 0
    for _, epoch, batch, losses, before in made.insertions:
        assert epoch == 0
        offered = {16: 5, 8: 2}[len(batch)]  # 0.3 of it, rounded
        lowest = losses.argsort(stable=True)[:offered].sort().values
        assert torch.equal(made.memory.images[held : held + offered], batch.raw[lowest])
        assert torch.equal(made.memory.labels[held : held + offered], batch.labels[lowest])
        assert len(before) == held
        held += offered
    assert held == len(made.memory) == int(made.memory.num_seen)


def test_losses_of_a_batch_are_over_its_classes_and_of_plain_images():
    strategy = run(Watched(memory_size=10), data=FEW, max_epochs=2).strategy
    *_, batch, _, _ = strategy.insertions[-1]
    present = torch.zeros(10, dtype=torch.bool).index_fill(0, batch.labels, True)
    logits = strategy.network.eval()(strategy.data.finish(batch).images).logits.detach()
    p = logits.exp() * present
    expected = -(p[torch.arange(len(batch)), batch.labels] / p.sum(1)).log()
    torch.testing.assert_close(strategy.losses_of(batch, present), expected)
    torch.testing.assert_close(strategy.losses_of(batch), F.cross_entropy(logits, batch.labels, reduction="none"))


def test_a_full_memory_accepts_as_a_reservoir():
    chosen = torch.cat([accepted(6, 10, 8, Draw.of(1, key)) for key in range(4000)])
    expected = 8 / torch.arange(11, 17)
    torch.testing.assert_close(chosen.bincount(minlength=6) / 4000, expected, atol=0.03, rtol=0)
    assert len(accepted(50, 0, 3, Draw.of(1, 0))) == 3
    memory = run(AERABS(memory_size=12, drop_share=0.0, backbone=plain_net), data=FEW, max_epochs=2).strategy.memory
    assert (len(memory), int(memory.num_seen)) == (12, 240)
    assert (memory.tasks < 2).any()


def test_without_alternation_and_selection_it_is_er_ace_to_the_bit():
    options = {"memory_size": 300, "backbone": NormNet, "optimizer": sgd, "update_memory": "first"}
    expected = run(ERACE(**options), data=FEW, max_epochs=1)
    assert_same_run(run(AERABS(alternate=False, drop_share=0.0, **options), data=FEW, max_epochs=1), expected)
    assert_same_run(run(AERABS(drop_share=0.0, **options), data=FEW, max_epochs=1), expected)  # a single epoch


class StoppedError(Exception):
    pass


class Stops(Watched):
    """Ends the phase in the forgetting epoch 2."""

    def after_step(self, batch):
        super().after_step(batch)
        if self.epoch == 2:
            assert self.kept
            self.end_phase(self.phase)
            raise StoppedError


def test_a_phase_that_stops_in_a_forgetting_epoch_ends_with_the_weights_before_it():
    strategy = Stops(memory_size=30)
    with pytest.raises(StoppedError):
        run(strategy, data=FEW, max_epochs=4)
    assert not strategy.kept
    assert all(torch.equal(value, strategy.ends[0, 1][name]) for name, value in strategy._state().items())


def test_with_noisy_labels_the_memory_is_cleaner_and_the_accuracy_higher():
    # Measured, seeds 0 to 2: wrong labels in memory .09 to .17, of ER-ACE .42 to .44; last accuracy .74, .67, .69, of
    # ER-ACE .49, .65, .57. Half of the epochs count: without noise, or with batches of 64, ER-ACE is better.
    data = {"scenario": NoisyLabels(ClassIncremental(tasks=5), rate=0.4), "batch_size": 32}
    options = {"memory_size": 200, "backbone": plain_net, "optimizer": plain_sgd}
    mine, other = (run(cls(**options), data=data, max_epochs=6) for cls in (AERABS, ERACE))
    assert wrong_labels_held(mine) < wrong_labels_held(other) - 0.15
    accuracies = [made.matrix.measures()["average_accuracy"] for made in (mine, other)]
    assert accuracies[0] > accuracies[1] + 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_share": 1.0}, "drop_share is 1.0"),
        ({"drop_share": -0.1}, "drop_share is -0.1"),
        ({"update_memory": "last"}, "update_memory is 'last', but nothing enters the memory in the last epoch"),
        ({"policy": object()}, "policy is given, but the memory is chosen by losses"),
    ],
)
def test_wrong_options_are_errors(options, message):
    with pytest.raises(ValueError, match=f"AERABS: {message}"):
        AERABS(**options)
