"""Online Prototype Learning."""

import math
from functools import partial

import pytest
import torch
from support.baselines import finetuning
from support.fakes import batch_of, normal
from support.runs import NormNet, plain_net, run
from torch.nn import functional as F

from cl_lightning.batch import Draw
from cl_lightning.models import Output
from cl_lightning.strategies.online.onpro import (
    OnPro,
    instance_contrast,
    pair_probabilities,
    prototype_equilibrium,
    random_view,
    rotated_copies,
)
from cl_lightning.stream import Blurry, ClassIncremental, Online, Subset
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "OnPro": Subject(
        small(OnPro, memory_size=20, replay_size=5, rotations=4, projection_size=8, mix_probability=0.7),
        first_task_is_finetuning=False,
        reason="contrastive losses are added to the cross-entropy",
    ),
}
SLOW = "each step runs the network on 16 rotations of two views"

PUBLISHED = {
    "onpro_cifar10": {
        "source": "weilllllls/OnPro: main.py (defaults for CIFAR-10), multi_runs.py, train.py",
        "memory_size": 200,
        "replay_size": 64,
        "replay_per_class": 7,
        "rotations": 16,
        "similarity_weight": 0.5,
        "mix_probability": 0.6,
        "uniform_share": 0.75,
        "projection_size": 128,
        "optimizer": "Adam(betas=[0.9, 0.99], lr=0.0005, weight_decay=0.0001)",
        "data.scenario": "Online(base=ClassIncremental(tasks=5), batch_size=10)",
        "data.batch_size": 10,
        "trainer.precision": "16-mixed",
    },
}

FIVE = {"scenario": Online(ClassIncremental(tasks=5), batch_size=10)}
FEW = {"scenario": Online(Subset(ClassIncremental(tasks=5), per_class=12), batch_size=10)}


def plain_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


OPTIONS = {
    "backbone": plain_net,
    "optimizer": plain_sgd,
    "memory_size": 60,
    "replay_size": 16,
    "rotations": 4,
    "projection_size": 12,
    "transforms": [],
}


# ---------------------------------------------------------------------- the terms


def unit(*shape, seed=0):
    return F.normalize(normal(*shape, seed=seed), dim=1)


@pytest.mark.parametrize("of_memory", [False, True])
def test_instances_are_contrasted_with_their_other_view_and_their_group(of_memory):
    z, u, groups = unit(10, 3), unit(10, 3, seed=1), torch.tensor([0, 1, 1, 2, 0] * 2)
    s = [[0.7 * float(z[i] @ z[j] + z[i] @ u[j]) / 0.4 for j in range(10)] for i in range(10)]
    expected = 0.0
    for i in range(10):
        others = range(10) if of_memory else [j for j in range(10) if j != i]
        log_q = {j: s[i][j] - math.log(sum(math.exp(s[i][k]) for k in others)) for j in others}
        group = [j for j in range(10) if groups[j] == groups[i]]
        of_group = sum(log_q[j] for j in group if j in log_q) / len(group)
        expected -= (of_group if of_memory else log_q[(i + 5) % 10] + 2 * of_group) / 10
    found = instance_contrast(z, u, groups, weight=0.7, temperature=0.4, of_memory=of_memory)
    assert float(found) == pytest.approx(expected)


def test_prototypes_of_two_views_are_contrasted():
    first, second, labels = unit(7, 4), unit(7, 4, seed=1), torch.tensor([4, 1, 1, 0, 4, 4, 0])
    means = [view[labels == c].mean(0) for view in (first, second) for c in (0, 1, 4)]
    p = [mean / mean.norm() for mean in means]
    expected = 0.0
    for i in range(6):
        shares = {j: math.exp(float(p[i] @ p[j]) / 0.3) for j in range(6) if j != i}
        expected -= math.log(shares[(i + 3) % 6] / sum(shares.values())) / 6
    assert float(prototype_equilibrium(first, second, labels, 6, 0.3)) == pytest.approx(expected)
    aligned = prototype_equilibrium(first, first, labels, 6, 0.3)
    assert aligned < prototype_equilibrium(first, second, labels, 6, 0.3)


