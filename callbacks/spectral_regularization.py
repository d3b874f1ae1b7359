"""Spectral regularisation: largest singular values near 1 keep a network trainable over many tasks."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import Batch, mix
from cl_lightning.callback import ContinualCallback
from cl_lightning.checks import at_least
from cl_lightning.losses import full_precision
from cl_lightning.models import Output

_MAPS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
_START = 0x5BEC  # salt of the first vectors


def singular_vectors(weight: Tensor, left: Tensor, steps: int = 1) -> tuple[Tensor, Tensor]:
    """Approximate singular vectors of the largest singular value after some steps of power iteration.

    Args:
        weight: W, ``(outputs, inputs)``.
        left: u, ``(outputs,)``, the result of earlier steps or any vector.
        steps: Number of steps, at least 1.

    Returns:
        u ``(outputs,)`` and v ``(inputs,)``, of norm 1.
    """
    for _ in range(steps):
        right = F.normalize(weight.T @ left, dim=0)
        left = F.normalize(weight @ right, dim=0)
    return left, right


def spectral_penalty(weight: Tensor, left: Tensor, right: Tensor, exponent: int) -> Tensor:
    """``(sigma^k - 1)^2`` with sigma = u^T W v; u and v are constants."""
    sigma = left @ full_precision(weight).flatten(1) @ right
    return (sigma**exponent - 1).square()


class SpectralRegularization(ContinualCallback):
    """Adds the distance of the largest singular value of each layer from 1 to the loss of any strategy.

    The term ``spectral`` is

        lambda sum_l [ (sigma(W_l)^k - 1)^2 + ||b_l||^(2k) ]

    over linear layers and convolutions, whose kernels are matrices ``(outputs, inputs * height * width)`` (Lewandowski
    et al., ICLR 2025, arXiv:2406.06811). lambda -> weight, k -> exponent. sigma = u^T W v, where one step of power
    iteration per batch follows the weights; u is in the checkpoint. Scales g of normalisation layers, whose singular
    values are |g|, add ``sum_i (|g_i|^k - 1)^2``, and their shifts count as biases.
    Chosen here, since only abstracts, reviews and a summary could be read: k = 2, and normalisation layers as above.
    Embeddings, tokens and parameters of other modules are left out, and so are frozen layers. With weight 0 no term is
    added.

    Args:
        weight: lambda, at least 0; the paper's grid is 1e-5 to 1e-2.
        exponent: k, at least 1.
    """

    paper: str = "Lewandowski et al., ICLR 2025, arXiv:2406.06811"

    def __init__(self, *, weight: float = 1e-3, exponent: int = 2) -> None:
        at_least(self, 0, weight=weight)
        at_least(self, 1, exponent=exponent)
        self.weight, self.exponent = weight, exponent
        self._left: dict[str, Tensor] = {}
        self._right: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """One step of power iteration, on every process, also on one without samples."""
        if self.weight == 0:
            return
        with torch.no_grad(), torch.autocast(pl_module.device.type, enabled=False):
            for name, layer in _trained_maps(cast(nn.Module, pl_module.network)):
                matrix = full_precision(layer.weight).flatten(1)
                left = self._left.get(name)
                if left is None or len(left) != len(matrix):
                    generator = torch.Generator().manual_seed(mix(_START, *name.encode()))
                    left = torch.randn(len(matrix), generator=generator)
                self._left[name], self._right[name] = singular_vectors(matrix, left.to(matrix))

    def losses(self, strategy: Any, batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.weight == 0:
            return {}
        k, parts = self.exponent, []
        with torch.autocast(strategy.device.type, enabled=False):
            for name, layer in _trained_maps(strategy.network):
                parts.append(spectral_penalty(layer.weight, self._left[name], self._right[name], k))
                parts += _of_bias(layer.bias, k)
            for layer in strategy.network.modules():
                if isinstance(layer, _NORMS) and layer.weight is not None and layer.weight.requires_grad:
                    parts.append((full_precision(layer.weight).abs() ** k - 1).square().sum())
                    parts += _of_bias(layer.bias, k)
        return {"spectral": self.weight * torch.stack(parts).sum()} if parts else {}

    def state_dict(self) -> dict[str, Any]:
        return {"left": {name: value.cpu() for name, value in self._left.items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._left = dict(state_dict["left"])


def _trained_maps(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """Linear layers and convolutions whose weights are trained, by name."""
    for name, layer in network.named_modules():
        if isinstance(layer, _MAPS) and layer.weight.requires_grad:
            yield name, layer


def _of_bias(bias: Tensor | None, exponent: int) -> list[Tensor]:
    """``||b||^(2k)``, if the layer has a bias that is trained."""
    return [] if bias is None or not bias.requires_grad else [full_precision(bias).square().sum() ** exponent]
