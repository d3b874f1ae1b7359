import warnings
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from support.fakes import normal, task_of
from support.runs import NormNet, assert_same, plain_net, run, sgd
from support.teaching import losses
from torch.nn import functional as F

from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.rehearsal.bic import BiC, correct, held_out
from cl_lightning.strategy import PhaseOptions
from cl_lightning.stream import ClassIncremental, RotatedDomains
from cl_lightning.testing import Subject, check_strategy, small

SUBJECTS = {
    "BiC": Subject(small(BiC, bias_options=PhaseOptions(epochs=2))),
}

SMALL = partial(BiC, backbone=plain_net, optimizer=sgd, memory_size=60, bias_options=PhaseOptions(epochs=2))


def pair(alpha, beta):
    return torch.tensor([alpha, beta], dtype=torch.float64)


# ---------------------------------------------------------------------- the maths


def test_a_pair_of_one_and_zero_is_the_plain_model_to_the_bit():
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(correct(logits, [torch.tensor([1.0, 0.0])] * 2, [3, 2]), logits)


def test_logits_of_each_task_are_scaled_and_shifted_by_its_pair():
    logits = normal(6, 5)
    expected = torch.cat([logits[:, :3], 0.5 * logits[:, 3:] - 2.0], 1)
    found = correct(logits, [pair(1.0, 0.0), pair(0.5, -2.0)], [3, 2])
    torch.testing.assert_close(found, expected)
    # The teacher knows fewer classes.
    torch.testing.assert_close(correct(logits[:, :3], [pair(2.0, 1.0), pair(0.5, -2.0)], [3, 2]), 2 * logits[:, :3] + 1)


def test_the_order_within_old_and_within_new_classes_stays():
    logits = normal(50, 6)
    corrected = correct(logits, [pair(1.0, 0.0), pair(0.3, -5.0)], [4, 2])
    for part in (slice(0, 4), slice(4, 6)):
        assert torch.equal(logits[:, part].argsort(1), corrected[:, part].argsort(1))


@pytest.mark.parametrize(("scale", "shift"), [(1.5, 2.0), (0.7, -1.0), (3.0, 0.5)])
def test_the_second_stage_recovers_what_was_done_to_the_new_logits(scale, shift):
    true = 2 * normal(4000, 6)  # calibrated: the labels are drawn from their softmax
    gumbel = -(-torch.rand(4000, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).log()).log()
    labels = (true + gumbel).argmax(1)

    def fitted(logits):
        newest = pair(1.0, 0.0).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [newest], max_iter=200, tolerance_grad=1e-13, tolerance_change=1e-15, line_search_fn="strong_wolfe"
        )

        def loss():
            optimizer.zero_grad()
            value = F.cross_entropy(correct(logits, [pair(1.0, 0.0), newest], [4, 2]), labels)
            value.backward()
            return value

        optimizer.step(loss)
        return newest.detach()

    best = fitted(true)  # (1, 0), but for the chance in the labels
    torch.testing.assert_close(best, pair(1.0, 0.0), rtol=0, atol=0.1)
    biased = torch.cat([true[:, :4], scale * true[:, 4:] + shift], 1)
    found = fitted(biased)  # alpha' (s z + c) + beta' = alpha z + beta
    torch.testing.assert_close(
        found, torch.stack([best[0] / scale, best[1] - best[0] * shift / scale]), rtol=1e-5, atol=1e-5
    )


def test_equally_many_of_each_class_are_held_out_but_never_all_of_one():
    labels = torch.tensor([0] * 10 + [1] * 10 + [2] * 3 + [3] * 2 + [5])
    marks = held_out(labels, 4, key=7)
    assert labels[marks].bincount(minlength=6).tolist() == [4, 4, 2, 1, 0, 0]
    assert torch.equal(marks, held_out(labels, 4, key=7))
    assert not torch.equal(marks, held_out(labels, 4, key=8))


