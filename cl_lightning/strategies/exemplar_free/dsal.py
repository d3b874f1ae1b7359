"""DS-AL: Dual-Stream Analytic Learning (Zhuang et al., AAAI 2024, arXiv:2403.17503).

The main stream is ACIL; a second regression, on another activation of the same random projection u = P^T f(x) of the
features of a frozen backbone, compensates what the main stream cannot fit:

    main            W    = (sum phi phi^T + r I)^-1 sum phi y^T,         phi = ReLU(u)
    compensation    W_c  = (sum psi psi^T + r_c I)^-1 sum psi y_c^T,     psi = tanh(u)
                    y_c  = y - W^T phi,  after the main stream has learnt the task; 0 for all but the new classes
    scores          W^T phi + C W_c^T psi

r -> ridge, r_c -> compensation_ridge, C -> compensation, tanh -> compensation_activation. Setting y_c to 0 for earlier
classes (previous label cleansing) keeps the residues of a task from changing the scores of earlier ones. New are the
classes whose first samples are in the task. C = 0 is ACIL.
As in the paper, y_c is computed after the main stream has learnt the task: the result does not depend on batches.
``residue_batch`` is the order of the code, which computes y_c of each mini-batch after the main stream has learnt the
batch. Departs from the code as ``ACIL`` does: the last epoch of the first task is used.
"""

import functools
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from cl_lightning.checks import at_least, one_of
from cl_lightning.memory import dense_columns
from cl_lightning.models import Head, LinearHead, RidgeHead
from cl_lightning.models.closed_form import Activation
from cl_lightning.strategies.pretrained.first_session import FirstSessionAdaptation
from cl_lightning.strategy import HeadFactory


class DualStreamHead(Head):
    """Two ridge regressions: on one-hot labels, and on the residues of the first for new classes.

    Args:
        num_features: Size of a feature vector, d.
        ridge: r, above 0.
        compensation_ridge: r_c, above 0.
        compensation: C, at least 0.
        projection: Number of random features.
        compensation_activation: Activation of the second regression: ``tanh``, ``relu`` or ``identity``.
        backend: As in ``RidgeHead``.
        residue_batch: Number of rows, in the order of the data set, after which residues are computed; None for all
            rows of a task. It requires ``recursive``.

    Raises:
        ValueError: If an option is out of range, or ``residue_batch`` is given with ``accumulate``.
    """

    needs_statistics = True

    def __init__(
        self,
        num_features: int,
        *,
        ridge: float = 0.1,
        compensation_ridge: float = 0.1,
        compensation: float = 0.6,
        projection: int = 8192,
        compensation_activation: Activation = "tanh",
        backend: Literal["accumulate", "recursive"] = "recursive",
        residue_batch: int | None = None,
    ) -> None:
        super().__init__(num_features)
        at_least(self, 0, compensation=compensation)
        at_least(self, 1, residue_batch=residue_batch, optional=True)
        if residue_batch is not None and backend != "recursive":
            raise ValueError(
                f"DualStreamHead: residue_batch is {residue_batch} with backend {backend!r}; use recursive"
            )
        one_of(self, get_args(Activation), compensation_activation=compensation_activation)
        make = functools.partial(RidgeHead, num_features, projection=projection, init="uniform", backend=backend)
        self.main = make(ridge=ridge)
        self.second = make(ridge=compensation_ridge, activation=compensation_activation)
        self.second.random = self.main.random.clone()
        self.compensation, self.residue_batch = compensation, residue_batch
        self.needs_all_rows = self.main.needs_all_rows

    def grow(self, num_new: int) -> None:
        self.main.grow(num_new)
        self.second.grow(num_new)

    def block_sizes(self) -> list[int]:
        return self.main.block_sizes()

    def weight(self) -> Tensor:
        return self.main.weight()

    def forward(self, features: Tensor) -> Tensor:
        first = self.main(features)
        # Scores of classes without samples are -inf in both, and 0 times -inf is nan.
        second = self.second(features).masked_fill(self.second.counts == 0, 0.0)
        scores: Tensor = first + self.compensation * second
        return scores

    @torch.no_grad()
    def fit_features(self, features: Tensor, labels: Tensor) -> None:
        columns, _ = dense_columns(labels, self.num_columns, reduce=not self.needs_all_rows)
        new = torch.zeros_like(self.main.counts, dtype=torch.bool)
        new[columns] = self.main.counts[columns] == 0

        def residue(rows: Tensor, columns: Tensor) -> Tensor:
            """y_c, ``(n, C)``."""
            return torch.where(new, self.main.one_hot(columns) - self.main.linear(rows), 0.0)

        size = self.residue_batch or max(1, len(labels))
        for rows, part in zip(torch.split(features, size), torch.split(labels, size), strict=True):
            self.main.fit_features(rows, part)
            self.second.fit_targets(rows, part, residue)


class DSAL(FirstSessionAdaptation):
    """Recursive ridge regression on random features, and a second regression that fits its residues.

    Args:
        ridge: r, above 0.
        compensation_ridge: r_c, above 0.
        compensation: C, at least 0: 0.6 in the code for CIFAR-100, 1.5 for ImageNet.
        projection: Number of random features: 8,192 in the paper for CIFAR-100, 16,384 for ImageNet.
        compensation_activation: Activation of the second regression: ``tanh``, ``relu`` or ``identity``.
        backend: ``recursive``, or ``accumulate`` for sums that are solved once per task, with the same result.
        residue_batch: Number of rows after which residues are computed; None for all rows of a task.
        session_head: Builds the classifier of the first task; None for ``LinearHead``.
        kwargs: Options of ``FirstSessionAdaptation``.
    """

    traits = FirstSessionAdaptation.traits.but(
        family="exemplar-free", paper="Zhuang et al., AAAI 2024, arXiv:2403.17503", needs_pretrained=False
    )

    def __init__(
        self,
        *,
        ridge: float = 0.1,
        compensation_ridge: float = 0.1,
        compensation: float = 0.6,
        projection: int = 8192,
        compensation_activation: Activation = "tanh",
        backend: Literal["accumulate", "recursive"] = "recursive",
        residue_batch: int | None = None,
        session_head: HeadFactory | None = None,
        **kwargs: Any,
    ) -> None:
        head = functools.partial(
            DualStreamHead,
            ridge=ridge,
            compensation_ridge=compensation_ridge,
            compensation=compensation,
            projection=projection,
            compensation_activation=compensation_activation,
            backend=backend,
            residue_batch=residue_batch,
        )
        head(1)  # so that an option out of range raises here, not when the network is built
        super().__init__(head=head, session_head=session_head or LinearHead, **kwargs)
