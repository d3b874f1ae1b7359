from functools import partial

import pytest
import torch
from support.fakes import batch_of
from support.pretrained import PretrainedViT, TinyViT, finetuning_in_tasks, in_tasks
from support.runs import loop, plain_net
from torch.nn import functional as F

from cl_lightning.measures import last_accuracy
from cl_lightning.strategies.pretrained.cl_lora import BranchPrototypes, CLLoRA, mean_overlap, row_shares
from cl_lightning.stream import ClassIncremental
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "CLLoRA": Subject(
        small(CLLoRA, backbone=TinyViT, rank=2),
        first_task_is_finetuning=False,
        reason="LoRA is trained, on a frozen backbone",
    ),
}

SLOW = "each step runs a transformer, and its first blocks twice more"

PUBLISHED = {
    "cl_lora": {
        "source": "JiangpengHe/CL-LoRA: CIFAR-100, 20 tasks, ViT-B/16 IN21k",
        "backbone": "Timm(name=vit_base_patch16_224.augreg_in21k, pretrained=True)",
        "rank": 8,
        "shared_blocks": 6,
        "optimizer": "SGD(lr=0.03, momentum=0.9, weight_decay=0.0001)",
        "scheduler": "CosineOverPhase",
        "data.resize": 256,
        "data.center_crop": 224,
        "data.interpolation": "bicubic",
        "data.mean": [0],
        "data.std": [1],
        "data.transforms": ["RandomResizedCrop(scale=[0.05, 1.0], size=224)", "RandomHorizontalFlip()"],
        "data.scenario": "ClassIncremental(class_order=1993, tasks=20)",
        "data.batch_size": 64,
        "trainer.max_epochs": 30,
    },
}

sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
SMALL = partial(CLLoRA, backbone=TinyViT, rank=3, optimizer=sgd)
IMAGES = torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def learnt(make=SMALL, tasks=1, **options):
    made = loop(
        make(),
        data={"scenario": ClassIncremental(tasks=5)},
        options={"stop_after_task": tasks - 1},
        **{"max_epochs": 1, **options},
    )
    made.fit()
    return made


def further(made, number):
    made._run_task(made.stream.tasks[number], None)


# ---------------------------------------------------------------------- the formulas


def test_rows_are_weighed_by_their_norms_with_mean_1():
    up = torch.tensor([[[3.0, 4.0], [0.0, 0.0], [0.0, 1.0]], [[0.0, 0.0]] * 3], dtype=torch.float64)
    torch.testing.assert_close(row_shares(up), torch.tensor([[2.5, 0.0, 0.5], [1.0, 1.0, 1.0]], dtype=torch.float64))


def test_the_overlap_is_the_mean_over_tasks_of_absolute_cosines():
    scales = torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    earlier = torch.tensor([[[1.0, 0.0], [9.0, 0.0]], [[0.0, 0.0], [0.0, -2.0]]], dtype=torch.float64)
    expected = torch.tensor((3 / (5 * 82**0.5) + 0.8) / 2, dtype=torch.float64)
    torch.testing.assert_close(mean_overlap(scales, earlier), expected)


def test_a_class_is_scored_in_its_own_branch_alone():
    means = BranchPrototypes(3)
    first, second = torch.randn(5, 3), torch.randn(3, 3)
    means.assign(first, torch.tensor([0, 0, 1, -1, 1]), 2, 0)
    means.assign(second, torch.tensor([0, 3, 3]), 4, 1)  # class 0 recurs, class 2 has no images
    assert means.branches.tolist() == [1, 0, 0, 1]
    assert means.counts.tolist() == [1, 2, 0, 2]
    torch.testing.assert_close(
        means.means, torch.stack([second[0], first[[2, 4]].mean(0), torch.zeros(3), second[1:].mean(0)])
    )
    features = torch.randn(2, 4, 3)
    expected = [F.cosine_similarity(features[b], means.means[c], dim=1) for c, b in [(0, 1), (1, 0), (3, 1)]]
    scores = means.branch_scores(features, 5)
    torch.testing.assert_close(scores[:, [0, 1, 3]], torch.stack(expected, dim=1))
    assert scores[:, [2, 4]].eq(-torch.inf).all()


# ---------------------------------------------------------------------- the method


def test_what_is_trained_in_a_later_task():
    made = learnt(tasks=2)
    branches, head = made.strategy.network.backbone, made.strategy.network.head
    before = {name: value.clone() for name, value in made.strategy.network.state_dict().items()}
    begun = []
    begin = made.strategy.begin_task

    def begin_task(task):
        begin(task)
        begun.extend([branches.sets[-1].up_weights()[0].clone(), branches.sets[-1].scales().detach().clone()])
        begun.append(float(head.scale.detach()))
        shared, previous = branches.shared.state_dict(), branches.previous.state_dict()
        assert all(torch.equal(shared[name], previous[name]) for name in shared)

    made.strategy.begin_task = begin_task
    further(made, 2)
    assert not begun[0].any()
    assert ((begun[1] >= 0.5) & (begun[1] <= 1.5)).all()
    assert begun[1].unique().numel() == begun[1].numel()
    assert begun[2] == 1.0
    after = made.strategy.network.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed == {"backbone.shared.sites.0.up", "backbone.previous.sites.0.up", "head.scale"}
    trained = [any(parameter.requires_grad for parameter in one.parameters()) for one in branches.sets]
    assert trained == [False, False, True]
    assert branches.sets[2].up_weights()[0].any()


