"""Pixel operations of the transforms, on whole batches, with random numbers as arguments.

Images are uint8 in 0 .. 255 or floating point in [0, 1]. Colour operations compute on floating-point values of either
range, whose maximum is the argument ``white`` (255 or 1): uint8 images need no division by 255 and no multiplication.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_lightning.batch import mix

Border = Literal["zeros", "reflect"]
Interpolation = Literal["nearest", "bilinear"]
Operation = Callable[[Tensor, Tensor, float], Tensor]
"""Function of values ``(n, C, H, W)``, amounts ``(n, k)`` on the same device, and white."""


def values_of(images: Tensor) -> Tensor:
    """Pixel values as float32, or float64 for float64 images."""
    return images if images.dtype == torch.float64 else images.float()


def like(values: Tensor, images: Tensor) -> Tensor:
    """Convert values to the dtype of ``images``; for uint8, values within 0 .. 255 are rounded, in place."""
    if images.dtype == torch.uint8:
        return values.round_().to(torch.int16).to(torch.uint8)  # on a CPU, float to uint8 is slow, int16 to uint8 fast
    return values.to(images.dtype)


def white_of(images: Tensor) -> float:
    """Maximum value of a pixel: 255 for uint8, else 1."""
    return 255.0 if images.dtype == torch.uint8 else 1.0


def choose(rows: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Row i of ``first`` where ``rows[i]`` is True, else of ``second``.

    Equal to ``torch.where``, and several times faster on a CPU.

    Args:
        rows: bool ``(B,)``.
        first: ``(B, ...)``.
        second: ``(B, ...)``.
    """
    rows = rows.to(first.device, non_blocking=True)
    count = len(rows)
    return torch.cat([first, second]).index_select(
        0, torch.where(rows, 0, count) + torch.arange(count, device=first.device)
    )


def apply_each(images: Tensor, chosen: Tensor, operations: Sequence[Operation], amounts: Tensor) -> Tensor:
    """Apply ``operations[chosen[i]]`` with ``amounts[i]`` to row i; rows with a negative ``chosen[i]`` are unchanged.

    Args:
        images: ``(B, C, H, W)``.
        chosen: int64 ``(B,)``, on the CPU, so that counting the rows per operation needs no synchronisation with the
            GPU.
        operations: Each is called once, with all its rows.
        amounts: ``(B, k)``, on the CPU.
    """
    order = chosen.argsort()
    counts = torch.bincount(chosen + 1, minlength=len(operations) + 1).tolist()  # unchanged rows come first
    place = order.to(images.device, non_blocking=True)
    parts = torch.split(images.index_select(0, place), counts)
    sizes = torch.split(to_device_of(amounts[order], images), counts)
    changed = [
        like(operation(values_of(part), size, white_of(part)), part)
        for operation, part, size in zip(operations, parts[1:], sizes[1:], strict=True)
        if len(part)
    ]
    return torch.cat([parts[0], *changed]).index_select(0, place.argsort())


def to_device_of(numbers: Tensor, images: Tensor) -> Tensor:
    """Copy numbers from the CPU to the device and computing dtype of the images, without synchronisation."""
    return numbers.to(
        images.device, torch.float64 if images.dtype == torch.float64 else torch.float32, non_blocking=True
    )


def permute_pixels(images: Tensor, seed: int) -> Tensor:
    """Permute the pixels of images ``(..., H, W)``; the permutation depends on the seed alone."""
    generator = torch.Generator().manual_seed(mix(seed))
    order = torch.randperm(images.shape[-2] * images.shape[-1], generator=generator).to(images.device)
    return images.flatten(-2).index_select(-1, order).view(images.shape)


def rotate_images(images: Tensor, degrees: float, interpolation: Interpolation = "bilinear") -> Tensor:
    """Rotate images ``(..., H, W)``, uint8 or in [0, 1], counter-clockwise about their centre; outside is black."""
    flat = values_of(images).reshape(1, -1, *images.shape[-2:])  # one image with many channels, so one sampling grid
    angle = torch.full((1,), float(degrees), dtype=flat.dtype, device=flat.device)
    return like(rotate(flat, angle, interpolation).view(images.shape), images)


