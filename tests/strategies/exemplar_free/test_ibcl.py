import math
from functools import partial

import pytest
import torch
from support.pretrained import PretrainedViT, tiny_transformer
from support.runs import loop, plain_net, run
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from cl_lightning.batch import Draw
from cl_lightning.measures import last_accuracy
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.exemplar_free.ibcl import IBCL, PosteriorHead, density_box, gaussian_kl
from cl_lightning.strategy import Output
from cl_lightning.stream import ClassIncremental, RotatedDomains
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "IBCL": Subject(
        small(IBCL, backbone=plain_net, hidden=[4]),
        first_task_is_finetuning=False,
        reason="Gaussian weights of the head are trained, on a frozen backbone",
    ),
}


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head_of(tasks, *, hidden=(), extremes=2):
    """A head with a posterior in memory for each task and extreme, and the tasks with columns 0 and 1."""
    torch.manual_seed(0)
    head = PosteriorHead(3, hidden=hidden, extremes=extremes).double()
    for _ in range(tasks):
        head.begin([0, 1], 2)
        with torch.no_grad():
            head.mu.normal_()
            head.log_sigma.normal_()
        head.keep(0.0)
    return head


def test_the_divergence_is_the_one_of_independent_gaussians():
    mu, log_sigma, prior_mu, log_prior = draws(4, 3, 5)
    expected = kl_divergence(Normal(mu, log_sigma.exp()), Normal(prior_mu, log_prior.exp())).sum(dim=1)
    torch.testing.assert_close(gaussian_kl(mu, log_sigma, prior_mu, log_prior.exp()), expected)


def test_the_best_posterior_of_a_linear_model_is_the_conjugate_one():
    inputs = torch.linalg.qr(draws(20, 3))[0] * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)  # uncorrelated
    targets, noise, prior = draws(20, seed=1), 0.5, torch.tensor([0.2, 0.3, 0.4], dtype=torch.float64)
    precision = prior**-2 + inputs.square().sum(dim=0) / noise**2
    mu = (inputs.T @ targets / noise**2 / precision).requires_grad_()
    log_sigma = (-0.5 * precision.log()).requires_grad_()
    spread = (inputs.square() @ (2 * log_sigma).exp()).sum()
    fit = ((targets - inputs @ mu).square().sum() + spread) / (2 * noise**2)  # E_q of the negative log-likelihood
    (fit + gaussian_kl(mu, log_sigma, torch.zeros(3, dtype=torch.float64), prior)).backward()
    torch.testing.assert_close(mu.grad, torch.zeros_like(mu), rtol=0, atol=1e-12)
    torch.testing.assert_close(log_sigma.grad, torch.zeros_like(mu), rtol=0, atol=1e-12)


def test_a_box_has_the_mass_in_the_middle_of_each_gaussian():
    mu, sigma = draws(6), draws(6, seed=1).exp()
    low, high = density_box(mu, sigma, 0.6)
    of = Normal(mu, sigma)
    torch.testing.assert_close(of.cdf(low), torch.full_like(mu, 0.2))
    torch.testing.assert_close(of.cdf(high), torch.full_like(mu, 0.8))
    for bound in density_box(mu, sigma, 0.0):
        assert torch.equal(bound, mu)


@pytest.mark.parametrize("hidden", [(), (4,), (5, 4)])
def test_outputs_are_of_a_chain_of_linear_layers(hidden):
    head = head_of(1, hidden=hidden)
    features, weights = draws(7, 3), draws(2, head.mu.shape[1], seed=1)
    assert head.outputs == 2
    for model, found in zip(weights, head.outputs_of(features, weights), strict=True):
        values, place, sizes = features, 0, [3, *hidden, 2]
        for number in range(len(sizes) - 1):
            inputs, outputs = sizes[number : number + 2]
            matrix = model[place : place + inputs * outputs].view(outputs, inputs)
            bias = model[place + inputs * outputs : place + (inputs + 1) * outputs]
            values = F.linear(F.relu(values) if number else values, matrix, bias)
            place += (inputs + 1) * outputs
        assert place == len(model)
        torch.testing.assert_close(found, values)


