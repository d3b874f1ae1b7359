"""Subspaces of the inputs of each layer, for methods that keep the outputs for earlier tasks (GPM, TRGP).

A gradient step of a linear layer changes its output for an input x by ``dW x``. If the rows of dW are orthogonal to all
inputs of earlier tasks, the outputs for these inputs stay as they are.
"""

from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_lightning.batch import Batch
from cl_lightning.checks import within
from cl_lightning.distributed import all_sum
from cl_lightning.memory.importance import NamedBuffers
from cl_lightning.models import Head


class InputSpaces(NamedBuffers):
    """Orthonormal basis ``(D, k)`` of the inputs that each layer has had in the tasks so far (arXiv:2103.09762).

    With R ``(D, n)`` the inputs of a layer in a new task, M its basis and R^ = R - M M^T R the part outside of it, the
    first k left singular vectors of R^ are appended to M, with singular values s and the smallest k for which

        ||R||^2 - ||R^||^2 + sum_{i <= k} s_i^2 >= energy ||R||^2

    D is the number of inputs of a linear layer, or channels * height * width of the kernel of a convolution. The
    vectors are computed from R R^T in float64. State is in buffers, whose shapes come from the state dict that is
    loaded; it is the same on all processes.

    With a ``task``, the old directions compete with the new ones (TRGP, arXiv:2202.02931): with ||m_i^T R||^2 for the
    columns of M, and s_i^2, the fewest directions with the largest of these numbers, whose sum is at least energy
    ||R||^2, are the basis of the task. Those that are new are appended to M. The basis of a task is stored as indices
    of columns of M.
    """

    kept_as: ClassVar[str] = "bases"
    tasks: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("tasks", torch.zeros((), dtype=torch.int64))

    @property
    def bases(self) -> dict[str, Tensor]:
        """M by the name of the layer, float32 ``(D, k)``, 0 <= k <= D."""
        return self._get("basis")

    def of(self, task: int) -> dict[str, Tensor]:
        """Basis of the inputs of a task by the name of the layer, columns of M, float32 ``(D, m)``.

        Empty for a task that was not given to :meth:`grow`.
        """
        bases = self.bases
        return {name: bases[name][:, chosen] for name, chosen in self._get(f"task_{task}").items()}

    @torch.no_grad()
    def grow(self, grams: Mapping[str, Tensor], energy: float, *, task: int | None = None) -> None:
        """Append the directions that are missing.

        Args:
            grams: R R^T of each layer, float64 ``(D, D)``, see :func:`input_grams`.
            energy: Share of ||R||^2 that the basis holds at least, in [0, 1].
            task: Index of the task, to choose a basis of its own; None to append to the joint basis alone.

        Raises:
            ValueError: If ``energy`` is outside [0, 1].
        """
        within(self, "[0, 1]", energy=energy)
        known = self.bases
        self.tasks += 1
        for name, gram in grams.items():
            stored = known[name] if name in known else gram.new_zeros(len(gram), 0, dtype=torch.float32)
            basis, triangle = torch.linalg.qr(stored.double())  # orthonormal in float64 too
            basis, size = basis * triangle.diagonal().sign(), stored.shape[1]
            rest = gram - basis @ (basis.T @ gram)
            rest = rest - (rest @ basis) @ basis.T
            squares, vectors = torch.linalg.eigh((rest + rest.T) / 2)  # ascending
            squares, vectors = squares.flip(0).clamp(min=0)[: len(gram) - size], vectors.flip(1)
            wanted = energy * gram.trace() * (1 - 1e-12)
            if task is None:
                count = _number_needed(squares, wanted - (gram.trace() - rest.trace()))
            else:
                ranked, order = torch.cat([((gram @ basis) * basis).sum(dim=0), squares]).sort(descending=True)
                chosen = order[: _number_needed(ranked, wanted)]
                count = int((chosen >= size).sum())  # the first ones, since the new directions are sorted
                self._set(f"task_{task}", name, chosen)
            # Where two singular values are equal to rounding, the old basis is only nearly orthogonal to the new part.
            joint, _ = torch.linalg.qr(torch.cat([basis, vectors[:, :count]], dim=1))
            self._set("basis", name, torch.cat([stored, joint[:, size:].float()], dim=1))

    @torch.no_grad()
    def project(self, gradients: Iterable[tuple[str, Tensor]]) -> None:
        """``g <- g - g M M^T`` in place.

        Args:
            gradients: Layer name and gradient of a weight: ``(outputs, D)`` for a linear layer, ``(outputs, channels,
                height, width)`` for a convolution. Gradients of layers without a basis are left as they are.
        """
        bases = self.bases
        for name, gradient in gradients:
            if name in bases:
                basis, flat = bases[name].to(gradient), gradient.flatten(1)
                gradient -= ((flat @ basis) @ basis.T).view_as(gradient)


