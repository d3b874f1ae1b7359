"""Learnt transformations of the input image, in front of a frozen model."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import ImageShape
from cl_lightning.checks import one_of
from cl_lightning.losses import full_precision
from cl_lightning.models.peft.base import Peft, Site

InputKind = Literal["add", "frame", "pad", "affine", "conv"]
"""An image that is added; the same on a frame alone; a frame around the smaller image; scale and shift per channel; a
residual convolution."""
_FRAME = 30


class _Transform(Site):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.hook_input(model, self.transform)

    def transform(self, images: Tensor) -> Tensor:
        transformed: Tensor = self(images)
        return transformed.to(images.dtype)


class _Add(_Transform):
    """``x + delta``."""

    def __init__(self, model: nn.Module, shape: ImageShape) -> None:
        super().__init__(model)
        self.delta = nn.Parameter(torch.zeros(shape))

    def forward(self, images: Tensor) -> Tensor:
        return images + self.delta


class _Frame(_Transform):
    """``x + delta``, with delta on a frame of width p alone."""

    def __init__(self, model: nn.Module, shape: ImageShape, width: int) -> None:
        super().__init__(model)
        channels, self.height, self.width = shape[0], shape[1] - 2 * width, shape[2] - 2 * width
        self.rows = nn.Parameter(torch.zeros(channels, 2 * width, shape[2]))  # above, then below
        self.columns = nn.Parameter(torch.zeros(channels, self.height, 2 * width))  # left, then right

    def forward(self, images: Tensor) -> Tensor:
        above, below = self.rows.chunk(2, dim=1)
        left, right = self.columns.chunk(2, dim=2)
        middle = torch.cat([left, left.new_zeros(len(left), self.height, self.width), right], dim=2)
        return images + torch.cat([above, middle, below], dim=1)


class _Pad(_Transform):
    """The image, resized to ``(H - 2 p, W - 2 p)``, in a frame of width p."""

    def __init__(self, model: nn.Module, shape: ImageShape, width: int) -> None:
        super().__init__(model)
        channels, self.height, self.width = shape[0], shape[1] - 2 * width, shape[2] - 2 * width
        self.rows = nn.Parameter(torch.zeros(channels, 2 * width, shape[2]))  # above, then below the image
        self.columns = nn.Parameter(torch.zeros(channels, self.height, 2 * width))  # left, then right of the image

    def forward(self, images: Tensor) -> Tensor:
        size = (self.height, self.width)
        inner = F.interpolate(full_precision(images), size=size, mode="bilinear", antialias=True)
        above, below = self.rows.to(inner.dtype).expand(len(images), -1, -1, -1).chunk(2, dim=2)
        left, right = self.columns.to(inner.dtype).expand(len(images), -1, -1, -1).chunk(2, dim=3)
        return torch.cat([above, torch.cat([left, inner, right], dim=3), below], dim=2)


class _Affine(_Transform):
    """``gamma x + beta`` per channel."""

    def __init__(self, model: nn.Module, shape: ImageShape) -> None:
        super().__init__(model)
        self.gamma = nn.Parameter(torch.ones(shape[0], 1, 1))
        self.beta = nn.Parameter(torch.zeros(shape[0], 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.gamma * images + self.beta


class _Conv(_Transform):
    """``x + K * x + b``, with kernels of 3 x 3 pixels."""

    def __init__(self, model: nn.Module, shape: ImageShape) -> None:
        super().__init__(model)
        self.weight = nn.Parameter(torch.zeros(shape[0], shape[0], 3, 3))
        self.bias = nn.Parameter(torch.zeros(shape[0]))

    def forward(self, images: Tensor) -> Tensor:
        return images + F.conv2d(images, self.weight, self.bias, padding=1)


class InputTransform(Peft):
    """Learnable parameters that transform the image before it enters a model.

        add      x + delta                          delta (C, H, W) = 0 initially
        frame    x + delta                          the same, delta = 0 except in a frame of width p
        pad      x, resized to (H - 2 p, W - 2 p), in a frame of width p whose pixels are learnt, 0 initially
        affine   gamma_c x + beta_c                 gamma = 1 and beta = 0 initially
        conv     x + K * x + b                      K (C, C, 3, 3) = 0 and b = 0 initially

    With all kinds except ``pad`` the initial output of the model is unchanged. x is the image as the model gets
    it, after augmentation and normalisation: 0 is the mean colour of the data.

    Args:
        model: A backbone, which knows the shape of its images.
        kind: One of the above.
        frame_width: p in pixels, at least 1 and less than half of the smaller side, for ``pad`` and ``frame``; None for
            30.

    Raises:
        ValueError: If an option is out of range or belongs to another kind, or the model has no ``image_shape``.
    """

    def __init__(self, model: nn.Module, *, kind: InputKind = "add", frame_width: int | None = None) -> None:
        super().__init__()
        check_input_options("InputTransform", kind, frame_width)
        shape = getattr(model, "image_shape", None)
        if shape is None:
            name = type(model).__name__
            raise ValueError(f"InputTransform: {name} has no image_shape; use a Backbone, such as Timm(name=...)")
        if kind in ("pad", "frame"):
            width = _FRAME if frame_width is None else frame_width
            if 2 * width >= min(shape[1:]):
                raise ValueError(
                    f"InputTransform: give frame_width below {min(shape[1:]) / 2:g}: with {width} pixels on each side "
                    f"nothing is left of an image of {shape[1]} x {shape[2]} pixels"
                )
            self.sites.append((_Pad if kind == "pad" else _Frame)(model, shape, width))
        else:
            kinds = {"add": _Add, "affine": _Affine, "conv": _Conv}
            self.sites.append(kinds[kind](model, shape))


def check_input_options(owner: object, kind: str, frame_width: int | None) -> None:
    """Check the options of an ``InputTransform`` that do not depend on the shape of the images.

    Args:
        owner: Object to name in the error.
        kind: As in ``InputTransform``.
        frame_width: As in ``InputTransform``.

    Raises:
        ValueError: If an option is out of range or belongs to another kind.
    """
    one_of(owner, get_args(InputKind), kind=kind)
    if frame_width is not None and (kind not in ("pad", "frame") or frame_width < 1):
        name = owner if isinstance(owner, str) else type(owner).__name__
        raise ValueError(
            f"{name}: frame_width is {frame_width} with kind {kind!r}; give a width of at least 1 with kind 'pad' or "
            "'frame', and none with other kinds"
        )
