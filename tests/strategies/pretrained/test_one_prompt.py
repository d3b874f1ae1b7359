from functools import partial

import pytest
import torch
from support.fakes import batch_of
from support.pretrained import PretrainedViT, TinyViT, finetuning_in_tasks, in_tasks, tiny_transformer
from support.runs import loop
from torch.nn import functional as F

from cl_lightning.measures import last_accuracy
from cl_lightning.strategies.pretrained.dual_prompt import DualPrompt
from cl_lightning.strategies.pretrained.one_prompt import OnePrompt
from cl_lightning.stream import ClassIncremental
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "OnePrompt": Subject(
        small(OnePrompt, backbone=tiny_transformer, lengths=(2, 3), blocks=(0, 1)),
        first_task_is_finetuning=False,
        reason="prompts are trained, on a frozen backbone",
    ),
}

PUBLISHED = {
    "one_prompt": {
        "source": "jpmorganchase/ovor: configs/cifar-100_prompt.yaml and experiments/cifar-100.sh",
        "backbone": "Timm(name=vit_base_patch16_224.augreg_in21k_ft_in1k, pretrained=True)",
        "lengths": [5, 5, 20, 20, 20],
        "blocks": [0, 1, 2, 3, 4],
        "optimizer": "Adam(lr=0.001)",
        "scheduler": "QuarterCosineOverPhase(late=1)",
        "data.resize": 224,
        "data.center_crop": None,
        "data.interpolation": "bilinear",
        "data.mean": [0],
        "data.std": [1],
        "data.transforms": ["RandomResizedCrop(scale=[0.08, 1.0], size=224)", "RandomHorizontalFlip()"],
        "data.scenario": "ClassIncremental(class_order=1993, tasks=10)",
        "data.batch_size": 128,
        "data.drop_last": True,
        "trainer.max_epochs": 20,
    },
}

adam = partial(torch.optim.Adam, lr=0.03)
SMALL = partial(OnePrompt, backbone=TinyViT, lengths=(2, 3), blocks=(0, 1), optimizer=adam)


def learnt(make, tasks=1):
    made = loop(
        make(), data={"scenario": ClassIncremental(tasks=5)}, options={"stop_after_task": tasks - 1}, max_epochs=1
    )
    made.fit()
    return made


def test_the_loss_is_cross_entropy_over_the_classes_of_the_task():
    strategy = learnt(SMALL, tasks=2).strategy.train()
    batch = batch_of(torch.tensor([2, 3, 3, 2]))
    output = strategy.network(torch.randn(4, 1, 8, 8))
    terms = strategy.losses(batch, output)
    assert terms.keys() == {"ce"}
    torch.testing.assert_close(terms["ce"], F.cross_entropy(output.logits[:, 2:], batch.labels - 2))


def test_prefixes_and_rows_of_the_task_are_trained():
    made = learnt(SMALL)
    before = {name: value.clone() for name, value in made.strategy.state_dict().items()}
    made._run_task(made.stream.tasks[1], None)
    state = made.strategy.state_dict()
    moved = {name for name, value in before.items() if "network." in name and not torch.equal(state[name], value)}
    sites = (f"network.backbone.peft.sites.{site}" for site in range(2))
    assert moved == {f"{site}.{rows}" for site in sites for rows in ("keys", "values")}


def test_it_is_dual_prompt_with_one_expert_that_all_tasks_share():
    dual = DualPrompt(
        backbone=TinyViT, general_length=2, general_blocks=(0,), expert_length=3, expert_blocks=(1,), low=-1.0, high=1.0
    )
    one = SMALL()
    for strategy in (dual, one):
        strategy.build((1, 8, 8))
        strategy.eval()
    prompts, sites = dual.network.backbone.prompts, one.network.backbone.peft.sites
    prompts.grow()
    with torch.no_grad():
        for site, rows in zip(sites, (prompts.general[0], prompts.experts[0][0]), strict=True):
            site.keys.copy_(rows[0])
            site.values.copy_(rows[1])
        images = torch.randn(5, 1, 8, 8)
        torch.testing.assert_close(one.network.backbone(images), dual.network.backbone(images))


def test_prefixes_are_drawn_between_0_and_1():
    strategy = OnePrompt(backbone=partial(TinyViT, depth=5))
    strategy.build((1, 8, 8))
    sites = strategy.network.backbone.peft.sites
    assert [tuple(site.keys.shape) for site in sites] == [(n, 24) for n in (5, 5, 20, 20, 20)]
    values = torch.cat([part.detach().flatten() for site in sites for part in (site.keys, site.values)])
    assert 0 <= values.min() < 0.01
    assert 0.99 < values.max() <= 1
    assert float(values.mean()) == pytest.approx(0.5, abs=0.02)


def test_it_forgets_less_than_fine_tuning():
    plain = finetuning_in_tasks({"backbone": PretrainedViT, "optimizer": partial(torch.optim.Adam, lr=3e-3)}, 5)
    made = in_tasks(partial(SMALL, backbone=PretrainedViT, lengths=(1, 1), high=0.01), 5, max_epochs=2)
    # Measured: .41 against .24.
    assert last_accuracy(made.matrix.R_ci) > last_accuracy(plain.R_ci) + 0.08


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lengths": (2,)}, "length has 1 numbers"),
        ({"lengths": (2, 0)}, "length is 0"),
        ({"blocks": (0, 4)}, r"blocks \[0, 4\]"),
        ({"low": 2.0}, "low is 2.0"),
    ],
)
def test_options_out_of_range_are_errors(options, words):
    with pytest.raises(ValueError, match=words):
        partial(SMALL, **options)().build((1, 8, 8))
