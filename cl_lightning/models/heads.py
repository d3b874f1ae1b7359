"""Classifiers that grow by one block of columns per task.

When a head grows, its existing parameters stay the same objects: optimizer state, Fisher information and moving
averages that refer to them stay valid. A head is resized to the shape of the state dict that it loads.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import mix
from cl_lightning.checks import above, at_least
from cl_lightning.losses import full_precision
from cl_lightning.models.kmeans import kmeans


def _num_blocks(state: Mapping[str, Any], prefix: str) -> list[int]:
    """Number of columns of each block in a state dict under ``prefix``."""
    sizes: list[int] = []
    while (weight := state.get(f"{prefix}blocks.{len(sizes)}.weight")) is not None:
        sizes.append(weight.shape[0])
    return sizes


class Head(nn.Module):
    """Base class of heads: features to one logit per class seen so far.

    Subclasses define a block (``new_block``) and how logits are computed from the blocks (``forward``).

    Args:
        num_features: Size of a feature vector, d.
    """

    needs_statistics = False
    """Whether the head is fitted on the task's features at the end of a task (``fit_features``)."""
    needs_all_rows: bool = False
    """Whether ``fit_features`` receives the features of all processes, in data set order, instead of a share."""

    for_pixels: ClassVar[bool] = False
    """Whether features are maps ``(B, d, h, w)`` and logits ``(B, columns, h, w)``, for classes of pixels."""

    needs_names: bool = False
    """Whether the head is given the names of its classes when it has grown (``fill_names``)."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.blocks = nn.ModuleList()

    def new_block(self, num_new: int) -> nn.Module:
        """Block of ``num_new`` columns; its parameter ``weight`` is ``(num_new, d)``."""
        raise NotImplementedError

    def grow(self, num_new: int) -> None:
        """Append a block of ``num_new`` columns; no effect for 0."""
        if num_new > 0:
            self._append(self.new_block(num_new))

    @torch.no_grad()
    def reset_shared(self, build: Callable[[int], "Head"]) -> None:
        """Set the parameters outside the blocks, such as a learnt scale, to the initial values of a new head.

        Args:
            build: Builds a head of the same kind for a number of features.
        """
        initial = build(self.num_features).parameters(recurse=False)
        for own, value in zip(self.parameters(recurse=False), initial, strict=True):
            own.copy_(value)

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
        """Logits ``(B, columns)`` for the training loss, of features ``(B, d)``."""
        raise NotImplementedError

    def classify(self, features: Tensor) -> Tensor:
        """Scores ``(B, columns)`` for predictions, of features ``(B, d)``; by default the logits.

        Computed in float32 under mixed precision too: in bf16, with 8 bits of precision, the two largest logits of many
        samples are equal, and the first class would be predicted.
        """
        with torch.autocast(features.device.type, enabled=False):
            logits: Tensor = self(full_precision(features))
        return logits

    def fit_features(self, features: Tensor, labels: Tensor) -> None:
        """Fit the head on the features of the current task at its end; called if ``needs_statistics`` is True.

        Args:
            features: Features of un-augmented images, ``(n, d)``: the share of this process, or all with
                ``needs_all_rows``.
            labels: Columns, int64 ``(n,)``; -1 for unlabelled samples.
        """

    def embed(self, features: Tensor) -> Tensor:
        """Vectors ``(B, e)`` that are compared with the rows of the classes, of features ``(B, d)``; by default the
        features. A head with a projection returns the projected features."""
        return features

    def check_room(self, num_classes: int) -> None:
        """Check that the head can have a column for each class of a stream; called before each task.

        Args:
            num_classes: Number of classes of all tasks.

        Raises:
            ValueError: If the head has a fixed size that is too small.
        """

    def fill_names(self, names: Sequence[str]) -> None:
        """Set the rows of the classes from their names; called after :meth:`grow` if ``needs_names`` is True.

        Args:
            names: Name of each column, in order.

        Raises:
            ValueError: If there is no row for a name.
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
            with torch.random.fork_rng(devices=[]):  # the initial values are overwritten by the state dict
                self.blocks = nn.ModuleList(self.new_block(size).to(device) for size in sizes)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]


