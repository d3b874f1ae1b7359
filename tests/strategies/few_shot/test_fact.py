"""Forward compatible training."""

import math
from functools import partial

import pytest
import torch
from support.fakes import normal
from support.few_shot import OPTIONS, sessions
from support.runs import run
from torch.nn import functional as F

from cl_lightning.loop.results import measures
from cl_lightning.models import MLP
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.few_shot.fact import (
    FACT,
    VirtualPrototypeHead,
    VirtualPrototypes,
    mixture_losses,
    second_class_loss,
)
from cl_lightning.strategies.few_shot.proto_cosine import ProtoCosine
from cl_lightning.stream import SingleTask
from cl_lightning.testing import Subject, small

TWO = partial(MLP, hidden=(16, 16))
SUBJECTS = {
    "FACT": Subject(
        small(FACT, backbone=TWO, reserve_weight=0.1),
        first_task_is_finetuning=False,
        reason="class means take the place of the head when the session ends",
    ),
}

PUBLISHED = {
    "fact": {
        "source": "zhoudw-zdw/CVPR22-Fact: the command for CIFAR-100",
        "reserve_weight": 0.001,
        "mix_alpha": 0.5,
        "virtual_weight": 0.1,
        "scale": 16.0,
        "optimizer": "SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.0005)",
        "scheduler": "CosineOverPhase",
    },
}
DEEP = {**OPTIONS, "backbone": partial(MLP, hidden=(64, 64))}


def exp(*values):
    return sum(math.exp(value) for value in values)


def test_the_second_class_is_the_best_virtual_class_that_a_class_may_have():
    base, virtual = (
        torch.tensor([[3.0, 1.0], [0.5, 2.0], [1.0, 0.0]]),
        torch.tensor([[0.2, 0.9], [-1.0, 0.3], [4.0, 5]]),
    )
    base, virtual = base.double(), virtual.double()
    labels = torch.tensor([0, 1, 1])
    allowed = torch.tensor([[True, False], [True, True], [False, False]])
    first = math.log(exp(1.0, 0.2, 0.9)) - 0.2  # the second virtual class is larger, but not allowed
    second = math.log(exp(0.5, -1.0, 0.3)) - 0.3
    found = second_class_loss(base, virtual, labels, allowed)
    assert float(found) == pytest.approx((first + second) / 3)
    assert float(second_class_loss(base[2:], virtual[2:], labels[2:], allowed[2:])) == 0


def test_a_mixture_is_of_the_best_virtual_class_and_then_of_the_best_base_class():
    base, virtual = torch.tensor([[3.0, 1.0]]).double(), torch.tensor([[0.2, 0.9, -4.0]]).double()
    third, fourth = mixture_losses(base, virtual)
    assert float(third) == pytest.approx(math.log(exp(3, 1, 0.2, 0.9, -4)) - 0.9)
    assert float(fourth) == pytest.approx(math.log(exp(3, 1, 0.2, -4)) - 3)


@pytest.mark.parametrize(("count", "width"), [(4, 9), (9, 4), (3, 3), (0, 5)])
def test_virtual_prototypes_are_orthogonal_and_tied_to_base_classes(count, width):
    made = VirtualPrototypes(width, 3)
    made.reserve(count, 5, key=1)
    assert made.rows.shape == (count, width)
    torch.testing.assert_close(made.rows.norm(dim=1), torch.ones(count))
    if count <= width:
        torch.testing.assert_close(made.rows @ made.rows.T, torch.eye(count))
    assert all(len(set(row.tolist())) == 3 for row in made.owners)
    labels = torch.arange(5)
    assert torch.equal(made.allowed(labels).sum(0), torch.full((count,), 3))
    for label in labels.tolist():
        assert made.allowed(labels)[label].tolist() == [label in row for row in made.owners.tolist()]
    few = VirtualPrototypes(width, 3)
    few.reserve(count, 2, key=1)  # two base classes
    assert few.allowed(torch.arange(2)).all()
    restored = VirtualPrototypes(width, 3)
    restored.load_state_dict(made.state_dict())
    assert torch.equal(restored.rows, made.rows)
    other = VirtualPrototypes(width, 3)
    other.reserve(count, 5, key=2)
    assert count == 0 or not torch.equal(other.rows, made.rows)


@pytest.mark.parametrize("nearest", [2, 40])
def test_scores_mix_two_softmaxes(nearest):
    head = VirtualPrototypeHead(6, scale=3.0, virtual_weight=0.3, nearest=nearest).double()
    head.grow(4)
    means, features = normal(3, 6), normal(5, 6, seed=1)
    head.prototypes.update(means, torch.tensor([0, 1, 3]), num_classes=4)
    head.virtual.reserve(4, 3, key=0)
    found = head.classify(features)
    rows = head.virtual.rows.double()
    for row, x in zip(found, features, strict=True):
        near = F.cosine_similarity(x, rows, dim=1)
        kept = near.argsort(descending=True)[:nearest]
        by_way = torch.stack([sum(near[v] * F.cosine_similarity(rows[v], c, dim=0) for v in kept) for c in means])
        direct = F.cosine_similarity(x, means, dim=1)
        expected = 0.3 * by_way.softmax(0) + 0.7 * (3 * direct).softmax(0)
        torch.testing.assert_close(row[[0, 1, 3]].exp(), expected)
        assert row[2] == -math.inf
    head.virtual_weight = 0.0
    cosines = head.prototypes.scores(features, 4, "cosine")
    torch.testing.assert_close(head.classify(features), (3 * cosines).log_softmax(1))


