"""Supervised Contrastive Replay."""

import math
from functools import partial

import pytest
import torch
from support.baselines import finetuning
from support.fakes import normal
from support.runs import NormNet, assert_same, plain_net, run
from torch.nn import functional as F

from cl_lightning.batch import Draw
from cl_lightning.callbacks.continual_evaluation import ContinualEvaluation
from cl_lightning.callbacks.ema_ensemble import EMAEnsemble
from cl_lightning.losses import supervised_contrastive
from cl_lightning.models import LinearHead, in_eval_mode
from cl_lightning.strategies.online.scr import SCR
from cl_lightning.stream import Blurry, ClassIncremental, Online, Subset
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "SCR": Subject(
        small(SCR, memory_size=30, replay_size=12, projection_size=8),
        first_task_is_finetuning=False,
        reason="a supervised contrastive loss takes the place of cross-entropy",
    ),
}
SLOW = "each step runs the network on two views, and means of the memory are measured again"

PUBLISHED = {
    "scr_cifar10": {
        "source": "RaptorMai/online-continual-learning: config_CVPR/agent/scr/scr_02k.yml, agents/scr.py",
        "memory_size": 200,
        "replay_size": 100,
        "temperature": 0.1,
        "separate_passes": True,
        "optimizer": "SGD(lr=0.1)",
        "data.scenario": "Online(base=ClassIncremental(tasks=5), batch_size=10)",
        "data.batch_size": 10,
    },
}

FIVE = {"scenario": Online(ClassIncremental(tasks=5), batch_size=10)}
FEW = {"scenario": Online(Subset(ClassIncremental(tasks=5), per_class=12), batch_size=10)}


def plain_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


SMALL = partial(SCR, backbone=plain_net, optimizer=plain_sgd, memory_size=60, replay_size=15, projection_size=8)


# ---------------------------------------------------------------------- the loss


