"""d-Simplex-HOC: higher-order compatibility (Biondi, Pernici, Ricci & Del Bimbo, CVPR 2024, arXiv:2405.02581).

Features stay comparable with features of earlier networks, so that a gallery need not be computed again. With a_i and
b_i the features of sample i of the present network and of the network before the task, each divided by its norm, in
front of a classifier that is fixed from the start, the corners of a simplex of K classes,

    L = (1 - lambda) CE + lambda L_hoc,    s_ij = mu <b_i, a_j>
    L_hoc = mean_i ( -s_ii + log sum_j exp( s_ij [y_i != y_j] ) )

where the means are over the batch joined with as many samples of a memory, of all processes, and CE is over all K
corners. A pair of the same class, i itself included, is in the sum with exp(0) = 1. lambda -> compatibility_weight, mu
-> scale. In the first task the weight of CE is 1 and there is no L_hoc, except with ``align_first``: the network before
the first task is then the one with the initial, pretrained weights, as in the paper. A new backbone between two tasks,
which the paper allows too, is not possible here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.checks import above, within
from cl_lightning.distributed import gather_rows, world_size
from cl_lightning.losses import full_precision
from cl_lightning.strategies.rehearsal.compatible import CompatibleReplay
from cl_lightning.strategy import Batch, Output, Task, Traits


def higher_order_compatibility(new: Tensor, old: Tensor, labels: Tensor, scale: float) -> Tensor:
    """L_hoc above, mean over the rows, in nats.

    Args:
        new: Features of the present network, ``(B, d)``, B at least 1.
        old: Features of the network before the task, ``(B, d)``, without gradient.
        labels: Columns, int64 ``(B,)``.
        scale: mu, above 0.

    Returns:
        A scalar.
    """
    a, b = F.normalize(full_precision(new), dim=1), F.normalize(full_precision(old.detach()), dim=1)
    with torch.autocast(a.device.type, enabled=False):
        s = scale * b @ a.T  # (B, B), row i: the old features of sample i
    others = labels[:, None] != labels
    return ((s * others).logsumexp(dim=1) - s.diagonal()).mean()


class HOC(CompatibleReplay):
    """Cross-entropy over a fixed simplex, and a contrastive loss between new and old features of a batch.

    Args:
        compatibility_weight: lambda, in [0, 1].
        scale: mu, above 0.
        align_first: Whether features of the first task are compared with features of the initial network, for backbones
            with pretrained weights.
        kwargs: Options of ``CompatibleReplay``: memory_per_class, replay_size, head, and options of the base class.
    """

    traits = Traits(family="rehearsal", paper="Biondi et al., CVPR 2024, arXiv:2405.02581", keeps_exemplars=True)

    def __init__(
        self, *, compatibility_weight: float = 0.9, scale: float = 10.0, align_first: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        within(self, "[0, 1]", compatibility_weight=compatibility_weight)
        above(self, 0, scale=scale)
        self.compatibility_weight, self.scale, self.align_first = compatibility_weight, scale, align_first

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if task.is_first and self.align_first:
            self.teacher.learn_from(self.network)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        features = self.head.embed(output.features)
        ce = self.simplex_loss(features, output, batch)
        if not self.teacher or not self.compatibility_weight:
            return {"ce": ce}
        together = batch.draw.total >= world_size()  # a process without rows takes no part in an exchange
        rows: Callable[[Tensor], Tensor] = gather_rows if together else lambda tensor: tensor
        share = batch.weight if together else 1.0  # the base class multiplies by the weight
        new, old = rows(full_precision(features)), rows(full_precision(self.taught(batch.images)))
        hoc = higher_order_compatibility(new, old, rows(batch.labels), self.scale)
        return {
            "ce": (1 - self.compatibility_weight) * ce,
            "compatibility": self.compatibility_weight * hoc / share,
        }
