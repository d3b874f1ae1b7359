"""Stochastic classifiers of rotations."""

from functools import partial

import pytest
import torch
from support.fakes import batch_of, normal
from support.few_shot import OPTIONS, sessions
from support.runs import assert_same, plain_net
from torch.nn import functional as F

from cl_lightning.loop.results import measures
from cl_lightning.models import Output
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.few_shot.s3c import S3C, ResidualAttention, StochasticCosineHead
from cl_lightning.strategy import Phase, PhaseOptions
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "S3C": Subject(
        small(S3C, session_options=PhaseOptions(epochs=2)),
        first_task_is_finetuning=False,
        reason="rotations are classes, and rows are drawn",
    ),
}

PUBLISHED = {
    "s3c": {
        "source": "JAYATEJAK/S3C, as its card gives it",
        "copies": "rotation4",
        "scale": 16.0,
        "prototype_weight": 5.0,
        "attention": True,
        "session_options": {"epochs": 100, "optimizer": "SGD(lr=0.01, momentum=0.9)"},
        "optimizer": "SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.0005)",
        "first_scheduler": "MultiStepLR(gamma=0.1, milestones=[120, 160])",
    },
}


def head(*sizes: int, **options) -> StochasticCosineHead:
    made = StochasticCosineHead(5, **options)
    for size in sizes:
        made.grow(size)
    made.double()
    with torch.no_grad():
        for number, block in enumerate(made.blocks):
            block.sigma.copy_(normal(*block.sigma.shape, seed=number) + 3)
    return made


def test_rows_are_normal_with_the_deviation_of_their_parameter():
    made = head(2, 1, copies=4)
    sigma = torch.cat([block.sigma.view(-1, 5) for block in made.blocks])
    drawn = torch.stack([made.sampled_rows(key) for key in range(1500)]).detach()
    spread = torch.log1p((sigma - 4).exp())
    scaled = (drawn - made.rows()) / spread
    assert scaled.mean().abs() < 0.02
    assert (scaled.std(0) - 1).abs().max() < 0.1
    assert (scaled.mean(0) * 1500**0.5).abs().max() < 4.5
    assert torch.equal(made.sampled_rows(7), drawn[7])
    (slope,) = torch.autograd.grad(made.sampled_rows(7).sum(), made.blocks[1].sigma)
    expected = ((drawn[7] - made.rows()) / spread * (sigma - 4).sigmoid())[-4:]
    torch.testing.assert_close(slope.view(-1, 5), expected)


def test_far_below_the_offset_rows_are_their_means():
    made = head(3, copies=2)
    with torch.no_grad():
        made.blocks[0].sigma.fill_(-1000.0)
    assert torch.equal(made.sampled_rows(3), made.rows())
    assert StochasticCosineHead(5).new_block(2).sigma.abs().max() == 0


def test_attention_is_added_to_the_features():
    block, f = ResidualAttention(8).double(), normal(3, 8)
    first, second = block.gate[0], block.gate[2]
    assert first.weight.shape == (2, 8)
    hidden = (f @ first.weight.T + first.bias).clamp(min=0)
    gate = 1 / (1 + (-(hidden @ second.weight.T + second.bias)).exp())
    torch.testing.assert_close(block(f), f * (1 + gate))
    made = head(2, copies=2)
    f = normal(3, 5)
    cosines = F.cosine_similarity(made.attention(f)[:, None], made.rows()[None], dim=2)
    torch.testing.assert_close(made.joint_scores(f), 16 * cosines)
    torch.testing.assert_close(made(f), 16 * cosines[:, ::2])
    assert torch.equal(StochasticCosineHead(5, attention=False).embed(f), f)


