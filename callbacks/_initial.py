"""What callbacks remember of the first values of weights."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from torch import Tensor, nn

from cl_lightning.batch import Batch
from cl_lightning.callback import ContinualCallback
from cl_lightning.checks import at_least
from cl_lightning.models import Output
from cl_lightning.strategies.base import trained_weights
from cl_lightning.stream import Task

if TYPE_CHECKING:
    from cl_lightning.strategy import ContinualStrategy


class InitialPenalty(ContinualCallback):
    """Base of callbacks that penalise the distance of the weights from their first values.

    A weight's first value is its value at the start of the task in which it appears: of the rows of new classes, at the
    start of their task. A weight whose shape changes starts again.

    Args:
        weight: Factor of the term, at least 0; with 0 no term is added.
    """

    term: str

    def __init__(self, *, weight: float) -> None:
        at_least(self, 0, weight=weight)
        self.weight = weight
        self.first: dict[str, Tensor] = {}

    def kept(self, value: Tensor) -> Tensor | None:
        """What is kept of the first value of a weight; None for a weight without a penalty."""
        raise NotImplementedError

    def penalty(self, weight: Tensor, first: Tensor) -> Tensor:
        """Penalty of a weight, a scalar, given what was kept of its first value."""
        raise NotImplementedError

    def on_task_start(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        network: nn.Module = strategy.network
        for name, weight in network.named_parameters() if self.weight else ():
            kept = self.kept(weight.detach())
            if kept is not None and (name not in self.first or self.first[name].numel() != weight.numel()):
                self.first[name] = kept.clone()

    def losses(self, strategy: Any, batch: Batch, output: Output) -> dict[str, Tensor]:
        parts = []
        for name, weight in trained_weights(strategy.network).items():
            if name in self.first:
                first = self.first[name] = self.first[name].to(weight.device)
                parts.append(self.penalty(weight, first))
        return {self.term: self.weight * sum(parts[1:], parts[0])} if parts else {}

    def bytes_kept(self) -> dict[str, int]:
        return {"anchors": sum(value.nbytes for value in self.first.values())}

    def state_dict(self) -> dict[str, Any]:
        return {"first": {name: value.cpu() for name, value in self.first.items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.first = dict(state_dict["first"])
