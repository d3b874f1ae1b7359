"""Head of BARM: a branch for each task, and a background that later branches can only lower."""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_lightning.checks import at_least, one_of
from cl_lightning.models.heads import Head
from cl_lightning.models.pixels import Norm


class BranchOutput(NamedTuple):
    """Output of one branch.

    Attributes:
        ear: Its features ``(B, width, h, w)``.
        background: Background logit b_0 of the first branch, background residual r_t of a later one, ``(B, h, w)``.
        classes: Logits of its classes, without the background, ``(B, classes, h, w)``.
    """

    ear: Tensor
    background: Tensor
    classes: Tensor


class Branch(nn.Module):
    """3x3 convolution with normalisation and ReLU, and a linear classifier of its classes and of the background.

    Args:
        num_features: Channels d of the features.
        width: Channels of the branch.
        num_new: Number of columns that the branch adds; in the first branch the background is the first of them.
        is_first: Whether it is the first branch.
        norm: Normalisation, see ``ConvPixels``.
    """

    def __init__(self, num_features: int, width: int, num_new: int, *, is_first: bool, norm: Norm = "batch") -> None:
        super().__init__()
        self.is_first = is_first
        layer = nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(1, width)
        self.ear = nn.Sequential(nn.Conv2d(num_features, width, 3, padding=1, bias=False), layer, nn.ReLU())
        self.rows = nn.Linear(width, num_new + (not is_first))

    @property
    def weight(self) -> Tensor:
        """Rows of the columns that the branch adds, ``(num_new, width)``."""
        return self.rows.weight if self.is_first else self.rows.weight[1:]

    def forward(self, features: Tensor) -> BranchOutput:
        ear = self.ear(features)
        logits = F.conv2d(ear, self.rows.weight[:, :, None, None], self.rows.bias)
        return BranchOutput(ear, logits[:, 0], logits[:, 1:])


class BackgroundHead(Head):
    """A branch per task; the logit of the background is lowered by the residuals of later branches.

        b = b_0 + sum_{t >= 1} min(r_t, 0)

    Features ``(B, d, h, w)`` to logits ``(B, columns, h, w)`` of independent classes, each with a sigmoid; column 0 is
    the background. A later branch begins with the convolution of the first one (Chen et al., BARM, ECCV 2024,
    arXiv:2407.09838).

    Args:
        num_features: Channels d of the features.
        width: Channels of each branch, at least 1.
        norm: Normalisation of each branch, see ``ConvPixels``.

    Attributes:
        outputs: Output of each branch in the last forward pass.
    """

    for_pixels = True

    def __init__(self, num_features: int, *, width: int = 256, norm: Norm = "batch") -> None:
        super().__init__(num_features)
        at_least(self, 1, width=width)
        one_of(self, ("batch", "group"), norm=norm)
        self.width, self.norm = width, norm
        self.outputs: list[BranchOutput] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "outputs": []}  # a copy of the head has no outputs, which belong to a graph

    def new_block(self, num_new: int) -> nn.Module:
        branch = Branch(self.num_features, self.width, num_new, is_first=not self.blocks, norm=self.norm)
        if self.blocks:
            branch.ear.load_state_dict(cast(Branch, self.blocks[0]).ear.state_dict())
        return branch

    def forward(self, features: Tensor) -> Tensor:
        self.outputs = [branch(features) for branch in self.blocks]
        if not self.outputs:
            return features.new_zeros(len(features), 0, *features.shape[2:])
        background = self.outputs[0].background
        for output in self.outputs[1:]:
            background = background + output.background.clamp(max=0)
        return torch.cat([background[:, None], *(output.classes for output in self.outputs)], dim=1)

    def training_logits(self) -> Tensor:
        """Logits ``(B, columns, h, w)`` of the last forward pass, with gradient for the last branch alone.

        The residual of the last branch is not clamped: ``b = b_0 + sum_{s < t} min(r_s, 0) + r_t``. In the first task
        b = b_0.
        """
        *earlier, last = self.outputs
        if not earlier:
            return torch.cat([last.background[:, None], last.classes], dim=1)
        background = earlier[0].background.detach() + last.background
        for output in earlier[1:]:
            background = background + output.background.detach().clamp(max=0)
        old = (output.classes.detach() for output in earlier)
        return torch.cat([background[:, None], *old, last.classes], dim=1)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        sizes: list[int] = []
        while (rows := state_dict.get(f"{prefix}blocks.{len(sizes)}.rows.weight")) is not None:
            sizes.append(len(rows) - bool(sizes))
        if sizes != self.block_sizes():
            device = self._device()
            with torch.random.fork_rng(devices=[]):  # the initial values are overwritten by the state dict
                self.blocks = nn.ModuleList()
                for size in sizes:
                    self.blocks.append(self.new_block(size).to(device))
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)  # type: ignore[arg-type]
