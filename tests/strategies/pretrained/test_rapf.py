from functools import partial

import numpy as np
import pytest
import torch
from support.fakes import batch_of, normal
from support.pretrained import PretrainedViT, in_tasks
from support.runs import assert_same_run, plain_net, run, sgd
from support.text import digit_rows, digits_file
from torch.nn import functional as F

from cl_lightning.batch import Draw
from cl_lightning.measures import last_accuracy
from cl_lightning.models import Output, TextHead
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.pretrained.rapf import RAPF, fused, pair_hinge
from cl_lightning.stream import ClassIncremental
from cl_lightning.testing import Subject, small

HEAD = partial(TextHead, embeddings=digits_file(16))
FEW = {"replay_samples": 3, "pair_samples": 2, "pair_threshold": 1.1}

SUBJECTS = {
    "RAPF": Subject(
        small(RAPF, head=partial(TextHead, embeddings=digits_file(24)), shrinkage=1.0, **FEW),
        first_task_is_finetuning=False,
        reason="the backbone is frozen, and the rows of the head are fixed",
    ),
}

PUBLISHED = {
    "rapf": {
        "source": "linlany/RAPF: CLIP ViT-B/16, CIFAR-100 in 10 tasks: b 0.6, threshold 0.55, beta 2, Adam, 15 epochs",
        "backbone": "Timm(name=vit_base_patch16_clip_quickgelu_224.openai, pretrained=True, projection=True)",
        "head": "TextHead(embeddings=class_embeddings.npz, key=clip_text512, learn_scale=False, scale=100.0)",
        "replay_classes": 2,
        "replay_samples": 20,
        "pair_samples": 40,
        "pair_threshold": 0.55,
        "margin": 0.1,
        "fusion_bias": 0.6,
        "shrinkage": 0.0,
        "jitter": 1e-4,
        "optimizer": "Adam(lr=0.001)",
        "scheduler": "MultiStepLR(gamma=0.1, milestones=[4, 10])",
        "data.resize": 224,
        "data.center_crop": 224,
        "data.interpolation": "bicubic",
        "data.mean": [0.48145466, 0.4578275, 0.40821073],
        "data.std": [0.26862954, 0.26130258, 0.27577711],
        "data.scenario": "ClassIncremental(class_order=1993, tasks=10)",
        "data.transforms": [],
        "data.batch_size": 100,
        "trainer.max_epochs": 15,
    },
}


def rapf(**options):
    return RAPF(**{"backbone": plain_net, "head": HEAD, "optimizer": sgd, **FEW, **options})


def learnt(tasks=2, **options):
    settings = {"data": {"scenario": ClassIncremental(tasks=5), "batch_size": 32}, "max_epochs": 1}
    return run(rapf(**options), options={"stop_after_task": tasks - 1}, **settings)


# ---------------------------------------------------------------------- the formulas


@pytest.mark.parametrize("shape", [(3, 3), (4, 2), (2, 5)])
def test_the_fused_map_is_the_equation(shape):
    old, new = normal(*shape), normal(*shape, seed=1)
    u, s, vt = np.linalg.svd(old.numpy(), full_matrices=True)
    p, r = u.T @ new.numpy(), np.zeros(shape)
    r[: len(s)] = s[:, None] * vt[: len(s)]
    expected = np.zeros(shape)
    largest = max(abs(p[i, j] - r[i, j]) for i in range(shape[0]) for j in range(shape[1]))
    for i in range(shape[0]):
        for j in range(shape[1]):
            share = min(abs(p[i, j] - r[i, j]) / largest + 0.3, 1.0)
            expected[i, j] = share * p[i, j] + (1 - share) * r[i, j]
    torch.testing.assert_close(fused(old, new, 0.3), torch.from_numpy(u @ expected))


def test_the_fused_map_is_the_new_one_for_a_large_bias_and_the_old_one_without_training():
    old, new = normal(4, 4), normal(4, 4, seed=1)
    for bias in (1.0, 7.0):
        torch.testing.assert_close(fused(old, new, bias), new)
    for bias in (0.0, 0.6):
        torch.testing.assert_close(fused(old, old, bias), old, rtol=0, atol=0)
        assert (fused(old, new, bias) - new).norm() <= (1 - bias) * (new - old).norm()
    assert fused(old.float(), new.float()).dtype == torch.float32


def test_the_hinge_on_numbers():
    x = torch.tensor([[3.0, 4.0], [4.0, 3.0], [1.0, 0.0]], requires_grad=True)
    old, new = torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[0.0, 1.0]] * 3)
    found = pair_hinge(x, old, new, 0.1)
    torch.testing.assert_close(found, torch.tensor([0.8 - 0.6 + 0.1, 0.0, 0.0]))  # -0.2 + 0.1 and -1 + 0.1 are below 0
    torch.testing.assert_close(pair_hinge(x[1:2], old[1:2], new[1:2], 0.5), torch.tensor([0.3]))


