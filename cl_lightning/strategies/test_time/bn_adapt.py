"""Prediction-time batch normalisation (Nado et al. 2020, arXiv:2006.10963; Schneider et al., NeurIPS 2020,
arXiv:2006.16971).

Batch normalisation uses the statistics of the test batch B, alone or mixed with the statistics of the source S; no
parameter changes:

    mu = (1 - a) mu_S + a mu_B,   var = (1 - a) var_S + a var_B

``statistics="batch"``: a = 1. ``mix``: a = ``alpha``, or a = n / (n + N) for a batch of n images with ``prior`` N.
``moving``: running statistics, updated by one forward pass over each batch before a second pass predicts it.
a = 0 is ``Source``. var_B is the biased variance, so that ``mix`` with a = 1 equals ``batch``.
Departs from public code of the mix, which uses the unbiased variance.
"""

from typing import Any, Literal

from cl_lightning.strategies.test_time.base import TestTimeAdaptation


class BNAdapt(TestTimeAdaptation):
    """Batch normalisation with the statistics of the test batch, without training.

    Args:
        statistics: ``batch``, ``mix`` or ``moving``, see above.
        reset: With ``moving``, when the statistics are reset to the source statistics: ``never``, before each
            ``domain`` or before each ``batch``.
        kwargs: Options of ``TestTimeAdaptation``.
    """

    traits = TestTimeAdaptation.traits.but(
        family="test-time",
        paper="Nado et al. 2020, arXiv:2006.10963; Schneider et al., NeurIPS 2020, arXiv:2006.16971",
        transductive=True,
    )

    def __init__(
        self,
        *,
        statistics: Literal["batch", "mix", "moving"] = "batch",
        reset: Literal["never", "domain", "batch"] = "never",
        **kwargs: Any,
    ) -> None:
        super().__init__(statistics=statistics, params=None, reset=reset, predict_when="before", **kwargs)
