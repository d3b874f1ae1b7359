from functools import partial

import pytest
import torch
from support.fakes import batch_of
from support.pretrained import PretrainedViT, TinyViT, finetuning_in_tasks, in_tasks, tiny_transformer
from support.runs import loop
from torch.nn import functional as F

from cl_lightning.measures import last_accuracy
from cl_lightning.strategies.pretrained.coda_prompt import CODAPrompt
from cl_lightning.stream import ClassIncremental
from cl_lightning.testing import Subject, check_strategy, small

SLOW = "each step runs the network twice, once for the query"

SUBJECTS = {
    "CODAPrompt": Subject(
        small(CODAPrompt, backbone=tiny_transformer, components=2, length=4, blocks=(0, 1), ortho_weight=0.1),
        first_task_is_finetuning=False,
        reason="prompts are trained, on a frozen backbone",
    ),
}

PUBLISHED = {
    "coda_prompt": {
        "source": "GT-RIPL/CODA-Prompt: cifar-100_prompt.yaml and its script (100 components over 10 tasks, mu 0)",
        "backbone": "Timm(name=vit_base_patch16_224.augreg_in21k_ft_in1k, pretrained=True)",
        "components": 10,
        "length": 8,
        "blocks": [0, 1, 2, 3, 4],
        "ortho_weight": 0.0,
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
SMALL = partial(CODAPrompt, backbone=TinyViT, components=2, length=4, blocks=[0, 1], optimizer=adam)


def learnt(make, tasks=1):
    made = loop(
        make(), data={"scenario": ClassIncremental(tasks=5)}, options={"stop_after_task": tasks - 1}, max_epochs=1
    )
    made.fit()
    return made


def test_earlier_components_and_rows_never_change_again():
    made = learnt(SMALL)
    before = {name: value.clone() for name, value in made.strategy.state_dict().items()}
    made._run_task(made.stream.tasks[1], None)
    state = made.strategy.state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items() if "network." in name)
    new = {name for name in state if name not in before}
    assert new == {
        "network.backbone.prompts.prompts.1",
        "network.backbone.prompts.keys.1",
        "network.backbone.prompts.attention.1",
        "network.head.blocks.1.weight",
        "network.head.blocks.1.bias",
    }
    strategy = made.strategy
    strategy.begin_phase(strategy.phases(made.stream.tasks[1])[0], 0)
    strategy.network(torch.randn(3, 1, 8, 8)).logits.sum().backward()
    prompts = strategy.network.backbone.prompts
    for group in (prompts.prompts, prompts.keys, prompts.attention):
        assert group[0].grad is None
        assert group[1].grad.any()


def test_the_losses_match_the_paper():
    strategy = learnt(partial(SMALL, ortho_weight=0.1), tasks=2).strategy.train()
    batch = batch_of(torch.tensor([2, 3, 3, 2]))
    output = strategy.network(torch.randn(4, 1, 8, 8))
    terms = strategy.losses(batch, output)
    torch.testing.assert_close(terms["ce"], F.cross_entropy(output.logits[:, 2:], batch.labels - 2))
    prompts, expected = strategy.network.backbone.prompts, 0.0
    for group in (prompts.prompts, prompts.keys, prompts.attention):
        for block in range(2):
            rows = torch.cat([part[block] for part in group]).flatten(1)
            expected += (rows @ rows.T - torch.eye(4)).square().mean()
    torch.testing.assert_close(terms["ortho"], 0.1 * expected)


def test_new_components_begin_orthogonal_to_trained_ones():
    made = learnt(SMALL)
    torch.manual_seed(3)
    prompts = made.strategy.network.backbone.prompts
    prompts.grow(2)
    for group in (prompts.prompts, prompts.keys, prompts.attention):
        for old, new in zip(*group, strict=True):
            torch.testing.assert_close(new.flatten(1) @ old.flatten(1).T, torch.zeros(2, 2), rtol=0, atol=1e-5)
            torch.testing.assert_close(new.flatten(1) @ new.flatten(1).T, torch.eye(2), rtol=0, atol=1e-5)


def test_prompts_of_0_still_take_a_part_of_the_attention():
    strategy = SMALL()
    strategy.build((1, 8, 8))
    backbone, images = strategy.eval().network.backbone, torch.randn(3, 1, 8, 8)
    backbone.prompts.grow(2)
    with torch.no_grad():
        backbone.prompts.prompts[0].zero_()
        assert not torch.allclose(backbone(images), backbone.base(images))


def test_predictions_do_not_depend_on_the_batch():
    strategy, images = learnt(SMALL, tasks=2).strategy.eval(), torch.randn(7, 1, 8, 8)
    with torch.no_grad():
        together = strategy.predict(images)
        alone = torch.cat([strategy.predict(image[None]) for image in images])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


def test_it_forgets_less_than_fine_tuning():
    plain = finetuning_in_tasks({"backbone": PretrainedViT, "optimizer": partial(torch.optim.Adam, lr=3e-3)}, 5)
    made = in_tasks(partial(SMALL, backbone=PretrainedViT), 5, max_epochs=2)
    # Measured: .41 against .24.
    assert last_accuracy(made.matrix.R_ci) > last_accuracy(plain.R_ci) + 0.08


def test_more_components_than_there_is_room_for_pass_the_suite():
    many = small(CODAPrompt, backbone=tiny_transformer, components=7, length=4, blocks=(0, 1), ortho_weight=0.1)
    check_strategy(many, checks=["trains", "resume", "restores"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"components": 0}, "components is 0"),
        ({"ortho_weight": -1.0}, "ortho_weight is -1.0"),
        ({"length": 3}, "length is 3"),
        ({"blocks": (4,)}, r"blocks \[4\]"),
    ],
)
def test_options_out_of_range_are_errors(options, words):
    with pytest.raises(ValueError, match=words):
        CODAPrompt(backbone=TinyViT, **{"blocks": (0, 1), **options}).build((1, 8, 8))
