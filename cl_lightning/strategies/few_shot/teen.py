"""TEEN, training-free prototype calibration (Wang et al., NeurIPS 2023, arXiv:2312.05229).

Trained and classified as ``ProtoCosine``. Few images give class means that lie near those of similar base classes, and
tests are taken for these. So the mean of a new class n is moved towards the base classes b that it is similar to, once,
when its session ends:

    w_nb = softmax_b(tau <c^_n, c^_b>),   Delta_n = normalise(sum_b w_nb c^_b),   c~_n = (1 - beta) c^_n + beta Delta_n

with c^ = c / ||c||. tau -> temperature, beta -> shift_weight. The paper's alpha is 1 - beta. Base prototypes and those
of earlier sessions stay, to the bit; with beta = 0 it is ``ProtoCosine``.
"""

from typing import Any, ClassVar

from cl_lightning.prototypes import calibrate_new
from cl_lightning.strategies.few_shot.proto_cosine import ProtoCosine
from cl_lightning.stream import Task


class TEEN(ProtoCosine):
    """Class means, those of few-shot classes moved towards similar base classes.

    Args:
        shift_weight: beta, in [0, 1]; 0.1 in the authors' code for CIFAR-100, 0.5 for CUB-200 and miniImageNet.
        temperature: tau, at least 0; at 0 all base classes count alike.
        kwargs: Of ``ProtoCosine``.
    """

    paper: ClassVar[str] = "Wang et al., NeurIPS 2023, arXiv:2312.05229"

    def __init__(self, *, shift_weight: float = 0.5, temperature: float = 16.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 <= shift_weight <= 1 or not temperature >= 0:
            raise ValueError(f"TEEN: shift_weight={shift_weight}, temperature={temperature}; in [0, 1], at least 0")
        self.shift_weight, self.temperature = shift_weight, temperature

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        calibrate_new(self.prototypes, self.task_columns, beta=self.shift_weight, tau=self.temperature)
