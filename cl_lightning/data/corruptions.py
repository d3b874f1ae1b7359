"""The 15 corruptions of CIFAR-10-C (Hendrycks & Dietterich, ICLR 2019, arXiv:1903.12261), for images of about 32 x 32.

Each corruption has severities 1 to 5 with the constants of the published files; images of another size use the same
constants. The random numbers of an image are a hash of (seed, corruption, severity, index of the image): the split of
images into batches has no effect, and no generator has a state. All operations are batched, except JPEG encoding.

Each corruption is a function of float64 images ``(n, C, H, W)`` in [0, 1], a `Chance` with their random numbers, and
the constants of a severity. It returns float64 images of the same shape; values outside [0, 1] are clipped later.

Results differ from the published files: the random numbers are different, there is no fixed-point arithmetic, and
``frost`` needs photographs of frost that are not part of this package: it uses a **synthetic** texture, so its error
rates are not comparable with published ones. With the same random numbers and the same texture, images of the published
code (with ImageMagick 6.9 for ``motion_blur``) differ by at most 1 grey level of 255, and in ``snow`` by at most 2,
where the code rounds its layers. ``glass_blur`` follows the published code: a pixel is overwritten by its neighbour,
and the neighbour keeps its value.
"""

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cl_lightning.hashing import KeyArray, hash64

Border = Literal["nearest", "reflect", "reflect101"]
"""Padding: ``d c b a | a b c d | d c b a`` is reflect, ``d c b | a b c d | c b a`` reflect101."""
SEVERITIES = (1, 2, 3, 4, 5)
_CHUNK = 512  # number of images processed at a time


