from functools import partial

import pytest
import torch
from support.pretrained import PretrainedViT, TinyViT, finetuning_in_tasks, in_tasks
from support.runs import loop
from torch.nn import functional as F

from cl_lightning.measures import last_accuracy
from cl_lightning.models import SSF, Adapter, WholeModel
from cl_lightning.strategies.pretrained.mos import MOS, retrieved, self_similarity_loss
from cl_lightning.strategy import PhaseOptions
from cl_lightning.stream import ClassIncremental
from cl_lightning.testing import Subject, small

# SSF: the small net has no transformer blocks for an adapter.
SUBJECTS = {
    "MOS": Subject(
        small(MOS, peft=SSF, align_options=PhaseOptions(epochs=1), align_samples=8),
        first_task_is_finetuning=False,
        reason="a PEFT module is trained, on a frozen backbone",
    ),
}

SLOW = "each task has two phases, which are killed and resumed one by one"

PUBLISHED = {
    "mos": {
        "source": "sun-hailong/AAAI25-MOS: CIFAR-100, 20 tasks, ViT-B/16 IN21k",
        "backbone": "Timm(name=vit_base_patch16_224.augreg_in21k, pretrained=True)",
        "peft": "Adapter(bottleneck=16, dropout=0.1, place=parallel, scale=0.1)",
        "ortho_weight": 0.1,
        "merge_share": 0.1,
        "align_samples": 240,
        "optimizer": "SGD(lr=0.03, momentum=0.9, weight_decay=0.0005)",
        "scheduler": "CosineOverPhase",
        "data.resize": 256,
        "data.center_crop": 224,
        "data.interpolation": "bicubic",
        "data.mean": [0],
        "data.std": [1],
        "data.transforms": ["RandomResizedCrop(scale=[0.05, 1.0], size=224)", "RandomHorizontalFlip()"],
        "data.scenario": "ClassIncremental(class_order=1993, tasks=20)",
        "data.batch_size": 48,
        "trainer.max_epochs": 20,
    },
}

sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
adapter = partial(Adapter, bottleneck=8, scale=0.5, dropout=0.0)
SMALL = partial(
    MOS,
    backbone=TinyViT,
    peft=adapter,
    optimizer=sgd,
    align_options=PhaseOptions(epochs=1),
    align_samples=24,
    ortho_weight=0.01,
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


def test_each_vector_is_to_be_most_similar_to_itself():
    vectors = torch.tensor([[1.0, 0.0], [2.0, 1.0]], dtype=torch.float64)
    first = torch.tensor([1 / 0.5, 2 / 0.5], dtype=torch.float64).log_softmax(0)[0]
    second = torch.tensor([2 / 0.5, 5 / 0.5], dtype=torch.float64).log_softmax(0)[1]
    torch.testing.assert_close(self_similarity_loss(vectors, 0.5), -(first + second) / 2)
    torch.testing.assert_close(self_similarity_loss(vectors), self_similarity_loss(vectors, 0.8))


def test_the_adapter_is_that_of_the_class_that_it_predicts_until_nothing_changes():
    tasks = torch.tensor([0, 1, 2, 2])
    hot = 5 * torch.eye(4)
    # Sample 0: adapter 0 says class 1, adapter 1 class 2, adapter 2 class 3, of its own task. Sample 1 alternates.
    logits = torch.stack([hot[[1, 1]], hot[[2, 0]], hot[[3, 3]]])
    start = torch.tensor([0, 0])
    for rounds, chosen in ((1, [0, 0]), (2, [1, 1]), (3, [2, 0]), (4, [2, 1]), (9, [2, 0])):
        assert torch.equal(retrieved(logits, start, tasks, rounds), logits[chosen, [0, 1]])
    assert torch.equal(retrieved(logits, torch.tensor([3, 2]), tasks, 1), logits[2])


# ---------------------------------------------------------------------- the method


class Watching(MOS):
    """Keeps the parameters of the newest adapter before and after each merge."""

    def after_step(self, batch):
        before = values(self.network.backbone.sets[-1])
        super().after_step(batch)
        if self.task.index == 2 and self.phase.name == "train":
            self.seen = [*getattr(self, "seen", []), (before, values(self.network.backbone.sets[-1]))]


@pytest.mark.parametrize(("accumulate", "merges"), [(1, 1), (3, 2)])
def test_the_newest_adapter_is_merged_after_each_optimizer_step_of_later_tasks(accumulate, merges):
    make = partial(Watching, **{**SMALL.keywords, "merge_share": 0.2, "merges_per_step": merges})
    made = learnt(make, tasks=2, accumulate_grad_batches=accumulate)
    sets = made.strategy.network.backbone.sets
    earlier = [values(one) for one in sets]
    begun = []
    begin = made.strategy.begin_task
    made.strategy.begin_task = lambda task: (begin(task), begun.append(values(sets[-1])))
    further(made, 2)
    assert same(begun[0], earlier[1])  # it starts from the adapter before it
    assert all(same(values(one), state) for one, state in zip(sets, earlier, strict=False))
    share, steps = 1 - 0.8**merges, 0
    for before, after in made.strategy.seen:
        if not same(before, after):
            steps += 1
            for own, new, first, second in zip(before, after, *earlier, strict=True):
                torch.testing.assert_close(new, (1 - share) * own + share * (first + second) / 2)
    assert steps == -(-len(made.strategy.seen) // accumulate)


def test_features_are_separated_from_each_other_and_from_means_of_earlier_classes():
    seen = []

    class Recording(MOS):
        def losses(self, batch, output):
            terms = super().losses(batch, output)
            seen.append((self.phase.name, self.task.index, output.features.detach(), dict(terms)))
            return terms

    made = learnt(partial(Recording, **{**SMALL.keywords, "ortho_weight": 0.3, "ortho_temperature": 2.0}))
    means = made.strategy.gaussians.means.clone()
    assert len(means) == 2
    further(made, 1)
    for phase, task, features, terms in seen:
        if phase == "align":
            assert set(terms) == {"ce"}
            continue
        vectors = torch.cat([means, features]) if task else features
        torch.testing.assert_close(terms["ortho"].detach(), 0.3 * self_similarity_loss(vectors, 2.0))
    assert {(phase, task) for phase, task, *_ in seen} == {("train", 0), ("train", 1), ("align", 1)}


def test_the_head_learns_all_classes_in_the_second_phase_and_slower_than_the_adapters():
    made = learnt(tasks=2)
    strategy = made.strategy
    assert [phase.name for phase in strategy.phases(made.stream.tasks[0])] == ["train"]
    assert [phase.name for phase in strategy.phases(made.stream.tasks[1])] == ["train", "align"]
    assert len(strategy.drawn_features()) == 4 * 24
    rates = [group["initial_lr"] for group in made.trainer.optimizers[0].param_groups]  # of the phase align
    assert rates == [pytest.approx(0.005)]
    rows = strategy.network.head.blocks[0].weight.detach().clone()
    without = partial(SMALL, align_options=PhaseOptions(epochs=0))
    assert [phase.name for phase in without().phases(made.stream.tasks[1])] == ["train"]
    further(made, 2)
    assert not torch.equal(strategy.network.head.blocks[0].weight, rows)


def test_predictions_are_of_the_adapter_that_is_retrieved_and_of_the_first_one():
    strategy = learnt(partial(SMALL, rounds=2), tasks=3).strategy.eval()
    sets, head = strategy.network.backbone, strategy.network.head
    tasks = torch.tensor([0, 0, 1, 1, 2, 2])
    with torch.no_grad():
        expected = []
        for image in IMAGES:
            features = sets.features(image[None], [0, 1, 2])[:, 0]
            cosines = F.cosine_similarity(features[:1], strategy.retrieval.means, dim=1)
            task = tasks[cosines.argmax()]
            for _ in range(2):
                logits = head(features[task][None])[0]
                task = tasks[logits.argmax()]
            expected.append((logits.softmax(0) + (3 * cosines).softmax(0)) / 2)
        torch.testing.assert_close(strategy.predict(IMAGES).exp(), torch.stack(expected), rtol=1e-4, atol=1e-6)


def test_class_means_for_the_retrieval_are_of_the_first_adapter():
    made = learnt(tasks=2)
    strategy = made.strategy.eval()
    assert not torch.allclose(strategy.retrieval.means[2:], strategy.gaussians.means[2:])
    torch.testing.assert_close(strategy.retrieval.means[:2], strategy.gaussians.means[:2])


def test_it_forgets_less_than_fine_tuning():
    plain = finetuning_in_tasks({"backbone": PretrainedViT, "optimizer": partial(torch.optim.Adam, lr=3e-3)}, 5)
    made = in_tasks(partial(SMALL, backbone=PretrainedViT), 5)
    # Measured: .68 against .24.
    assert last_accuracy(made.matrix.R_ci) > last_accuracy(plain.R_ci) + 0.26


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ortho_weight": -0.1}, "ortho_weight is -0.1"),
        ({"ortho_temperature": 0.0}, "ortho_temperature is 0"),
        ({"merge_share": 1.1}, "merge_share is 1.1"),
        ({"merges_per_step": 0}, "merges_per_step is 0"),
        ({"rounds": 0}, "rounds is 0"),
        ({"align_samples": 0}, "align_samples is 0"),
        ({"jitter": 0.0}, "jitter is 0"),
        ({"peft": WholeModel}, "of which there is only one"),
    ],
)
def test_options_out_of_range_are_errors(options, words):
    with pytest.raises(ValueError, match=words):
        learnt(partial(MOS, backbone=TinyViT, **options))