def test_each_sample_of_a_class_is_held_out_equally_often():
    labels = torch.tensor([0, 1] * 5)
    times = torch.stack([held_out(labels, 2, key) for key in range(2000)]).double().mean(0)
    torch.testing.assert_close(times, torch.full_like(times, 0.4), rtol=0, atol=0.04)


def test_the_loss_is_that_of_corrected_logits_and_of_the_corrected_teacher():
    strategy = BiC()
    strategy.network = torch.nn.Module()
    strategy.network.head = type("Head", (torch.nn.Module,), {"block_sizes": lambda self: [2, 1, 2]})()
    strategy.phase = strategy.phases(task_of())[0]
    for _ in range(3):
        strategy.pairs.grow()
    strategy.pairs.values[1].data = pair(0.5, -1.0)
    logits, taught, labels = normal(4, 5), normal(4, 3, seed=1), torch.tensor([0, 3, 4, 2])
    q, t = logits.clone(), taught.clone()
    q[:, 2], t[:, 2] = 0.5 * q[:, 2] - 1, 0.5 * t[:, 2] - 1
    found = losses(strategy, logits, labels, taught)
    torch.testing.assert_close(found["ce"], 2 / 5 * F.cross_entropy(q, labels))
    distill = -((t / 2).softmax(1) * (q[:, :3] / 2).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(found["distill"], 3 / 5 * distill)


# ---------------------------------------------------------------------- the two stages


class Watch(Callback):
    """Notes, by task and phase, the samples that are trained on, and the strategy's state at the end."""

    def __init__(self):
        self.seen, self.labels, self.states = {}, {}, {}

    def on_train_batch_end(self, trainer, strategy, outputs, batch, batch_idx):
        if strategy.epoch == 0:
            place = (strategy.task.index, strategy.phase.name)
            # A sample of the memory is told by its pixels.
            new = {("new", index) for index in batch.indices.tolist() if index >= 0}
            old = {("old", bytes(raw.flatten().tolist())) for raw in batch.raw[batch.indices < 0]}
            self.seen.setdefault(place, set()).update(new | old)
            self.labels.setdefault(place, []).append(batch.labels)

    def on_train_end(self, trainer, strategy):
        state = {name: value.detach().clone() for name, value in strategy.state_dict().items()}
        self.states[strategy.task.index, strategy.phase.name] = state


def test_samples_of_the_second_stage_are_balanced_and_unseen_in_the_first():
    watch = Watch()
    made = run(SMALL(held_out=0.2), watch, max_epochs=1)
    assert set(watch.seen) == {(0, "train"), (1, "train"), (1, "bias"), (2, "train"), (2, "bias")}
    for task, old, new, count in ((1, 4, 3, 3), (2, 7, 3, 1)):  # 20 % of 60 exemplars, over the old classes
        first, second = watch.seen[task, "train"], watch.seen[task, "bias"]
        assert not first & second
        assert torch.cat(watch.labels[task, "bias"]).bincount().tolist() == [count] * (old + new)
        assert len({sample for sample in first | second if sample[0] == "new"}) == len(made.stream.train[task])
        assert sum(len(labels) for labels in watch.labels[task, "train"]) == (
            len(made.stream.train[task]) + old * (60 // old) - count * (old + new)
        )


def test_the_second_stage_changes_the_newest_pair_and_nothing_else():
    watch = Watch()
    run(BiC(backbone=NormNet, optimizer=sgd, memory_size=60, bias_options=PhaseOptions(epochs=3)), watch, max_epochs=1)
    for task in (1, 2):
        before, after = watch.states[task, "train"], watch.states[task, "bias"]
        changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
        assert changed == {f"pairs.values.{task}"}
        assert torch.equal(before[f"pairs.values.{task}"], torch.tensor([1.0, 0.0]))
    earlier, later = watch.states[1, "bias"], watch.states[2, "train"]
    assert torch.equal(earlier["pairs.values.1"], later["pairs.values.1"])
    assert later["network.backbone.layers.2.running_mean"].ne(earlier["network.backbone.layers.2.running_mean"]).any()


def test_validation_in_the_second_stage_leaves_the_network_as_it_is_to_the_bit():
    validated, modes = [], []

    class Validated(Watch):
        def on_train_batch_start(self, trainer, strategy, batch, batch_idx):
            if strategy.phase.name == "bias":
                modes.append(any(module.training for module in strategy.network.modules()))

        def on_validation_end(self, trainer, strategy):
            validated.append((strategy.task.index, strategy.phase.name))

    watch = Validated()
    strategy = BiC(backbone=NormNet, optimizer=sgd, memory_size=60, bias_options=PhaseOptions(epochs=3))
    run(strategy, watch, data={"val_fraction": 0.2}, max_epochs=2)
    for task in (1, 2):
        assert validated.count((task, "bias")) == 3
        before, after = (
            {name: value for name, value in watch.states[task, phase].items() if name.startswith("network.")}
            for phase in ("train", "bias")
        )
        assert "network.backbone.layers.2.running_mean" in before
        assert_same(before, after)
        assert not torch.equal(watch.states[task, "bias"][f"pairs.values.{task}"], torch.tensor([1.0, 0.0]))
    assert modes
    assert not any(modes)


def test_epochs_of_the_second_stage_can_be_those_of_the_loop_and_nothing_is_said_of_exemplars_before():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        made = run(SMALL(bias_options=PhaseOptions(epochs=5)), options={"phase_epochs": {"bias": 2}}, max_epochs=1)
    assert [task.epochs for task in made.meter.tasks] == [{"train": 1}, *[{"train": 1, "bias": 2}] * 2]
    assert not [warning for warning in told if "exemplars" in str(warning.message)]


def test_predictions_are_those_of_corrected_logits():
    strategy = run(SMALL(), max_epochs=1).strategy.eval()
    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = strategy.network(images).logits
        expected = correct(logits, list(strategy.pairs.values), [4, 3, 3])
        assert torch.equal(strategy.predict(images), expected)
        assert not torch.equal(expected, logits)


def test_a_share_that_is_not_there_is_told_and_the_bias_stays():
    with pytest.warns(UserWarning, match="give a larger memory_size; at task . a class has fewer than two"):
        made = run(SMALL(memory_size=7), max_epochs=1)
    # Seven classes have one exemplar each before the last task, and four had one each before that.
    assert_same(
        {str(i): value.detach() for i, value in enumerate(made.strategy.pairs.values)},
        {str(i): torch.tensor([1.0, 0.0]) for i in range(3)},
    )


def test_the_second_stage_lifts_what_the_first_leaves():
    five = {"scenario": ClassIncremental(tasks=5), "batch_size": 32}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = [
            run(strategy, max_epochs=3, data=five).matrix.measures()["average_accuracy"]
            for strategy in (
                BiC(backbone=plain_net, memory_size=100, bias_options=PhaseOptions(epochs=60)),
                BiC(backbone=plain_net, memory_size=100, bias_options=PhaseOptions(epochs=1)),
                Finetune(backbone=plain_net),
            )
        ]
    assert made[0] > made[1] + 0.05
    assert made[0] > made[2] + 0.5


def test_domains_without_new_classes_have_no_second_stage():
    made = run(SMALL(distill_weight=0.5), data={"scenario": RotatedDomains(tasks=3)}, max_epochs=1)
    assert made.matrix.learned == 3
    assert len(made.strategy.pairs.values) == 1
    with pytest.raises(ValueError, match="distill_weight"):
        run(SMALL(), data={"scenario": RotatedDomains(tasks=3)}, max_epochs=1)


def test_it_resumes_at_every_place_of_both_stages():
    check_strategy(small(BiC, bias_options=PhaseOptions(epochs=2)), checks=("resume",), every_place=True)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_classes": "current"},
        {"temperature": 0.0},
        {"distill_weight": -0.5},
        {"held_out": 0.0},
        {"held_out": 1.0},
        {"bias_options": PhaseOptions(epochs=0)},
        {"memory_size": -1},
    ],
)
def test_wrong_options_are_told(options):
    with pytest.raises(ValueError, match=r"BiC|Memory"):
        BiC(**options)
