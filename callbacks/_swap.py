"""Tensors of a network that are replaced during evaluation."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def live_tensors(strategy: Any) -> dict[str, Tensor]:
    """Parameters and buffers of the network of a strategy by name: the tensors themselves, not copies."""
    return {**dict(strategy.network.named_parameters()), **dict(strategy.network.named_buffers())}


class Swap:
    """Replaces tensors of a network by others, and restores them."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    @torch.no_grad()
    def into(self, live: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        """Copy ``values`` into the tensors of these names, and keep what was there; held names are left out."""
        for name, value in values.items():
            if name not in self._held and name in live:
                self._held[name] = live[name].detach().clone()
                live[name].copy_(value)

    @torch.no_grad()
    def back(self, live: Mapping[str, Tensor]) -> None:
        """Restore what was replaced."""
        held, self._held = self._held, {}
        for name, value in held.items():
            live[name].copy_(value)
