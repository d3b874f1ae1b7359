"""Wisdom of crowds: choice of samples for open-set test-time adaptation (Lee et al., ICCV 2023, arXiv:2308.06879).

``Tent`` on the samples for which adaptation has not lowered the confidence. With p_i the prediction, p0_i the
prediction of the source network, and c = argmax p0_i,

    selected:  p_i,c >= p0_i,c
    L = 1/K sum_selected H(p_i) - alpha H(mean_i p_i)

where the mean of the second term is over the whole batch. Adaptation by many samples raises the confidence in a correct
prediction; it lowers the confidence in images of unknown classes and in wrong predictions. Both networks normalise with
the statistics of the batch. In the first step all samples are selected. alpha -> diversity_weight, 0 in the paper; a
public re-implementation uses 0.1 to 1. ``--model.filters+=SourceConfidence`` makes the same choice in any other method.
"""

from typing import Any, Literal

from torch import Tensor

from cl_lightning.checks import at_least
from cl_lightning.strategies.test_time.base import TestTimeAdaptation, Trained
from cl_lightning.strategies.test_time.parts.filters import SampleFilter, SourceConfidence
from cl_lightning.strategies.test_time.parts.losses import marginal_entropy
from cl_lightning.strategies.test_time.tent import Tent
from cl_lightning.strategy import Batch, Output


class WisdomOfCrowds(Tent):
    """Entropy minimisation on samples whose confidence has not fallen below the confidence of the source.

    Args:
        diversity_weight: alpha, at least 0.
        params: Parameters that are trained, see ``TestTimeAdaptation``.
        filters: Further filters, see ``TestTimeAdaptation``.
        kwargs: Options of ``Tent``.
    """

    traits = TestTimeAdaptation.traits.but(
        family="test-time", paper="Lee et al., ICCV 2023, arXiv:2308.06879", transductive=True
    )

    def __init__(
        self,
        *,
        diversity_weight: float = 0.0,
        params: Literal["norm", "early_norm", "all"] | list[str] = "norm",
        filters: list[SampleFilter] | None = None,
        **kwargs: Any,
    ) -> None:
        chosen: Trained = params
        super().__init__(params=chosen, filters=[SourceConfidence(), *(filters or ())], **kwargs)
        at_least(self, 0, diversity_weight=diversity_weight)
        self.diversity_weight = diversity_weight

    def adapt(self, batch: Batch, output: Output) -> tuple[Tensor, dict[str, Tensor]]:
        scores, terms = super().adapt(batch, output)
        if self.diversity_weight:
            terms["diversity"] = -self.diversity_weight * marginal_entropy(output.logits, batch)
        return scores, terms