def shift_images(images: Tensor, offsets: Tensor, mode: Border = "zeros") -> Tensor:
    """Shift each image by an offset in whole pixels; the size is unchanged.

    Args:
        images: ``(B, C, H, W)`` of any dtype.
        offsets: Offset (down, right) of the window that is cut out, in pixels, int64 ``(B, 2)``; below the side of the
            images in mode reflect.
        mode: Padding: zeros, or reflection at the border pixel.
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
    # A window consists of `height` runs of `width` contiguous values, copied as wholes; runs may overlap.
    tall, long = height + 2 * pad, width + 2 * pad
    offsets = (offsets + pad).to(images.device, non_blocking=True)
    line = offsets[:, :1] + torch.arange(height, device=images.device)  # (B, height)
    first = torch.arange(count * channels, device=images.device).view(count, channels, 1) * tall
    start = ((first + line[:, None]) * long + offsets[:, 1:, None]).flatten()
    runs = wide.as_strided((wide.numel() - width + 1, width), (1, 1))
    return runs.index_select(0, start).view(images.shape)


def _mirrored(places: Tensor, side: int) -> Tensor:
    """Reflect positions beyond an axis of ``side`` pixels at its border pixels."""
    return (side - 1) - ((side - 1) - places.abs()).abs()


def resized_crop(images: Tensor, boxes: Tensor, size: tuple[int, int], antialias: bool = True) -> Tensor:
    """Crop a box from each image and resize it with linear interpolation.

    A resize is a matrix per axis, so a batch of resizes is two batched matrix products, with antialiasing at no extra
    cost.

    Args:
        images: ``(B, C, H, W)``.
        boxes: Top, left, height, width in pixels, ``(B, 4)``.
        size: Height and width of the result in pixels.
        antialias: Whether to average over the input pixels of each output pixel where the box is larger than the
            result.

    Returns:
        ``(B, C, *size)``.
    """
    values, matrices = values_of(images), []
    boxes = boxes.to(images.device, values.dtype, non_blocking=True)[..., None, None]
    for axis, (length, result) in enumerate(zip(images.shape[-2:], size, strict=True)):
        start, scale = boxes[:, axis], boxes[:, axis + 2] / result  # (B, 1, 1)
        centre = start + (torch.arange(result, device=images.device)[:, None] + 0.5) * scale  # (B, result, 1)
        pixel = torch.arange(length, device=images.device) + 0.5
        inside = (pixel > start) & (pixel < start + boxes[:, axis + 2])
        weight = (1 - (pixel - centre).abs() / (scale.clamp(min=1) if antialias else 1)).clamp(min=0) * inside
        matrices.append((weight / weight.sum(dim=2, keepdim=True))[:, None])  # (B, 1, result, length), rows sum to 1
    with torch.autocast(images.device.type, enabled=False):  # half precision would lose grey levels
        values = matrices[0] @ values @ matrices[1].mT
    if images.dtype == torch.uint8:
        values += 2**-10  # rounds halves up: the summation order of a product may depend on the number of images
    return like(values, images)


def rotate(values: Tensor, degrees: Tensor, mode: Interpolation = "nearest") -> Tensor:
    """Rotate images ``(B, C, H, W)`` counter-clockwise about their centre by degrees ``(B,)``; outside is black."""
    cos, sin = degrees.deg2rad().cos(), degrees.deg2rad().sin()
    return affine(values, torch.stack([cos, -sin, 0 * cos, sin, cos, 0 * cos], dim=1).view(-1, 2, 3), mode)


def affine(values: Tensor, maps: Tensor, mode: Interpolation = "nearest") -> Tensor:
    """Affine warp: result (x, y) is the value at ``map (x, y, 1)``, in pixels from the centre; outside is black.

    Args:
        values: Floating point ``(B, C, H, W)``.
        maps: ``(B, 2, 3)``, on the same device.
        mode: Interpolation.
    """
    height, width = values.shape[-2:]
    y = torch.arange(height, dtype=values.dtype, device=values.device) - (height - 1) / 2
    x = torch.arange(width, dtype=values.dtype, device=values.device) - (width - 1) / 2
    # Coordinate 1 is the border: align_corners=False. Tensors on the CPU would need a synchronisation.
    maps = torch.stack([maps[:, 0] * (2 / width), maps[:, 1] * (2 / height)], dim=1)
    of_x, of_y, shift = maps[..., None].unbind(dim=2)  # (B, 2, 1)
    grid = (of_y * y + shift).mT[:, :, None] + (of_x * x).mT[:, None]  # (B, H, W, 2)
    return F.grid_sample(values, grid, mode, padding_mode="zeros", align_corners=False)


def shear_shift_or_rotate(values: Tensor, amounts: Tensor, white: float = 1.0) -> Tensor:
    """Shear, shift or rotate each image with nearest-neighbour interpolation; outside is black.

    Args:
        values: ``(B, C, H, W)``.
        amounts: Shear along x and y (slope), shift right and down (share of the side), rotation (degrees
            counter-clockwise), ``(B, 5)``; at most one is non-zero in each row. A shear keeps the top left corner in
            place; a shift is truncated to whole pixels.
        white: Not used.
    """
    height, width = values.shape[-2:]
    slope_x, slope_y, right, down, degrees = amounts.unbind(dim=1)
    cos, sin = degrees.deg2rad().cos(), degrees.deg2rad().sin()
    to_x = cos, slope_x - sin, slope_x * (height / 2) - (right * width).trunc()
    to_y = slope_y + sin, cos, slope_y * (width / 2) - (down * height).trunc()
    return affine(values, torch.stack([*to_x, *to_y], dim=1).view(-1, 2, 3))


def luma(values: Tensor) -> Tensor:
    """Grey values (ITU-R BT.601) of images with 1 or 3 channels, ``(B, 1, H, W)``.

    Raises:
        ValueError: For any other number of channels.
    """
    if values.shape[1] == 1:
        return values
    if values.shape[1] != 3:
        raise ValueError(
            f"colour transforms: images have {values.shape[1]} channels; 1 or 3 are allowed, remove colour transforms"
        )
    red, green, blue = values.unbind(dim=1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)[:, None]


def change_colours_(values: Tensor, amounts: Tensor, white: float = 1.0) -> Tensor:
    """Change brightness, saturation or contrast by a factor f = 1 + amount: ``f x + (1 - f) y``, clipped to [0, white].

    y is 0 for brightness, the grey value of the pixel for saturation, and the mean grey value of the image for
    contrast. All three are one formula, ``(1 + a) x - a_s luma(x) - a_c mean(luma(x))``, so rows need not be grouped by
    operation.

    Args:
        values: ``(B, C, H, W)``, changed in place: allocating large results takes longer than computing them.
        amounts: Amounts of brightness, saturation and contrast, at least -1, ``(B, 3)`` or ``(1, 3)``; at most one is
            non-zero in each row. A row of zeros leaves the image exactly unchanged.
        white: Maximum value of a pixel.
    """
    _, saturation, contrast = amounts[..., None, None, None].unbind(dim=1)
    grey = luma(values)
    second = (grey * saturation).add_(contrast * grey.mean(dim=(1, 2, 3), keepdim=True)).neg_()
    return values.mul_(1 + amounts.sum(dim=1)[:, None, None, None]).add_(second).clamp_(0, white)


def hue(values: Tensor, shift: Tensor, white: float = 1.0) -> Tensor:
    """Shift the hue by a share of the colour circle, ``(B, 1)`` in [-0.5, 0.5]; grey images are unchanged."""
    if values.shape[1] == 1:
        return values
    red, green, blue = values.unbind(dim=1)
    value, chroma = values.amax(dim=1), values.amax(dim=1) - values.amin(dim=1)
    safe = chroma.clamp(min=1e-12)
    angle = torch.where(value == red, (green - blue) / safe, (red - green) / safe + 4)
    angle = torch.where((value == green) & (value != red), (blue - red) / safe + 2, angle)  # in sixths of the circle
    sixth = torch.arange(5, 0, -2, dtype=values.dtype, device=values.device)[:, None, None]
    k = (sixth + angle[:, None] + 6 * shift[..., None, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def sharpness_(values: Tensor, amounts: Tensor, white: float = 1.0) -> Tensor:
    """Scale the difference to a smoothed image by 1 + amount, ``(B, 1)``, in place; border pixels are unchanged."""
    if min(values.shape[-2:]) < 3:
        return values
    lines = values[..., :-2, :] + values[..., 1:-1, :] + values[..., 2:, :]  # pooling is slow on small images
    inner = values[..., 1:-1, 1:-1]
    smooth = lines[..., :-2].add(lines[..., 1:-1]).add_(lines[..., 2:]).add_(inner, alpha=4).div_(13)
    inner += (inner - smooth).mul_(amounts[..., None, None])
    return values.clamp_(0, white)


def posterize(values: Tensor, dropped: Tensor, white: float = 1.0) -> Tensor:
    """Set the lowest bits of each 8-bit value to 0; their number is ``dropped``, ``(B, 1)``."""
    step = 2 ** dropped.round()[..., None, None]
    return _levels(values, white).div_(step).floor_().mul_(step * (white / 255))


def solarize(values: Tensor, amounts: Tensor, white: float = 1.0) -> Tensor:
    """Invert values of at least ``(1 - amount) white``, amounts ``(B, 1)``."""
    return torch.where(values >= white * (1 - amounts[..., None, None]), white - values, values)


def autocontrast(values: Tensor, _: Tensor, white: float = 1.0) -> Tensor:
    """Stretch each channel to the full range [0, white]; channels with a single value are unchanged."""
    low, high = values.amin(dim=(2, 3), keepdim=True), values.amax(dim=(2, 3), keepdim=True)
    flat = high <= low
    return (values - low.masked_fill(flat, 0)).mul_((white / (high - low)).masked_fill_(flat, 1))


def equalize(values: Tensor, _: Tensor, white: float = 1.0) -> Tensor:
    """Equalise the histogram of each channel, as in PIL."""
    level = _levels(values, white).flatten(2).long()  # (B, C, pixels)
    count = torch.zeros(*level.shape[:2], 256, dtype=torch.int64, device=values.device)
    count.scatter_add_(2, level, torch.ones_like(level))
    step = (level.shape[2] - count.gather(2, level.amax(dim=2, keepdim=True))) // 255  # PIL ignores the top level
    table = (count.cumsum(dim=2) - count + step // 2) // step.clamp(min=1)
    table = torch.where(step > 0, table, torch.arange(256, device=values.device)).clamp_(max=255)
    return table.to(values.dtype).mul_(white / 255).gather(2, level).view(values.shape)


def _levels(values: Tensor, white: float) -> Tensor:
    """Grey levels 0 .. 255, rounded to integers, still floating point."""
    return (values * (255 / white)).round_()
