import math
from functools import partial

import pytest
import torch
from support.fakes import batch_of, normal
from support.pretrained import PretrainedViT, in_tasks
from support.runs import loop, plain_net, run, sgd
from support.text import digit_rows, digits_file
from torch.nn import functional as F

from cl_lightning.measures import last_accuracy
from cl_lightning.models import Output, TextHead
from cl_lightning.strategies.pretrained.proof import PROOF, SetAttention, pair_contrast
from cl_lightning.strategies.pretrained.zero_shot import ZeroShot
from cl_lightning.stream import ClassIncremental
from cl_lightning.testing import Subject, small

HEAD = partial(TextHead, embeddings=digits_file(16), scale=10.0)

SUBJECTS = {
    "PROOF": Subject(
        small(PROOF, head=partial(TextHead, embeddings=digits_file(24))),
        first_task_is_finetuning=False,
        reason="the backbone is frozen, and the rows of the head are fixed",
    ),
}

PUBLISHED = {
    "proof": {
        "source": "zhoudw-zdw/PROOF: ViT-B/16 of LAION-400M, CIFAR-100 in 10 tasks: SGD 1e-3, 5 epochs, 20 exemplars",
        "backbone": "Timm(name=vit_base_patch16_clip_224.laion400m_e32, pretrained=True, projection=True)",
        "head": "TextHead(embeddings=class_embeddings.npz, key=clip_text512, learn_scale=True, scale=100.0)",
        "memory_size": 2000,
        "exemplars_per_class": 20,
        "context_size": 3,
        "initial": "random",
        "similarity": "dot",
        "train_texts": "all",
        "optimizer": "SGD(lr=0.001, momentum=0.9, weight_decay=0.05)",
        "scheduler": "CosineOverPhase",
        "data.resize": 224,
        "data.center_crop": 224,
        "data.interpolation": "bicubic",
        "data.mean": [0.48145466, 0.4578275, 0.40821073],
        "data.std": [0.26862954, 0.26130258, 0.27577711],
        "data.scenario": "ClassIncremental(class_order=1993, tasks=10)",
        "data.transforms": [],
        "data.batch_size": 64,
        "trainer.max_epochs": 5,
    },
}


def proof(**options):
    return PROOF(**{"backbone": plain_net, "head": HEAD, "optimizer": sgd, "memory_size": 20, **options})


def learnt(tasks=2, **options):
    return run(
        proof(**options),
        data={"scenario": ClassIncremental(tasks=5), "batch_size": 64},
        options={"stop_after_task": tasks - 1},
        max_epochs=1,
    ).strategy.eval()


