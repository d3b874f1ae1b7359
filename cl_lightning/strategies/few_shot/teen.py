"""TEEN, training-free prototype calibration (Wang et al., NeurIPS 2023, arXiv:2312.05229).

Training and classification are as in ``ProtoCosine``. The mean of a few images is a biased estimate, close to the means
of similar base classes, and samples of new classes are classified as base classes. When a session ends, the mean of
each new class n is therefore calibrated by the means of the base classes b, weighted by similarity:

    w_nb = softmax_b(tau <c^_n, c^_b>),   Delta_n = normalise(sum_b w_nb c^_b),   c~_n = (1 - beta) c^_n + beta Delta_n

with c^ = c / ||c||. tau -> temperature, beta -> shift_weight. The paper's alpha is 1 - beta. Prototypes of base classes
and of earlier sessions are unchanged to the bit. With beta = 0 the method is ``ProtoCosine``.
"""

from typing import Any

from cl_lightning.checks import at_least, within
from cl_lightning.memory import calibrate_new
from cl_lightning.strategies.few_shot.proto_cosine import ProtoCosine
from cl_lightning.strategy import Task


class TEEN(ProtoCosine):
    """Class means of few-shot classes are calibrated by the means of similar base classes, without training.

    Args:
        shift_weight: beta, in [0, 1]; 0.1 in the authors' code for CIFAR-100, 0.5 for CUB-200 and miniImageNet.
        temperature: tau, at least 0; with 0 all base classes have the same weight.
        kwargs: Options of ``ProtoCosine``.
    """

    traits = ProtoCosine.traits.but(paper="Wang et al., NeurIPS 2023, arXiv:2312.05229")

    def __init__(self, *, shift_weight: float = 0.5, temperature: float = 16.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        within(self, "[0, 1]", shift_weight=shift_weight)
        at_least(self, 0, temperature=temperature)
        self.shift_weight, self.temperature = shift_weight, temperature

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        calibrate_new(self.prototypes, self.task_columns, beta=self.shift_weight, tau=self.temperature)
