from functools import partial

import pytest
import torch
from support.baselines import finetuning
from support.expanding import Watch, begin, grown, part
from support.fakes import batch_of, normal
from support.runs import NormNet, assert_same, plain_net, run, sgd
from torch.nn import functional as F

from cl_lightning.measures import last_accuracy
from cl_lightning.models import MLP, LinearHead
from cl_lightning.strategies.rehearsal.beef import BEEF, energy_loss, log_share, pseudo_labels
from cl_lightning.strategy import Phase, PhaseOptions
from cl_lightning.stream import ClassIncremental, RotatedDomains
from cl_lightning.testing import Subject, check_strategy, small

PUBLISHED = {
    "beef_cifar100": {
        "source": "PyCIL: exps/beef.json, models/beef_iso.py (optimizer of the fusion), utils/data.py",
        "memory_size": 2000,
        "backward_divisor": 1.7,
        "energy_weight": 0.01,
        "backbone": "ResNet32",
        "optimizer": "SGD(lr=0.1, momentum=0.9, weight_decay=0.0005)",
        "scheduler": "CosineOverPhase()",
        "fuse_options": {
            "epochs": 60,
            "optimizer": "SGD(lr=0.05, momentum=0.9, weight_decay=0.0005)",
            "scheduler": "CosineOverPhase()",
        },
        "data.scenario": "ClassIncremental(class_order=1993, first=50, increment=10)",
        "data.batch_size": 128,
        "data.transforms": ["RandomCrop(padding=4)", "RandomHorizontalFlip()", "ColorJitter(brightness=0.247)"],
        "loop.first_task_epochs": 200,
        "trainer.max_epochs": 170,
    },
}

SLOW = "the negatives of each step need further passes of the newest extractor, and a task has two phases"
SUBJECTS = {
    "BEEF": Subject(
        small(BEEF, energy_steps=1, fuse_options=PhaseOptions(epochs=1)),
        first_task_is_finetuning=False,
        reason="the energy term is part of the first task",
    )
}
SMALL = partial(BEEF, backbone=plain_net, optimizer=sgd, memory_size=60)


# ---------------------------------------------------------------------- the maths


def test_old_classes_are_the_class_of_their_task():
    labels = torch.tensor([0, 3, 4, 6, 7, 8, 9, -1])
    assert pseudo_labels(labels, [4, 3]).tolist() == [0, 0, 1, 1, 2, 3, 4, -1]
    assert pseudo_labels(labels, []).tolist() == labels.tolist()


def test_the_share_of_the_forward_prototypes():
    u, e = normal(3, 2), normal(3, 4, seed=1)
    expected = e.exp().sum(1) / (u.exp().sum(1) + e.exp().sum(1))
    torch.testing.assert_close(log_share(u, e), expected.log())


def test_a_negative_belongs_to_its_forward_prototype_not_to_its_class():
    u, e = normal(4, 3), normal(4, 5, seed=1)
    pseudo, labels = torch.tensor([0, 2, 1, -1]), torch.tensor([1, 4, 2, -1])
    losses = []
    for row in range(3):
        others = [u[row, i] for i in range(3) if i != pseudo[row]] + list(e[row])
        losses.append(torch.stack(others).logsumexp(0) - e[row, labels[row]])
    torch.testing.assert_close(energy_loss(u, e, pseudo, labels), torch.stack(losses).mean())


def learning(tasks=3, **options):
    """In the expansion of the last task, with random prototypes and pairs."""
    strategy = grown(BEEF, tasks=1, **options)
    for index in range(1, tasks):
        strategy._empty_heads()
        strategy.float()
        begin(strategy, index)
    strategy.double().phase = Phase("expand")
    with torch.no_grad():
        for number, pair in enumerate(strategy.pairs.values):
            pair.copy_(torch.tensor([0.3, -0.2]) * (number + 1))
    return strategy


def rows_of(head):
    return torch.cat([block.weight for block in head.blocks]), torch.cat([block.bias for block in head.blocks])


