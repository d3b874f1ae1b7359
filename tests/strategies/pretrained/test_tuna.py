import math
from functools import partial

import pytest
import torch
from support.fakes import batch_of
from support.pretrained import PretrainedViT, TinyViT, finetuning_in_tasks, in_tasks
from support.runs import loop
from torch.nn import functional as F

from cl_lightning.measures import last_accuracy
from cl_lightning.models import SSF, Adapter, LinearHead, LoRA, WholeModel
from cl_lightning.strategies.pretrained.tuna import TUNA, elected, most_certain, row_overlap
from cl_lightning.strategy import PhaseOptions
from cl_lightning.stream import ClassIncremental
from cl_lightning.testing import Subject, small

# LoRA, of all linear layers: the small net has no transformer blocks for an adapter.
SUBJECTS = {
    "TUNA": Subject(
        small(
            TUNA,
            peft=partial(LoRA, rank=2, targets=["*"]),
            ortho_weight=0.1,
            align_options=PhaseOptions(epochs=1, batch_size=24),
            align_samples=8,
        ),
        first_task_is_finetuning=False,
        reason="a PEFT module is trained, on a frozen backbone",
    ),
}

SLOW = "each task has two phases, which are killed and resumed one by one"

PUBLISHED = {
    "tuna": {
        "source": "C3Box, a port: SGD 0.01, 15 epochs, batches of 16, r 16, scale 0.1, orthogonality 1e-3",
        "backbone": "Timm(name=vit_base_patch16_224.augreg_in21k, pretrained=True)",
        "peft": "Adapter(bottleneck=16, dropout=0.1, place=parallel, scale=0.1)",
        "ortho_weight": 0.001,
        "align_samples": 80,
        "optimizer": "SGD(lr=0.01, momentum=0.9, weight_decay=0.0005)",
        "scheduler": "CosineOverPhase",
        "data.resize": 256,
        "data.center_crop": 224,
        "data.interpolation": "bicubic",
        "data.mean": [0],
        "data.std": [1],
        "data.transforms": ["RandomResizedCrop(scale=[0.05, 1.0], size=224)", "RandomHorizontalFlip()"],
        "data.scenario": "ClassIncremental(class_order=1993, tasks=20)",
        "data.batch_size": 16,
        "trainer.max_epochs": 15,
    },
}

sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
adapter = partial(Adapter, bottleneck=8, scale=0.5, dropout=0.0)
SMALL = partial(
    TUNA,
    backbone=TinyViT,
    peft=adapter,
    optimizer=sgd,
    align_options=PhaseOptions(epochs=1, batch_size=24),
    align_samples=24,
)
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


def values(module):
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(first, second):
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


# ---------------------------------------------------------------------- the formulas


def test_the_sign_of_the_sum_is_elected_and_its_largest_size():
    weights = torch.tensor([[2.0, -3.0, 2.0, 0.0], [1.5, 1.0, -2.0, 0.0], [-3.0, 1.0, 0.0, -4.0]])
    assert elected(weights).tolist() == [2.0, -3.0, 0.0, -4.0]
    assert torch.equal(elected(weights[:1]), weights[0])
    assert torch.equal(elected(torch.stack([weights[1]] * 4)), weights[1])


