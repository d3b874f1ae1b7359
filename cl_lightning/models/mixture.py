"""Several networks of one architecture, of which one is trained at a time: experts, or components of a mixture."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from cl_lightning.models.backbones import Backbone
from cl_lightning.models.heads import Head
from cl_lightning.models.network import Network


class Mixture(Network):
    """Networks of which the first ``used`` are in use; one is current and gives the mixture its backbone and head.

    All networks exist from the start, so that a change of the current one during a fit adds no parameters. Their heads
    grow together.

    Args:
        members: The networks, at least one; their heads have the same columns.

    Attributes:
        members: The networks.
        place: Number of the current network and number of networks in use, int64 ``(2,)``.
    """

    place: Tensor

    def __init__(self, members: Sequence[Network]) -> None:
        nn.Module.__init__(self)
        self.members = nn.ModuleList(members)
        self.backbone_is_frozen = self.gives_maps = False
        self.register_buffer("place", torch.tensor([0, 1]))
        self._known: tuple[int, int] | None = (0, 1)  # of `place`, which is on the device

    @property
    def backbone(self) -> Backbone:  # type: ignore[override]
        """The backbone of the current network."""
        return cast(Backbone, self._member(self.current).backbone)

    @property
    def head(self) -> Head:  # type: ignore[override]
        """The head of the current network."""
        return self._member(self.current).head

    @property
    def current(self) -> int:
        return self._places()[0]

    @property
    def used(self) -> int:
        return self._places()[1]

    def choose(self, number: int) -> None:
        """Make a network the current one; networks up to this number are in use from then on."""
        self._known = (number, max(self.used, number + 1))
        for place, value in enumerate(self._known):
            self.place[place].fill_(value)

    def grow(self, num_new: int) -> None:
        """Append a block of ``num_new`` columns to each head."""
        for member in self.members:
            cast(Network, member).head.grow(num_new)

    def scores_of(self, images: Tensor) -> Tensor:
        """Scores of each network in use for predictions, ``(used, B, columns)``, of images ``(B, C, H, W)``."""
        return torch.stack([self._member(number).classify(images) for number in range(self.used)])

    def _member(self, number: int) -> Network:
        return cast(Network, self.members[number])

    def _places(self) -> tuple[int, int]:
        if self._known is None:
            current, used = self.place.tolist()
            self._known = (current, used)
        return self._known

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]
        self._known = None
