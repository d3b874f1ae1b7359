"""MEMO: "A Model or 603 Exemplars: Towards Memory-Efficient Class-Incremental Learning" (Zhou et al., ICLR 2023,
arXiv:2205.13218).

The deep layers of networks that are trained on different tasks differ, the shallow ones hardly do. Only the last stage
of the backbone is therefore added in each task, to a stem g that all tasks share,

    phi(x) = [s_1(g(x)), ..., s_t(g(x))],   s_t initialised as a copy of s_{t-1},   s_1, ..., s_{t-1} frozen

and the loss, the auxiliary head on s_t and the alignment of the head are as in ``DERExpand``. g is trained in all
tasks (``train_stem``), so that the inputs of the frozen stages drift; without it, g is frozen after the first task.

What the network does not take is left for exemplars. With ``budget_mb`` both count: after task t there is room for

    K_t = floor((budget - 4 P_t) / (C H W))

exemplars, with P_t parameters of 4 bytes and images of C H W bytes. With the budget of ten ResNet-32 and 2000 exemplars
of CIFAR-100, ten tasks leave MEMO 3312 exemplars. With a fixed ``memory_size``, as in the paper's runs, K is the same
in all tasks.
"""

from collections.abc import Iterable
from typing import Any, cast

from torch import nn

from cl_lightning.checks import above
from cl_lightning.memory import exemplars_within
from cl_lightning.models import LinearHead
from cl_lightning.strategies.rehearsal.der_expand import DERExpand
from cl_lightning.strategy import Phase, Task, Traits


class MEMO(DERExpand):
    """DER of which only the last stage grows, with a memory that may be bounded together with the network.

    Args:
        memory_size: K, in samples, over all classes and processes; None for 2000, or for K_t with ``budget_mb``.
        train_stem: Whether the common stem is trained after the first task too.
        budget_mb: Size of the network and the exemplars together, in 2^20 bytes, above 0; None for no bound.
        kwargs: Options of ``DERExpand``. The backbone is an ``MLP``, ``ConvNet`` or ``ResNet``, or has a method
            ``divide``.

    Raises:
        ValueError: Before the first task, if the network alone exceeds the budget after some task of the stream.
    """

    traits = Traits(family="rehearsal", paper="Zhou et al., ICLR 2023, arXiv:2205.13218", keeps_exemplars=True)
    shares_stem = True

    def __init__(
        self,
        *,
        memory_size: int | None = None,
        train_stem: bool = True,
        budget_mb: float | None = None,
        **kwargs: Any,
    ) -> None:
        if budget_mb is not None and memory_size is not None:
            raise ValueError(
                f"MEMO: memory_size is {memory_size} and budget_mb {budget_mb}, which leaves a number of samples; "
                "give one of them"
            )
        super().__init__(memory_size=2000 if memory_size is None else memory_size, **kwargs)
        above(self, 0, budget_mb=budget_mb, optional=True)
        self.train_stem, self.budget_mb = train_stem, budget_mb

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if self.budget_mb is not None:
            self.memory.resize(self._room(self.budget_mb, task.index + 1, task.num_seen))

    def phases(self, task: Task) -> list[Phase]:
        if (
            self.budget_mb is not None
        ):  # called for every task before the run, which ends here if a network is too large
            self._room(self.budget_mb, task.index + 1, task.num_seen)
        return super().phases(task)

    def _room(self, budget_mb: float, tasks: int, classes: int) -> int:
        """Number of exemplars for which the network of so many tasks and classes leaves room."""
        parts = (self.backbone.stem, self.backbone.extractors[0])
        stem, block = (sum(parameter.numel() for parameter in part.parameters()) for part in parts)
        bias = cast(LinearHead, self.network.head).bias
        parameters = stem + tasks * block + classes * (tasks * self.backbone.width + bias)
        count = exemplars_within(budget_mb, parameters, self.backbone.image_shape)
        if count < 0:
            raise ValueError(
                f"MEMO: give a larger budget_mb than {budget_mb}, or another backbone: the network has {parameters} "
                f"parameters after {tasks} tasks with {classes} classes, {4 * parameters / 2**20:.2f} MB"
            )
        return count

    def frozen(self) -> Iterable[nn.Module]:
        fixed = [] if self.train_stem or self.task.is_first else [self.backbone.stem]
        return [*super().frozen(), *fixed]
