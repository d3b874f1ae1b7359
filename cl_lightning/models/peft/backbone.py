"""Backbones with PEFT modules."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cl_lightning.batch import ImageShape
from cl_lightning.models.backbones import Backbone
from cl_lightning.models.network import frozen_copy
from cl_lightning.models.peft.base import PeftFactory


class AdaptedBackbone(Backbone):
    """A backbone with a ``Peft`` module, optionally concatenated with the features of the unadapted backbone.

    Args:
        image_shape: Channels, height, width.
        backbone: Builds the backbone.
        peft: Builds the PEFT module for a backbone.
        concatenate: Whether features become ``[original; adapted]``, ``(B, 2 d)``, after :meth:`finish`. If the
            backbone itself is trained, a frozen copy is kept for the original features.

    Attributes:
        base: The backbone.
        peft: The PEFT module inserted into it.
        original: The frozen copy, or None.
        width: Number of features of the backbone, d.
    """

    finished: Tensor

    def __init__(
        self,
        image_shape: ImageShape,
        *,
        backbone: Callable[[ImageShape], Backbone],
        peft: PeftFactory,
        concatenate: bool = False,
    ) -> None:
        super().__init__(image_shape)
        self.base = backbone(image_shape)
        self.peft = peft(self.base)
        self.original = frozen_copy(self.base) if concatenate and self.peft.trains_model else None
        self.concatenate, self.width = concatenate, self.base.num_features
        self.num_features = 2 * self.width if concatenate else self.width
        self.register_buffer("finished", torch.zeros((), dtype=torch.bool))
        self._both = False  # concatenate and finished, as a bool: reading the buffer would synchronise with the GPU

    def forward(self, images: Tensor) -> Tensor:
        adapted: Tensor = self.base(images)
        if not self._both:
            return adapted
        with torch.no_grad():
            if self.original is not None:
                return torch.cat([self.original(images), adapted], dim=1)
            with self.peft.disabled():
                return torch.cat([self.base(images), adapted], dim=1)

    def adapted_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters that the adaptation trains."""
        return (self.base if self.peft.trains_model else self.peft).parameters()

    def unadapted(self) -> Iterator[nn.Module]:
        """Modules that the adaptation does not change."""
        if not self.peft.trains_model:
            yield self.base
        if self.original is not None:
            yield self.original

    def finish(self) -> None:
        """Mark the adaptation as finished; with ``concatenate``, features are concatenated from now on."""
        self.finished.fill_(True)
        self._both = self.concatenate

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self._both = self.concatenate and bool(state_dict.get(f"{prefix}finished", False))
        super()._load_from_state_dict(state_dict, prefix, *args)


class PeftPair(Backbone):
    """A frozen backbone with two PEFT modules of the same kind: one is trained, the other is its moving average.

    Args:
        image_shape: Channels, height, width.
        backbone: Builds the backbone.
        peft: Builds a PEFT module for a backbone; called twice.

    Attributes:
        base: The backbone.
        online: The trained module; enabled except in :meth:`offline_features`.
        offline: The moving average.

    Raises:
        ValueError: If the PEFT module trains the model itself (``WholeModel``).
    """

    def __init__(
        self, image_shape: ImageShape, *, backbone: Callable[[ImageShape], Backbone], peft: PeftFactory
    ) -> None:
        super().__init__(image_shape)
        self.base = backbone(image_shape)
        self.online, self.offline = peft(self.base), peft(self.base)
        if self.online.trains_model:
            raise ValueError(
                f"PeftPair: {type(self.online).__name__} trains the model itself, of which there is only one; use "
                "Adapter, LoRA, Prefix or SSF"
            )
        self.offline._enable(False)
        self.num_features = self.base.num_features

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.base(images)
        return features

    def offline_features(self, images: Tensor) -> Tensor:
        """Features ``(B, d)`` with the offline module, of images ``(B, C, H, W)``."""
        with self.online.replaced_by(self.offline):
            features: Tensor = self.base(images)
        return features

    def copy_online(self) -> None:
        """Copy the state of the online module into the offline module."""
        self.offline.load_state_dict(self.online.state_dict())

    @torch.no_grad()
    def ema_update(self, momentum: float) -> None:
        """``offline <- momentum offline + (1 - momentum) online``; the same on every process.

        Args:
            momentum: In [0, 1].
        """
        own: list[Tensor] = list(self.offline.parameters())
        torch._foreach_lerp_(own, list[Tensor](self.online.parameters()), 1 - momentum)