def test_a_single_prototype_has_no_contrast_and_no_samples_have_no_gradient():
    first, second = unit(3, 4).requires_grad_(), unit(3, 4, seed=1)
    assert prototype_equilibrium(first, second, torch.full((3,), 2), 5) == 0
    rows = unit(3, 4).requires_grad_()
    prototype_equilibrium(rows[:0], second[:0], torch.zeros(0, dtype=torch.int64), 5).backward()
    assert torch.equal(rows.grad, torch.zeros_like(rows))


def test_pairs_of_close_prototypes_are_probable():
    prototypes = normal(5, 3)
    prototypes[2] = 0
    found = pair_probabilities(prototypes)
    pairs = [(a, b) for a in range(5) for b in range(a + 1, 5) if 2 not in (a, b)]
    shares = [math.exp(1 / float((prototypes[a] - prototypes[b]).norm())) for a, b in pairs]
    for (a, b), share in zip(pairs, shares, strict=True):
        assert float(found[a, b]) == pytest.approx(share / sum(shares))
    assert float(found.sum()) == pytest.approx(1)
    assert int((found > 0).sum()) == 6
    for few in (torch.zeros(4, 3), torch.eye(4)[:, :3] * torch.tensor([1.0, 0, 0])):
        assert pair_probabilities(few).sum() == 0
    assert pair_probabilities(torch.ones(2, 3))[0, 1] == 1  # the same place


def test_the_copies_are_all_rotations_of_the_image_and_of_its_halves():
    images = torch.rand(2, 3, 6, 6)
    copies = rotated_copies(images, 16).view(16, 2, 3, 6, 6)
    assert torch.equal(copies[0], images)
    assert torch.equal(rotated_copies(images, 1), images)
    assert torch.equal(rotated_copies(images, 4), torch.cat([torch.rot90(images, k, (2, 3)) for k in range(4)]))
    left, right = images[..., :3], images[..., 3:]
    turned = [torch.rot90(half, 2, (2, 3)) for half in (left, right)]
    for halves in ((left, right), (turned[0], right), (left, turned[1]), tuple(turned)):
        for k in range(4):
            wanted = torch.rot90(torch.cat(halves, dim=3), k, (2, 3))
            assert sum(torch.equal(copy, wanted) for copy in copies) == 1
    with pytest.raises(ValueError, match="images of 5 pixels have no halves; resize them"):
        rotated_copies(torch.rand(1, 1, 5, 5), 16)


def test_the_random_view_has_the_numbers_of_the_paper():
    flip, grey, crop = random_view(24, 24).transforms
    assert (flip.p, grey.p, crop.size, crop.scale) == (0.5, 0.25, (24, 24), (0.3, 1.0))


def mixed_batch(share):
    batch = batch_of(torch.tensor([0, 2, 1]))
    extra = {"share": torch.tensor(share), "labels": torch.tensor([1, 2, 0]), "tasks": torch.zeros(3).long()}
    part = batch.replace(extra=extra)
    return batch.replace(parts={"classify": (slice(0, 3), part)})


def test_the_cross_entropy_of_a_mixture_is_shared_by_both_labels():
    logits = normal(3, 4)
    found = OnPro().mixed_loss(mixed_batch([0.25, 0.5, 0.0]), Output(normal(3, 2), logits))
    log_p = logits - logits.exp().sum(1, keepdim=True).log()
    expected = -(0.75 * log_p[0, 0] + 0.25 * log_p[0, 1] + log_p[1, 2] + log_p[2, 1]) / 3
    torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------------- a step


