"""A memory for each task, so that the samples of a task can be dropped without a trace in the other memories."""

from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from cl_lightning.memory.replay import Memory


class TaskMemories(nn.Module):
    """Memories by the index of their task; they are created, and taken from a state dict, as they are needed.

    Args:
        size: Largest number of samples of each task, over all processes, at least 0; 0 keeps none.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.memories = nn.ModuleDict()

    def __getitem__(self, task: int) -> Memory:
        return cast(Memory, self.memories[str(task)])

    def tasks(self) -> list[int]:
        """Tasks whose memory has samples, ascending."""
        return sorted(int(name) for name, memory in self.memories.items() if len(cast(Memory, memory)))

    def add(self, task: int) -> None:
        """Create the empty memory of a task."""
        self.memories[str(task)] = Memory(self.size)

    def drop(self, task: int) -> None:
        """Remove the memory of a task with all of its samples."""
        del self.memories[str(task)]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        start = f"{prefix}memories."
        names = {key.removeprefix(start).partition(".")[0]: None for key in state_dict if key.startswith(start)}
        device = next((cast(Memory, memory)._anchor.device for memory in self.memories.values()), None)
        self.memories = nn.ModuleDict({name: Memory(self.size).to(device) for name in names})
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]
