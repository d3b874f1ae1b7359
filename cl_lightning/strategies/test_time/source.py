"""The source network without adaptation: the baseline of test-time adaptation.

    score(x) = f(x)

Batch normalisation uses the statistics of the source data.
"""

from typing import Any

from cl_lightning.strategies.test_time.base import TestTimeAdaptation


class Source(TestTimeAdaptation):
    """The source network without adaptation.

    Args:
        kwargs: Options of ``TestTimeAdaptation``.
    """

    traits = TestTimeAdaptation.traits.but(family="test-time", paper="lower bound")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(statistics="source", params=None, reset="never", predict_when="before", **kwargs)
