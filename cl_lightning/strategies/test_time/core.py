"""Core, class correlation under calibrated batch statistics (You, Li, Zhao, Test-time batch statistics calibration for
covariate shift, arXiv:2110.04065).

Batch normalisation mixes the statistics of the source and of the test batch, alpha-BN:

    mu = (1 - a) mu_S + a mu_B,   var = (1 - a) var_S + a var_B

Its scales and shifts are trained so that no two classes share the probability of a sample. With P the predictions of
the batch and w_i = 1 + exp(-H_i),

    C = P^T diag(w) P, rows divided by their sums,     L = 1/C sum_{i != j} C_ij

a -> alpha, the weight of the test batch (the paper's alpha is the weight of the source, 1 - a). ``BNAdapt`` with
``statistics="mix"`` and this alpha is alpha-BN alone, and Core with learning rate 0. The paper gives the loss as a
picture; the formula, T = 1 and a = 0.5 are our choices.
"""

from typing import Any, Literal

from cl_lightning.strategies.test_time.base import TestTimeAdaptation
from cl_lightning.strategies.test_time.parts.losses import ClassCorrelation
from cl_lightning.strategies.test_time.tent import Tent


class Core(Tent):
    """Class correlation as loss, with statistics of source and test batch mixed.

    Args:
        temperature: T of the predictions in the loss, above 0.
        alpha: a, the weight of the test batch in the statistics, in [0, 1].
        statistics: Statistics of batch normalisation, see ``TestTimeAdaptation``.
        kwargs: Options of ``Tent`` without ``loss``.
    """

    traits = TestTimeAdaptation.traits.but(
        family="test-time", paper="You et al. 2021, arXiv:2110.04065", transductive=True
    )

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        alpha: float = 0.5,
        statistics: Literal["source", "batch", "mix", "moving"] = "mix",
        **kwargs: Any,
    ) -> None:
        super().__init__(loss=ClassCorrelation(temperature), alpha=alpha, statistics=statistics, **kwargs)
        self.traits = self.traits.but(transductive=True)
