"""SD-LoRA: scalable decoupled low-rank adaptation (Wu et al., ICLR 2025, arXiv:2501.13198).

In each attention layer of a frozen transformer, the projections of queries and values are adapted in directions of rank
r, one per task, whose magnitudes alpha are trained in all later tasks too. In task t

    W <- W + sum_{i < t} alpha_i m_i B_i A_i / (||B_i|| ||A_i||) + alpha_t B_t A_t,    B_t = 0 at first
    L = CE over the classes of the task; trained are A_t, B_t, all alpha and the rows of the head of the task

with Frobenius norms. alpha_i is one number for all layers. When a task ends, its branch becomes a direction without a
change of any output: alpha_t <- alpha_t n with n the mean of ||B_t|| ||A_t|| over layers and projections, and m_t, the
size of each layer and projection, is ||B_t|| ||A_t|| / n. With ``released`` alpha_t keeps its value and m_t is 1, as in
the authors' code: the outputs jump.

With ``reduced_ranks`` later tasks have a smaller rank (SD-LoRA-RR). With ``merge_below`` a direction that earlier ones
express is left out (SD-LoRA-KD): with v_i the change of all layers in direction i, and c the least squares solution,

    ||v_t - sum_i c_i v_i||^2 < merge_below ||v_t||^2:    alpha_i <- alpha_i + alpha_t c_i,   without B_t A_t

r -> rank, the initial alpha -> magnitude. The published residual of 9e-4 is read as relative to ||v_t||^2. The authors'
code assigns the coefficients instead of adding them. A prediction is one forward pass, without task id.
"""

import functools
from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn

from cl_lightning.batch import ImageShape
from cl_lightning.checks import above, at_least, within
from cl_lightning.models import AdaptedBackbone, DirectionSets
from cl_lightning.strategy import Batch, ContinualStrategy, Output, Task, Traits


class SDLoRA(ContinualStrategy):
    """Low-rank directions of each task, whose magnitudes are trained in all later tasks.

    Args:
        rank: r, at least 1.
        magnitude: Initial alpha, above 0.
        reduced_ranks: Ranks from later tasks on, numbered from 0, such as ``{4: 8, 8: 6}``; None for ``rank`` in all.
        merge_below: Relative squared residual, in [0, 1]; None to keep all directions.
        released: Whether a task ends as in the authors' code.
        kwargs: Options of the base class. The backbone must be a transformer of timm.
    """

    traits = Traits(family="pretrained", paper="Wu et al., ICLR 2025, arXiv:2501.13198", needs_pretrained=True)

    def __init__(
        self,
        *,
        rank: int = 10,
        magnitude: float = 0.8,
        reduced_ranks: dict[int, int] | None = None,
        merge_below: float | None = None,
        released: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(loss_classes="current", freeze_backbone=False, **kwargs)
        at_least(self, 1, rank=rank)
        above(self, 0, magnitude=magnitude)
        within(self, "[0, 1]", merge_below=merge_below, optional=True)
        for task, smaller in (reduced_ranks or {}).items():
            if task < 1 or smaller < 1:
                raise ValueError(
                    f"SDLoRA: reduced_ranks has rank {smaller} from task {task} on; give tasks and ranks of at least 1"
                )
        self.rank, self.magnitude, self.reduced_ranks = rank, magnitude, dict(reduced_ranks or {})
        self.merge_below, self.released = merge_below, released
        self.build_backbone = functools.partial(AdaptedBackbone, backbone=self.build_backbone, peft=DirectionSets)

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        _ = self.directions

    def rank_of(self, task: int) -> int:
        """Rank of the direction of a task."""
        known = [number for number in self.reduced_ranks if number <= task]
        return self.reduced_ranks[max(known)] if known else self.rank

    @property
    def directions(self) -> DirectionSets:
        """The directions of all layers."""
        backbone = self.network.backbone
        assert isinstance(backbone, AdaptedBackbone)
        return cast(DirectionSets, backbone.peft)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.directions.grow(self.rank_of(task.index), self.magnitude)

    def frozen(self) -> Iterable[nn.Module]:
        return cast(AdaptedBackbone, self.network.backbone).unadapted()

    def trainable(self) -> Iterable[nn.Parameter]:
        chosen = {id(parameter) for parameter in (*self.directions.newest(), *self.network.head.parameters())}
        return (parameter for parameter in super().trainable() if id(parameter) in chosen)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": self.classification_loss(output, batch)}

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        self.directions.settle(released=self.released)
        if self.merge_below is not None:
            self.directions.merge_newest(self.merge_below)
