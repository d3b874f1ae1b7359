from functools import partial

import pytest
import torch
from support.baselines import finetuning
from support.expanding import Watch, begin, grown, part
from support.fakes import batch_of, normal
from support.runs import NormNet, assert_same, plain_net, run, sgd
from torch.nn import functional as F

from cl_lightning.measures import last_accuracy
from cl_lightning.models import MLP, CosineHead
from cl_lightning.strategies.rehearsal.der_expand import DERExpand, auxiliary_labels
from cl_lightning.strategy import Output, Phase, PhaseOptions
from cl_lightning.stream import ClassIncremental, RotatedDomains
from cl_lightning.testing import Subject, small

PUBLISHED = {
    "der_expand_cifar100": {
        "source": "the numbers of PyCIL's DER on CIFAR-100, with weight alignment and without masks",
        "memory_size": 2000,
        "backbone": "ResNet32",
        "first_optimizer": "SGD(lr=0.1, momentum=0.9, weight_decay=0.0005)",
        "first_scheduler": "MultiStepLR(gamma=0.1, milestones=[60, 120, 170])",
        "optimizer": "SGD(lr=0.1, momentum=0.9, weight_decay=0.0002)",
        "scheduler": "MultiStepLR(gamma=0.1, milestones=[80, 120, 150])",
        "data.scenario": "ClassIncremental(class_order=1993, tasks=10)",
        "data.batch_size": 128,
        "data.transforms": ["RandomCrop(padding=4)", "RandomHorizontalFlip()", "ColorJitter(brightness=0.247)"],
        "loop.first_task_epochs": 200,
        "trainer.max_epochs": 170,
    },
}

SUBJECTS = {"DERExpand": Subject(small(DERExpand, classifier="retrain", retrain_options=PhaseOptions(epochs=1)))}

COMMON = {"optimizer": sgd, "memory_size": 60}
SMALL = partial(DERExpand, backbone=plain_net, **COMMON)


def test_old_classes_share_the_first_auxiliary_class():
    labels = torch.tensor([0, 3, 4, 5, 8, -1])
    assert auxiliary_labels(labels, 4).tolist() == [0, 0, 1, 2, 5, -1]


def test_the_loss_is_that_of_the_paper():
    strategy, images = grown(DERExpand, aux_weight=0.3), normal(6, 1, 8, 8)
    labels = torch.tensor([0, 1, 3, 4, 5, 5])
    features = [extractor(images) for extractor in strategy.eval().backbone.extractors]
    batch, output = batch_of(labels, images=images), strategy.network(images)
    terms = strategy.losses(batch, output)
    rows, bias = strategy.network.head.weight(), torch.cat([block.bias for block in strategy.network.head.blocks])
    assert rows.shape == (6, 48)
    scores = sum(part @ rows[:, 16 * k : 16 * k + 16].T for k, part in enumerate(features)) + bias
    torch.testing.assert_close(terms["ce"], F.cross_entropy(scores, labels))
    (block,) = strategy.aux_head.blocks
    aux = features[2] @ block.weight.T + block.bias
    assert aux.shape == (6, 3)
    expected = 0.3 * F.cross_entropy(aux, torch.tensor([0, 0, 0, 1, 2, 2]))
    torch.testing.assert_close(terms["aux"], expected)
    assert set(terms) == {"ce", "aux"}


def test_old_logits_are_the_old_ones_and_what_the_new_columns_add():
    strategy, images = grown(DERExpand, tasks=2).eval(), normal(5, 1, 8, 8)
    before = strategy.network(images)
    begin(strategy, 2)
    strategy.double().eval()
    after, head = strategy.network(images), strategy.network.head
    new = strategy.backbone.extractors[2](images)
    assert torch.equal(new, strategy.backbone.extractors[1](images))
    torch.testing.assert_close(after.logits[:, :4], before.logits + new @ head.weight()[:4, 32:].T)
    assert head.weight()[:4, 32:].abs().min() > 0
    with torch.no_grad():
        for block in head.blocks:
            block.weight[:, 32:] = 0
    torch.testing.assert_close(strategy.network(images).logits[:, :4], before.logits)


