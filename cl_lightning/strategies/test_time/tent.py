"""Tent, test entropy minimisation (Wang et al., ICLR 2021, arXiv:2006.10726).

The scales and shifts of the normalisation layers are trained to minimise the entropy of the predictions; all other
parameters are frozen. Normalisation uses the statistics of the test batch:

    L = mean_i H(p_i),   H(p) = -sum_c p_c log p_c,   p_i = softmax(f(x_i))

``loss`` replaces the entropy H by another loss of ``parts.losses``. The same forward pass, before the step, predicts
the batch. With a learning rate of 0, Tent is ``BNAdapt``. Without resets the predictions can collapse to a few classes,
above all with many classes or small batches.
Departs from the authors' code, where the network is in train mode: here it is in eval mode, without dropout.
"""

import copy
from typing import Any

from torch import Tensor

from cl_lightning.strategies.test_time.base import TestTimeAdaptation
from cl_lightning.strategies.test_time.parts.losses import Entropy, TestTimeLoss
from cl_lightning.strategy import Batch, Output


class Tent(TestTimeAdaptation):
    """Entropy minimisation over the scales and shifts of normalisation layers.

    Args:
        loss: Loss of a batch without labels, such as ``SoftLikelihoodRatio``; None for ``Entropy``.
        kwargs: Options of ``TestTimeAdaptation``.
    """

    traits = TestTimeAdaptation.traits.but(
        family="test-time", paper="Wang et al., ICLR 2021, arXiv:2006.10726", transductive=True
    )

    def __init__(self, *, loss: TestTimeLoss | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.loss = copy.deepcopy(loss) or Entropy()
        self.traits = self.traits.but(transductive=self.traits.transductive or self.loss.transductive)

    def adapt(self, batch: Batch, output: Output) -> tuple[Tensor, dict[str, Tensor]]:
        return output.logits, {"adaptation": self.loss(self, batch, output)}
