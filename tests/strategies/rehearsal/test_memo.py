from functools import partial

import pytest
import torch
from support.baselines import finetuning
from support.expanding import Watch, grown, part
from support.fakes import batch_of, normal
from support.runs import assert_same, run, sgd
from torch.nn import functional as F

from cl_lightning.measures import last_accuracy
from cl_lightning.models import MLP, CifarResNet, ResNet32
from cl_lightning.strategies.rehearsal.memo import MEMO
from cl_lightning.stream import ClassIncremental
from cl_lightning.testing import Subject, small

PUBLISHED = {
    "memo_cifar100": {
        "source": "MEMO, memory-aligned CIFAR-100 B0 Inc10: 2000 exemplars and 1312 in place of the parameters of DER",
        "memory_size": 3312,
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

two_layers = partial(MLP, hidden=(12, 8))
SUBJECTS = {"MEMO": Subject(small(MEMO, backbone=two_layers))}


def test_stages_of_all_tasks_stand_on_one_stem():
    strategy, images, labels = grown(MEMO, backbone=two_layers), normal(4, 1, 8, 8), torch.tensor([0, 3, 4, 5])
    assert (strategy.memory.size, strategy.train_stem) == (2000, True)
    backbone = strategy.backbone
    stem, stages = backbone.stem[1], [stage[0] for stage in backbone.extractors]
    with torch.no_grad():
        for number, stage in enumerate(stages):
            stage.weight.mul_(1 + number)
    hidden = (images.flatten(1) @ stem.weight.T + stem.bias).relu()
    features = [(hidden @ stage.weight.T + stage.bias).relu() for stage in stages]
    output = strategy.network(images)
    torch.testing.assert_close(output.features, torch.cat(features, 1))
    head, aux = strategy.network.head, strategy.aux_head.blocks[0]
    terms = strategy.losses(batch_of(labels, images=images), output)
    logits = torch.cat(features, 1) @ head.weight().T + torch.cat([block.bias for block in head.blocks])
    torch.testing.assert_close(terms["ce"], F.cross_entropy(logits, labels))
    expected = F.cross_entropy(features[2] @ aux.weight.T + aux.bias, torch.tensor([0, 0, 1, 2]))
    torch.testing.assert_close(terms["aux"], expected)


@pytest.mark.parametrize("train_stem", [True, False])
def test_earlier_stages_are_frozen_and_the_stem_as_the_option_says(train_stem):
    watch, net = Watch(), partial(CifarResNet, depth=8, width=2)
    strategy = MEMO(backbone=net, optimizer=sgd, memory_size=40, train_stem=train_stem)
    made = run(strategy, watch, max_epochs=1, data={"batch_size": 256})
    start, end = watch.first[0, "train"], watch.last[0, "train"]
    assert all(not torch.equal(value, end[name]) for name, value in part(start, "network.").items())
    for task in (1, 2):
        before, after = watch.first[task, "train"], watch.last[task, "train"]
        for old in range(task):
            name = f"network.backbone.extractors.{old}."
            assert_same(part(watch.last[old, "train"], name), part(after, name))
        moved = [f"network.backbone.extractors.{task}."]
        if train_stem:
            moved.append("network.backbone.stem.")
        else:
            assert_same(part(before, "network.backbone.stem."), part(after, "network.backbone.stem."))
        for name in moved:
            assert all(not torch.equal(value, after[key]) for key, value in part(before, name).items())
    stem = 2 * 9 + 4 + (2 * 2 * 2 * 9 + 8) + (2 * 4 * 9 + 4 * 4 * 9 + 16)
    stage = 4 * 8 * 9 + 8 * 8 * 9 + 32
    sizes = [stem + n * stage + classes * (8 * n + 1) for n, classes in ((1, 4), (2, 7), (3, 10))]
    assert [cost.parameters for cost in made.meter.tasks] == sizes


def test_the_exemplars_take_what_the_network_leaves():
    # Parameters: 64 * 12 + 12 in the stem, 12 * 8 + 8 per stage, 8n + 1 per class of task n; 64 bytes per image.
    sizes = [780 + 104 * n + classes * (8 * n + 1) for n, classes in ((1, 4), (2, 7), (3, 10))]
    budget = 4 * sizes[2] + 64 * 35 + 63
    options = {"backbone": two_layers, "optimizer": sgd}
    made = run(MEMO(**options, budget_mb=budget / 2**20), max_epochs=1)
    rooms = [(budget - 4 * size) // 64 for size in sizes]
    assert rooms == [62, 50, 35]
    assert [cost.raw_bytes // 64 for cost in made.meter.tasks] == [60, 49, 30]  # equally many of 4, 7, 10 classes
    assert [cost.parameters for cost in made.meter.tasks] == sizes
    assert all(cost.memory_mb * 2**20 <= budget for cost in made.meter.tasks)
    with pytest.raises(ValueError, match=r"MEMO: give a larger budget_mb than .*1342 parameters after 3 tasks"):
        run(MEMO(**options, budget_mb=(4 * sizes[2] - 1) / 2**20), max_epochs=1)


def test_the_budget_of_ten_networks_and_2000_exemplars_leaves_3312():
    budget = (10 * 463_504 + 100 * 641) * 4 / 2**20 + 2000 * 3072 / 2**20
    strategy = MEMO(backbone=ResNet32)
    strategy.build((3, 32, 32))
    assert strategy._room(budget, 10, 100) == 2000 + (463_504 * 10 - (112_016 + 351_488 * 10)) * 4 // 3072 == 3312


def test_it_forgets_less_than_fine_tuning():
    five = {"data": {"scenario": ClassIncremental(tasks=5), "batch_size": 32}, "max_epochs": 4}
    common = {"backbone": partial(MLP, hidden=(64, 32))}
    plain = last_accuracy(finetuning(common, **five).R_ci)
    ours = last_accuracy(run(MEMO(**common, memory_size=100), **five).matrix.R_ci)
    # Measured: .86 against .10.
    assert ours > plain + 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget_mb": 0.0}, "MEMO: budget_mb is 0"),
        ({"budget_mb": 1.0, "memory_size": 20}, "MEMO: memory_size is 20 and budget_mb 1.0"),
        ({"classifier": "nme"}, "MEMO: classifier is 'nme'"),
    ],
)
def test_wrong_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        MEMO(**options)


def test_a_backbone_of_one_stage_is_refused():
    with pytest.raises(ValueError, match="MLP: layers with weights: 1"):
        MEMO(backbone=partial(MLP, hidden=(8,))).build((1, 8, 8))
