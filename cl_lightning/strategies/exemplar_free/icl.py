"""ICL, the Ideal Continual Learner (Peng, Giampouras & Vidal, ICML 2023, arXiv:2305.00316), for linear maps.

Every parameter that is optimal for all tasks so far is kept, and each task chooses among them:

    K_0 = all parameters,   K_t = argmin { L_t(w) : w in K_{t-1} }

so that no task is ever forgotten. If the tasks have a common minimiser, K_t are the minimisers of the sum of their
losses and the order does not matter; otherwise the first task keeps its minimum, and each later task has the lowest
loss that is left. The case that can be solved exactly is a linear map of fixed features f with squared loss:

    L_t(W) = sum_{(x, y) of task t} || W^T f(x) - y ||^2,   K_t = { W_t + P_t A }

with y one-hot and P_t the projector onto the directions that no feature so far has (``SolutionSet``). Only W and P are
kept: D^2 + D C numbers for D features and C classes. Old targets of a new class are 0, as its old outputs are.
Free directions, trace P, are logged after each task. They run out where the features of a task span all D dimensions;
no later task is learnt then. Use a wide random layer (``RandomLayer``, or ``MLP`` with one hidden layer), with more
units than samples, or a larger tolerance: directions with a singular value below this share of the largest one stay
free, and outputs change along them.
The paper has no experiments. The features, one-hot regression and the tolerance are our choice; the images of a task
are passed through the frozen backbone once, un-augmented, when the task ends. Problems of regression on vectors do not
need a stream: ``SolutionSet`` takes their matrices.
"""

import functools
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from cl_lightning.models import NullSpaceHead
from cl_lightning.strategy import ContinualStrategy, Phase, Task, Traits


class ICL(ContinualStrategy):
    """One-hot regression on frozen features within the set of all maps that are optimal for the earlier tasks.

    Args:
        tolerance: Share of the largest singular value of a task's features below which a direction stays free, in
            [0, 1).
        kwargs: Options of the base class.
    """

    traits = Traits(family="exemplar-free", paper="Peng et al., ICML 2023, arXiv:2305.00316")

    def __init__(self, *, tolerance: float = 1e-3, **kwargs: Any) -> None:
        head = functools.partial(NullSpaceHead, tolerance=tolerance)
        head(1)  # so that an option out of range raises here, not when the network is built
        super().__init__(head=head, loss_classes="all", freeze_backbone=True, **kwargs)

    def phases(self, task: Task) -> list[Phase]:
        return []

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        head = self.network.head
        assert isinstance(head, NullSpaceHead)
        free = head.solutions().dimension
        for logger in self.loggers:
            logger.log_metrics({"solutions/free_directions": free}, step=self.trainer.global_step)
        if free == 0:
            rank_zero_warn(
                f"{type(self).__name__}: task {task.name!r} leaves none of {head.num_features} directions free, later "
                "tasks are not learnt; use a backbone with more features, or a larger tolerance"
            )
