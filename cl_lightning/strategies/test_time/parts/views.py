"""Views of the images of a test batch: colours, gamma, a small affine map, blur, flip, noise (Wang et al., CVPR 2022).

The parameters of a view (colours, angle, ...) are drawn once per batch, noise per pixel.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import Batch, Draw
from cl_lightning.data.pixels import change_colours_, hue
from cl_lightning.strategies.test_time.parts.part import Adapting

_NOISE = 0xC2  # salt


class View(NamedTuple):
    """Parameters of an augmentation, drawn once for all images of a batch.

    Attributes:
        brightness, contrast, saturation: Factors; 1 for no change.
        hue: Rotation of the hue, in [-0.5, 0.5].
        gamma: Exponent of the pixel values.
        order: Order in which brightness, contrast, saturation, hue and gamma (0 to 4) are applied.
        angle: Rotation in degrees, counter-clockwise.
        scale: Scale factor of the image; 1 for no change.
        shift: Translation to the right and down, after rotation and scaling, as shares of width and height.
        blur: Standard deviation of the Gaussian kernel, in pixels.
        mirrored: Whether the image is flipped horizontally.
    """

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    gamma: float = 1.0
    order: tuple[int, ...] = (0, 1, 2, 3, 4)
    angle: float = 0.0
    scale: float = 1.0
    shift: tuple[float, float] = (0.0, 0.0)
    blur: float = 0.001
    mirrored: bool = False

    @classmethod
    def drawn(cls, key: int) -> "View":
        """Draw the parameters from the ranges of the authors' code, with ``key`` as seed."""
        generator = torch.Generator().manual_seed(key)

        def uniform(low: float, high: float) -> float:
            return low + (high - low) * float(torch.rand((), generator=generator))

        return cls(
            brightness=uniform(0.6, 1.4),
            contrast=uniform(0.7, 1.3),
            saturation=uniform(0.5, 1.5),
            hue=uniform(-0.06, 0.06),
            gamma=uniform(0.7, 1.3),
            order=tuple(torch.randperm(5, generator=generator).tolist()),
            angle=uniform(-15, 15),
            scale=uniform(0.9, 1.1),
            shift=(uniform(-1 / 8, 1 / 8), uniform(-1 / 8, 1 / 8)),
            blur=uniform(0.001, 0.5),
            mirrored=uniform(0, 1) < 0.5,
        )

    def of(self, images: Tensor) -> Tensor:
        """The view of images ``(B, C, H, W)`` in [0, 1], at least one, without noise."""
        images = images.clamp(0, 1)
        brightness, contrast, saturation = self.brightness - 1, self.contrast - 1, self.saturation - 1
        amounts = torch.tensor([[[brightness, 0, 0]], [[0, 0, contrast]], [[0, saturation, 0]]], dtype=torch.float64)
        amounts = amounts.to(images, non_blocking=True)
        for place in self.order:
            if place < len(amounts):
                images = change_colours_(images, amounts[place])
            elif place == len(amounts):
                images = hue(images, images.new_full((1, 1), self.hue)).clamp(0, 1)
            else:
                images = images.clamp(min=1e-8) ** self.gamma
        turn = math.radians(self.angle)
        cos, sin = math.cos(turn) / self.scale, math.sin(turn) / self.scale
        # The grid holds source positions of pixels, in half sides: x' = R^-1 (x - t), since t follows the rotation.
        x, y = (2 * share for share in self.shift)
        ratio = images.shape[2] / images.shape[3]
        first, second = (cos, -sin * ratio), (sin / ratio, cos)
        back = torch.tensor([[*row, -row[0] * x - row[1] * y] for row in (first, second)], dtype=torch.float64)
        back = back.to(images, non_blocking=True).expand(len(images), 2, 3)
        grid = F.affine_grid(back, list(images.shape), align_corners=False)
        images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        line = torch.exp(-torch.arange(-2, 3, device=images.device).square() / (2 * self.blur**2))
        kernel = ((line[:, None] * line) / line.sum() ** 2).expand(images.shape[1], 1, 5, 5)
        images = F.conv2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), kernel.to(images), groups=images.shape[1])
        return images.flip(-1) if self.mirrored else images


def random_view(images: Tensor, draw: Draw, *, sharp: bool = False) -> Tensor:
    """One augmentation of a whole batch: colours, gamma, a small affine map, blur, flip, noise.

    Args:
        images: ``(B, C, H, W)`` in [0, 1].
        draw: Draw of these rows; its key is the seed of the parameters that are drawn once for the batch.
        sharp: Whether to leave out blur and noise.

    Returns:
        ``(B, C, H, W)`` in [0, 1].
    """
    if not len(images):
        return images
    with torch.autocast(images.device.type, enabled=False):  # errors of half precision exceed the noise
        view = View.drawn(draw.key)
        images = (view._replace(blur=View().blur) if sharp else view).of(images)
    if sharp:
        return images.clamp(0, 1)
    noise = draw.fork(_NOISE).randn(*images.shape[1:], device=images.device)
    return (images + 0.005 * noise).clamp(0, 1)


def viewed(strategy: Adapting, batch: Batch, draw: Draw, *, sharp: bool = False) -> Tensor:
    """Finished images ``(B, C, H, W)`` of a random view of a batch, as the network takes them.

    Args:
        strategy: The method.
        batch: Batch of the stream.
        draw: Draw of its rows.
        sharp: Whether to leave out blur and noise.
    """
    raw = batch.raw if batch.raw.is_floating_point() else batch.raw.float() / 255
    return strategy.data.finish(batch.replace(raw=random_view(raw, draw, sharp=sharp))).images
