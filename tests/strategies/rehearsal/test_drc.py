import math
from functools import partial

import pytest
import torch
from support.baselines import finetuning
from support.expanding import Watch, begin, part
from support.fakes import batch_of, normal
from support.runs import assert_same, plain_net, run, sgd
from torch.nn import functional as F

from cl_lightning.measures import last_accuracy
from cl_lightning.memory import Memory
from cl_lightning.models import MLP, CifarResNet, LinearHead
from cl_lightning.strategies.rehearsal.drc import DRC, BranchedBackbone, BranchHead
from cl_lightning.strategy import Phase, PhaseOptions
from cl_lightning.stream import ClassIncremental
from cl_lightning.testing import Subject, TinyDigits, small

PUBLISHED = {
    "drc_cifar100": {
        "source": "chen-xw/DRC-CIL: mafdrc-cifar100.json, models/mafdrc.py (no decay in the fusion), utils/data.py",
        "memory_size": 2000,
        "independent_weight": 0.2,
        "old_weight": 4.0,
        "new_weight": 1.0,
        "prior_power": 1.2,
        "temperature": 2.0,
        "backbone": "ResNet32",
        "optimizer": "SGD(lr=0.1, momentum=0.9, weight_decay=0.0005)",
        "scheduler": "CosineOverPhase()",
        "adapt_options": {"epochs": 70},
        "fuse_options": {"epochs": 130, "optimizer": "SGD(lr=0.1, momentum=0.9)", "scheduler": "CosineOverPhase()"},
        "data.scenario": "ClassIncremental(class_order=1993, tasks=10)",
        "data.batch_size": 128,
        "data.transforms": [
            "RandomCrop(padding=4)",
            "RandomHorizontalFlip()",
            "ColorJitter(brightness=0.247)",
            "AutoAugment()",
            "Cutout(size=16)",
        ],
        "trainer.max_epochs": 200,
    },
}

SUBJECTS = {
    "DRC": Subject(
        small(DRC, adapt_options=PhaseOptions(epochs=1)),
        data=partial(TinyDigits, drop_last=True),
        matches_single_process=False,
        reason="the branches normalise by the batch of a process, which one image is too few for",
    )
}
SMALL = partial(DRC, backbone=plain_net, optimizer=sgd, memory_size=60)
TINY_RESNET = partial(CifarResNet, depth=8, width=2)


def learning(tasks=3, *, backbone=plain_net, **options):
    """At the start of a task, with branches that differ, in float64."""
    torch.manual_seed(0)
    strategy = DRC(backbone=backbone, **options)
    strategy.build((1, 8, 8))
    for index in range(tasks):
        begin(strategy, index)
        with torch.no_grad():
            for number, norm in enumerate(strategy.backbone.norms):
                norm.weight.add_(0.1 * index + 0.2 * number)
                norm.bias.sub_(0.3 * index + 0.1 * number)
                norm.running_mean.fill_(0.5 * index)
    return strategy.double().eval()


def branches_of(strategy, images):
    """z_N and z_O of a network whose backbone is a ``plain_net``, from its weights."""
    hidden = strategy.backbone.stem.backbone(images)
    weight = strategy.network.head.weight()
    bias = torch.cat([block.bias for block in strategy.network.head.blocks])
    logits = []
    for norm in strategy.backbone.norms:
        scaled = (hidden - norm.running_mean) / (norm.running_var + 1e-5).sqrt() * norm.weight + norm.bias
        logits.append(scaled @ weight.T + bias)
    return logits


def test_logits_are_the_sum_of_the_branches_under_one_head():
    strategy, images = learning(), normal(5, 1, 8, 8)
    new, old = branches_of(strategy, images)
    assert new.shape == (5, 6)
    assert (new - old).abs().min() > 1e-3
    torch.testing.assert_close(strategy.network(images).logits, new + old)
    torch.testing.assert_close(strategy.predict(images), new + old)
    first = learning(tasks=1)
    (new,) = branches_of(first, images)
    torch.testing.assert_close(first.predict(images), new)


def test_branches_of_a_resnet_normalise_its_last_feature_map():
    backbone = BranchedBackbone((1, 8, 8), extractor=TINY_RESNET).double()
    backbone.merge()
    images = normal(3, 1, 8, 8)
    with torch.no_grad():
        backbone.norms[1].weight.mul_(2)
    maps = backbone.stem.backbone.eval().feature_map(images)  # (3, 8, 2, 2)
    mean, var = maps.mean((0, 2, 3), keepdim=True), maps.var((0, 2, 3), keepdim=True, unbiased=False)
    scaled = ((maps - mean) / (var + 1e-5).sqrt()).mean((2, 3))
    torch.testing.assert_close(backbone(images), torch.cat([scaled, 2 * scaled], 1))


