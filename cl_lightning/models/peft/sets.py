"""A frozen backbone with several PEFT modules, of which one is active."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from cl_lightning.batch import ImageShape
from cl_lightning.models.backbones import Backbone
from cl_lightning.models.peft.base import Peft, PeftFactory

SetNumber = int | Literal["merged"] | None
"""A set of a ``PeftSets``, its merged module, or none of them."""


class PeftSets(Backbone):
    """A backbone with a growing list of PEFT modules of the same kind, its sets; the newest one is active.

    Args:
        image_shape: Channels, height, width.
        backbone: Builds the backbone.
        peft: Builds a PEFT module for a backbone; called for each set.
        merged: Whether there is a further module of the same kind, for parameters that are merged from all sets.

    Attributes:
        base: The backbone.
        sets: The PEFT modules, in order of their creation; empty until :meth:`add` is called.
        merged: The further module, or None.

    Raises:
        ValueError: If the PEFT module trains the model itself (``WholeModel``); raised by :meth:`add` without
            ``merged``.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        *,
        backbone: Callable[[ImageShape], Backbone],
        peft: PeftFactory,
        merged: bool = False,
    ) -> None:
        super().__init__(image_shape)
        self.base = backbone(image_shape)
        self.num_features = self.base.num_features
        self.build_peft = peft
        self.sets = nn.ModuleList()
        self.merged = self._made() if merged else None
        self._activate(None)

    def add(self, *, copied: bool = False) -> None:
        """Append a set, which is active from now on.

        Args:
            copied: Whether it starts from the parameters of the set before it, instead of initial values; no effect
                for the first set.

        Raises:
            ValueError: If the PEFT module trains the model itself (``WholeModel``).
        """
        made = self._made()
        if copied and len(self.sets):
            made.load_state_dict(self.sets[-1].state_dict())
        self.sets.append(made)
        self._activate(len(self.sets) - 1)

    def _made(self) -> Peft:
        made = self.build_peft(self.base)
        if made.trains_model:
            raise ValueError(
                f"PeftSets: {type(made).__name__} trains the model itself, of which there is only one; use Adapter, "
                "LoRA, Prefix or SSF"
            )
        return made.to(next(self.base.parameters(), torch.empty(0)).device)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.base(images)
        return features

    def features(self, images: Tensor, numbers: Sequence[SetNumber]) -> Tensor:
        """Features with each of several sets: one forward pass for each.

        Args:
            images: ``(B, C, H, W)``.
            numbers: Numbers of sets, from 0, negative from the end; None for the backbone without a set, ``merged`` for
                the merged module. At least one.

        Returns:
            ``(len(numbers), B, d)``.
        """
        parts = []
        for number in numbers:
            with self.active(number):
                parts.append(self.base(images))
        return torch.stack(parts)

    def mean_of_earlier(self) -> list[Tensor]:
        """Mean of each parameter over all sets apart from the newest, at least one, as new tensors."""
        *earlier, _ = (list(one.parameters()) for one in self.sets)
        return [torch.stack([value.detach() for value in values]).mean(dim=0) for values in zip(*earlier, strict=True)]

    @contextmanager
    def active(self, number: SetNumber) -> Iterator[None]:
        """Context manager: inside, set ``number`` is active, as in :meth:`features`; at its end the newest one."""
        self._activate(number)
        try:
            yield
        finally:
            self._activate(len(self.sets) - 1)

    def _activate(self, number: SetNumber) -> None:
        chosen: nn.Module | None = None
        if number == "merged":
            chosen = self.merged
        elif number is not None and len(self.sets):
            chosen = self.sets[number]
        for one in [*self.sets, *([] if self.merged is None else [self.merged])]:
            cast(Peft, one)._enable(one is chosen)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        places = {
            key.removeprefix(f"{prefix}sets.").partition(".")[0]
            for key in state_dict
            if key.startswith(f"{prefix}sets.")
        }
        while len(self.sets) > len(places):
            cast(Peft, self.sets[-1]).remove()
            del self.sets[-1]
        with torch.random.fork_rng(devices=[]):  # the initial values are overwritten by the state dict
            while len(self.sets) < len(places):
                self.add()
        self._activate(len(self.sets) - 1)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]


class SideBySide(nn.Module):
    """Features of a ``PeftSets`` with several sets, concatenated: a backbone for a pass of statistics.

    Args:
        sets: The backbone.
        numbers: Numbers of sets, as in ``PeftSets.features``.
    """

    def __init__(self, sets: PeftSets, numbers: Sequence[SetNumber]) -> None:
        super().__init__()
        self.sets, self.numbers = sets, tuple(numbers)
        self.num_features = len(self.numbers) * sets.num_features

    def forward(self, images: Tensor) -> Tensor:
        """``(B, len(numbers) d)`` of images ``(B, C, H, W)``."""
        return torch.cat(list(self.sets.features(images, self.numbers)), dim=1)
