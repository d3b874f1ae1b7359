"""Blocks of residual networks (He et al. 2016, arXiv:1512.03385)."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn


class PadShortcut(nn.Module):
    """Shortcut without parameters (He et al. 2016, option A): every second pixel, zeros for the additional channels.

    ``(B, channels_in, H, W)`` to ``(B, channels, H / stride, W / stride)``, rounded up. Half of the zero channels come
    before the existing channels, half after them. Networks that append all zero channels are equal up to the order of
    channels: both train in the same way, but weights cannot be exchanged between them.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (channels - channels_in) // 2
        self.behind = channels - channels_in - self.before

    def forward(self, maps: Tensor) -> Tensor:
        return F.pad(maps[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.behind))


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions (He et al. 2016, fig. 2 and eq. 1)."""

    def __init__(
        self, channels_in: int, channels: int, *, stride: int, shortcut: Literal["pad", "conv"], last_relu: bool
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module = nn.Identity()
        if (stride, channels_in) != (1, channels):
            if shortcut == "pad":
                self.downsample = PadShortcut(channels_in, channels, stride)
            else:
                conv = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
                self.downsample = nn.Sequential(conv, nn.BatchNorm2d(channels))
        self.last_relu = last_relu

    def forward(self, maps: Tensor, kept: list[Tensor] | None = None) -> Tensor:
        """Maps ``(B, channels, H / stride, W / stride)``; before the last ReLU they are appended to ``kept``."""
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(maps)))))
        total: Tensor = inner + self.downsample(maps)
        if kept is not None:
            kept.append(total)
        return F.relu(total) if self.last_relu else total


class Stage(nn.Sequential):
    """Blocks one after another; the map of the last block before its ReLU is appended to ``kept``."""

    def forward(self, maps: Tensor, kept: list[Tensor] | None = None) -> Tensor:
        *blocks, last = self
        for block in blocks:
            maps = block(maps)
        end: Tensor = last(maps, kept)
        return end
