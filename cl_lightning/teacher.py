"""Frozen copies of a network, which teach or measure the network that goes on learning."""

import copy
from collections.abc import Mapping
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from cl_lightning.network import Network, Output

Module = TypeVar("Module", bound=nn.Module)


def frozen_copy(module: Module) -> Module:
    """Deep copy in eval mode that takes no gradient."""
    return copy.deepcopy(module).eval().requires_grad_(False)


class Teacher(nn.Module):
    """The network as it was before this task; empty until :meth:`learn_from` was called once.

    It stays in eval mode whatever mode its owner is put in, takes no gradient, and is saved with its owner. Its weights
    are always full precision copies of the student's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network: Network | None = None

    def __bool__(self) -> bool:
        return self.network is not None

    @property
    def num_columns(self) -> int:
        """Number of classes that the teacher knows, 0 while it is empty."""
        return 0 if self.network is None else self.network.head.num_columns

    def learn_from(self, student: Network) -> None:
        """Replace the teacher by a frozen copy of ``student``."""
        self.network = frozen_copy(student)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Output:
        if self.network is None:
            raise RuntimeError("Teacher: there is no teacher during the first task; ask `if teacher` before calling it")
        output: Output = self.network(images)
        return output

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    def restore_shape(self, student: Network, state: Mapping[str, Any], prefix: str) -> None:
        """Prepare for loading ``state``: hold a network if and only if the state holds one."""
        if not any(key.startswith(f"{prefix}network.") for key in state):
            self.network = None
        elif self.network is None:
            self.learn_from(student)

    def num_bytes(self) -> int:
        """Memory that the copy takes, in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state_dict().values())
