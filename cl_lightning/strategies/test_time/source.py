"""The source network, as it is: the baseline of all test-time adaptation.

score(x) = f(x), with the statistics of the source data in batch normalisation
"""

from typing import Any, ClassVar

from cl_lightning.strategies.test_time.base import TestTimeAdaptation


class Source(TestTimeAdaptation):
    """The source network without any adaptation.

    Args:
        kwargs: Of ``TestTimeAdaptation``.
    """

    family: ClassVar[str] = "test-time"
    paper: ClassVar[str] = "lower bound"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(statistics="source", trained=None, reset="never", scored="before", **kwargs)
