"""Independent networks: the exact baseline of continual unlearning (CLPU, Liu et al., CoLLAs 2022, arXiv:2203.12817).

Each task t has a network f_t of its own, backbone and head, which is trained on the data of the task alone:

    L(x, y) = CE(f_t(x), y)

A request to forget a task sets f_t to its initial weights, which are drawn by the seed of the run and the task. All
other networks stay as they are, so that forgetting is exact and takes no step. The size grows with the number of tasks,
and nothing is transferred between them. Task ids are needed at test time; a request to keep changes nothing.
"""

from cl_lightning.models import MAIN
from cl_lightning.strategies.base import BY_TASK
from cl_lightning.strategies.unlearning.separate import SeparateNetworks
from cl_lightning.strategy import Phase, Task, Traits


class Independent(SeparateNetworks):
    """A network for each task; to forget a task, its network is set to its initial weights.

    Args:
        kwargs: Options of the base class; the head is a ``TaskHead``.
    """

    traits = Traits(
        family="unlearning", paper="Liu et al., CoLLAs 2022, arXiv:2203.12817", task_ids="needed", scenarios=BY_TASK
    )
    forgets = "tasks"
    is_exact = True

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if task.learns:
            self.add_backbone(task.index)
            if task.is_first:
                self.nets.remove(MAIN)  # no task is served by it
        elif task.request == "forget":
            for index in self.data.stream.emptied(task.index):
                self.add_backbone(index)
                self.reset_rows(index)

    def phases(self, task: Task) -> list[Phase]:
        return [Phase()] if task.learns else []
