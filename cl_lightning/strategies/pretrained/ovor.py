"""OVOR: OnePrompt with virtual outlier regularisation (Huang, Chen & Hsu, ICLR 2024, arXiv:2402.04129).

After the training of a task as in OnePrompt, a phase ``outliers`` trains the rows of the head of the task alone, on the
features h of the task's images and on virtual outliers o, drawn around it (NPOS: Tao et al., ICLR 2023):

    boundary   the ``boundary`` features whose distance to their K-th neighbour is largest, on h / ||h||
    outliers   h_i / ||h_i|| + sigma e,  e ~ N(0, I),  ``draws`` of them around each boundary point; kept are the
               ``per_class`` C draws with the largest distance to their K-th neighbour, C classes of the task
    E(z) = - log sum_c exp(z_c) over the classes c of the task
    L = CE(z, y) + lambda [ mean H(max(E(z(h)) - m_in, 0)) + mean H(max(m_out - E(z(o)), 0)) ]

H is Huber's function, x^2 / 2 up to 1 and x - 1/2 above. Each epoch draws new outliers. lambda -> outlier_weight,
sigma -> spread, K -> neighbours, m_in -> energy_in, m_out -> energy_out.

The paper's code computes the boundary points but does not add them: its outliers are sigma e, around the origin, with
the same draws for each of the points (``around="origin"``, here with draws of their own). Around the boundary (the
default, as the paper writes) an outlier is scaled by the norm of its boundary feature (our choice), since the head
takes features that are not normalised.
Departs from the code, where one optimizer and schedule go through both phases, and features are features of augmented
images: here the phase has its own (``outlier_options``), and features are computed once, of un-augmented images. A
feature is not a neighbour of itself. The rows of a step are drawn from features and outliers together, in the code as
many of each kind as it has of all rows; each mean is over the rows of its kind.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import Draw
from cl_lightning.checks import above, at_least, one_of, within
from cl_lightning.data import FeaturePool
from cl_lightning.losses import full_precision, masked_logits, mean_over_selected
from cl_lightning.strategies.pretrained.one_prompt import OnePrompt
from cl_lightning.strategy import Batch, Output, Phase, PhaseOptions, Task

Around = Literal["boundary", "origin"]
_NOISE = 0x0E1A  # salt


def neighbour_distance(points: Tensor, features: Tensor, rank: int) -> Tensor:
    """Distance ``(n,)`` of points ``(n, d)`` to their ``rank``-th nearest of the features ``(m, d)``, counted from 1.

    With fewer features than ``rank`` it is the distance to the farthest one.
    """
    distances: Tensor = torch.cdist(points, features).kthvalue(min(rank, len(features)), dim=1).values
    return distances


@torch.no_grad()
def virtual_outliers(
    features: Tensor,
    count: int,
    *,
    draw: Draw,
    neighbours: int = 50,
    boundary: int = 50,
    draws: int = 600,
    spread: float = 0.1,
    around: Around = "boundary",
) -> Tensor:
    """Draws around the features with the fewest neighbours that are farthest from all features, see the module.

    Args:
        features: ``(n, d)``, at least one.
        count: Number of outliers; at most all draws of the boundary points.
        draw: Random numbers, the same on every process.
        neighbours: K; a feature is not a neighbour of itself.
        boundary: Number of boundary points, at least 1; at most n are used.
        draws: Number of draws for each boundary point, at least 1.
        spread: sigma, standard deviation of each coordinate, for features of norm 1.
        around: Centre of the draws.

    Returns:
        ``(count, d)``, those that are farthest first.
    """
    unit = F.normalize(full_precision(features), dim=1)
    chosen = neighbour_distance(unit, unit, neighbours + 1).argsort(descending=True, stable=True)[:boundary]
    norms = features[chosen].norm(dim=1)
    best, outliers = unit.new_zeros(0), unit.new_zeros(0, unit.shape[1])
    for place, row in enumerate(chosen):  # one point at a time: the distances of all draws would be large
        noise = spread * draw.fork(place).randn(draws, unit.shape[1], device=unit.device)[0].to(unit.dtype)
        points = noise + unit[row] if around == "boundary" else noise
        best = torch.cat([best, neighbour_distance(points, unit, neighbours)])
        outliers = torch.cat([outliers, points * norms[place] if around == "boundary" else points])
        best, order = best.sort(descending=True, stable=True)
        best, outliers = best[:count], outliers[order[:count]]
    return outliers.to(features.dtype)


class OutlierFeatures(FeaturePool):
    """Features of a task, followed by virtual outliers with the label -1, which are drawn for each epoch.

    Args:
        features: ``(n, d)``, on the device, the same on every process.
        labels: Columns, int64 ``(n,)``.
        count: Number of outliers.
        outliers: Draws the outliers ``(count, d)`` of the epoch that runs.
        epoch: Returns the epoch that runs.
    """

    def __init__(
        self, features: Tensor, labels: Tensor, count: int, outliers: Callable[[int], Tensor], epoch: Callable[[], int]
    ) -> None:
        super().__init__(features, torch.cat([labels, labels.new_full((count,), -1)]))
        self.own, self.outliers, self.epoch = features, outliers, epoch
        self._drawn = -1  # epoch of the outliers that ``features`` holds

    def take(self, rows: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        epoch = self.epoch()
        if epoch != self._drawn:
            self.features, self._drawn = torch.cat([self.own, self.outliers(epoch)]), epoch
        return super().take(rows, draw)


class OVOR(OnePrompt):
    """OnePrompt, and a phase that trains the head on features and virtual outliers with bounds on their energies.

    Args:
        outlier_weight: lambda, at least 0.
        energy_in: m_in, above which the energy of features is penalised.
        energy_out: m_out, below which the energy of outliers is penalised.
        per_class: Number of outliers of an epoch per class of the task, at least 1.
        neighbours: K, at least 1.
        boundary: Number of boundary points, at least 1.
        draws: Number of draws around a boundary point, at least 1.
        spread: sigma, above 0, for features of norm 1.
        around: Whether outliers are drawn around the ``boundary`` points or, as in the released code, the ``origin``.
        outlier_options: Options of the phase ``outliers``; 0 epochs to leave it out.
        kwargs: Options of ``OnePrompt``.
    """

    traits = OnePrompt.traits.but(paper="Huang et al., ICLR 2024, arXiv:2402.04129")

    def __init__(
        self,
        *,
        outlier_weight: float = 0.1,
        energy_in: float = -15.0,
        energy_out: float = -3.0,
        per_class: int = 40,
        neighbours: int = 50,
        boundary: int = 50,
        draws: int = 600,
        spread: float = 0.1,
        around: Around = "boundary",
        outlier_options: PhaseOptions = PhaseOptions(epochs=4),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        at_least(self, 0, outlier_weight=outlier_weight)
        within(self, "(-inf, inf)", energy_in=energy_in, energy_out=energy_out)
        at_least(self, 1, per_class=per_class, neighbours=neighbours, boundary=boundary, draws=draws)
        above(self, 0, spread=spread)
        one_of(self, get_args(Around), around=around)
        self.outlier_weight, self.energy_in, self.energy_out = outlier_weight, energy_in, energy_out
        self.per_class, self.outlier_options = per_class, outlier_options
        self.sampling: dict[str, Any] = {
            "neighbours": neighbours,
            "boundary": boundary,
            "draws": draws,
            "spread": spread,
            "around": around,
        }

    def phases(self, task: Task) -> list[Phase]:
        if self.outlier_options.epochs == 0:
            return [Phase()]
        return [Phase(), Phase("outliers", self.outlier_options, features=self.features_and_outliers)]

    def features_and_outliers(self) -> OutlierFeatures:
        features, labels = self.passes.all_features()
        centres = min(self.sampling["boundary"], len(features))
        count = min(self.per_class * len(self.task.columns), self.sampling["draws"] * centres)

        def outliers(epoch: int) -> Tensor:
            draw = Draw.of(1, self.seed, self.task.index, epoch, _NOISE)
            return virtual_outliers(features, count, draw=draw, **self.sampling)

        return OutlierFeatures(features, labels, count, outliers, lambda: self.epoch)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.phase.features is None:
            return super().losses(batch, output)
        inside, weights = batch.labels >= 0, self.data.weights_of(batch)
        logits = masked_logits(full_precision(output.logits), self.task_columns[-1])
        ce = F.cross_entropy(logits, batch.labels, ignore_index=-1, reduction="none")
        energy = -logits.logsumexp(dim=1)
        above_in, below_out = (energy - self.energy_in).relu(), (self.energy_out - energy).relu()
        too_high, too_low = (F.huber_loss(x, torch.zeros_like(x), reduction="none") for x in (above_in, below_out))
        return {
            "ce": mean_over_selected(ce if weights is None else weights * ce, inside, batch),
            "energy_in": self.outlier_weight * mean_over_selected(too_high, inside, batch),
            "energy_out": self.outlier_weight * mean_over_selected(too_low, ~inside, batch),
        }
