"""RPL, self-learning with robust pseudo-labels (Rusak et al., TMLR 2022, arXiv:2104.12928).

``Tent`` with the generalised cross-entropy of the predicted class y^ = argmax_c p_c as loss:

    L = mean_i (1 - p_i,y^ ^ q) / q

No gradient passes through y^. q -> 0 is the cross-entropy, q = 1 the mean absolute error: with a larger q, unsure
predictions, which are wrong more often, have a smaller gradient. The network that is trained gives the labels, at each
step. Departs from the paper, which takes several passes over a test set and counts errors afterwards: here each
batch is seen once, and predicted before the step.
"""

from typing import Any

from cl_lightning.strategies.test_time.base import TestTimeAdaptation
from cl_lightning.strategies.test_time.parts.losses import GeneralizedCrossEntropy
from cl_lightning.strategies.test_time.tent import Tent


class RPL(Tent):
    """Robust pseudo-labels: generalised cross-entropy with the predicted class.

    Args:
        q: In (0, 1]: near 0 for cross-entropy, 1 for the mean absolute error.
        kwargs: Options of ``Tent`` without ``loss``.
    """

    traits = TestTimeAdaptation.traits.but(
        family="test-time", paper="Rusak et al., TMLR 2022, arXiv:2104.12928", transductive=True
    )

    def __init__(self, *, q: float = 0.8, **kwargs: Any) -> None:
        super().__init__(loss=GeneralizedCrossEntropy(q), **kwargs)
