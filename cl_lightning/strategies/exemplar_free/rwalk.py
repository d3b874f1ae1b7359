"""Riemannian Walk (Chaudhry et al., ECCV 2018, arXiv:1801.10112).

With theta* the weights after the last task, g the gradient of the task's loss without penalty before an optimizer step,
and delta the change of the weights in the step,

    L(x, y) = CE(f(x), y) + lambda sum_j omega_j (theta_j - theta*_j)^2
    F_j <- alpha g_j^2 + (1 - alpha) F_j,   w_j <- w_j - g_j delta_j                  at each step
    s_j <- s_j + w_j / (F_j (theta_j - theta'_j)^2 / 2 + eps),  w_j <- 0              every delta_t steps
    S_j <- (S_j + s_j) / 2,   omega_j = F_j / max F + relu(S_j) / max relu(S)         when a task ends

where theta' are the weights delta_t steps before. F says how far the prediction moves with a weight, s how much of the
decrease of the loss it brought per distance moved; both are made of the gradients of training, so the task's data are
read once. lambda -> penalty_weight, alpha -> fisher_rate, delta_t -> interval, eps -> xi.
F is the square of the gradient of the mean over the batch; EWC's Fisher information squares the gradient of each
sample. Choices that the paper leaves open are in :class:`~cl_lightning.memory.RiemannianWalk`.
Departs from the paper: one head for all classes, and no samples of earlier tasks; combine ``ER`` with the callback
``ImportancePenalty(estimator="rwalk")`` for the variant with a memory.
"""

from typing import Any, Literal

from cl_lightning.memory import Consolidation
from cl_lightning.strategies.exemplar_free.consolidating import Consolidating
from cl_lightning.strategy import Traits


class RWalk(Consolidating):
    """Cross-entropy, and a quadratic penalty weighted by running Fisher information and a score of the path.

    Args:
        penalty_weight: lambda, at least 0.
        fisher_rate: alpha, weight of the newest squared gradient, in [0, 1].
        interval: delta_t, number of steps between two updates of the score, at least 1.
        xi: eps, above 0.
        on: Penalise changes of the ``backbone``, or of ``all`` weights that earlier tasks have trained.
        kwargs: Options of the base class.
    """

    traits = Traits(family="exemplar-free", paper="Chaudhry et al., ECCV 2018, arXiv:1801.10112")

    def __init__(
        self,
        *,
        penalty_weight: float = 0.1,
        fisher_rate: float = 0.9,
        interval: int = 10,
        xi: float = 0.1,
        on: Literal["backbone", "all"] = "all",
        **kwargs: Any,
    ) -> None:
        consolidation = Consolidation("rwalk", penalty_weight, rate=fisher_rate, interval=interval, xi=xi, on=on)
        super().__init__(consolidation=consolidation, **kwargs)
