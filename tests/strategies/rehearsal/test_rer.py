"""Relational Experience Replay."""

import pytest
import torch
from support.baselines import finetuning
from support.fakes import batch_of, normal
from support.runs import assert_same_run, plain_net, run, sgd
from torch.nn import functional as F

from cl_lightning.batch import Draw
from cl_lightning.strategies.base import trained_weights
from cl_lightning.strategies.base.virtual import output_at
from cl_lightning.strategies.rehearsal.derpp import DERpp
from cl_lightning.strategies.rehearsal.er import ER
from cl_lightning.strategies.rehearsal.rer import RER, RelationNet, slopes_of
from cl_lightning.stream import ClassIncremental, Subset
from cl_lightning.testing import Subject, small

REASON = "the memory is replayed from the second step on"
SUBJECTS = {
    "RER": Subject(small(RER, learn_every=2), first_task_is_finetuning=False, reason=REASON),
    "RER, with logits": Subject(
        small(RER, learn_every=3, logit_weight=0.2, label_weight=0.5, virtual="head"),
        first_task_is_finetuning=False,
        reason=REASON,
    ),
}
SLOW = "two hosts pass the suite"
FEW = {"scenario": Subset(ClassIncremental(sizes=[4, 3, 3]), per_class=24), "batch_size": 16}
WITH_LOGITS = {"logit_weight": 0.2, "label_weight": 0.5}


def test_weights_are_the_sigmoid_of_two_hidden_layers_that_are_added():
    net = RelationNet(2, hidden=3).double()
    net.reset(7)
    values = [value.numpy() for value in net.parameters()]
    (a, a0, b, b0, v, v0), losses, norms = values, normal(5, 2).abs(), normal(5, 2, seed=1).abs()
    left = (losses.numpy() @ a.T + a0).clip(0)
    right = (norms.numpy() @ b.T + b0).clip(0)
    expected = 1 / (1 + torch.exp(-torch.from_numpy((left + right) @ v.T + v0)))
    torch.testing.assert_close(net(losses, norms), expected)
    assert all(abs(a).max() <= 2**-0.5 for a in values[:4])
    assert abs(values[4]).max() <= 3**-0.5
    first = [value.clone() for value in net.parameters()]
    net.reset(8)
    assert all(not torch.equal(one, other) for one, other in zip(first, net.parameters(), strict=True))


def test_its_steps_are_those_of_adam_with_weight_decay():
    net = RelationNet(3, hidden=4, lr=0.01, weight_decay=0.1).double()
    net.reset(0)
    twin = RelationNet(3, hidden=4).double()
    twin.load_state_dict(net.state_dict())
    twin.requires_grad_(True)
    adam = torch.optim.Adam(twin.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(4):
        losses, norms, slopes = (normal(6, 3, seed=10 * step + place) for place in range(3))
        net.learn(losses, norms, slopes)
        adam.zero_grad()
        (slopes * twin(losses, norms)).sum().backward()
        adam.step()
        for mine, other in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine, other.detach())


def test_slopes_are_the_products_of_a_direction_with_the_gradient_of_each_loss():
    weight, images = normal(3, 5).requires_grad_(), normal(4, 5, seed=1)
    labels, direction = torch.tensor([0, 2, 1, 1]), normal(3, 5, seed=2)
    losses = torch.stack(
        [F.cross_entropy(images @ weight.T, labels, reduction="none"), (images @ weight.T).square().mean(1)], dim=1
    )
    expected = torch.zeros(4, 2, dtype=torch.float64)
    for row in range(4):
        for column in range(2):
            (gradient,) = torch.autograd.grad(losses[row, column], weight, retain_graph=True)
            expected[row, column] = (gradient * direction).sum()
    torch.testing.assert_close(slopes_of(losses, [weight], [direction]), expected)


