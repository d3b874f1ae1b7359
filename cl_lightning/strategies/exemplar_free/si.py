"""Synaptic Intelligence (Zenke, Poole & Ganguli, ICML 2017, arXiv:1703.04200).

With theta* the weights after the last task, g the gradient of the task's loss without penalty before an optimizer step,
and delta the change of the weights in the step,

    L(x, y) = CE(f(x), y) + c sum_j Omega_j (theta_j - theta*_j)^2                                           eq. (4)
    w_j <- w_j - g_j delta_j                                                at each step of a task           eq. (3)
    Omega_j <- Omega_j + relu(w_j) / ((theta_j - theta*_j)^2 + xi),  w_j <- 0          when a task ends      eq. (5)

w_j is the part of the decrease of the loss that weight j contributed. c -> penalty_weight, xi -> xi. delta is the true
change, with any optimizer; g is read after reduction over processes and before clipping, and the gradient of the
penalty, which is known in closed form, is subtracted from it.
Departs from the paper: negative w_j, of weights whose changes increased the loss, are set to 0; ``clamp=False`` keeps
them, as the survey framework of Masana et al. does. One head for all classes.
"""

from typing import Any, Literal

from cl_lightning.memory import Consolidation
from cl_lightning.strategies.exemplar_free.consolidating import Consolidating
from cl_lightning.strategy import Traits


class SI(Consolidating):
    """Cross-entropy, and a quadratic penalty on weight changes, weighted by the path integral of the loss.

    Args:
        penalty_weight: c, at least 0.
        xi: Damping, above 0; 0.1 for MNIST and 1e-3 for CIFAR.
        clamp: Whether negative w are set to 0.
        on: Penalise changes of the ``backbone``, or of ``all`` weights that earlier tasks have trained.
        kwargs: Options of the base class.
    """

    traits = Traits(family="exemplar-free", paper="Zenke et al., ICML 2017, arXiv:1703.04200")

    def __init__(
        self,
        *,
        penalty_weight: float = 0.1,
        xi: float = 0.1,
        clamp: bool = True,
        on: Literal["backbone", "all"] = "all",
        **kwargs: Any,
    ) -> None:
        consolidation = Consolidation("si", penalty_weight, merge="decay", xi=xi, clamp=clamp, on=on)
        super().__init__(consolidation=consolidation, **kwargs)
