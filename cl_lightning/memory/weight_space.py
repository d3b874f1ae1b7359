"""Arithmetic on the weights of networks: task vectors, rules that merge several of them, and averages of networks.

Weights are given by name. A task vector is the change of the weights by a task, tau_t = theta_t - theta_0 (Ilharco et
al., ICLR 2023, arXiv:2212.04089). A merge rule makes one vector tau of several, and theta_0 + lambda tau is the merged
network. All rules are elementwise or use magnitudes and inner products only, so that the result is the same on every
process where the weights are. Results have the dtype of the weights; sums are computed in at least float32.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from cl_lightning.batch import Draw
from cl_lightning.checks import within
from cl_lightning.losses import full_precision
from cl_lightning.memory.importance import NamedBuffers

Weights = Mapping[str, Tensor]
"""Weights or task vectors by the names of the parameters."""

_DROPPED = 0xDA2E  # salt of the entries that `dropped` draws
_ROUNDING = 1e-6  # of a share of a number of entries: 0.7 * 10 is above 7
_PARALLEL = 0.9995  # cosine above which an arc is replaced by a line


# ---------------------------------------------------------------------- task vectors


def task_vector(weights: Weights, start: Weights) -> dict[str, Tensor]:
    """``tau = theta - theta_0`` for the names of ``start``, without gradient."""
    return {name: (weights[name] - value).detach() for name, value in start.items()}


def shifted(start: Weights, vector: Weights, scale: float = 1.0) -> dict[str, Tensor]:
    """``theta_0 + lambda tau`` for the names of ``start``, without gradient."""
    return {name: (value + scale * vector[name]).detach() for name, value in start.items()}


@torch.no_grad()
def move_towards(slow: Sequence[Tensor], fast: Sequence[Tensor], momentum: float) -> None:
    """``theta_s <- m theta_s + (1 - m) theta_f`` in place, computed in the dtype of theta_s.

    Args:
        slow: theta_s, in at least float32: the updates of an average are too small for half precision.
        fast: theta_f, of the same shapes in the same order.
        momentum: m, in [0, 1].
    """
    moved = [value.detach().to(own.dtype) for own, value in zip(slow, fast, strict=True)]
    torch._foreach_lerp_(list(slow), moved, 1 - momentum)


def _joined(vectors: Sequence[Weights], name: str) -> Tensor:
    """One tensor of all vectors, ``(T, *shape)``, in at least float32."""
    return torch.stack([full_precision(vector[name]) for vector in vectors])


def _of_same_names(owner: str, vectors: Sequence[Weights]) -> None:
    if not vectors:
        raise ValueError(f"{owner}: there are no vectors; give at least one")
    for number, vector in enumerate(vectors):
        if vector.keys() != vectors[0].keys():
            other = min(vector.keys() ^ vectors[0].keys())
            raise ValueError(f"{owner}: vector {number} and the first one do not both have {other!r}; give equal names")


# ---------------------------------------------------------------------- rules


@torch.no_grad()
def average(vectors: Sequence[Weights], shares: Sequence[float] | None = None) -> dict[str, Tensor]:
    """``sum_t w_t tau_t``; w_t = 1 / T without ``shares``, whose sum is 1 in an average."""
    _of_same_names("average", vectors)
    shares = [1 / len(vectors)] * len(vectors) if shares is None else shares
    found = {}
    for name, like in vectors[0].items():
        rows = _joined(vectors, name)
        found[name] = torch.tensordot(rows.new_tensor(shares), rows, dims=1).to(like.dtype)
    return found


@torch.no_grad()
def slerp(first: Weights, second: Weights, share: float) -> dict[str, Tensor]:
    """Spherical interpolation (Shoemake 1985): a point on the arc from ``first`` (share 0) to ``second`` (share 1).

        sin((1 - s) Omega) / sin Omega  a + sin(s Omega) / sin Omega  b,   cos Omega = <a, b> / (|a| |b|)

    Omega is the angle between the vectors as a whole, not of each tensor. Linear interpolation replaces it where
    ``|cos Omega| > 0.9995``, and where one of the vectors is 0.
    """
    _of_same_names("slerp", [first, second])
    length = (_inner(first, first) * _inner(second, second)).sqrt()
    cosine = torch.where(length > 0, _inner(first, second) / length, 1.0)
    angle = cosine.clamp(-_PARALLEL, _PARALLEL).acos()
    on_arc = cosine.abs() <= _PARALLEL
    own = torch.where(on_arc, ((1 - share) * angle).sin() / angle.sin(), 1 - share)
    other = torch.where(on_arc, (share * angle).sin() / angle.sin(), share)
    return {name: (own * value.double() + other * second[name].double()).to(value) for name, value in first.items()}


def _inner(first: Weights, second: Weights) -> Tensor:
    """Inner product over all names, a scalar, float64."""
    return torch.stack([(value.double() * second[name].double()).sum() for name, value in first.items()]).sum()


@torch.no_grad()
def trimmed(vector: Weights, keep: float) -> dict[str, Tensor]:
    """The vector with only its largest magnitudes: all except a share ``keep`` of its entries, over all names, are 0.

    ``ceil(keep n)`` of n entries are kept, and entries of the same magnitude as the smallest of them.
    """
    sizes = torch.cat([full_precision(value).abs().flatten() for value in vector.values()])
    count = max(1, math.ceil(keep * len(sizes) - _ROUNDING))
    least = sizes.kthvalue(len(sizes) - count + 1).values
    return {name: value.where(full_precision(value).abs() >= least, 0.0) for name, value in vector.items()}


@torch.no_grad()
def elected_mean(vectors: Sequence[Weights]) -> dict[str, Tensor]:
    """Elementwise mean over the vectors whose entry has the elected sign, the sign of the sum; 0 where that is 0."""
    _of_same_names("elected_mean", vectors)
    found = {}
    for name, like in vectors[0].items():
        rows = _joined(vectors, name)
        agrees = (rows.sign() == rows.sum(dim=0).sign()) & (rows != 0)
        found[name] = ((rows * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)).to(like)
    return found


@torch.no_grad()
def dropped(vector: Weights, drop: float, *key: int) -> dict[str, Tensor]:
    """Each entry is 0 with probability ``drop``, else divided by ``1 - drop``, so that its expectation is unchanged.

    Args:
        vector: tau.
        drop: Probability in [0, 1).
        key: Key of the random numbers, which are drawn on the CPU: the same on every device and process.
    """
    found = {}
    for number, (name, value) in enumerate(vector.items()):
        kept = Draw.of(value.numel(), _DROPPED, *key, number).rand().view(value.shape) >= drop
        found[name] = value * kept.to(value.device) / (1 - drop)
    return found


@torch.no_grad()
def max_magnitude(vectors: Sequence[Weights]) -> dict[str, Tensor]:
    """The entry of the largest magnitude of all vectors, of several equal ones the last.

    The rule may be applied step by step: ``max_magnitude([max_magnitude(vectors[:-1]), vectors[-1]])`` is the same.
    """
    _of_same_names("max_magnitude", vectors)
    found = dict(vectors[0])
    for vector in vectors[1:]:
        for name, value in vector.items():
            found[name] = torch.where(value.abs() >= found[name].abs(), value, found[name])
    return found


@torch.no_grad()
def without_ends(vector: Weights, low: float, high: float) -> dict[str, Tensor]:
    """Each tensor without its smallest and its largest magnitudes, which are set to 0.

    Of n entries ``floor(low n)`` are the smallest and ``floor(high n)`` the largest. Entries that are as large as the
    smallest or the largest remaining one remain; if nothing would, the median does.
    """
    found = {}
    for name, value in vector.items():
        sizes = full_precision(value).abs()
        n = sizes.numel()
        ordered = sizes.flatten().sort().values
        first = min(math.floor(low * n + _ROUNDING), n - 1)
        last = max(n - 1 - math.floor(high * n + _ROUNDING), first)
        found[name] = value.where((sizes >= ordered[first]) & (sizes <= ordered[last]), 0.0) if n else value
    return found


@torch.no_grad()
def fisher_average(
    weights: Sequence[Weights], importances: Sequence[Weights], shares: Sequence[float], *, epsilon: float = 1e-12
) -> dict[str, Tensor]:
    """Average of networks, elementwise weighted by importances (Matena & Raffel, NeurIPS 2022, arXiv:2111.09832).

        theta = sum_k w_k (F_k + epsilon) theta_k / sum_k w_k (F_k + epsilon)

    It minimises ``sum_k w_k sum_j (F_kj + epsilon) (theta_j - theta_kj)^2``. Weights that not all networks have are
    taken from the last network that has them.

    Args:
        weights: theta_k by name.
        importances: F_k by name, at least 0, of the shape of the weights or scalars, for the names that all have.
        shares: w_k, at least 0, their sum is above 0.
        epsilon: Makes the plain average where all F_k are 0.
    """
    found: dict[str, Tensor] = {}
    for network in weights:
        found.update({name: value.detach() for name, value in network.items()})
    for name in [name for name in found if all(name in network for network in weights)]:
        rows = _joined(weights, name).double()
        factors = [
            w * (F[name].double() + epsilon).expand_as(rows[0]) for w, F in zip(shares, importances, strict=True)
        ]
        portion = torch.stack(factors) / sum(factors)
        found[name] = (portion * rows).sum(dim=0).to(found[name].dtype)
    return found


class MergeRule:
    """A rule that makes one task vector of several; called with them in the order of the tasks.

    Attributes:
        stepwise: Whether merging the merged vector with the next one equals merging all, so that one vector is kept.
    """

    stepwise: ClassVar[bool] = False

    def __call__(self, vectors: Sequence[Weights]) -> dict[str, Tensor]:
        raise NotImplementedError


@dataclass(frozen=True)
class MaxMagnitude(MergeRule):
    """The change of the largest magnitude, elementwise (MagMax: Marczak et al., ECCV 2024, arXiv:2407.06322)."""

    stepwise: ClassVar[bool] = True

    def __call__(self, vectors: Sequence[Weights]) -> dict[str, Tensor]:
        return max_magnitude(vectors)


@dataclass(frozen=True)
class Average(MergeRule):
    """Mean of the vectors: the mean of the networks."""

    def __call__(self, vectors: Sequence[Weights]) -> dict[str, Tensor]:
        return average(vectors)


@dataclass(frozen=True)
class Slerp(MergeRule):
    """Running mean by spherical interpolation: the t-th vector is merged with the ones before it with share 1 / t."""

    def __call__(self, vectors: Sequence[Weights]) -> dict[str, Tensor]:
        merged = dict(vectors[0])
        for number, vector in enumerate(vectors[1:], start=2):
            merged = slerp(merged, vector, 1 / number)
        return merged


@dataclass(frozen=True)
class Ties(MergeRule):
    """Trim, elect sign and merge (TIES-Merging: Yadav et al., NeurIPS 2023, arXiv:2306.01708).

    Attributes:
        keep: Share of the entries of each vector that are kept, in (0, 1].
    """

    keep: float = 0.2

    def __post_init__(self) -> None:
        within(self, "(0, 1]", keep=self.keep)

    def __call__(self, vectors: Sequence[Weights]) -> dict[str, Tensor]:
        return elected_mean([trimmed(vector, self.keep) for vector in vectors])


@dataclass(frozen=True)
class Dare(MergeRule):
    """Mean of the vectors after random entries are dropped (DARE: Yu et al., ICML 2024, arXiv:2311.03099).

    Attributes:
        drop: Probability that an entry is 0, in [0, 1); the others are divided by ``1 - drop``.
        ties: Whether signs are elected and the entries of the elected sign are averaged, as in TIES without trimming.
        seed: Seed of the entries that are dropped.
    """

    drop: float = 0.5
    ties: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        within(self, "[0, 1)", drop=self.drop)

    def __call__(self, vectors: Sequence[Weights]) -> dict[str, Tensor]:
        thinned = [dropped(vector, self.drop, self.seed, task) for task, vector in enumerate(vectors)]
        return elected_mean(thinned) if self.ties else average(thinned)


@dataclass(frozen=True)
class Breadcrumbs(MergeRule):
    """Sum of the vectors without outliers and small changes (Davari & Belilovsky, ECCV 2024, arXiv:2312.06795).

    The defaults of the two shares are our choice.

    Attributes:
        low, high: Shares of the smallest and of the largest entries of each tensor that are set to 0, in [0, 1); their
            sum is below 1.
    """

    low: float = 0.5
    high: float = 0.01

    def __post_init__(self) -> None:
        within(self, "[0, 1)", low=self.low, high=self.high)
        if self.low + self.high >= 1:
            raise ValueError(f"Breadcrumbs: low + high is {self.low + self.high}; it must be below 1")

    def __call__(self, vectors: Sequence[Weights]) -> dict[str, Tensor]:
        return average([without_ends(vector, self.low, self.high) for vector in vectors], [1.0] * len(vectors))


# ---------------------------------------------------------------------- weights of a network


def network_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and floating-point buffers by name: the tensors themselves, without their gradient."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return {name: value.detach() for name, value in tensors.items() if value.is_floating_point()}


@torch.no_grad()
def write_weights(network: nn.Module, weights: Weights) -> None:
    """Copy weights into the parameters and buffers of these names.

    Raises:
        KeyError: If the network has no parameter or buffer of a name.
    """
    tensors = network_tensors(network)
    for name, value in weights.items():
        tensors[name].copy_(value)


class WeightSets(NamedBuffers):
    """Sets of weights by a word for each, such as the weights before the first task; saved with their owner.

    Attributes:
        sets: Number of sets, int64.
    """

    kept_as: ClassVar[str] = "weights"
    sets: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sets", torch.zeros((), dtype=torch.int64))

    def __contains__(self, word: str) -> bool:
        return any(key.startswith(f"{word}/") for key in self._buffers)

    def __getitem__(self, word: str) -> dict[str, Tensor]:
        """The weights of a set by name; empty if there is no such set."""
        return self._get(word)

    def keep(self, word: str, weights: Weights) -> None:
        """Store a copy of ``weights``, in place of an earlier set of this word."""
        self.drop(word)
        for name, value in weights.items():
            self._set(word, name, value)
        self.sets += int(word in self)

    def drop(self, word: str) -> None:
        """Delete a set, if there is one."""
        self.sets -= int(word in self)
        for key in [key for key in self._buffers if key.startswith(f"{word}/")]:
            del self._buffers[key]
