"""AR1 with latent replay (Pellegrini et al., IROS 2020, arXiv:1912.01100; Maltoni & Lomonaco, arXiv:1806.08568).

CWR*, whose backbone is trained in every task under the penalty of Synaptic Intelligence, with a memory of activations
of an inner layer, the latent layer. With a(x) the activations at this layer, g the network above it, and r, y' drawn
from the memory, each step from the second task on minimises

    L = mean of CE over { g(a(x)), y } and { g(r), y' }  +  c sum_j Omega_j (theta_j - theta*_j)^2

where the temporary rows tw of CWR* give the logits, and the penalty is of the backbone (see ``SI``). The layers
up to the latent layer are frozen after the first task, with the statistics of their normalisation, so that stored
activations stay what the network gives; nothing of an image is stored. At the end of task t, counted from 1,
memory_size / t random samples of the task replace random samples of earlier tasks, which leaves as many of each task.
c -> penalty_weight; 0 is AR1*free of the paper, whose experiments with latent replay have no penalty.
Replayed classes are trained in the task as its own classes are: their rows start at cw, are consolidated at the end of
the task, and n_c counts the replayed samples too, as in the authors' code. Departs from the paper: batch normalisation
instead of batch renormalisation; Omega is not clipped, and the part of a task is not weighted.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cl_lightning.batch import ImageShape, join
from cl_lightning.checks import at_least
from cl_lightning.memory import Consolidation, Memory
from cl_lightning.models import Cut
from cl_lightning.strategies.base import check_loss_classes
from cl_lightning.strategies.exemplar_free.consolidating import Consolidating
from cl_lightning.strategies.exemplar_free.cwr_star import CWRStar
from cl_lightning.strategy import Batch, Output, Task, Traits


class LatentMemory(Memory):
    """Memory of activations, in the field ``latents``; of the images it keeps no channel."""

    kept_as = "activations"

    def store(self, batch: Batch, latents: Tensor) -> None:
        """Add the activations ``(B, ...)`` of the samples of a batch."""
        self.add(batch.raw[:, :0], batch.labels, batch.tasks, batch.draw, latents=latents)


class AR1(CWRStar, Consolidating):
    """CWR* with a trained backbone, Synaptic Intelligence, and replay of activations of an inner layer.

    Args:
        latent_layer: Name of a module of the backbone, such as ``layers.2`` of ``MLP``, ``layer3`` of a ResNet or
            ``model.blocks.5`` of a ViT of timm: its output is stored, and everything up to it is frozen after the
            first task. All of the forward pass has to go through it.
        memory_size: Number of stored activations, over all processes, at least 0; 0 for no replay.
        replay_size: Number of activations drawn per step, over all processes, at least 1; None for the size of the
            batch.
        penalty_weight: c, at least 0.
        xi: Damping of the importances, above 0.
        kwargs: Options of the base class.
    """

    traits = Traits(
        family="rehearsal",
        paper="Pellegrini et al., IROS 2020, arXiv:1912.01100",
    )

    def __init__(
        self,
        *,
        latent_layer: str = "layers.2",
        memory_size: int = 1500,
        replay_size: int | None = None,
        penalty_weight: float = 0.1,
        xi: float = 0.1,
        **kwargs: Any,
    ) -> None:
        consolidation = Consolidation("si", penalty_weight, merge="decay", xi=xi, on="backbone")
        super().__init__(consolidation=consolidation, **kwargs)
        check_loss_classes(self)
        at_least(self, 1, replay_size=replay_size, optional=True)
        self.latent_layer, self.replay_size = latent_layer, replay_size
        self.memory = LatentMemory(memory_size)

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        self._cut = Cut(type(self).__name__, self.network.backbone, self.latent_layer, image_shape)

    def trained_columns(self) -> Tensor:
        return super().trained_columns() | (self._replayed().to(self.task_columns.device) > 0)

    def counts(self) -> Tensor:
        return super().counts() + self._replayed().cpu()

    def frozen(self) -> Iterable[nn.Module]:
        own = super(CWRStar, self).frozen()
        return own if self.task.is_first else [*own, *self._cut.below]

    def trainable(self) -> Iterable[nn.Parameter]:
        below = set() if self.task.is_first else {id(parameter) for parameter in self._cut.parameters_below}
        yield from (parameter for parameter in super().trainable() if id(parameter) not in below)

    @property
    def backbone_is_final(self) -> bool:
        return self.freeze_backbone

    def prepare_batch(self, batch: Batch) -> Batch:
        self._cut.insert(None)
        if not len(self.memory):
            return batch
        drawn = self.memory.sample(self.replay_size or batch.draw.total, batch.draw)
        if len(drawn):
            self._cut.insert(drawn.extra["latents"])
        blank = [
            rows.new_zeros(1, *rows.shape[1:]).expand(len(drawn), *rows.shape[1:]) for rows in (batch.images, batch.raw)
        ]
        joint = join({"stream": batch, "replay": drawn.replace(images=blank[0], raw=blank[1])})
        return joint.replace(images=batch.images, raw=batch.raw)  # the rows of the memory enter at the cut

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return Consolidating.losses(self, batch, output)

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        super().end_task(task)
        if not self.memory.size:
            return
        quota = self.memory.size // (task.index + 1)
        self.memory.reduce_per_class(quota, by="task")
        for batch in self.passes.batches(samples=quota):
            with self.trainer.precision_plugin.forward_context():
                latents = self._cut.activations(self.network.backbone, batch.images)
            self.memory.store(batch, latents)

    def _replayed(self) -> Tensor:
        """Number of samples of each class in the memory, int64 ``(columns,)``."""
        return self.memory.counts(self.head.num_columns)
