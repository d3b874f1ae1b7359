"""Linear maps that are solved task after task without changing what they give for earlier tasks.

The maps that are optimal for all tasks so far are an affine set, K = {W + P A}: a point W and a projector P onto the
directions that no input so far has. Each task restricts the set. Everything is in float64.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from cl_lightning.checks import within
from cl_lightning.distributed import all_gather_rows
from cl_lightning.models.closed_form import ClosedFormHead


def _triangle(rows: Tensor) -> Tensor:
    """R of the QR decomposition of the rows of all processes, ``(min(n, d), d)``; the same on every process."""
    mine: Tensor = torch.linalg.qr(rows, mode="r").R
    joint: Tensor = torch.linalg.qr(all_gather_rows(mine), mode="r").R
    return joint


@dataclass(frozen=True)
class SolutionSet:
    """The linear maps ``x -> W^T x`` that are optimal for a sequence of least-squares problems.

        K_0 = all maps,   K_t = argmin { ||X_t W - Y_t||^2 : W in K_{t-1} } = { W_t + P_t A }

    (the Ideal Continual Learner: Peng, Giampouras & Vidal, ICML 2023, arXiv:2305.00316). If one map fits all tasks, K_t
    is the intersection of their solution sets: the minimisers of the sum of the losses, in any order. Otherwise the
    order decides: the first task keeps its minimum, and each later task has the lowest loss within what is left.
    With V the right singular vectors of X P whose singular values are above a threshold:

        W <- W + V (X V)^+ (Y - X W),   P <- P - V V^T

    The point W has the smallest norm in the set. Problems of regression take any targets:

        solutions = SolutionSet.all_maps(8, 1).restricted(x1, y1).restricted(x2, y2)
        solutions.point, solutions.dimension, solutions.nearest(w)

    Attributes:
        point: W, float64 ``(D, C)``.
        projector: P, float64 ``(D, D)``, symmetric.
    """

    point: Tensor
    projector: Tensor

    @classmethod
    def all_maps(cls, num_inputs: int, num_outputs: int, *, device: torch.device | str = "cpu") -> Self:
        """The set of all maps, with W = 0 and P = I."""
        point = torch.zeros(num_inputs, num_outputs, dtype=torch.float64, device=device)
        return cls(point, torch.eye(num_inputs, dtype=torch.float64, device=device))

    @property
    def dimension(self) -> int:
        """Number of free directions, trace P: D minus the rank of all inputs so far. With 0 nothing can be learnt."""
        return round(float(self.projector.trace()))

    def basis(self) -> Tensor:
        """Orthonormal basis of the free directions, ``(D, dimension)``; any other one is a rotation of it."""
        vectors: Tensor = torch.linalg.eigh(self.projector).eigenvectors
        return vectors[:, len(self.point) - self.dimension :]

    def nearest(self, weight: Tensor) -> Tensor:
        """The member of the set with the smallest distance to ``weight (D, C)``: ``W + P (weight - W)``."""
        return self.point + self.projector @ (weight - self.point)

    def with_outputs(self, num_outputs: int) -> Self:
        """The set for more outputs, with columns 0 for the new ones: their targets for all inputs so far are 0."""
        new = self.point.new_zeros(len(self.point), num_outputs - self.point.shape[1])
        return type(self)(torch.cat([self.point, new], dim=1), self.projector)

    def restricted(self, inputs: Tensor, targets: Tensor, *, tolerance: float = 1e-10) -> Self:
        """The members of the set with the smallest squared error on a task.

        Several processes each give their share of the rows, and get the same set.

        Args:
            inputs: X, ``(n, D)``; n may be 0.
            targets: Y, ``(n, C)``.
            tolerance: Directions whose singular value is at most this share of the largest singular value of X count as
                directions that no input has, in [0, 1).

        Raises:
            ValueError: If the tolerance is out of range.
        """
        within(self, "[0, 1)", tolerance=tolerance)
        inputs, targets = inputs.double(), targets.double()
        size = len(self.projector)
        rows = torch.cat([inputs, inputs @ self.projector, targets - inputs @ self.point], dim=1)
        # All three blocks through one QR: only products of their columns are needed, and R has the same.
        whole, free, residual = torch.split(_triangle(rows), [size, size, targets.shape[1]], dim=1)
        if not len(whole):
            return self
        largest = torch.linalg.matrix_norm(whole, ord=2)
        values, right = torch.linalg.svd(free, full_matrices=False)[1:]
        kept = values > max(tolerance, size * torch.finfo(values.dtype).eps) * largest
        # Rounding leaves small parts of V outside of the free directions, the larger the smaller the singular value.
        directions: Tensor = torch.linalg.qr(self.projector @ right[kept].T).Q  # (D, r)
        step = directions @ torch.linalg.lstsq(free @ directions, residual).solution
        projector = self.projector - directions @ directions.T
        return type(self)(self.point + step, (projector + projector.T) / 2)


class NullSpaceHead(ClosedFormHead):
    """One-hot regression that is exact on the first task, and on each later task as far as earlier outputs allow.

    At the end of a task the :class:`SolutionSet` is restricted by its features and one-hot labels. Scores of all
    earlier samples stay as they are, up to the directions below the tolerance. Two tasks that share no class are
    realisable together if the features of all samples are linearly independent: the head needs more features than
    samples, or samples in a subspace. There is no bias; a constant feature is one.

    Args:
        num_features: Size of a feature vector, D.
        tolerance: As in :meth:`SolutionSet.restricted`. Small singular values are noise of the features, to which a
            small tolerance fits the map.

    Attributes:
        projector: P, float64 ``(D, D)`` from the end of the first task on; ``(0, 0)`` before.

    Raises:
        ValueError: If the tolerance is out of range.
    """

    projector: Tensor

    def __init__(self, num_features: int, *, tolerance: float = 1e-3) -> None:
        super().__init__(num_features)
        within(self, "[0, 1)", tolerance=tolerance)
        self.tolerance = tolerance
        self.register_buffer("projector", torch.zeros(0, 0, dtype=torch.float64))

    def solutions(self) -> SolutionSet:
        """The maps that are optimal for the tasks so far."""
        columns = len(self.counts)
        if not len(self.projector):
            return SolutionSet.all_maps(self.num_features, columns, device=self.counts.device)
        return SolutionSet(self.weight().T, self.projector)

    def add(self, features: Tensor, labels: Tensor) -> None:
        found = self.solutions().restricted(features, self.one_hot(labels), tolerance=self.tolerance)
        self.projector = found.projector
        self._place(found.point.T, None)

    def solution(self) -> tuple[Tensor, None]:
        return self.weight(), None
