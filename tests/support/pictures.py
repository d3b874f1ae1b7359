"""Random images, and their distance."""

import torch
from torch import Tensor


def pictures(rows: int, channels: int = 3, height: int = 12, width: int = 10, seed: int = 0) -> Tensor:
    """Random uint8 images ``(rows, channels, height, width)``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, channels, height, width), dtype=torch.uint8, generator=generator)


def levels_apart(first: Tensor, second: Tensor) -> Tensor:
    """Absolute differences of uint8 images, in grey levels."""
    return (first.int() - second.int()).abs()