def test_earlier_extractors_are_frozen_and_all_else_is_trained():
    watch = Watch()
    made = run(DERExpand(backbone=NormNet, **COMMON), watch, max_epochs=1)
    for task in (1, 2):
        before, after = watch.first[task, "train"], watch.last[task, "train"]
        for old in range(task):
            name = f"network.backbone.extractors.{old}."
            assert_same(part(before, name), part(after, name))
            assert_same(part(watch.last[old, "train"], name), part(after, name))
        assert watch.modes[task, "train"] == [False] * task + [True]
        moved = [f"network.backbone.extractors.{task}.", "network.head.", "aux_head."]
        for name in moved:
            assert all(not torch.equal(value, after[key]) for key, value in part(before, name).items())
        assert before["aux_head.blocks.0.weight"].shape == (4, 16)
    of_net = 64 * 16 + 16 + 2 * 16
    sizes = [n * of_net + classes * (16 * n + 1) for n, classes in ((1, 4), (2, 7), (3, 10))]
    assert [cost.parameters for cost in made.meter.tasks] == sizes
    assert not part(made.strategy.state_dict(), "aux_head.")


def norms_of(strategy):
    return strategy.network.head.weight().norm(dim=1)


@pytest.mark.parametrize("classifier", ["align", "plain"])
def test_new_rows_are_aligned_where_the_option_says_so(classifier):
    watch = Watch()
    options = {"max_epochs": 1, "options": {"stop_after_task": 1}}
    strategy = run(SMALL(classifier=classifier), watch, **options).strategy
    trained = part(watch.last[1, "train"], "network.")
    if classifier == "plain":
        assert_same(trained, part(strategy.state_dict(), "network."))
    else:
        norms = norms_of(strategy)
        torch.testing.assert_close(norms[4:].mean(), norms[:4].mean())
        assert torch.equal(strategy.network.head.blocks[0].weight, trained["network.head.blocks.0.weight"])
        assert not torch.equal(strategy.network.head.blocks[1].weight, trained["network.head.blocks.1.weight"])


def test_the_retrained_head_is_new_and_sees_equally_many_samples_of_each_class():
    watch = Watch()
    retrain = PhaseOptions(epochs=1, optimizer=partial(torch.optim.SGD, lr=0.1))
    run(DERExpand(**COMMON, backbone=NormNet, classifier="retrain", retrain_options=retrain), watch, max_epochs=1)
    for task, seen in ((1, 7), (2, 10)):
        counts = torch.cat(watch.labels[task, "retrain"]).bincount()
        assert len(counts) == seen
        assert counts.min() == counts.max() == 60 // (4, 7)[task - 1]
        trained, fresh, end = (watch.last[task, "train"], watch.first[task, "retrain"], watch.last[task, "retrain"])
        assert_same(part(trained, "network.backbone."), part(end, "network.backbone."))
        for name, value in part(fresh, "network.head.").items():
            assert not torch.equal(value, trained[name])
            assert not torch.equal(value, end[name])


def test_retraining_divides_the_logits_by_the_temperature():
    strategy = grown(DERExpand, classifier="retrain", retrain_temperature=4.0)
    strategy.phase = Phase("retrain")
    logits, labels = normal(5, 6), torch.tensor([0, 1, 2, 4, 5])
    terms = strategy.losses(batch_of(labels), Output(normal(5, 48), logits))
    assert terms.keys() == {"ce"}
    torch.testing.assert_close(terms["ce"], F.cross_entropy(logits / 4, labels))


def test_domains_without_new_classes_are_learnt_without_the_auxiliary_loss():
    made = run(SMALL(), data={"scenario": RotatedDomains(tasks=2)}, max_epochs=1)
    assert len(made.strategy.backbone.extractors) == 2
    assert made.strategy.network.head.num_columns == 10


def test_it_forgets_less_than_fine_tuning():
    five = {"data": {"scenario": ClassIncremental(tasks=5), "batch_size": 32}, "max_epochs": 4}
    common = {"backbone": partial(MLP, hidden=(64,))}
    plain = last_accuracy(finetuning(common, **five).R_ci)
    ours = last_accuracy(run(DERExpand(**common, memory_size=100), **five).matrix.R_ci)
    # Measured: .82 against .17; .94 without alignment, since 4 epochs are too few for the new rows to become longer.
    assert ours > plain + 0.3


@pytest.mark.parametrize(
    "options",
    [
        {"loss_classes": "current"},
        {"aux_weight": -1.0},
        {"classifier": "nme"},
        {"classifier": "retrain", "retrain_temperature": 0.0},
        {"classifier": "retrain", "retrain_options": PhaseOptions(epochs=0)},
        {"retrain_temperature": 2.0},
        {"freeze_backbone": True},
    ],
)
def test_wrong_options_are_errors(options):
    with pytest.raises(ValueError, match="DERExpand"):
        DERExpand(**options)


def test_a_head_that_cannot_take_more_features_is_reported():
    with pytest.raises(ValueError, match="DERExpand: head is CosineHead"):
        DERExpand(head=CosineHead).build((1, 8, 8))
