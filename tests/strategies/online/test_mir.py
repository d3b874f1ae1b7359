"""Maximally Interfered Retrieval."""

import copy
from types import SimpleNamespace

import pytest
import torch
from support.baselines import finetuning
from support.fakes import batch_of, normal
from support.runs import NormNet, plain_net, run
from torch.nn import functional as F

from cl_lightning.models import Output
from cl_lightning.strategies.online.mir import MIR
from cl_lightning.strategies.rehearsal.er import ER
from cl_lightning.stream import ClassIncremental, Online, Subset
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "MIR": Subject(
        small(MIR, candidates=28, replay_size=10),
        first_task_is_finetuning=False,
        reason="the memory is replayed from the second step on",
    ),
}

PUBLISHED = {
    "mir_cifar10": {
        "source": "Aljundi et al. 2019, sec. 4; optimass/Maximally_Interfered_Retrieval: defaults for Split-CIFAR-10",
        "candidates": 50,
        "candidates_of": "earlier",
        "memory_size": 500,
        "replay_size": 10,
        "optimizer": "SGD(lr=0.1)",
        "data.scenario": "Online(base=ClassIncremental(tasks=5), batch_size=10)",
        "data.batch_size": 10,
    },
}
FIVE = {"scenario": Online(ClassIncremental(tasks=5), batch_size=10)}
FEW = {"scenario": Online(Subset(ClassIncremental(tasks=5), per_class=12), batch_size=10)}


def plain_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


class Linear(torch.nn.Module):
    """A linear classifier in float64 that gives an output of a network."""

    def __init__(self, features=6, classes=4):
        super().__init__()
        self.weight = torch.nn.Parameter(normal(classes, features, seed=3))

    def forward(self, images):
        features = images.flatten(1)
        return Output(features, features @ self.weight.T)


def batch(images, labels):
    return batch_of(torch.tensor(labels), images=images)


def scored(network, stream, samples, lr, monkeypatch):
    strategy = MIR(virtual_lr=lr)
    object.__setattr__(strategy, "network", network)
    monkeypatch.setattr(type(strategy.data), "finish", lambda self, batch: batch)
    monkeypatch.setattr(
        type(strategy), "classification_loss", lambda self, output, batch: F.cross_entropy(output.logits, batch.labels)
    )
    strategy.__dict__["_trainer"] = SimpleNamespace(optimizers=[])
    return strategy.scores(stream, samples)


def test_the_score_is_the_increase_of_the_loss_by_a_gradient_step(monkeypatch):
    network = Linear()
    stream, samples = batch(normal(5, 6, seed=1), [0, 1, 1, 2, 0]), batch(normal(7, 6, seed=2), [3, 2, 1, 0, 3, 3, 1])
    found = scored(network, stream, samples, 0.3, monkeypatch)

    def losses(weight):
        logits = samples.images @ weight.T
        return logits.exp().sum(1).log() - logits[torch.arange(7), samples.labels]

    weight = network.weight.detach()
    p = (stream.images @ weight.T).softmax(1) - F.one_hot(stream.labels, 4)
    gradient = p.T @ stream.images / 5
    torch.testing.assert_close(found, losses(weight - 0.3 * gradient) - losses(weight))
    assert network.weight.grad is None
    assert torch.equal(network.weight, weight)


def test_for_a_small_step_it_is_the_product_of_the_gradients(monkeypatch):
    network = Linear()
    stream, samples = batch(normal(5, 6, seed=1), [0, 1, 1, 2, 0]), batch(normal(7, 6, seed=2), [3, 2, 1, 0, 3, 3, 1])

    def gradients(part):
        p = (part.images @ network.weight.detach().T).softmax(1) - F.one_hot(part.labels, 4)
        return p[:, :, None] * part.images[:, None]

    products = -(gradients(samples) * gradients(stream).mean(0)).sum((1, 2))
    errors = []
    for lr in (1e-2, 1e-3):
        found = scored(network, stream, samples, lr, monkeypatch)
        errors.append(float((found / lr - products).abs().max() / products.abs().max()))
    assert errors[0] < 0.05
    assert errors[1] < 0.15 * errors[0]


