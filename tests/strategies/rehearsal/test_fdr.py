"""Function Distance Regularisation."""

import copy
import math
from functools import partial

import pytest
import torch
from support.baselines import finetuning
from support.fakes import batch_of, normal
from support.runs import NormNet, assert_same_run, plain_net, run, sgd
from torch.nn import functional as F

from cl_lightning.batch import Draw, join
from cl_lightning.models import Output
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.rehearsal.fdr import FDR, function_distance
from cl_lightning.stream import ClassIncremental
from cl_lightning.testing import Subject, small

SUBJECTS = {"FDR": Subject(small(FDR)), "FDR, two steps": Subject(small(FDR, two_steps=True, replay_size=7))}

PUBLISHED = {
    "fdr_cifar10": {
        "source": "aimagelab/mammoth: models/config/fdr.yaml, seq-cifar10 with a memory of 500; models/fdr.py",
        "memory_size": 500,
        "distance_weight": 1.0,
        "two_steps": True,
        "backbone": "ResNet18",
        "optimizer": "SGD(lr=0.03)",
        "data.scenario": "ClassIncremental(tasks=5)",
        "data.batch_size": 32,
        "data.transforms": ["RandomCrop(padding=4)", "RandomHorizontalFlip()"],
        "trainer.max_epochs": 50,
    },
}

FIVE = {"scenario": ClassIncremental(tasks=5), "batch_size": 32}
SMALL = partial(FDR, backbone=plain_net, optimizer=sgd, memory_size=60)
NAN = float("nan")


def plain_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


# ---------------------------------------------------------------------- the maths


def test_the_distance_is_the_norm_of_the_difference_of_two_vectors_of_probabilities():
    # softmax(0, 0) = (.5, .5), softmax(0, log 3) = (.25, .75): the distance is .25 sqrt 2; the other row is far away
    logits = torch.tensor([[0.0, 0.0], [400.0, 0.0]], dtype=torch.float64)
    stored = torch.tensor([[0.0, math.log(3)], [0.0, 400.0]], dtype=torch.float64)
    assert float(function_distance(logits[:1], stored[:1])) == pytest.approx(0.25 * math.sqrt(2))
    assert float(function_distance(logits, stored)) == pytest.approx((0.25 + 1) * math.sqrt(2) / 2)
    assert float(function_distance(logits[:0], stored[:0])) == 0.0


def test_classes_that_were_unknown_have_had_the_probability_0():
    logits = torch.tensor([[0.0, 0.0, math.log(2)]], dtype=torch.float64)  # .25, .25, .5
    for stored in ([[1.0, 1.0, NAN]], [[1.0, 1.0]]):  # .5, .5, 0
        found = float(function_distance(logits, torch.tensor(stored, dtype=torch.float64)))
        assert found == pytest.approx(math.sqrt(2 * 0.25**2 + 0.5**2))


def test_its_gradient_is_bounded_and_0_where_nothing_has_changed():
    logits = normal(5, 4).requires_grad_()
    same = function_distance(logits, logits.detach() + 3)
    assert float(same) < 1e-15
    (gradient,) = torch.autograd.grad(function_distance(logits, logits.detach().clone()), logits)
    assert not gradient.any()
    stored = normal(5, 4, seed=1)
    (gradient,) = torch.autograd.grad(function_distance(logits, stored), logits)
    p = logits.detach().softmax(1)
    unit = F.normalize(p - stored.softmax(1), dim=1)
    torch.testing.assert_close(gradient, (p * (unit - (p * unit).sum(1, keepdim=True))) / 5)


def test_the_terms_are_means_over_their_parts():
    logits, stored = normal(5, 4), normal(2, 4, seed=1)
    stream, replay = batch_of(torch.tensor([0, 1, 2])), batch_of(torch.tensor([3, 0]))
    joint = join({"stream": stream, "replay": replay.replace(extra={"logits": stored}, weight=0.5)})
    found = FDR(distance_weight=0.3).losses(joint, Output(logits, logits))
    gap = (logits[3:].softmax(1) - stored.softmax(1)).square().sum(1).sqrt()
    torch.testing.assert_close(found["ce"], F.cross_entropy(logits[:3], stream.labels))
    torch.testing.assert_close(found["distance"], 0.3 * 0.5 * gap.mean())  # of two processes, this one has few
    assert found.keys() == {"ce", "distance"}


# ---------------------------------------------------------------------- steps and memory