def test_the_expansion_is_trained_on_tasks_and_new_classes():
    strategy, images = learning(energy_weight=0.0, backward_divisor=2.5).eval(), normal(5, 1, 8, 8)
    assert not strategy.forward_head.blocks
    labels = torch.tensor([0, 1, 3, 4, 5])
    terms = strategy.losses(batch_of(labels, images=images), strategy.network(images))
    f = strategy.backbone.extractors[2](images)
    (b, beta), (w, bias) = rows_of(strategy.backward_head), rows_of(strategy.new_head)
    u = torch.cat([(f @ b.T + beta) / 2.5, f @ w.T + bias], 1)
    assert u.shape == (5, 4)
    assert terms.keys() == {"ce"}
    torch.testing.assert_close(terms["ce"], F.cross_entropy(u, torch.tensor([0, 0, 1, 2, 3])))


def test_negatives_descend_the_share_of_the_forward_prototypes():
    strategy = learning(energy_weight=0.5, energy_steps=2, energy_lr=0.3, energy_noise=0.0)
    images, labels = normal(4, 1, 8, 8), torch.tensor([0, 3, 4, 5])
    batch, newest = batch_of(labels, images=images), strategy.backbone.extractors[2]
    strategy.train()
    for old in strategy.backbone.earlier:
        old.eval()
    state = {name: value.clone() for name, value in newest.state_dict().items()}
    x = strategy._negatives(batch)
    assert_same(state, newest.state_dict())
    assert newest.training
    (b, beta), (w, bias), (e, eps) = (
        rows_of(h) for h in (strategy.backward_head, strategy.new_head, strategy.forward_head)
    )
    assert len(e) == 6

    def scores(images):
        f = newest(images)
        return torch.cat([(f @ b.T + beta) / 1.7, f @ w.T + bias], 1), f @ e.T + eps

    newest.eval()
    expected = torch.rot90(images, 2, (2, 3))
    for _ in range(2):
        expected = expected.detach().requires_grad_()
        u, of_e = scores(expected)
        share = (of_e.exp().sum(1) / torch.cat([u, of_e], 1).exp().sum(1)).log()
        (slope,) = torch.autograd.grad(share.sum(), expected)
        expected = expected - 0.3 * slope
    torch.testing.assert_close(x, expected.detach())
    assert not torch.equal(x, torch.rot90(images, 2, (2, 3)))
    strategy.eval()
    terms = strategy.losses(batch, strategy.network(images))
    u, of_e = scores(x)
    u = u.masked_fill(F.one_hot(torch.tensor([0, 1, 2, 3]), 4).bool(), -torch.inf)
    torch.testing.assert_close(terms["energy"], 0.5 * F.cross_entropy(torch.cat([u, of_e], 1), labels + 4))


def test_the_noise_of_negatives_has_its_standard_deviation():
    strategy = learning(energy_steps=3, energy_lr=0.0, energy_noise=0.1)
    images = normal(64, 1, 8, 8)
    batch = batch_of(torch.zeros(64, dtype=torch.int64), images=images)
    found = strategy._negatives(batch)
    assert (found - images.flip((2, 3))).std() == pytest.approx(0.1 * 3**0.5, rel=0.03)  # 4096 values
    assert torch.equal(found, strategy._negatives(batch))


def test_fusion_shifts_the_classes_of_a_task_together_and_is_merged_exactly():
    strategy, images = learning().eval(), normal(5, 1, 8, 8)
    features = [extractor(images) for extractor in strategy.backbone.extractors]
    old = strategy.old_head(torch.cat(features[:2], 1))
    (b, beta), (w, bias) = rows_of(strategy.backward_head), rows_of(strategy.new_head)
    z = [
        old[:, :2] + ((1 + 0.3) * (features[2] @ b[0] + beta[0]) - 0.2)[:, None],
        old[:, 2:] + ((1 + 0.6) * (features[2] @ b[1] + beta[1]) - 0.4)[:, None],
        features[2] @ w.T + bias,
    ]
    fused = strategy.fused(torch.cat(features, 1))
    torch.testing.assert_close(fused, torch.cat(z, 1))
    torch.testing.assert_close(strategy.predict_within_task(images), fused)
    labels = torch.tensor([0, 2, 3, 4, 5])
    strategy.phase = Phase("fuse")
    terms = strategy.losses(batch_of(labels, images=images), strategy.network(images))
    assert terms.keys() == {"ce"}
    torch.testing.assert_close(terms["ce"], F.cross_entropy(fused, labels))
    strategy.end_phase(strategy.phase)
    torch.testing.assert_close(strategy.network(images).logits, fused)


