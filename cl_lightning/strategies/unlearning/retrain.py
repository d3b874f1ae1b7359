"""Retraining without the forgotten samples: the reference of unlearning.

A task is learnt by cross-entropy on all samples so far that are not forgotten. With D_t these samples at task t,

    L(x, y) = CE(f(x), y),    (x, y) in D_t

A request to forget replaces the network by a new one, with weights drawn by seed and task, and trains it on D_t without
the samples of the request. Nothing that the strategy holds then depends on the forgotten samples: the definition of
exact unlearning, at the cost of a whole training. Rows of the head for a forgotten class stay, and are trained as the
rows of a class without samples. A request to keep changes nothing.

By default learning goes on from the weights after the previous task; with ``from_scratch`` each task starts again.
"""

from cl_lightning.strategies.base import Unlearns, start_again
from cl_lightning.strategies.baselines.joint import Joint
from cl_lightning.strategy import Phase, Task, Traits


class Retrain(Unlearns, Joint):
    """Joint training that starts again without the forgotten samples after each request; the reference of unlearning.

    Args:
        from_scratch: Whether the network is initialised again at each task, not only at requests to forget.
        kwargs: Options of the base class; ``loss_classes`` is ``all`` or ``task``.
    """

    traits = Traits(family="unlearning", paper="reference", needs_all_data=True, losses_use_images=False)
    is_exact = True

    def begin_task(self, task: Task) -> None:
        if task.request == "forget" and not self.from_scratch:
            start_again(self)
        super().begin_task(task)

    def phases(self, task: Task) -> list[Phase]:
        return [] if task.request == "keep" else [Phase()]