# ---------------------------------------------------------------------- the method


def test_hard_pairs_are_an_old_class_and_a_class_of_the_task_with_close_names():
    strategy = learnt(4, pair_threshold=1.1).strategy
    rows = F.normalize(digit_rows(16), dim=1)[[int(name) for name in strategy.data.class_names]]
    expected = [[o, n] for o in range(6) for n in (6, 7) if float((rows[o] - rows[n]).square().sum().sqrt()) < 1.1]
    assert strategy._pairs.tolist() == expected
    assert 0 < len(expected) < 12
    assert not len(learnt(2, pair_threshold=0.0).strategy._pairs)


def terms_of(strategy, batch, features):
    """Losses of a batch, and the columns and features of each draw from the Gaussians."""
    drawn = []
    sample = strategy.gaussians.sample

    def record(columns, noise):
        drawn.append((columns, sample(columns, noise)))
        return drawn[-1][1]

    strategy.gaussians.sample = record
    with torch.no_grad():
        terms = strategy.losses(batch, Output(features, strategy.text_head(features)))
    return terms, drawn


def test_the_loss_is_over_the_batch_and_the_drawn_features_and_of_all_pairs():
    strategy = learnt(4, replay_classes=2, replay_samples=3, pair_samples=2).strategy
    labels, features = torch.tensor([6, 7, -1, 6]), normal(4, 16, seed=3).float()
    batch = batch_of(labels)
    terms, drawn = terms_of(strategy, batch, features)
    (replayed, near), (of_pairs, far) = drawn
    assert len(set(replayed.tolist())) == 2
    assert replayed.tolist() == sorted(replayed.tolist(), key=replayed.tolist().index)
    assert torch.bincount(replayed).max() == 3
    assert replayed.max() < 6
    weight = strategy.text_head.projection.weight.detach()
    rows = strategy.text_head.weight()
    known = labels >= 0
    inputs, targets = torch.cat([features[known], near]), torch.cat([labels[known], replayed])
    logits = strategy.text_head.scale.detach() * F.normalize(inputs @ weight.T, dim=1) @ rows.T
    torch.testing.assert_close(terms["ce"], F.cross_entropy(logits, targets))
    pairs = strategy._pairs.repeat_interleave(2, dim=0)
    assert torch.equal(of_pairs, pairs[:, 0])
    v = F.normalize(far @ weight.T, dim=1)
    gaps = [float(v[i] @ rows[n] - v[i] @ rows[o]) + 0.1 for i, (o, n) in enumerate(pairs.tolist())]
    torch.testing.assert_close(float(terms["pairs"]), sum(max(gap, 0.0) for gap in gaps) / len(gaps), rtol=1e-4, atol=0)
    assert terms["pairs"] > 0


@pytest.mark.parametrize(
    ("options", "names", "draws"),
    [
        ({"pair_threshold": 0.0}, {"ce"}, 1),
        ({"pair_samples": 0}, {"ce"}, 1),
        ({"replay_classes": 0}, {"ce", "pairs"}, 1),
    ],
)
def test_without_pairs_or_replay_a_term_is_left_out(options, names, draws):
    strategy = learnt(4, **options).strategy
    terms, drawn = terms_of(strategy, batch_of(torch.tensor([6, 7])), normal(2, 16).float())
    assert terms.keys() == names
    assert len(drawn) == draws


def test_the_classes_of_a_step_change_and_processes_share_the_draws():
    strategy = learnt(4, replay_classes=2, replay_samples=3, pair_samples=0).strategy
    chosen, whole = set(), None
    for key in range(6):
        batch = batch_of(torch.tensor([6, 7])).replace(draw=Draw.of(2, key))
        _, [(columns, whole)] = terms_of(strategy, batch, normal(2, 16).float())
        chosen.add(tuple(columns.tolist()))
        del strategy.gaussians.sample
    assert len(chosen) > 2
    halves = []
    for start in range(2):
        batch = batch_of(torch.tensor([6 + start])).replace(draw=Draw(Draw.of(2, 5).key, start, start + 1, 2))
        _, [(_, part)] = terms_of(strategy, batch, normal(1, 16).float())
        halves.append(part)
        del strategy.gaussians.sample
    assert torch.equal(torch.cat(halves), whole)


