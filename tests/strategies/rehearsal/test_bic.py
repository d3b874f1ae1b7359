import warnings
from functools import partial

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch
from lightning.pytorch import Callback
from support.baselines import finetuning
from support.fakes import normal, task_of
from support.runs import NormNet, assert_same, plain_net, run, sgd
from support.teaching import losses
from torch.nn import functional as F

from cl_lightning.batch import Draw, mix
from cl_lightning.data import RandomCrop
from cl_lightning.models import MLP, LinearHead, Network
from cl_lightning.strategies.rehearsal.bic import BiC, correct, fit_pair, held_out
from cl_lightning.strategy import PhaseOptions
from cl_lightning.stream import ClassIncremental, RotatedDomains
from cl_lightning.testing import Subject, check_strategy, small

SLOW = "both solvers pass the suite"

SUBJECTS = {
    "BiC": Subject(small(BiC)),
    "BiC sgd": Subject(small(BiC, solver="sgd", bias_options=PhaseOptions(epochs=2))),
}

PUBLISHED = {
    "bic_cifar100": {
        "source": "LAMDA-CL/PyCIL: models/bic.py, utils/data.py (jitter 63/255); mammoth: 250 epochs of stage 2",
        "memory_size": 2000,
        "solver": "sgd",
        "bias_options": {"epochs": 250, "optimizer": "Adam(lr=0.01)"},
        "backbone": "ResNet32",
        "optimizer": "SGD(lr=0.1, momentum=0.9, weight_decay=0.0002)",
        "scheduler": "MultiStepLR(gamma=0.1, milestones=[60, 100, 140])",
        "data.scenario": "ClassIncremental(class_order=1993, tasks=10)",
        "data.batch_size": 128,
        "data.transforms": ["RandomCrop(padding=4)", "RandomHorizontalFlip()", "ColorJitter(brightness=0.247)"],
        "trainer.max_epochs": 170,
    },
}

SGD = {"solver": "sgd", "bias_options": PhaseOptions(epochs=2)}
SMALL = partial(BiC, backbone=plain_net, optimizer=sgd, memory_size=60, **SGD)


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


def objective(pair, logits, labels, num_new, ridge):
    """Of stage 2, in numpy."""
    new = np.arange(logits.shape[1]) >= logits.shape[1] - num_new
    q = np.where(new, pair[0] * logits + pair[1], logits)
    loss = scipy.special.logsumexp(q, axis=1) - q[np.arange(len(q)), labels]
    return loss.mean() + ridge / 2 * ((pair[0] - 1) ** 2 + pair[1] ** 2)


def minimum(logits, labels, num_new, ridge):
    """By a simplex search, which uses no gradient."""
    arguments = (logits.double().numpy(), labels.numpy(), num_new, ridge)
    options = {"xatol": 1e-10, "fatol": 1e-15, "maxiter": 4000, "maxfev": 4000}
    return torch.from_numpy(
        scipy.optimize.minimize(objective, [1.0, 0.0], arguments, method="Nelder-Mead", options=options).x
    )


def drawn_labels(true):
    """Drawn from the softmax of the logits, so that these are calibrated."""
    gumbel = -(-torch.rand(true.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).log()).log()
    return (true + gumbel).argmax(1)


@pytest.mark.parametrize(("scale", "shift", "ridge"), [(1.5, 2.0, 1e-4), (0.7, -1.0, 0.3), (3.0, 8.0, 1e-9)])
def test_the_exact_pair_is_the_minimum_that_scipy_finds(scale, shift, ridge):
    true = 2 * normal(500, 6)
    labels = drawn_labels(true)
    biased = torch.cat([true[:, :4], scale * true[:, 4:] + shift], 1)
    found = fit_pair(biased, labels, 2, ridge=ridge)
    torch.testing.assert_close(found, minimum(biased, labels, 2, ridge), rtol=0, atol=1e-6)
    if ridge == 1e-9:  # alpha' (s z + c) + beta' = alpha z + beta
        best = minimum(true, labels, 2, 0.0)
        expected = torch.stack([best[0] / scale, best[1] - best[0] * shift / scale])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_exact_pair_is_finite_where_a_threshold_separates_the_samples():
    logits = torch.tensor([[0.0, 1.0], [0.5, 3.0]], dtype=torch.float64)  # an old sample, then a new one
    labels = torch.tensor([0, 1])
    for ridge in (1e-2, 1e-4):
        found = fit_pair(logits, labels, 1, ridge=ridge)
        torch.testing.assert_close(found, minimum(logits, labels, 1, ridge), rtol=0, atol=1e-5)
    assert found.abs().max() < 20


@pytest.mark.parametrize(("start", "large"), [(5.0, False), (30.0, True)])
def test_newton_converges_from_logits_far_from_calibrated(start, large):
    logits = torch.cat([normal(60, 8), (50.0 if large else 5.0) * normal(60, 4, seed=2) + start], 1)
    labels = torch.randint(12, (60,), generator=torch.Generator().manual_seed(0))
    found = fit_pair(logits.float(), labels, 4, ridge=1e-4)
    arguments = (logits.float().double().numpy(), labels.numpy(), 4, 1e-4)
    search = scipy.optimize.minimize(objective, found.numpy(), arguments, method="Nelder-Mead", tol=1e-12)
    assert objective(found.numpy(), *arguments) < search.fun + 1e-12  # the minimum is the only one


