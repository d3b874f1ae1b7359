"""Prefixes that all tasks share, and prefixes of each task, selected by the query (DualPrompt)."""

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from cl_lightning.checks import at_least
from cl_lightning.models.growing import GrowingParameters
from cl_lightning.models.peft.base import _part, _width, blocks_of
from cl_lightning.models.peft.tokens import PrefixSite
from cl_lightning.models.prompts import KeyedPrompts


class ExpertPrompts(KeyedPrompts):
    """General prefixes, and an expert per task with a key (DualPrompt: Wang et al., ECCV 2022, arXiv:2204.04799).

        K' = [K; g_K],      V' = [V; g_V]         in the general blocks, g shared by all tasks
        K' = [K; e_K^s],    V' = [V; e_V^s]       in the expert blocks, s = argmax_t cos(q, k_t)

    A block may be of both kinds. In training passes all samples use the newest expert, whose key alone is matched.

    Args:
        model: Contains the blocks of a ViT of timm.
        general_length: Number of general keys, and of values, of a block; 0 for none.
        general_blocks: Indices of the blocks with general prefixes.
        expert_length: Number of keys, and of values, of an expert in a block, at least 1.
        expert_blocks: Indices of the blocks with experts.
        low: Lower bound of the uniform initialisation of prefixes and keys.
        high: Upper bound of the uniform initialisation.

    Attributes:
        general: g, ``(general blocks, 2, length, d)``, keys before values; None without.
        experts: e^t of each task, ``(expert blocks, 2, length, d)``.
        keys: k_t of each task, ``(d,)``.
        choice: Expert ``(B,)`` of each sample of the next pass, or ``()`` for all; None for own selection.

    Raises:
        ValueError: If an option is out of range or the model has no such blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        general_length: int = 5,
        general_blocks: Sequence[int] = (0, 1),
        expert_length: int = 5,
        expert_blocks: Sequence[int] = (2, 3, 4),
        low: float = 0.0,
        high: float = 0.01,
    ) -> None:
        super().__init__()
        at_least(self, 0, general_length=general_length)
        at_least(self, 1, expert_length=expert_length)
        if low > high:
            raise ValueError(f"ExpertPrompts: low is {low}; it must be at most high, which is {high}")
        general = blocks_of(model, general_blocks, "ExpertPrompts") if general_length else []
        expert = blocks_of(model, expert_blocks, "ExpertPrompts")
        self.low, self.high, self.width = low, high, _width(expert[0])
        self._shape = (len(expert), 2, expert_length, self.width)
        size = (len(general), 2, general_length, self.width)
        self.general = nn.Parameter(torch.empty(size).uniform_(low, high)) if general else None
        self.experts, self.keys = GrowingParameters(), GrowingParameters()
        blocks = list(dict.fromkeys([*general, *expert]))
        self.sites.extend(PrefixSite(_part(block, "attn")) for block in blocks)
        self._general_at, self._expert_at = ([blocks.index(block) for block in chosen] for chosen in (general, expert))
        self._enable(False)

    def grow(self) -> None:
        """Add an expert, a copy of the newest one, and a key that is drawn."""
        like = next(self.parameters(), torch.empty(0))
        drawn = (torch.empty(shape, dtype=like.dtype).uniform_(self.low, self.high) for shape in self._shapes())
        first, key = (values.to(like.device) for values in drawn)
        self.experts.append(self.experts[-1] if len(self.experts) else first)
        self.keys.append(key)

    def settled(self) -> Iterator[nn.Parameter]:
        return (parameter for group in (self.experts, self.keys) for parameter in list(group)[:-1])

    def key_rows(self) -> Tensor:
        return torch.stack(list(self.keys))

    def select(self, query: Tensor) -> Tensor:
        """Experts ``(B,)`` whose keys are nearest to queries ``(B, d)``."""
        return self.similarity(query).argmax(dim=1)

    def answer(self, query: Tensor) -> None:
        if self.training and torch.is_grad_enabled():
            self._matched = self.similarity(query)[:, -1].mean()
            experts: Tensor = self.experts[-1]
        else:
            self._matched = None
            chosen = self.select(query) if self.choice is None else self.choice
            experts = torch.stack(list(self.experts))[chosen]  # ([B,] blocks, 2, L, d)
        rows: list[list[Tensor]] = [[] for _ in self.sites]
        for at, expert in zip(self._expert_at, experts.unbind(dim=-4), strict=True):
            rows[at].append(expert)
        for at, general in zip(self._general_at, self.general if self.general is not None else (), strict=True):
            rows[at].append(general.expand(*experts.shape[:-4], -1, -1, -1))
        for site, parts in zip(self.sites, rows, strict=True):
            place = cast(PrefixSite, site)
            place.keys, place.values = torch.cat(parts, dim=-2).unbind(dim=-3)

    def forget(self) -> None:
        super().forget()
        for site in self.sites:
            place = cast(PrefixSite, site)
            place.keys = place.values = torch.empty(0)

    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self._shape, (self.width,)
