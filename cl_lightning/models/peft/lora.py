"""Low-rank adaptation of linear layers."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.checks import at_least
from cl_lightning.models.peft.base import Peft, Site, layers_of


class _LowRank(Site):
    """``output + s B A x`` on chosen parts of the output of a linear layer; all parts have equal size."""

    def __init__(self, host: nn.Linear, rank: int, parts: list[bool], scale: float, learn_scale: bool) -> None:
        super().__init__()
        size, count = host.out_features // len(parts), sum(parts)
        self.parts, self.host = parts, (host,)  # in a tuple, so that it is not registered as a submodule
        self.down = nn.Parameter(torch.empty(count, rank, host.in_features))
        self.up = nn.Parameter(torch.zeros(count, size, rank))
        for matrix in self.down:
            nn.init.kaiming_uniform_(matrix, a=5**0.5)
        self.factor: Tensor  # one for each part
        if learn_scale:
            self.factor = nn.Parameter(torch.full((count,), float(scale)))
        else:
            self.register_buffer("factor", torch.full((count,), float(scale)), persistent=False)
        self.hook_output(host, self.add)

    def add(self, inputs: Tensor, output: Tensor) -> Tensor:
        maps = iter(zip(self.factor, self.down, self.up, strict=True))
        pieces = list(output.chunk(len(self.parts), dim=-1))
        for number, chosen in enumerate(self.parts):
            if chosen:
                factor, down, up = next(maps)
                change = factor * F.linear(F.linear(inputs, down), up)
                pieces[number] = pieces[number] + change.to(output.dtype)
        return torch.cat(pieces, dim=-1)

    def merge(self) -> None:
        weight = self.host[0].weight
        places = [number for number, chosen in enumerate(self.parts) if chosen]
        size = len(weight) // len(self.parts)
        for number, factor, down, up in zip(places, self.factor, self.down, self.up, strict=True):
            weight[number * size : (number + 1) * size] += factor * up @ down

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
        targets: Sequence[str] = ("*.attn.qkv",),
        parts: str | None = None,
    ) -> None:
        super().__init__()
        at_least(self, 1, rank=rank)
        if parts is not None and (not parts or set(parts) - set("qkv")):
            raise ValueError(f"LoRA: parts is {parts!r}; give letters of qkv, or null for the whole output")
        places = [True] if parts is None else [letter in parts for letter in "qkv"]
        for host in layers_of(model, (nn.Linear,), targets, "LoRA"):
            assert isinstance(host, nn.Linear)
            if host.out_features % len(places):
                raise ValueError(
                    f"LoRA: a layer with {host.out_features} outputs cannot be split into q, k and v; remove parts"
                )
            self.sites.append(_LowRank(host, rank, places, scale, learn_scale))

    @torch.no_grad()
    def merge(self) -> None:
        for site in self.sites:
            cast(_LowRank, site).merge()
        self.remove()
