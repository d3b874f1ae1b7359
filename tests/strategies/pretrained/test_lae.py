from functools import partial

import pytest
import torch
from support.pretrained import PretrainedViT, TinyViT, finetuning_in_tasks, in_tasks
from support.runs import loop

from cl_lightning.measures import last_accuracy
from cl_lightning.models import SSF, Adapter, LoRA, Prefix, WholeModel
from cl_lightning.strategies.pretrained.lae import LAE
from cl_lightning.stream import ClassIncremental
from cl_lightning.testing import Subject, check_strategy, small

# SSF: the small net has no transformer blocks for an adapter.
SLOW = "each step runs a transformer and its slow copy"
SUBJECTS = {
    "LAE": Subject(
        small(LAE, peft=SSF, freeze_epochs=1, momentum=0.9),
        first_task_is_finetuning=False,
        reason="a PEFT module is trained, on a frozen backbone",
    ),
}

PUBLISHED = {
    "lae": {
        "source": "gqk/LAE: CIFAR-100, adapters; 3 of 5 epochs train only the head",
        "backbone": "Timm(name=vit_base_patch16_224.orig_in21k, pretrained=True)",
        "momentum": 0.9999,
        "freeze_epochs": 3,
        "optimizer": "Adam(lr=0.0028125)",
        "data.resize": 256,
        "data.center_crop": 224,
        "data.interpolation": "bilinear",
        "data.mean": [0],
        "data.std": [1],
        "data.transforms": ["RandomResizedCrop(scale=[0.08, 1.0], size=224)", "RandomHorizontalFlip()"],
        "data.scenario": "ClassIncremental(class_order=1993, tasks=10)",
        "data.batch_size": 24,
        "data.drop_last": True,
        "loop.first_task_epochs": 5,
        "trainer.max_epochs": 2,
    },
    "lae_lora": {
        "source": "the same, LoRA of rank 5",
        "backbone": "Timm(name=vit_base_patch16_224.orig_in21k, pretrained=True)",
        "peft": "LoRA(learn_scale=True, parts=kv, rank=5, targets=['blocks.[0-4].attn.qkv'])",
        "momentum": 0.9999,
        "freeze_epochs": 3,
        "optimizer": "Adam(lr=0.0028125)",
        "data.resize": 256,
        "data.center_crop": 224,
        "data.interpolation": "bilinear",
        "data.mean": [0],
        "data.std": [1],
        "data.transforms": ["RandomResizedCrop(scale=[0.08, 1.0], size=224)", "RandomHorizontalFlip()"],
        "data.scenario": "ClassIncremental(class_order=1993, tasks=10)",
        "data.batch_size": 24,
        "data.drop_last": True,
        "loop.first_task_epochs": 5,
        "trainer.max_epochs": 2,
    },
    "lae_prefix": {
        "source": "the same, prefixes of length 10",
        "backbone": "Timm(name=vit_base_patch16_224.orig_in21k, pretrained=True)",
        "peft": "Prefix(blocks=[0, 1, 2, 3, 4], compensate=True, high=0.01, learn_scale=True, length=10, low=0.0)",
        "momentum": 0.9999,
        "freeze_epochs": 3,
        "optimizer": "Adam(lr=0.0028125)",
        "data.resize": 256,
        "data.center_crop": 224,
        "data.interpolation": "bilinear",
        "data.mean": [0],
        "data.std": [1],
        "data.transforms": ["RandomResizedCrop(scale=[0.08, 1.0], size=224)", "RandomHorizontalFlip()"],
        "data.scenario": "ClassIncremental(class_order=1993, tasks=10)",
        "data.batch_size": 24,
        "data.drop_last": True,
        "loop.first_task_epochs": 5,
        "trainer.max_epochs": 2,
    },
}

adam = partial(torch.optim.Adam, lr=0.01)
adapter = partial(Adapter, place="attention", bottleneck=5, scale=1.0, learn_scale=True, dropout=0.0, activation="gelu")
SMALL = partial(LAE, backbone=TinyViT, peft=adapter, freeze_epochs=1, optimizer=adam)
IMAGES = torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def learnt(make, tasks=1, **options):
    made = loop(
        make(),
        data={"scenario": ClassIncremental(tasks=5)},
        options={"stop_after_task": tasks - 1},
        **{"max_epochs": 1, **options},
    )
    made.fit()
    return made


def copies(module):
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(first, second):
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_the_first_task_has_one_expert_and_the_second_begins_with_two_that_are_equal():
    made = learnt(SMALL)
    strategy, pair = made.strategy.eval(), made.strategy.network.backbone
    with torch.no_grad():
        torch.testing.assert_close(strategy.predict(IMAGES), strategy.network(IMAGES).logits.log_softmax(1))
        assert not torch.equal(pair.offline_features(IMAGES), pair(IMAGES))
        strategy.begin_task(made.stream.tasks[1])
        assert torch.equal(pair.offline_features(IMAGES), pair(IMAGES))


def test_with_momentum_1_offline_stays_that_of_the_first_task():
    made = learnt(partial(SMALL, momentum=1.0))
    first = copies(made.strategy.network.backbone.online)
    for task in made.stream.tasks[1:3]:
        made._run_task(task, None)
    assert same(copies(made.strategy.network.backbone.offline), first)
    assert not same(copies(made.strategy.network.backbone.online), first)


