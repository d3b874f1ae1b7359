"""A strategy that records something of each training step."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from cl_lightning.batch import Batch
from cl_lightning.models import Output
from cl_lightning.strategy import ContinualStrategy

Record = Callable[[Any, Batch, Output, Mapping[str, Tensor]], Any]


def watching(cls: type[ContinualStrategy], record: Record, /, **options: Any) -> Any:
    """A strategy whose attribute ``recorded`` gets, by task, a list with an entry per training step.

    Args:
        cls: Class of the strategy.
        record: Called after ``losses`` with the strategy, the batch, the output and the terms; returns the entry.
        options: Of the constructor.
    """

    class Watching(cls):  # type: ignore[misc, valid-type]
        def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
            terms = super().losses(batch, output)
            self.recorded.setdefault(self.task.index, []).append(record(self, batch, output, terms))
            return terms

    made = Watching(**options)
    made.recorded = {}
    return made
