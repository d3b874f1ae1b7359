from functools import partial

import pytest
import torch
from support.fakes import batch_of
from support.pretrained import PretrainedViT, finetuning_in_tasks, in_tasks
from support.runs import assert_same, loop, plain_net, run, sgd
from torch.nn import functional as F

from cl_lightning.measures import last_accuracy
from cl_lightning.models import LinearHead, Output
from cl_lightning.strategies.pretrained.input_tuning import InputTuning
from cl_lightning.strategies.pretrained.linear_probe import LinearProbe
from cl_lightning.stream import ClassIncremental, RotatedDomains
from cl_lightning.testing import Subject, check_strategy, small

REASON = "the backbone is frozen"

SLOW = "a second subject has a transform per task"
SUBJECTS = {
    "InputTuning": Subject(small(InputTuning), first_task_is_finetuning=False, reason=REASON),
    "InputTuning(per_task)": Subject(
        small(InputTuning, kind="pad", frame_width=1, per_task=True), first_task_is_finetuning=False, reason=REASON
    ),
}

IMAGES = torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(0))
adam = partial(torch.optim.Adam, lr=0.03)


def learnt(make, tasks=1, **options):
    made = loop(
        make(),
        data={"scenario": ClassIncremental(tasks=5)},
        options={"stop_after_task": tasks - 1},
        **{"max_epochs": 1, **options},
    )
    made.fit()
    return made


@pytest.mark.parametrize(("loss_classes", "first"), [("current", 2), ("all", 0)])
def test_the_loss_is_over_the_classes_of_the_task_or_over_all(loss_classes, first):
    strategy = learnt(partial(InputTuning, backbone=plain_net, loss_classes=loss_classes), tasks=2).strategy
    batch, logits = batch_of(torch.tensor([2, 3, 3])), torch.randn(3, 4)
    terms = strategy.losses(batch, Output(torch.zeros(3, 16), logits))
    assert terms.keys() == {"ce"}
    torch.testing.assert_close(terms["ce"], F.cross_entropy(logits[:, first:], batch.labels - first))


@pytest.mark.parametrize("per_task", [False, True])
def test_transformation_and_rows_of_the_task_are_trained(per_task):
    made = learnt(partial(InputTuning, backbone=plain_net, optimizer=sgd, per_task=per_task))
    strategy = made.strategy
    assert all(parameter.grad is None for parameter in strategy.transforms.base.parameters())
    before = {name: value.clone() for name, value in strategy.network.state_dict().items()}
    made._run_task(made.stream.tasks[1], None)
    state = strategy.network.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(state[name], value)}
    shared = "backbone.sets.0.sites.0.delta"
    assert moved == (set() if per_task else {shared})
    own = "backbone.sets.1.sites.0.delta" if per_task else shared
    assert state[own].abs().max() > 0
    trained = [parameter.requires_grad for parameter in strategy.transforms.sets.parameters()]
    assert trained == ([False, True] if per_task else [True])


@pytest.mark.parametrize("kind", ["add", "affine", "conv"])
def test_with_learning_rate_0_it_is_a_linear_probe(kind):
    options = {"backbone": plain_net, "optimizer": sgd}
    tuned = run(InputTuning(kind=kind, transform_lr=0.0, **options), max_epochs=1)
    probe = run(LinearProbe(**options), max_epochs=1)
    assert_same(tuned.strategy.network.head.state_dict(), probe.strategy.network.head.state_dict())
    assert torch.equal(tuned.matrix.R_ti.nan_to_num(-1), probe.matrix.R_ti.nan_to_num(-1))