class Notes(OnPro):
    """Notes the batch and the terms of each step."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.steps = []

    def prepare_batch(self, batch):
        self.before = self.online.means.clone()
        return super().prepare_batch(batch)

    def losses(self, batch, output):
        terms = super().losses(batch, output)
        self.steps.append((self.task.index, self.before, batch, output, terms))
        self.check(batch, output, terms)
        return terms

    def check(self, batch, output, terms):
        pass


def views_of(batch, name, values):
    return [values[batch.parts[part][0]] for part in (name, f"random {name}")]


class Compares(Notes):
    """Compares the terms of each step, and the prototypes after it, with the equations."""

    def check(self, batch, output, terms):
        first, rows = self.task.is_first, {}
        z = F.normalize(self.projection(output.features), dim=1)
        spans = [F.normalize(output.features, dim=1)[:, k : k + 12] for k in range(5)]
        for name in ("stream", "mixed") if "mixed" in batch.parts else ("stream",):
            samples = batch.parts[name][1]
            both = torch.cat(views_of(batch, name, z))
            weight = 1.0 if first else 0.4
            each = [
                instance_contrast(
                    both,
                    torch.cat(views_of(batch, name, span)),
                    samples.extra["groups"].repeat(2),
                    weight=weight,
                    temperature=0.2,
                    of_memory=name == "mixed",
                )
                for span in spans
            ]
            gaps = [float((value - terms[f"{name}_instances"]).abs()) for value in each]
            assert min(gaps) < 1e-5  # the place of u is random
            rows[f"{name}_instances"] = gaps.index(min(gaps))
        self.places.append(rows["stream_instances"])
        for name in ("stream", "replay") if "replay" in batch.parts else ("stream",):
            size = len(batch.parts[name][1]) // (4 if name == "stream" else 1)
            labels, plain = batch.parts[name][1].labels[:size], [view[:size] for view in views_of(batch, name, z)]
            expected = prototype_equilibrium(*plain, labels, output.logits.shape[1], 0.3)
            torch.testing.assert_close(terms[f"{name}_prototypes"], expected)
            if name == "replay":
                self.wanted = {c: torch.stack(plain).mean(0)[labels == c].mean(0).detach() for c in labels.tolist()}
        names = {"ce", "stream_instances", "stream_prototypes"}
        names |= {"replay_prototypes"} if "replay" in batch.parts else set()
        names |= {"mixed_instances"} if "replay" in batch.parts and not first else set()
        assert terms.keys() == names

    def after_step(self, batch):
        super().after_step(batch)
        wanted = getattr(self, "wanted", {})
        for c, mean in enumerate(self.online.means):
            torch.testing.assert_close(mean, wanted.get(c, torch.zeros_like(mean)))


def test_the_terms_of_a_step_and_the_prototypes_after_it_are_the_equations():
    strategy = Compares(
        **OPTIONS | {"transforms": None}, prototype_temperature=0.3, temperature=0.2, similarity_weight=0.4
    )
    strategy.places = []
    run(strategy, data=FEW, limit_train_batches=3)
    assert len(strategy.steps) > 10
    assert set(strategy.places) == set(range(5))


def test_the_first_task_classifies_the_stream_and_later_tasks_mixtures_of_the_memory():
    made = run(Notes(**OPTIONS | {"mix_probability": 1.0, "uniform_share": 0.5}), data=FEW)
    normalize, mixtures = made.datamodule.normalize, 0
    seen_first: set[int] = set()
    for task, before, batch, _, _ in made.strategy.steps:
        stream, classify = batch.parts["stream"][1], batch.parts["classify"][1]
        size = len(stream) // 4
        assert torch.equal(stream.raw[:size], stream.raw[size : 2 * size])
        assert (stream.labels[size:] == -1).all()
        assert torch.equal(stream.images, normalize(rotated_copies(stream.raw[:size], 4), Draw.of(4 * size, 0)))
        assert len(stream.extra["groups"].unique()) == 4 * len(stream.labels[:size].unique())
        if task == 0:
            assert "mixed" not in batch.parts
            assert torch.equal(classify.labels, stream.labels[:size])
            continue
        mixed, share = batch.parts["mixed"][1], classify.extra["share"]
        count = len(classify)
        if task not in seen_first:  # no prototypes yet
            seen_first.add(task)
            assert not before.any()
            assert not share.any()
            replay = batch.parts["replay"][1]
            assert torch.equal(classify.raw, replay.raw)
            continue
        base = count // 2
        assert (share[:base] <= 0.6).all()
        other = classify.extra["labels"]
        hidden = (classify.labels != other) & (share > 0)
        assert torch.equal(mixed.labels[:count], classify.labels.where(~hidden, -1))
        alone = mixed.extra["groups"][:count][hidden]
        assert len(alone.unique()) == len(alone)
        assert (classify.labels[base:] < other[base:]).all() or not before.any(1).sum() > 1
        mixtures += int(hidden.sum())
        sizes = [part.stop - part.start for part in batch.passes]
        assert sizes == [8 * size + 8 * count, count, 2 * len(batch.parts["replay"][1])]
    assert seen_first == {1, 2, 3, 4}
    assert mixtures > 100


def test_a_mixture_is_between_the_images_of_two_samples_of_its_classes():
    checked = []

    class Looks(Notes):
        def mixtures(self, batch, rows):
            samples, pixels = super().mixtures(batch, rows)
            share, other = samples.extra["share"], samples.extra["labels"]
            for row in range(len(samples)):
                own, part = samples.raw[row].float() / 255, share[row]
                if part > 0.05:
                    partner = (pixels[row] - (1 - part) * own) / part * 255
                    match = (self.memory.images.float() - partner).abs().flatten(1).amax(1) < 0.1
                    assert other[row] in self.memory.labels[match]
                    checked.append(float(part))
                elif part == 0:
                    torch.testing.assert_close(pixels[row], own)
            assert len(samples) == min(16, 7 * self.network.head.num_columns, len(self.memory))
            return samples, pixels

    run(Looks(**OPTIONS | {"mix_probability": 0.8, "uniform_share": 0.25}), data=FEW)
    assert len(checked) > 40
    assert max(checked) > 0.9  # of pairs, Beta(0.4, 0.4)


def test_without_mixing_the_cross_entropy_is_the_one_of_replayed_samples():
    strategy = run(Notes(**OPTIONS | {"mix_probability": 0.0, "uniform_share": 1.0}), data=FEW).strategy
    compared = 0
    for task, _, batch, output, terms in strategy.steps:
        rows, part = batch.parts["classify"]
        torch.testing.assert_close(terms["ce"], F.cross_entropy(output.logits[rows], part.labels))
        if task > 0:
            assert sorted(part.raw.flatten(1).sum(1).tolist()) == sorted(
                batch.parts["replay"][1].raw.flatten(1).sum(1).tolist()
            )
            compared += 1
    assert compared


def test_each_forward_pass_has_statistics_of_its_own():
    strategy = run(Notes(**OPTIONS | {"backbone": NormNet}), data=FEW, limit_train_batches=2).strategy
    passes = sum(len(batch.passes) for _, _, batch, _, _ in strategy.steps)
    assert int(strategy.network.backbone.layers[2].num_batches_tracked) == passes


def test_classes_that_come_back_and_tasks_of_one_class_are_learnt():
    for scenario in (Blurry(tasks=3, disjoint=40, blurry=20), ClassIncremental(tasks=10)):
        data = {"scenario": Online(Subset(scenario, per_class=12), batch_size=10)}
        measures = run(OnPro(**OPTIONS), data=data).matrix.measures()
        assert measures["average_accuracy"] > 0.25


def test_it_is_far_above_finetuning_on_a_stream_that_is_seen_once():
    plain = {"backbone": plain_net, "optimizer": plain_sgd}
    onpro = run(OnPro(**OPTIONS | {"memory_size": 200}), data=FIVE).matrix.measures()["average_accuracy"]
    none = finetuning(plain, data=FIVE).measures()["average_accuracy"]
    assert onpro > none + 0.35


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rotations": 2}, "OnPro: rotations is 2"),
        ({"prototype_temperature": 0.0}, "OnPro: prototype_temperature is 0"),
        ({"temperature": 0.0}, "OnPro: temperature is 0"),
        ({"similarity_weight": -1.0}, "OnPro: similarity_weight is -1"),
        ({"mix_probability": 1.1}, "OnPro: mix_probability is 1.1"),
        ({"uniform_share": -0.1}, "OnPro: uniform_share is -0.1"),
        ({"replay_size": 0}, "OnPro: replay_size is 0"),
        ({"replay_per_class": 0}, "OnPro: replay_per_class is 0"),
        ({"projection_size": 0}, "OnPro: projection_size is 0"),
        ({"loss_classes": "task"}, "OnPro: loss_classes is 'task', but mixed images have two classes; use 'all'"),
    ],
)
def test_wrong_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        OnPro(**options)


def test_a_projection_that_is_wider_than_the_features_is_an_error():
    strategy = partial(OnPro, backbone=plain_net)
    with pytest.raises(ValueError, match="projection_size is 128, of 16 features; use at most as many"):
        strategy().build((1, 8, 8))
    strategy(projection_size=16).build((1, 8, 8))