class LinearHead(Head):
    """Linear classifier with one ``nn.Linear`` per task: logits ``W f + b``, ``(B, d)`` to ``(B, columns)``.

    Args:
        num_features: Size of a feature vector, d.
        bias: Whether each class has a bias.
        init_std: Standard deviation of the initial weights of new classes, with biases 0; None for torch's default.

    Raises:
        ValueError: If ``init_std`` is negative.
    """

    def __init__(self, num_features: int, *, bias: bool = True, init_std: float | None = None) -> None:
        super().__init__(num_features)
        if init_std is not None and init_std < 0:
            raise ValueError(f"{type(self).__name__}: init_std is {init_std}; give at least 0, or null for the default")
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
        # One matrix product for all blocks: the cost of a step grows with the number of classes, not of tasks.
        bias = torch.cat([cast(Tensor, block.bias) for block in self.blocks]) if self.bias else None
        return F.linear(features, self.weight(), bias)

    @torch.no_grad()
    def resize(self, num_features: int) -> None:
        """Change the number of input features; weights of the features that remain, and all biases, are kept.

        New features are appended, with weights drawn as for a new block from torch's global generator. The parameters
        become new objects: call it between two fits.

        Args:
            num_features: New size of a feature vector, d.
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
    """Scale the weights of new classes to the mean norm of the old ones (Weight Aligning: Zhao et al., CVPR 2020).

        gamma = mean_c ||w_c||, c old  /  mean_c ||w_c||, c new,    w_c <- gamma w_c for new c

    Idempotent: gamma is 1 for rows that are aligned already. Computed in float64.

    Args:
        old: Rows of old classes, ``(C_old, d)``, at least one.
        new: Rows of new classes, ``(C_new, d)``.

    Returns:
        The scaled rows of new classes, ``(C_new, d)``; unscaled if all old or all new rows are 0.
    """
    length, own = (rows.double().norm(dim=1).mean() for rows in (old, new))
    gamma = torch.where((length > 0) & (own > 0), length / own, 1.0)
    return (gamma * new.double()).to(new.dtype)


@torch.no_grad()
def align_head(head: Head) -> None:
    """Apply :func:`align_rows` to the newest block of a linear head, in place; no effect with a single block.

    Biases are unchanged. All processes hold the same rows, so the result is the same on every process.

    Raises:
        ValueError: If the head is not a ``LinearHead``: in a cosine classifier, the norm of a row does not scale its
            logit.
    """
    if not isinstance(head, LinearHead):
        raise ValueError(f"weight alignment: head is a {type(head).__name__}; use a LinearHead")
    if len(head.blocks) > 1:
        *old, new = head._weights()
        new.copy_(align_rows(torch.cat(old), new))


class FixedBlock(nn.Module):
    """Rows of classes that are not trained; zeros until they are filled."""

    weight: Tensor

    def __init__(self, num_features: int, num_new: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(num_new, num_features))


class _VectorBlock(nn.Module):
    def __init__(self, num_features: int, num_new: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_new, num_features))


def distances(features: Tensor, vectors: Tensor) -> Tensor:
    """Euclidean distances of ``features (B, d)`` and ``vectors (C, d)``, ``(B, C)``, at least float32.

    From differences, not from inner products, whose rounding is larger and depends on the number of rows.
    """
    with torch.autocast(features.device.type, enabled=False):
        features = full_precision(features)
        return torch.cdist(features, vectors.to(features.dtype), compute_mode="donot_use_mm_for_euclid_dist")


class DistanceHead(Head):
    """Learnt vector of each class: logits ``-||f - w_c||``; predictions compare directions, ``-||f/|f| - w_c/|w_c|||``.

    Initial vectors are standard normal (coding vectors of NAPA-VQ: Malepathirana et al., ICCV 2023, arXiv:2308.09297).

    Args:
        num_features: Size of a feature vector, d.
    """

    def new_block(self, num_new: int) -> nn.Module:
        return _VectorBlock(self.num_features, num_new)

    def forward(self, features: Tensor) -> Tensor:
        if not self.blocks:
            return features.new_zeros(len(features), 0)
        return -distances(features, self.weight())

    def classify(self, features: Tensor) -> Tensor:
        if not self.blocks:
            return features.new_zeros(len(features), 0)
        return -distances(F.normalize(full_precision(features), dim=1), F.normalize(self.weight(), dim=1))


class _CosineBlock(nn.Module):
    def __init__(self, num_features: int, num_new: int, proxies: int) -> None:
        super().__init__()
        shape = (num_new, num_features) if proxies == 1 else (num_new, proxies, num_features)
        self.weight = nn.Parameter(torch.empty(shape))
        with torch.no_grad():
            nn.init.kaiming_uniform_(self.weight.view(-1, num_features), a=math.sqrt(5))


class CosineHead(Head):
    """Cosine classifier (Hou et al., LUCIR, CVPR 2019, eq. 4): logits ``scale * cos(f, w_c)``.

    With several proxies of a class (Douillard et al., PODNet, ECCV 2020, arXiv:2004.13513, eq. 5) the cosine is
    replaced by their local similarity, the mean of their cosines weighted by a softmax over these cosines:

        s_c = sum_p q_cp cos(f, w_cp),   q_cp = exp cos(f, w_cp) / sum_p' exp cos(f, w_cp')

    Args:
        num_features: Size of a feature vector, d.
        scale: Factor of the cosines, positive.
        learn_scale: Whether the scale is a parameter, as in LUCIR, or fixed.
        proxies: P, number of rows of each class, at least 1; a block has the weight ``(num_new, d)`` for 1 and
            ``(num_new, P, d)`` for more.

    Raises:
        ValueError: If the scale is not positive, or there is no proxy.
    """

    def __init__(self, num_features: int, *, scale: float = 16.0, learn_scale: bool = False, proxies: int = 1) -> None:
        super().__init__(num_features)
        above(self, 0, scale=scale)
        at_least(self, 1, proxies=proxies)
        self.proxies = proxies
        value = torch.tensor(float(scale))
        self.scale: Tensor
        if learn_scale:
            self.scale = nn.Parameter(value)
        else:
            self.register_buffer("scale", value)

    def new_block(self, num_new: int) -> nn.Module:
        return _CosineBlock(self.num_features, num_new, self.proxies)

    def forward(self, features: Tensor) -> Tensor:
        if not self.blocks:
            return features.new_zeros(len(features), 0)
        with torch.autocast(features.device.type, enabled=False):  # cosines near 1 differ by less than bf16 resolves
            directions = F.normalize(full_precision(features), dim=1)
            cosines = F.linear(directions, F.normalize(self.weight().view(-1, self.num_features), dim=1))
            if self.proxies > 1:
                cosines = cosines.view(len(features), -1, self.proxies)
                cosines = (cosines.softmax(dim=2) * cosines).sum(dim=2)
            return self.scale * cosines

    @torch.no_grad()
    def imprint(self, features: Tensor, labels: Tensor, *, key: int = 0) -> None:
        """Set the rows of the newest block to directions of the features of their classes (Hou et al., sec. 3.3).

        The row of a class is the mean of its normalised features; several proxies are their centres by :func:`kmeans`.
        All are scaled to the mean norm of the rows of the earlier blocks, or of the newest block if it is the only one.
        Rows of a class without features are unchanged. Computed in float64.

        Args:
            features: ``(n, d)``, of all processes, so that the rows are the same on each.
            labels: Columns, int64 ``(n,)``; features of classes of earlier blocks are not used.
            key: Key of the random numbers of k-means.
        """
        *earlier, newest = self._weights()
        norm = torch.cat(earlier or [newest]).double().norm(dim=-1).mean()
        first = self.num_columns - len(newest)
        for place in range(len(newest)):
            rows = F.normalize(features[labels == first + place].double(), dim=1)
            if len(rows):
                centres = kmeans(rows, self.proxies, key=mix(key, first + place))
                newest[place] = (norm * F.normalize(centres, dim=1)).view(newest[place].shape)


class Pairs(nn.Module):
    """Two numbers per task, such as the scale and the shift of its logits; loading a state dict sets their number.

    Args:
        initial: The pair of a new task, such as (1, 0) for a scale and a shift.

    Attributes:
        values: A parameter ``(2,)`` per task.
    """

    def __init__(self, initial: tuple[float, float] = (1.0, 0.0)) -> None:
        super().__init__()
        self.initial = initial
        self.values = nn.ParameterList()

    def grow(self) -> None:
        """Append the pair of a new task."""
        like = next(self.parameters(), torch.empty(0))
        self.values.append(nn.Parameter(torch.tensor(self.initial, device=like.device)))

    def clear(self) -> None:
        """Remove all pairs."""
        self.values = nn.ParameterList()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        saved = sum(name.startswith(f"{prefix}values.") for name in state_dict)
        self.values = nn.ParameterList(list(self.values)[:saved])
        while len(self.values) < saved:
            self.grow()
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]
