"""Scaling of images to the input size of a network, and statistics of their pixels."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_lightning.checks import at_least, one_of
from cl_lightning.data.arrays import SampleSource


class InputSize:
    """Images scaled to a square and cropped at the centre.

    Args:
        owner: Object to name in errors.
        resize: Height and width to which images are scaled, in pixels; None to keep the size.
        center_crop: Side of the square cut from the centre after scaling, at most ``resize``; None for no crop.
        interpolation: Interpolation of the scaling.

    Raises:
        ValueError: If an option is out of range or has no effect.
    """

    def __init__(
        self,
        owner: object,
        resize: int | None,
        center_crop: int | None,
        interpolation: Literal["bilinear", "bicubic"],
    ) -> None:
        at_least(owner, 1, optional=True, resize=resize)
        name = type(owner).__name__
        if center_crop is not None and not 1 <= center_crop <= (resize or 0):
            raise ValueError(
                f"{name}: center_crop is {center_crop}, resize is {resize}; center_crop must be at least 1 and at most "
                "resize"
            )
        one_of(owner, ("bilinear", "bicubic"), interpolation=interpolation)
        if interpolation != "bilinear" and resize is None:
            raise ValueError(f"{name}: give resize; interpolation is {interpolation!r}, but images are not scaled")
        self.resize, self.center_crop, self.interpolation = resize, center_crop, interpolation

    @property
    def side(self) -> int | None:
        """Side of the images after both, in pixels; None if they keep their size."""
        return self.center_crop or self.resize

    def __call__(self, images: Tensor) -> Tensor:
        """Images ``(B, C, H, W)``, uint8 or in [0, 1]; floating point if they are scaled."""
        if self.resize is None:
            return images
        side = self.resize
        if images.shape[-2:] != (side, side):
            images = images if images.is_floating_point() else images.float().div_(255)
            images = F.interpolate(images, (side, side), mode=self.interpolation, antialias=True)
            if self.interpolation == "bicubic":
                images = images.clamp_(0, 1)  # bicubic interpolation overshoots at edges
        if self.center_crop is not None:
            first = round((side - self.center_crop) / 2)
            rows = slice(first, first + self.center_crop)
            images = images[..., rows, rows]
        return images

    def __str__(self) -> str:
        if self.center_crop is None and self.interpolation == "bilinear":
            return f"{self.resize}"
        return f"{self.resize} {self.interpolation}, of which {self.center_crop}"


def measured(source: SampleSource, indices: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the samples, per channel or, for vectors, per feature.

    Args:
        source: Source of the samples.
        indices: Samples to measure, int64 ``(n,)``; at most 10,000 in memory or 1,000 files are read, evenly spaced.

    Returns:
        Mean and standard deviation. Of uint8 pixels: of the pixels in [0, 1], rounded to 4 decimals, the standard
        deviation at least one grey level, for constant images. Of other samples: rounded to 6 digits, and 1 as the
        standard deviation of a channel or feature that is constant.
    """
    most = 10_000 if source.in_memory else 1_000
    if len(indices) > most:
        indices = indices[torch.linspace(0, len(indices) - 1, most, dtype=torch.float64).long()]
    total = squares = torch.zeros((), dtype=torch.float64)
    count = 0
    for part in torch.split(indices, 256):
        values = source.take(part).transpose(0, 1).flatten(1).double()  # (C, pixels)
        total, squares = total + values.sum(1), squares + values.square().sum(1)
        count += values.shape[1]
    mean = total / count
    if source.take(indices[:0]).dtype != torch.uint8:
        variance = _centred(source, indices, mean) / count
        std = torch.where(variance > 1e-12 * mean.square(), variance.sqrt(), 1.0)
        return [float(f"{value:.6g}") for value in mean.tolist()], [float(f"{value:.6g}") for value in std.tolist()]
    std = (squares / count - mean.square()).clamp(min=1).sqrt()
    return [round(value, 4) for value in (mean / 255).tolist()], [round(value, 4) for value in (std / 255).tolist()]


def _centred(source: SampleSource, indices: Tensor, mean: Tensor) -> Tensor:
    """Sum of squared distances from the mean, which may be large in comparison, float64 ``(C,)``."""
    parts = (source.take(part).transpose(0, 1).flatten(1).double() for part in torch.split(indices, 256))
    return torch.stack([(part - mean[:, None]).square().sum(1) for part in parts]).sum(0)
