"""Exemplar sets: lists of samples, the most representative first, that stand for the classes seen (iCaRL, WA, BiC).

A memory of K samples holds ``K // number of lists`` exemplars in the list of each class. When a task ends, the lists of
earlier classes lose their ends and those of the new classes are chosen by herding (Rebuffi et al., iCaRL, CVPR 2017,
arXiv:1611.07725, alg. 4 and 5). A class that comes in several tasks has a list for each of them.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.distributed import all_gather_together
from cl_lightning.memory import Herding, Memory, check_replay, grouped, herd
from cl_lightning.prototypes import Prototypes
from cl_lightning.stream import Task

if TYPE_CHECKING:
    from cl_lightning.strategy import ContinualStrategy


def exemplar_memory(size: int, *, owner: str, visible: str) -> Memory:
    """An empty memory for exemplar sets.

    Args:
        size: K, in samples, over all classes and processes.
        owner: Names the strategy in errors.
        visible: Logits that its classification loss sees.

    Raises:
        ValueError: If ``visible`` is "current", for exemplars are of earlier tasks.
    """
    check_replay(owner, visible)
    return Memory(size, Herding(by="both"))


def check_distill_share(share: float | None, task: Task, *, owner: str) -> None:
    """Tell where the share of old classes does not do as lambda of :func:`~cl_lightning.losses.balanced_distillation`.

    Raises:
        ValueError: If it is left to the classes and a task brings no new ones: there would be no classification loss.
    """
    if share is None and not task.is_first and not task.num_new:
        raise ValueError(
            f"{owner}: task {task.index} brings no new classes, so the share of old ones, by which distillation is "
            "weighed, is 1; give distill_share, such as 0.5"
        )


@torch.no_grad()
def update_exemplars(strategy: "ContinualStrategy", memory: Memory) -> None:
    """Shorten the lists that are held, and choose those of the task that ends; call it in ``end_task``.

    Features are those of the network in eval mode of un-augmented images, each divided by its norm. They are gathered
    from all processes, in the order of the data set, so that every process chooses the same; only the images that were
    chosen are fetched once more.

    Args:
        strategy: Whose task ends; in eval mode.
        memory: Made by :func:`exemplar_memory`. Too small for one sample per list, it keeps those of the earliest.
    """
    if memory.size == 0:
        return
    features, labels, indices = all_gather_together(strategy.indexed_features())
    order = indices.argsort()
    features, labels, indices = features[order], labels[order], indices[order]
    held = grouped(memory.labels, memory.tasks, "both").to(labels.device)
    new = grouped(labels, torch.full_like(labels, strategy.task.index), "both")
    lists = torch.cat([held, new]).unique()  # type: ignore[no-untyped-call]
    quota = max(memory.size // max(len(lists), 1), 1)
    memory.reduce_per_class(quota, by="both")
    chosen = indices[herd(features, labels, quota)]
    # Each batch is shared out in contiguous parts and gathered in their order: lists stay in the order of choice.
    for batch in strategy.statistics_batches(indices=chosen.cpu()):
        memory.add(batch.raw, batch.labels, batch.tasks, batch.draw)


def update_exemplar_means(strategy: "ContinualStrategy", memory: Memory, means: Prototypes) -> None:
    """Mean of the normalised features of each class's exemplars, under the network as it is now (iCaRL, alg. 1).

    Args:
        strategy: In eval mode.
        memory: Its exemplars.
        means: Takes the means, in place of those that it holds; scores by cosine normalise them once more.
    """
    features, labels = strategy.features(memory=memory)
    means.update(F.normalize(features, dim=1), labels, num_classes=strategy.network.head.num_columns, replace=True)


def nearest_exemplar_mean(features: Tensor, means: Prototypes, num_classes: int) -> Tensor:
    """Scores ``(B, num_classes)`` of features ``(B, d)``: the nearest mean among unit vectors has the largest cosine,
    argmin_y || phi(x) - mu_y || = argmax_y <phi(x), mu_y> for phi and mu of norm 1."""
    return means.scores(features, num_classes, "cosine")