def test_a_preference_combines_means_and_deviations():
    head = head_of(3)
    assert head.used.tolist() == [[0, 1], [2, 3], [4, 5]]
    mean, sigma = head.combined(torch.tensor([0.5, 0.2, 0.3]))
    shares = torch.tensor([0.25, 0.25, 0.1, 0.1, 0.15, 0.15], dtype=torch.float64)
    torch.testing.assert_close(mean, shares @ head.means)
    torch.testing.assert_close(sigma, shares @ head.sigmas)
    single = head_of(3, extremes=1)
    mean, sigma = single.combined(torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(mean, single.means[1])
    torch.testing.assert_close(sigma, single.sigmas[1])


def test_near_posteriors_are_replaced_by_those_in_memory():
    head = head_of(1, extremes=1)
    size = head.mu.shape[1]
    far, near = head.means[0].clone(), head.means[0].clone()
    far[0], near[0] = far[0] + 3.0, near[0] + 1.0
    for mu, expected in ((far, [[0], [1]]), (near, [[0], [1], [0]])):
        head.begin([0, 1], 2)
        with torch.no_grad():
            head.mu.copy_(mu)
            head.log_sigma.copy_(head.sigmas[:1].log())
            head.log_sigma[0, 1] = (head.sigmas[0, 1] + 0.5).log()
        head.keep(2.0 / size)  # distances 3.5 and, of the second one to the first in memory, 1.5
        assert head.used.tolist() == expected
    head.begin([0, 1], 2)
    assert not head.mu.any()
    assert not head.log_sigma.any()
    with torch.no_grad():
        head.mu.fill_(50.0)
    head.keep(math.inf)
    assert len(head.means) == 2


def learnt(tasks, **options):
    made = loop(
        IBCL(backbone=plain_net, **{"optimizer": partial(torch.optim.Adam, lr=0.05), **options}),
        data={"scenario": ClassIncremental(tasks=5), "batch_size": 64},
        options={"stop_after_task": tasks - 1},
        max_epochs=1,
    )
    made.fit()
    return made.strategy


def test_the_loss_is_the_bound_of_each_extreme_for_its_prior():
    strategy = learnt(2, threshold=0.0)
    head = strategy.posteriors
    assert head.used.tolist() == [[0, 1, 2], [3, 4, 5]]
    batch = next(iter(strategy.passes.batches(samples=9)))
    features = torch.randn(len(batch), head.num_features)
    strategy.on_train_start()
    terms = strategy.losses(batch, Output(features, torch.empty(0)))
    noise = Draw.of(3, batch.draw.key, 0x1BC1).randn(head.mu.shape[1])
    ce = kl = 0.0
    for extreme in range(3):
        weights = head.mu[extreme] + head.log_sigma[extreme].exp() * noise[extreme]
        logits = head.outputs_of(features, weights[None])[0]  # of columns 2 and 3
        ce += F.cross_entropy(logits, batch.labels - 2)
        prior = Normal(head.means[extreme], head.sigmas[extreme])
        kl += kl_divergence(Normal(head.mu[extreme], head.log_sigma[extreme].exp()), prior).sum()
    torch.testing.assert_close(terms["ce"], ce, rtol=1e-4, atol=1e-5)
    count = len(strategy.data.labels())
    torch.testing.assert_close(terms["kl"], kl / count, rtol=1e-4, atol=1e-5)


def test_the_priors_of_the_first_task_have_the_scales():
    strategy = learnt(1, prior_scales=[0.5, 2.0])
    mean, sigma = strategy.prior()
    assert not mean.any()
    assert sigma[:, 0].tolist() == [0.5, 2.0]
    assert sigma.shape == strategy.posteriors.mu.shape


def test_the_priors_of_a_later_task_are_the_posteriors_of_the_task_before():
    strategy = learnt(3, threshold=0.0)
    mean, sigma = strategy.prior()
    assert torch.equal(mean, strategy.posteriors.means[3:6])
    assert torch.equal(sigma, strategy.posteriors.sigmas[3:6])


def test_models_lie_in_the_box_of_the_preference():
    strategy = learnt(2, alpha=0.5, threshold=0.0)
    head = strategy.posteriors
    low, high = density_box(*head.combined(torch.tensor([0.25, 0.75])), 0.5)
    models = strategy.models([1.0, 3.0], count=200)
    places = (models - low) / (high - low)
    assert models.shape == (200, head.mu.shape[1])
    assert 0 <= places.min() < 0.01
    assert 0.99 < places.max() <= 1
    torch.testing.assert_close(strategy.models([1.0, 3.0], count=200), models)
    assert places[0].std() > 0.2
    strategy.released = True
    of_tensors = (strategy.models([1.0, 3.0], count=200) - low) / (high - low)
    width = 2 * head.num_features  # the weights of two outputs, then their biases
    torch.testing.assert_close(of_tensors[:, :width], of_tensors[:, :1].expand(-1, width), rtol=0, atol=1e-3)
    assert (of_tensors[:, 0] - of_tensors[:, width]).abs().max() > 0.1


def test_predictions_are_the_mean_probabilities_of_models_for_the_task():
    strategy = learnt(2, alpha=0.9, num_models=3, threshold=0.0).eval()
    head, images = strategy.posteriors, torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        features = strategy.network.backbone(images)
        for task, preference, asked in ((0, [1.0, 0.0], None), (1, [0.0, 1.0], None), (1, [0.5, 0.5], [1.0, 1.0])):
            strategy.prefer(asked)
            probabilities = head.outputs_of(features, strategy.models(preference)).softmax(dim=2).mean(dim=0)
            scores = strategy.predict(images, torch.full((5,), task))
            torch.testing.assert_close(scores[:, 2 * task : 2 * task + 2].exp(), probabilities)
            others = [column for column in range(4) if column // 2 != task]
            assert scores[:, others].isneginf().all()


def test_preferences_are_checked():
    strategy = learnt(1)
    for wrong in ([1.0, 1.0], [-1.0], [0.0]):
        with pytest.raises(ValueError, match=r"IBCL: preference is .*; give 1 numbers of at least 0"):
            strategy.models(wrong)


def test_a_larger_task_than_the_first_one_is_refused():
    head = PosteriorHead(3, hidden=(), extremes=1)
    head.begin([0, 1], 2)
    with pytest.raises(ValueError, match="IBCL: a task has 3 classes and the first one 2"):
        head.begin([2, 3, 4], 5)


def test_it_remembers_domains():
    data = {"scenario": RotatedDomains(degrees=[0.0, 90.0, 180.0], share="split"), "batch_size": 64}
    common = {"backbone": PretrainedViT, "optimizer": partial(torch.optim.Adam, lr=0.03)}
    made = run(IBCL(**common, prior_scales=[1.0, 2.0]), data=data, max_epochs=3)
    plain = run(Finetune(**common, freeze_backbone=True), data=data, max_epochs=3)
    # Measured: .66 against .46.
    assert last_accuracy(made.matrix.R_ti) > last_accuracy(plain.matrix.R_ti) + 0.1
    assert torch.equal(made.matrix.R_ti[2], made.matrix.R_ti.diagonal())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prior_scales": []}, "prior_scales is None"),
        ({"prior_scales": [0.0]}, r"prior_scales is 0\.0"),
        ({"hidden": [0]}, "hidden is 0"),
        ({"threshold": -0.1}, r"threshold is -0\.1"),
        ({"alpha": 1.0}, r"alpha is 1\.0"),
        ({"num_models": 0}, "num_models is 0"),
    ],
)
def test_options_out_of_range_are_errors(options, words):
    with pytest.raises(ValueError, match=words):
        IBCL(backbone=tiny_transformer, **options)
