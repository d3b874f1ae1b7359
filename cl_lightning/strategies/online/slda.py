"""Deep streaming linear discriminant analysis, SLDA (Hayes & Kanan, CVPR-W 2020, arXiv:1909.01520).

Gaussian classes with a shared covariance on features x of a frozen backbone, updated with one sample (x, y) at a time:

    d = x - mu_y,   M <- M + c_y / (c_y + 1) d d^T,   mu_y <- mu_y + d / (c_y + 1),   c_y <- c_y + 1,   S = M / n
    Lambda = ((1 - eps) S + eps I)^-1,   score_k(x) = mu_k^T Lambda x - 1/2 mu_k^T Lambda mu_k

over n samples so far, of which c_y are of class y. eps -> shrinkage. S is the covariance within classes of all samples
so far, and does not depend on their order. Lambda is computed when a prediction is needed. Classes without samples are
never predicted. ``base_initialisation``: the first task is not a stream; its class means and the covariance of its
centred features, shrunk by the oracle approximation (Chen et al. 2010; ``oas_covariance``), are the initial state.
``released=True`` is the update of the released code, in which the weight of d d^T is n / (n + 1) with the number n of
all samples before, and mu_y = 0 for the first sample of a class: S then depends on the order, and on the origin of the
features.
Departs from the paper: a batch is learnt at once, with the result of learning its rows one by one; by default there is
no base initialisation, so that the backbone must be pretrained.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from cl_lightning.checks import within
from cl_lightning.models import gaussian_classifier
from cl_lightning.strategies.online.streamed import StreamedHead, StreamedStrategy
from cl_lightning.strategy import Phase, Task

_ROWS = 256  # rows learnt at a time: each is compared with the rows before it


def earlier_means(
    inputs: Tensor, labels: Tensor, known: Tensor, means: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and number of the samples of its class before each row, as if rows were learnt one by one.

    Args:
        inputs: ``(n, d)``, float64, in the order in which they are learnt.
        labels: Columns, int64 ``(n,)``.
        known: 1 for rows that are learnt and 0 for rows that are left out, float64 ``(n,)``.
        means: Class means before the first row, ``(C, d)``; 0 for classes without samples.
        counts: Samples of each class before the first row, int64 ``(C,)``.

    Returns:
        Means ``(n, d)``, 0 for the first sample of a class, and numbers of samples, float64 ``(n,)``.
    """
    earlier = (labels[:, None] == labels).double().tril(diagonal=-1) * known  # (n, n)
    before = counts[labels].double()
    number = before + earlier.sum(dim=1)
    sums = before[:, None] * means[labels] + earlier @ inputs
    return sums / number.clamp(min=1)[:, None], number


def oas_covariance(centred: Tensor) -> Tensor:
    """Covariance shrunk towards a multiple of the identity (oracle approximating shrinkage, Chen et al. 2010).

        S = X^T X / n,   m = tr(S) / d,   a = ||S||_F^2 / d^2,   r = min(1, (a + m^2) / ((n + 1) (a - m^2 / d)))
        (1 - r) S + r m I

    which is the form of scikit-learn: terms of the paper of order 1 / d are left out.

    Args:
        centred: X, rows of mean 0, ``(n, d)``, float64.

    Returns:
        ``(d, d)``.
    """
    n, d = centred.shape
    covariance = centred.T @ centred / n
    mean = covariance.diagonal().mean()
    alpha = covariance.square().mean()
    spread = (n + 1) * (alpha - mean.square() / d)
    share = torch.where(spread > 0, (alpha + mean.square()) / spread, 1.0).clamp(max=1)
    identity = torch.eye(d, dtype=covariance.dtype, device=covariance.device)
    return (1 - share) * covariance + share * mean * identity


