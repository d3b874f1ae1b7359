"""What the parts of a test-time adaptation method have in common, and the part that corrects scores."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from cl_lightning.losses import full_precision
from cl_lightning.memory import NamedBuffers, Teacher, restore_shapes
from cl_lightning.models import Network
from cl_lightning.strategies.base.passes import Passes, StrategyData
from cl_lightning.strategy import Output


class Adapting(Protocol):
    """What parts read of, and do with, a test-time adaptation method."""

    network: Network
    source: Teacher
    data: StrategyData
    passes: Passes

    @property
    def num_source(self) -> int:
        """Number of classes of the source."""

    @property
    def start(self) -> "SourceTensors":
        """Values of the tensors of the network that the stream can change, after the source domain."""

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that are trained in the stream, by name in the network."""

    def forward_source_classes(self, images: Tensor) -> Output:
        """Features and scores ``(B, classes of the source)`` of images, without adaptation."""

    def stream_statistics(self) -> AbstractContextManager[None]:
        """In this context the network normalises as in the stream; for measurements on the source."""

    def reset(self) -> None:
        """Reset the network, the parts, further state of the method, and the optimizer."""


class SourceTensors(Protocol):
    """Tensors of the source network."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors, by name in the network."""


class PersistentTensors(NamedBuffers):
    """Named tensors that are kept from one fit to the next, and in checkpoints."""

    known: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("known", torch.zeros((), dtype=torch.bool))

    def __bool__(self) -> bool:
        return bool(self._get("state"))

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace all tensors by copies of these, by name; ``known`` is true afterwards."""
        self._clear()
        self.known = torch.ones_like(self.known)
        for name, value in tensors.items():
            self._set("state", name, value)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors, by name."""
        return self._get("state")


class Part(nn.Module):
    """A part of a test-time adaptation method; its state is buffers, saved in checkpoints with the strategy.

    A strategy copies the parts that it is given, so one object can be given to several strategies.
    """

    transductive: ClassVar[bool] = False
    """Whether the result for a sample depends on other samples of its batch."""
    needs_source: ClassVar[bool] = False
    """Whether the part reads ``strategy.source``, a copy of the source network."""

    def check(self, strategy: Adapting) -> None:
        """Raise ValueError if the part does not fit the method; called when the network is built."""

    def learn_source(self, strategy: Adapting) -> None:
        """Measure what the part needs of the source, and set its state; called once, when the source domain ends."""

    def reset(self) -> None:
        """Set the state to its values at the beginning of the stream; called when the network is reset."""

    def num_bytes(self) -> int:
        """Bytes of the state and of the parameters of the part."""
        return sum(value.nbytes for value in (*self.buffers(), *self.parameters()))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        restore_shapes(self, state_dict, prefix, tuple(self._buffers))
        super()._load_from_state_dict(state_dict, prefix, *args)


@torch.no_grad()
def source_features(strategy: Adapting, samples: int) -> tuple[Tensor, Tensor]:
    """Features of this process's share of source images, normalised as in the stream, and their columns.

    Args:
        strategy: The method, when the source domain ends.
        samples: Number of images of all processes, at most.

    Returns:
        Features ``(n, d)``, at least float32, and columns, int64 ``(n,)``.
    """
    with strategy.stream_statistics():
        found = [
            (full_precision(strategy.network.backbone(batch.images)), batch.labels)
            for batch in strategy.passes.batches(samples=samples)
        ]
    features, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    return features, labels


class OutputHead(Part, ABC):
    """Computes corrected scores of a batch from its features and scores; it has no parameters."""

    transductive = True

    def learn(self, output: Output) -> None:
        """Update the state with a batch of the stream, before ``forward``; evaluations do not call it."""

    @abstractmethod
    def forward(self, output: Output) -> Tensor:
        """Scores ``(B, classes)`` of the rows of this process, from features ``(B, d)`` and scores ``(B, classes)``."""
