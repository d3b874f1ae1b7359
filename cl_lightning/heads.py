"""Classifiers that grow by one block of columns per task.

Old parameters stay the same objects when a head grows, so that whatever was computed for them (optimizer state, Fisher
information, a moving average) still points at them. A head takes its shape from the state dict that it loads.
"""

import math
from collections.abc import Mapping
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.prototypes import Metric, Prototypes


def _num_blocks(state: Mapping[str, Any], prefix: str) -> list[int]:
    """Number of columns of each block that a state dict holds under ``prefix``."""
    sizes: list[int] = []
    while (weight := state.get(f"{prefix}blocks.{len(sizes)}.weight")) is not None:
        sizes.append(weight.shape[0])
    return sizes


class Head(nn.Module):
    """Maps features to one logit per class seen so far.

    Subclasses say what a block is (``new_block``) and how logits come from the blocks (``forward``).

    Args:
        num_features: Size of a feature vector, d.
    """

    needs_statistics = False
    """Whether the head learns from a pass over the task's features at the end of a task (``fit_features``)."""
    needs_all_rows: bool = False
    """Whether each process gives ``fit_features`` the features of all, in the order of the data set, not its share."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.blocks = nn.ModuleList()

    def new_block(self, num_new: int) -> nn.Module:
        """Block of ``num_new`` columns; its parameter ``weight`` is ``(num_new, d)``."""
        raise NotImplementedError

    def grow(self, num_new: int) -> None:
        """Append a block of ``num_new`` columns; with 0 nothing happens."""
        if num_new > 0:
            self._append(self.new_block(num_new))

    def block_sizes(self) -> list[int]:
        return [weight.shape[0] for weight in self._weights()]

    @property
    def num_columns(self) -> int:
        """Number of classes seen so far."""
        return sum(self.block_sizes())

    def weight(self) -> Tensor:
        """Rows of all blocks, ``(columns, d)``."""
        return torch.cat(self._weights())

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(B, columns)`` that are trained, of features ``(B, d)``."""
        raise NotImplementedError

    def classify(self, features: Tensor) -> Tensor:
        """Scores ``(B, columns)`` that predictions are made of; the logits unless a head has something else."""
        logits: Tensor = self(features)
        return logits

    def fit_features(self, features: Tensor, labels: Tensor) -> None:
        """Learn from the features of the task that ends; asked for where ``needs_statistics``.

        Args:
            features: Un-augmented features of this process's share, ``(n, d)``; of all with ``needs_all_rows``.
            labels: Their columns, int64 ``(n,)``.
        """

    def _weights(self) -> list[Tensor]:
        return [cast(Tensor, block.weight) for block in self.blocks]

    def _append(self, block: nn.Module) -> None:
        self.blocks.append(block.to(self._device()))

    def _device(self) -> torch.device:
        like = next(chain(self.parameters(), self.buffers()), None)
        return torch.device("cpu") if like is None else like.device

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        sizes = _num_blocks(state_dict, prefix)
        if sizes != self.block_sizes():
            device = self._device()
            with torch.random.fork_rng(devices=[]):  # the values drawn here are overwritten at once
                self.blocks = nn.ModuleList(self.new_block(size).to(device) for size in sizes)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]


class LinearHead(Head):
    """A linear classifier, one ``nn.Linear`` per task; logits ``W f + b``.

    Args:
        num_features: Size of a feature vector, d.
        bias: Whether each class has a bias.
        init_std: Standard deviation of new rows, whose biases begin at 0; None for torch's default.
    """

    def __init__(self, num_features: int, *, bias: bool = True, init_std: float | None = None) -> None:
        super().__init__(num_features)
        if init_std is not None and init_std < 0:
            raise ValueError(f"{type(self).__name__}: init_std is {init_std}; it must be at least 0, or null")
        self.bias, self.init_std = bias, init_std

    def new_block(self, num_new: int) -> nn.Module:
        block = nn.Linear(self.num_features, num_new, bias=self.bias)
        if self.init_std is not None:
            nn.init.normal_(block.weight, std=self.init_std)
            if self.bias:
                nn.init.zeros_(block.bias)
        return block

    def forward(self, features: Tensor) -> Tensor:
        if not self.blocks:
            return features.new_zeros(len(features), 0)
        # One product for all blocks: the cost of a step does not grow with the number of tasks, only of classes.
        bias = torch.cat([cast(Tensor, block.bias) for block in self.blocks]) if self.bias else None
        return F.linear(features, self.weight(), bias)

    @torch.no_grad()
    def resize(self, num_features: int) -> None:
        """Take another number of features; those that it took come first, and their weights and the biases stay.

        Weights of further features are drawn as those of a new block, from torch's global generator. The parameters
        are new ones: do it between two fits.
        """
        kept, self.num_features = min(self.num_features, num_features), num_features
        for number, block in enumerate(list(self.blocks)):
            rows = cast(Tensor, block.weight)
            wide = cast(nn.Linear, self.new_block(len(rows)).to(rows))
            wide.weight[:, :kept] = rows[:, :kept]
            if self.bias:
                wide.bias.copy_(cast(Tensor, block.bias))
            self.blocks[number] = wide

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        weight = state_dict.get(f"{prefix}blocks.0.weight")
        if weight is not None and weight.shape[1] != self.num_features:
            with torch.random.fork_rng(devices=[]):
                self.resize(weight.shape[1])
        super()._load_from_state_dict(state_dict, prefix, *args)


