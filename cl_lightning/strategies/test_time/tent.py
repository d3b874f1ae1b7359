"""Tent, test entropy minimisation (Wang et al., ICLR 2021, arXiv:2006.10726).

The scales and shifts of the normalisation layers are trained to minimise the entropy of the predictions; all other
parameters are frozen. Normalisation uses the statistics of the test batch:

    L = mean_i H(p_i),   H(p) = -sum_c p_c log p_c,   p_i = softmax(f(x_i))

The same forward pass, before the step, predicts the batch. With a learning rate of 0, Tent is ``BNAdapt``. Without
resets the predictions can collapse to a few classes, above all with many classes or small batches.
Departs from the authors' code, where the network is in train mode: here it is in eval mode, without dropout.
"""

from torch import Tensor

from cl_lightning.losses import entropy, mean_over_rows
from cl_lightning.strategies.test_time.base import TestTimeAdaptation
from cl_lightning.strategy import Batch, Output


class Tent(TestTimeAdaptation):
    """Entropy minimisation over the scales and shifts of normalisation layers.

    Args:
        kwargs: Options of ``TestTimeAdaptation``.
    """

    traits = TestTimeAdaptation.traits.but(
        family="test-time", paper="Wang et al., ICLR 2021, arXiv:2006.10726", transductive=True
    )

    def adapt(self, batch: Batch, output: Output) -> tuple[Tensor, dict[str, Tensor]]:
        return output.logits, {"entropy": mean_over_rows(entropy(output.logits))}
