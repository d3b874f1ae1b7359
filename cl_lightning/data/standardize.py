"""Normalisation of samples that are no pixels of 8 bits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cl_lightning.batch import Draw
from cl_lightning.data.transforms import Context, Transform


class Standardize(Transform):
    """``(x - mean) / std`` of floating-point samples ``(B, C, ...)``, for each feature of a vector, or each channel.

    Args:
        mean, std: One number per feature or channel, or one for all; std above 0.

    Raises:
        ValueError: If the counts differ, or an std is not above 0.
    """

    takes_images = False

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        if not len(mean) == len(std) > 0 or min(std) <= 0:
            raise ValueError(
                f"Standardize: {len(mean)} means, {len(std)} stds, smallest std {min(std, default=0)}; give one of "
                "each per feature or channel, or one for all, with std above 0"
            )
        self.mean, self.std = tuple(mean), tuple(std)
        self._factors: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def apply(self, images: Tensor, draw: Draw, context: Context | None) -> Tensor:
        key = (images.dtype, images.device)
        if key not in self._factors:
            mean, std = (torch.tensor(values, dtype=torch.float64) for values in (self.mean, self.std))
            self._factors[key] = (1 / std).to(images), (-mean / std).to(images)
        shape = (-1, *[1] * (images.dim() - 2))
        scale, shift = (part.view(shape) for part in self._factors[key])
        return (images * scale).add_(shift)


class Unchanged(Transform):
    """Samples as they are, such as tokens."""

    takes_images = False
    mean, std = (0.0,), (1.0,)

    def apply(self, images: Tensor, draw: Draw, context: Context | None) -> Tensor:
        return images
