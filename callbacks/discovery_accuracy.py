"""Clustering accuracy on the test data after each session of a stream with discovery."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from cl_lightning.callback import ContinualCallback
from cl_lightning.distributed import all_sum
from cl_lightning.measures import ClusteringAccuracy, clustering_accuracy
from cl_lightning.stream import Task

if TYPE_CHECKING:
    from cl_lightning.strategy import ContinualStrategy


@runtime_checkable
class Clusters(Protocol):
    """A strategy whose clusters may be more than the classes of the stream, since it estimates their number."""

    def num_clusters(self) -> int:
        """Number of clusters."""

    def clusters(self, images: Tensor) -> Tensor:
        """Cluster of each image, int64 ``(B,)``."""


class DiscoveryAccuracy(ContinualCallback):
    """Clustering accuracy of the predictions on the test data of all tasks so far, for all, old and new classes.

    New classes have no labels, so that the column of a new class is the number of a cluster. After each task the best
    one-to-one assignment of predictions to classes is found (:func:`cl_lightning.measures.clustering_accuracy`). Old
    are the classes of earlier tasks, new the classes that the task brings. ``results.json`` has the three numbers of
    each task. Training is the same with and without this callback.
    """

    paper: str = "Vaze et al., CVPR 2022, arXiv:2201.02609"
    observer_only: bool = True
    test_data_use: str | None = "clustering accuracy after each task"

    def __init__(self) -> None:
        self.tasks: list[ClusteringAccuracy] = []

    @torch.no_grad()
    def on_task_end(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        classes = task.num_seen
        own = isinstance(strategy, Clusters)
        count = max(strategy.num_clusters(), classes) if isinstance(strategy, Clusters) else classes
        counts = torch.zeros(classes, count, dtype=torch.int64, device=strategy.device)
        for batch in data.evaluation_loader("test", range(task.index + 1)):
            moved = data.finish(batch.to(strategy.device), augment=False)
            if not len(moved):
                continue
            with trainer.precision_plugin.forward_context():
                if own:
                    found = strategy.clusters(moved.images)  # type: ignore[operator]
                elif strategy.traits.task_ids == "needed":
                    found = strategy.predict(moved.images, moved.tasks).argmax(dim=1)
                else:
                    found = strategy.predict(moved.images).argmax(dim=1)
            counts.view(-1).index_add_(0, moved.labels * count + found, torch.ones_like(found))
        old = torch.arange(classes) < classes - task.num_new
        self.tasks = [*self.tasks[: task.index], clustering_accuracy(all_sum(counts), old)]
        for logger in trainer.loggers:
            latest = self.tasks[-1]._asdict().items()
            values = {f"clustering_accuracy/{name}": value for name, value in latest if value == value}
            logger.log_metrics(values, step=trainer.global_step)

    def results(self) -> dict[str, Any]:
        names = ClusteringAccuracy._fields
        return {name: [None if (v := getattr(each, name)) != v else v for each in self.tasks] for name in names}

    def state_dict(self) -> dict[str, Any]:
        return {"tasks": torch.tensor([tuple(each) for each in self.tasks], dtype=torch.float64).view(-1, 3)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.tasks = [ClusteringAccuracy(*row) for row in state_dict["tasks"].tolist()]
