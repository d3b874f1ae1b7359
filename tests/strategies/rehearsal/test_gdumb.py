from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from support.baselines import finetuning
from support.fakes import batch_of, normal
from support.runs import NormNet, assert_same, plain_net, run, sgd
from support.teaching import losses
from torch.nn import functional as F

from cl_lightning.data import cutmix
from cl_lightning.models import MLP, Output
from cl_lightning.strategies.rehearsal.gdumb import GDumb, greedy_balanced
from cl_lightning.strategy import PhaseOptions
from cl_lightning.stream import ClassIncremental, Online, RotatedDomains
from cl_lightning.testing import Subject, small

TWO = PhaseOptions(epochs=2)

SUBJECTS = {
    "GDumb": Subject(
        small(GDumb, memory_size=60, memory_options=TWO),
        first_task_is_finetuning=False,
        reason="it trains on the memory alone, with mixed images",
    ),
}

PUBLISHED = {
    "gdumb_cifar100": {
        "source": "drimpossible/GDumb: scripts/replicate.sh (CIFAR100, formulation B2), src/opts.py, src/main.py",
        "memory_size": 2000,
        "mix_probability": 0.5,
        "mix_alpha": 1.0,
        "backbone": "ResNet32",
        "memory_options": {
            "epochs": 256,
            "optimizer": "SGD(lr=0.05, momentum=0.9, weight_decay=1e-06)",
            "scheduler": "WarmRestarts(final=0.01)",
        },
        "data.scenario": "ClassIncremental(class_order=1993, tasks=20)",
        "data.batch_size": 16,
    },
}

SMALL = partial(GDumb, backbone=plain_net, memory_size=60, memory_options=PhaseOptions(epochs=1))


def counts(held, arriving, kept):
    labels = torch.cat([held[kept[0]], arriving[kept[1]]])
    return labels.bincount().tolist()


def test_a_class_is_stored_up_to_its_share_and_a_full_memory_drops_from_its_largest_class():
    nothing = torch.zeros(0, dtype=torch.int64)
    first = torch.tensor([0] * 10)
    kept = greedy_balanced(nothing, first, 4, 0)
    assert kept[1].tolist() == [True] * 4 + [False] * 6  # the first ones stay
    held = first[:4]
    second = torch.tensor([1, 1, 1, 2, 1])
    kept = greedy_balanced(held, second, 4, 0)
    # One of class 0 goes; class 1 has fewer than 4 // 2, so one more goes; then not; 2 is new: one of 0 or 1 goes.
    assert counts(held, second, kept) in ([2, 1, 1], [1, 2, 1])
    assert kept[1].tolist()[2:] == [False, True, False]


@pytest.mark.parametrize("seed", range(5))
def test_all_classes_with_enough_samples_have_their_share_whatever_the_order(seed):
    labels = torch.arange(100) % 7
    order = torch.randperm(100, generator=torch.Generator().manual_seed(seed))
    nothing = torch.zeros(0, dtype=torch.int64)
    kept = greedy_balanced(nothing, labels[order], 30, seed)
    found = counts(nothing, labels[order], kept)
    assert min(found) == 30 // 7
    assert max(found) <= 30 // 7 + 1
    everything = greedy_balanced(nothing, labels[order], 1000, seed)
    assert everything[1].all()


def test_new_classes_are_stored_though_there_are_more_classes_than_samples():
    nothing = torch.zeros(0, dtype=torch.int64)
    _, kept = greedy_balanced(nothing, torch.arange(9), 4, 0)
    assert int(kept.sum()) == 4
    assert kept[-1]


def test_dropped_samples_are_drawn_from_the_largest_class():
    held = torch.tensor([0] * 6 + [1] * 2)
    dropped = torch.stack([~greedy_balanced(held, torch.tensor([2]), 8, key)[0] for key in range(300)]).sum(0)
    assert dropped[6:].tolist() == [0, 0]
    assert dropped[:6].sum() == 300
    assert dropped[:6].min() > 25  # 50 each are expected


def test_images_are_mixed_with_the_given_probability_and_share():
    batch = batch_of(torch.tensor([5, 6]), images=normal(2, 1, 8, 8))
    assert GDumb(mix_probability=0.0).prepare_batch(batch) is batch
    found = GDumb(mix_probability=1.0, mix_alpha=7.0).prepare_batch(batch)
    assert torch.equal(found.images, cutmix(batch, 1.0, 7.0).images)


def test_the_loss_of_mixed_images_weighs_both_labels_by_their_pixels():
    logits, labels, partner = normal(4, 3), torch.tensor([0, 1, 2, 0]), torch.tensor([1, 2, 0, 0])
    batch = batch_of(labels, images=logits).replace(
        extra={"partner": partner, "remains": torch.full((4,), 0.8, dtype=torch.float64)}
    )
    found = GDumb().losses(batch, Output(logits, logits))
    expected = 0.8 * F.cross_entropy(logits, labels) + 0.2 * F.cross_entropy(logits, partner)
    torch.testing.assert_close(found["ce"], expected)
    torch.testing.assert_close(losses(GDumb(), logits, labels)["ce"], F.cross_entropy(logits, labels))


