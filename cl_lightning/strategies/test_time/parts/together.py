"""The parts of a method together: which samples the terms count, and what follows a step."""

import copy
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from cl_lightning.batch import Batch
from cl_lightning.distributed import all_sum, world_size
from cl_lightning.losses import mean_over_rows
from cl_lightning.strategies.test_time.parts.filters import SampleFilter
from cl_lightning.strategies.test_time.parts.part import Adapting, OutputHead, Part
from cl_lightning.strategies.test_time.parts.restoration import RestorationRule
from cl_lightning.strategy import Output


class Parts(nn.Module):
    """Copies of the filters, of the restoration rules and of the output head of a method.

    A step may take several forward passes over its batch (a sharpness-aware optimizer). The first one selects samples;
    a sample that a pass rejects is left out of it.

    Args:
        filters: Choose samples.
        rules: Take the parameters back to the source after a step.
        output: Corrects scores; None for none.
        mean_over: What the weighted sum of a term is divided by: the number of ``selected`` samples, or of all samples
            of the ``batch``.
    """

    def __init__(
        self,
        filters: Sequence[SampleFilter] | None = None,
        rules: Sequence[RestorationRule] | None = None,
        output: OutputHead | None = None,
        mean_over: Literal["selected", "batch"] = "selected",
    ) -> None:
        super().__init__()
        self._filters, self._rules = (nn.ModuleList(copy.deepcopy(list(parts or ()))) for parts in (filters, rules))
        self.output = copy.deepcopy(output)
        self.mean_over = mean_over
        self._selected: Tensor | None = None  # rows of the batch that filters selected in the first pass
        self._selected_in_step: Tensor | None = None  # number of selected samples, () in all processes

    def __iter__(self) -> Iterator[Part]:
        return (module for module in self.modules() if isinstance(module, Part))

    @property
    def filters(self) -> list[SampleFilter]:
        """The filters."""
        return [part for part in self._filters if isinstance(part, SampleFilter)]

    @property
    def rules(self) -> list[RestorationRule]:
        """The restoration rules."""
        return [part for part in self._rules if isinstance(part, RestorationRule)]

    @property
    def selected(self) -> Tensor | None:
        """Rows ``(B,)``, bool, of the batch that the filters selected in the first pass; None before it."""
        return self._selected

    def begin_batch(self, selected: Tensor | None = None) -> None:
        """Begin a batch: the next pass selects samples, or is a further one over a batch with these selected rows."""
        self._selected = selected

    def averaged(self, strategy: Adapting, terms: dict[str, Tensor], batch: Batch, output: Output) -> dict[str, Tensor]:
        """Each term as a mean over the selected samples of all processes.

        Args:
            strategy: The method.
            terms: Values per row of this process, ``(B,)``, or scalars, which are kept unless no sample is selected.
            batch: Batch of the stream.
            output: Features ``(B, d)`` and logits ``(B, classes of the source)`` of this pass.
        """
        weights = self.weights(strategy, batch, output) if self._filters else None
        for rule in self.rules:
            rule.learn(output, None if weights is None else weights > 0)
        if weights is None:
            return {name: mean_over_rows(term) if term.dim() else term for name, term in terms.items()}
        selected = weights > 0
        count = all_sum(selected.sum())
        self._selected_in_step = count if self._selected_in_step is None else self._selected_in_step + count
        # The base class weights the terms of a process by its share of the batch. Undo that: the mean is over the
        # selected samples of all processes.
        share = world_size() / batch.weight if batch.weight else 0.0
        size = count.clamp(min=1) if self.mean_over == "selected" else batch.draw.total
        return {
            name: share * (weights * term).where(selected, 0.0).sum() / size if term.dim() else term * (count > 0)
            for name, term in terms.items()
        }

    @torch.no_grad()
    def weights(self, strategy: Adapting, batch: Batch, output: Output) -> Tensor:
        """Weights ``(B,)`` of the rows of this process; a row that the first pass over the batch rejects stays so."""
        weights = torch.ones(len(batch.images), device=output.logits.device)
        for part in self.filters:
            weights = weights * part(strategy, batch, output)
        if self._selected is not None:
            return weights * self._selected
        self._selected = weights > 0
        for part in self.filters:
            part.learn(output, self._selected)
        return weights

    def step_moves(self) -> bool:
        """Whether a sample was selected since the last call; synchronises with the device if there are filters."""
        count, self._selected_in_step = self._selected_in_step, None
        return count is None or bool(count)

    def corrected(self, output: Output) -> Tensor:
        """Scores ``(B, classes)`` after correction by the output head."""
        return output.logits if self.output is None else self.output(output)

    @torch.no_grad()
    def learn(self, output: Output) -> None:
        """Let the output head learn from a batch of the stream."""
        if self.output is not None:
            self.output.learn(output)
