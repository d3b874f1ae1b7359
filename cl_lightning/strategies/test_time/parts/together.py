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

    A step may take several forward passes over a batch (a sharpness-aware optimizer). The first one selects samples; a
    further pass leaves out samples that the first one, or itself, rejects. Its number of samples counts.

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
        # By batch of the step: rows that the first pass selected, and the number in all processes of the last pass.
        self._selected: dict[int, Tensor] = {}
        self._counts: dict[int, Tensor] = {}

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
        self._counts[batch.draw.key] = count
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
        if (selected := self._selected.get(batch.draw.key)) is not None:
            return weights * selected
        self._selected[batch.draw.key] = selected = weights > 0
        for part in self.filters:
            part.learn(output, selected)
        return weights

    def step_moves(self) -> bool:
        """End a step: whether a sample was selected; synchronises with the device if there are filters."""
        counts = list(self._counts.values())
        self._selected, self._counts = {}, {}
        return not counts or bool(torch.stack(counts).sum())

    def corrected(self, output: Output) -> Tensor:
        """Scores ``(B, classes)`` after correction by the output head."""
        return output.logits if self.output is None else self.output(output)

    @torch.no_grad()
    def learn(self, output: Output) -> None:
        """Let the output head learn from a batch of the stream."""
        if self.output is not None:
            self.output.learn(output)