def test_without_a_step_no_sample_interferes(monkeypatch):
    stream, samples = batch(normal(5, 6, seed=1), [0, 1, 1, 2, 0]), batch(normal(7, 6, seed=2), [3, 2, 1, 0, 3, 3, 1])
    assert (scored(Linear(), stream, samples, 0.0, monkeypatch) == 0).all()


class Watched(MIR):
    """Notes the scores of the candidates, and what is replayed."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen = []

    def scores(self, batch, samples):
        before = {name: value.clone() for name, value in self.network.state_dict().items()}
        scores = super().scores(batch, samples)
        assert all(torch.equal(value, before[name]) for name, value in self.network.state_dict().items())
        assert self.network.training
        self.seen.append((scores, samples))
        return scores

    def draw(self, batch, *salt, tasks=None):
        drawn = super().draw(batch, *salt, tasks=tasks)
        if drawn is not None:
            scores, samples = self.seen[-1]
            chosen = scores.argsort(descending=True, stable=True)[: len(drawn)]
            assert torch.equal(samples.raw[chosen], drawn.raw)
            assert torch.equal(samples.labels[chosen], drawn.labels)
            assert len(drawn) == min(batch.draw.total, len(samples))
        return drawn


def test_the_candidates_of_the_largest_scores_are_replayed_and_batch_statistics_stay():
    strategy = run(Watched(backbone=NormNet, optimizer=plain_sgd, memory_size=60, candidates=20), data=FEW).strategy
    assert max(len(samples) for _, samples in strategy.seen) == 20
    assert any(scores.std() > 0 for scores, _ in strategy.seen)


def test_with_as_many_candidates_as_replayed_samples_it_replays_what_er_does():
    drawn = []

    class Notes(MIR):
        def scores(self, batch, samples):
            scores, self.virtual_lr = super().scores(batch, samples), 0.1  # of the optimizer
            assert torch.equal(super().scores(batch, samples), scores)
            self.virtual_lr = None
            return scores

        def draw(self, batch, *salt, tasks=None):
            mine, other = super().draw(batch, *salt, tasks=tasks), ER.draw(self, batch, *salt, tasks=tasks)
            if mine is not None:
                drawn.append([sorted(part.raw.flatten(1).sum(1).tolist()) for part in (mine, other)])
            return mine

    run(Notes(backbone=plain_net, optimizer=plain_sgd, memory_size=60, candidates=10, replay_size=10), data=FEW)
    assert drawn
    assert all(mine == other for mine, other in drawn)


def test_candidates_of_earlier_tasks_only():
    tasks = []

    class Notes(MIR):
        def draw(self, batch, *salt, tasks_=tasks, tasks=None):
            drawn = super().draw(batch, *salt, tasks=tasks)
            tasks_.append((self.task.index, None if drawn is None else int(drawn.tasks.max())))
            return drawn

    run(Notes(backbone=plain_net, optimizer=plain_sgd, memory_size=60, candidates_of="earlier"), data=FEW)
    assert all(newest is None for task, newest in tasks if task == 0)
    assert all(newest < task for task, newest in tasks if task > 0)


def test_it_is_above_fine_tuning_on_an_online_stream():
    # Measured with seeds 0 to 2: last accuracy .80 to .85, of fine-tuning .19.
    mine = run(MIR(backbone=plain_net, optimizer=plain_sgd, memory_size=100), data=FIVE).matrix
    plain = finetuning({"backbone": plain_net, "optimizer": plain_sgd}, data=FIVE)
    assert mine.measures()["average_accuracy"] - plain.measures()["average_accuracy"] > 0.3


def test_wrong_options_are_refused():
    for options, message in (
        ({"replay_by": "loader"}, "MIR: replay_by is 'loader', but each step chooses what it replays; use 'step'"),
        ({"candidates": 0}, "MIR: candidates is 0; it must be at least 1"),
        ({"virtual_lr": -1}, "MIR: virtual_lr is -1; it must be at least 0"),
        ({"candidates_of": "some"}, "MIR: candidates_of is 'some'"),
        ({"candidates": 5, "replay_size": 6}, "MIR: replay_size is 6, of 5 candidates; use at most as many"),
    ):
        with pytest.raises(ValueError, match=message):
            MIR(**options)
    assert copy.deepcopy(MIR()).traits.task_free
    assert MIR().reduction == "sum"
