"""A backbone that gains a feature extractor with a task (FOSTER, Dynamically Expandable Representation)."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cl_lightning.backbones import MLP, Backbone, ImageShape


class ExpandableBackbone(Backbone):
    """Extractors of one kind whose features stand side by side: ``[f_1(x), ..., f_n(x)]``, d of each.

    It begins with one, and then is that one. It takes the number of extractors from the state that it loads. A head
    over it has to grow with it: ``LinearHead.resize``. Which extractors are trained says the strategy (``frozen``).

    Args:
        image_shape: Channels, height, width.
        extractor: Builds an extractor for a shape of image; None for ``MLP``.

    Attributes:
        extractors: The extractors, the newest last.
        width: d.
    """

    def __init__(self, image_shape: ImageShape, *, extractor: Callable[[ImageShape], Backbone] | None = None) -> None:
        super().__init__(image_shape)
        first = (extractor or MLP)(self.image_shape)
        self.extractors = nn.ModuleList([first])
        self.width = self.num_features = first.num_features

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([extractor(images) for extractor in self.extractors], dim=1)

    def expand(self) -> None:
        """Add a copy of the newest extractor: each starts from the one before it."""
        self.extractors.append(copy.deepcopy(self.extractors[-1]))
        self.num_features = len(self.extractors) * self.width

    def keep(self, count: int) -> None:
        """Drop all extractors but the first ``count``."""
        self.extractors = self.extractors[:count]
        self.num_features = len(self.extractors) * self.width

    def split(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``(B, n d)`` of the earlier extractors, ``(B, (n - 1) d)``, and of the newest one, ``(B, d)``."""
        return features[:, : -self.width], features[:, -self.width :]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        start = f"{prefix}extractors."
        count = len({key[len(start) :].split(".")[0] for key in state_dict if key.startswith(start)})
        while len(self.extractors) < count:
            self.expand()
        self.keep(max(count, 1))
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]