def _number_needed(values: Tensor, wanted: Tensor) -> int:
    """How many of the first values have a sum of at least ``wanted``; all of them if their sum is smaller."""
    sums = torch.cat([values.new_zeros(1), values.cumsum(0)])  # of the first 0, 1, ... values
    enough = sums >= wanted
    return int(enough.int().argmax()) if enough.any() else len(values)


def linear_maps(module: nn.Module, owner: str) -> dict[str, nn.Linear | nn.Conv2d]:
    """The linear layers and convolutions of a module, by name.

    Raises:
        ValueError: If a convolution has groups: each group has inputs of its own.
    """
    found = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    for name, layer in found.items():
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            raise ValueError(f"{owner}: convolution {name!r} has {layer.groups} groups; use a backbone without groups")
    return found


def rows_of(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Inputs of a layer as rows ``(n, D)``: vectors or tokens of a linear layer, patches of a convolution."""
    if not isinstance(layer, nn.Conv2d):
        return inputs.flatten(0, -2)
    padding = layer.padding
    if isinstance(padding, str):  # "valid" or "same", which may be one more pixel at the end
        total = [d * (k - 1) * (padding == "same") for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        (up, left), (down, right) = [t // 2 for t in total], [t - t // 2 for t in total]
        inputs, padding = F.pad(inputs, (left, right, up, down)), (0, 0)
    elif layer.padding_mode != "zeros":
        inputs, padding = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), (0, 0)
    patches = F.unfold(inputs, layer.kernel_size, layer.dilation, padding, layer.stride)  # (B, D, positions)
    return patches.transpose(1, 2).flatten(0, 1)


@torch.no_grad()
def input_grams(
    network: nn.Module, layers: Mapping[str, nn.Linear | nn.Conv2d | Head], batches: Iterable[Batch]
) -> dict[str, Tensor]:
    """``R R^T`` of the inputs of each layer over all batches and processes, float64 ``(D, D)``, by name.

    Args:
        network: Called with the images of each batch, as it is: set eval mode before.
        layers: Linear layers, convolutions and heads of the network whose inputs are summed.
        batches: This process's share of the data.
    """
    device = next(network.parameters()).device
    sizes = {name: x.num_features if isinstance(x, Head) else x.weight[0].numel() for name, x in layers.items()}
    grams = {name: torch.zeros(n, n, dtype=torch.float64, device=device) for name, n in sizes.items()}

    def add(name: str, layer: nn.Module, inputs: Tensor) -> None:
        rows = rows_of(layer, inputs.detach()).double()
        grams[name] += rows.T @ rows

    handles = [
        layer.register_forward_pre_hook(lambda module, args, name=name: add(name, module, args[0]))
        for name, layer in layers.items()
    ]
    try:
        for batch in batches:
            if len(batch):
                network(batch.images)
    finally:
        for handle in handles:
            handle.remove()
    return {name: all_sum(gram) for name, gram in grams.items()}
