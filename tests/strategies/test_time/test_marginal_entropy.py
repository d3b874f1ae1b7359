from functools import partial

import pytest
import torch
from support.adaptation import adapt, batches, scores, source_network, stream, tiny_resnet, watching
from support.fakes import normal
from torch import nn

from cl_lightning.data import AugMix, RandomCrop, RandomHorizontalFlip, RandomVerticalFlip
from cl_lightning.losses import entropy
from cl_lightning.models import adapt_norms, set_statistics
from cl_lightning.strategies.test_time.bn_adapt import BNAdapt
from cl_lightning.strategies.test_time.marginal_entropy import MarginalEntropy, augmentation, entropy_of_views
from cl_lightning.testing import Subject, small

SLOW = "each image runs the network on three views, one image after another"
SUBJECTS = {
    "MarginalEntropy": Subject(small(MarginalEntropy, backbone=tiny_resnet, views=3)),
}

PUBLISHED = {
    "marginal_entropy": {
        "source": "Zhang et al. 2022, sec. 4 and appendix: CIFAR-10",
        "views": 32,
        "params": "all",
        "reset": "batch",
        "predict_when": "after",
        "backbone": "CifarResNet(depth=8, width=8)",
        "optimizer": "SGD(lr=0.005)",
    },
}

sgd = partial(torch.optim.SGD, lr=0.05)


def test_the_loss_is_the_mean_entropy_and_the_divergence_of_the_views():
    logits = normal(4, 5, 3).requires_grad_()
    found = entropy_of_views(logits)
    expected = []
    for views in logits:
        p = views.softmax(1)
        mean = p.mean(0)
        divergence = sum(float((one * (one / mean).log()).sum()) for one in p) / 5  # Jensen-Shannon
        expected.append(float(entropy(views).mean()) + divergence)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(found[0], logits)
    p = logits[0].softmax(1).detach()
    slope = -p.mean(0).log() / 5  # dH/dp of a view, up to a constant
    torch.testing.assert_close(gradient[0], p * (slope - (p * slope).sum(1, keepdim=True)))
    assert not gradient[1:].any()


def test_of_identical_views_it_is_the_entropy_and_certain_views_have_a_finite_gradient():
    logits = normal(4, 1, 3)
    torch.testing.assert_close(entropy_of_views(logits.expand(-1, 6, -1)), entropy(logits[:, 0]))
    torch.testing.assert_close(entropy_of_views(logits), entropy(logits[:, 0]))
    sure = torch.tensor([[[200.0, 0.0], [200.0, 0.0]], [[200.0, 0.0], [0.0, 200.0]]], requires_grad=True)
    found = entropy_of_views(sure)
    torch.testing.assert_close(found, torch.tensor([0.0, 2.0]).mul(torch.tensor(2.0).log() / 2))
    (gradient,) = torch.autograd.grad(found.sum(), sure)
    assert gradient.isfinite().all()


def mixed_network() -> nn.Module:
    plain = source_network("source")
    adapt_norms(plain)
    set_statistics(plain, "mix", share=1 / 17)
    return plain


def test_each_image_is_predicted_after_one_step_from_the_source():
    strategy = watching(MarginalEntropy, views=2, transforms=[RandomVerticalFlip(1.0)], optimizer=sgd)
    made = adapt(strategy, stream(samples=6, batch_size=1))
    expected = []
    for images, _ in batches(made.datamodule):
        plain = mixed_network()
        p = plain(images.flip(-2).repeat(2, 1, 1, 1)).logits.softmax(1).mean(0)
        (-(p * p.log()).sum()).backward()
        sgd(plain.parameters()).step()
        with torch.no_grad():
            expected.append(plain(images).logits)
    before = torch.cat([mixed_network()(images).logits for images, _ in batches(made.datamodule)])
    assert not torch.allclose(torch.cat(expected), before, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(scores(strategy), torch.cat(expected), rtol=1e-3, atol=1e-3)


def test_a_batch_takes_the_mean_over_its_images_of_the_entropy_of_their_own_views():
    flips = [RandomHorizontalFlip(1.0)]
    strategy = watching(MarginalEntropy, views=2, transforms=flips, optimizer=sgd, statistics="source")
    made = adapt(strategy, stream(samples=20, batch_size=20))
    plain = source_network("source")
    images, _ = batches(made.datamodule)[0]
    entropy(plain(images.flip(-1)).logits).mean().backward()
    sgd(plain.parameters()).step()
    torch.testing.assert_close(strategy.noted[1][0], plain(images).logits.detach(), rtol=1e-3, atol=1e-3)


def test_views_of_an_image_differ_and_lie_together():
    seen = []

    class Seeing(MarginalEntropy):
        def views_of(self, batch):
            seen.append((batch, super().views_of(batch)))
            return seen[-1][1]

    strategy = watching(Seeing, views=4, transforms=[RandomCrop(1)], optimizer=sgd)
    adapt(strategy, stream(samples=5, batch_size=5))
    batch, views = seen[0]
    assert views.shape == (20, 1, 8, 8)
    by_image = views.view(5, 4, 1, 8, 8)
    for image, own in zip(batch.images, by_image, strict=True):
        padded = nn.functional.pad(image, (1, 1, 1, 1), value=float(-0.305 / 0.376))
        crops = [padded[:, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
        assert all(any(torch.allclose(view, crop, atol=0.01) for crop in crops) for view in own)
        assert not all(torch.equal(view, own[0]) for view in own)
    assert [type(one).__name__ for one in augmentation().transforms] == ["RandomCrop", "RandomHorizontalFlip", "AugMix"]


def test_without_a_learning_rate_it_is_the_source_with_mixed_statistics():
    nothing = partial(torch.optim.SGD, lr=0.0)
    made = [watching(MarginalEntropy, views=2, optimizer=nothing), watching(BNAdapt, statistics="mix", alpha=1 / 17)]
    for strategy in made:
        adapt(strategy)
    torch.testing.assert_close(*(scores(strategy) for strategy in made))


def test_it_corrects_predictions_of_images_of_low_contrast():
    """One image per batch and the learning rate of the paper. Batches of several images do not gain on digits."""
    data = {"corruptions": ["contrast"], "samples": 100, "batch_size": 1}
    subjects = [
        watching(BNAdapt, statistics="mix", alpha=1 / 17),
        watching(MarginalEntropy, views=8, transforms=[AugMix()]),
    ]
    errors = [adapt(one, stream(**data)).matrix.measures()["mean_online_error"] for one in subjects]
    assert errors[1] < errors[0] - 0.03


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"views": 0}, "views is 0"),
        ({"alpha": 1.5}, r"alpha is 1\.5"),
        ({"statistics": "none"}, "statistics is 'none'"),
    ],
)
def test_options_out_of_range_are_errors(given, words):
    with pytest.raises(ValueError, match=words):
        MarginalEntropy(**given)