def terms_of(strategy):
    labels = torch.tensor(list(strategy.task.columns) * 4)[:7]
    return strategy.losses(batch_of(labels, images=IMAGES), strategy.network(IMAGES))


def disturb(parameters):
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.3 * torch.randn_like(parameter)


def in_second_task(**options):
    """A strategy at the start of its second task, in eval mode."""
    made = learnt(partial(SMALL, **options))
    made.strategy.mark_columns(made.stream.tasks[1])
    made.strategy.begin_task(made.stream.tasks[1])
    made.strategy.task = made.stream.tasks[1]
    return made.strategy.eval().requires_grad_(True)


def test_distillation_is_of_early_features_under_the_classifier_of_the_task():
    strategy = in_second_task(distill_weight=3.0, temperature=1.5, ortho_weight=0.7)
    branches, head = strategy.network.backbone, strategy.network.head
    at_start = terms_of(strategy)["distill"]
    gradient = torch.autograd.grad(at_start, branches.shared.up_weights())
    assert all(part.abs().max() < 1e-6 for part in gradient)  # student and teacher are equal

    old = [up.detach().clone() for up in branches.shared.up_weights()]
    disturb(branches.shared.up_weights())
    terms = terms_of(strategy)
    student, teacher = (head(branches.early_features(IMAGES, previous=p))[:, 2:4] for p in (False, True))
    targets = (teacher.detach() / 1.5).softmax(1)
    expected = -3.0 * (targets * (student / 1.5).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(terms["distill"], expected)
    plain = torch.autograd.grad(expected, [*branches.shared.up_weights(), head.blocks[1].weight])
    found = torch.autograd.grad(terms["distill"], [*branches.shared.up_weights(), head.blocks[1].weight])
    for part, own, before in zip(plain, found, old, strict=False):  # both parts, q and v
        weights = before.norm(dim=2) / before.norm(dim=2).mean(dim=1, keepdim=True)
        torch.testing.assert_close(own, weights[:, :, None] * part)
    torch.testing.assert_close(found[-1], plain[-1])

    own, earlier = branches.sets[1].scales(), branches.sets[0].scales()
    torch.testing.assert_close(terms["ortho"], 0.7 * mean_overlap(own, earlier[None]))
    (gradient,) = torch.autograd.grad(terms["ortho"], branches.sets[1].sites[0].factor)
    assert gradient.any()


def test_the_first_task_and_weights_of_0_leave_the_cross_entropy():
    made = learnt()
    assert set(terms_of(made.strategy)) == {"ce"}
    assert set(terms_of(in_second_task(distill_weight=0.0, ortho_weight=0.0))) == {"ce"}


def test_scores_are_cosines_in_the_branches():
    strategy = learnt(tasks=3).strategy.eval()
    branches, means = strategy.network.backbone, strategy.class_means
    assert means.branches.tolist() == [0, 0, 1, 1, 2, 2]
    with torch.no_grad():
        expected = []
        for column in range(6):
            with branches.active(column // 2):
                expected.append(F.cosine_similarity(branches.base(IMAGES), means.means[column], dim=1))
        torch.testing.assert_close(strategy.predict(IMAGES), torch.stack(expected, dim=1), rtol=1e-4, atol=1e-5)
        alone = torch.cat([strategy.predict(image[None]) for image in IMAGES])
        torch.testing.assert_close(alone, strategy.predict(IMAGES), rtol=1e-4, atol=1e-5)


def test_its_parts_match_the_paper():
    strategy = CLLoRA(backbone=partial(TinyViT, depth=12))
    strategy.build((1, 8, 8))
    strategy.network.backbone.add()
    branches = strategy.network.backbone
    assert (len(branches.shared.sites), len(branches.sets[0].sites)) == (6, 6)
    assert branches.shared.sites[0].up.shape == (2, 24, 10)  # of queries and values
    assert strategy.bytes_kept()["teachers"] == 6 * 2 * 4 * 2 * 24 * 10  # A and B of q and v in six blocks
    hosts = [site.host[0] for site in [*branches.shared.sites, *branches.sets[0].sites]]
    assert hosts == [block.attn.qkv for block in branches.base.model.blocks]
    assert {name.rpartition(".")[2] for name, _ in branches.shared.named_parameters()} == {"up"}


def test_it_forgets_less_than_fine_tuning():
    plain = finetuning_in_tasks({"backbone": PretrainedViT, "optimizer": partial(torch.optim.Adam, lr=3e-3)}, 5)
    made = in_tasks(partial(SMALL, backbone=PretrainedViT), 5)
    # Measured: .76 against .24.
    assert last_accuracy(made.matrix.R_ci) > last_accuracy(plain.R_ci) + 0.26


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"shared_blocks": 0}, "shared_blocks is 0"),
        ({"shared_blocks": 2}, "shared_blocks is 2; the model has 2 blocks"),
        ({"distill_weight": -1.0}, "distill_weight is -1"),
        ({"ortho_weight": -1.0}, "ortho_weight is -1"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"backbone": plain_net}, "has no transformer blocks"),
    ],
)
def test_options_out_of_range_are_errors(options, words):
    with pytest.raises(ValueError, match=words):
        CLLoRA(**{"backbone": TinyViT, **options}).build((1, 8, 8))