class Watched(RER):
    """Compares the gradient of the relation replay net with the gradient through the virtual step."""

    def __init__(self, **kwargs):
        super().__init__(**{"backbone": plain_net, "optimizer": sgd, "memory_size": 60, **kwargs})
        self.learnt, self.weighed = [], []

    def _learn_relation(self, batch, joint):
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        weights = trained_weights(self.network)
        if self.virtual == "head":
            weights = {name: value for name, value in weights.items() if name.startswith("head.")}
        self.relation.requires_grad_(True)
        losses, norms = self.sample_losses(joint, output_at(self.network, weights, joint.images))
        inner = (self.relation(losses.detach(), norms.detach()) * losses).sum() / len(losses)
        slopes = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
        after = {name: value - lr * slope for (name, value), slope in zip(weights.items(), slopes, strict=True)}
        outer, _, weight = self._outer_loss(batch, after)
        expected = torch.autograd.grad(outer, list(self.relation.parameters()))
        self.relation.requires_grad_(False)
        assert weight == 1
        learn = self.relation.learn

        def compare(losses, norms, slopes):
            self.relation.requires_grad_(True)
            found = torch.autograd.grad((slopes * self.relation(losses, norms)).sum(), list(self.relation.parameters()))
            self.relation.requires_grad_(False)
            for one, other in zip(found, expected, strict=True):
                scale = float(other.abs().max())
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * scale + 1e-12)
            learn(losses, norms, slopes)

        before = {name: value.clone() for name, value in self.network.state_dict().items()}
        of_net = [value.clone() for value in self.relation.parameters()]
        self.relation.learn = compare
        super()._learn_relation(batch, joint)
        del self.relation.learn
        assert all(torch.equal(value, before[name]) for name, value in self.network.state_dict().items())
        assert any(not torch.equal(one, other) for one, other in zip(of_net, self.relation.parameters(), strict=True))
        self.learnt.append((self.task.index, self.epoch, self.trainer.global_step))

    def losses(self, batch, output):
        terms = super().losses(batch, output)
        if self._weighs(batch):
            stream, replay = (batch.part(name, output) for name in ("stream", "replay"))
            assert len(stream.batch) == len(replay.batch)
            losses, norms = self.sample_losses(batch, output)
            w = self.relation(losses, norms).detach()
            logits = stream.output.logits
            torch.testing.assert_close(norms[:, 0], logits.square().sum(1).sqrt())
            ce = F.cross_entropy(logits, stream.batch.labels, reduction="none")
            torch.testing.assert_close(terms["ce"], stream.share * (w[:, 0] * ce).sum() / len(ce))
            ce = F.cross_entropy(replay.output.logits, replay.batch.labels, reduction="none")
            torch.testing.assert_close(terms["replay"], replay.share * (w[:, -1] * ce).sum() / len(ce))
            self.weighed.append((self.task.index, self.epoch))
        return terms


@pytest.mark.parametrize("options", [{}, {**WITH_LOGITS, "virtual": "head"}])
def test_the_net_learns_by_the_gradient_through_the_virtual_step(options):
    made = run(Watched(learn_every=3, **options), data=FEW, max_epochs=3).strategy
    assert {task for task, _, _ in made.learnt} == {1, 2}
    assert {epoch for _, epoch, _ in made.learnt} == {0, 1, 2}
    assert all(step % 3 == 0 for _, _, step in made.learnt)
    assert set(made.weighed) == {(task, epoch) for task in (1, 2) for epoch in (1, 2)}
    assert int(made.relation.steps) == len(made.learnt)


def test_the_interval_is_a_tenth_of_the_epochs_and_at_least_one_step():
    made = run(RER(backbone=plain_net, optimizer=sgd, memory_size=30), data=FEW, max_epochs=1)
    assert int(made.strategy.relation.steps) == 5 + 5  # of 72 images in batches of 16, in two tasks


def test_with_fixed_weights_it_is_er_and_derpp_to_the_bit():
    options = {"backbone": plain_net, "optimizer": sgd, "memory_size": 60}
    mine = run(RER(fixed_epochs=9, **options), data=FEW)
    assert_same_run(mine, run(ER(reduction="sum", **options), data=FEW))
    mine = run(RER(fixed_epochs=9, update_memory="every", **WITH_LOGITS, **options), data=FEW)
    assert_same_run(mine, run(DERpp(**WITH_LOGITS, **options), data=FEW))
    assert int(mine.strategy.relation.steps) > 0
    assert "logits" not in run(RER(**options), data=FEW, max_epochs=1).strategy.memory.fields


def test_a_memory_that_is_smaller_than_the_batch_repeats_its_samples():
    strategy = RER(memory_size=5)
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1)
    strategy.memory.add(images, torch.arange(5), torch.zeros(5, dtype=torch.int64), Draw.of(5, 0))
    batch = batch_of(torch.zeros(12, dtype=torch.int64))
    drawn = strategy.draw(batch)
    assert len(drawn) == 12
    assert sorted(drawn.labels.bincount().tolist()) == [2, 2, 2, 3, 3]
    halves = []
    for start, stop in ((0, 6), (6, 12)):
        share = Draw(batch.draw.key, start, stop, 12)
        halves.append(strategy.draw(batch.select(slice(start, stop)).replace(draw=share)).labels)
    assert torch.cat(halves).equal(drawn.labels)


def test_it_learns_as_replay():
    options = {"backbone": plain_net, "memory_size": 200}
    mine = run(RER(**options), max_epochs=2).matrix.measures()["average_accuracy"]
    plain = finetuning({"backbone": plain_net}, max_epochs=2).measures()["average_accuracy"]
    assert mine > plain + 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replay_size": 5}, "replay_size is 5, but each sample of the batch is paired"),
        ({"loss_classes": "task"}, "loss_classes is 'task', but losses of all classes are weighed"),
        ({"label_weight": 0.0}, "logit_weight and label_weight are 0"),
        ({"hidden": 0}, "hidden is 0"),
        ({"relation_lr": 0.0}, "relation_lr is 0"),
        ({"relation_decay": -1.0}, "relation_decay is -1"),
        ({"fixed_epochs": -1}, "fixed_epochs is -1"),
        ({"learn_every": 0}, "learn_every is 0"),
        ({"virtual": "backbone"}, "virtual is 'backbone'"),
    ],
)
def test_wrong_options_are_errors(options, message):
    with pytest.raises(ValueError, match=f"RER: {message}"):
        RER(**options)
