"""Memory Aware Synapses (Aljundi et al., ECCV 2018, arXiv:1711.09601).

With theta* the weights after the last task and z(x) the logits of all classes, the loss and the importance, which is
accumulated when a task ends, are

    L(x, y) = CE(f(x), y) + lambda sum_j Omega_j (theta_j - theta*_j)^2
    Omega_j <- Omega_j + (1/N) sum_i | d ||z(x_i)||^2 / d theta_j |

The importance needs no labels: it is the sensitivity of the output, not of the loss, on the N training images of the
task, in eval mode. lambda -> penalty_weight.
The survey framework of Masana et al. (arXiv:2010.15277) averages old and new importances (``merge="average"``,
``decay=0.5``), takes the absolute value of the mean gradient of each batch (``per_sample=False``), in which signs
cancel, and leaves out the head (``on="backbone"``). The best lambda grows as the square of the inverse scale of the
logits: logits that are twice as large have importances that are four times as large.
"""

from typing import Any, Literal

from cl_lightning.memory import Consolidation
from cl_lightning.strategies.exemplar_free.consolidating import Consolidating
from cl_lightning.strategy import Traits


class MAS(Consolidating):
    """Cross-entropy, and a quadratic penalty on weight changes, weighted by the sensitivity of the network's output.

    Args:
        penalty_weight: lambda, at least 0.
        merge: ``decay`` multiplies earlier importances by ``decay`` and adds the new ones; ``average`` weights them by
            ``decay`` and ``1 - decay``.
        decay: Factor of earlier importances, in [0, 1].
        per_sample: Whether the absolute value is taken of the gradient of each sample, or of the mean of each batch.
        on: Penalise changes of the ``backbone``, or of ``all`` weights that earlier tasks have trained.
        samples: Number of samples of a task for the importance, at least 1; None for all.
        kwargs: Options of the base class.
    """

    traits = Traits(family="exemplar-free", paper="Aljundi et al., ECCV 2018, arXiv:1711.09601")

    def __init__(
        self,
        *,
        penalty_weight: float = 1.0,
        merge: Literal["decay", "average"] = "decay",
        decay: float = 1.0,
        per_sample: bool = True,
        on: Literal["backbone", "all"] = "all",
        samples: int | None = None,
        **kwargs: Any,
    ) -> None:
        consolidation = Consolidation(
            "mas",
            2 * penalty_weight,  # cancels the 1/2 of the penalty that MAS shares with EWC
            merge=merge,
            decay=decay,
            per_sample=per_sample,
            on=on,
            samples=samples,
        )
        super().__init__(consolidation=consolidation, **kwargs)
