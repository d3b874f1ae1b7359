"""Backbones of which each serves one or several tasks, with initial weights that do not depend on other tasks."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from cl_lightning.batch import ImageShape
from cl_lightning.models.backbones import Backbone
from cl_lightning.models.network import Network

MAIN = "main"
"""Name of the backbone of all tasks that have none of their own."""


def drawn(make: Callable[[], nn.Module], key: int) -> nn.Module:
    """A module whose random initial values are a function of a key; the global generators are left as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key & 0x7FFFFFFFFFFFFFFF)
        return make()


class TaskNetworks(Backbone):
    """Backbones by name; a task is served by the backbone of its own name, or else by ``main``.

    Args:
        image_shape: Channels, height, width.
        build: Builds a backbone for an image shape.
        first: A backbone that ``build`` made, for its number of features.

    Attributes:
        task: Index of the task whose backbone gives the features.
        nets: Backbones by the index of their task, as text, or ``main``.
    """

    def __init__(self, image_shape: ImageShape, build: Callable[[ImageShape], Backbone], first: Backbone) -> None:
        super().__init__(image_shape)
        self._build, self.task = build, 0
        self.num_features = first.num_features
        self.nets = nn.ModuleDict({MAIN: first})

    def name_of(self, task: int) -> str:
        """Name of the backbone that serves a task."""
        return str(task) if str(task) in self.nets else MAIN

    def add(self, name: str, key: int) -> None:
        """Add a backbone with initial weights by ``key``, or reset the backbone of this name to them."""
        fresh = drawn(lambda: self._build(self.image_shape), key)
        if name in self.nets:
            self.nets[name].load_state_dict(fresh.state_dict())
            return
        like = next(self.parameters(), torch.empty(0))
        self.nets[name] = fresh.to(like.device, like.dtype)

    def remove(self, name: str) -> None:
        """Remove the backbone of a name; its tasks are served by ``main`` from then on."""
        del self.nets[name]

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.nets[self.name_of(self.task)](images)
        return features

    def restore_network(self, student: Network, state: Mapping[str, Any], prefix: str) -> None:
        """Prepare for loading ``state``: have the backbones that it has."""
        start = f"{prefix}nets."
        names = {key.removeprefix(start).partition(".")[0]: None for key in state if key.startswith(start)}
        if list(names) == list(self.nets):
            return
        spare = cast(Backbone, next(iter(self.nets.values())))
        like = next(spare.parameters(), torch.empty(0))
        for name in set(self.nets) - set(names):
            del self.nets[name]
        for name in names:
            if name not in self.nets:
                self.nets[name] = drawn(lambda: self._build(self.image_shape), 0).to(like.device, like.dtype)
        ordered = {name: self.nets[name] for name in names}
        self.nets = nn.ModuleDict(ordered)
