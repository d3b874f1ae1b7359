"""Label-agnostic forgetting: its losses, the optimizer whose losses take turns, and a class that is forgotten."""

import math
from functools import partial

import pytest
import torch
from support.fakes import normal
from support.runs import assert_resumes, assert_same_run, plain_net, run, sgd
from support.unlearning import requests
from torch import nn
from torch.nn import functional as F

from cl_lightning.callbacks.unlearning_measures import UnlearningMeasures
from cl_lightning.models import FeatureVAE
from cl_lightning.optim import AlternatingAdam
from cl_lightning.strategies.baselines.joint import Joint
from cl_lightning.strategies.unlearning.laf import LAF, extractor_scores
from cl_lightning.strategy import PhaseOptions
from cl_lightning.stream import Request

CLASS_3 = requests(Request(classes=["3"]))
ONCE = PhaseOptions(epochs=1)
SMALL = partial(
    LAF, backbone=plain_net, optimizer=sgd, hidden=(12,), latent=3, unlearn_epochs=1, represent_options=ONCE
)


def test_the_score_is_exp_of_m_by_m_plus_1_within_1_and_e():
    errors = torch.tensor([0.0, 1.0, 3.0, 1e9], dtype=torch.float64)
    expected = [1.0, math.exp(0.5), math.exp(0.75), math.exp(1e9 / (1e9 + 1))]
    torch.testing.assert_close(extractor_scores(errors), torch.tensor(expected, dtype=torch.float64))
    assert extractor_scores(errors).max() < math.e


@pytest.mark.parametrize("bounded", [True, False])
def test_the_autoencoder_has_the_squared_error_and_a_weighted_divergence(bounded):
    torch.manual_seed(0)
    vae = FeatureVAE(5, hidden=(4,), latent=2, kl_weight=0.3, bounded=bounded).double()
    x, noise = normal(3, 5), normal(3, 2, seed=1)
    for row, eps, found, error in zip(x, noise, vae.losses(x, noise), vae.errors(x), strict=True):
        mean, log_variance = vae.encoder(row[None])[0].split(2)
        kl = 0.5 * (mean**2 + log_variance.exp() - log_variance - 1).sum()

        def output(z):
            raw = vae.decoder(z)
            return 1 / (1 + (-raw).exp()) if bounded else raw

        sampled = output(mean + log_variance.mul(0.5).exp() * eps)
        torch.testing.assert_close(found, ((row - sampled) ** 2).sum() + 0.3 * kl)
        torch.testing.assert_close(error, ((row - output(mean)) ** 2).sum())


def test_the_optimizer_is_two_adams_that_take_turns_also_after_a_restart():
    start, targets = normal(4), (normal(4, seed=1), normal(4, seed=2))
    mine, plain = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    found = AlternatingAdam([mine], lr=0.1, second_lr=0.03)
    adams = [torch.optim.Adam([plain], lr=lr) for lr in (0.1, 0.03)]
    for step in range(7):
        assert found.turn == step % 2
        for parameter in (mine, plain):
            parameter.grad = (parameter.detach() - targets[step % 2]) * (step + 1)
        found.step()
        adams[step % 2].step()
        torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-14)
        state = found.state_dict()
        found = AlternatingAdam([mine], lr=1.0, second_lr=1.0)
        found.load_state_dict(state)
    for wrong in ({"lr": 0.0}, {"second_lr": 0.0}):
        with pytest.raises(ValueError, match="AlternatingAdam: "):
            AlternatingAdam([mine], **wrong)


