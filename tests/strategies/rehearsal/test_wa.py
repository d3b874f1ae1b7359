from functools import partial

import pytest
import torch
from support.baselines import finetuning
from support.fakes import normal
from support.runs import NormNet, assert_same, assert_same_run, plain_net, run, sgd
from support.teaching import losses
from torch.nn import functional as F

from cl_lightning.callbacks.weight_alignment import WeightAlignment
from cl_lightning.losses import balanced_distillation
from cl_lightning.measures import last_accuracy
from cl_lightning.models import MLP, CosineHead, LinearHead, align_head, align_rows
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.exemplar_free.lwf import LwF
from cl_lightning.strategies.rehearsal.wa import WA
from cl_lightning.stream import ClassIncremental, RotatedDomains
from cl_lightning.testing import Subject, check_strategy, small

SUBJECTS = {
    "WA": Subject(small(WA), first_task_is_finetuning=False, reason="weights of the head are clipped after each step"),
}

PUBLISHED = {
    "wa_cifar100": {
        "source": "LAMDA-CL/PyCIL: models/wa.py, utils/data.py (jitter 63/255)",
        "memory_size": 2000,
        "clip_weights": False,
        "backbone": "ResNet32",
        "first_optimizer": "SGD(lr=0.1, momentum=0.9, weight_decay=0.0005)",
        "first_scheduler": "MultiStepLR(gamma=0.1, milestones=[60, 120, 170])",
        "optimizer": "SGD(lr=0.1, momentum=0.9, weight_decay=0.0002)",
        "scheduler": "MultiStepLR(gamma=0.1, milestones=[60, 100, 140])",
        "data.scenario": "ClassIncremental(class_order=1993, tasks=10)",
        "data.batch_size": 128,
        "data.transforms": ["RandomCrop(padding=4)", "RandomHorizontalFlip()", "ColorJitter(brightness=0.247)"],
        "loop.first_task_epochs": 200,
        "trainer.max_epochs": 170,
    },
}

SMALL = partial(WA, backbone=plain_net, optimizer=sgd, memory_size=60)


def head(*sizes, bias=True):
    made = LinearHead(6, bias=bias)
    for size in sizes:
        made.grow(size)
    return made.double()


# ---------------------------------------------------------------------- the maths