def test_branches_are_merged_at_the_start_of_a_task():
    backbone = BranchedBackbone((1, 8, 8), extractor=plain_net)
    with torch.no_grad():
        backbone.norms[0].weight.fill_(3.0)
        backbone.norms[0].bias.fill_(-1.0)
        backbone.norms[0].running_mean.fill_(7.0)
    assert backbone.num_features == 16
    backbone.merge()
    assert backbone.num_features == 32
    new, old = backbone.norms
    assert [float(value[0]) for value in (old.weight, old.bias, old.running_mean)] == [3.0, -1.0, 0.0]
    assert float(new.running_mean[0]) == 7.0
    with torch.no_grad():
        new.weight.fill_(5.0)
        new.bias.fill_(2.0)
        old.running_mean.fill_(4.0)
    backbone.merge()
    assert len(backbone.extractors) == 2
    assert [float(value[0]) for value in (old.weight, old.bias, old.running_mean)] == [4.0, 0.5, 4.0]
    assert [float(value[0]) for value in (new.weight, new.bias)] == [5.0, 2.0]
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with torch.no_grad():
        new.weight.copy_(old.weight)
        new.bias.copy_(old.bias)
    backbone.merge()
    assert_same(part(before, "extractors.1."), part(backbone.state_dict(), "extractors.1."))


def test_adaptation_is_over_the_new_classes_alone():
    strategy, images = learning(), normal(4, 1, 8, 8)
    strategy.phase, labels = Phase("adapt"), torch.tensor([4, 5, 5, 2])  # 2 is old, and does not count
    terms = strategy.losses(batch_of(labels, images=images), strategy.network(images))
    logits = sum(branches_of(strategy, images))[:, 4:]
    assert terms.keys() == {"ce"}
    torch.testing.assert_close(terms["ce"], F.cross_entropy(logits[:3], torch.tensor([0, 1, 1])))
    terms["ce"].backward()
    assert not any(block.weight.grad.any() or block.bias.grad.any() for block in list(strategy.network.head.blocks)[:2])


def fusion(**options):
    """The terms of the fusion of six samples of classes 0, 2, 4, 4, 5 and none, and what they are made of."""
    strategy, images = learning(**options), normal(6, 1, 8, 8)
    strategy.new_teacher.learn_from(strategy.network)
    with torch.no_grad():  # the student moves away from the teacher
        for block in strategy.network.head.blocks:
            block.weight.add_(normal(*block.weight.shape))
    strategy.phase, labels = Phase("fuse"), torch.tensor([0, 2, 4, 4, 5, -1])
    strategy._count(torch.tensor([0] * 2 + [1] * 2 + [2] * 2 + [3] * 2 + [4] * 20 + [5] * 12 + [-1] * 3), None)
    strategy._log_prior = strategy._log_prior.double()
    return strategy, images, labels, strategy.losses(batch_of(labels, images=images), strategy.network(images))


def test_the_fusion_losses_match_the_paper():
    options = {"independent_weight": 0.3, "old_weight": 3.0, "new_weight": 0.7, "prior_power": 1.5, "temperature": 4.0}
    strategy, images, labels, terms = fusion(**options)
    new, old = branches_of(strategy, images)
    prior = torch.tensor([2.0, 2, 2, 2, 20, 12]).double() / 40
    adjusted = new + old + torch.log(prior**1.5 + 1e-12)
    known = labels[:5]
    every, only = (F.cross_entropy(z[:n], known[:n], reduction="sum") for z, n in ((new, 5), (old, 2)))
    teachers = strategy.old_teacher(images).logits, strategy.new_teacher(images).logits[:, 4:]
    assert teachers[0].shape == (6, 4)
    distill = [
        -((target / 4).softmax(1) * (mine / 4).log_softmax(1)).sum(1).mean()
        for mine, target in zip((adjusted[:, :4], adjusted[:, 4:]), teachers, strict=True)
    ]
    expected = {
        "independent": 0.3 * (every + only) / 7,
        "ce": 0.7 * F.cross_entropy(adjusted[:5], known),
        "old": 3.0 * distill[0],
        "new": 0.7 * distill[1],
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-6, atol=1e-6)


def test_without_its_terms_fusion_is_cross_entropy_of_the_summed_logits():
    off = {"independent_weight": 0.0, "old_weight": 0.0, "new_weight": 0.0, "prior_power": 0.0}
    strategy, images, labels, terms = fusion(**off)
    expected = F.cross_entropy(sum(branches_of(strategy, images))[:5], labels[:5])
    torch.testing.assert_close(sum(terms.values()), expected, rtol=1e-6, atol=1e-6)


