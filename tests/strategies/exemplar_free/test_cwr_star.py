from functools import partial

import pytest
import torch
from support.baselines import finetuning
from support.runs import NormNet, plain_net, run, sgd

from cl_lightning.callback import ContinualCallback
from cl_lightning.models import LinearHead
from cl_lightning.strategies.exemplar_free.cwr_star import CWRStar
from cl_lightning.stream import ClassIncremental, LabelFraction, RotatedDomains
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "CWRStar": Subject(
        small(CWRStar),
        first_task_is_finetuning=False,
        reason="the rows of the head start at 0, and are centred at the end of the task",
    )
}
SMALL = partial(CWRStar, backbone=plain_net, optimizer=sgd)


class Look(ContinualCallback):
    """Rows and backbone at the start and at the end of each task."""

    def __init__(self):
        self.starts, self.ends, self.backbones, self.past = [], [], [], []

    def on_task_start(self, trainer, strategy, task):
        self.starts.append(strategy.head.weight().detach().clone())

    def on_task_end(self, trainer, strategy, task):
        self.ends.append((strategy.head.weight().detach().clone(), strategy.head.consolidated.clone()))
        self.past.append(strategy.head.past.tolist())
        self.backbones.append({name: value.clone() for name, value in strategy.network.backbone.state_dict().items()})


def test_rows_are_consolidated_by_the_samples_of_each_class():
    look = Look()
    made = run(SMALL(), look, data={"scenario": RotatedDomains(degrees=[0.0, 40.0])}, max_epochs=1)
    labels = torch.as_tensor(made.datamodule.samples(train=True).labels)
    columns = torch.as_tensor(made.stream.column_table.copy())
    first, second = (columns[labels[part.copy()]].bincount() for part in made.stream.train)
    assert look.past == [first.tolist(), (first + second).tolist()]
    assert not look.starts[0].any()
    (tw, cw), (later, merged) = look.ends
    torch.testing.assert_close(cw, tw - tw.mean())
    assert torch.equal(look.starts[1], cw)
    ratio = (first / second).sqrt()[:, None]
    torch.testing.assert_close(merged, (ratio * cw + later - later.mean()) / (ratio + 1))


def test_after_the_first_task_the_backbone_and_absent_classes_are_unchanged_to_the_bit():
    look = Look()
    run(CWRStar(backbone=NormNet, optimizer=sgd), look)
    for name, value in look.backbones[0].items():
        assert torch.equal(value, look.backbones[2][name]), name
    assert torch.equal(look.ends[0][1], look.ends[1][1][:4])
    assert torch.equal(look.ends[1][1], look.ends[2][1][:7])
    assert look.ends[1][0][:4].any()  # the temporary rows of absent classes are trained, and discarded


def test_a_softmax_over_the_task_alone_trains_no_other_rows():
    look = Look()
    run(SMALL(loss_classes="current"), look)
    assert not look.ends[1][0][:4].any()
    assert look.ends[1][0][4:].any()


def test_the_predictions_of_one_task_are_those_of_its_temporary_rows():
    """A common row is subtracted from all rows of the task: a multiple of the sum of the features, for every class."""
    made = run(SMALL(), data={"scenario": ClassIncremental(tasks=1)}).strategy.eval()
    images = torch.rand(9, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    output, scores = made.network(images), made.predict(images)
    gap = output.logits - scores
    torch.testing.assert_close(gap, made.head.weight().mean() * output.features.sum(1, keepdim=True).expand_as(gap))


def test_samples_without_a_label_are_not_counted():
    made = run(SMALL(), data={"scenario": LabelFraction(ClassIncremental(tasks=2), fraction=0.3)}, max_epochs=1)
    labelled = sum(len(part) for part in made.stream.train) - sum(len(part) for part in made.stream.unlabelled)
    assert 0 < int(made.strategy.head.past.sum()) == labelled


def test_it_forgets_less_than_finetuning():
    options = {"data": {"batch_size": 32}, "max_epochs": 3}
    common = {"backbone": plain_net, "optimizer": partial(torch.optim.SGD, lr=0.05, momentum=0.9)}
    plain = finetuning(common, **options).R_ci[2].mean()
    ours = run(CWRStar(**common), **options).matrix.R_ci[2].mean()
    # Measured: .46 against .30; the features are those of the first task.
    assert ours > plain + 0.1, (ours, plain)


def test_another_head_is_refused():
    with pytest.raises(ValueError, match="CWRStar: head is LinearHead; use a ConsolidatedHead, which has"):
        run(SMALL(head=LinearHead))
