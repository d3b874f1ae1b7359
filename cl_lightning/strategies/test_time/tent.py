"""Tent, test entropy minimisation (Wang et al., ICLR 2021, arXiv:2006.10726).

Scales and shifts of the normalisation layers are trained, all else is frozen, and normalisation goes by the statistics
of the test batch:

    L = mean_i H(p_i),   H(p) = -sum_c p_c log p_c,   p_i = softmax(f(x_i))

A batch is predicted by the same forward pass, before the step. With a learning rate of 0 it is ``BNAdapt``. Without
resets it can collapse, with many classes or small batches above all.
Departs from the authors' code, which has the network in train mode: dropout and the like are off.
"""

from typing import Any, ClassVar

from torch import Tensor

from cl_lightning.batch import Batch
from cl_lightning.losses import entropy, mean_over_rows
from cl_lightning.network import Output
from cl_lightning.strategies.test_time.base import TestTimeAdaptation, tiny_resnet


class Tent(TestTimeAdaptation):
    """Entropy of the predictions, minimised over the parameters of normalisation layers.

    Args:
        kwargs: Of ``TestTimeAdaptation``.
    """

    family: ClassVar[str] = "test-time"
    paper: ClassVar[str] = "Wang et al., ICLR 2021, arXiv:2006.10726"
    uses_test_batch = True

    @classmethod
    def conformance_options(cls) -> dict[str, Any]:
        return {"backbone": tiny_resnet}

    def adapt(self, batch: Batch, output: Output) -> tuple[Tensor, dict[str, Tensor]]:
        return output.logits, {"entropy": mean_over_rows(entropy(output.logits))}
