"""Variational autoencoder of images, as a generator of images of earlier tasks."""

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import ImageShape
from cl_lightning.checks import at_least
from cl_lightning.losses import full_precision


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Kullback-Leibler divergence of normal distributions with diagonal covariance to the standard normal one, in nats.

        KL = 1/2 sum_k ( mu_k^2 + sigma_k^2 - log sigma_k^2 - 1 )

    Args:
        mean: mu, ``(B, k)``.
        log_variance: log sigma^2, ``(B, k)``.

    Returns:
        ``(B,)``, at least 0.
    """
    return (mean.square() + log_variance.exp() - log_variance - 1).sum(dim=1) / 2


class VAE(nn.Module):
    """Variational autoencoder (Kingma & Welling, ICLR 2014, arXiv:1312.6114) with fully connected layers.

        z = mu(x) + sigma(x) * eps,   L(x) = BCE(decoder(z), x) + KL( N(mu(x), sigma(x)^2) || N(0, 1) )

    The cross-entropy is summed over pixels in [0, 1]. The decoder has the layers of the encoder in reverse order.

    Args:
        image_shape: Channels, height, width.
        hidden: Units of each layer of the encoder, at least one layer.
        latent: Dimensions of z, at least 1.

    Raises:
        ValueError: If an option is out of range.
    """

    kept_as: ClassVar[str] = "generators"

    def __init__(self, image_shape: ImageShape, *, hidden: Sequence[int] = (400, 400), latent: int = 100) -> None:
        super().__init__()
        if not hidden:
            raise ValueError("VAE: hidden is empty; give the units of at least one layer")
        for units in hidden:
            at_least(self, 1, hidden=units)
        at_least(self, 1, latent=latent)
        self.image_shape, self.latent = image_shape, latent
        channels, height, width = image_shape
        sizes = (channels * height * width, *hidden)
        encoder: list[nn.Module] = [nn.Flatten()]
        for inputs, units in pairwise(sizes):
            encoder += [nn.Linear(inputs, units), nn.ReLU()]
        self.encoder = nn.Sequential(*encoder, nn.Linear(sizes[-1], 2 * latent))
        decoder: list[nn.Module] = []
        for inputs, units in pairwise((latent, *reversed(hidden))):
            decoder += [nn.Linear(inputs, units), nn.ReLU()]
        self.decoder = nn.Sequential(*decoder, nn.Linear(hidden[0], sizes[0]))

    def loss(self, images: Tensor, noise: Tensor) -> Tensor:
        """L(x) above, mean over the images, in nats; 0 without images; arguments as in :meth:`losses`."""
        return self.losses(images, noise).sum() / max(len(images), 1)

    def losses(self, images: Tensor, noise: Tensor) -> Tensor:
        """L(x) above of each image, the negative evidence lower bound, in nats, ``(B,)``.

        Args:
            images: Pixels in [0, 1], ``(B, C, H, W)``.
            noise: eps, standard normal, ``(B, latent)``; 0 for the bound at the mean of z.
        """
        mean, log_variance = full_precision(self.encoder(images)).chunk(2, dim=1)
        logits = full_precision(self.decoder(mean + (log_variance / 2).exp() * noise))
        pixels = images.flatten(1).to(logits.dtype)
        reconstruction = F.binary_cross_entropy_with_logits(logits, pixels, reduction="none").sum(dim=1)
        return reconstruction + kl_to_standard_normal(mean, log_variance)

    @torch.no_grad()
    def sample(self, noise: Tensor) -> Tensor:
        """Images of z: the means of their pixels, in [0, 1], float32 ``(B, C, H, W)``.

        Args:
            noise: z, standard normal, ``(B, latent)``.
        """
        pixels = full_precision(self.decoder(noise)).sigmoid()
        return pixels.view(-1, *self.image_shape)

    def num_bytes(self) -> int:
        """Size of the weights in bytes."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())


class FeatureVAE(VAE):
    """Variational autoencoder of features, with the squared error in place of the cross-entropy.

        L(x) = |x - decoder(z)|^2 + kl_weight * KL( N(mu(x), sigma(x)^2) || N(0, 1) )

    Args:
        num_features: Size of a feature vector.
        hidden: Units of each layer of the encoder, at least one layer.
        latent: Dimensions of z, at least 1.
        kl_weight: Weight of the divergence, at least 0.
        bounded: Whether a sigmoid is the output of the decoder, for features in [0, 1].
    """

    def __init__(
        self,
        num_features: int,
        *,
        hidden: Sequence[int] = (128, 32),
        latent: int = 8,
        kl_weight: float = 0.025,
        bounded: bool = True,
    ) -> None:
        super().__init__((1, 1, num_features), hidden=hidden, latent=latent)
        self.kl_weight, self.bounded = kl_weight, bounded

    def losses(self, images: Tensor, noise: Tensor) -> Tensor:
        """L(x) above of features ``(B, d)``, ``(B,)``; ``noise`` as in :class:`VAE`."""
        mean, log_variance = full_precision(self.encoder(images)).chunk(2, dim=1)
        errors = self._errors(images, mean + (log_variance / 2).exp() * noise)
        return errors + self.kl_weight * kl_to_standard_normal(mean, log_variance)

    def errors(self, features: Tensor) -> Tensor:
        """Squared errors of the reconstructions of features ``(B, d)`` at the mean of z, ``(B,)``."""
        return self._errors(features, full_precision(self.encoder(features)).chunk(2, dim=1)[0])

    def _errors(self, features: Tensor, z: Tensor) -> Tensor:
        found = full_precision(self.decoder(z))
        found = found.sigmoid() if self.bounded else found
        return (found - features).square().sum(dim=1)
