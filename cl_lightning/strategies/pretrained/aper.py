"""APER, adapt and merge, earlier called ADAM (Zhou et al., IJCV 2024, arXiv:2303.07338).

A few parameters in a pretrained backbone phi are trained on the first task, under a cosine classifier of a scale s that
is learnt:

    L = CE(s cos(phi*(x), w), y)

Then the class means of both sets of features, side by side, are the classifier, as in ``SimpleCIL``:

    z(x) = [phi(x); phi*(x)],   mu_c = 1/n_c sum_{y_i = c} z(x_i),   score_c(x) = cos(z(x), mu_c)

z is normalised as a whole, so that the longer half weighs more. With a learning rate of 0, and something put in that
changes nothing at the beginning, it is ``SimpleCIL``. What is put in: an ``Adapter`` (the default, its AdaptFormer),
``SSF``, ``VPT``, or ``WholeModel`` for its "finetune". ``concatenate=False`` is the ablation with phi* alone. Of a CNN
its code measures the statistics of batch normalisation anew; here they stay.
"""

import functools
from typing import Any, ClassVar

from cl_lightning.heads import PrototypeHead
from cl_lightning.peft import SSF, Adapter, PeftFactory
from cl_lightning.strategies.pretrained.first_session import FirstSessionAdaptation
from cl_lightning.strategy import HeadFactory


class APER(FirstSessionAdaptation):
    """Class means of features as they were and as adapted to the first task, side by side.

    Args:
        peft: What is put into the backbone; None for ``Adapter``.
        head: Builds the head that lasts; None for ``PrototypeHead`` with cosines.
        concatenate: Whether the features as they were stand beside the adapted ones.
        kwargs: Of ``FirstSessionAdaptation``.
    """

    paper: ClassVar[str] = "Zhou et al., IJCV 2024, arXiv:2303.07338"

    def __init__(
        self,
        *,
        peft: PeftFactory | None = None,
        head: HeadFactory | None = None,
        concatenate: bool = True,
        **kwargs: Any,
    ) -> None:
        cosine = functools.partial(PrototypeHead, metric="cosine")
        super().__init__(peft=peft or Adapter, head=head or cosine, concatenate=concatenate, **kwargs)

    @classmethod
    def conformance_options(cls) -> dict[str, Any]:
        return {"peft": SSF}  # goes into a net without transformer blocks, too
