"""RDumb (Press et al., NeurIPS 2023, arXiv:2306.05401): a simple method that is reset to the source at intervals.

ETA, ``EATA`` without its penalty, and every ``reset_every`` steps the network, the optimizer and the mean prediction
are reset to their state at the beginning of the stream. A batch of which no sample is selected is no step. In long
streams most other methods end below the source network, which is not adapted.
"""

from typing import Any

from cl_lightning.strategies.test_time.base import TestTimeAdaptation
from cl_lightning.strategies.test_time.eata import EATA
from cl_lightning.strategies.test_time.parts.restoration import PeriodicReset, RestorationRule


class RDumb(EATA):
    """ETA with resets at fixed intervals.

    Args:
        reset_every: Number of steps between resets, at least 1: 1,000 in the paper.
        margin: Threshold of the entropy, see ``EATA``.
        diversity: Largest cosine with the mean prediction, see ``EATA``: 0.05 in the paper for ImageNet.
        fisher_weight: Weight of the penalty of ``EATA``, at least 0.
        restoration: Further rules, see ``TestTimeAdaptation``.
        kwargs: Options of ``EATA``.
    """

    traits = TestTimeAdaptation.traits.but(
        family="test-time", paper="Press et al., NeurIPS 2023, arXiv:2306.05401", transductive=True
    )

    def __init__(
        self,
        *,
        reset_every: int = 1000,
        margin: float = 0.4,
        diversity: float = 0.4,
        fisher_weight: float = 0.0,
        restoration: list[RestorationRule] | None = None,
        **kwargs: Any,
    ) -> None:
        rules: list[RestorationRule] = [PeriodicReset(reset_every), *(restoration or ())]
        super().__init__(margin=margin, diversity=diversity, fisher_weight=fisher_weight, restoration=rules, **kwargs)
