"""Augmentation and normalisation of whole batches, on the device they are on.

Every row of a batch gets its own random numbers, and no Python runs per row. The numbers come from a ``Draw``, so they
are a function of the step, and the shares of the ranks of a distributed run together are the batch of one process. What
is drawn per row (offsets, angles, which operation) is drawn on the CPU: there is little of it, it is then the same on
every device, and rows can be grouped by operation without waiting for the GPU.

Images are uint8 ``(B, C, H, W)`` in 0 .. 255 or floating point in [0, 1]; an augmentation returns the type it is given.
uint8 results are rounded once per transform, where torchvision cuts off after each operation: a grey level at most.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_lightning.batch import Draw, mix

Border = Literal["zeros", "reflect"]
Interpolation = Literal["nearest", "bilinear"]
Operation = Callable[[Tensor, Tensor], Tensor]  # of float images (B, C, H, W) in [0, 1], with an amount (B, 1, 1, 1)
Row = tuple[Tensor | float, Tensor | float, Tensor | float]


@dataclass(frozen=True)
class Context:
    """What a transform may know of the rows beyond their pixels.

    Attributes:
        indices: Place of each sample in its data set, int64 ``(B,)``; negative where it has none (samples of a memory).
        epoch: Epoch since the start of the task, from 0.
        seed: Seed of the run, for choices that a sample keeps over the epochs.
    """

    indices: Tensor
    epoch: int
    seed: int = 0


class Transform(ABC):
    """A function of a batch of images; a subclass writes ``apply``."""

    needs_pixels: ClassVar[bool] = False  # True: reads values as colours in [0, 1], so must stand before Normalize

    def __call__(self, images: Tensor, draw: Draw, context: Context | None = None) -> Tensor:
        """Transform a batch.

        Args:
            images: uint8 or floating point ``(B, C, H, W)``.
            draw: Random numbers of these B rows.
            context: Indices and epoch of these rows; few transforms need it.
        """
        valid = images.ndim == 4 and (images.dtype == torch.uint8 or images.is_floating_point())
        _require(self, valid, f"{images.dtype} {tuple(images.shape)}; give (B, C, H, W), uint8 or floating point")
        rows = draw.stop - draw.start
        _require(self, len(images) == rows, f"{len(images)} images, {rows} rows to draw; give the draw of these images")
        return self.apply(images, draw, context)

    @abstractmethod
    def apply(self, images: Tensor, draw: Draw, context: Context | None) -> Tensor:
        """The transform itself, on checked images."""


class Compose(Transform):
    """Transforms one after another, each with random numbers of its own: the draw forked with its place in the list."""

    def __init__(self, transforms: list[Transform]) -> None:
        self.transforms = list(transforms)
        normalized = False
        for transform in self.transforms:
            name = type(transform).__name__
            late = normalized and transform.needs_pixels
            _require(self, not late, f"{name} after Normalize, where pixels have left [0, 1]; move it before")
            normalized |= isinstance(transform, Normalize)

    def apply(self, images: Tensor, draw: Draw, context: Context | None) -> Tensor:
        for place, transform in enumerate(self.transforms):
            images = transform(images, draw.fork(place), context)
        return images


def described(value: Any) -> str:
    """A text that is the same for transforms that do the same: their types and what they were made with."""
    if isinstance(value, Transform):
        options = {name: part for name, part in vars(value).items() if not name.startswith("_")}
        return f"{type(value).__module__}.{type(value).__qualname__}{described(options)}"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {described(part)}' for key, part in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(described, value))}]"
    return repr(value)


class ToFloat(Transform):
    """uint8 to float32 in [0, 1]; floating point images stay as they are."""

    def apply(self, images: Tensor, draw: Draw, context: Context | None) -> Tensor:
        return images if images.is_floating_point() else images.float().div_(255)


class Normalize(Transform):
    """``(x - mean) / std`` per channel, of pixels in [0, 1]; uint8 images are divided by 255 on the way, to float32.

    Args:
        mean, std: One number per channel, or one for all, in the unit of pixels in [0, 1]; std above 0.
    """

    needs_pixels = True

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        paired = len(mean) == len(std) > 0
        _require(self, paired, f"{len(mean)} means, {len(std)} stds; give one of each per channel, or one for all")
        allowed = min(std) > 0 and max(*mean, *std) <= 1
        message = "std above 0 and both up to 1 are allowed, as pixels are in [0, 1]; divide by 255 what is of 0 .. 255"
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
        return images.float().mul_(scale).add_(shift)  # a product of two types is several times as slow


class RandomCrop(Transform):
    """Each image shifted by up to ``padding`` pixels on either axis, uniformly; the size stays.

    Args:
        padding: Pixels added on each side before the crop, at least 1.
        mode: What lies outside: black, or the image mirrored at its border pixels.
    """

    def __init__(self, padding: int = 4, mode: Border = "zeros") -> None:
        allowed = padding >= 1 and mode in ("zeros", "reflect")
        _require(self, allowed, f"padding {padding}, mode {mode}; padding from 1, zeros or reflect are allowed")
        self.padding, self.mode = padding, mode

    def apply(self, images: Tensor, draw: Draw, context: Context | None) -> Tensor:
        height, width = images.shape[-2:]
        fits = self.mode == "zeros" or self.padding < min(height, width)
        _require(self, fits, f"padding {self.padding}, images {height} x {width}; reflect needs less padding than that")
        return shift_images(images, draw.randint(2 * self.padding + 1, 2) - self.padding, self.mode)


class RandomHorizontalFlip(Transform):
    """Each image mirrored left to right with probability ``p``."""

    def __init__(self, p: float = 0.5) -> None:
        _require(self, 0 <= p <= 1, f"p {p}; a probability within [0, 1] is allowed")
        self.p = p

    def apply(self, images: Tensor, draw: Draw, context: Context | None) -> Tensor:
        return _choose(draw.rand() < self.p, images.flip(-1), images)


class RandomVerticalFlip(Transform):
    """Each image mirrored top to bottom with probability ``p``."""

    def __init__(self, p: float = 0.5) -> None:
        _require(self, 0 <= p <= 1, f"p {p}; a probability within [0, 1] is allowed")
        self.p = p

    def apply(self, images: Tensor, draw: Draw, context: Context | None) -> Tensor:
        return _choose(draw.rand() < self.p, images.flip(-2), images)


class AlternatingFlip(Transform):
    """Each image mirrored or not by a fair coin in the first epoch, and from then on in every second epoch.

    Image i is mirrored in epoch e exactly if coin(i) + e is odd: any two consecutive epochs show both views of an image
    ("94% on CIFAR-10 in 3.29 Seconds on a Single GPU", Jordan 2024, arXiv:2404.00498). The coin is a hash of seed and
    index. Samples without an index (from a memory) are mirrored at random, at each draw anew.
    """

    def apply(self, images: Tensor, draw: Draw, context: Context | None) -> Tensor:
        if context is None:
            raise ValueError("AlternatingFlip: no context; give Context(indices, epoch), or use RandomHorizontalFlip")
        indices = context.indices.to(images.device, non_blocking=True)
        fresh = (draw.rand() < 0.5).to(images.device, non_blocking=True)
        mirrored = torch.where(indices < 0, fresh, _coin(indices, context.seed) ^ (context.epoch % 2 == 1))
        return _choose(mirrored, images.flip(-1), images)


class RandomResizedCrop(Transform):
    """A box of random area and shape, resized (Szegedy et al. 2015, arXiv:1409.4842).

    The distribution of boxes is torchvision's: of ten candidates the first that fits, else a centre crop.

    Args:
        size: Side, or height and width, of the result in pixels.
        scale: Bounds of the area of the box, as a share of the image's, in (0, 1].
        ratio: Bounds of width / height of the box, drawn uniformly in the logarithm.
        antialias: Average over the pixels that fall into one where the box is larger than the result.
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        antialias: bool = True,
    ) -> None:
        self.size = (size, size) if isinstance(size, int) else (size[0], size[1])
        allowed = min(self.size) >= 1 and 0 < scale[0] <= scale[1] <= 1 and 0 < ratio[0] <= ratio[1]
        message = "size from 1, scale rising within (0, 1] and ratio rising above 0 are allowed"
        _require(self, allowed, f"size {size}, scale {scale}, ratio {ratio}; {message}")
        self.scale, self.ratio, self.antialias = scale, ratio, antialias

    def apply(self, images: Tensor, draw: Draw, context: Context | None) -> Tensor:
        height, width = images.shape[-2:]
        return resized_crop(images, self.boxes(draw, height, width), self.size, self.antialias)

    def boxes(self, draw: Draw, height: int, width: int) -> Tensor:
        """Top, left, height and width of each row's box in pixels, int64 ``(B, 4)``."""
        low, high = (math.log(bound) for bound in self.ratio)
        chance = draw.rand(10, 4)  # (B, candidate, number)
        area = (self.scale[0] + (self.scale[1] - self.scale[0]) * chance[..., 0]) * (height * width)
        ratio = (low + (high - low) * chance[..., 1]).exp()
        tall, wide = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
        top, left = (chance[..., 2] * (height - tall + 1)).floor(), (chance[..., 3] * (width - wide + 1)).floor()
        valid = (tall >= 1) & (tall <= height) & (wide >= 1) & (wide <= width)
        # The fallback: as much as the bounds of the ratio allow, from the centre.
        nearest = min(max(width / height, self.ratio[0]), self.ratio[1])
        tall_, wide_ = min(height, round(width / nearest)), min(width, round(height * nearest))
        centre = torch.tensor([(height - tall_) // 2, (width - wide_) // 2, tall_, wide_])
        first = valid.int().argmax(dim=1)[:, None, None].expand(-1, 1, 4)  # argmax: the first of equals
        box = torch.stack([top, left, tall, wide], dim=-1).gather(1, first).squeeze(1)
        return torch.where(valid.any(dim=1, keepdim=True), box.long(), centre)


class RandomRotation(Transform):
    """Each image turned about its centre, counter-clockwise; what comes from outside is black.

    Args:
        degrees: Bounds of the angle, drawn uniformly; one number d stands for (-d, d).
        interpolation: Between pixels; nearest keeps the colours.
    """

    def __init__(self, degrees: float | tuple[float, float], interpolation: Interpolation = "nearest") -> None:
        low, high = (degrees[0], degrees[1]) if isinstance(degrees, Sequence) else (-degrees, degrees)
        allowed = low <= high and interpolation in ("nearest", "bilinear")
        message = "a number from 0 or a rising pair, and nearest or bilinear are allowed"
        _require(self, allowed, f"degrees {degrees}, interpolation {interpolation}; {message}")
        self.low, self.high, self.interpolation = low, high, interpolation

    def apply(self, images: Tensor, draw: Draw, context: Context | None) -> Tensor:
        angle = self.low + (self.high - self.low) * draw.rand()
        return _like(_rotate(_float(images), _rows(angle, images), self.interpolation), images)


class Cutout(Transform):
    """A black square at a random place, cut off at the border (DeVries & Taylor 2017, arXiv:1708.04552).

    The centre is uniform over the pixels, as in the paper. The square is 0: the mean colour after ``Normalize``.

    Args:
        size: Side of the square in pixels, at least 1.
    """

    def __init__(self, size: int) -> None:
        _require(self, size >= 1, f"size {size}; at least 1 is allowed, leave Cutout out for none")
        self.size = size

    def apply(self, images: Tensor, draw: Draw, context: Context | None) -> Tensor:
        inside = []
        for axis, length in enumerate(images.shape[-2:]):
            start = _rows(draw.fork(axis).randint(length) - self.size // 2, images)
            offset = torch.arange(length, device=images.device) - start  # (B, 1, 1, length)
            inside.append((offset >= 0) & (offset < self.size))
        return images * ~(inside[0].mT & inside[1])  # several times as fast as masked_fill on a CPU


class ColorJitter(Transform):
    """Brightness, contrast, saturation and hue changed by random amounts, in an order drawn for each image.

    Args:
        brightness, contrast, saturation: Bounds of the factor; one number v stands for (max(0, 1 - v), 1 + v).
        hue: Bounds of the shift as a share of the colour circle, within [-0.5, 0.5]; one number v stands for (-v, v).
        p: Probability with which an image is changed at all.
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
        _require(self, 0 <= p <= 1, f"p {p}; a probability within [0, 1] is allowed")
        self.p = p
        self.operations: list[Operation] = []
        bounds = []
        given = zip((brightness, contrast, saturation, hue), _JITTER.items(), strict=True)
        for value, (name, (operation, neutral, least, most)) in given:
            if isinstance(value, Sequence):
                low, high = value[0], value[1]
            else:
                low, high = neutral - value if name == "hue" else max(neutral - value, least), neutral + value
            message = f"a number from 0 or a rising pair within [{least}, {most}] is allowed"
            _require(self, least <= low <= high <= most, f"{name} {value}; {message}")
            if (low, high) != (neutral, neutral):
                self.operations.append(operation)
                bounds.append((low, high))
        self.bounds = torch.tensor(bounds).reshape(-1, 2)

    def apply(self, images: Tensor, draw: Draw, context: Context | None) -> Tensor:
        low, high = self.bounds.unbind(dim=1)
        amounts = low + (high - low) * draw.fork(0).rand(len(low))  # (B, operations)
        order = draw.fork(1).rand(len(low)).argsort(dim=1)
        chosen = torch.where(draw.fork(2).rand(1) < self.p, order, -1)
        result = _float(images)
        for place in range(len(low)):
            amount = amounts.gather(1, order[:, place : place + 1]).squeeze(1)
            result = _each(result, chosen[:, place], self.operations, amount)
        return _like(result, images)


class RandomGrayscale(Transform):
    """Each image made grey with probability ``p``; the number of channels stays."""

    needs_pixels = True

    def __init__(self, p: float = 0.1) -> None:
        _require(self, 0 <= p <= 1, f"p {p}; a probability within [0, 1] is allowed")
        self.p = p

    def apply(self, images: Tensor, draw: Draw, context: Context | None) -> Tensor:
        grey = _like(_grey(_float(images)), images)
        return _choose(draw.rand() < self.p, grey.expand_as(images), images)


class RandAugment(Transform):
    """Each image changed by ``num_ops`` operations drawn for it (Cubuk et al. 2020, arXiv:1909.13719).

    The fourteen operations, their ranges and signs are torchvision's, none is left out; geometry takes the nearest
    pixel and fills with black. Of bytes each operation gives bytes. A batch costs some hundred small kernels, whatever
    its size.

    Args:
        num_ops: Operations per image, drawn with replacement.
        magnitude: Strength, ``0 .. num_magnitude_bins - 1``.
        num_magnitude_bins: Number of strengths.
    """

    needs_pixels = True

    def __init__(self, num_ops: int = 2, magnitude: int = 9, num_magnitude_bins: int = 31) -> None:
        allowed = num_ops >= 0 and num_magnitude_bins >= 2 and 0 <= magnitude < num_magnitude_bins
        message = "num_ops from 0, at least 2 bins and a magnitude below their number are allowed"
        _require(self, allowed, f"num_ops {num_ops}, magnitude {magnitude} of {num_magnitude_bins} bins; {message}")
        self.num_ops, self.strength = num_ops, magnitude / (num_magnitude_bins - 1)

    def apply(self, images: Tensor, draw: Draw, context: Context | None) -> Tensor:
        operations = [operation for operation, _, _ in OPERATIONS.values()]
        most = torch.tensor([most for _, most, _ in OPERATIONS.values()]) * self.strength
        signed = torch.tensor([signed for _, _, signed in OPERATIONS.values()])
        chosen = draw.fork(0).randint(len(operations), self.num_ops)  # (B, num_ops)
        negative = signed[chosen] & (draw.fork(1).rand(self.num_ops) < 0.5)
        amounts = torch.where(negative, -most[chosen], most[chosen])
        result = images if images.dtype == torch.uint8 else _float(images)  # bytes are moved in a quarter of the time
        for place in range(self.num_ops):
            result = _each(result, chosen[:, place], operations, amounts[:, place])
        return result.to(images.dtype)


def permute_pixels(images: Tensor, seed: int) -> Tensor:
    """Images ``(..., H, W)`` with their pixels rearranged, in the same way for all images and channels of a seed."""
    generator = torch.Generator().manual_seed(mix(seed))
    order = torch.randperm(images.shape[-2] * images.shape[-1], generator=generator).to(images.device)
    return images.flatten(-2).index_select(-1, order).view(images.shape)


def rotate_images(images: Tensor, degrees: float, interpolation: Interpolation = "bilinear") -> Tensor:
    """Images ``(..., H, W)``, uint8 or in [0, 1], turned counter-clockwise about their centre, black outside."""
    flat = _float(images).reshape(1, -1, *images.shape[-2:])  # one image of many channels: they share one grid
    angle = torch.full((1, 1, 1, 1), float(degrees), dtype=flat.dtype, device=flat.device)
    return _like(_rotate(flat, angle, interpolation).view(images.shape), images)


def shift_images(images: Tensor, offsets: Tensor, mode: Border = "zeros") -> Tensor:
    """Windows of the images' own size, ``offsets`` (down, right), int64 ``(B, 2)``, away from them.

    Args:
        images: ``(B, C, H, W)`` of any type.
        offsets: In pixels; below the side of the images where the mode is reflect.
        mode: Pixels outside are zeros, or mirrored at the border pixel (reflect).
    """
    if not len(images):
        return images.clone()
    count, channels, height, width = images.shape
    images, pad = images.contiguous(), int(offsets.abs().max())
    if mode == "zeros":
        wide = F.pad(images, (pad, pad, pad, pad))
    else:
        y, x = (_mirrored(torch.arange(-pad, side + pad, device=images.device), side) for side in (height, width))
        wide = images.index_select(2, y).index_select(3, x)
    # A window is `height` runs of `width` neighbours in memory, which are taken whole; runs may overlap.
    tall, long = height + 2 * pad, width + 2 * pad
    offsets = (offsets + pad).to(images.device, non_blocking=True)
    line = offsets[:, :1] + torch.arange(height, device=images.device)  # (B, height)
    first = torch.arange(count * channels, device=images.device).view(count, channels, 1) * tall
    start = ((first + line[:, None]) * long + offsets[:, 1:, None]).flatten()
    runs = wide.as_strided((wide.numel() - width + 1, width), (1, 1))
    return runs.index_select(0, start).view(images.shape)


def _mirrored(places: Tensor, side: int) -> Tensor:
    """Places beyond an axis of ``side`` pixels, mirrored at its border pixels."""
    return (side - 1) - ((side - 1) - places.abs()).abs()


def resized_crop(images: Tensor, boxes: Tensor, size: tuple[int, int], antialias: bool = True) -> Tensor:
    """The box of each image, resized with linear weights.

    A resize is a matrix per axis, so a batch of them is two batched products, with antialiasing at no extra cost.

    Args:
        images: ``(B, C, H, W)``.
        boxes: Top, left, height, width in pixels, ``(B, 4)``.
        size: Height and width of the result.
        antialias: See ``RandomResizedCrop``.
    """
    values, matrices = _float(images), []
    boxes = boxes.to(images.device, values.dtype, non_blocking=True)[..., None, None]
    for axis, (length, result) in enumerate(zip(images.shape[-2:], size, strict=True)):
        start, scale = boxes[:, axis], boxes[:, axis + 2] / result  # (B, 1, 1)
        centre = start + (torch.arange(result, device=images.device)[:, None] + 0.5) * scale  # (B, result, 1)
        pixel = torch.arange(length, device=images.device) + 0.5
        inside = (pixel > start) & (pixel < start + boxes[:, axis + 2])
        weight = (1 - (pixel - centre).abs() / (scale.clamp(min=1) if antialias else 1)).clamp(min=0) * inside
        matrices.append((weight / weight.sum(dim=2, keepdim=True))[:, None])  # (B, 1, result, length), rows sum to 1
    with torch.autocast(images.device.type, enabled=False):  # products in half precision would lose grey levels
        return _like(matrices[0] @ values @ matrices[1].mT, images)


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).clamp_(0, 1)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, _grey(images).mean(dim=(1, 2, 3), keepdim=True), factor)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, _grey(images), factor)


def _hue(images: Tensor, shift: Tensor) -> Tensor:
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(dim=1)
    value, chroma = images.amax(dim=1), images.amax(dim=1) - images.amin(dim=1)
    safe = chroma.clamp(min=1e-12)
    hue = torch.where(value == red, (green - blue) / safe, (red - green) / safe + 4)
    hue = torch.where((value == green) & (value != red), (blue - red) / safe + 2, hue)  # in sixths of the circle
    sixth = torch.tensor([5.0, 3.0, 1.0], dtype=images.dtype, device=images.device)[:, None, None]
    k = (sixth + hue[:, None] + 6 * shift) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def _sharpness(images: Tensor, factor: Tensor) -> Tensor:
    if min(images.shape[-2:]) < 3:
        return images
    smooth = images.clone()  # border pixels stay
    lines = images[..., :-2, :] + images[..., 1:-1, :] + images[..., 2:, :]  # a pooling of small images is slow
    smooth[..., 1:-1, 1:-1] = (lines[..., :-2] + lines[..., 1:-1] + lines[..., 2:] + 4 * images[..., 1:-1, 1:-1]) / 13
    return _blend(images, smooth, factor)


def _posterize(images: Tensor, dropped: Tensor) -> Tensor:
    step = 2 ** dropped.round()  # the lowest bits become 0
    return (_bytes(images) / step).floor() * step / 255


def _autocontrast(images: Tensor, _: Tensor) -> Tensor:
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp(min=1e-12), images)


def _equalize(images: Tensor, _: Tensor) -> Tensor:
    level = _bytes(images).flatten(2).long()  # (B, C, pixels)
    count = torch.zeros(*level.shape[:2], 256, dtype=torch.int64, device=images.device)
    count.scatter_add_(2, level, torch.ones_like(level))
    step = (level.shape[2] - count.gather(2, level.amax(dim=2, keepdim=True))) // 255  # PIL: the top level is left out
    table = (count.cumsum(dim=2) - count + step // 2) // step.clamp(min=1)
    table = torch.where(step > 0, table, torch.arange(256, device=images.device)).clamp(max=255)
    return table.gather(2, level).view(images.shape).to(images.dtype) / 255


def _affine(images: Tensor, x_row: Row, y_row: Row, mode: Interpolation = "nearest") -> Tensor:
    """Result (x, y) is the images' (x_row . (x, y, 1), y_row . (x, y, 1)), pixels from the centre; black outside."""
    height, width = images.shape[-2:]
    y = torch.arange(height, dtype=images.dtype, device=images.device)[:, None] - (height - 1) / 2
    x = torch.arange(width, dtype=images.dtype, device=images.device) - (width - 1) / 2
    column = (x_row[0] * x + x_row[1] * y + x_row[2]) * (2 / width)  # 1 is the border, hence align_corners=False
    row = (y_row[0] * x + y_row[1] * y + y_row[2]) * (2 / height)
    grid = torch.stack([column + 0 * row, row + 0 * column], dim=-1)[:, 0]  # (B, H, W, 2)
    return F.grid_sample(images, grid, mode, padding_mode="zeros", align_corners=False)


def _rotate(images: Tensor, degrees: Tensor, mode: Interpolation = "nearest") -> Tensor:
    cos, sin = degrees.deg2rad().cos(), degrees.deg2rad().sin()
    return _affine(images, (cos, -sin, 0), (sin, cos, 0), mode)


# Name: operation, its amount at full strength, whether its sign is random (as in torchvision). A shear keeps the top
# left corner in its place.
OPERATIONS: dict[str, tuple[Operation, float, bool]] = {
    "Identity": (lambda x, _: x, 0.0, False),
    "ShearX": (lambda x, slope: _affine(x, (1, slope, slope * x.shape[2] / 2), (0, 1, 0)), 0.3, True),
    "ShearY": (lambda x, slope: _affine(x, (1, 0, 0), (slope, 1, slope * x.shape[3] / 2)), 0.3, True),
    "TranslateX": (lambda x, share: _affine(x, (1, 0, -(share * x.shape[3]).trunc()), (0, 1, 0)), 150 / 331, True),
    "TranslateY": (lambda x, share: _affine(x, (1, 0, 0), (0, 1, -(share * x.shape[2]).trunc())), 150 / 331, True),
    "Rotate": (_rotate, 30.0, True),
    "Brightness": (lambda x, amount: _brightness(x, 1 + amount), 0.9, True),
    "Color": (lambda x, amount: _saturation(x, 1 + amount), 0.9, True),
    "Contrast": (lambda x, amount: _contrast(x, 1 + amount), 0.9, True),
    "Sharpness": (lambda x, amount: _sharpness(x, 1 + amount), 0.9, True),
    "Posterize": (_posterize, 4.0, False),
    "Solarize": (lambda x, amount: torch.where(x >= 1 - amount, 1 - x, x), 1.0, False),
    "AutoContrast": (_autocontrast, 0.0, False),
    "Equalize": (_equalize, 0.0, False),
}
# Name: operation, the amount that changes nothing, the least and the greatest allowed.
_JITTER: dict[str, tuple[Operation, float, float, float]] = {
    "brightness": (_brightness, 1.0, 0.0, math.inf),
    "contrast": (_contrast, 1.0, 0.0, math.inf),
    "saturation": (_saturation, 1.0, 0.0, math.inf),
    "hue": (_hue, 0.0, -0.5, 0.5),
}


def _each(images: Tensor, chosen: Tensor, operations: Sequence[Operation], amounts: Tensor) -> Tensor:
    """Row i changed by ``operations[chosen[i]]`` with ``amounts[i]``, or left alone where ``chosen[i]`` is negative.

    ``chosen`` and ``amounts`` are on the CPU, so that counting the rows of an operation does not wait for the GPU.
    """
    order = chosen.argsort()
    counts = torch.bincount(chosen + 1, minlength=len(operations) + 1).tolist()  # rows that are left alone come first
    place = order.to(images.device, non_blocking=True)
    parts = torch.split(images.index_select(0, place), counts)
    dtype = images.dtype if images.is_floating_point() else torch.float32
    sizes = torch.split(_rows(amounts[order], images).to(dtype), counts)
    changed = [
        _like(operation(_float(part), size), part)
        for operation, part, size in zip(operations, parts[1:], sizes[1:], strict=True)
        if len(part)
    ]
    return torch.cat([parts[0], *changed]).index_select(0, place.argsort())


def _choose(rows: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Row i of ``first`` where ``rows[i]``, else of ``second``; ``torch.where`` is several times as slow on a CPU."""
    rows = rows.to(first.device, non_blocking=True)
    count = len(rows)
    return torch.cat([first, second]).index_select(
        0, torch.where(rows, 0, count) + torch.arange(count, device=first.device)
    )


def _coin(indices: Tensor, seed: int) -> Tensor:
    """A fair coin per (seed, index), bool: the top bit of splitmix64; int64 arithmetic wraps around."""
    bits = indices * (0x9E3779B97F4A7C15 - (1 << 64)) + _int64(mix(seed))
    bits = (bits ^ ((bits >> 30) & ((1 << 34) - 1))) * _int64(0xBF58476D1CE4E5B9)
    return (bits ^ ((bits >> 27) & ((1 << 37) - 1))) * _int64(0x94D049BB133111EB) < 0


def _int64(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def _rows(values: Tensor, images: Tensor) -> Tensor:
    """``(B,)`` on the CPU to ``(B, 1, 1, 1)`` beside the images."""
    return values.to(images.device, non_blocking=True).view(-1, 1, 1, 1)


def _float(images: Tensor) -> Tensor:
    """To [0, 1] in at least float32."""
    if images.is_floating_point():
        return images if images.dtype == torch.float64 else images.float()
    return images.float().div_(255)


def _like(result: Tensor, images: Tensor) -> Tensor:
    """Back to the type of ``images``."""
    if images.dtype == torch.uint8:
        return _bytes(result).to(torch.int16).to(torch.uint8)  # a CPU has no fast way from floating point to uint8
    return result.to(images.dtype)


def _bytes(images: Tensor) -> Tensor:
    """Whole grey levels 0 .. 255, still floating point."""
    return (images * 255).round_().clamp_(0, 255)


def _blend(first: Tensor, second: Tensor, factor: Tensor) -> Tensor:
    """``second`` at factor 0, ``first`` at 1, beyond it above."""
    return (first - second).mul_(factor).add_(second).clamp_(0, 1)


def _grey(images: Tensor) -> Tensor:
    """Luma (ITU-R BT.601) of images with one or three channels, ``(B, 1, H, W)``."""
    if images.shape[1] == 1:
        return images
    if images.shape[1] != 3:
        raise ValueError(f"colour transforms: images of {images.shape[1]} channels; 1 or 3 are allowed, leave them out")
    red, green, blue = images.unbind(dim=1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)[:, None]


def _require(owner: Transform, condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"{type(owner).__name__}: {message}")
