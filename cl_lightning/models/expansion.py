"""A backbone that adds a feature extractor per task (DER, FOSTER, BEEF, TagFex), or only its last stage (MEMO)."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cl_lightning.batch import ImageShape
from cl_lightning.models.backbones import MLP, Backbone, ResNet


class ExpandableBackbone(Backbone):
    """Feature extractors of one architecture with concatenated features: ``[f_1(x), ..., f_n(x)]``, ``(B, n d)``.

    The backbone starts with one extractor and is then equal to it. When a state dict is loaded, the number of
    extractors is set to match it. A head on this backbone has to be resized with it (``LinearHead.resize``). The
    strategy decides which extractors are trained (``frozen``).

    Args:
        image_shape: Channels, height, width.
        extractor: Builds an extractor for an image shape; None for ``MLP``.
        share_stem: Whether an extractor is only the last stage of the backbone that ``extractor`` builds, on a common
            stem of all its other stages (``Backbone.divide``): f_k(x) = s_k(g(x)).

    Attributes:
        stem: The common stem g; the identity without ``share_stem``.
        extractors: The extractors, the newest last.
        width: Number of features of one extractor, d.

    Raises:
        ValueError: If ``share_stem`` is True and the backbone cannot be divided.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        *,
        extractor: Callable[[ImageShape], Backbone] | None = None,
        share_stem: bool = False,
    ) -> None:
        super().__init__(image_shape)
        whole = (extractor or MLP)(self.image_shape)
        self.stem, first = whole.divide() if share_stem else (nn.Identity(), whole)
        self.extractors = nn.ModuleList([first])
        self.width = self.num_features = whole.num_features

    def forward(self, images: Tensor) -> Tensor:
        common = self.stem(images)
        return torch.cat([extractor(common) for extractor in self.extractors], dim=1)

    @property
    def earlier(self) -> list[nn.Module]:
        """All extractors except the newest one."""
        return list(self.extractors)[:-1]

    def expand(self, source: int = -1) -> None:
        """Add an extractor, initialised as a copy of extractor ``source``; by default of the newest one."""
        self.extractors.append(copy.deepcopy(self.extractors[source]))
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


def map_stage(backbone: nn.Module) -> nn.Module:
    """The module whose output is the last feature map of a backbone: the last stage of a ``ResNet``.

    For other backbones this is the backbone itself, whose features ``(B, d)`` are a map of one position.
    """
    return getattr(backbone, backbone.stages[-1]) if isinstance(backbone, ResNet) else backbone


def feature_map(backbone: nn.Module, images: Tensor) -> Tensor:
    """Last feature map of a backbone: ``(B, d, h, w)`` of a ``ResNet``, features ``(B, d)`` of others."""
    output: Tensor = backbone.feature_map(images) if isinstance(backbone, ResNet) else backbone(images)
    return output


def positions(maps: Tensor) -> Tensor:
    """Vector of each position of a feature map: ``(B, d, h, w)`` to ``(B, h w, d)``, features ``(B, d)`` to
    ``(B, 1, d)``."""
    return maps.unsqueeze(1) if maps.dim() == 2 else maps.flatten(2).transpose(1, 2)
