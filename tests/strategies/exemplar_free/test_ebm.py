from functools import partial

import pytest
import torch
from support.baselines import finetuning
from support.fakes import batch_of, normal
from support.runs import assert_same_run, run, sgd
from torch.nn import functional as F

from cl_lightning.batch import Draw
from cl_lightning.models import MLP, EnergyHead, Output
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.exemplar_free.ebm import EBM, draw_negatives
from cl_lightning.testing import Subject, small

pixels = partial(MLP, hidden=())
head = partial(EnergyHead, hidden=(16,))
SUBJECTS = {
    "EBM": Subject(
        small(
            EBM,
            backbone=pixels,
            head=partial(EnergyHead, hidden=(8, 8)),
            draw_from="batch",
            negatives=2,
        ),
        first_task_is_finetuning=False,
        reason="two other classes are drawn for each sample",
    ),
}

PUBLISHED = {
    "ebm_mnist": {
        "source": "authors' scripts for Split-MNIST: 400 units, Adam 1e-4, batches of 128, 2,000 steps per task",
        "backbone": "MLP(hidden=[])",
        "head": "EnergyHead(hidden=[400])",
        "negatives": 1,
        "optimizer": "Adam(lr=0.0001)",
        "data.scenario": "ClassIncremental(tasks=5)",
        "data.batch_size": 128,
        "trainer.max_epochs": 21,
    },
}

SMALL = partial(EBM, backbone=pixels, optimizer=sgd, head=head)


def test_one_negative_gives_the_logistic_loss_of_the_difference_of_energies():
    energies, labels = normal(5, 4, requires_grad=True), torch.tensor([0, 1, 3, 2, 2])
    strategy = EBM()
    strategy._allowed, strategy.loss_classes = torch.ones(4, dtype=torch.bool), "all"
    batch = batch_of(labels)
    # the draw of the strategy is a fork of the draw of the batch
    drawn = draw_negatives(labels, torch.ones(4, dtype=torch.bool), 1, batch.draw.fork(0xEB3))
    other = (drawn & ~F.one_hot(labels, 4).bool()).long().argmax(1)
    loss = strategy.losses(batch, Output(-energies, -energies))["ce"]
    gap = energies[torch.arange(5), labels] - energies[torch.arange(5), other]
    torch.testing.assert_close(loss, (1 + gap.exp()).log().mean())
    shifted = strategy.losses(batch, Output(-energies, -energies - 3.0))["ce"]
    torch.testing.assert_close(shifted, loss)
    (gradient,) = torch.autograd.grad(loss, energies)
    expected = torch.zeros(5, 4, dtype=torch.float64)
    expected[torch.arange(5), labels] = gap.detach().sigmoid() / 5
    expected[torch.arange(5), other] = -gap.detach().sigmoid() / 5
    torch.testing.assert_close(gradient, expected)


def test_negatives_are_uniform_over_the_allowed_classes_without_the_label():
    allowed = torch.tensor([False, True, True, True, False, True])
    labels = torch.tensor([1, 1, 0, 5]).repeat(3000)
    for count in (1, 2):
        drawn = draw_negatives(labels, allowed, count, Draw.of(len(labels), 3))
        own = F.one_hot(labels, 6).bool()
        assert drawn[own].all()
        others = drawn & ~own
        assert (others.sum(1) == count).all()
        assert not others[:, [0, 4]].any()
        for label, among in ((1, [2, 3, 5]), (0, [1, 2, 3, 5]), (5, [1, 2, 3])):
            shares = others[labels == label].float().mean(0)
            expected = torch.zeros(6)
            expected[among] = count / len(among)
            torch.testing.assert_close(shares, expected, atol=0.03, rtol=0)


def test_where_there_are_too_few_classes_all_are_taken_and_a_single_class_has_no_loss():
    labels, allowed = torch.tensor([2, -1]), torch.tensor([True, False, True])
    every = draw_negatives(labels, allowed, None, Draw.of(2, 1))
    assert every.tolist() == [[True, False, True], [True, False, True]]
    assert torch.equal(draw_negatives(labels, allowed, 2, Draw.of(2, 1)), every)
    alone = draw_negatives(labels[:1], torch.tensor([False, False, True]), 1, Draw.of(1, 1))
    assert alone.tolist() == [[False, False, True]]
    logits = normal(1, 3).masked_fill(~alone, -torch.inf)
    assert float(F.cross_entropy(logits, labels[:1])) == 0.0


def test_with_all_classes_of_the_task_as_negatives_it_is_the_softmax_over_the_task():
    options = {"backbone": pixels, "optimizer": sgd, "head": head}
    ours = run(EBM(negatives=None, **options), max_epochs=1)
    assert_same_run(ours, run(Finetune(loss_classes="current", **options), max_epochs=1))


class Notes(EBM):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.noted = []

    def losses(self, batch, output):
        self.noted.append((self.task.index, batch.labels.unique().tolist(), self._allowed.nonzero().flatten().tolist()))
        return super().losses(batch, output)


@pytest.mark.parametrize("options", [{}, {"loss_classes": "all"}, {"draw_from": "batch", "loss_classes": "all"}])
def test_the_classes_that_negatives_are_drawn_from(options):
    made = run(
        Notes(backbone=pixels, optimizer=sgd, head=head, **options),
        max_epochs=1,
        data={"batch_size": 6},
        limit_train_batches=8,
    )
    few = 0
    for task, labels, allowed in made.strategy.noted:
        columns = list(made.stream.tasks[task].columns)
        seen = list(range(made.stream.tasks[task].num_seen))
        assert allowed == (labels if options.get("draw_from") else seen if options else columns)
        few += labels != columns
    assert few > 3


def test_embeddings_of_earlier_classes_are_not_changed():
    first = run(SMALL(), options={"stop_after_task": 0}).strategy.network.head
    last = run(SMALL()).strategy.network.head
    assert torch.equal(first.blocks[0].weight, last.blocks[0].weight)
    assert (first.layers[0].weight != last.layers[0].weight).any()


def test_it_forgets_less_than_finetuning():
    options = {"data": {"batch_size": 32}, "max_epochs": 4}
    adam = partial(torch.optim.Adam, lr=2e-3)
    plain = finetuning({"backbone": partial(MLP, hidden=(100,)), "optimizer": adam}, **options).R_ci[2].mean()
    ours = run(EBM(backbone=pixels, optimizer=adam, head=partial(EnergyHead, hidden=(100,))), **options)
    # Measured: .55 against .31; with negatives among all classes .30.
    assert ours.matrix.R_ci[2].mean() > plain + 0.1, (ours.matrix.R_ci[2].mean(), plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negatives": 0}, "EBM: negatives is 0"),
        ({"draw_from": "memory"}, "EBM: draw_from is 'memory'; use 'task' or 'batch'"),
        ({"loss_classes": "task"}, "EBM: loss_classes is 'task'; use 'current' or 'all'"),
    ],
)
def test_options_out_of_range_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        EBM(**options)
