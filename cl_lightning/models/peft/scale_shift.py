"""Scales and shifts of features: SSF and FiLM."""

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cl_lightning.checks import at_least
from cl_lightning.models.peft.base import Peft, Site, layers_of

_NORMS = (nn.LayerNorm, nn.GroupNorm, _BatchNorm)


class _ScaleShift(Site):
    """``gamma * output + beta`` per channel."""

    def __init__(self, host: nn.Module, spread: float) -> None:
        super().__init__()
        self.host = (host,)  # in a tuple, so that it is not registered as a submodule
        channels = _channels(host)
        self.gamma = nn.Parameter(1 + spread * torch.randn(channels))
        self.beta = nn.Parameter(spread * torch.randn(channels))
        self.last = not isinstance(host, (nn.Conv2d, _BatchNorm, nn.GroupNorm)) and not type(host).__name__.endswith(
            "2d"
        )
        # timm's BatchNormAct2d includes the activation; the input of the activation is the output of `drop`.
        inner = getattr(host, "drop", None) if hasattr(host, "act") else None
        self.hook_output(inner if isinstance(inner, nn.Module) else host, self.scale)

    def scale(self, inputs: Tensor, output: Tensor) -> Tensor:
        shape = (-1,) if self.last else (-1, *[1] * (output.ndim - 2))
        return (output * self.gamma.view(shape) + self.beta.view(shape)).to(output.dtype)

    def merge(self) -> None:
        host = cast(Any, self.host[0])
        if host.weight is None:
            raise ValueError(f"{type(host).__name__} has no weights to merge a scale into; exclude it with targets")
        host.weight.mul_(self.gamma.view(-1, *[1] * (host.weight.ndim - 1)))
        if host.bias is None:
            host.bias = nn.Parameter(self.beta.detach().clone().to(host.weight))
        else:
            host.bias.mul_(self.gamma).add_(self.beta)


def _channels(layer: nn.Module) -> int:
    for name in ("out_features", "out_channels", "num_features", "num_channels"):
        if isinstance(size := getattr(layer, name, None), int):
            return size
    return cast(nn.LayerNorm, layer).normalized_shape[-1]


class SSF(Peft):
    """Scale and shift per channel after each layer (Lian et al., NeurIPS 2022, arXiv:2210.08823).

        y = gamma * x + beta,   gamma ~ N(1, spread^2), beta ~ N(0, spread^2)

    after each linear layer, convolution and normalisation layer: in a ViT after the patch embedding, LN1, the fused
    qkv, the projection of the attention, LN2, both layers of the MLP and the last norm. With ``spread=0`` the initial
    output of the model is unchanged, with a small spread it is close to that. Weight decay shrinks gamma towards 0: use
    none, or little.

    Args:
        model: Any model.
        spread: Standard deviation of the initialisation, at least 0.
        targets: Patterns of layer names; None for all layers of these types.

    Raises:
        ValueError: If the spread is negative, or no layer matches the targets.
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, nn.Conv2d, *_NORMS)

    def __init__(self, model: nn.Module, *, spread: float = 0.02, targets: Sequence[str] | None = None) -> None:
        super().__init__()
        at_least(self, 0, spread=spread)
        for host in layers_of(model, self.kinds, targets, type(self).__name__):
            self.sites.append(_ScaleShift(host, spread))

    @torch.no_grad()
    def merge(self) -> None:
        for site in self.sites:
            cast(_ScaleShift, site).merge()
        self.remove()


class FiLM(SSF):
    """Scale and shift per channel after normalisation layers (Perez et al., AAAI 2018; Panos et al., ICCV 2023).

    As ``SSF``, initialised with gamma = 1 and beta = 0: the initial output of the model is unchanged. In timm's layers
    that combine normalisation and activation, it is inserted between both.

    Args:
        model: Any model with normalisation layers.
        targets: Patterns of layer names; None for all. First Session Adaptation adapts the norms of the stem, of the
            depthwise convolutions and of the last convolution.
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]] = _NORMS

    def __init__(self, model: nn.Module, *, targets: Sequence[str] | None = None) -> None:
        super().__init__(model, spread=0.0, targets=targets)