def test_equally_frequent_classes_have_a_common_adjustment():
    strategy = learning(tasks=2)
    strategy._count(torch.arange(4).repeat(5), None)
    torch.testing.assert_close(strategy._log_prior, torch.full((4,), 1.2 * math.log(0.25)))
    strategy._count(torch.tensor([0, 0, 1, 2]), None)  # a class without samples
    assert float(strategy._log_prior[3]) == pytest.approx(math.log(1e-12))


# ---------------------------------------------------------------------- the phases


def test_the_phases_of_a_task():
    watch, net = Watch(), TINY_RESNET
    strategy = DRC(backbone=net, optimizer=sgd, memory_size=60)
    made = run(strategy, watch, max_epochs=1, data={"batch_size": 200})
    names = [f"network.backbone.extractors.1.norm.{name}" for name in ("weight", "bias", "running_mean")]
    for task, old in ((1, range(4)), (2, range(7))):
        first, adapted = watch.first[task, "adapt"], watch.last[task, "adapt"]
        start, end = watch.first[task, "fuse"], watch.last[task, "fuse"]
        before = watch.last[task - 1, "fuse" if task > 1 else "train"]
        assert not set(torch.cat(watch.labels[task, "adapt"]).tolist()) & set(old)
        assert set(torch.cat(watch.labels[task, "fuse"]).tolist()) > set(old)
        assert_same(
            part(first, "old_teacher.network."), {f"old_teacher.{k}": v for k, v in part(before, "network.").items()}
        )
        assert_same(part(first, "old_teacher.network."), part(end, "old_teacher.network."))
        assert_same(
            part(start, "new_teacher.network."), {f"new_teacher.{k}": v for k, v in part(adapted, "network.").items()}
        )
        assert_same(part(start, "new_teacher.network."), part(end, "new_teacher.network."))
        for name in names[:2]:  # scale and shift of O are fixed
            assert torch.equal(first[name], adapted[name])
            assert torch.equal(first[name], end[name])
            mine, merged = (before.get(key, before[name.replace("1.norm", "0.norm")]) for key in (name, ""))
            torch.testing.assert_close(first[name], (mine + merged) / 2)
        assert not torch.equal(first[names[2]], adapted[names[2]])
        assert not start[names[2]].any()
        assert end[names[2]].any()
        trained = ("network.backbone.stem.", "network.backbone.extractors.0.", "network.head.")
        for pair in ((first, adapted), (start, end)):
            for name, value in pair[0].items():
                if name.startswith(trained) and not (pair[0] is first and ".blocks." in name):
                    assert not torch.equal(value, pair[1][name]), name
    sizes = [cost.parameters for cost in made.meter.tasks]
    assert [size - sizes[0] for size in sizes] == [0, 16 + 3 * 9, 16 + 6 * 9]
    left = {name.partition(".")[0] for name in strategy.state_dict()}
    assert left == {"network", "memory", "task_columns"}


def test_it_forgets_less_than_fine_tuning():
    five = {"data": {"scenario": ClassIncremental(tasks=5), "batch_size": 32}, "max_epochs": 4}
    common = {"backbone": partial(MLP, hidden=(64,))}
    plain = last_accuracy(finetuning(common, **five).R_ci)
    data = {**five["data"], "drop_last": True}
    ours = last_accuracy(run(DRC(**common, memory_size=100), data=data, max_epochs=2).matrix.R_ci)
    # Measured: .90 against .17.
    assert ours > plain + 0.3


@pytest.mark.parametrize(
    "options",
    [
        {"independent_weight": 1.5},
        {"old_weight": -1.0},
        {"new_weight": -1.0},
        {"prior_power": -1.0},
        {"temperature": 0.0},
        {"adapt_options": PhaseOptions(epochs=0)},
        {"fuse_options": PhaseOptions(epochs=0)},
        {"freeze_backbone": True},
        {"loss_classes": "task"},
    ],
)
def test_wrong_options_are_errors(options):
    with pytest.raises(ValueError, match=f"DRC: {next(iter(options))}"):
        DRC(**options)


def test_a_head_of_one_branch_is_refused():
    with pytest.raises(ValueError, match="DRC: head is LinearHead; use a BranchHead"):
        DRC(head=LinearHead).build((1, 8, 8))
    assert isinstance(learning(tasks=1).network.head, BranchHead)


def test_a_process_without_samples_has_features_of_the_same_width():
    class Look(DRC):
        def end_task(self, task):
            super().end_task(task)
            widths.append([len(self.passes.features(memory=memory)[0][0:0].T) for memory in (Memory(4), self.memory)])

    widths = []
    run(Look(backbone=plain_net, memory_size=20), max_epochs=1, options={"stop_after_task": 1}, limit_train_batches=2)
    assert widths == [[16, 16], [32, 32]]
