"""Backbones and a head for classes of pixels: feature maps, and a classifier for each of their places."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_lightning.batch import ImageShape
from cl_lightning.checks import at_least, one_of
from cl_lightning.models.backbones import Backbone
from cl_lightning.models.heads import LinearHead

Norm = Literal["batch", "group"]


class PixelHead(LinearHead):
    """Linear classifier of each place of a feature map, a 1x1 convolution: ``(B, d, h, w)`` to ``(B, columns, h, w)``.

    Options as for ``LinearHead``.
    """

    for_pixels = True

    def forward(self, features: Tensor) -> Tensor:
        if not self.blocks:
            return features.new_zeros(len(features), 0, *features.shape[2:])
        bias = torch.cat([cast(Tensor, block.bias) for block in self.blocks]) if self.bias else None
        return F.conv2d(features, self.weight()[:, :, None, None], bias)


class ConvPixels(Backbone):
    """Small encoder and decoder with shortcuts (after U-Net: Ronneberger et al., MICCAI 2015, arXiv:1505.04597).

    Each stage of the encoder is two 3x3 convolutions with normalisation and ReLU, the first one with stride 2;
    the decoder enlarges the map of a stage by 2, joins the map of the stage before it, and applies one convolution. For
    images of 64 x 64 pixels and three stages the maps have 32, 16 and 8 places per side, and the features 32.

    Args:
        image_shape: Channels, height, width.
        channels: Channels of each stage, at least one; the features have ``channels[0]``.
        norm: ``batch`` normalisation, or ``group`` normalisation of a single group, which does not depend on the other
            images of a batch.

    Raises:
        ValueError: If an option is out of range, or the images are too small for the stages.
    """

    dimensions = (3,)
    for_pixels = True

    def __init__(
        self, image_shape: ImageShape, *, channels: Sequence[int] = (32, 64, 128), norm: Norm = "batch"
    ) -> None:
        super().__init__(image_shape)
        one_of(self, ("batch", "group"), norm=norm)
        if not channels:
            raise ValueError("ConvPixels: channels is empty; give at least one number")
        for count in channels:
            at_least(self, 1, channels=count)
        if min(image_shape[1:]) < 2 ** len(channels):
            raise ValueError(
                f"ConvPixels: images of {image_shape[1]} x {image_shape[2]} pixels are too small for {len(channels)} "
                "stages, each of which halves them; give fewer channels"
            )
        sizes = [image_shape[0], *channels]
        self.down = nn.ModuleList(
            nn.Sequential(*_convolution(inputs, outputs, 2, norm), *_convolution(outputs, outputs, 1, norm))
            for inputs, outputs in pairwise(sizes)
        )
        self.up = nn.ModuleList(
            nn.Sequential(*_convolution(channels[stage] + channels[stage + 1], channels[stage], 1, norm))
            for stage in range(len(channels) - 1)
        )
        self.num_features = channels[0]

    def forward(self, images: Tensor) -> Tensor:
        maps: list[Tensor] = []
        hidden = images
        for stage in self.down:
            hidden = stage(hidden)
            maps.append(hidden)
        for joining, before in zip(reversed(self.up), reversed(maps[:-1]), strict=True):
            enlarged = F.interpolate(hidden, size=before.shape[-2:], mode="nearest")
            hidden = joining(torch.cat([enlarged, before], dim=1))
        return hidden


class TorchvisionPixels(Backbone):
    """Feature map of a segmentation network of torchvision: its backbone and its decoder without the last layer.

    DeepLab-v3 (arXiv:1706.05587) and FCN with ResNet-50 or -101, LR-ASPP with MobileNet-v3; the map is 8 times smaller
    than the image per side with ResNets.

    Args:
        image_shape: Channels (3), height, width.
        model: Name in ``torchvision.models.segmentation``: ``deeplabv3_resnet50``, ``deeplabv3_resnet101``,
            ``deeplabv3_mobilenet_v3_large``, ``fcn_resnet50``, ``fcn_resnet101``.
        weights_backbone: Weights of torchvision for the backbone, such as ``IMAGENET1K_V1``; None for random ones.

    Raises:
        ValueError: If there is no such model, or the images have not 3 channels.
    """

    dimensions = (3,)
    for_pixels = True

    def __init__(
        self, image_shape: ImageShape, *, model: str = "deeplabv3_resnet50", weights_backbone: str | None = None
    ) -> None:
        super().__init__(image_shape)
        from torchvision.models import segmentation  # imports all its models

        names = [name for name in segmentation.__dict__ if name.startswith(("deeplabv3_", "fcn_")) and "resnet" in name]
        names.append("deeplabv3_mobilenet_v3_large")
        if model not in names:
            raise ValueError(f"TorchvisionPixels: model {model!r}; use {', '.join(sorted(names))}")
        if image_shape[0] != 3:
            raise ValueError(f"TorchvisionPixels: images have {image_shape[0]} channels; the networks take 3")
        whole = getattr(segmentation, model)(weights=None, weights_backbone=weights_backbone, num_classes=2)
        *decoder, last = whole.classifier.children()
        self.encoder, self.decoder = whole.backbone, nn.Sequential(*decoder)
        self.num_features = last.in_channels

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.decoder(self.encoder(images)["out"])
        return features


def _convolution(inputs: int, outputs: int, stride: int, norm: str) -> list[nn.Module]:
    layer = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return [layer, nn.BatchNorm2d(outputs) if norm == "batch" else nn.GroupNorm(1, outputs), nn.ReLU()]
