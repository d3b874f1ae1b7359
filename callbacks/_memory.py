"""The replay memory of a strategy, for callbacks that use its samples."""

from typing import TYPE_CHECKING

from cl_lightning.memory import Memory

if TYPE_CHECKING:
    from cl_lightning.strategy import ContinualStrategy


def memory_of(owner: object, strategy: "ContinualStrategy") -> Memory:
    """The memory of raw samples that a strategy fills, its attribute ``memory``.

    Args:
        owner: Callback, for the error.
        strategy: Strategy of the run.

    Raises:
        ValueError: If the strategy has no memory, or one of size 0.
    """
    memory = getattr(strategy, "memory", None)
    if not isinstance(memory, Memory) or memory.size == 0:
        raise ValueError(
            f"{type(owner).__name__}: {type(strategy).__name__} has no memory of samples; use a strategy with one, "
            "such as ER, and a memory_size above 0"
        )
    return memory
