"""Sequential max-margin, linear classification of separable tasks (Evron et al., ICML 2023, arXiv:2306.03534).

A linear classifier of fixed features f is trained on one task after another, weakly held to the weight before:

    W_t = argmin_V sum_{(x, y) of task t} CE(V f(x), y) + lambda / 2 ||V - W_{t-1}||^2

For lambda -> 0, which is the default, its direction converges to the direction of the projection onto the convex set of
classifiers with margin 1 on the task, and continual learning is a sequence of projections:

    W_t = argmin_V ||V - W_{t-1}||^2   subject to   (v_y - v_c) . f(x) >= 1   for (x, y) of task t, c != y

lambda -> regularisation, W_0 = 0. With two classes and w = w_1 - w_0 this is the paper's binary problem, y w.x >= 1;
more classes are our generalisation, with margins to all classes seen so far, and so is the cross-entropy in place of
the exponential loss, which has the same limit. For every W* that has margin 1 on all tasks

    ||W_t - W*||^2 <= ||W_{t-1} - W*||^2 - ||W_t - W_{t-1}||^2,   ||W_t - W*|| <= ||W*||

and an earlier task with set S is forgotten by at most the squared distance to S: a shortfall (1 - margin)^2 of at most
2 max ||f(x)||^2 dist(W, S)^2. Tasks that recur are learnt in the end, by a classifier that is in general not the one of
maximum margin on all data; orders of recurring tasks are compared by ``recurring``, which takes the matrices of the
tasks. Nothing but the weight is kept.
The images of a task are passed through the frozen backbone once, un-augmented, when the task ends. A task that no
linear map separates has no projection and is refused when it is met; give lambda above 0, or more features.
"""

import functools
from typing import Any

from cl_lightning.models import Against, MaxMarginHead
from cl_lightning.strategy import ContinualStrategy, Phase, Task, Traits


class SequentialMaxMargin(ContinualStrategy):
    """The smallest change of a linear classifier on frozen features that classifies each task with margin 1.

    Args:
        against: Margins to all classes ``seen`` so far, or only to the other classes of the ``task``.
        regularisation: lambda, at least 0; 0 for its limit, the projection.
        kwargs: Options of the base class.
    """

    traits = Traits(family="exemplar-free", paper="Evron et al., ICML 2023, arXiv:2306.03534")

    def __init__(self, *, against: Against = "seen", regularisation: float = 0.0, **kwargs: Any) -> None:
        head = functools.partial(MaxMarginHead, against=against, regularisation=regularisation)
        head(1)  # so that an option out of range raises here, not when the network is built
        super().__init__(head=head, loss_classes="all", freeze_backbone=True, **kwargs)

    def phases(self, task: Task) -> list[Phase]:
        return []