def test_without_bias_the_exact_pair_is_close_to_one_and_zero():
    true = 2 * normal(4000, 6)
    found = fit_pair(true, drawn_labels(true), 2, ridge=1e-4)
    torch.testing.assert_close(found, pair(1.0, 0.0), rtol=0, atol=0.1)  # but for the chance in the labels


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
    strategy.network = Network(MLP((1, 2, 2), hidden=()), LinearHead(4))
    for size in (2, 1, 2):
        strategy.network.head.grow(size)
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


class Held(BiC):
    """Notes the labels and the corrected logits of the held-out share before the exact solution, and the pair."""

    def __init__(self, **options):
        super().__init__(**options)
        self.noted = {}

    def _solve(self):
        data, task = self.data.module, self.task
        indices = torch.as_tensor(data.stream.train[task.index].copy())
        new = torch.as_tensor(data.stream.columns_of(data.samples(train=True).labels[indices.numpy()]))
        labels = torch.cat([new, self.memory.labels])
        mask = held_out(labels, self._count(task), mix(self.seed, 0xB1C, task.index))
        chosen = list(self.passes.batches(indices=indices[mask[: len(indices)]]))
        raw = self.memory.images[mask[len(indices) :]]
        images = torch.cat(
            [
                *(batch.images for batch in chosen),
                self.data.finish(chosen[0].replace(raw=raw, draw=Draw.of(len(raw), 0))).images,
            ]
        )
        logits = correct(self.network(images).logits.double(), list(self.pairs.values), [4, 3, 3][: task.index + 1])
        assert torch.equal(self.pairs.values[-1], torch.tensor([1.0, 0.0]))
        super()._solve()
        self.noted[task.index] = (logits.detach(), labels[mask], self.pairs.values[-1].detach().double())


def test_the_pair_of_a_task_is_the_minimum_on_its_unaugmented_held_out_share():
    made = run(
        Held(backbone=NormNet, optimizer=sgd, memory_size=60, held_out=0.5, bias_ridge=1e-2),
        data={"transforms": [RandomCrop(2)]},
        max_epochs=2,
    )
    assert [task.epochs for task in made.meter.tasks] == [{"train": 2}] * 3
    assert set(made.strategy.noted) == {1, 2}
    for logits, labels, found in made.strategy.noted.values():
        counts = labels.bincount()
        assert counts.min() == counts.max()
        assert not found.equal(pair(1.0, 0.0))
        torch.testing.assert_close(found, minimum(logits, labels, 3, 1e-2), rtol=1e-4, atol=1e-4)


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
    run(
        BiC(backbone=NormNet, optimizer=sgd, memory_size=60, solver="sgd", bias_options=PhaseOptions(epochs=3)),
        watch,
        max_epochs=1,
    )
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
    strategy = BiC(backbone=NormNet, optimizer=sgd, memory_size=60, solver="sgd", bias_options=PhaseOptions(epochs=3))
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


def test_the_second_stage_can_use_the_epochs_of_the_loop_and_a_warning_of_exemplars_is_not_given():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        made = run(SMALL(bias_options=PhaseOptions(epochs=5)), options={"phase_epochs": {"bias": 2}}, max_epochs=1)
    assert [task.epochs for task in made.meter.tasks] == [{"train": 1}, *[{"train": 1, "bias": 2}] * 2]
    assert not [warning for warning in told if "exemplars" in str(warning.message)]


def test_predictions_match_corrected_logits():
    strategy = run(SMALL(), max_epochs=1).strategy.eval()
    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = strategy.network(images).logits
        expected = correct(logits, list(strategy.pairs.values), [4, 3, 3])
        assert torch.equal(strategy.predict(images), expected)
        assert not torch.equal(expected, logits)


@pytest.mark.parametrize("options", [{}, {"solver": "exact", "bias_options": PhaseOptions(epochs=100)}])
@pytest.mark.filterwarnings("ignore:give --model.memory_size")
def test_a_share_that_is_not_there_is_reported_and_the_bias_stays(options):
    with pytest.warns(UserWarning, match="give a larger memory_size; at task . a class has fewer than two"):
        made = run(SMALL(memory_size=7, **options), max_epochs=1)
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
                BiC(backbone=plain_net, memory_size=100),
                BiC(backbone=plain_net, memory_size=100, solver="sgd", bias_options=PhaseOptions(epochs=1)),
            )
        ]
        plain = finetuning({"backbone": plain_net}, max_epochs=3, data=five).measures()["average_accuracy"]
    assert made[0] > made[1] + 0.05
    assert made[0] > plain + 0.5


def test_domains_without_new_classes_have_no_second_stage():
    made = run(SMALL(distill_weight=0.5), data={"scenario": RotatedDomains(tasks=3)}, max_epochs=1)
    assert made.matrix.learned == 3
    assert len(made.strategy.pairs.values) == 1
    with pytest.raises(ValueError, match="distill_weight"):
        run(SMALL(), data={"scenario": RotatedDomains(tasks=3)}, max_epochs=1)


def test_it_resumes_at_every_place_of_both_stages():
    check_strategy(small(BiC, **SGD), checks=("resume",), every_place=True)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_classes": "current"},
        {"temperature": 0.0},
        {"distill_weight": -0.5},
        {"held_out": 0.0},
        {"held_out": 1.0},
        {"solver": "sgd", "bias_options": PhaseOptions(epochs=0)},
        {"bias_options": PhaseOptions(epochs=5)},
        {"solver": "newton"},
        {"bias_ridge": 0.0},
        {"memory_size": -1},
    ],
)
def test_wrong_options_are_errors(options):
    with pytest.raises(ValueError, match=r"BiC|Memory"):
        BiC(**options)