def test_the_loss_of_a_session():
    made = S3C(backbone=plain_net, copies="rotation2", prototype_weight=3.0)
    made.build((1, 8, 8))
    for size in (2, 1):
        made.network.head.grow(size)
    made.double()
    with torch.no_grad():
        for block in made.head.blocks:
            block.sigma.fill_(4.0)
    made.means.grow(6)
    made.means.means.copy_(normal(6, 16))
    labels = torch.tensor([2, 2, 2])
    batch = made.prepare_batch(batch_of(labels, images=normal(3, 1, 8, 8)))
    features = normal(6, 16, seed=2)
    rows = made.head.sampled_rows(batch.draw.fork(0x53C).key)

    def ce(vectors, columns):
        scores = 16 * F.cosine_similarity(vectors[:, None], rows[None], dim=2)
        return -sum(row.log_softmax(0)[c] for row, c in zip(scores, columns, strict=True)) / len(columns)

    for name in ("train", "session"):
        made.phase = Phase(name)
        found = made.losses(batch, Output(features, made.head(features)))
        torch.testing.assert_close(found["ce"], ce(made.head.embed(features), [4, 4, 4, 5, 5, 5]))
    assert found.keys() == {"ce", "prototypes"}
    torch.testing.assert_close(found["prototypes"], 3 * ce(made.means.means[:4], [0, 1, 2, 3]))


class Begins(S3C):
    """Notes the rows with which a session begins."""

    begun: torch.Tensor

    def on_train_start(self):
        super().on_train_start()
        self.begun = self.head.rows().detach().clone()


def test_a_session_begins_with_means_and_trains_the_rows_of_its_classes_alone():
    made = sessions(Begins(**OPTIONS, session_options=PhaseOptions(epochs=3)), until=0, max_epochs=1)
    strategy = made.strategy
    before = {name: value.clone() for name, value in strategy.network.state_dict().items()}
    made._run_task(made.stream.tasks[1], None)
    after = strategy.network.state_dict()
    assert_same(before, {name: after[name] for name in before})
    strategy.eval()
    with torch.no_grad():
        images, labels = zip(*((b.images, b.labels) for b in strategy.passes.batches()), strict=True)
        images, labels = torch.cat(images), torch.cat(labels)
        for c in (6, 7):
            for m in range(4):
                vectors = strategy.head.embed(strategy.network.backbone(images[labels == c].rot90(m, (2, 3))))
                torch.testing.assert_close(strategy.means.means[4 * c + m], vectors.mean(0), rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(strategy.begun[4 * c + m], vectors.mean(0), rtol=1e-4, atol=1e-5)
        assert len(strategy.means) == 32
        own = strategy.head.rows()[24:]
        assert (own - strategy.begun[24:]).abs().amax(1).min() > 0
        assert torch.equal(strategy.begun[:24], strategy.head.rows()[:24])
        turned = torch.stack([images.rot90(m, (2, 3)) for m in range(4)])
        expected = sum(strategy.head.joint_scores(strategy.network.backbone(t))[:, m::4] for m, t in enumerate(turned))
        torch.testing.assert_close(strategy.predict(images), expected / 4, rtol=1e-4, atol=1e-5)


def test_without_epochs_the_rows_of_a_session_are_its_means():
    made = sessions(S3C(**OPTIONS, session_options=PhaseOptions(epochs=0)), until=0, max_epochs=1)
    steps = made.trainer.global_step
    made._run_task(made.stream.tasks[1], None)
    assert made.trainer.global_step == steps
    torch.testing.assert_close(made.strategy.head.rows()[24:].detach(), made.strategy.means.means[24:])


def test_sessions_are_learnt():
    mine, plain = (
        sessions(cls(**OPTIONS)) for cls in (partial(S3C, session_options=PhaseOptions(epochs=20)), Finetune)
    )
    found = measures(mine.matrix, mine.stream, 2)["harmonic_accuracy"]
    assert found > measures(plain.matrix, plain.stream, 2)["harmonic_accuracy"] + 0.4, found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"copies": "mirror"}, "S3C: copies is 'mirror'; use 'none'"),
        ({"scale": 0.0}, "S3C: scale is 0"),
        ({"prototype_weight": -1.0}, "S3C: prototype_weight is -1"),
        ({"loss_classes": "current"}, "S3C: loss_classes is 'current'; use 'all'"),
    ],
)
def test_options_out_of_range_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        S3C(**options)