def full_attention(attention, rows):
    """LN(X + W_o softmax(W_q X (W_k X)^T / sqrt(e)) W_v X) of one set ``(S, e)``."""
    q, k, v = (rows @ getattr(attention, name).weight.T for name in ("query", "key", "value"))
    weights = (q @ k.T / math.sqrt(rows.shape[1])).exp()
    mixed = (weights / weights.sum(1, keepdim=True)) @ v @ attention.output.weight.T + rows
    centred = mixed - mixed.mean(1, keepdim=True)
    deviation = (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    return centred / deviation * attention.norm.weight + attention.norm.bias


def cosines(first, second):
    return F.normalize(first, dim=1) @ F.normalize(second, dim=1).T


# ---------------------------------------------------------------------- the formulas


def test_attention_in_sets_that_share_their_vectors_is_attention_in_each_set():
    torch.manual_seed(0)
    attention = SetAttention(6).double()
    attention.norm.weight.data = normal(6, seed=8)
    attention.norm.bias.data = normal(6, seed=9)
    single, shared = normal(3, 6), normal(4, 6, seed=1)
    for present in ([True] * 4, [True, False, True, True]):
        mask = torch.tensor(present)
        one, others = attention(single, shared, mask)
        assert (one.shape, others.shape) == ((3, 6), (3, 4, 6))
        for image in range(3):
            expected = full_attention(attention, torch.cat([single[image : image + 1], shared[mask]]))
            torch.testing.assert_close(one[image], expected[0])
            torch.testing.assert_close(others[image, mask], expected[1:])


def test_the_contrast_on_numbers():
    images, texts = (F.normalize(normal(4, 3, seed=seed), dim=1) for seed in (0, 1))
    known = torch.tensor([True, True, False, True])
    products = [[5.0 * float(images[i] @ texts[j]) for j in (0, 1, 3)] for i in (0, 1, 3)]
    loss = 0.0
    for i in range(3):
        row, column = products[i], [products[j][i] for j in range(3)]
        for each in (row, column):
            loss -= math.log(math.exp(products[i][i]) / sum(map(math.exp, each))) / 6
    assert float(pair_contrast(images, texts, 5.0, known)) == pytest.approx(loss, rel=1e-9)
    assert float(pair_contrast(images, texts, 5.0, torch.zeros(4, dtype=torch.bool))) == 0.0
    assert float(pair_contrast(images[:0], texts[:0], 5.0, known[:0])) == 0.0
    images.requires_grad_()
    pair_contrast(images, texts, 5.0, known).backward()
    assert images.grad.isfinite().all()
    assert not images.grad[2].any()


# ---------------------------------------------------------------------- the method


@torch.no_grad()
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_scores_and_losses_are_the_equations(similarity):
    strategy = learnt(3, similarity=similarity).double()
    fusion, head = strategy.fusion, strategy.text_head
    assert len(fusion.images) == len(fusion.texts) == len(fusion.contexts) == 3
    features, images = normal(4, 16, seed=3), torch.zeros(4, 1, 8, 8).double()
    names = [int(name) for name in strategy.data.class_names[:6]]
    t = F.normalize(F.normalize(digit_rows(16), dim=1)[names] @ sum(fusion.texts).T, dim=1)
    q, p = (F.normalize(rows @ sum(fusion.images).T, dim=1) for rows in (features, strategy.image_means.means))
    like = cosines if similarity == "cosine" else lambda first, second: first @ second.T
    s = head.scale if similarity == "cosine" else 1.0
    found = []
    for i in range(4):
        adapted = full_attention(fusion.attention, torch.cat([q[i : i + 1], t, p, *fusion.contexts]))
        found.append(like(adapted[:1], adapted[1:13])[0].view(2, 6))
    to_texts, to_means = torch.stack(found, dim=1)
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    strategy.network.backbone.forward = lambda _: features
    close(strategy.predict(images), s * (q @ t.T + to_texts + to_means))
    batch = batch_of(torch.tensor([0, 4, -1, 5]))
    terms = strategy.losses(batch, Output(features, head(features)))
    rows = [0, 1, 3]
    labels = batch.labels[rows]
    close(terms["text"], F.cross_entropy(s * to_texts[rows], labels))
    close(terms["prototypes"], F.cross_entropy(s * to_means[rows], labels))
    pairs = head.scale * q[rows] @ t[labels].T
    close(terms["contrast"], (F.cross_entropy(pairs, torch.arange(3)) + F.cross_entropy(pairs.T, torch.arange(3))) / 2)
    assert terms.keys() == {"text", "prototypes", "contrast"}


def test_with_identity_maps_and_no_attention_it_is_zero_shot_and_the_nearest_prototype():
    strategy = proof(optimizer=partial(torch.optim.SGD, lr=0.0))
    made = loop(strategy, data={"scenario": ClassIncremental(tasks=5)}, options={"stop_after_task": 0}, max_epochs=1)
    made.fit()
    strategy.fusion.attention.output.weight.data.zero_()
    features = normal(5, 16).float()
    strategy.network.backbone.forward = lambda _: features
    mean, rows = strategy.image_means.means, strategy.text_head.weight()
    norm = partial(F.layer_norm, normalized_shape=(16,))
    unit = F.normalize(features, dim=1)
    expected = cosines(features, rows) + cosines(norm(unit), norm(rows)) + cosines(norm(unit), norm(F.normalize(mean)))
    with torch.no_grad():
        torch.testing.assert_close(strategy.predict(torch.zeros(5, 1, 8, 8)), 10 * expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("train_texts", ["newest", "all"])
def test_maps_and_contexts_of_earlier_tasks_are_frozen(train_texts):
    class Look(PROOF):
        def begin_phase(self, phase, origin, sources=()):
            super().begin_phase(phase, origin, sources)
            kept.append({name: value.clone() for name, value in self.fusion.state_dict().items()})

    kept = []
    options = {"backbone": plain_net, "head": HEAD, "optimizer": sgd, "memory_size": 20}
    data = {"scenario": ClassIncremental(tasks=5), "batch_size": 64}
    made = run(Look(**options, train_texts=train_texts), data=data, options={"stop_after_task": 1}, max_epochs=1)
    before, after = kept[1], made.strategy.fusion.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
    attention = {name for name in before if name.startswith("attention.")}
    texts = {"texts.0", "texts.1"} if train_texts == "all" else {"texts.1"}
    assert moved == attention | texts | {"images.1", "contexts.1"}


def test_neutral_maps_change_nothing_at_the_start_of_a_task_and_random_ones_do():
    for initial, same in (("neutral", True), ("random", False)):
        fusion = learnt(1, initial=initial).fusion
        features, rows = normal(3, 16).float(), digit_rows(16).float()
        before = fusion(features), fusion.project_texts(rows)
        fusion.grow()
        after = fusion(features), fusion.project_texts(rows)
        assert [torch.equal(*pair) for pair in zip(before, after, strict=True)] == [same, same]
    first = proof()
    first.build((1, 8, 8))
    first.fusion.grow()
    assert torch.equal(first.fusion.images[0], torch.eye(16))
    assert torch.equal(first.fusion.texts[0], torch.eye(16))


def test_means_are_of_normalised_features_and_are_measured_when_the_task_begins():
    seen = []

    class Look(PROOF):
        def losses(self, batch, output):
            if not seen:
                seen.append(self.image_means.means.clone())
            return super().losses(batch, output)

    made = run(
        Look(backbone=plain_net, head=HEAD, optimizer=sgd, memory_size=20),
        data={"scenario": ClassIncremental(tasks=5), "batch_size": 64},
        options={"stop_after_task": 0},
        max_epochs=1,
    )
    strategy = made.strategy.eval()
    with torch.no_grad():
        features, labels = strategy.passes.features()
    expected = torch.stack([F.normalize(features[labels == c], dim=1).mean(0) for c in (0, 1)])
    torch.testing.assert_close(strategy.image_means.means, expected)
    assert torch.equal(seen[0], strategy.image_means.means)
    assert int(strategy.measured) == 1
    assert strategy.image_means.counts.tolist() == labels.bincount().tolist()


def test_the_order_of_the_classes_is_the_order_of_the_scores():
    strategy, images = learnt(2), torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        before = strategy.predict(images)
        rows, means = strategy.text_head.weight()[order], strategy.image_means
        for block, own in zip(strategy.text_head.blocks, rows.split(2), strict=True):
            block.weight.copy_(own)
        means.means.copy_(means.means[order])
        torch.testing.assert_close(strategy.predict(images), before[:, order], rtol=1e-5, atol=1e-5)


def test_a_class_without_images_takes_no_part_and_is_scored_by_its_name():
    strategy, images = learnt(2), torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    strategy.image_means.counts[1] = 0
    with torch.no_grad():
        features = strategy.network.backbone(images)
        first = strategy.predict(images)
        q, t, to_texts, to_means = strategy.vectors(features)
        assert to_means[:, 1].isinf().all()
        torch.testing.assert_close(first[:, 1], strategy.text_head.scale * (q @ t.T + 2 * to_texts)[:, 1])
        strategy.image_means.means[1] += 1.0
        assert torch.equal(strategy.predict(images), first)


def test_stored_features_give_the_same_run(tmp_path):
    make = partial(proof, head=HEAD)
    plain, stored = (
        in_tasks(make, 5, options={"stop_after_task": 2, **more}) for more in ({}, {"feature_cache": str(tmp_path)})
    )
    assert any(tmp_path.rglob("*"))
    torch.testing.assert_close(stored.matrix.R_ci, plain.matrix.R_ci, equal_nan=True)


def test_it_learns_an_image_tower_that_does_not_know_the_names():
    options = {"backbone": PretrainedViT, "head": partial(TextHead, embeddings=digits_file(24))}
    zero_shot = in_tasks(partial(ZeroShot, **options), 5).matrix
    optimizer = partial(torch.optim.Adam, lr=0.01)
    made = in_tasks(partial(PROOF, **options, optimizer=optimizer, memory_size=60), 5, max_epochs=2).matrix
    # Measured: .53 against .08.
    assert last_accuracy(made.R_ci) > last_accuracy(zero_shot.R_ci) + 0.22


def test_without_contexts_and_with_a_fixed_scale_it_learns_too():
    head = partial(TextHead, embeddings=digits_file(16), learn_scale=False)
    strategy = learnt(2, context_size=0, head=head)
    assert [len(rows) for rows in strategy.fusion.contexts] == [0, 0]
    assert strategy.text_head.scale == 16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context_size": -1}, "PROOF: context_size is -1"),
        ({"initial": "zero"}, "initial is 'zero'; use 'neutral' or 'random'"),
        ({"similarity": "product"}, "similarity is 'product'; use 'cosine' or 'dot'"),
        ({"train_texts": "none"}, "train_texts is 'none'; use 'newest' or 'all'"),
        ({"head": None}, "PROOF: head is LinearHead; use a TextHead"),
    ],
)
def test_options_out_of_range_are_errors(options, words):
    with pytest.raises(ValueError, match=words):
        proof(**options).build((1, 8, 8))
