"""A fixed random layer on a backbone: many features for methods that solve a linear map on frozen features."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from cl_lightning.batch import ImageShape
from cl_lightning.checks import at_least, one_of
from cl_lightning.models.backbones import MLP, Backbone, built

Nonlinearity = Literal["relu", "tanh", "sigmoid"]


class RandomLayer(Backbone):
    """Features ``activation(R^T f(x) + b)`` of another backbone f, with R and b drawn as the weights of ``nn.Linear``.

    R and b are parameters: a strategy with ``freeze_backbone`` keeps them, others train them.

    Args:
        image_shape: Channels, height, width.
        units: Number of features, H.
        activation: ``relu``, ``tanh`` or ``sigmoid``.
        backbone: Builds f; None for the pixels.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        *,
        units: int = 5000,
        activation: Nonlinearity = "relu",
        backbone: Callable[[ImageShape], Backbone] | None = None,
    ) -> None:
        super().__init__(image_shape)
        at_least(self, 1, units=units)
        one_of(self, get_args(Nonlinearity), activation=activation)
        self.backbone = MLP(image_shape, hidden=()) if backbone is None else built(backbone, image_shape)
        self.layer = nn.Linear(self.backbone.num_features, units)
        self.activation = activation
        self.num_features = units

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        with torch.autocast(images.device.type, enabled=False):  # rounding of bf16 is noise in a linear system
            hidden = self.layer(features.to(self.layer.weight.dtype))
        activated: Tensor = getattr(torch, self.activation)(hidden)
        return activated