class Looks(Callback):
    """Notes the raw images of an epoch and the weights before each task's first step, and the memory after it."""

    def __init__(self):
        self.images, self.weights, self.memory, self.epochs = [], [], [], 0

    def on_train_start(self, trainer, strategy):
        self.images.append([])
        self.weights.append({name: value.clone() for name, value in strategy.network.state_dict().items()})

    def on_train_batch_end(self, trainer, strategy, outputs, batch, batch_idx):
        if strategy.epoch == 0:
            self.images[-1].append(batch.raw.flatten(1).clone())

    def on_train_epoch_end(self, trainer, strategy):
        self.epochs += 1

    def on_test_end(self, trainer, strategy):
        memory = strategy.memory
        self.memory.append((memory.images.flatten(1).clone(), memory.labels.clone()))


def test_each_task_trains_new_weights_on_exactly_the_memory_that_it_leaves():
    looks = Looks()
    made = run(SMALL(backbone=NormNet), looks, max_epochs=5)
    for seen, (images, labels), classes in zip(looks.images, looks.memory, (4, 7, 10), strict=True):
        used = torch.cat(seen)
        assert len(used) == len(images) <= 60
        assert torch.equal(used.unique(dim=0), images.unique(dim=0))
        assert labels.bincount().min() == 60 // classes
    first, second, third = looks.weights
    for name in ("backbone.layers.1.weight", "head.blocks.0.weight"):
        assert not torch.equal(first[name], second[name])
        assert not torch.equal(second[name], third[name])
    assert second["backbone.layers.2.running_mean"].abs().max() == 0
    assert second["backbone.layers.1.weight"].abs().max() <= 1 / 8  # of 64 pixels
    assert made.strategy.network.head.block_sizes() == [4, 3, 3]


def test_a_memory_as_large_as_the_data_holds_all_of_it():
    looks = Looks()
    made = run(SMALL(memory_size=5000), looks, max_epochs=1)
    assert len(looks.memory[-1][1]) == sum(len(part) for part in made.stream.train)


def test_a_stream_whose_samples_are_seen_once_does_not_limit_the_epochs_on_the_memory():
    looks = Looks()
    scenario = Online(ClassIncremental(sizes=[4, 3, 3]), batch_size=30)
    run(SMALL(memory_options=PhaseOptions(epochs=3)), looks, data={"scenario": scenario}, max_epochs=1)
    assert looks.epochs == 9


@pytest.mark.filterwarnings("ignore:give --model.memory_size")
def test_a_class_that_is_not_in_the_memory_is_never_predicted():
    made = run(SMALL(memory_size=6), max_epochs=1)
    strategy = made.strategy.eval()
    scores = strategy.predict(torch.zeros(2, 1, 8, 8))
    held = strategy.memory.counts(10) > 0
    assert 0 < int(held.sum()) <= 6
    assert torch.equal(scores.isinf(), ~held.expand(2, 10))


def test_the_result_of_a_task_is_that_of_its_memory_alone():
    """Another order of earlier tasks' training, or none, changes nothing: only the memory is carried along."""
    once, longer = (run(SMALL(memory_options=PhaseOptions(epochs=n)), max_epochs=1).strategy for n in (1, 2))
    assert_same(once.memory.state_dict(), longer.memory.state_dict())
    optimizer = SMALL(optimizer=sgd).memory_options.optimizer([torch.zeros(1, requires_grad=True)])
    assert optimizer.defaults["lr"] == 0.05
    assert optimizer.defaults["weight_decay"] == 1e-6


def test_domains_are_learnt_too():
    made = run(SMALL(), data={"scenario": RotatedDomains(tasks=3)}, max_epochs=1)
    assert made.matrix.learned == 3


def test_it_is_far_above_finetuning():
    common = {"backbone": partial(MLP, hidden=(64,))}
    plain = finetuning(common, data={"scenario": None, "batch_size": 32}, max_epochs=3).measures()["average_accuracy"]
    options = PhaseOptions(epochs=16)
    made = run(GDumb(**common, memory_size=100, memory_options=options), data={"scenario": None, "batch_size": 16})
    # Measured: .91 against .18.
    assert made.matrix.measures()["average_accuracy"] > plain + 0.5


@pytest.mark.parametrize(
    "options",
    [
        {"loss_classes": "current"},
        {"memory_size": 0},
        {"mix_probability": 1.5},
        {"mix_alpha": 0.0},
        {"memory_options": PhaseOptions(epochs=0)},
    ],
)
def test_wrong_options_are_errors(options):
    with pytest.raises(ValueError, match="GDumb"):
        GDumb(**options)
