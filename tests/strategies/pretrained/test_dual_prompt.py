from functools import partial

import pytest
import torch
from support.fakes import batch_of
from support.pretrained import PretrainedViT, TinyViT, finetuning_in_tasks, in_tasks, tiny_transformer
from support.runs import loop, run
from torch.nn import functional as F

from cl_lightning.measures import last_accuracy
from cl_lightning.strategies.pretrained.dual_prompt import DualPrompt
from cl_lightning.stream import ClassIncremental, RotatedDomains
from cl_lightning.testing import Subject, check_strategy, small

PLACES = {"general_length": 2, "general_blocks": (0,), "expert_length": 3, "expert_blocks": (1,)}

SUBJECTS = {
    "DualPrompt": Subject(
        small(DualPrompt, backbone=tiny_transformer, **PLACES),
        first_task_is_finetuning=False,
        reason="prompts are trained, on a frozen backbone",
    ),
}

PUBLISHED = {
    "dual_prompt": {
        "source": "google-research/l2p: configs/cifar100_dualprompt.py; 24 images, 0.03 * 24 / 256",
        "backbone": "Timm(name=vit_base_patch16_224.orig_in21k, pretrained=True)",
        "general_length": 5,
        "general_blocks": [0, 1],
        "expert_length": 5,
        "expert_blocks": [2, 3, 4],
        "key_weight": 1.0,
        "optimizer": "Adam(lr=0.0028125)",
        "data.resize": 256,
        "data.center_crop": 224,
        "data.interpolation": "bilinear",
        "data.mean": [0],
        "data.std": [1],
        "data.transforms": ["RandomResizedCrop(scale=[0.05, 1.0], size=224)", "RandomHorizontalFlip()"],
        "data.scenario": "ClassIncremental(class_order=1993, tasks=10)",
        "data.batch_size": 24,
        "trainer.max_epochs": 5,
        "trainer.gradient_clip_val": 1.0,
    },
}

adam = partial(torch.optim.Adam, lr=0.03)
SMALL = partial(DualPrompt, backbone=TinyViT, optimizer=adam, low=-1.0, high=1.0, **PLACES)
IMAGES = torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def learnt(make, tasks=1):
    made = loop(
        make(), data={"scenario": ClassIncremental(tasks=5)}, options={"stop_after_task": tasks - 1}, max_epochs=1
    )
    made.fit()
    return made


def test_the_losses_match_the_paper():
    strategy = learnt(partial(SMALL, key_weight=0.5), tasks=2).strategy.train()
    backbone, batch = strategy.network.backbone, batch_of(torch.tensor([2, 3, 3, 2]), images=IMAGES[:4])
    output = strategy.network(batch.images)
    terms = strategy.losses(batch, output)
    torch.testing.assert_close(terms["ce"], F.cross_entropy(output.logits[:, 2:], batch.labels - 2))
    cosines = F.cosine_similarity(backbone.query(batch.images), backbone.prompts.keys[1], dim=1)
    torch.testing.assert_close(terms["keys"], -0.5 * cosines.mean())


def test_general_prefix_newest_expert_and_rows_of_the_task_are_trained():
    made = learnt(SMALL)
    before = {name: value.clone() for name, value in made.strategy.state_dict().items()}
    made._run_task(made.stream.tasks[1], None)
    prompts, state = made.strategy.network.backbone.prompts, made.strategy.state_dict()
    assert [p.requires_grad for group in (prompts.experts, prompts.keys) for p in group] == [False, True] * 2
    moved = {name for name, value in before.items() if "network." in name and not torch.equal(state[name], value)}
    assert moved == {"network.backbone.prompts.general"}
    assert {name for name in state if name not in before} == {
        "network.backbone.prompts.experts.1",
        "network.backbone.prompts.keys.1",
        "network.head.blocks.1.weight",
        "network.head.blocks.1.bias",
    }
    assert not torch.equal(state["network.backbone.prompts.experts.1"], state["network.backbone.prompts.experts.0"])


def test_an_image_whose_task_is_known_gets_the_expert_of_its_task():
    strategy = learnt(SMALL, tasks=3).strategy.eval()
    prompts, tasks = strategy.network.backbone.prompts, torch.tensor([2, 0, 1, 1, 0, 2, 2])
    with torch.no_grad():
        scores, own = strategy.predict(IMAGES, tasks), strategy.predict(IMAGES)
        for row, task in enumerate(tasks):
            prompts.choice = task
            alone = strategy.network(IMAGES[row : row + 1]).logits[0]
            torch.testing.assert_close(scores[row], alone, rtol=1e-4, atol=1e-5)
        together = strategy.predict(IMAGES)
    torch.testing.assert_close(own, together)
    assert strategy.traits.task_ids == "inferred"


def test_a_test_batch_votes_where_the_option_says_so():
    strategy = learnt(partial(SMALL, batchwise_prompt=True), tasks=3).strategy.eval()
    prompts, backbone = strategy.network.backbone.prompts, strategy.network.backbone
    assert strategy.traits.transductive
    assert not SMALL().traits.transductive
    with torch.no_grad():  # two images for expert 1, one for expert 0, one for expert 2
        query = backbone.query(IMAGES[:4])
        for number, key in enumerate(prompts.keys):
            key.copy_(query[[1, 0, 2][number]])
        rows = [0, 0, 1, 2]
        assert prompts.select(query[rows]).tolist() == [1, 1, 0, 2]
        scores = strategy.predict(IMAGES[rows])
        prompts.choice = torch.tensor(1)
        torch.testing.assert_close(scores, strategy.network(IMAGES[rows]).logits)
        known = strategy.predict(IMAGES[rows], torch.zeros(4, dtype=torch.int64))
        prompts.choice = torch.tensor(0)
        torch.testing.assert_close(known, strategy.network(IMAGES[rows]).logits)


def test_each_domain_has_an_expert_though_its_classes_come_back():
    made = run(SMALL(), data={"scenario": RotatedDomains(degrees=[0.0, 90.0]), "batch_size": 256}, max_epochs=1)
    assert made.strategy.network.head.block_sizes() == [10]
    assert len(made.strategy.network.backbone.prompts.experts) == 2
    assert made.matrix.R_ci[1].isfinite().all()


def test_it_forgets_less_than_fine_tuning():
    plain = finetuning_in_tasks({"backbone": PretrainedViT, "optimizer": partial(torch.optim.Adam, lr=3e-3)}, 5)
    made = in_tasks(partial(SMALL, backbone=PretrainedViT, low=0.0, high=0.01), 5, max_epochs=2)
    # Measured: .53 against .24.
    assert last_accuracy(made.matrix.R_ci) > last_accuracy(plain.R_ci) + 0.15


def test_a_vote_passes_the_suite():
    voting = small(DualPrompt, backbone=tiny_transformer, batchwise_prompt=True, **PLACES)
    check_strategy(voting, checks=["trains", "task_ids"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"key_weight": -1.0}, "key_weight is -1.0"),
        ({"general_length": -1}, "general_length is -1"),
        ({"expert_length": 0}, "expert_length is 0"),
        ({"expert_blocks": (4,)}, r"blocks \[4\]"),
    ],
)
def test_options_out_of_range_are_errors(options, words):
    with pytest.raises(ValueError, match=words):
        DualPrompt(backbone=TinyViT, **{**PLACES, **options}).build((1, 8, 8))
