"""Augmentation and normalisation of whole batches, on their device.

Every row of a batch has its own random numbers, without Python code per row. The numbers come from a ``Draw``: they are
a function of the step, and the shares of all processes together equal the batch of one process. Random numbers per row
(offsets, angles, choice of operation) are drawn on the CPU: they are few, equal on every device, and allow grouping
rows by operation without synchronisation with the GPU.

Images are uint8 ``(B, C, H, W)`` in 0 .. 255 or floating point in [0, 1]; an augmentation returns the dtype of its
input. uint8 results are rounded once per transform, whereas torchvision truncates after each operation: they differ by
at most one grey level.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_lightning.batch import Draw, mix
from cl_lightning.data import pixels
from cl_lightning.data.pixels import Border, Interpolation


@dataclass(frozen=True)
class Context:
    """Information on the rows of a batch apart from their pixels.

    Attributes:
        indices: Index of each sample in its data set, int64 ``(B,)``; negative for samples without one (from a memory).
        epoch: Epoch since the start of the task, from 0.
        seed: Seed of the run, for choices that are fixed per sample over the epochs.
    """

    indices: Tensor
    epoch: int
    seed: int = 0


class Transform(ABC):
    """Base class of functions of a batch of images; a subclass implements ``apply``."""

    needs_pixels: ClassVar[bool] = False  # True: interprets values as colours in [0, 1], so must precede Normalize
    takes_images: ClassVar[bool] = True  # False: takes samples of any shape and dtype
    moves_pixels: ClassVar[bool] = False  # True: moves pixels and changes no value, so that masks can follow

    def __call__(self, images: Tensor, draw: Draw, context: Context | None = None) -> Tensor:
        """Transform a batch.

        Args:
            images: uint8 or floating point ``(B, C, H, W)``.
            draw: Random numbers of these B rows.
            context: Indices and epoch of these rows, for transforms that need them.

        Raises:
            ValueError: If images and draw do not match, or a subclass refuses the images.
        """
        valid = images.ndim == 4 and (images.dtype == torch.uint8 or images.is_floating_point())
        valid |= not self.takes_images
        _require(self, valid, f"{images.dtype} {tuple(images.shape)}; give (B, C, H, W), uint8 or floating point")
        rows = draw.stop - draw.start
        _require(self, len(images) == rows, f"{len(images)} images, {rows} rows in draw; give the draw of these images")
        return self.apply(images, draw, context)

    @abstractmethod
    def apply(self, images: Tensor, draw: Draw, context: Context | None) -> Tensor:
        """The transform itself, on validated images."""


class Compose(Transform):
    """Sequence of transforms, each with its own random numbers: the draw is forked with the position in the list.

    Raises:
        ValueError: If a transform that needs pixels follows ``Normalize``.
    """

    takes_images = False  # each transform checks its own input

    def __init__(self, transforms: list[Transform]) -> None:
        self.transforms = list(transforms)
        normalized = False
        for transform in self.transforms:
            name = type(transform).__name__
            late = normalized and transform.needs_pixels
            _require(
                self, not late, f"{name} after Normalize, whose results are not in [0, 1]; move it before Normalize"
            )
            normalized |= isinstance(transform, Normalize)

    def apply(self, images: Tensor, draw: Draw, context: Context | None) -> Tensor:
        for place, transform in enumerate(self.transforms):
            images = transform(images, draw.fork(place), context)
        return images


def described(value: Any) -> str:
    """Description of a transform: its type and arguments; equal for transforms that compute the same."""
    if isinstance(value, Transform):
        options = {name: part for name, part in vars(value).items() if not name.startswith("_")}
        return f"{type(value).__module__}.{type(value).__qualname__}{described(options)}"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {described(part)}' for key, part in value.items())}}}"
    if isinstance(value, Tensor):
        return described(value.tolist())  # the repr of a tensor omits digits
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(described, value))}]"
    return repr(value)


class ToFloat(Transform):
    """uint8 to float32 in [0, 1]; floating-point images are unchanged."""

    def apply(self, images: Tensor, draw: Draw, context: Context | None) -> Tensor:
        return images if images.is_floating_point() else images.float().div_(255)


class Normalize(Transform):
    """``(x - mean) / std`` per channel, of pixels in [0, 1]; uint8 images are divided by 255 and become float32.

    Args:
        mean, std: One number per channel, or one for all, for pixels in [0, 1]; std above 0.

    Raises:
        ValueError: If the numbers are out of range or their counts differ.
    """

    needs_pixels = True

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        paired = len(mean) == len(std) > 0
        _require(self, paired, f"{len(mean)} means, {len(std)} stds; give one of each per channel, or one for all")
        allowed = min(std) > 0 and max(*mean, *std) <= 1
        message = (
            "std above 0 and both at most 1 are allowed, for pixels in [0, 1]; divide by 255 if pixels are 0 .. 255"
        )
        _require(self, allowed, f"mean {tuple(mean)}, std {tuple(std)}; {message}")
        self.mean, self.std = tuple(mean), tuple(std)
        self._factors: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def apply(self, images: Tensor, draw: Draw, context: Context | None) -> Tensor:
        means, channels = len(self.mean), images.shape[1]
        _require(
            self, means in (1, channels), f"{means} means, {channels} channels; give one per channel, or one for all"
        )
        key = (images.dtype, images.device)
        if key not in self._factors:
            full, dtype = (1.0, images.dtype) if images.is_floating_point() else (255.0, torch.float32)
            scale = torch.tensor([1 / (full * std) for std in self.std], dtype=dtype)
            shift = torch.tensor([-mean / std for mean, std in zip(self.mean, self.std, strict=True)], dtype=dtype)
            self._factors[key] = scale.to(images.device)[:, None, None], shift.to(images.device)[:, None, None]
        scale, shift = self._factors[key]
        if images.is_floating_point():
            return (images * scale).add_(shift)
        return images.float().mul_(scale).add_(shift)  # a product of two dtypes is several times slower


class RandomCrop(Transform):
    """Pad each image and crop it at a random position: a uniform shift by up to ``padding`` pixels per axis.

    Args:
        padding: Pixels added on each side before the crop, at least 1.
        mode: Padding values: ``zeros`` (black), or ``reflect`` at the border pixels.
    """

    moves_pixels = True

    def __init__(self, padding: int = 4, mode: Border = "zeros") -> None:
        allowed = padding >= 1 and mode in ("zeros", "reflect")
        _require(self, allowed, f"padding {padding}, mode {mode}; give padding of at least 1, mode zeros or reflect")
        self.padding, self.mode = padding, mode

    def apply(self, images: Tensor, draw: Draw, context: Context | None) -> Tensor:
        height, width = images.shape[-2:]
        fits = self.mode == "zeros" or self.padding < min(height, width)
        _require(
            self, fits, f"padding {self.padding}, images {height} x {width}; reflect needs padding below the sides"
        )
        return pixels.shift_images(images, draw.randint(2 * self.padding + 1, 2) - self.padding, self.mode)


class RandomHorizontalFlip(Transform):
    """Mirror each image left to right with probability ``p``."""

    axis: ClassVar[int] = -1
    moves_pixels = True

    def __init__(self, p: float = 0.5) -> None:
        _require(self, 0 <= p <= 1, f"p {p}; give a probability in [0, 1]")
        self.p = p

    def apply(self, images: Tensor, draw: Draw, context: Context | None) -> Tensor:
        return pixels.choose(draw.rand() < self.p, images.flip(self.axis), images)


class RandomVerticalFlip(RandomHorizontalFlip):
    """Mirror each image top to bottom with probability ``p``."""

    axis = -2


class AlternatingFlip(Transform):
    """Alternating horizontal flip: random in the first epoch, then each image alternates between epochs.

    Image i is mirrored in epoch e if and only if coin(i) + e is odd: any two consecutive epochs show both views of an
    image ("94% on CIFAR-10 in 3.29 Seconds on a Single GPU", Jordan 2024, arXiv:2404.00498). The coin is a hash of seed
    and index. Samples without an index (from a memory) are mirrored independently at each draw with probability 0.5.
    """

    def apply(self, images: Tensor, draw: Draw, context: Context | None) -> Tensor:
        if context is None:
            raise ValueError("AlternatingFlip: no context; give Context(indices, epoch), or use RandomHorizontalFlip")
        indices = context.indices.to(images.device, non_blocking=True)
        fresh = (draw.rand() < 0.5).to(images.device, non_blocking=True)
        mirrored = torch.where(indices < 0, fresh, _coin(indices, context.seed) ^ (context.epoch % 2 == 1))
        return pixels.choose(mirrored, images.flip(-1), images)


class RandomResizedCrop(Transform):
    """Crop a box of random area and aspect ratio, and resize it (Szegedy et al. 2015, arXiv:1409.4842).

    The distribution of boxes is torchvision's: the first of ten candidates that fits, else a centre crop.

    Args:
        size: Side, or height and width, of the result in pixels.
        scale: Range of the area of the box, as a share of the image's area, in (0, 1].
        ratio: Range of width / height of the box, log-uniform.
        antialias: Whether to average over the input pixels of each output pixel where the box is larger than the
            result.
        padding: Black pixels added on each side before the box is drawn, at least 0.
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        antialias: bool = True,
        padding: int = 0,
    ) -> None:
        self.size = (size, size) if isinstance(size, int) else (size[0], size[1])
        allowed = min(self.size) >= 1 and 0 < scale[0] <= scale[1] <= 1 and 0 < ratio[0] <= ratio[1]
        _require(self, padding >= 0, f"padding {padding}; give at least 0")
        message = "give size of at least 1, increasing scale in (0, 1], increasing ratio above 0"
        _require(self, allowed, f"size {size}, scale {scale}, ratio {ratio}; {message}")
        self.scale, self.ratio, self.antialias, self.padding = scale, ratio, antialias, padding

    def apply(self, images: Tensor, draw: Draw, context: Context | None) -> Tensor:
        images = F.pad(images, (self.padding,) * 4) if self.padding else images
        height, width = images.shape[-2:]
        return pixels.resized_crop(images, self.boxes(draw, height, width), self.size, self.antialias)

    def boxes(self, draw: Draw, height: int, width: int) -> Tensor:
        """Top, left, height and width of the box of each row in pixels, int64 ``(B, 4)``."""
        low, high = (math.log(bound) for bound in self.ratio)
        chance = draw.rand(10, 4)  # (B, candidate, number)
        area = (self.scale[0] + (self.scale[1] - self.scale[0]) * chance[..., 0]) * (height * width)
        ratio = (low + (high - low) * chance[..., 1]).exp()
        tall, wide = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
        top, left = (chance[..., 2] * (height - tall + 1)).floor(), (chance[..., 3] * (width - wide + 1)).floor()
        valid = (tall >= 1) & (tall <= height) & (wide >= 1) & (wide <= width)
        # The fallback: the largest centre crop whose ratio is within the bounds.
        nearest = min(max(width / height, self.ratio[0]), self.ratio[1])
        tall_, wide_ = min(height, round(width / nearest)), min(width, round(height * nearest))
        centre = torch.tensor([(height - tall_) // 2, (width - wide_) // 2, tall_, wide_])
        first = valid.int().argmax(dim=1)[:, None, None].expand(-1, 1, 4)  # argmax: the first of equals
        box = torch.stack([top, left, tall, wide], dim=-1).gather(1, first).squeeze(1)
        return torch.where(valid.any(dim=1, keepdim=True), box.long(), centre)


class RandomRotation(Transform):
    """Rotate each image counter-clockwise about its centre by a random angle; outside is black.

    Args:
        degrees: Range of the angle, uniform; one number d means (-d, d).
        interpolation: ``nearest`` or ``bilinear``; nearest creates no new colours.
    """

    def __init__(self, degrees: float | tuple[float, float], interpolation: Interpolation = "nearest") -> None:
        low, high = (degrees[0], degrees[1]) if isinstance(degrees, Sequence) else (-degrees, degrees)
        allowed = low <= high and interpolation in ("nearest", "bilinear")
        message = "give a number of at least 0 or an increasing pair, interpolation nearest or bilinear"
        _require(self, allowed, f"degrees {degrees}, interpolation {interpolation}; {message}")
        self.low, self.high, self.interpolation = low, high, interpolation

    def apply(self, images: Tensor, draw: Draw, context: Context | None) -> Tensor:
        angle = self.low + (self.high - self.low) * draw.rand()
        rotated = pixels.rotate(pixels.values_of(images), pixels.to_device_of(angle, images), self.interpolation)
        return pixels.like(rotated, images)


class Cutout(Transform):
    """Set a square at a random position to 0, clipped at the border (DeVries & Taylor 2017, arXiv:1708.04552).

    The centre is uniform over the pixels, as in the paper. 0 is black, or the mean colour after ``Normalize``.

    Args:
        size: Side of the square in pixels, at least 1.
    """

    def __init__(self, size: int) -> None:
        _require(self, size >= 1, f"size {size}; give at least 1, or remove Cutout")
        self.size = size

    def apply(self, images: Tensor, draw: Draw, context: Context | None) -> Tensor:
        inside = []
        for axis, length in enumerate(images.shape[-2:]):
            start = (draw.fork(axis).randint(length) - self.size // 2).to(images.device, non_blocking=True)
            offset = torch.arange(length, device=images.device) - start[:, None, None, None]  # (B, 1, 1, length)
            inside.append((offset >= 0) & (offset < self.size))
        return images * ~(inside[0].mT & inside[1])  # on a CPU several times faster than masked_fill


# Property: column of its amount, neutral value, lower and upper bound.
_JITTER = {
    "brightness": (0, 1.0, 0.0, math.inf),
    "contrast": (2, 1.0, 0.0, math.inf),
    "saturation": (1, 1.0, 0.0, math.inf),
    "hue": (3, 0.0, -0.5, 0.5),
}
_HUE = _JITTER["hue"][0]


class ColorJitter(Transform):
    """Change brightness, contrast, saturation and hue by random amounts, in an order drawn for each image.

    Args:
        brightness, contrast, saturation: Range of the factor; one number v means (max(0, 1 - v), 1 + v).
        hue: Range of the shift as a share of the colour circle, within [-0.5, 0.5]; one number v means (-v, v).
        p: Probability with which an image is changed.
    """

    needs_pixels = True

    def __init__(
        self,
        brightness: float | tuple[float, float] = 0.0,
        contrast: float | tuple[float, float] = 0.0,
        saturation: float | tuple[float, float] = 0.0,
        hue: float | tuple[float, float] = 0.0,
        p: float = 1.0,
    ) -> None:
        _require(self, 0 <= p <= 1, f"p {p}; give a probability in [0, 1]")
        self.p = p
        columns, bounds = [], []
        given = zip((brightness, contrast, saturation, hue), _JITTER.items(), strict=True)
        for value, (name, (column, neutral, least, most)) in given:
            if isinstance(value, Sequence):
                low, high = value[0], value[1]
            else:
                low, high = neutral - value if name == "hue" else max(neutral - value, least), neutral + value
            message = f"give a number of at least 0 or an increasing pair within [{least}, {most}]"
            _require(self, least <= low <= high <= most, f"{name} {value}; {message}")
            if (low, high) != (neutral, neutral):
                columns.append(column)
                bounds.append((low - neutral, high - neutral))
        self.columns, self.bounds = torch.tensor(columns, dtype=torch.int64), torch.tensor(bounds).reshape(-1, 2)
        self.hue = _HUE in columns

    def apply(self, images: Tensor, draw: Draw, context: Context | None) -> Tensor:
        low, high = self.bounds.unbind(dim=1)
        amounts = low + (high - low) * draw.fork(0).rand(len(low))  # (B, parts)
        order = draw.fork(1).rand(len(low)).argsort(dim=1)
        changed = draw.fork(2).rand(1) < self.p
        amounts = torch.where(changed, amounts.gather(1, order), 0.0)
        values, white = pixels.values_of(images), pixels.white_of(images)
        values = values.clone() if values is images else values
        for column, amount in zip(torch.split(self.columns[order], 1, 1), torch.split(amounts, 1, 1), strict=True):
            spread = torch.zeros(len(images), len(_JITTER)).scatter_(1, column, amount)
            colours = pixels.to_device_of(spread[:, :_HUE], images)
            pixels.change_colours_(values, colours, white)
            if self.hue:
                changed_rows = ((column == _HUE) & changed).squeeze(1).nonzero().squeeze(1)  # on the CPU
                rows = changed_rows.to(images.device, non_blocking=True)
                shift = pixels.to_device_of(amount[changed_rows], images)
                values.index_copy_(0, rows, pixels.hue(values.index_select(0, rows), shift))
        return pixels.like(values, images)


class RandomGrayscale(Transform):
    """Convert each image to grey with probability ``p``; the number of channels is unchanged."""

    needs_pixels = True

    def __init__(self, p: float = 0.1) -> None:
        _require(self, 0 <= p <= 1, f"p {p}; give a probability in [0, 1]")
        self.p = p

    def apply(self, images: Tensor, draw: Draw, context: Context | None) -> Tensor:
        grey = pixels.like(pixels.luma(pixels.values_of(images)), images)
        return pixels.choose(draw.rand() < self.p, grey.expand_as(images), images)


# Name: amount at full strength, whether its sign is random; values of torchvision.
OPERATIONS: dict[str, tuple[float, bool]] = {
    "Identity": (0.0, False),
    "ShearX": (0.3, True),
    "ShearY": (0.3, True),
    "TranslateX": (150 / 331, True),
    "TranslateY": (150 / 331, True),
    "Rotate": (30.0, True),
    "Brightness": (0.9, True),
    "Color": (0.9, True),
    "Contrast": (0.9, True),
    "Sharpness": (0.9, True),
    "Posterize": (4.0, False),
    "Solarize": (1.0, False),
    "AutoContrast": (0.0, False),
    "Equalize": (0.0, False),
}
# Functions that implement OPERATIONS without Identity, in the same order, and how many operations each implements.
FAMILIES: tuple[tuple[pixels.Operation, int], ...] = (
    (pixels.shear_shift_or_rotate, 5),
    (pixels.change_colours_, 3),
    (pixels.sharpness_, 1),
    (pixels.posterize, 1),
    (pixels.solarize, 1),
    (pixels.autocontrast, 1),
    (pixels.equalize, 1),
)
_FAMILY = torch.tensor([-1, *(place for place, (_, count) in enumerate(FAMILIES) for _ in range(count))])


def _of_columns(operation: pixels.Operation, columns: slice, values: Tensor, amounts: Tensor, white: float) -> Tensor:
    return operation(values, amounts[:, columns], white)


_STARTS = itertools.accumulate((count for _, count in FAMILIES), initial=1)
_CHANGES = [
    partial(_of_columns, operation, slice(start, start + count))
    for (operation, count), start in zip(FAMILIES, _STARTS, strict=False)
]


class RandAugment(Transform):
    """Apply ``num_ops`` random operations to each image (RandAugment: Cubuk et al. 2020, arXiv:1909.13719).

    The 14 operations, their ranges and signs are torchvision's. Geometric operations use nearest-neighbour
    interpolation and fill with black. For uint8 images, each operation returns uint8. A batch needs a few hundred
    small kernels, independently of its size.

    Args:
        num_ops: Operations per image, drawn with replacement.
        magnitude: Strength, ``0 .. num_magnitude_bins - 1``.
        num_magnitude_bins: Number of strengths.
    """

    needs_pixels = True

    def __init__(self, num_ops: int = 2, magnitude: int = 9, num_magnitude_bins: int = 31) -> None:
        allowed = num_ops >= 0 and num_magnitude_bins >= 2 and 0 <= magnitude < num_magnitude_bins
        message = "give num_ops of at least 0, at least 2 bins, a magnitude below the number of bins"
        _require(self, allowed, f"num_ops {num_ops}, magnitude {magnitude} of {num_magnitude_bins} bins; {message}")
        self.num_ops, self.strength = num_ops, magnitude / (num_magnitude_bins - 1)

    def apply(self, images: Tensor, draw: Draw, context: Context | None) -> Tensor:
        most = torch.tensor([most for most, _ in OPERATIONS.values()]) * self.strength
        signed = torch.tensor([signed for _, signed in OPERATIONS.values()])
        chosen = draw.fork(0).randint(len(OPERATIONS), self.num_ops)  # (B, num_ops)
        negative = signed[chosen] & (draw.fork(1).rand(self.num_ops) < 0.5)
        amounts = torch.where(negative, -most[chosen], most[chosen])
        result = (
            images if images.dtype == torch.uint8 else pixels.values_of(images)
        )  # uint8: a quarter of the memory traffic
        for place in range(self.num_ops):
            result = change(result, chosen[:, place], amounts[:, place])
        return result.to(images.dtype)


def change(images: Tensor, chosen: Tensor, amounts: Tensor) -> Tensor:
    """Apply operation ``chosen[i]`` of ``OPERATIONS`` with ``amounts[i]`` to row i.

    Args:
        images: ``(B, C, H, W)``.
        chosen: Indices into ``OPERATIONS``, int64 ``(B,)``, on the CPU.
        amounts: ``(B,)``, on the CPU.
    """
    spread = torch.zeros(len(images), len(OPERATIONS)).scatter_(1, chosen[:, None], amounts[:, None])
    return pixels.apply_each(images, _FAMILY[chosen], _CHANGES, spread)


def _coin(indices: Tensor, seed: int) -> Tensor:
    """Fair coin per (seed, index), bool: the top bit of splitmix64; int64 arithmetic wraps around."""
    bits = indices * (0x9E3779B97F4A7C15 - (1 << 64)) + _int64(mix(seed))
    bits = (bits ^ ((bits >> 30) & ((1 << 34) - 1))) * _int64(0xBF58476D1CE4E5B9)
    return (bits ^ ((bits >> 27) & ((1 << 37) - 1))) * _int64(0x94D049BB133111EB) < 0


def _int64(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def _require(owner: Transform, condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"{type(owner).__name__}: {message}")
