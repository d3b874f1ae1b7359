from functools import partial

import pytest
import torch
from support.fakes import batch_of
from support.pretrained import PretrainedViT, TinyViT, in_tasks
from support.runs import assert_same_run, loop, plain_net, run, sgd
from torch.nn import functional as F

from cl_lightning.measures import last_accuracy
from cl_lightning.models import LinearHead, Output
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.pretrained.linear_probe import LinearProbe
from cl_lightning.stream import ClassIncremental, RotatedDomains
from cl_lightning.testing import Subject, small

REASON = "the backbone is frozen"

SUBJECTS = {
    "LinearProbe": Subject(small(LinearProbe), first_task_is_finetuning=False, reason=REASON),
    "LinearProbe(all)": Subject(small(LinearProbe, loss_classes="all"), first_task_is_finetuning=False, reason=REASON),
}

adam = partial(torch.optim.Adam, lr=0.03)


def learnt(make, tasks=1):
    made = loop(
        make(), data={"scenario": ClassIncremental(tasks=5)}, options={"stop_after_task": tasks - 1}, max_epochs=1
    )
    made.fit()
    return made


@pytest.mark.parametrize(("loss_classes", "first"), [("current", 2), ("all", 0)])
def test_the_loss_is_over_the_classes_of_the_task_or_over_all(loss_classes, first):
    strategy = learnt(partial(LinearProbe, backbone=TinyViT, loss_classes=loss_classes), tasks=2).strategy
    batch, logits = batch_of(torch.tensor([2, 3, 3])), torch.randn(3, 4)
    terms = strategy.losses(batch, Output(torch.zeros(3, 24), logits))
    assert terms.keys() == {"ce"}
    torch.testing.assert_close(terms["ce"], F.cross_entropy(logits[:, first:], batch.labels - first))


@pytest.mark.parametrize(("loss_classes", "old_rows_move"), [("current", False), ("all", True)])
def test_the_head_alone_is_trained_and_old_rows_move_only_with_the_loss_over_all(loss_classes, old_rows_move):
    made = learnt(partial(LinearProbe, backbone=TinyViT, loss_classes=loss_classes, optimizer=sgd))
    assert not made.strategy.network.backbone.training
    before = {name: value.clone() for name, value in made.strategy.network.state_dict().items()}
    made._run_task(made.stream.tasks[1], None)
    state = made.strategy.network.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(state[name], value)}
    assert moved == ({"head.blocks.0.weight", "head.blocks.0.bias"} if old_rows_move else set())
    assert "head.blocks.1.weight" in state


def test_it_is_fine_tuning_with_a_frozen_backbone():
    probe = run(LinearProbe(backbone=plain_net, optimizer=sgd), max_epochs=1)
    plain = Finetune(backbone=plain_net, optimizer=sgd, freeze_backbone=True, loss_classes="current")
    assert_same_run(probe, run(plain, max_epochs=1))


def test_stored_features_give_the_same_run(tmp_path):
    plain = run(LinearProbe(backbone=plain_net, optimizer=sgd), max_epochs=2)
    options = {"feature_cache": str(tmp_path)}
    stored = run(LinearProbe(backbone=plain_net, optimizer=sgd), max_epochs=2, options=options)
    assert any(tmp_path.rglob("*"))
    torch.testing.assert_close(stored.matrix.R_ci, plain.matrix.R_ci, equal_nan=True)


def test_the_loss_over_all_classes_forgets_where_the_local_one_does_not():
    options = {"backbone": PretrainedViT, "optimizer": adam, "head": partial(LinearHead, init_std=0.0)}
    local, over_all = (
        in_tasks(partial(LinearProbe, loss_classes=classes, **options), 5, max_epochs=2).matrix.R_ci
        for classes in ("current", "all")
    )
    # Measured: .42 against .29.
    assert last_accuracy(local) > last_accuracy(over_all) + 0.06


def test_domains_train_all_rows_again():
    made = run(
        LinearProbe(backbone=plain_net, optimizer=sgd),
        data={"scenario": RotatedDomains(degrees=[0.0, 90.0]), "batch_size": 256},
        max_epochs=1,
    )
    assert made.strategy.network.head.block_sizes() == [10]
    assert made.matrix.R_ci[1].isfinite().all()


@pytest.mark.parametrize("loss_classes", ["task", "new", "old"])
def test_other_classes_are_an_error(loss_classes):
    with pytest.raises(ValueError, match=f"loss_classes is '{loss_classes}'; use 'current' or 'all'"):
        LinearProbe(loss_classes=loss_classes)
