"""Subspaces of the inputs of each layer, kept as the space that is used or as the space that is free (InfLoRA)."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from cl_lightning.checks import within
from cl_lightning.memory.importance import NamedBuffers

_ROUNDING = 1e-6
"""Singular values below this share of the norm of C come from rounding of the stored basis."""


class DualSpaces(NamedBuffers):
    """Orthonormal basis M of the inputs of earlier tasks, or of its complement if that is smaller (DualGPM).

    Liang & Li, CVPR 2023 and InfLoRA, CVPR 2024, arXiv:2404.00228. With C = sum u u^T of the inputs u of a layer in a
    new task, P the projection onto the free space, and s_i the singular values of P C, the used space grows by the
    first k left singular vectors of P C, with the smallest k for which

        ||C||^2 - ||P C||^2 + sum_{i <= k} s_i^2 >= energy ||C||^2

    In the first task it is the largest k whose sum is smaller, at least 1. Where M is the basis of the free space, the
    vectors are removed from it. Singular values of C are squares of the singular values of the inputs, so that fewer
    directions are kept than with the same energy in ``InputSpaces``. State is in buffers, whose shapes come from the
    state dict that is loaded; it is the same on all processes.
    """

    kept_as: ClassVar[str] = "bases"
    tasks: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("tasks", torch.zeros((), dtype=torch.int64))

    @property
    def bases(self) -> dict[str, Tensor]:
        """M by the name of the layer, float32 ``(d, m)``."""
        return self._get("basis")

    @property
    def is_free(self) -> dict[str, bool]:
        """Whether M is the basis of the free space, by the name of the layer."""
        return {name: bool(flag) for name, flag in self._get("free").items()}

    def free_part(self, name: str, matrix: Tensor) -> Tensor:
        """Part ``P X`` of a float64 matrix ``(d, n)`` outside of the used space; all of it for an unknown layer."""
        stored = self.bases.get(name)
        if stored is None:
            return matrix
        basis = torch.linalg.qr(stored.double()).Q  # orthonormal in float64 too
        inside: Tensor = basis @ (basis.T @ matrix)
        return inside if self.is_free[name] else matrix - inside

    @torch.no_grad()
    def directions(self, name: str, gram: Tensor, count: int) -> Tensor:
        """First left singular vectors of ``P C``, as orthonormal rows outside of the used space.

        Args:
            name: Name of the layer.
            gram: C, float64 ``(d, d)``.
            count: Number of directions, at least 1.

        Returns:
            ``(count, d)``, float64; rows are 0 where the inputs have no further direction outside of the used space.
        """
        vectors, squares = _left_vectors(self.free_part(name, gram))
        used = int((squares[:count] > (_ROUNDING * torch.linalg.matrix_norm(gram)).square()).sum())
        rows = gram.new_zeros(count, len(gram))
        rows[:used] = torch.linalg.qr(self.free_part(name, vectors[:, :used])).Q.T
        largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
        return rows * largest.sign()

    @torch.no_grad()
    def grow(self, grams: Mapping[str, Tensor], energy: float) -> None:
        """Add the inputs of a task to the used space.

        Args:
            grams: C of each layer, float64 ``(d, d)``, see ``input_grams``.
            energy: In [0, 1].

        Raises:
            ValueError: If ``energy`` is outside [0, 1].
        """
        within(self, "[0, 1]", energy=energy)
        known, free = self.bases, self.is_free
        self.tasks += 1
        for name, gram in grams.items():
            vectors, squares = _left_vectors(self.free_part(name, gram))
            total = gram.square().sum() * (1 - 1e-12)
            sums = torch.cat([squares.new_zeros(1), squares.cumsum(0)])  # of the first 0, 1, ... vectors
            if name not in known:
                count, used = max(int((sums[1:] < energy * total).sum()), 1), gram.new_zeros(len(gram), 0)
            else:
                enough = gram.square().sum() - squares.sum() + sums >= energy * total
                count = int(enough.int().argmax()) if enough.any() else len(squares)
                basis = torch.linalg.qr(known[name].double()).Q
                used = _complement(basis) if free[name] else basis
            count = min(count, len(gram) - used.shape[1])
            used = torch.linalg.qr(torch.cat([used, vectors[:, :count]], dim=1)).Q
            is_free = bool(free.get(name)) or used.shape[1] > len(gram) / 2
            self._set("basis", name, (_complement(used) if is_free else used).float())
            self._set("free", name, torch.tensor(is_free, device=gram.device))


def _left_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors ``(d, d)`` and squared singular values of a matrix."""
    vectors, values, _ = torch.linalg.svd(matrix)
    return vectors, values.square()


def _complement(basis: Tensor) -> Tensor:
    """Orthonormal basis ``(d, d - m)`` of the complement of orthonormal columns ``(d, m)``."""
    whole: Tensor = torch.linalg.qr(basis, mode="complete").Q
    return whole[:, basis.shape[1] :]
