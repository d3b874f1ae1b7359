"""ROID, universal test-time adaptation (Marsden, Doebler, Yang, WACV 2024, arXiv:2306.00650).

Scales and shifts theta of the normalisation layers are trained with weighted samples, kept near the source, and the
scores are corrected for the shares of the classes in the batch. With p_i the prediction for x_i of a batch of B, m the
moving mean of predictions, d_i = 1 - cos(p_i, m) and c_i = -H(p_i), both scaled to [0, 1] over the batch,

    w_i = exp(d_i c_i / T)  if  d_i >= mean d,  else 0;       m <- 0.9 m + 0.1 mean_i p_i
    L = 1/B sum_i w_i [ SLR(p_i) + SCE(p(aug(x_i)), p_i) ]
    theta <- a theta + (1 - a) theta_0                         after each step

SLR is the soft likelihood ratio (``SoftLikelihoodRatio``), SCE the symmetric cross-entropy, with a gradient through
both predictions; the score is log(p p~) with the smoothed prior p~ of ``PriorCorrection``. T -> temperature,
a -> source_momentum. ``DiversityCertainty``, ``WeightEnsembling`` and ``PriorCorrection`` go with other methods too.
Departs from the authors' code:
- the augmented view is computed for the whole batch, not for the samples with a weight alone: with batch normalisation
  its statistics are of the whole batch;
- it repeats the edge of the image instead of reflecting it;
- the prior weights probabilities; ``prior_correction="logits"`` is the code's product with the logits.
"""

from typing import Any, Literal

from torch import Tensor

from cl_lightning.checks import at_least, one_of
from cl_lightning.strategies.test_time.base import TestTimeAdaptation, Trained
from cl_lightning.strategies.test_time.parts.filters import DiversityCertainty, SampleFilter
from cl_lightning.strategies.test_time.parts.losses import SoftLikelihoodRatio, symmetric_cross_entropy
from cl_lightning.strategies.test_time.parts.outputs import PriorCorrection
from cl_lightning.strategies.test_time.parts.part import OutputHead
from cl_lightning.strategies.test_time.parts.restoration import RestorationRule, WeightEnsembling
from cl_lightning.strategies.test_time.parts.views import viewed
from cl_lightning.strategies.test_time.tent import Tent
from cl_lightning.strategy import Batch, Output

_VIEW = 0xC4  # salt


class WeightedConsistency(Tent):
    """Base class of ROID and CMF: weighted soft likelihood ratio and consistency with a view, corrected for the prior.

    Args:
        temperature: T, above 0.
        consistency_weight: Weight of the symmetric cross-entropy with the view; 0 leaves the view out.
        prior_correction: Whether the smoothed prior weights ``probabilities``, ``logits``, or nothing (``off``).
        params: Parameters that are trained, see ``TestTimeAdaptation``.
        filters: Further filters, see ``TestTimeAdaptation``.
        kwargs: Options of ``Tent``.
    """

    traits = TestTimeAdaptation.traits  # a base class

    def __init__(
        self,
        *,
        temperature: float = 1 / 3,
        consistency_weight: float = 1.0,
        prior_correction: Literal["probabilities", "logits", "off"] = "probabilities",
        params: Literal["norm", "early_norm", "all"] | list[str] = "norm",
        filters: list[SampleFilter] | None = None,
        **kwargs: Any,
    ) -> None:
        one_of(self, ("probabilities", "logits", "off"), prior_correction=prior_correction)
        at_least(self, 0, consistency_weight=consistency_weight)
        output: OutputHead | None = None if prior_correction == "off" else PriorCorrection(prior_correction)
        chosen: Trained = params
        super().__init__(
            loss=SoftLikelihoodRatio(),
            output=output,
            mean_over="batch",
            params=chosen,
            filters=[DiversityCertainty(temperature), *(filters or ())],
            **kwargs,
        )
        self.consistency_weight = consistency_weight

    def adapt(self, batch: Batch, output: Output) -> tuple[Tensor, dict[str, Tensor]]:
        scores, terms = super().adapt(batch, output)
        if self.consistency_weight:
            view = self.forward_source_classes(viewed(self, batch, batch.draw.fork(_VIEW), sharp=True)).logits
            terms["consistency"] = self.consistency_weight * symmetric_cross_entropy(view, output.logits)
        return scores, terms


class ROID(WeightedConsistency):
    """Weighted soft likelihood ratio and consistency, weight ensembling with the source, prior correction.

    Args:
        source_momentum: a, in [0, 1]: 1 for no ensembling, 0 for the source at each step.
        temperature: T, above 0.
        consistency_weight: Weight of the symmetric cross-entropy with the view, at least 0; 0 leaves the view out.
        prior_correction: Whether the smoothed prior weights ``probabilities``, ``logits``, or nothing (``off``).
        restoration: Further rules, see ``TestTimeAdaptation``.
        kwargs: Options of ``Tent``.
    """

    traits = TestTimeAdaptation.traits.but(
        family="test-time", paper="Marsden et al., WACV 2024, arXiv:2306.00650", transductive=True
    )

    def __init__(
        self,
        *,
        source_momentum: float = 0.99,
        temperature: float = 1 / 3,
        consistency_weight: float = 1.0,
        prior_correction: Literal["probabilities", "logits", "off"] = "probabilities",
        restoration: list[RestorationRule] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            temperature=temperature,
            consistency_weight=consistency_weight,
            prior_correction=prior_correction,
            restoration=[WeightEnsembling(source_momentum), *(restoration or ())],
            **kwargs,
        )