class Checked(LAF):
    """Compares the terms of each step of a request with plain loops over single samples."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen = []

    def losses(self, batch, output):
        found = super().losses(batch, output)
        if "forgotten" not in batch.parts:
            assert self.task.learns
            return found
        gone = set(self.data.stream.train[self.task.index].tolist())
        rows, kept = batch.parts["kept"]
        assert not gone & set(kept.indices.tolist())
        assert (batch.parts["forgotten"][1].labels == 3).all()
        features = output.features
        x_r, x_f = features[rows], features[batch.parts["forgotten"][0]]
        assert len(x_f) == min(len(x_r), len(gone))
        if self.phase.name == "represent":
            assert not features.requires_grad
            expected = {"vae_forgotten", "vae_kept"}
        elif self.turn == 0:
            m_r, m_f = self.vae_kept.errors(x_r), self.vae_forgotten.errors(x_f)
            expected = {
                "kept": sum(math.exp(float(m) / (float(m) + 1)) for m in m_r),
                "forgotten": -sum(math.exp(float(m) / (float(m) + 1)) for m in m_f),
            }
        else:
            before = self.teacher(batch.images).features
            d = [1 - float(F.cosine_similarity(a, b, dim=0)) for a, b in zip(features, before, strict=True)]
            d_r, d_f = d[: len(x_r)], d[len(x_r) :]
            total = sum(math.exp(value / self.temperature) for value in d_f)
            expected = {"distance": sum(d_r), "level": -len(d_r) * math.log(total)}
        assert set(found) == set(expected)
        if isinstance(expected, dict):
            for name, value in expected.items():
                assert float(found[name].detach()) == pytest.approx(value, rel=1e-4, abs=1e-4)
        self.seen.append((self.phase.name, self.turn if self.phase.name == "unlearn" else -1))
        return found


def test_each_step_of_a_request_has_the_terms_of_plain_loops_and_the_losses_take_turns():
    strategy = Checked(backbone=plain_net, optimizer=sgd, unlearn_epochs=2, represent_options=ONCE, temperature=0.7)
    made = run(strategy, data={"scenario": CLASS_3}, max_epochs=1)
    steps = -(-(len({i for t in made.stream.tasks for i in t_train(made, t)}) - 147) // 64)
    assert strategy.seen[:steps] == [("represent", -1)] * steps
    assert strategy.seen[steps:] == [("unlearn", index % 2) for index in range(2 * steps)]
    assert len(strategy.forgotten) == 0
    assert not strategy.teacher


def t_train(made, task):
    return made.stream.train[task.index].tolist()


def test_with_the_network_before_the_request_the_alignment_is_minus_b_log_b():
    found = []

    class Same(LAF):
        @property
        def turn(self):
            return 1

        def losses(self, batch, output):
            terms = super().losses(batch, output)
            if "level" in terms:
                found.append((float(sum(terms.values())), *(len(part[1]) for part in batch.parts.values())))
            return terms

    run(Same(backbone=plain_net, unlearn_epochs=1, represent_options=ONCE), data={"scenario": CLASS_3}, max_epochs=1)
    value, kept, forgotten = found[0]
    assert value == pytest.approx(-kept * math.log(forgotten), rel=1e-5)


def test_each_sample_weighs_the_same_in_the_loss_of_the_first_autoencoder():
    found = []

    class Weighed(LAF):
        def _autoencoder_losses(self, kept, x_r, share, forgotten, x_f, its):
            zero = [x_r * 0, x_f * 0]
            one, other = (
                super(Weighed, self)._autoencoder_losses(kept, a, share, forgotten, b, its)["vae_kept"]
                for a, b in ((x_r, zero[1]), (x_r, x_f))
            )
            noise = forgotten.draw.fork(0x1AF1).randn(self.latent)
            gap = self.vae_kept.loss(x_f, noise) - self.vae_kept.loss(zero[1], noise)
            found.append(float((other - one) / gap))
            return super()._autoencoder_losses(kept, x_r, share, forgotten, x_f, its)

    strategy = Weighed(backbone=plain_net, unlearn_epochs=1, represent_options=ONCE)
    made = run(strategy, data={"scenario": CLASS_3}, max_epochs=1)
    sizes = [len(made.stream.train[t.index]) for t in made.stream.tasks if t.learns]
    assert found[0] == pytest.approx(147 / sum(sizes), rel=1e-2)


def test_without_requests_it_is_joint_training():
    assert_same_run(run(SMALL()), run(Joint(backbone=plain_net, optimizer=sgd)))


def test_a_request_that_is_interrupted_is_resumed(tmp_path):
    early = requests(Request(classes=["3"], after=0))
    assert_resumes(lambda: (SMALL(), []), tmp_path, data={"scenario": early})


def test_a_class_is_forgotten_without_labels_and_the_others_are_kept():
    callback = UnlearningMeasures()
    options = {"extractor_lr": 3e-4, "alignment_lr": 6e-4, "represent_options": PhaseOptions(epochs=3)}
    strategy = LAF(backbone=plain_net, optimizer=sgd, unlearn_epochs=16, **options)
    made = run(strategy, callback, data={"scenario": CLASS_3}, max_epochs=6)
    kept, forgotten, kept_test, forgotten_test, _ = callback.table[-1].tolist()
    assert made.matrix.per_class[2, 3] > 0.9  # before the request
    assert max(forgotten, forgotten_test) < 0.1
    assert min(kept, kept_test) > 0.9


def test_the_head_is_repaired_with_labels_and_options_are_checked():
    names = {}

    class Watched(LAF):
        def begin_phase(self, phase, *args):
            super().begin_phase(phase, *args)
            names[phase.name] = [n for n, p in self.named_parameters() if p.requires_grad]

    run(
        Watched(backbone=plain_net, unlearn_epochs=1, repair_epochs=1, represent_options=ONCE),
        data={"scenario": CLASS_3},
        max_epochs=1,
    )
    assert list(names) == ["train", "represent", "unlearn", "repair"]
    assert all(name.startswith("network.head.") for name in names["repair"])
    assert all(name.startswith("vae_") for name in names["represent"])
    assert all(name.startswith("network.") for name in names["unlearn"])
    for wrong in (
        {"latent": 0},
        {"temperature": 0.0},
        {"unlearn_epochs": 0},
        {"kl_weight": -1.0},
        {"repair_epochs": -1},
    ):
        with pytest.raises(ValueError, match=f"LAF: {next(iter(wrong))} is"):
            LAF(**wrong)
