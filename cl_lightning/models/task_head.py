"""A linear head with rows of its own for each task, also for tasks without new classes."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.models.heads import LinearHead


class TaskHead(LinearHead):
    """Linear classifier with an ``nn.Linear`` per task over all classes of the task: ``W_t f + b_t``.

    On a stream whose classes are new in each task it is ``LinearHead``, to the bit. Where a class occurs in several
    tasks, each of them has a row for it. A class that a task does not have gets the row of the last earlier task that
    has it, or else of the first later one.

    Args:
        num_features: Size of a feature vector, d.
        bias: Whether each class has a bias.
        init_std: As in ``LinearHead``.

    Attributes:
        task: Task whose rows are used; None for the newest one.
        position: Row of each class for each task, int64 ``(tasks, columns)``.
    """

    position: Tensor

    def __init__(self, num_features: int, *, bias: bool = True, init_std: float | None = None) -> None:
        super().__init__(num_features, bias=bias, init_std=init_std)
        self.register_buffer("position", torch.zeros(0, 0, dtype=torch.int64))
        self.task: int | None = None

    @property
    def num_columns(self) -> int:
        return self.position.shape[1]

    @property
    def has_shared_classes(self) -> bool:
        """Whether a class has rows for several tasks."""
        return sum(self.block_sizes()) > self.num_columns

    def add_task(self, columns: Sequence[int], num_seen: int) -> None:
        """Append rows of a task for the classes of these columns; there are ``num_seen`` columns from then on.

        Raises:
            ValueError: If there are new columns that the task does not have.
        """
        if missing := set(range(self.num_columns, num_seen)) - set(columns):
            raise ValueError(f"TaskHead: column {min(missing)} is new, but not a column of the task; add it to columns")
        earlier = F.pad(self.position, (0, max(0, num_seen - self.num_columns)), value=-1)
        rows = earlier[-1].clone() if len(earlier) else earlier.new_full((num_seen,), -1)
        rows[list(columns)] = sum(self.block_sizes()) + torch.arange(len(columns), device=rows.device)
        self.position = torch.cat([torch.where(earlier < 0, rows, earlier), rows[None]])
        if columns:
            self._append(self.new_block(len(columns)))

    def grow(self, num_new: int) -> None:
        """Append rows of a task with ``num_new`` new classes; no effect for 0."""
        if num_new > 0:
            self.add_task(range(self.num_columns, self.num_columns + num_new), self.num_columns + num_new)

    def forward(self, features: Tensor) -> Tensor:
        if not self.blocks:
            return features.new_zeros(len(features), self.num_columns)
        chosen = self.position[-1 if self.task is None else self.task]
        bias = torch.cat([cast(Tensor, block.bias) for block in self.blocks]) if self.bias else None
        bias = None if bias is None else bias.index_select(0, chosen)
        return F.linear(features, self.weight().index_select(0, chosen), bias)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        name = f"{prefix}position"
        if name not in state_dict:  # of a LinearHead, whose blocks have new classes each
            sizes = [len(value) for key, value in state_dict.items() if fnmatch(key, f"{prefix}blocks.*.weight")]
            cast(dict[str, Tensor], state_dict)[name] = torch.arange(sum(sizes)).repeat(len(sizes), 1)
        self.position = self.position.new_zeros(state_dict[name].shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
