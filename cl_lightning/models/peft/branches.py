"""A frozen transformer whose first blocks have one PEFT module for all tasks, and whose last blocks one per task."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from cl_lightning.batch import ImageShape
from cl_lightning.models.backbones import Backbone
from cl_lightning.models.peft.base import Peft, blocks_of
from cl_lightning.models.peft.sets import PeftSets, SetNumber

BlockPeft = Callable[[nn.Module, list[int]], Peft]
"""Builds a PEFT module for a model and the indices of its blocks that are adapted."""


class _Given(nn.Module):
    """Returns tokens that were computed before, whatever its input."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, inputs: Tensor) -> Tensor:
        return self.tokens


class PeftBranches(PeftSets):
    """A transformer with a PEFT module in its first blocks, shared by all tasks, and sets in its last blocks.

    Args:
        image_shape: Channels, height, width.
        backbone: Builds the backbone, which contains a ViT of timm.
        shared: Builds the module of the first blocks; called twice.
        peft: Builds a set of the last blocks.
        shared_blocks: Number of first blocks, at least 1 and less than all; None for half of the blocks.

    Attributes:
        shared: The module of the first blocks.
        previous: Its copy of the last :meth:`store_shared`, used in :meth:`early_features` alone.

    Raises:
        ValueError: If the backbone has no such blocks.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        *,
        backbone: Callable[[ImageShape], Backbone],
        shared: BlockPeft,
        peft: BlockPeft,
        shared_blocks: int | None = None,
    ) -> None:
        super().__init__(image_shape, backbone=backbone, peft=self._last_blocks)
        blocks = blocks_of(self.base, None, "PeftBranches")
        count = len(blocks) // 2 if shared_blocks is None else shared_blocks
        if not 1 <= count < len(blocks):
            raise ValueError(
                f"PeftBranches: shared_blocks is {count}; the model has {len(blocks)} blocks, give 1 to "
                f"{len(blocks) - 1}"
            )
        self.owner = (_owner(self.base, blocks),)  # in a tuple, so that it is not registered as a submodule
        self.count, self._last, self._peft = count, list(range(count, len(blocks))), peft
        self.shared, self.previous = (shared(self.base, list(range(count))) for _ in range(2))
        self.previous._enable(False)
        self.store_shared()

    def _last_blocks(self, model: nn.Module) -> Peft:
        return self._peft(model, self._last)

    def store_shared(self) -> None:
        """Copy the state of ``shared`` into ``previous``."""
        self.previous.load_state_dict(self.shared.state_dict())

    def early_features(self, images: Tensor, *, previous: bool = False) -> Tensor:
        """Features ``(B, d)`` of the first blocks, followed by the last norm and the pooling of the model.

        Args:
            images: ``(B, C, H, W)``.
            previous: Whether with the module ``previous`` instead of ``shared``.
        """
        with self._with_blocks(self._blocks[: self.count]):
            if not previous:
                return cast(Tensor, self.base(images))
            with self.shared.replaced_by(self.previous):
                return cast(Tensor, self.base(images))

    def features(self, images: Tensor, numbers: Sequence[SetNumber]) -> Tensor:
        """Features with each of several sets, as in ``PeftSets``; the first blocks are computed once.

        Args:
            images: ``(B, C, H, W)``.
            numbers: Numbers of sets, from 0, negative from the end; None for no set in the last blocks. At least one.

        Returns:
            ``(len(numbers), B, d)``.
        """
        blocks, seen = self._blocks, list[Tensor]()
        handle = blocks[self.count - 1].register_forward_hook(lambda block, inputs, output: seen.append(output))
        try:
            with self._with_blocks(blocks[: self.count]):
                self.base(images)
        finally:
            handle.remove()
        parts = []
        with self._with_blocks(nn.Sequential(_Given(seen[0]), *blocks[self.count :])):
            for number in numbers:
                with self.active(number):
                    parts.append(self.base(images))
        return torch.stack(parts)

    @property
    def _blocks(self) -> nn.Sequential:
        return cast(nn.Sequential, self.owner[0].blocks)

    @contextmanager
    def _with_blocks(self, blocks: nn.Module) -> Iterator[None]:
        """Context manager: inside, the model has other blocks."""
        owner, whole = cast(Any, self.owner[0]), self._blocks
        owner.blocks = blocks
        try:
            yield
        finally:
            owner.blocks = whole


def _owner(model: nn.Module, blocks: list[nn.Module]) -> nn.Module:
    """The part of a model whose attribute ``blocks`` is the sequence of its blocks."""
    for part in model.modules():
        if isinstance(found := getattr(part, "blocks", None), nn.Sequential) and list(found) == blocks:
            return part
    raise ValueError(f"PeftBranches: the blocks of {type(model).__name__} are not one sequence; use a ViT of timm")
