"""A backbone that adds a feature extractor per task (FOSTER, Dynamically Expandable Representation)."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cl_lightning.batch import ImageShape
from cl_lightning.models.backbones import MLP, Backbone


class ExpandableBackbone(Backbone):
    """Feature extractors of one architecture with concatenated features: ``[f_1(x), ..., f_n(x)]``, ``(B, n d)``.

    The backbone starts with one extractor and is then equal to it. When a state dict is loaded, the number of
    extractors is set to match it. A head on this backbone has to be resized with it (``LinearHead.resize``). The
    strategy decides which extractors are trained (``frozen``).

    Args:
        image_shape: Channels, height, width.
        extractor: Builds an extractor for an image shape; None for ``MLP``.

    Attributes:
        extractors: The extractors, the newest last.
        width: Number of features of one extractor, d.
    """

    def __init__(self, image_shape: ImageShape, *, extractor: Callable[[ImageShape], Backbone] | None = None) -> None:
        super().__init__(image_shape)
        first = (extractor or MLP)(self.image_shape)
        self.extractors = nn.ModuleList([first])
        self.width = self.num_features = first.num_features

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([extractor(images) for extractor in self.extractors], dim=1)

    def expand(self) -> None:
        """Add an extractor, initialised as a copy of the newest extractor."""
        self.extractors.append(copy.deepcopy(self.extractors[-1]))
        self.num_features = len(self.extractors) * self.width

    def keep(self, count: int) -> None:
        """Remove all extractors except the first ``count``."""
        self.extractors = self.extractors[:count]
        self.num_features = len(self.extractors) * self.width

    def split(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``(B, n d)``, split into the earlier extractors ``(B, (n - 1) d)`` and the newest one ``(B, d)``."""
        return features[:, : -self.width], features[:, -self.width :]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        start = f"{prefix}extractors."
        count = len({key[len(start) :].split(".")[0] for key in state_dict if key.startswith(start)})
        while len(self.extractors) < count:
            self.expand()
        self.keep(max(count, 1))
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]
