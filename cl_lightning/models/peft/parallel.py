"""Linear adapters parallel to the layers of a network, which are folded into the weights of the layers."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.models.peft.base import Peft, Site, layers_of


def _keeps_centre(layer: nn.Module) -> bool:
    """Whether the centre of each window of a layer is the pixel that a 1 x 1 convolution of the same stride sees."""
    if not isinstance(layer, nn.Conv2d):
        return True
    if isinstance(layer.padding, str):
        return False
    shape = zip(layer.kernel_size, layer.padding, layer.dilation, strict=True)
    return max(layer.kernel_size) > 1 and all(size % 2 and pad == gap * (size // 2) for size, pad, gap in shape)


class _Parallel(Site):
    """``output + A x + a`` of a linear layer, or of a convolution with A a convolution of size 1."""

    def __init__(self, host: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.host = (host,)  # in a tuple, so that it is not registered as a submodule
        self.weight = nn.Parameter(torch.zeros(host.weight.shape[:2]))
        self.bias = None if host.bias is None else nn.Parameter(torch.zeros(len(host.weight)))
        self.hook_output(host, self.add)

    def add(self, inputs: Tensor, output: Tensor) -> Tensor:
        [host] = self.host
        if isinstance(host, nn.Conv2d):
            kernel = self.weight[:, :, None, None]
            return output + F.conv2d(inputs, kernel, self.bias, host.stride, groups=host.groups)
        return output + F.linear(inputs, self.weight, self.bias)

    def fold(self) -> None:
        [host] = self.host
        if isinstance(host, nn.Conv2d):
            height, width = host.kernel_size
            host.weight[:, :, height // 2, width // 2] += self.weight
        else:
            host.weight += self.weight
        self.weight.zero_()
        if self.bias is not None:
            assert host.bias is not None
            host.bias += self.bias
            self.bias.zero_()


class ParallelAdapters(Peft):
    """A convolution of size 1 parallel to each convolution, and a linear layer parallel to each linear layer.

        y = W * x + b + A x + a,   A = 0 and a = 0 initially

    The adapters are folded into the layers without a change of the output (structural re-parameterisation): A is added
    to the centre of the kernel W, and a to b (Zhu et al., SSRE, CVPR 2022, arXiv:2203.06359; parallel adapters:
    Rebuffi et al., CVPR 2018, arXiv:1803.10082). A layer without biases has an adapter without biases.

    Convolutions of size 1 get no adapter, and neither do convolutions whose padding is not half of the kernel, since
    the centre of their windows is not the pixel that a convolution of size 1 sees. Next to a linear layer, an adapter
    has the capacity of the layer itself.

    Args:
        model: Any model with convolutions or linear layers.
        targets: Patterns of names of layers; None for all.

    Raises:
        ValueError: If no layer matches.
    """

    def __init__(self, model: nn.Module, *, targets: Sequence[str] | None = None) -> None:
        super().__init__()
        hosts = layers_of(model, (nn.Conv2d, nn.Linear), targets, "ParallelAdapters")
        self.sites.extend(_Parallel(cast(nn.Linear, host)) for host in hosts if _keeps_centre(host))
        if not self.sites:
            raise ValueError(
                "ParallelAdapters: no layer is a linear layer or a convolution of odd size above 1 that is padded by "
                "half of its size; give other targets"
            )

    @torch.no_grad()
    def fold(self) -> None:
        """Add the adapters to the weights of the layers and set them to 0; the output of the model is unchanged."""
        for site in self.sites:
            cast(_Parallel, site).fold()

    def merge(self) -> None:
        self.fold()
        self.remove()