class Notes(SCR):
    """Notes the batch, the output and the terms of each step."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.steps, self.arrived = [], []

    def prepare_batch(self, batch):
        joint = super().prepare_batch(batch)
        self.arrived.append(batch)
        return joint

    def losses(self, batch, output):
        terms = super().losses(batch, output)
        embeddings = self.projection(output.features).detach().double()
        self.steps.append((batch, output, embeddings, {name: float(term.detach()) for name, term in terms.items()}))
        return terms


SMALL_NOTES = partial(Notes, **SMALL.keywords)


def contrast(rows, labels, tau):
    """The equation, term by term."""
    u = [row / row.norm() for row in rows]
    total = 0.0
    for i in range(len(u)):
        shares = {a: math.exp(float(u[i] @ u[a]) / tau) for a in range(len(u)) if a != i}
        positives = [p for p in shares if labels[p] == labels[i]]
        total -= sum(math.log(shares[p] / sum(shares.values())) for p in positives) / len(positives)
    return total / len(u)


def test_the_loss_of_a_step_is_the_contrast_of_the_projections_of_all_views():
    strategy = run(SMALL_NOTES(temperature=0.3), data=FEW, limit_train_batches=2).strategy
    assert len(strategy.steps) > 5
    for batch, _, embeddings, terms in strategy.steps:
        assert terms == pytest.approx({"contrast": contrast(embeddings, batch.labels.tolist(), 0.3)}, rel=1e-5)


def test_embeddings_that_are_equal_have_the_loss_log_of_the_other_rows():
    labels = torch.tensor([0, 1, 1, 0, 2, 2])
    loss = supervised_contrastive(torch.ones(6, 3).double(), labels, 0.07, base_temperature=0.07)
    assert float(loss) == pytest.approx(math.log(5))


def test_the_gradient_turns_the_projections_and_keeps_their_norms():
    rows = normal(8, 3, requires_grad=True)
    supervised_contrastive(rows, torch.arange(4).repeat(2), 0.07, base_temperature=0.07).backward()
    assert rows.grad.norm() > 0.1
    assert (rows.grad * rows.detach()).sum(1).abs().max() < 1e-12


# ---------------------------------------------------------------------- a step


def test_a_step_has_two_views_of_the_batch_and_of_the_samples_of_the_memory():
    made = run(SMALL_NOTES(), data=FEW)
    normalize, sizes = made.datamodule.normalize, []
    for arrived, (batch, *_) in zip(made.strategy.arrived, made.strategy.steps, strict=True):
        half, size = len(batch) // 2, len(arrived)
        plain, strong = batch.select(slice(half)), batch.select(slice(half, None))
        assert torch.equal(plain.images, normalize(plain.raw, Draw.of(half, 0)))
        assert torch.equal(plain.raw, strong.raw)
        assert torch.equal(plain.labels, strong.labels)
        assert torch.equal(plain.labels[:size], arrived.labels)
        assert (plain.indices[size:] == -1).all()
        assert (plain.images - strong.images).flatten(1).abs().amax(1).max() > 0
        sizes.append(half - size)
    assert sizes[0] == 0
    assert max(sizes) == 15


@pytest.mark.parametrize("separate", [True, False])
def test_the_views_are_one_pass_or_two_with_statistics_of_their_own(separate):
    strategy = run(SMALL_NOTES(backbone=NormNet, separate_passes=separate), data=FEW, limit_train_batches=2).strategy
    steps = len(strategy.steps)
    assert int(strategy.network.backbone.layers[2].num_batches_tracked) == (2 * steps if separate else steps)
    half = len(strategy.steps[-1][0]) // 2
    expected = (slice(0, half), slice(half, 2 * half)) if separate else ()
    assert strategy.steps[-1][0].passes == expected


def test_the_projection_is_trained_and_predictions_do_not_use_it():
    class Builds(SCR):
        def build(self, image_shape):
            super().build(image_shape)
            self.first = [value.detach().clone() for value in self.projection.parameters()]

    strategy = run(Builds(**SMALL.keywords), data=FEW, limit_train_batches=3).strategy
    sizes = [tuple(value.shape) for value in strategy.projection.parameters()]
    assert sizes == [(16, 16), (16,), (8, 16), (8,)]
    pairs = zip(strategy.projection.parameters(), strategy.first, strict=True)
    assert not any(torch.equal(value, first) for value, first in pairs)
    images = torch.rand(4, *strategy.image_shape)
    with torch.no_grad():
        before = strategy.eval().predict(images)
        for value in strategy.projection.parameters():
            value.zero_()
        assert torch.equal(strategy.predict(images), before)


# ---------------------------------------------------------------------- predictions


def nearest(strategy, images):
    """Distances to the normalised class means of the memory, by the present network."""
    memory, columns = strategy.memory, strategy.network.head.num_columns
    raw = strategy.data.finish(memory.at(torch.arange(len(memory)), Draw.of(len(memory), 0))).images
    with torch.no_grad(), in_eval_mode(strategy):
        features = F.normalize(strategy.network.backbone(raw).double(), dim=1)
        own = F.normalize(strategy.network.backbone(images).double(), dim=1)
    distances = torch.full((len(images), columns), torch.inf, dtype=torch.float64)
    for column in memory.labels.unique().tolist():
        mean = features[memory.labels == column].mean(0)
        distances[:, column] = (own - mean / mean.norm()).norm(dim=1)
    return distances


class Predicts(SCR):
    """Compares the predictions between two steps with the nearest mean of the memory."""

    compared = 0

    def after_step(self, batch):
        super().after_step(batch)
        with in_eval_mode(self):
            scores = self.predict_within_task(batch.images)
        distances = nearest(self, batch.images)
        torch.testing.assert_close(scores.double(), 1 - distances.square() / 2, rtol=1e-4, atol=1e-5)
        assert all(module.training for module in self.network.modules() if module is not self.network.head)
        self.compared += 1


def test_predictions_between_two_steps_are_by_the_present_network_and_memory():
    strategy = run(Predicts(**SMALL.keywords | {"memory_size": 20}), data=FEW, limit_train_batches=3).strategy
    assert strategy.compared > 10


@pytest.mark.parametrize("callbacks", [(), (partial(EMAEnsemble, momentum=0.8),)], ids=["", "other weights"])
def test_at_the_end_of_a_task_predictions_are_by_the_nearest_mean_of_the_memory(callbacks):
    seen = []

    class Compares(SCR):
        def predict(self, images, tasks=None):
            scores = super().predict(images)
            expected = nearest(self, images)
            torch.testing.assert_close(scores.double(), 1 - expected.square() / 2, rtol=1e-4, atol=1e-5)
            seen.append(scores.isinf().any(0))
            return scores

    with pytest.warns(UserWarning, match="the memory of Compares has 3 samples for 10 classes"):
        run(Compares(**SMALL.keywords | {"memory_size": 3}), *(make() for make in callbacks), data=FEW)
    assert seen[-1].sum() >= 7  # of ten classes, in a memory of three samples


def test_evaluations_during_training_leave_the_training_as_it_is():
    plain, watched = SMALL(), SMALL()
    run(plain, data=FEW)
    curves = ContinualEvaluation(every_n_steps=2, samples=10)
    run(watched, curves, data=FEW)
    assert_same(plain.state_dict(), watched.state_dict())
    assert len(curves.curves()) > 10
    assert curves.curves()[:, 0].max() > 0.8


def test_classes_that_come_back_and_tasks_of_one_class_are_learnt():
    for scenario in (Blurry(tasks=3, disjoint=40, blurry=20), ClassIncremental(tasks=10)):
        data = {"scenario": Online(Subset(scenario, per_class=12), batch_size=10)}
        measures = run(SMALL(memory_size=100), data=data).matrix.measures()
        assert measures["average_accuracy"] > 0.3


def test_it_is_far_above_finetuning_on_a_stream_that_is_seen_once():
    plain = {"backbone": plain_net, "optimizer": plain_sgd}
    scr = run(SCR(memory_size=200, replay_size=50, **plain), data=FIVE).matrix.measures()["average_accuracy"]
    none = finetuning(plain, data=FIVE).measures()["average_accuracy"]
    assert scr > none + 0.35


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "SCR: temperature is 0"),
        ({"memory_size": 0}, "SCR: memory_size is 0, but predictions are by the means"),
        ({"replay_size": 0}, "SCR: replay_size is 0"),
        ({"projection_size": 0}, "SCR: projection_size is 0"),
        ({"projection_hidden": 0}, "SCR: projection_hidden is 0"),
        ({"loss_classes": "task"}, "SCR: loss_classes is 'task', but the loss is over the classes of the step"),
    ],
)
def test_wrong_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        SCR(**options)


def test_another_head_is_an_error():
    with pytest.raises(ValueError, match="SCR: head is LinearHead; use a NearestMeanHead, since predictions are by"):
        SCR(head=LinearHead).build((1, 8, 8))