class Watched(FACT):
    """Computes the terms of each step again, one row after another."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.checked = 0

    def losses(self, batch, output):
        terms = super().losses(batch, output)
        if not self.reserves():
            assert set(terms) == {"ce"}
            return terms
        known = {image.numpy().tobytes(): int(label) for image, label in zip(batch.images, batch.labels, strict=True)}
        others = batch.extra["fact.images"]
        partners = torch.tensor([known[image.numpy().tobytes()] for image in others])
        pairs = partners != batch.labels
        mixed = self.mixed_features(batch)
        rows = torch.cat([self.network.head.temporary.weight(), self.virtual.rows])
        logits = self.scale * F.cosine_similarity(mixed[:, None], rows[None], dim=2)
        k = self.network.head.temporary.num_columns
        third, fourth = mixture_losses(logits[pairs][:, :k], logits[pairs][:, k:])
        torch.testing.assert_close(terms["virtual"], self.reserve_weight * third.mean())
        torch.testing.assert_close(terms["known"], self.reserve_weight * fourth.mean())
        logits = self.scale * F.cosine_similarity(output.features[:, None], rows[None], dim=2)
        allowed = self.virtual.allowed(batch.labels)
        second = second_class_loss(logits[:, :k], logits[:, k:], batch.labels, allowed)
        torch.testing.assert_close(terms["second"], self.reserve_weight * second)
        torch.testing.assert_close(terms["ce"], F.cross_entropy(logits[:, :k], batch.labels))
        self.checked += 1
        return terms


def test_the_terms_of_a_step():
    made = sessions(Watched(**DEEP, reserve_weight=0.2, start_epoch=1), until=0, max_epochs=2)
    strategy = made.strategy
    assert strategy.virtual.rows.shape == (4, 64)
    assert strategy.checked == made.trainer.global_step / 2 > 0


def test_mixtures_are_between_the_layers_and_the_share_is_one_of_the_batch():
    found = []

    class Notes(FACT):
        def losses(self, batch, output):
            mixed = self.mixed_features(batch)
            first, last = self._adapted.base.divide()
            own, other = first(batch.images), first(batch.extra["fact.images"])
            ends = last(own), last(other)
            spread = (ends[0] - ends[1]).abs().sum()
            found.append([float((mixed - end).abs().sum() / spread) for end in ends])
            return super().losses(batch, output)

    sessions(Notes(**DEEP), until=0, max_epochs=3)
    nearer = [own < other for own, other in found]
    assert 0.2 < sum(nearer) / len(nearer) < 0.8
    assert any(min(pair) < 0.1 for pair in found)  # Beta(0.5, 0.5) is largest at 0 and 1


def test_without_later_classes_or_weights_it_is_proto_cosine():
    plain, mine = (cls(**DEEP) for cls in (ProtoCosine, partial(FACT, reserve_weight=0.0, virtual_weight=0.0)))
    both = [sessions(each, max_epochs=2) for each in (plain, mine)]
    torch.testing.assert_close(both[0].matrix.R_ci, both[1].matrix.R_ci, equal_nan=True)
    one = run(FACT(**DEEP), data={"scenario": SingleTask()}, max_epochs=1)
    assert len(one.strategy.virtual.rows) == 0


def test_a_frozen_backbone_has_the_scores_by_way_of_virtual_prototypes():
    made = sessions(FACT(backbone=partial(MLP, hidden=(8,)), adapt=False, virtual_weight=1.0))
    assert made.trainer.global_step == 0
    assert len(made.strategy.virtual.rows) == 4
    plain = sessions(ProtoCosine(backbone=partial(MLP, hidden=(8,)), adapt=False))
    assert not torch.equal(made.matrix.R_ci.nan_to_num(), plain.matrix.R_ci.nan_to_num())


def test_sessions_are_learnt():
    # Measured with seeds 0 to 2: harmonic accuracy .54 to .57, of fine-tuning 0.
    made, plain = sessions(FACT(**DEEP, reserve_weight=0.01)), sessions(Finetune(**OPTIONS))
    found = measures(made.matrix, made.stream, 2)["harmonic_accuracy"]
    assert found > measures(plain.matrix, plain.stream, 2)["harmonic_accuracy"] + 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reserve_weight": -0.1}, "FACT: reserve_weight is -0.1"),
        ({"mix_alpha": 0.0}, "FACT: mix_alpha is 0.0"),
        ({"virtual_weight": 1.5}, "FACT: virtual_weight is 1.5"),
        ({"start_epoch": -1}, "FACT: start_epoch is -1"),
        ({"nearest": 0}, "FACT: nearest is 0"),
        ({"tied": 0}, "FACT: tied is 0"),
        ({"scale": 0.0}, "FACT: scale is 0.0"),
    ],
)
def test_options_out_of_range_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        FACT(**options)


def test_a_backbone_that_cannot_be_divided_is_an_error():
    with pytest.raises(ValueError, match="to divide it, use at least 2"):
        FACT(backbone=partial(MLP, hidden=(8,))).build((1, 8, 8))
