"""A backbone with a head that grows."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cl_lightning.heads import Head


class Output(NamedTuple):
    """What one forward pass gives.

    Attributes:
        features: Of the backbone, ``(B, d)``.
        logits: One per class seen so far, in order of arrival, ``(B, columns)``.
    """

    features: Tensor
    logits: Tensor


def batch_norms(module: nn.Module) -> Iterator[nn.Module]:
    """The batch normalisation layers of a module; a strategy that freezes them names them in ``frozen``."""
    return (layer for layer in module.modules() if isinstance(layer, _BatchNorm))


class Network(nn.Module):
    """Backbone, then head: images ``(B, C, H, W)`` to :class:`Output`.

    Args:
        backbone: Gives features.
        head: Maps them to logits.
        backbone_is_frozen: Whether the backbone stays as it was built, in all tasks.
    """

    def __init__(self, backbone: nn.Module, head: Head, *, backbone_is_frozen: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.backbone_is_frozen = backbone_is_frozen

    def forward(self, images: Tensor) -> Output:
        features = self.backbone(images)
        return Output(features, self.head(features))

    def classify(self, images: Tensor) -> Tensor:
        """Scores ``(B, columns)`` that predictions are made of."""
        return self.head.classify(self.backbone(images))