def test_aligned_rows_are_as_long_as_the_old_ones_in_the_mean_and_keep_their_ratios():
    old, new = normal(5, 6), 3 * normal(2, 6, seed=1)
    aligned = align_rows(old, new)
    gamma = old.norm(dim=1).mean() / new.norm(dim=1).mean()
    torch.testing.assert_close(aligned, gamma * new)
    torch.testing.assert_close(aligned.norm(dim=1).mean(), old.norm(dim=1).mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(align_rows(old, aligned), aligned, rtol=1e-14, atol=0)


def test_aligning_a_head_leaves_old_rows_and_biases_to_the_bit_and_new_classes_in_their_order():
    made = head(3, 2, 4)
    with torch.no_grad():
        made.blocks[-1].weight.mul_(2.5)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    align_head(made)
    changed = {name for name, value in made.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"blocks.2.weight"}
    old = torch.cat([before["blocks.0.weight"], before["blocks.1.weight"]])
    new = made.state_dict()["blocks.2.weight"]
    torch.testing.assert_close(new.norm(dim=1).mean(), old.norm(dim=1).mean(), rtol=1e-6, atol=0)
    features = normal(20, 6, seed=2)
    assert torch.equal((features @ new.T).argsort(1), (features @ before["blocks.2.weight"].T).argsort(1))


def test_a_first_block_is_left_as_it_is():
    made = head(3)
    before = made.weight().clone()
    align_head(made)
    assert torch.equal(made.weight(), before)


def test_a_head_whose_rows_have_no_scale_is_reported():
    made = CosineHead(6)
    made.grow(2)
    with pytest.raises(ValueError, match="CosineHead"):
        align_head(made)
    with pytest.raises(ValueError, match="CosineHead"):
        run(SMALL(head=CosineHead), max_epochs=1)
    with pytest.raises(ValueError, match="CosineHead"):
        run(Finetune(backbone=plain_net, head=CosineHead), WeightAlignment(), max_epochs=1)


def test_the_terms_are_weighed_by_the_share_of_old_classes():
    logits, taught, labels = normal(4, 5), normal(4, 3, seed=1), torch.tensor([0, 3, 4, 2])
    ce = F.cross_entropy(logits, labels)
    distill = -((taught / 2).softmax(1) * (logits[:, :3] / 2).log_softmax(1)).sum(1).mean()
    found = losses(WA(), logits, labels, taught)
    torch.testing.assert_close(found["ce"], 2 / 5 * ce)
    torch.testing.assert_close(found["distill"], 3 / 5 * distill)
    found = losses(WA(distill_weight=0.25), logits, labels, taught)
    torch.testing.assert_close(found["ce"], 0.75 * ce)
    torch.testing.assert_close(found["distill"], 0.25 * distill)
    assert losses(WA(), logits, labels).keys() == {"ce"}


def test_the_gradient_of_the_balanced_loss_is_its_closed_form():
    logits, taught, labels = normal(4, 5).requires_grad_(), normal(4, 3, seed=1), torch.tensor([0, 3, 4, 2])
    terms = balanced_distillation(F.cross_entropy(logits, labels), logits, taught, temperature=2.0)
    sum(terms.values()).backward()
    z = logits.detach()
    expected = 2 / 5 * (z.softmax(1) - F.one_hot(labels, 5)) / 4
    expected[:, :3] += 3 / 5 * ((z[:, :3] / 2).softmax(1) - (taught / 2).softmax(1)) / (2 * 4)
    torch.testing.assert_close(logits.grad, expected)


# ---------------------------------------------------------------------- runs


def test_the_callback_makes_of_it_without_alignment_the_method_itself_to_the_bit():
    whole = run(SMALL(), max_epochs=1)
    joined = run(SMALL(align=False), WeightAlignment(), max_epochs=1)
    assert_same_run(whole, joined)
    assert_same(whole.strategy.state_dict(), joined.strategy.state_dict())
    assert not torch.equal(
        run(SMALL(align=False), max_epochs=1).strategy.network.head.weight(), whole.strategy.network.head.weight()
    )


def test_rows_of_new_classes_are_as_long_as_old_ones_when_the_teacher_is_copied():
    made = run(LwF(backbone=plain_net, optimizer=sgd), WeightAlignment(), max_epochs=1)
    for network in (made.strategy.network, made.strategy.teacher.network):
        *old, new = (block.weight.norm(dim=1) for block in network.head.blocks)
        torch.testing.assert_close(new.mean(), torch.cat(old).mean())


def test_alignment_changes_the_head_alone():
    options = {"backbone": NormNet, "memory_size": 60, "optimizer": sgd}
    first = {"options": {"stop_after_task": 1}, "max_epochs": 1}
    plain, aligned = run(WA(align=False, **options), **first), run(WA(**options), **first)
    for name, value in plain.strategy.state_dict().items():
        other = aligned.strategy.state_dict()[name]
        expected = name not in ("network.head.blocks.1.weight", "teacher.network.head.blocks.1.weight")
        assert torch.equal(value, other) == expected, name


@pytest.mark.parametrize("clip", [True, False])
def test_rows_are_kept_from_below_zero_if_asked_to(clip):
    made = run(SMALL(clip_weights=clip, align=False), max_epochs=1)
    assert bool((made.strategy.network.head.weight() >= 0).all()) == clip
    assert (made.strategy.network.head.weight() > 0).any()


@pytest.mark.filterwarnings("ignore:give --model.memory_size")
def test_without_memory_distillation_clipping_and_alignment_it_is_finetuning_to_the_bit():
    bare = SMALL(memory_size=0, distill_weight=0.0, align=False, clip_weights=False)
    assert_same_run(run(bare), run(Finetune(backbone=plain_net, optimizer=sgd)))


def test_with_weight_decay_it_undoes_the_bias_to_the_new_classes():
    # Weight decay makes old rows shorter than new ones, which is what the alignment is made for.
    decaying = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2)
    accuracy, new = {True: 0.0, False: 0.0}, {True: 0.0, False: 0.0}
    for align, seed in ((True, 0), (True, 1), (False, 0), (False, 1)):
        torch.manual_seed(seed)
        data = {"scenario": ClassIncremental(tasks=2), "seed": seed}
        made = run(WA(backbone=plain_net, memory_size=100, optimizer=decaying, align=align), max_epochs=8, data=data)
        accuracy[align] += made.matrix.measures()["average_accuracy"] / 2
        predicted = made.matrix.confusion.sum(0)
        new[align] += float(predicted[5:].sum() / predicted.sum()) / 2  # half of the samples are of new classes
    finetune = finetuning({"backbone": plain_net}, max_epochs=4, data=data).measures()["average_accuracy"]
    assert accuracy[True] > accuracy[False] + 0.07
    assert accuracy[True] > finetune + 0.25
    assert new[False] > 0.68
    assert new[True] < 0.62


def test_with_clipped_rows_and_long_training_alignment_raises_the_last_accuracy():
    decaying = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-3)
    options = {"backbone": partial(MLP, hidden=(64,)), "memory_size": 30, "optimizer": decaying, "clip_weights": True}
    plain, aligned = (
        last_accuracy(
            run(WA(align=align, **options), data={"scenario": ClassIncremental(tasks=5)}, max_epochs=20).matrix.R_ci
        )
        for align in (False, True)
    )
    assert aligned > plain + 0.15


def test_domains_without_new_classes_are_learnt_with_a_share_of_ones_own():
    made = run(SMALL(distill_weight=0.5), data={"scenario": RotatedDomains(tasks=3)}, max_epochs=1)
    assert made.matrix.learned == 3
    with pytest.raises(ValueError, match="distill_weight"):
        run(SMALL(), data={"scenario": RotatedDomains(tasks=3)}, max_epochs=1)


def test_its_variants_conform():
    checks = ("trains", "resume", "limits", "bytes", "options")
    check_strategy(small(WA, clip_weights=False), checks=checks)


def test_the_callback_conforms():
    subject = Subject(small(LwF), "LwF with WeightAlignment", callbacks=lambda: [WeightAlignment()])
    check_strategy(subject, checks=("trains", "seed", "resume", "restores", "options", "bytes"))


@pytest.mark.parametrize(
    "options", [{"loss_classes": "current"}, {"temperature": 0.0}, {"distill_weight": 1.5}, {"memory_size": -1}]
)
def test_wrong_options_are_errors(options):
    with pytest.raises(ValueError, match=r"WA|Memory"):
        WA(**options)
