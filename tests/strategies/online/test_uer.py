"""Unbias Experience Replay."""

from functools import partial

import pytest
import torch
from support.baselines import finetuning
from support.fakes import normal
from support.runs import plain_net, run
from torch.nn import functional as F

from cl_lightning.models import CosineHead, LinearHead
from cl_lightning.strategies.online.uer import UER, angle_logits
from cl_lightning.stream import Blurry, ClassIncremental, Online, Subset
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "UER": Subject(
        small(UER),
        first_task_is_finetuning=False,
        reason="the cross-entropy of the stream is of the angles",
    ),
}

FIVE = {"scenario": Online(ClassIncremental(tasks=5), batch_size=10)}
FEW = {"scenario": Online(Subset(ClassIncremental(tasks=5), per_class=12), batch_size=10)}


def plain_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


OPTIONS = {"backbone": plain_net, "optimizer": plain_sgd, "memory_size": 60}


# ---------------------------------------------------------------------- the angles


def test_the_logits_are_the_cosines_divided_by_the_temperature():
    features, rows = normal(4, 3), normal(5, 3, seed=1)
    expected = [[float(h @ w / (h.norm() * w.norm())) / 0.2 for w in rows] for h in features]
    torch.testing.assert_close(angle_logits(features, rows, 0.2), torch.tensor(expected).double())
    lengths = torch.tensor([0.5, 2.0, 3.0, 0.1, 7.0]).double()[:, None]
    torch.testing.assert_close(angle_logits(features, lengths * rows, 0.2), torch.tensor(expected).double())
    units = F.normalize(features, dim=1), F.normalize(rows, dim=1)
    torch.testing.assert_close(angle_logits(*units, 1.0), units[0] @ units[1].T)  # inner products, as ER


def test_the_gradient_of_the_stream_is_orthogonal_to_features_and_rows():
    features, rows = normal(4, 3, requires_grad=True), normal(5, 3, seed=1, requires_grad=True)
    labels = torch.tensor([0, 4, 2, 2])
    F.cross_entropy(angle_logits(features, rows, 0.09), labels).backward()
    for value in (features, rows):
        assert value.grad.norm() > 0.1
        assert (value.grad * value.detach()).sum(1).abs().max() < 1e-12
    step = rows.detach() - 0.3 * rows.grad
    grown = rows.detach().square().sum(1) + 0.09 * rows.grad.square().sum(1)
    torch.testing.assert_close(step.square().sum(1), grown)  # norms grow at second order only


# ---------------------------------------------------------------------- a step


class Compares(UER):
    """Compares the terms of each step with the equations."""

    both = 0

    def losses(self, batch, output):
        terms = super().losses(batch, output)
        head, size, h = self.network.head, len(batch.parts["stream"][1]), output.features
        rows = head.weight()
        products = h @ rows.T
        angles = products / (h.norm(dim=1, keepdim=True) * rows.norm(dim=1))
        expected = {"angles": F.cross_entropy(angles[:size] / 0.3, batch.labels[:size])}
        if len(h) > size:
            expected["replay"] = F.cross_entropy(products[size:], batch.labels[size:])
            self.both += 1
        assert terms.keys() == expected.keys()
        total = [torch.stack([*values.values()]).sum() for values in (terms, expected)]
        for name, term in terms.items():
            torch.testing.assert_close(term, expected[name], rtol=1e-4, atol=1e-5)
        gradients = [torch.autograd.grad(each, [h, *head.parameters()], retain_graph=True) for each in total]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
        return terms


def test_the_terms_of_a_step_are_the_equations():
    strategy = run(Compares(**OPTIONS, temperature=0.3, replay_size=7), data=FEW).strategy
    assert strategy.both > 8
    images = torch.rand(3, *strategy.image_shape)
    with torch.no_grad():
        features = strategy.eval().network.backbone(images)
        torch.testing.assert_close(strategy.predict(images), features @ strategy.network.head.weight().T)


def test_with_the_task_of_each_sample_both_terms_are_over_its_classes():
    seen = []

    class Looks(UER):
        def classification_loss(self, output, batch):
            loss = super().classification_loss(output, batch)
            mask = self.task_columns[batch.tasks]
            expected = F.cross_entropy(output.logits.masked_fill(~mask, -torch.inf), batch.labels)
            torch.testing.assert_close(loss, expected)
            seen.append(int(mask.sum(1).max()))
            return loss

    strategy = run(Looks(**OPTIONS, loss_classes="task"), data=FEW).strategy
    assert set(seen) == {2}
    assert not strategy.traits.task_free


def test_classes_that_come_back_and_tasks_of_one_class_are_learnt():
    for scenario in (Blurry(tasks=3, disjoint=40, blurry=20), ClassIncremental(tasks=10)):
        data = {"scenario": Online(Subset(scenario, per_class=40), batch_size=10)}
        assert run(UER(**OPTIONS), data=data).matrix.measures()["average_accuracy"] > 0.2  # chance is 0.1


def test_it_is_far_above_finetuning_on_a_stream_that_is_seen_once():
    plain = {"backbone": plain_net, "optimizer": plain_sgd}
    uer = run(UER(**plain, memory_size=200), data=FIVE).matrix.measures()["average_accuracy"]
    none = finetuning(plain, data=FIVE).measures()["average_accuracy"]
    assert uer > none + 0.35


def test_wrong_options_are_errors():
    with pytest.raises(ValueError, match="UER: temperature is 0"):
        UER(temperature=0.0)
    with pytest.raises(ValueError, match="UER: loss_classes is 'current', but samples of earlier tasks are replayed"):
        UER(loss_classes="current")
    with pytest.raises(ValueError, match="UER: head is CosineHead; use a LinearHead, whose logits are products"):
        UER(head=CosineHead).build((1, 8, 8))
    with pytest.raises(ValueError, match="UER: head has a bias; use a LinearHead with bias false, whose logits are"):
        UER(head=LinearHead).build((1, 8, 8))
    UER(head=partial(LinearHead, bias=False)).build((1, 8, 8))
