"""A linear classifier with two weights per class: one that is trained in the task, and one that predicts (CWR*)."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.losses import full_precision
from cl_lightning.models.heads import Head


def consolidate(old: Tensor, new: Tensor, past: Tensor, current: Tensor) -> Tensor:
    """Consolidated rows of the classes of a task (Maltoni & Lomonaco, arXiv:1907.03799, alg. 3).

        r_c = sqrt(past_c / current_c),   cw_c <- (r_c cw_c + tw_c - mean(tw)) / (r_c + 1)

    The mean is one number, over all entries of ``new``. A class without past samples gets ``tw_c - mean(tw)``, a class
    with equal numbers of past and current samples the average of both rows. Computed in float64.

    Args:
        old: cw, consolidated rows of the classes, ``(n, d)``.
        new: tw, rows at the end of training, ``(n, d)``.
        past: Number of samples of each class in earlier tasks, at least 0, ``(n,)``.
        current: Number of samples of each class in this task, at least 1, ``(n,)``.

    Returns:
        ``(n, d)``.
    """
    ratio = (past.double() / current.double()).sqrt()[:, None]
    centred = new.double() - new.double().mean()
    return ((ratio * old.double() + centred) / (ratio + 1)).to(old.dtype)


class _ConsolidatedBlock(nn.Module):
    consolidated: Tensor
    past: Tensor
    in_task: Tensor

    def __init__(self, num_features: int, num_new: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_new, num_features))  # tw
        self.register_buffer("consolidated", torch.zeros(num_new, num_features))  # cw
        self.register_buffer("past", torch.zeros(num_new, dtype=torch.int64))
        self.register_buffer("in_task", torch.zeros(num_new, dtype=torch.bool))


class ConsolidatedHead(Head):
    """Linear classifier without bias whose rows are reset in each task and consolidated at its end (CWR*).

    The logits of the training loss have the temporary rows tw, which :meth:`begin` sets; predictions have the
    consolidated rows cw, which :meth:`end` updates. Predictions within a task have ``tw_c - mean(tw)`` for the classes
    of the task, as new classes will have at its end.

    Args:
        num_features: Size of a feature vector, d.
    """

    def new_block(self, num_new: int) -> nn.Module:
        return _ConsolidatedBlock(self.num_features, num_new)

    @property
    def consolidated(self) -> Tensor:
        """cw, ``(columns, d)``."""
        return torch.cat([block.consolidated for block in self._own()])

    @property
    def past(self) -> Tensor:
        """Number of samples of each class in the tasks that have ended, int64 ``(columns,)``."""
        return torch.cat([block.past for block in self._own()])

    @torch.no_grad()
    def begin(self, columns: Tensor) -> None:
        """Set the temporary rows: cw for the classes of the task that have been seen before, 0 for all others.

        Args:
            columns: Classes of the task, bool ``(columns,)``.
        """
        for block, chosen in zip(self._own(), torch.split(columns, self.block_sizes()), strict=True):
            block.in_task.copy_(chosen)
            block.weight.copy_(block.consolidated * chosen.to(block.weight)[:, None])  # cw of a new class is 0

    @torch.no_grad()
    def end(self, counts: Tensor) -> None:
        """Consolidate the rows of the classes that have samples; the rows of all other classes are unchanged.

        Args:
            counts: Number of samples of each class in the task, over all processes, int64 ``(columns,)``.
        """
        counts = counts.to(self._device())
        trained = counts > 0
        rows, past = self.consolidated, self.past
        rows[trained] = consolidate(rows[trained], self.weight()[trained], past[trained], counts[trained])
        sizes = self.block_sizes()
        for block, own, count in zip(
            self._own(), torch.split(rows, sizes), torch.split(past + counts, sizes), strict=True
        ):
            block.consolidated.copy_(own)
            block.past.copy_(count)
            block.in_task.zero_()

    def forward(self, features: Tensor) -> Tensor:
        if not self.blocks:
            return features.new_zeros(len(features), 0)
        return F.linear(features, self.weight())

    def classify(self, features: Tensor) -> Tensor:
        if not self.blocks:
            return features.new_zeros(len(features), 0)
        in_task = torch.cat([block.in_task for block in self._own()])[:, None]
        number = (in_task.sum() * self.num_features).clamp(min=1)
        mean = (self.weight() * in_task).sum() / number
        rows = torch.where(in_task, self.weight() - mean, self.consolidated)
        with torch.autocast(features.device.type, enabled=False):
            features = full_precision(features)
            return F.linear(features, rows.to(features.dtype))

    def _own(self) -> Sequence[_ConsolidatedBlock]:
        return cast(Sequence[_ConsolidatedBlock], list(self.blocks))
