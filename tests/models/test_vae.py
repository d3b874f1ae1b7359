"""The loss and the samples of a variational autoencoder."""

import pytest
import torch
from support.fakes import normal
from torch.distributions import Bernoulli, Normal, kl_divergence

from cl_lightning.models import VAE, kl_to_standard_normal

SHAPE = (2, 3, 4)


def made(**options):
    torch.manual_seed(0)
    return VAE(SHAPE, **{"hidden": (7, 5), "latent": 3, **options}).double()


def test_the_divergence_is_that_of_the_distributions():
    mean, log_variance = normal(4, 3), normal(4, 3, seed=1)
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(torch.zeros(3), torch.ones(3))).sum(1)
    torch.testing.assert_close(kl_to_standard_normal(mean, log_variance), expected.double())
    assert not kl_to_standard_normal(torch.zeros(2, 3), torch.zeros(2, 3)).any()


def test_the_loss_is_the_negative_evidence_lower_bound():
    vae, images, noise = made(), normal(6, *SHAPE).sigmoid(), normal(6, 3, seed=1)
    code = images.flatten(1)
    for layer in (1, 3):
        code = (code @ vae.encoder[layer].weight.T + vae.encoder[layer].bias).relu()
    code = code @ vae.encoder[5].weight.T + vae.encoder[5].bias
    mean, deviation = code[:, :3], (code[:, 3:] / 2).exp()
    z = mean + deviation * noise
    for layer in (0, 2):
        z = (z @ vae.decoder[layer].weight.T + vae.decoder[layer].bias).relu()
    pixels = (z @ vae.decoder[4].weight.T + vae.decoder[4].bias).sigmoid()
    likelihood = Bernoulli(pixels, validate_args=False).log_prob(images.flatten(1)).sum(1)
    divergence = kl_divergence(Normal(mean, deviation), Normal(torch.zeros(3), torch.ones(3))).sum(1)
    torch.testing.assert_close(vae.loss(images, noise), (divergence - likelihood).mean())
    assert [layer.weight.shape for layer in vae.decoder[::2]] == [(5, 3), (7, 5), (24, 7)]


def test_samples_are_the_means_of_the_pixels():
    vae, noise = made(), normal(6, 3)
    samples = vae.sample(noise)
    assert samples.shape == (6, *SHAPE)
    torch.testing.assert_close(samples.flatten(1), vae.decoder(noise).sigmoid())
    assert not samples.requires_grad


def test_no_images_have_no_loss():
    vae = made()
    assert float(vae.loss(torch.zeros(0, *SHAPE).double(), torch.zeros(0, 3).double())) == 0.0
    assert vae.sample(torch.zeros(0, 3).double()).shape == (0, *SHAPE)


def test_it_learns_the_distribution_of_two_images():
    torch.manual_seed(0)
    vae = VAE((1, 4, 4), hidden=(32,), latent=2)
    images = torch.stack([torch.eye(4), 1 - torch.eye(4)])[:, None].repeat(16, 1, 1, 1)
    optimizer, generator = torch.optim.Adam(vae.parameters(), lr=1e-2), torch.Generator().manual_seed(0)
    for _ in range(300):
        loss = vae.loss(images, torch.randn(32, 2, generator=generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drawn = vae.sample(torch.randn(500, 2, generator=generator))
    gaps = torch.stack([(drawn - image).square().mean((1, 2, 3)) for image in images[:2]], dim=1)
    assert float(gaps.min(dim=1).values.mean()) < 0.05, gaps.min(dim=1).values.mean()
    shares = gaps.argmin(dim=1).bincount(minlength=2) / 500
    torch.testing.assert_close(shares, torch.full((2,), 0.5), atol=0.15, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": ()}, "VAE: hidden is empty"),
        ({"hidden": (4, 0)}, "VAE: hidden is 0"),
        ({"latent": 0}, "VAE: latent is 0"),
    ],
)
def test_options_out_of_range_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        made(**options)
