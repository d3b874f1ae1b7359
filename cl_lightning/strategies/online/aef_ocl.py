"""AEF-OCL: Analytic Exemplar-Free Online Continual Learning (Zhuang et al., IEEE TVT 2024, arXiv:2405.17779).

Ridge regression on random features of a frozen backbone (G-ACIL), learnt batch by batch, for streams in which some
classes have far more samples than others. Before a prediction every class c is filled up to the largest class by
pseudo-features, drawn from the mean and the variance of the features x of its samples:

    phi(x) = ReLU(P^T x),   G = sum phi phi^T,   Q = sum phi y^T        over all samples so far, n_c of class c
    x~ = mu_c + noise sigma_c * eps,   eps ~ N(0, I)                    max_k n_k - n_c of each class c
    W = (G + sum phi(x~) phi(x~)^T + r I)^-1 (Q + sum phi(x~) e_c^T),   scores phi(x)^T W

r -> ridge; P ~ U(-1/sqrt(d), 1/sqrt(d)), the initial weights of ``nn.Linear``, with ``projection`` columns; sigma_c^2
is the variance of each feature, divided by n_c - 1, and 0 for a single sample. Pseudo-features never enter G and Q: the
next batch is learnt as if there had been no prediction. They are functions of the number of samples so far, so that the
same state gives the same predictions. With noise = 0 they are copies of the mean, added without sampling. If all
classes have the same number of samples, the result is that of ``GACIL``.
Departs from the code, which updates (G + r I)^-1 and W by a recursion and copies both before a prediction: the sums
give the same W. A solution costs the pseudo-features of all classes: 10^6 rows for 100 classes and a largest class of
10^4 samples.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from cl_lightning.batch import mix
from cl_lightning.checks import at_least
from cl_lightning.models import RidgeHead, solve_positive
from cl_lightning.strategies.online.streamed import StreamedHead, StreamedStrategy

_ROWS = 2048  # pseudo-features in memory at a time
_NOISE = 0xAEF0  # salt


class BalancedRidgeHead(StreamedHead, RidgeHead):
    """Ridge regression that fills up small classes by pseudo-features; the equations are in the module's docstring.

    Args:
        num_features: Size of a feature vector, d.
        ridge: r, above 0.
        projection: Number of random features; None to use the features directly.
        noise: Factor of the standard deviations, at least 0.

    Attributes:
        means: mu, float64 ``(C, d)``.
        squares: Sums of squared distances to the means, ``(n_c - 1) sigma_c^2``, float64 ``(C, d)``.

    Raises:
        ValueError: If an option is out of range.
    """

    means: Tensor
    squares: Tensor

    def __init__(
        self, num_features: int, *, ridge: float = 0.1, projection: int | None = 8192, noise: float = 1.0
    ) -> None:
        super().__init__(num_features, ridge=ridge, projection=projection, init="uniform")
        at_least(self, 0, noise=noise)
        self.noise = noise
        self.chosen.fill_(self.ridges[0])
        for name in ("means", "squares"):
            self.register_buffer(name, torch.zeros(0, num_features, dtype=torch.float64))

    def grow(self, num_new: int) -> None:
        super().grow(num_new)
        if not len(self.gram):
            self.gram = self.gram.new_zeros(self.num_inputs, self.num_inputs)
            self.cross = self.cross.new_zeros(self.num_inputs, 0)
        self.cross = torch.cat([self.cross, self.cross.new_zeros(self.num_inputs, num_new)], dim=1)
        for name in ("means", "squares"):
            rows = getattr(self, name)
            setattr(self, name, torch.cat([rows, rows.new_zeros(num_new, self.num_features)]))

    def learn(self, inputs: Tensor, labels: Tensor, known: Tensor) -> None:
        targets = self.one_hot(labels) * known[:, None]  # (n, C)
        phi = self.expand(inputs) * known[:, None]
        self.gram += phi.T @ phi
        self.cross += phi.T @ targets
        # Pooling of two samples (Chan, Golub & LeVeque 1979): n of a class before, and m in the batch.
        n, m = self.counts[:, None].double(), targets.sum(dim=0)[:, None]
        means = targets.T @ inputs / m.clamp(min=1)
        gap = (means - self.means) * (m > 0)
        self.squares += targets.T @ (inputs - means[labels]).square() + gap.square() * n * m / (n + m).clamp(min=1)
        self.means += gap * m / (n + m).clamp(min=1)

    def pseudo_features(self, columns: Tensor, number: int) -> Tensor:
        """Features ``(n, d)`` of classes ``(n,)``, float64; the same for the same state and ``number``."""
        generator = torch.Generator().manual_seed(mix(_NOISE, int(self.counts.sum()), number))
        eps = torch.randn(len(columns), self.num_features, generator=generator, dtype=torch.float64).to(columns.device)
        sigma = (self.squares / (self.counts - 1).clamp(min=1)[:, None]).sqrt()
        return self.means[columns] + self.noise * sigma[columns] * eps

    def solution(self) -> tuple[Tensor, None]:
        gram, cross = self.gram.clone(), self.cross.clone()
        missing = torch.where(self.counts > 0, self.counts.max() - self.counts, 0)
        if self.noise == 0:
            phi = self.expand(self.means)  # (C, E)
            gram += phi.T @ (phi * missing[:, None])
            cross += phi.T * missing
        else:
            of_class = torch.arange(len(missing), device=missing.device).repeat_interleave(missing)
            for number, columns in enumerate(torch.split(of_class, _ROWS)):
                phi = self.expand(self.pseudo_features(columns, number))
                gram += phi.T @ phi
                cross += phi.T @ self.one_hot(columns)
        gram.diagonal().add_(self.chosen)
        return solve_positive(gram, cross).T, None


class AEFOCL(StreamedStrategy):
    """Ridge regression on random features, learnt batch by batch, with pseudo-features of classes with few samples.

    Args:
        ridge: r, above 0.
        projection: Number of random features; None to use the features of the backbone.
        noise: Factor of the standard deviations of pseudo-features, at least 0.
        kwargs: Options of the base class.
    """

    traits = StreamedStrategy.traits.but(
        family="online", paper="Zhuang et al., IEEE TVT 2024, arXiv:2405.17779", needs_pretrained=True
    )

    def __init__(self, *, ridge: float = 0.1, projection: int | None = 8192, noise: float = 1.0, **kwargs: Any) -> None:
        head = functools.partial(BalancedRidgeHead, ridge=ridge, projection=projection, noise=noise)
        head(1)  # so that an option out of range raises here, not when the network is built
        super().__init__(head=head, **kwargs)
