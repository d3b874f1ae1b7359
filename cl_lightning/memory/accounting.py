"""Bytes that a method keeps from task to task."""

import math
from typing import Protocol, cast

from torch import nn

from cl_lightning.batch import ImageShape


class KeepsBytes(Protocol):
    """A module whose bytes are counted as kept from task to task, apart from the network.

    Attributes:
        kept_as: Name of the kind, such as ``"exemplars"``, under which its bytes are reported.
    """

    kept_as: str

    def num_bytes(self) -> int:
        """Bytes that the module keeps now, on this process."""


def bytes_by_kind(module: nn.Module) -> dict[str, int]:
    """Sum the bytes of a module and its submodules by kind.

    Each module with an attribute ``kept_as`` counts, also a user's own (see :class:`KeepsBytes`), and a module that
    occurs twice counts once. A subclass counts under the name of its base class. A module inside a counted one counts
    too: the prototypes in a teacher's head are in the teacher's bytes and are counted as prototypes as well.

    Args:
        module: A strategy, or any module.

    Returns:
        Bytes by kind, in the order in which ``module.modules()`` meets the kinds. Kinds of 0 bytes are included.
    """
    kept: dict[str, int] = {}
    for part in module.modules():
        if (kind := getattr(part, "kept_as", None)) is not None:
            kept[kind] = kept.get(kind, 0) + cast(KeepsBytes, part).num_bytes()
    return kept


def exemplars_within(megabytes: float, parameters: int, image_shape: ImageShape) -> int:
    """Number of exemplars in a budget of memory for a network and exemplars (MEMO: Zhou et al., ICLR 2023).

        K = floor((2^20 megabytes - 4 parameters) / (C H W))

    Args:
        megabytes: Size of network and exemplars together, in 2^20 bytes.
        parameters: Number of scalars in the network, 4 bytes each.
        image_shape: Channels, height and width of an exemplar, one byte per value.

    Returns:
        K; negative if the network alone exceeds the budget.
    """
    return math.floor((2**20 * megabytes - 4 * parameters) / math.prod(image_shape))
