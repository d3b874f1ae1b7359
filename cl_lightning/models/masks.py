"""Masks on the units of a network, one set per task.

A mask is ``a = sigmoid(s e)`` with an embedding e per task and layer. While a task is trained, s rises from almost 0 to
``largest``, so that the mask becomes binary (Serra et al., HAT, ICML 2018, arXiv:1801.01423).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cl_lightning.models.backbones import Backbone
from cl_lightning.models.network import Network

# Layers that commute with multiplying channels by positive numbers, so that a mask before them is a mask after them.
_KEEPS_SCALE = (nn.ReLU, nn.LeakyReLU, nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)

_FAR, _NEAR = 50.0, 6.0  # limits of s e in the compensation, and of e


def risen_scale(done: float, largest: float) -> float:
    """s after a share of an epoch: ``1 / largest + (largest - 1 / largest) * done`` (HAT, eq. 3).

    Args:
        done: Share of the epoch, in [0, 1].
        largest: Largest scale, above 1.
    """
    return 1 / largest + (largest - 1 / largest) * done


def newly_used(masks: Sequence[Tensor], past: Sequence[Tensor]) -> Tensor:
    """Share of the free units that masks use: ``sum_i a_i (1 - past_i) / sum_i (1 - past_i)`` (HAT, eq. 4).

    Args:
        masks: a of each layer, ``(units,)``, in [0, 1].
        past: Largest masks of all earlier tasks, as ``masks``.

    Returns:
        A scalar in [0, 1]; 0 if no unit is free.
    """
    free = 1 - torch.cat(list(past))
    return (torch.cat(list(masks)) * free).sum() / free.sum().clamp(min=1e-12)


@torch.no_grad()
def compensate_scale(embeddings: Iterable[nn.Parameter], scale: float, largest: float) -> None:
    """Replace the slope of ``sigmoid(s e)`` in the gradients of embeddings by ``largest`` times the slope of a sigmoid.

        g <- g largest / s (cosh(clamp(s e, -50, 50)) + 1) / (cosh(e) + 1)                             HAT, eq. (5)

    Args:
        embeddings: Parameters e; those without a gradient are left out.
        scale: s of the forward pass.
        largest: Largest scale.
    """
    for embedding in embeddings:
        if embedding.grad is not None:
            steep, flat = (scale * embedding).clamp(-_FAR, _FAR).cosh() + 1, embedding.cosh() + 1
            embedding.grad *= largest / scale * steep / flat


@torch.no_grad()
def clamp_embeddings(embeddings: Iterable[nn.Parameter]) -> None:
    """``e <- clamp(e, -6, 6)`` after a step (HAT, section 2.4): beyond, the gradient of a mask vanishes."""
    for embedding in embeddings:
        embedding.clamp_(-_NEAR, _NEAR)


class GatedBackbone(Backbone):
    """A chain of layers whose units are multiplied by masks ``a = sigmoid(s e)``, with an embedding e per task.

    Serra et al. (HAT, ICML 2018, arXiv:1801.01423). Each linear layer and convolution of the chain has a mask over its
    units or channels. Set :attr:`task` and :attr:`scale` before a forward pass.

    Args:
        chain: A backbone with a ``Sequential`` of name ``layers`` (``MLP``, ``ConvNet``).

    Attributes:
        task: Index of the task whose masks are used.
        scale: s; large values make the masks binary.

    Raises:
        ValueError: If the backbone is no chain, or has layers (such as batch normalisation) that do not commute with
            masks.
    """

    def __init__(self, chain: Backbone) -> None:
        super().__init__(chain.image_shape)
        layers = getattr(chain, "layers", None)
        name = type(chain).__name__
        if not isinstance(layers, nn.Sequential):
            raise ValueError(f"GatedBackbone: {name} is no chain of layers; use MLP or ConvNet")
        self.gated = [place for place, layer in enumerate(layers) if isinstance(layer, nn.Linear | nn.Conv2d)]
        other = [
            x for i, x in enumerate(layers) if i not in self.gated and not isinstance(x, (*_KEEPS_SCALE, nn.Flatten))
        ]
        if other:
            raise ValueError(
                f"GatedBackbone: {name} has {type(other[0]).__name__}, which does not commute with masks; use MLP or "
                "ConvNet"
            )
        self.layers = layers
        self.num_features = chain.num_features
        self.sizes = [int(layers[place].weight.shape[0]) for place in self.gated]  # type: ignore[arg-type,union-attr,index]
        self.embeddings = nn.ModuleList()
        self.task, self.scale = 0, 1.0

    def add_task(self) -> None:
        """Append embeddings of a new task, drawn from N(0, 1)."""
        like = next(self.parameters())
        rows = [nn.Parameter(torch.randn(size, device=like.device, dtype=like.dtype)) for size in self.sizes]
        self.embeddings.append(nn.ParameterList(rows))

    def embeddings_of(self, task: int) -> list[nn.Parameter]:
        """e of each masked layer for a task, each ``(units,)``."""
        return list(self.embeddings[task].parameters())

    def masks(self, task: int, scale: float) -> list[Tensor]:
        """a of each masked layer for a task, each ``(units,)`` with values in (0, 1)."""
        return [torch.sigmoid(scale * embedding) for embedding in self.embeddings_of(task)]

    def forward(self, images: Tensor) -> Tensor:
        masks, features = iter(self.masks(self.task, self.scale)), images
        for place, layer in enumerate(self.layers):
            features = layer(features)
            if place in self.gated:
                mask = next(masks)
                features = features * mask.view(-1, *[1] * (features.dim() - 2))
        return features

    def factors(self, past: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Factors of the gradients of each masked layer, which protect what earlier tasks use.

            g_ij <- (1 - min(a_i, a_j)) g_ij for a weight from unit j to unit i,   g_i <- (1 - a_i) g_i for a bias

        Args:
            past: Largest masks of all earlier tasks, by layer, each ``(units,)``.

        Returns:
            For each layer the factor of its weight, of the shape of the weight or with sizes 1, and of its bias.
        """
        found: list[tuple[Tensor, Tensor]] = []
        for number, place in enumerate(self.gated):
            weight, outputs = self.layers[place].weight, past[number]  # type: ignore[union-attr]
            assert isinstance(weight, Tensor)
            ends = outputs.view(-1, *[1] * (weight.dim() - 1))
            if number == 0:  # pixels have no mask
                found.append((1 - ends, 1 - outputs))
                continue
            inputs = past[number - 1]
            inputs = inputs.repeat_interleave(weight.shape[1] // len(inputs))  # a flattened channel has many inputs
            starts = inputs.view(1, -1, *[1] * (weight.dim() - 2))
            found.append((1 - torch.minimum(ends, starts), 1 - outputs))
        return found

    def restore_network(self, student: Network, state: Mapping[str, Any], prefix: str) -> None:
        """Prepare for loading ``state``: have as many tasks as it has."""
        tasks = 0
        while f"{prefix}embeddings.{tasks}.0" in state:
            tasks += 1
        with torch.random.fork_rng(devices=[]):  # the initial values are overwritten
            del self.embeddings[tasks:]
            while len(self.embeddings) < tasks:
                self.add_task()