class Follows(FDR):
    """Takes each step of task 1 again by hand, on a copy of the network, and notes how far the two are apart."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.gaps, self.kept, self.expected = [], {}, None

    def replay(self, batch, *salt):
        self.drawn = super().replay(batch, *salt)
        return self.drawn

    def prepare_batch(self, batch):
        before = copy.deepcopy(self.network)
        joint = super().prepare_batch(batch)
        if self.task.index == 1:
            self.expected = self.by_hand(before, batch, self.drawn)
        return joint

    def by_hand(self, network, batch, replay):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        losses = [
            lambda: F.cross_entropy(network(batch.images).logits, batch.labels),
            lambda: 0.7 * function_distance(network(replay.images).logits, replay.extra["logits"]),
        ]
        for each in losses if self.two_steps else [lambda: losses[0]() + losses[1]()]:
            optimizer.zero_grad()
            each().backward()
            optimizer.step()
        return network

    def after_step(self, batch):
        super().after_step(batch)
        if self.expected is not None and self.task.index == 1:
            pairs = zip(self.network.parameters(), self.expected.parameters(), strict=True)
            self.gaps.append(max(float((mine - other).abs().max()) for mine, other in pairs))

    def end_task(self, task):
        super().end_task(task)
        for key, logits in zip(self.memory.keys.tolist(), self.memory.fields["logits"], strict=True):
            known = logits[~logits.isnan()]
            assert torch.equal(self.kept.setdefault(key, known), known)  # never changes once written


@pytest.mark.parametrize("two_steps", [False, True])
def test_a_run_takes_one_step_of_the_sum_or_two_steps(two_steps):
    strategy = Follows(
        backbone=plain_net, optimizer=plain_sgd, memory_size=60, distance_weight=0.7, two_steps=two_steps
    )
    run(strategy, max_epochs=1)
    assert len(strategy.gaps) > 5
    assert max(strategy.gaps) < 1e-6


def test_both_forward_passes_of_two_steps_count_for_the_running_statistics():
    made = run(FDR(backbone=NormNet, optimizer=plain_sgd, memory_size=60, two_steps=True), max_epochs=1)
    steps = [len(loader) for loader in (made.stream.train[t] for t in range(3))]
    batches = [-(-samples // 64) for samples in steps]
    expected = batches[0] + 2 * (batches[1] + batches[2])
    assert int(made.strategy.network.backbone.layers[2].num_batches_tracked) == expected


def test_the_memory_has_equal_numbers_of_each_task_with_the_outputs_at_its_end():
    made = run(SMALL(), max_epochs=1)
    memory = made.strategy.memory
    assert memory.tasks.bincount().tolist() == [20, 20, 20]
    last = memory.tasks == 2
    scaled = made.datamodule.normalize(memory.images[last], Draw.of(int(last.sum()), 0))
    with torch.no_grad():
        torch.testing.assert_close(memory.fields["logits"][last], made.strategy.network(scaled).logits)
    assert (~memory.fields["logits"].isnan()).sum(1).tolist() == [
        made.stream.tasks[task].num_seen for task in memory.tasks.tolist()
    ]


@pytest.mark.parametrize("options", [{"distance_weight": 0.0}, {"memory_size": 0}])
@pytest.mark.parametrize("two_steps", [False, True])
def test_without_its_term_or_its_memory_it_is_finetuning_to_the_bit(options, two_steps):
    made = run(SMALL(two_steps=two_steps, **options), max_epochs=1)
    assert_same_run(made, run(Finetune(backbone=plain_net, optimizer=sgd), max_epochs=1))


# ---------------------------------------------------------------------- runs


def test_it_is_far_above_finetuning():
    options = {"backbone": plain_net, "optimizer": plain_sgd}
    finetune = finetuning(options, max_epochs=2, data=FIVE).measures()["average_accuracy"]
    for two_steps in (False, True):
        made = run(FDR(memory_size=100, two_steps=two_steps, **options), max_epochs=2, data=FIVE)
        # Measured: .74 and .80 against .20.
        assert made.matrix.measures()["average_accuracy"] > finetune + 0.3


@pytest.mark.parametrize("options", [{"distance_weight": -0.1}, {"replay_size": 0}, {"memory_size": -1}])
def test_wrong_options_are_errors(options):
    with pytest.raises(ValueError, match=r"FDR|Memory"):
        FDR(**options)