def test_the_map_is_fused_when_a_task_ends_except_the_first():
    seen = []

    class Look(RAPF):
        def end_task(self, task):
            trained, before = self.text_head.projection.weight.clone(), self.before.clone()
            super().end_task(task)
            seen.append((before, trained, self.text_head.projection.weight.clone()))

    options = {"backbone": plain_net, "head": HEAD, "optimizer": sgd, "fusion_bias": 0.2, **FEW}
    made = run(Look(**options), data={"scenario": ClassIncremental(tasks=5), "batch_size": 64}, max_epochs=1)
    (_, trained, kept), *later = seen
    assert torch.equal(trained, kept)
    for (before, trained, kept), (_, _, end_before) in zip(later, seen, strict=False):
        assert torch.equal(before, end_before)  # the task begins with the fused map
        torch.testing.assert_close(kept, fused(before, trained, 0.2), rtol=0, atol=0)
        assert not torch.equal(kept, trained)
    assert made.strategy.bytes_kept()["projection"] == 16 * 16 * 4


def test_statistics_are_of_the_features_before_the_map_and_stay_as_they_are():
    first, second = (learnt(count) for count in (1, 2))
    gaussians = second.strategy.gaussians
    assert torch.equal(first.strategy.gaussians.means, gaussians.means[:2])
    assert torch.equal(first.strategy.gaussians.factors, gaussians.factors[:2])
    second.strategy.eval()
    with torch.no_grad():
        features, labels = second.strategy.passes.features()
    torch.testing.assert_close(gaussians.means[2], features[labels == 2].mean(0))
    expected = features[labels == 2].double().T.cov() + 1e-4 * torch.eye(16)
    factor = gaussians.factors[2].double()
    torch.testing.assert_close(factor @ factor.T, expected, rtol=1e-4, atol=1e-5)


def test_it_starts_as_zero_shot_or_at_random():
    strategies = [rapf(initial="identity", optimizer=partial(torch.optim.SGD, lr=0.0)), rapf(initial="random")]
    for strategy in strategies:
        strategy.build((1, 8, 8))
    assert torch.equal(strategies[0].text_head.projection.weight, torch.eye(16))
    assert float(strategies[1].text_head.projection.weight.detach().abs().max()) <= 0.25  # 1 / sqrt(16)


def test_without_its_parts_it_is_fine_tuning_of_a_projection():
    plain = {"replay_classes": 0, "pair_samples": 0, "fusion_bias": 1.0}

    class Host(Finetune):
        def build(self, image_shape):
            super().build(image_shape)
            self.network.head.project()

    twin = Host(backbone=plain_net, head=HEAD, optimizer=sgd, freeze_backbone=True)
    options = {"data": {"scenario": ClassIncremental(tasks=5)}, "max_epochs": 1}
    first, second = run(rapf(**plain), **options), run(twin, **options)
    torch.testing.assert_close(
        first.strategy.network.state_dict(), second.strategy.network.state_dict(), rtol=1e-3, atol=1e-4
    )
    assert_same_run(run(rapf(**plain), **options), first)


def test_replay_and_fusion_keep_old_classes():
    options = {"backbone": PretrainedViT, "optimizer": partial(torch.optim.Adam, lr=0.01), "pair_threshold": 1.1}
    options["head"] = partial(TextHead, embeddings=digits_file(24))
    parts = {"replay_samples": 10, "replay_classes": 4, "pair_samples": 5}
    plain = {"replay_classes": 0, "pair_samples": 0, "fusion_bias": 1.0}
    host, made = (in_tasks(partial(rapf, **options, **more), 5, max_epochs=2).matrix for more in (plain, parts))
    # Measured: .46 against .25.
    assert last_accuracy(made.R_ci) > last_accuracy(host.R_ci) + 0.1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"replay_classes": -1}, "RAPF: replay_classes is -1"),
        ({"replay_samples": 0}, "replay_samples is 0"),
        ({"pair_samples": -1}, "pair_samples is -1"),
        ({"pair_threshold": 2.5}, "pair_threshold is 2.5"),
        ({"margin": -0.1}, "margin is -0.1"),
        ({"fusion_bias": -1.0}, "fusion_bias is -1.0"),
        ({"shrinkage": -1.0}, "shrinkage is -1.0"),
        ({"jitter": 0.0}, "jitter is 0"),
        ({"initial": "zero"}, "initial is 'zero'; use 'random' or 'identity'"),
        ({"head": None}, "RAPF: head is LinearHead; use a TextHead"),
        ({"head": partial(TextHead, embeddings=digits_file(24)), "initial": "identity"}, "no projection .* identity"),
    ],
)
def test_options_out_of_range_are_errors(options, words):
    with pytest.raises(ValueError, match=words):
        rapf(**options).build((1, 8, 8))
