"""Bytes that a method keeps from task to task."""

from typing import Protocol, cast

from torch import nn


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