def test_without_prototypes_and_pairs_old_logits_do_not_change():
    strategy, images = learning().eval(), normal(5, 1, 8, 8)
    before = strategy.old_head(strategy.network(images).features[:, :32])
    with torch.no_grad():
        for parameter in (*strategy.backward_head.parameters(), *strategy.pairs.values):
            parameter.zero_()
    strategy.end_phase(strategy.phase)
    assert torch.equal(strategy.network.head.weight()[:4, 32:], torch.zeros(4, 16).double())
    torch.testing.assert_close(strategy.network(images).logits[:, :4], before)


# ---------------------------------------------------------------------- the two phases


def test_each_phase_trains_its_own_parameters():
    watch = Watch()
    strategy = run(BEEF(backbone=NormNet, optimizer=sgd, memory_size=60), watch, max_epochs=1).strategy
    for task, seen in ((1, 7), (2, 10)):
        first, last = watch.first[task, "expand"], watch.last[task, "expand"]
        start = part(first, "network.backbone.extractors.0.")
        newest = f"network.backbone.extractors.{task}."
        assert all(
            torch.equal(first[name.replace("extractors.0.", f"extractors.{task}.")], start[name]) for name in start
        )
        for prefix in (newest, "new_head.", "backward_head.", "forward_head."):
            held = part(first, prefix)
            assert held
            assert all(not torch.equal(value, last[name]) for name, value in held.items())
        for prefix in (*(f"network.backbone.extractors.{old}." for old in range(task)), "old_head.", "pairs."):
            assert_same(part(first, prefix), part(last, prefix))
        fused = watch.first[task, "fuse"], watch.last[task, "fuse"]
        for name, value in fused[0].items():
            assert torch.equal(value, fused[1][name]) != name.startswith("pairs."), name
        counts = torch.cat(watch.labels[task, "fuse"]).bincount()
        assert len(counts) == seen
        assert counts.min() == counts.max()
    left = {name.partition(".")[0] for name in strategy.state_dict()}
    assert left == {"network", "memory", "task_columns"}


def test_without_the_energy_term_the_first_task_is_fine_tuning():
    check_strategy(small(BEEF, energy_weight=0.0), checks=("limits",))


def test_domains_without_new_classes_are_refused():
    with pytest.raises(ValueError, match="BEEF"):
        run(SMALL(), data={"scenario": RotatedDomains(tasks=2)}, max_epochs=1)


def test_it_forgets_less_than_fine_tuning():
    five = {"data": {"scenario": ClassIncremental(tasks=5), "batch_size": 32}, "max_epochs": 4}
    common = {"backbone": partial(MLP, hidden=(64,))}
    plain = last_accuracy(finetuning(common, **five).R_ci)
    ours = last_accuracy(run(BEEF(**common, memory_size=100), **five).matrix.R_ci)
    # Measured: .83 against .17.
    assert ours > plain + 0.3


@pytest.mark.parametrize(
    "options",
    [
        {"loss_classes": "task"},
        {"backward_divisor": 0.0},
        {"energy_weight": -1.0},
        {"energy_steps": -1},
        {"energy_lr": -1.0},
        {"energy_noise": -1.0},
        {"fuse_options": PhaseOptions(epochs=0)},
        {"freeze_backbone": True},
    ],
)
def test_wrong_options_are_errors(options):
    with pytest.raises(ValueError, match=f"BEEF: {next(iter(options))}"):
        BEEF(**options)


def test_a_head_without_biases_is_refused():
    with pytest.raises(ValueError, match="BEEF: head has no biases"):
        BEEF(head=partial(LinearHead, bias=False)).build((1, 8, 8))
