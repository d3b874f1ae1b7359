"""A head with a linear layer for each domain, of which each sample uses the layer of its domain."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.models.heads import Head


class DomainHead(Head):
    """A linear layer for each domain over its own classes; a class that a domain does not have has the logit -inf.

    Args:
        num_features: Size of a feature vector, d.

    Attributes:
        position: Row of a class among the rows of all layers, int64 ``(domains, columns)``; -1 where the domain does
            not have the class.
    """

    position: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.register_buffer("position", torch.zeros(0, 0, dtype=torch.int64))

    def new_block(self, num_new: int) -> nn.Module:
        return nn.Linear(self.num_features, num_new)

    def see(self, num_seen: int) -> None:
        """Have at least ``num_seen`` columns; no domain has the classes of new columns."""
        self.position = F.pad(self.position, (0, max(0, num_seen - self.num_columns)), value=-1)

    def add_domain(self, columns: Sequence[int], num_seen: int) -> None:
        """Add a domain with a layer for these columns; there are ``num_seen`` columns from then on."""
        self.see(num_seen)
        row = torch.full((1, self.num_columns), -1)
        row[0, list(columns)] = sum(self.block_sizes()) + torch.arange(len(columns))
        self.position = torch.cat([self.position, row.to(self.position)])
        self._append(self.new_block(len(columns)))

    @property
    def num_columns(self) -> int:
        return self.position.shape[1]

    def forward(self, features: Tensor, domains: Tensor | None = None) -> Tensor:
        """Logits ``(B, columns)`` by the layer of the domain of each sample, ``(B,)``; None for the newest domain."""
        if not self.blocks:
            return features.new_zeros(len(features), self.num_columns)
        rows = F.linear(features, self.weight(), torch.cat([cast(Tensor, block.bias) for block in self.blocks]))
        return self.of_domains(rows, domains)

    def of_domains(self, rows: Tensor, domains: Tensor | None) -> Tensor:
        """Logits ``(B, columns)`` of the domain of each sample, of logits of the rows of all layers, ``(B, rows)``."""
        position = self.position[-1:].expand(len(rows), -1) if domains is None else self.position[domains]
        return rows.gather(1, position.clamp(min=0)).masked_fill(position < 0, -torch.inf)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if (saved := state_dict.get(f"{prefix}position")) is not None and saved.ndim == self.position.ndim:
            self.position = self.position.new_zeros(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