class Chance:
    """Random numbers per image, a function of the image's index. Each call returns new numbers.

    Args:
        key: Key of all random numbers: a hash of seed, corruption and severity.
        indices: Index of each image in its data set, int64 ``(n,)``.
    """

    def __init__(self, key: KeyArray, indices: np.ndarray) -> None:
        self._keys = hash64(key, indices.astype(np.int64))[:, None]
        self._calls = 0

    def _bits(self, shape: tuple[int, ...]) -> KeyArray:
        self._calls += 1
        places = np.arange(math.prod(shape), dtype=np.uint64)[None]
        return hash64(self._keys, self._calls, places).reshape(len(self._keys), *shape)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform numbers in [low, high), float64 ``(n, *shape)``."""
        numbers = (self._bits(shape) >> np.uint64(11)) * 2.0**-53
        return torch.from_numpy(low + (high - low) * numbers)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, float64 ``(n, *shape)`` (Box & Muller 1958)."""
        bits = self._bits(shape)
        first, second = ((part.astype(np.float64) + 0.5) * 2.0**-32 for part in (bits >> np.uint64(32), bits & _LOW))
        return torch.from_numpy(np.sqrt(-2 * np.log(first)) * np.cos(2 * np.pi * second))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Uniform integers in low .. high - 1, int64 ``(n, *shape)``."""
        return self.uniform(*shape, low=low, high=high).floor().long()


_LOW = np.uint64(2**32 - 1)


def _fold(places: Tensor, size: int, border: Border) -> Tensor:
    """Map positions beyond the border to positions in 0 .. size - 1."""
    if border == "nearest" or size == 1:
        return places.clamp(0, size - 1)
    period, last = (2 * size - 2, 0) if border == "reflect101" else (2 * size, 1)
    places = places % period
    return torch.minimum(places, period - last - places)


def _pad(images: Tensor, margin: int, border: Border) -> Tensor:
    height, width = images.shape[-2:]
    rows, columns = (_fold(torch.arange(-margin, size + margin), size, border) for size in (height, width))
    return images[..., rows, :][..., columns]


def correlate(images: Tensor, kernel: Tensor, border: Border) -> Tensor:
    """Correlation of each channel of images ``(..., H, W)`` with a square kernel of odd size."""
    height, width = images.shape[-2:]
    padded, total = _pad(images, len(kernel) // 2, border), torch.zeros_like(images)
    for row, column in kernel.nonzero().tolist():
        total += kernel[row, column] * padded[..., row : row + height, column : column + width]
    return total


def gaussian_blur(images: Tensor, sigma: float, *, truncate: float, border: Border) -> Tensor:
    """Gaussian blur of images ``(..., H, W)``; the kernel ends at ``truncate * sigma`` pixels."""
    radius = int(truncate * sigma + 0.5)
    if radius == 0:
        return images
    weights = torch.exp(-torch.arange(-radius, radius + 1).double().square() / (2 * sigma**2))
    weights = weights / weights.sum()
    for axis in (-2, -1):
        size = images.shape[axis]
        places = _fold(torch.arange(-radius, size + radius), size, border)
        padded = images.index_select(axis, places)
        images = sum((w * padded.narrow(axis, i, size) for i, w in enumerate(weights)), torch.zeros_like(images))
    return images


def motion_blur(images: Tensor, radius: int, sigma: float, angle: Tensor) -> Tensor:
    """Motion blur along a line, ``sum_i k_i x(p + round(i * direction))``, i = 0 .. 2 radius, k half-Gaussian weights.

    Args:
        images: ``(n, C, H, W)``.
        radius: In pixels.
        sigma: Standard deviation of the weights, in pixels.
        angle: Angle of each line in degrees, ``(n,)``.

    Returns:
        ``(n, C, H, W)``.
    """
    n, _, height, width = images.shape
    steps = torch.arange(2 * radius + 1).double()
    weights = torch.exp(-steps.square() / (2 * sigma**2))
    weights = weights / weights.sum()
    radians = torch.deg2rad(angle)
    down, right = ((i * steps - 0.5).ceil().long() for i in (radians.sin()[:, None], radians.cos()[:, None]))
    which, total = torch.arange(n)[:, None, None], torch.zeros_like(images)
    for i, weight in enumerate(weights):
        rows = (torch.arange(height) + down[:, i, None]).clamp(0, height - 1)[:, :, None]
        columns = (torch.arange(width) + right[:, i, None]).clamp(0, width - 1)[:, None, :]
        total += weight * images.permute(0, 2, 3, 1)[which, rows, columns].permute(0, 3, 1, 2)
    return total


def clipped_zoom(images: Tensor, factor: float) -> Tensor:
    """Centre of images ``(n, C, H, W)``, enlarged by ``factor`` >= 1 to the same size with bilinear interpolation."""
    height, width = images.shape[-2:]
    inner = [math.ceil(size / factor) for size in (height, width)]
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    part = images[..., top : top + inner[0], left : left + inner[1]]
    outer = [max(round(size * factor), 1) for size in inner]
    large = torch.nn.functional.interpolate(part, outer, mode="bilinear", align_corners=True)
    top, left = (outer[0] - height) // 2, (outer[1] - width) // 2
    return large[..., top : top + height, left : left + width]


def sample(images: Tensor, rows: Tensor, columns: Tensor, border: Border) -> Tensor:
    """Bilinear interpolation of images ``(n, C, H, W)`` at positions ``(n, H, W)``, in pixels."""
    _, channels, height, width = images.shape
    flat, total = images.flatten(2), torch.zeros_like(images)
    top, left = rows.floor(), columns.floor()
    for down in (0, 1):
        for right in (0, 1):
            weight = (1 - (rows - top - down).abs()) * (1 - (columns - left - right).abs())
            row, column = _fold(top.long() + down, height, border), _fold(left.long() + right, width, border)
            places = (row * width + column).flatten(1)[:, None].expand(-1, channels, -1)
            total += weight[:, None] * flat.gather(2, places).view_as(images)
    return total


def plasma(chance: Chance, n: int, side: int, decay: float) -> Tensor:
    """Plasma fractals by the diamond-square algorithm, float64 ``(n, side, side)``, each scaled to [0, 1].

    Args:
        chance: Random numbers of the n images.
        n: Number of maps.
        side: A power of two; the map is periodic.
        decay: Divisor of the noise amplitude from one scale to the next; larger values give smoother maps.
    """
    maps, step, wibble = torch.zeros(n, side, side, dtype=torch.float64), side, 100.0

    def mean_of(total: Tensor) -> Tensor:
        return total / 4 + wibble * chance.uniform(*total.shape[1:], low=-wibble, high=wibble)

    while step >= 2:
        half = step // 2
        corners = maps[:, ::step, ::step]
        pairs = corners + corners.roll(-1, 1)
        maps[:, half::step, half::step] = mean_of(pairs + pairs.roll(-1, 2))
        centres = maps[:, half::step, half::step]
        maps[:, ::step, half::step] = mean_of(centres + centres.roll(1, 1) + corners + corners.roll(-1, 2))
        maps[:, half::step, ::step] = mean_of(centres + centres.roll(1, 2) + corners + corners.roll(-1, 1))
        step, wibble = half, wibble / decay
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low)


def _plasma_for(images: Tensor, chance: Chance, decay: float) -> Tensor:
    n, _, height, width = images.shape
    side = 1 << max(1, (max(height, width) - 1).bit_length())
    return plasma(chance, n, side, decay)[:, None, :height, :width]


def _grey(images: Tensor) -> Tensor:
    if images.shape[1] < 3:
        return images[:, :1]
    return (images[:, :3] * torch.tensor([0.299, 0.587, 0.114], dtype=images.dtype)[:, None, None]).sum(1, keepdim=True)


def gaussian_noise(images: Tensor, chance: Chance, sigma: float) -> Tensor:
    """Additive Gaussian noise with standard deviation ``sigma``."""
    return images + sigma * chance.normal(*images.shape[1:])


def shot_noise(images: Tensor, chance: Chance, rate: float) -> Tensor:
    """Poisson noise, Poisson(x * rate) / rate."""
    levels, uniform = (images * 255).round().to(torch.uint8), chance.uniform(*images.shape[1:])
    order = levels.flatten().argsort(stable=True)
    groups = torch.split(uniform.flatten()[order], levels.flatten().long().bincount(minlength=256).tolist())
    counts = torch.empty_like(uniform).flatten()
    places = torch.split(order, [len(group) for group in groups])
    for level, (group, place) in enumerate(zip(groups, places, strict=True)):
        counts[place] = torch.searchsorted(_poisson(level / 255 * rate), group, right=True).double()
    return counts.view_as(images) / rate


def _poisson(rate: float) -> Tensor:
    """Cumulative distribution P(count <= k), k = 0, 1, ..., float64."""
    counts = torch.arange(int(rate + 12 * math.sqrt(rate) + 20)).double()
    logs = counts * math.log(rate) - rate - torch.lgamma(counts + 1) if rate > 0 else -1e9 * counts
    return logs.exp().cumsum(0)


def impulse_noise(images: Tensor, chance: Chance, share: float) -> Tensor:
    """Salt-and-pepper noise: a ``share`` of the values is set to 0 or 1, with equal probability."""
    uniform = chance.uniform(*images.shape[1:])
    return torch.where(uniform < share / 2, 1.0, torch.where(uniform < share, 0.0, images))


def defocus_blur(images: Tensor, chance: Chance, radius: float, sigma: float) -> Tensor:
    """Correlation with a disk of ``radius`` pixels, smoothed by a 3 x 3 Gaussian."""
    places = torch.arange(-8, 9).double()
    disk = (places.square()[:, None] + places.square() <= radius**2).double()
    weights = torch.exp(-torch.arange(-1, 2).double().square() / (2 * sigma**2))
    kernel = correlate(disk / disk.sum(), (weights[:, None] * weights) / weights.sum().square(), "reflect101")
    return correlate(images, kernel, "reflect101")


def glass_blur(images: Tensor, chance: Chance, sigma: float, delta: int, iterations: int) -> Tensor:
    """Gaussian blur, local pixel exchange, Gaussian blur.

    Pixels are processed sequentially: a pixel that was overwritten is read with its new value.
    """
    height, width = images.shape[-2:]
    blurred = gaussian_blur(images, sigma, truncate=4.0, border="nearest")
    pixels, which = _to_bytes(blurred).permute(2, 3, 0, 1).contiguous(), torch.arange(len(images))
    for _ in range(iterations):
        moves = chance.integers(-delta, delta, 2, height, width)
        for h in range(height - delta, delta, -1):
            for w in range(width - delta, delta, -1):
                pixels[h, w] = pixels[h + moves[:, 1, h, w], w + moves[:, 0, h, w], which]
    moved = pixels.permute(2, 3, 0, 1).double() / 255
    return gaussian_blur(moved, sigma, truncate=4.0, border="nearest")


def _motion_blur(images: Tensor, chance: Chance, radius: int, sigma: float) -> Tensor:
    return motion_blur(images, radius, sigma, chance.uniform(low=-45, high=45))


def zoom_blur(images: Tensor, chance: Chance, most: float) -> Tensor:
    """Mean of the image and of its enlarged centre, at zoom factors from 1 to ``most`` in steps of 0.01."""
    factors = np.arange(1, most, 0.01)
    total = sum((clipped_zoom(images, float(factor)) for factor in factors), images.clone())
    return total / (len(factors) + 1)


def snow(
    images: Tensor,
    chance: Chance,
    mean: float,
    spread: float,
    zoom: float,
    threshold: float,
    radius: int,
    sigma: float,
    kept: float,
) -> Tensor:
    """Motion-blurred flakes, added twice (the second time rotated by 180 degrees) to a brightened image."""
    height, width = images.shape[-2:]
    flakes = clipped_zoom(mean + spread * chance.normal(1, height, width), zoom)
    flakes = torch.where(flakes < threshold, 0.0, flakes).clamp(0, 1)
    flakes = motion_blur(_to_bytes(flakes).double() / 255, radius, sigma, chance.uniform(low=-135, high=-45))
    paler = kept * images + (1 - kept) * torch.maximum(images, 1.5 * _grey(images) + 0.5)
    return paler + flakes + flakes.flip(-1, -2)


def frost(images: Tensor, chance: Chance, kept: float, share: float) -> Tensor:
    """Overlay of a bluish white crystal texture. SYNTHETIC: computed from plasma fractals, not from photographs."""
    coarse, fine = _plasma_for(images, chance, 1.8), _plasma_for(images, chance, 1.2)
    ridges = 1 - (2 * fine - 1).abs()  # bright lines where the map is 0.5
    texture = (0.25 + 0.75 * coarse) * (0.35 + 0.65 * ridges)
    if images.shape[1] == 3:
        texture = texture * torch.tensor([0.86, 0.95, 1.0], dtype=texture.dtype)[:, None, None]
    return kept * images + share * texture


def fog(images: Tensor, chance: Chance, share: float, decay: float) -> Tensor:
    """Additive plasma fractal, rescaled to the original maximum of the image."""
    most = images.amax((1, 2, 3), keepdim=True)
    return (images + share * _plasma_for(images, chance, decay)) * most / (most + share)


def brightness(images: Tensor, chance: Chance, more: float) -> Tensor:
    """Increase of the brightness (V of HSV, the maximum over channels); all channels are scaled by the same factor."""
    value = images.amax(1, keepdim=True)
    raised = (value + more).clamp(0, 1)
    return torch.where(value > 0, images * raised / value.clamp(min=1e-12), raised)


def contrast(images: Tensor, chance: Chance, factor: float) -> Tensor:
    """Difference to the mean of each channel, multiplied by ``factor``."""
    mean = images.mean((2, 3), keepdim=True)
    return (images - mean) * factor + mean


def elastic_transform(images: Tensor, chance: Chance, alpha: float, sigma: float, affine: float) -> Tensor:
    """Random affine map close to the identity, then a smooth random displacement; constants in units of the height."""
    n, _, height, width = images.shape
    alpha, sigma, affine = alpha * height, sigma * height, affine * height
    middle, third = torch.tensor([width // 2, height // 2]).double(), height // 3
    corners = middle + third * torch.tensor([[1, 1], [1, -1], [-1, -1]]).double()  # (x, y) of three points
    moved = corners + chance.uniform(3, 2, low=-affine, high=affine)  # (n, 3, 2)
    homogeneous = torch.cat([moved, torch.ones(n, 3, 1, dtype=torch.float64)], dim=2)
    back = torch.linalg.solve(homogeneous, corners.expand(n, 3, 2))  # (n, 3, 2): output to input positions
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    places = torch.stack([x, y, torch.ones_like(x)], dim=-1).view(1, -1, 3) @ back  # (n, H W, 2)
    columns, rows = places.view(n, height, width, 2).unbind(-1)
    warped = sample(images, rows, columns, "reflect101")
    if alpha == 0:
        return warped
    down, right = (
        alpha * gaussian_blur(chance.uniform(height, width, low=-1), sigma, truncate=3.0, border="reflect")
        for _ in range(2)
    )
    return sample(warped, y + down, x + right, "reflect")


def pixelate(images: Tensor, chance: Chance, factor: float) -> Tensor:
    """Downscaling by ``factor`` and upscaling to the original size by box averages, as in Pillow."""
    height, width = images.shape[-2:]
    return _boxes(_boxes(images, int(height * factor), int(width * factor)), height, width)


def _boxes(images: Tensor, height: int, width: int) -> Tensor:
    for axis, size in ((3, width), (2, height)):  # rounded to grey levels after each axis
        weights = box_weights(images.shape[axis], size)
        scaled = torch.tensordot(images, weights, dims=([axis], [1])).movedim(-1, axis)
        images = (scaled * 255 + 0.5 + 1e-9).floor() / 255
    return images


def box_weights(size: int, result: int) -> Tensor:
    """Weights that resize a line of ``size`` pixels to ``result`` pixels, ``(result, size)``; rows sum to 1.

    A pixel belongs to the box that contains its centre; partial overlap is not weighted.
    """
    scale = size / result
    middles = (torch.arange(result).double()[:, None] + 0.5) * scale
    distance = (torch.arange(size).double() + 0.5 - middles) / max(scale, 1.0)
    inside = ((distance > -0.5) & (distance <= 0.5)).double()
    return inside / inside.sum(1, keepdim=True)


def jpeg_compression(images: Tensor, chance: Chance, quality: int) -> Tensor:
    """JPEG compression with the given quality."""
    pixels = _to_bytes(images).permute(0, 2, 3, 1).numpy()
    decoded = []
    for image in pixels:
        buffer = io.BytesIO()
        Image.fromarray(image[..., 0] if image.shape[2] == 1 else image[..., :3]).save(buffer, "JPEG", quality=quality)
        decoded.append(np.asarray(Image.open(buffer)).reshape(image.shape))
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).double() / 255


_Function = Callable[..., Tensor]
_KINDS: dict[str, tuple[_Function, tuple[tuple[Any, ...], ...]]] = {
    "gaussian_noise": (gaussian_noise, ((0.04,), (0.06,), (0.08,), (0.09,), (0.10,))),
    "shot_noise": (shot_noise, ((500,), (250,), (100,), (75,), (50,))),
    "impulse_noise": (impulse_noise, ((0.01,), (0.02,), (0.03,), (0.05,), (0.07,))),
    "defocus_blur": (defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "glass_blur": (glass_blur, ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))),
    "motion_blur": (_motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": (zoom_blur, ((1.06,), (1.11,), (1.16,), (1.21,), (1.26,))),
    "snow": (
        snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "frost": (frost, ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
    "fog": (fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": (brightness, ((0.05,), (0.1,), (0.15,), (0.2,), (0.3,))),
    "contrast": (contrast, ((0.75,), (0.5,), (0.4,), (0.3,), (0.15,))),
    "elastic_transform": (
        elastic_transform,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    "pixelate": (pixelate, ((0.95,), (0.9,), (0.85,), (0.75,), (0.65,))),
    "jpeg_compression": (jpeg_compression, ((80,), (65,), (58,), (50,), (40,))),
}
CORRUPTIONS = tuple(_KINDS)
"""Names of the corruptions, in the order of the literature and of the streams."""


def check(name: str, severity: int) -> None:
    """Check the name and severity of a corruption.

    Raises:
        ValueError: If the name is not in ``CORRUPTIONS``, or the severity is not in 1 .. 5.
    """
    if name not in _KINDS:
        raise ValueError(f"corruption {name!r} is unknown; use one of {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise ValueError(f"corruption {name}: severity is {severity}; use 1 to 5")


@torch.no_grad()
def corrupt(images: Tensor, name: str, severity: int, *, indices: Sequence[int] | None = None, seed: int = 0) -> Tensor:
    """Corrupt images, on the CPU.

    Args:
        images: uint8 ``(n, C, H, W)``.
        name: One of ``CORRUPTIONS``.
        severity: 1 to 5.
        indices: Index of each image in its data set; with the seed, it determines all random numbers. None for 0, 1,
            ...
        seed: Seed shared by all images.

    Returns:
        uint8 ``(n, C, H, W)``.

    Raises:
        ValueError: If the name or the severity is unknown.
    """
    check(name, severity)
    function, constants = _KINDS[name]
    places = np.arange(len(images)) if indices is None else np.asarray(indices, dtype=np.int64)
    key = hash64(seed, CORRUPTIONS.index(name), severity)
    results = [torch.zeros_like(images[:0])]
    for start in range(0, len(images), _CHUNK):
        rows, part = images[start : start + _CHUNK], places[start : start + _CHUNK]
        results.append(_to_bytes(function(rows.double() / 255, Chance(key, part), *constants[severity - 1])))
    return torch.cat(results)


def _to_bytes(images: Tensor) -> Tensor:
    # Truncated, as in the published files; 1e-9 keeps unchanged grey levels, which are integers up to rounding.
    return (images.clamp(0, 1) * 255 + 1e-9).to(torch.uint8)


def write_files(
    folder: Path, images: Tensor, labels: np.ndarray, names: Sequence[str] = CORRUPTIONS, *, seed: int = 0
) -> None:
    """Write files in the format of CIFAR-10-C: ``NAME.npy``, all images at severity 1, then 2, ..., and ``labels.npy``.

    Args:
        folder: Target folder; created if it does not exist.
        images: uint8 ``(n, C, H, W)``.
        labels: ``(n,)``.
        names: Names of the corruptions.
        seed: As in :func:`corrupt`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        parts = [corrupt(images, name, severity, seed=seed) for severity in SEVERITIES]
        np.save(folder / f"{name}.npy", torch.cat(parts).permute(0, 2, 3, 1).numpy())
    np.save(folder / "labels.npy", np.tile(labels, len(SEVERITIES)))