def test_with_momentum_0_both_experts_are_equal_and_so_is_their_ensemble():
    strategy = learnt(partial(SMALL, momentum=0.0), tasks=3).strategy.eval()
    pair = strategy.network.backbone
    assert same(copies(pair.offline), copies(pair.online))
    with torch.no_grad():
        torch.testing.assert_close(strategy.predict(IMAGES), strategy.network(IMAGES).logits.log_softmax(1))


class Watching(LAE):
    """Keeps the online parameters after each step of the second task."""

    def on_train_start(self):
        super().on_train_start()
        self.seen = getattr(self, "seen", [])

    def after_step(self, batch):
        super().after_step(batch)
        if self.task.index == 1:
            self.seen.append(copies(self.network.backbone.online))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_offline_follows_after_every_optimizer_step_of_later_tasks(accumulate):
    make = partial(Watching, **{**SMALL.keywords, "momentum": 0.8, "freeze_epochs": 0})
    made = learnt(make, accumulate_grad_batches=accumulate)
    average = copies(made.strategy.network.backbone.online)
    made._run_task(made.stream.tasks[1], None)
    previous, steps = average, 0
    for online in made.strategy.seen:
        if not same(online, previous):  # the optimizer has moved it
            average = [0.8 * old + 0.2 * new for old, new in zip(average, online, strict=True)]
            previous, steps = online, steps + 1
    assert steps == -(-len(made.strategy.seen) // accumulate)
    for own, expected in zip(copies(made.strategy.network.backbone.offline), average, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-6)


def test_a_phase_trains_the_head_of_the_task_alone():
    decay = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1)
    made = learnt(partial(SMALL, optimizer=decay))
    strategy, task = made.strategy, made.stream.tasks[1]
    assert [phase.name for phase in strategy.phases(made.stream.tasks[0])] == ["train"]
    assert [(phase.name, phase.options.epochs) for phase in strategy.phases(task)] == [("head", 1), ("train", None)]
    before = copies(strategy.network.backbone)
    strategy.phases = lambda task: [LAE.phases(strategy, task)[0]]
    made._run_task(task, None)
    moved = [not torch.equal(*pair) for pair in zip(before, copies(strategy.network.backbone), strict=True)]
    offline = len(copies(strategy.network.backbone.offline))
    assert not any(moved[:-offline])  # offline has caught up
    assert strategy.network.head.blocks[1].weight.abs().max() > 0.01


def test_the_ensemble_is_the_larger_probability_whatever_the_batch():
    strategy = learnt(partial(SMALL, momentum=0.9), tasks=3).strategy.eval()
    pair, head = strategy.network.backbone, strategy.network.head
    with torch.no_grad():
        both = torch.stack([head(pair(IMAGES)), head(pair.offline_features(IMAGES))]).softmax(2)
        torch.testing.assert_close(strategy.predict(IMAGES).exp(), both.amax(0))
        alone = torch.cat([strategy.predict(image[None]) for image in IMAGES])
        torch.testing.assert_close(alone, strategy.predict(IMAGES), rtol=1e-4, atol=1e-5)


def test_its_parts_match_the_paper():
    strategy = LAE(backbone=partial(TinyViT, depth=6))
    strategy.build((1, 8, 8))
    sites = strategy.network.backbone.online.sites
    assert len(sites) == 5
    assert [tuple(site.down.weight.shape) for site in sites] == [(5, 24)] * 5
    assert all(site.factor.requires_grad and float(site.factor.detach()) == 1 for site in sites)
    strategy.network.head.grow(100)
    assert float(strategy.network.head.weight().detach().std()) == pytest.approx(0.001, rel=0.1)
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():  # at the beginning nothing changes
        assert torch.equal(strategy.eval().network.backbone(images), TinyViT((1, 8, 8), depth=6).eval()(images))


def test_it_forgets_less_than_fine_tuning():
    plain = finetuning_in_tasks({"backbone": PretrainedViT, "optimizer": partial(torch.optim.Adam, lr=3e-3)}, 5)
    make = partial(SMALL, backbone=PretrainedViT, momentum=0.95)
    made = in_tasks(make, 5, max_epochs=2)
    # Measured: .53 against .24.
    assert last_accuracy(made.matrix.R_ci) > last_accuracy(plain.R_ci) + 0.14


@pytest.mark.parametrize(
    "peft", [adapter, partial(LoRA, parts="kv", learn_scale=True), partial(Prefix, compensate=True)]
)
def test_what_the_paper_puts_into_a_transformer_passes_the_suite(peft):
    check_strategy(
        small(LAE, freeze_epochs=1, momentum=0.9, backbone=TinyViT, peft=peft), checks=["trains", "restores"]
    )


def test_a_transformer_is_resumed():
    check_strategy(small(LAE, freeze_epochs=1, momentum=0.9, backbone=TinyViT, peft=SSF), checks=["resume", "options"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"momentum": 1.5}, "momentum is 1.5"),
        ({"freeze_epochs": -1}, "freeze_epochs is -1"),
        ({"peft": WholeModel}, "of which there is only one"),
        ({"peft": None}, r"blocks \[0, 1, 2, 3, 4\]"),
    ],
)
def test_options_out_of_range_are_errors(options, words):
    with pytest.raises(ValueError, match=words):
        LAE(backbone=TinyViT, **options).build((1, 8, 8))