def test_the_overlap_is_the_mean_cosine_of_all_pairs_of_rows():
    first = torch.tensor([[3.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    second = torch.tensor([[-1.0, 1.0], [-2.0, 0.0], [0.0, 5.0]], dtype=torch.float64)
    expected = torch.tensor((0.5**0.5 + 1) / 6, dtype=torch.float64)
    torch.testing.assert_close(row_overlap(first, second), expected)
    torch.testing.assert_close(row_overlap(torch.stack([first, first]), torch.stack([second, -second])), 0 * expected)


def test_short_rows_have_bounded_gradients():
    second = torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    for length, expected in ((1e-8, 0.6e-5), (5e-4, 0.3), (1e-3, 0.6), (3.0, 0.6)):
        first = torch.tensor([[length, 0.0]], dtype=torch.float64, requires_grad=True)
        overlap = row_overlap(first, second)
        assert overlap.item() == pytest.approx(expected)
        overlap.backward()
        assert first.grad.abs().max() <= 800.0 + 1e-9


def test_the_adapter_with_the_smallest_entropy_is_chosen_for_each_sample():
    logits = torch.tensor([[[1.0, 2.0, 3.0], [0.0, 0.0, 9.0]], [[5.0, 0.0, 0.0], [0.0, 8.0, 8.0]]])
    assert torch.equal(most_certain(logits), torch.stack([logits[1, 0], logits[0, 1]]))


# ---------------------------------------------------------------------- the method


def test_only_the_newest_adapter_is_trained_and_it_starts_from_the_one_before():
    made = learnt(tasks=2)
    backbone, head = made.strategy.network.backbone, made.strategy.network.head
    earlier, base = [values(one) for one in backbone.sets], values(backbone.base)
    rows = [block.weight.detach().clone() for block in head.blocks]
    begun, ended = [], []
    begin, statistics = made.strategy.begin_task, made.strategy.learn_statistics
    made.strategy.begin_task = lambda task: (begin(task), begun.append(values(backbone.sets[-1])))

    def learn_statistics():
        ended.extend(block.weight.detach().clone() for block in head.blocks)
        statistics()

    made.strategy.learn_statistics = learn_statistics
    further(made, 2)
    assert same(begun[0], earlier[1])
    assert all(same(values(one), state) for one, state in zip(backbone.sets, earlier, strict=False))
    assert same(values(backbone.base), base)
    assert not same(values(backbone.sets[2]), begun[0])
    assert same(ended[:2], rows)  # old rows of the head change only in the alignment
    assert not torch.equal(head.blocks[0].weight, rows[0])
    stacks = zip(*(values(one) for one in backbone.sets), strict=True)
    assert same(values(backbone.merged), [elected(torch.stack(stack)) for stack in stacks])


def test_predictions_are_of_the_most_certain_adapter_and_of_the_universal_one():
    strategy = learnt(tasks=3).strategy.eval()
    sets, head = strategy.network.backbone, strategy.network.head
    with torch.no_grad():
        features = sets.features(IMAGES, [0, 1, 2, "merged"])
        chances = 20 * F.cosine_similarity(features[:, :, None], head.weight(), dim=3)
        chances = chances.softmax(2)
        entropies = -(chances[:3] * chances[:3].log()).sum(2)
        expected = (chances[entropies.argmin(0), range(7)] + chances[3]) / 2
        torch.testing.assert_close(strategy.predict(IMAGES).exp(), expected, rtol=1e-4, atol=1e-6)
        alone = torch.cat([strategy.predict(image[None]) for image in IMAGES])
        torch.testing.assert_close(alone.exp(), expected, rtol=1e-4, atol=1e-6)


def test_after_one_task_both_adapters_are_equal():
    strategy = learnt().strategy.eval()
    with torch.no_grad():
        expected = strategy.network(IMAGES).logits.log_softmax(1)
        torch.testing.assert_close(strategy.predict(IMAGES), expected)


def test_the_losses_are_those_of_the_paper():
    strategy = learnt(partial(SMALL, margin=0.2, ortho_weight=0.7), tasks=3).strategy.eval()
    strategy.phase = strategy.phases(strategy.task)[0]
    backbone = strategy.network.backbone
    labels = torch.tensor([4, 5, 4, 5, 4, 5, 4])
    with torch.no_grad():
        terms = strategy.losses(batch_of(labels, images=IMAGES), strategy.network(IMAGES))
        cosines = F.cosine_similarity(backbone(IMAGES)[:, None], strategy.network.head.weight()[4:], dim=2)
        shifted = 20 * (cosines - 0.2 * F.one_hot(labels - 4, 2))
        torch.testing.assert_close(terms["ce"], F.cross_entropy(shifted, labels - 4))
        total = 0.0
        for earlier in (0, 1):
            for block in (0, 1):
                own, other = (F.normalize(backbone.sets[i].sites[block].up.weight, dim=1) for i in (2, earlier))
                total += float((own @ other.T).mean().abs()) / 2
        assert float(terms["ortho"]) == pytest.approx(0.7 * math.exp(-3) * total, rel=1e-4)
        strategy.margin, strategy.ortho_weight = 0.0, 0.0
        plain = strategy.losses(batch_of(labels, images=IMAGES), strategy.network(IMAGES))
        assert set(plain) == {"ce"}
        torch.testing.assert_close(plain["ce"], F.cross_entropy(20 * cosines, labels - 4))


def test_it_forgets_less_than_fine_tuning():
    plain = finetuning_in_tasks({"backbone": PretrainedViT, "optimizer": partial(torch.optim.Adam, lr=3e-3)}, 5)
    align = PhaseOptions(epochs=4, batch_size=24, optimizer=sgd)
    made = in_tasks(partial(SMALL, backbone=PretrainedViT, align_options=align), 5)
    # Measured: .81 against .24.
    assert last_accuracy(made.matrix.R_ci) > last_accuracy(plain.R_ci) + 0.28


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"margin": -0.1}, "margin is -0.1"),
        ({"ortho_weight": -0.1}, "ortho_weight is -0.1"),
        ({"align_samples": 0}, "align_samples is 0"),
        ({"jitter": 0.0}, "jitter is 0"),
        ({"peft": WholeModel}, "of which there is only one"),
        ({"peft": SSF}, "but SSF has no up-projections; use Adapter or LoRA, or an ortho_weight of 0"),
        ({"head": LinearHead}, "head is LinearHead; use a CosineHead"),
    ],
)
def test_options_out_of_range_are_errors(options, words):
    with pytest.raises(ValueError, match=words):
        TUNA(backbone=TinyViT, **options).build((1, 8, 8))
