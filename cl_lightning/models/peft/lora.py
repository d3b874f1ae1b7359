"""Low-rank adaptation of linear layers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.checks import at_least
from cl_lightning.models.peft.base import Peft, Site, layers_of


class _LowRank(Site):
    """``output + s B A x`` on chosen parts of the output of a linear layer; all parts have equal size."""

    def __init__(
        self,
        host: nn.Linear,
        rank: int,
        parts: list[bool],
        scale: float,
        learn_scale: bool,
        scale_spread: float,
        orthonormal: bool,
        train_down: bool,
    ) -> None:
        super().__init__()
        size, count = host.out_features // len(parts), sum(parts)
        self.parts, self.host = parts, (host,)  # in a tuple, so that it is not registered as a submodule
        down = torch.empty(count, rank, host.in_features)
        for matrix in down:
            nn.init.orthogonal_(matrix) if orthonormal else nn.init.kaiming_uniform_(matrix, a=5**0.5)
        self.down: Tensor
        if train_down:
            self.down = nn.Parameter(down)
        else:
            self.register_buffer("down", down)
        self.up = nn.Parameter(torch.zeros(count, size, rank))
        self.up_gradient: Tensor | None = None  # factors of the gradient of the rows of B, (count, size)
        self.factor: Tensor  # one for each part
        if learn_scale:
            self.factor = nn.Parameter(torch.full((count,), float(scale)))
            if scale_spread:
                nn.init.uniform_(self.factor, scale - scale_spread, scale + scale_spread)
        else:
            self.register_buffer("factor", torch.full((count,), float(scale)), persistent=False)
        self.share = 1.0  # factor of the change in forward passes
        self.hook_output(host, self.add)

    def add(self, inputs: Tensor, output: Tensor) -> Tensor:
        ups: Tensor = self.up
        if self.up_gradient is not None:
            still = self.up.detach()
            ups = still + self.up_gradient[..., None] * (self.up - still)  # the value is B, exactly
        maps = iter(zip(self.factor, self.down, ups, strict=True))
        pieces = list(output.chunk(len(self.parts), dim=-1))
        for number, chosen in enumerate(self.parts):
            if chosen:
                factor, down, up = next(maps)
                change = factor * F.linear(F.linear(inputs, down), up)
                if self.share != 1.0:
                    change = self.share * change
                pieces[number] = pieces[number] + change.to(output.dtype)
        return torch.cat(pieces, dim=-1)

    def change(self) -> Tensor:
        """``s B A`` as a change of the weight of the layer, ``(d_out, d_in)``; 0 in parts that are not adapted."""
        weight = self.host[0].weight
        maps = iter(zip(self.factor, self.down, self.up, strict=True))
        pieces = list(torch.zeros_like(weight).chunk(len(self.parts)))
        for number, chosen in enumerate(self.parts):
            if chosen:
                factor, down, up = next(maps)
                pieces[number] = factor * up @ down
        return torch.cat(pieces)

    def merge(self) -> None:
        self.host[0].weight += self.change()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}factor")
        if saved is not None and saved.ndim == 0:  # earlier releases had one scale for all parts
            state_dict[f"{prefix}factor"] = saved.expand(len(self.factor))
        super()._load_from_state_dict(state_dict, prefix, *args)


class LoRA(Peft):
    """Low-rank adaptation of linear layers (Hu et al., ICLR 2022, arXiv:2106.09685).

        y = (W + s B A) x + b,   A (r, d_in) from Kaiming's uniform distribution, B (d_out, r) = 0

    r -> rank, s -> scale (alpha / r in the paper). Initially the output of the model is unchanged. ``parts`` selects
    which thirds q, k and v of a fused layer are adapted, each with its own A and B. LAE (Gao et al., ICCV 2023,
    arXiv:2303.10070) uses ``kv``, rank 5, learnt scales and the first five blocks as ``targets``.

    Args:
        model: Any model with linear layers.
        rank: r, at least 1.
        scale: s.
        learn_scale: Whether s is a parameter, one for each adapted part of each layer.
        scale_spread: Initial learnt scales are drawn from U(s - spread, s + spread); at least 0, and 0 without
            ``learn_scale``.
        orthonormal: Whether the initial rows of A are orthonormal; r is then at most d_in.
        train_down: Whether A is trained.
        targets: Patterns of names of linear layers.
        parts: ``qkv`` or some of its letters, for layers with ``d_out = 3 d``; None to adapt the whole output.

    Raises:
        ValueError: If an option is out of range, or no layer matches the targets.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rank: int = 4,
        scale: float = 1.0,
        learn_scale: bool = False,
        scale_spread: float = 0.0,
        orthonormal: bool = False,
        train_down: bool = True,
        targets: Sequence[str] = ("*.attn.qkv",),
        parts: str | None = None,
    ) -> None:
        super().__init__()
        at_least(self, 1, rank=rank)
        at_least(self, 0, scale_spread=scale_spread)
        if scale_spread and not learn_scale:
            raise ValueError(f"LoRA: scale_spread is {scale_spread}, but learn_scale is False; use learn_scale, or 0")
        if parts is not None and (not parts or set(parts) - set("qkv")):
            raise ValueError(f"LoRA: parts is {parts!r}; give letters of qkv, or null for the whole output")
        places = [True] if parts is None else [letter in parts for letter in "qkv"]
        for host in layers_of(model, (nn.Linear,), targets, "LoRA"):
            assert isinstance(host, nn.Linear)
            if host.out_features % len(places):
                raise ValueError(
                    f"LoRA: a layer with {host.out_features} outputs cannot be split into q, k and v; remove parts"
                )
            if orthonormal and rank > host.in_features:
                raise ValueError(
                    f"LoRA: rank is {rank}, but a layer has {host.in_features} inputs, which have no more orthonormal "
                    "rows; use a smaller rank"
                )
            self.sites.append(_LowRank(host, rank, places, scale, learn_scale, scale_spread, orthonormal, train_down))

    def scales(self) -> Tensor:
        """Scales s of all layers, ``(layers, adapted parts)``."""
        return torch.stack([cast(_LowRank, site).factor for site in self.sites])

    def up_weights(self) -> list[Tensor]:
        """B of each layer, ``(adapted parts, d_out / number of parts, r)``."""
        return [cast(_LowRank, site).up for site in self.sites]

    def changes(self) -> list[tuple[nn.Linear, Tensor]]:
        """Each adapted layer with the change ``s B A`` of its weight, ``(d_out, d_in)``; gradients reach A and B."""
        return [(site.host[0], site.change()) for site in (cast(_LowRank, site) for site in self.sites)]

    def weigh(self, share: float) -> None:
        """Multiply the changes by a factor in forward passes from now on; it is not saved, and 1 in a new module."""
        for site in self.sites:
            cast(_LowRank, site).share = share

    @contextmanager
    def scaled_gradients(self, factors: Sequence[Tensor]) -> Iterator[None]:
        """Context manager: a forward pass inside computes the same, but its gradient of B is multiplied row by row.

        Args:
            factors: Factors of the rows of B for each layer, ``(adapted parts, d_out / number of parts)``.
        """
        for site, factor in zip(self._sites(), factors, strict=True):
            cast(_LowRank, site).up_gradient = factor
        try:
            yield
        finally:
            for site in self._sites():
                cast(_LowRank, site).up_gradient = None

    @torch.no_grad()
    def fold(self) -> None:
        """Add the change to the weights of the layers and set B to 0; the output of the model is unchanged."""
        for site in self.sites:
            cast(_LowRank, site).merge()
            cast(_LowRank, site).up.zero_()

    def merge(self) -> None:
        self.fold()
        self.remove()