@torch.no_grad()
def align_rows(old: Tensor, new: Tensor) -> Tensor:
    """Scale new rows of a classifier to the norm of the old ones (Weight Aligning: Zhao et al., CVPR 2020).

        gamma = mean_c ||w_c||, c old  /  mean_c ||w_c||, c new,    w_c <- gamma w_c for new c

    Doing it twice changes nothing more. Computed in float64.

    Args:
        old: Rows of earlier classes, ``(C_old, d)``, at least one.
        new: Rows of new classes, ``(C_new, d)``.

    Returns:
        The scaled new rows, ``(C_new, d)``; unscaled where old or new ones are all 0.
    """
    length, own = (rows.double().norm(dim=1).mean() for rows in (old, new))
    gamma = torch.where((length > 0) & (own > 0), length / own, 1.0)
    return (gamma * new.double()).to(new.dtype)


@torch.no_grad()
def align_head(head: Head) -> None:
    """Apply :func:`align_rows` to the newest block of a linear head, in place; nothing for the first block.

    Biases stay. The processes of a distributed run hold the same rows, and so give the same result.

    Raises:
        ValueError: If the length of a row is not the scale of its logit, as in a cosine classifier.
    """
    if not isinstance(head, LinearHead):
        raise ValueError(f"weight alignment: the head is a {type(head).__name__}; only a LinearHead can be aligned")
    if len(head.blocks) > 1:
        *old, new = head._weights()
        new.copy_(align_rows(torch.cat(old), new))


class _CosineBlock(nn.Module):
    def __init__(self, num_features: int, num_new: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_new, num_features))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))


class CosineHead(Head):
    """Cosine classifier (Hou et al., LUCIR, CVPR 2019, eq. 4): logits ``scale * cos(f, w_c)``.

    Args:
        num_features: Size of a feature vector, d.
        scale: Factor of the cosines, positive.
        learn_scale: Whether the scale is a parameter, as in LUCIR, or stays fixed.
    """

    def __init__(self, num_features: int, *, scale: float = 16.0, learn_scale: bool = False) -> None:
        super().__init__(num_features)
        if scale <= 0:
            raise ValueError(f"CosineHead: scale is {scale}; it must be positive")
        value = torch.tensor(float(scale))
        self.scale: Tensor
        if learn_scale:
            self.scale = nn.Parameter(value)
        else:
            self.register_buffer("scale", value)

    def new_block(self, num_new: int) -> nn.Module:
        return _CosineBlock(self.num_features, num_new)

    def forward(self, features: Tensor) -> Tensor:
        if not self.blocks:
            return features.new_zeros(len(features), 0)
        return self.scale * F.linear(F.normalize(features, dim=1), F.normalize(self.weight(), dim=1))


class PrototypeHead(LinearHead):
    """Nearest class mean (NCM) at test time, over a linear head that trains the features.

    The logits that are trained are the linear ones; predictions come from the distance to the class means, which are
    taken from the un-augmented features of each class when its task ends (Rebuffi et al., iCaRL, CVPR 2017, sec. 3.1,
    with all images in place of exemplars). The means of earlier classes stay where they were: see
    ``cl_lightning.callbacks.DriftCompensation``. Classes whose means are not known yet are never predicted.

    Args:
        num_features: Size of a feature vector, d.
        metric: ``euclidean``: scores are minus squared distances; ``cosine``: scores are cosines.
        bias: Whether the linear classifier has biases.
    """

    needs_statistics = True

    def __init__(self, num_features: int, *, metric: Metric = "cosine", bias: bool = True) -> None:
        super().__init__(num_features, bias=bias)
        self.metric: Metric = metric
        self.prototypes = Prototypes(num_features)

    def classify(self, features: Tensor) -> Tensor:
        return self.prototypes.scores(features, self.num_columns, self.metric)

    def fit_features(self, features: Tensor, labels: Tensor) -> None:
        self.prototypes.update(features, labels, num_classes=self.num_columns)