@pytest.mark.parametrize(
    ("options", "rates", "decay"),
    [
        ({}, (0.01, 1.0), 0.0),
        ({"kind": "pad", "frame_width": 1}, (0.01, 1.0), 0.0),
        ({"kind": "affine"}, (0.01, 0.01), 0.0),
        ({"kind": "conv"}, (0.01, 0.01), 0.0),
        ({"transform_lr": 0.3}, (0.01, 0.3), 0.0),
        ({"optimizer": sgd}, (0.05, 0.05), 0.01),
        ({"optimizer": sgd, "transform_lr": 0.3, "lr_factors": {"*.sets.*": 0.5}}, (0.05, 0.15), 0.01),
    ],
)
def test_the_transformation_has_a_learning_rate_of_its_own_and_no_weight_decay(options, rates, decay):
    strategy = learnt(partial(InputTuning, backbone=plain_net, **options)).strategy
    made = strategy.configure_optimizers()
    head, transform = made.param_groups
    assert (head["lr"], transform["lr"]) == pytest.approx(rates)
    assert (head["momentum"], transform["momentum"]) == (0.9, 0.9)
    assert (head["weight_decay"], transform["weight_decay"]) == (decay, 0.0)
    assert {id(p) for p in transform["params"]} == {id(p) for p in strategy.transforms.sets.parameters()}


def test_an_image_gets_the_transformation_of_its_task():
    strategy = learnt(partial(InputTuning, backbone=plain_net, per_task=True), tasks=3).strategy.eval()
    tasks, head = torch.tensor([2, 0, 1, 1, 0, 2, 2]), strategy.network.head
    deltas = [one.sites[0].delta for one in strategy.transforms.sets]
    assert strategy.traits.task_ids == "needed"
    with torch.no_grad():
        scores = strategy.predict(IMAGES, tasks)
        shifted = IMAGES + torch.stack(deltas)[tasks]
        with strategy.transforms.active(None):
            torch.testing.assert_close(scores, head(strategy.transforms(shifted)))
    with pytest.raises(ValueError, match="give tasks"):
        strategy.predict(IMAGES)


def test_with_a_transformation_per_task_nothing_is_forgotten():
    made = run(InputTuning(backbone=plain_net, per_task=True), max_epochs=1)
    own = made.matrix.R_ti
    for task in range(3):
        assert (own[task:, task] == own[task, task]).all()
    assert made.matrix.R_ci.isnan().all()


def test_it_learns_more_than_the_linear_head_alone_and_forgets_less_than_fine_tuning():
    plain = finetuning_in_tasks({"backbone": PretrainedViT, "optimizer": partial(torch.optim.Adam, lr=3e-3)}, 5)
    options = {"backbone": PretrainedViT, "optimizer": adam, "head": partial(LinearHead, init_std=0.0)}
    tuned, probe = (in_tasks(partial(cls, **options), 5, max_epochs=2).matrix for cls in (InputTuning, LinearProbe))
    # Measured: .55, the linear head .42, fine-tuning .24.
    assert last_accuracy(tuned.R_ci) > last_accuracy(probe.R_ci) + 0.07
    assert last_accuracy(tuned.R_ci) > last_accuracy(plain.R_ci) + 0.17


def test_all_domains_train_the_shared_transformation():
    made = run(
        InputTuning(backbone=plain_net),
        data={"scenario": RotatedDomains(degrees=[0.0, 90.0]), "batch_size": 256},
        max_epochs=1,
    )
    assert made.strategy.network.head.block_sizes() == [10]
    assert made.matrix.R_ci[1].isfinite().all()


def test_other_transformations_pass_the_suite():
    for options in ({"kind": "affine"}, {"kind": "conv"}):
        check_strategy(small(InputTuning, **options), checks=["trains"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "crop"}, "InputTuning: kind is 'crop'"),
        ({"frame_width": 4}, "InputTuning: frame_width is 4 with kind 'add'"),
        ({"kind": "pad", "frame_width": 0}, "frame_width is 0"),
        ({"transform_lr": -1.0}, "transform_lr is -1.0"),
        ({"loss_classes": "task"}, "loss_classes is 'task'"),
        ({"loss_classes": "all", "per_task": True}, "loss_classes is 'all' with per_task"),
    ],
)
def test_options_out_of_range_are_errors(options, words):
    with pytest.raises(ValueError, match=words):
        InputTuning(**options)