class SLDAHead(StreamedHead):
    """Streaming linear discriminant analysis; the equations are in the docstring of the module.

    Args:
        num_features: Size of a feature vector, d.
        shrinkage: eps, in [0, 1]; with 1 the nearest class mean is predicted. With 0 the pseudo-inverse replaces the
            inverse of a singular covariance.
        released: Whether to use the update of the released code.

    Attributes:
        means: mu, float64 ``(C, d)``.
        scatter: M, float64 ``(d, d)``.

    Raises:
        ValueError: If the shrinkage is out of range.
    """

    means: Tensor
    scatter: Tensor

    def __init__(self, num_features: int, *, shrinkage: float = 1e-4, released: bool = False) -> None:
        super().__init__(num_features)
        within(self, "[0, 1]", shrinkage=shrinkage)
        self.shrinkage, self.released = shrinkage, released
        self.register_buffer("means", torch.zeros(0, num_features, dtype=torch.float64))
        self.register_buffer("scatter", torch.zeros(num_features, num_features, dtype=torch.float64))

    def grow(self, num_new: int) -> None:
        super().grow(num_new)
        self.means = torch.cat([self.means, self.means.new_zeros(num_new, self.num_features)])

    def learn(self, inputs: Tensor, labels: Tensor, known: Tensor) -> None:
        counts = self.counts.clone()
        for rows in torch.split(torch.arange(len(labels), device=labels.device), _ROWS):
            x, y, k = inputs[rows], labels[rows], known[rows]
            mean, number = earlier_means(x, y, k, self.means, counts)
            d = x - mean  # (n, d)
            if self.released:
                number = counts.sum() + k.cumsum(dim=0) - k  # samples of all classes before each row
            self.scatter += (d * (k * number / (number + 1))[:, None]).T @ d
            targets = self.one_hot(y) * k[:, None]  # (n, C)
            added = targets.sum(dim=0)
            counts += added.long()
            self.means += (targets.T @ x - added[:, None] * self.means) / counts.clamp(min=1)[:, None]

    @torch.no_grad()
    def initialise(self, features: Tensor, labels: Tensor) -> None:
        """Start from the class means and the shrunk covariance of base data.

        Args:
            features: Of all processes, ``(n, d)``.
            labels: Columns, int64 ``(n,)``; rows with label -1 are left out.
        """
        inputs, labels = features[labels >= 0].double(), labels[labels >= 0]
        targets = self.one_hot(labels)
        self.counts.copy_(targets.sum(dim=0))
        self.means.copy_(targets.T @ inputs / self.counts.clamp(min=1)[:, None])
        self.scatter.copy_(len(labels) * oas_covariance(inputs - self.means[labels]))
        self._solved = False

    def covariance(self) -> Tensor:
        """``(1 - eps) S + eps I``, float64 ``(d, d)``."""
        spread = (self.scatter + self.scatter.T) / (2 * self.counts.sum().clamp(min=1))
        identity = torch.eye(self.num_features, dtype=spread.dtype, device=spread.device)
        return (1 - self.shrinkage) * spread + self.shrinkage * identity

    def solution(self) -> tuple[Tensor, Tensor]:
        return gaussian_classifier(self.means, self.covariance())


class SLDA(StreamedStrategy):
    """Class means and a shared covariance on a frozen backbone, updated with each sample of the stream.

    Args:
        shrinkage: eps, in [0, 1].
        base_initialisation: Whether the first task gives the initial means and covariance, at its end, instead of being
            learnt as a stream.
        released: Whether to use the update of the released code.
        kwargs: Options of the base class.
    """

    traits = StreamedStrategy.traits.but(
        family="online", paper="Hayes & Kanan, CVPR-W 2020, arXiv:1909.01520", needs_pretrained=True
    )

    def __init__(
        self,
        *,
        shrinkage: float = 1e-4,
        base_initialisation: bool = False,
        released: bool = False,
        **kwargs: Any,
    ) -> None:
        head = functools.partial(SLDAHead, shrinkage=shrinkage, released=released)
        head(1)  # so that an option out of range raises here, not when the network is built
        super().__init__(head=head, **kwargs)
        self.base_initialisation = base_initialisation

    def phases(self, task: Task) -> list[Phase]:
        return [] if self.base_initialisation and task.is_first else super().phases(task)

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        head = self.network.head
        assert isinstance(head, SLDAHead)
        if self.base_initialisation and task.is_first:
            head.initialise(*self.passes.all_features())
