"""APER, adapt and merge, earlier called ADAM (Zhou et al., IJCV 2024, arXiv:2303.07338).

A parameter-efficient module in a pretrained backbone phi is trained on the first task, under a cosine classifier with a
learnt scale s:

    L = CE(s cos(phi*(x), w), y)

The classifier of all tasks is then the class means of the concatenated features, as in ``SimpleCIL``:

    z(x) = [phi(x); phi*(x)],   mu_c = 1/n_c sum_{y_i = c} z(x_i),   score_c(x) = cos(z(x), mu_c)

z is normalised as a whole, so the half with the larger norm has more weight. With a learning rate of 0 and a module
that initially does not change the backbone, APER is ``SimpleCIL``. The module is an ``Adapter`` (the default, the
AdaptFormer of the paper), ``SSF``, ``VPT`` (deep, or shallow with ``deep: false``), or ``WholeModel`` (its
"finetune"). ``concatenate=False`` is the ablation with phi* alone.
Departs from the code, which computes the statistics of a CNN's batch normalisation again: here they stay unchanged.
"""

import functools
from typing import Any

from cl_lightning.memory import PrototypeHead
from cl_lightning.models import Adapter, PeftFactory
from cl_lightning.strategies.pretrained.first_session import FirstSessionAdaptation
from cl_lightning.strategy import HeadFactory


class APER(FirstSessionAdaptation):
    """Class means of pretrained features, concatenated with features that are adapted to the first task.

    Args:
        peft: Builds the module for the backbone; None for ``Adapter``.
        head: Builds the final head; None for ``PrototypeHead`` with cosine similarity.
        concatenate: Whether the final head takes [phi(x); phi*(x)] instead of phi*(x).
        kwargs: Options of ``FirstSessionAdaptation``.
    """

    traits = FirstSessionAdaptation.traits.but(paper="Zhou et al., IJCV 2024, arXiv:2303.07338")

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
