"""DeYO, destroy your object (Lee et al., ICLR 2024): entropy is not enough to choose samples.

``Tent`` on samples of low entropy whose prediction depends on the shape of an object. With p_i the prediction, y^ its
class, and p'_i the prediction for the image after its 4 x 4 tiles were shuffled,

    selected:  H_i < margin ln C   and   PLPD_i = p_i,y^ - p'_i,y^ > threshold
    L = 1/K sum_selected w_i H_i,   w_i = exp(0.4 ln C - H_i) + exp(PLPD_i)     no gradient passes through w

for K selected samples; without any, no step is taken, which synchronises with the device at each step. Tiles are
shuffled before the input normalisation. Departs from the authors' code: p' is computed for the whole batch, so that
the statistics of batch normalisation are of the batch, not of its samples of low entropy; with other normalisation
there is no difference.
"""

from typing import Any, Literal

from cl_lightning.checks import above
from cl_lightning.strategies.test_time.base import TestTimeAdaptation, Trained
from cl_lightning.strategies.test_time.parts.filters import Destruction, EntropyFilter, ObjectFilter, SampleFilter
from cl_lightning.strategies.test_time.tent import Tent


class DeYO(Tent):
    """Entropy minimisation on samples whose prediction needs the shape of an object.

    Args:
        margin: Threshold of the entropy as a share of ln C, above 0.
        threshold: Least fall of the probability of the predicted class, in [-1, 1].
        destruction: How the shape is destroyed: shuffled ``patches``, shuffled ``pixels``, or ``occlusion`` of the
            centre.
        entropy_margin: Share of ln C in the weight exp(share ln C - H), above 0; None to leave this weight out.
        weighted: Whether exp(PLPD) is part of the weight.
        params: Parameters that are trained, see ``TestTimeAdaptation``.
        filters: Further filters, see ``TestTimeAdaptation``.
        kwargs: Options of ``Tent``.
    """

    traits = TestTimeAdaptation.traits.but(
        family="test-time", paper="Lee et al., ICLR 2024", transductive=True, inputs=("image",)
    )

    def __init__(
        self,
        *,
        margin: float = 0.5,
        threshold: float = 0.2,
        destruction: Destruction = "patches",
        entropy_margin: float | None = 0.4,
        weighted: bool = True,
        params: Literal["norm", "early_norm", "all"] | list[str] = "early_norm",
        filters: list[SampleFilter] | None = None,
        **kwargs: Any,
    ) -> None:
        above(self, 0, margin=margin)
        chosen: Trained = params
        objects = ObjectFilter(threshold, destruction=destruction, entropy_margin=entropy_margin, weighted=weighted)
        super().__init__(params=chosen, filters=[EntropyFilter(margin), objects, *(filters or ())], **kwargs)
