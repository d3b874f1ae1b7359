"""Prediction-time batch normalisation (Nado et al. 2020, arXiv:2006.10963; Schneider et al., NeurIPS 2020,
arXiv:2006.16971).

Batch normalisation takes the statistics of the test batch B, alone or mixed with those of the source S; no parameter
changes:

    mu = (1 - a) mu_S + a mu_B,   var = (1 - a) var_S + a var_B

a = 1 for ``statistics="batch"``; ``alpha`` with ``mix``, or n / (n + N) with ``prior`` N; with ``moving``, running
statistics that move towards those of each batch (a forward pass that moves them, then one that predicts). var_B is the
biased variance, so that a = 1 is the same in both; public code of the mix has the unbiased one. a = 0 is ``Source``.
"""

from typing import Any, ClassVar, Literal

from cl_lightning.strategies.test_time.base import TestTimeAdaptation, tiny_resnet


class BNAdapt(TestTimeAdaptation):
    """Batch normalisation by the statistics of the test batch, without training.

    Args:
        statistics: ``batch``, ``mix`` or ``moving``, see above.
        reset: With ``moving``: when the statistics are those of the source again.
        kwargs: Of ``TestTimeAdaptation``.
    """

    family: ClassVar[str] = "test-time"
    paper: ClassVar[str] = "Nado et al. 2020, arXiv:2006.10963; Schneider et al., NeurIPS 2020, arXiv:2006.16971"
    uses_test_batch = True

    def __init__(
        self,
        *,
        statistics: Literal["batch", "mix", "moving"] = "batch",
        reset: Literal["never", "domain", "batch"] = "never",
        **kwargs: Any,
    ) -> None:
        super().__init__(statistics=statistics, trained=None, reset=reset, scored="before", **kwargs)

    @classmethod
    def conformance_options(cls) -> dict[str, Any]:
        return {"backbone": tiny_resnet}
