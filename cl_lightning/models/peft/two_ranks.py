"""Two adapters parallel to a layer, one of low and one of high rank, whose shares change from batch to batch."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.checks import at_least
from cl_lightning.models.peft.base import Peft, Site, layers_of


class _Pair(Site):
    """``output + s_l U_l D_l x + s_h U_h D_h x``; for a convolution D is one of the same window, U one of size 1."""

    scales: Tensor

    def __init__(self, host: nn.Linear | nn.Conv2d, ranks: Sequence[int]) -> None:
        super().__init__()
        self.host = (host,)  # in a tuple, so that it is not registered as a submodule
        window = host.weight.shape[1:]
        self.down = nn.ParameterList(nn.Parameter(torch.randn(rank, *window) / rank**2) for rank in ranks)
        self.up = nn.ParameterList(nn.Parameter(torch.zeros(len(host.weight), rank)) for rank in ranks)
        self.register_buffer("scales", torch.ones(len(ranks)))
        self.hook_output(host, self.add)

    def add(self, inputs: Tensor, output: Tensor) -> Tensor:
        [host] = self.host
        for scale, down, up in zip(self.scales, self.down, self.up, strict=True):
            if isinstance(host, nn.Conv2d):
                inner = F.conv2d(inputs, down, None, host.stride, host.padding, host.dilation)
                change = F.conv2d(inner, up[:, :, None, None])
            else:
                change = F.linear(F.linear(inputs, down), up)
            output = output + (scale * change).to(output.dtype)
        return output

    def fold(self) -> None:
        weight = self.host[0].weight
        for scale, down, up in zip(self.scales, self.down, self.up, strict=True):
            weight += scale * (up @ down.flatten(1)).view_as(weight)
            up.zero_()


class TwoRanks(Peft):
    """Adapters of low and of high rank parallel to layers, with scales that are set from outside.

        y = W x + b + s_l U_l D_l x + s_h U_h D_h x,   U (d_out, r) = 0

    The entries of D (r, d_in) are drawn from a normal distribution with standard deviation 1 / r^2. Initially the
    output of the model is unchanged, and s_l = s_h = 1. Next to a convolution, D is a convolution of the same window
    with r channels, and U one of size 1. In Visual Domain Adapter (Liu et al., ICLR 2024, arXiv:2306.04344) the adapter
    of high rank learns what belongs to the present domain, and the adapter of low rank what domains share.

    Args:
        model: Any model with linear layers or convolutions.
        low_rank: r of the first adapter, at least 1.
        high_rank: r of the second adapter, at least 1; it may exceed the width of a layer.
        targets: Patterns of names of layers; the default is the attention of a transformer of timm. None for all linear
            layers and convolutions.

    Raises:
        ValueError: If a rank is out of range, no layer matches, or a convolution has groups or does not pad by zeros.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        low_rank: int = 1,
        high_rank: int = 128,
        targets: Sequence[str] | None = ("*.attn.qkv", "*.attn.proj"),
    ) -> None:
        super().__init__()
        at_least(self, 1, low_rank=low_rank, high_rank=high_rank)
        for host in layers_of(model, (nn.Linear, nn.Conv2d), targets, "TwoRanks"):
            if isinstance(host, nn.Conv2d) and (host.groups > 1 or host.padding_mode != "zeros"):
                raise ValueError(
                    f"TwoRanks: a convolution has {host.groups} groups and pads by {host.padding_mode}; give targets "
                    "without groups that pad by zeros"
                )
            self.sites.append(_Pair(cast(nn.Linear, host), (low_rank, high_rank)))

    @property
    def scales(self) -> Tensor:
        """s_l and s_h, ``(2,)``."""
        return cast(_Pair, self.sites[0]).scales

    @torch.no_grad()
    def set_scales(self, scales: Tensor) -> None:
        """Set s_l and s_h, ``(2,)``, of all layers."""
        for site in self.sites:
            cast(_Pair, site).scales.copy_(scales)

    @torch.no_grad()
    def fold(self) -> None:
        """Add the change to the weights of the layers and set U to 0; the output of the model is unchanged."""
        for site in self.sites:
            cast(_Pair, site).fold()

    def merge(self) -> None:
        self.fold()
        self.remove()
