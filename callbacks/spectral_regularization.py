"""Spectral regularisation: the largest singular value of each layer is held at 1."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import Batch, Draw
from cl_lightning.callback import ContinualCallback
from cl_lightning.checks import at_least
from cl_lightning.losses import full_precision
from cl_lightning.models import Output

if TYPE_CHECKING:
    from cl_lightning.strategy import ContinualStrategy

_START = 0x5BEC  # salt of the vectors with which the power iteration starts


def spectral_norm(weight: Tensor, u: Tensor) -> Tensor:
    """sigma = u^T W v with v = W^T u / ||W^T u||, a scalar whose gradient is u v^T: u and v are constants.

    It is the largest singular value if u is the first left singular vector.

    Args:
        weight: W, ``(outputs, inputs)``.
        u: Vector of norm 1, ``(outputs,)``.
    """
    with torch.no_grad():
        v = F.normalize(weight.T @ u, dim=0)
    sigma: Tensor = u @ (weight @ v)
    return sigma


class SpectralRegularization(ContinualCallback):
    """Penalty on the distance of the largest singular value of each layer from 1, which keeps a network trainable.

    With W_l the weights of layer l as a matrix (outputs, inputs times kernel size), b_l its bias, and g and s the scale
    and the shift of a normalisation layer, the term ``spectral`` is added to the loss of any strategy:

        lambda * ( sum_l [ (sigma_max(W_l)^k - 1)^2 + ||b_l||^(2k) ]
                   + sum_norms [ sum_i (|g_i|^k - 1)^2 + ||s||^(2k) ] )

    (Lewandowski et al., "Learning Continually by Spectral Regularization", ICLR 2025, arXiv:2406.06811). lambda ->
    weight, k -> exponent. sigma_max = u^T W v, with one power iteration per step,

        v = W^T u / ||W^T u||,   u = W v / ||W v||

    u is kept from step to step and in checkpoints; it starts as Gaussian noise. u and v are constants, so the gradient
    with respect to W is ``2 k (sigma^k - 1) sigma^(k-1) u v^T``.

    k = 2, the penalties of normalisation layers and the layers are our choice: all trained weights with two dimensions
    or more take part, embeddings excepted. The weights of the classes of each task are a matrix of their own. The
    stacked projections of ``nn.MultiheadAttention`` are one matrix. Do not use weight decay on the same weights.

    Args:
        weight: lambda, at least 0; with 0 no term is added. The paper searches 1e-5 to 1e-2.
        exponent: k, an integer of at least 1.
    """

    paper: str = "Lewandowski et al., ICLR 2025, arXiv:2406.06811"

    def __init__(self, *, weight: float = 1e-3, exponent: int = 2) -> None:
        at_least(self, 0, weight=weight)
        at_least(self, 1, exponent=exponent)
        self.weight, self.exponent = weight, exponent
        self.vectors: dict[str, Tensor] = {}
        """u of each matrix by the name of its weight, ``(outputs,)``, at least float32."""

    @torch.no_grad()
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        # Here and not in `losses`, which a process without samples does not call: u is the same on all processes.
        if self.weight:
            strategy: Any = pl_module
            self.iterate(strategy.network, strategy.seed)

    @torch.no_grad()
    def iterate(self, network: nn.Module, seed: int) -> None:
        """One power iteration for each matrix; new matrices begin with a vector that their name and the seed give."""
        with torch.autocast(next(network.parameters()).device.type, enabled=False):
            for name, value in _matrices(network):
                matrix = full_precision(value).flatten(1)
                u = self.vectors.get(name)
                if u is None or u.shape != matrix.shape[:1]:
                    u = F.normalize(Draw.of(len(matrix), seed, _START, *name.encode()).randn(), dim=0)
                v = F.normalize(matrix.T @ u.to(matrix), dim=0)
                self.vectors[name] = F.normalize(matrix @ v, dim=0)

    def losses(self, strategy: "ContinualStrategy", batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.weight == 0:
            return {}
        return {"spectral": self.weight * self.penalty(strategy.network)}

    def penalty(self, network: nn.Module) -> Tensor:
        """The sum over all layers, a scalar, with the vectors of the last :meth:`iterate`."""
        k, terms = self.exponent, list[Tensor]()
        with torch.autocast(next(network.parameters()).device.type, enabled=False):
            for name, value in _matrices(network):
                sigma = spectral_norm(full_precision(value).flatten(1), self.vectors[name])
                terms.append((sigma**k - 1).square())
            for value in _vectors(network, "weight"):
                terms.append((full_precision(value).abs() ** k - 1).square().sum())
            for value in _vectors(network, "bias"):
                terms.append(full_precision(value).square().sum() ** k)
        return torch.stack(terms).sum()

    def bytes_kept(self) -> dict[str, int]:
        return {"singular vectors": sum(u.numel() * u.element_size() for u in self.vectors.values())}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.vectors)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.vectors = dict(state_dict)


def _matrices(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values of the trained weights with two dimensions or more, embeddings excepted."""
    for prefix, module in network.named_modules():
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag):
            for name, value in module.named_parameters(recurse=False):
                if name.endswith("weight") and value.requires_grad and value.dim() > 1:
                    yield f"{prefix}.{name}", value


def _vectors(network: nn.Module, kind: str) -> Iterator[Tensor]:
    """The trained vectors whose name ends with ``kind``: biases and shifts, or scales of normalisation."""
    for name, value in network.named_parameters():
        if name.endswith(kind) and value.requires_grad and value.dim() == 1:
            yield value
