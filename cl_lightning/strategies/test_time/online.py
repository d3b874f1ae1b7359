"""What test-time adaptation counts in a stream: online errors, and confidences on known and unknown classes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cl_lightning.distributed import all_sum
from cl_lightning.measures import CONFIDENCE_BINS, EvaluationResult, confidence_counts, online_error, unknown_auroc
from cl_lightning.memory import restore_shapes
from cl_lightning.strategies.base.evaluation import Evaluation
from cl_lightning.strategy import ContinualStrategy


class OnlineCounts(nn.Module):
    """Counts of the predictions of a stream, over all processes.

    Attributes:
        counts: Samples and correct predictions of each task, int64 ``(tasks, 2)``; samples of unknown classes are left
            out.
        confidences: Samples of the current task by confidence, known and unknown ones, int64 ``(2, bins)``; ``(2, 0)``
            without unknown classes.
    """

    counts: Tensor
    confidences: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(0, 2, dtype=torch.int64))
        self.register_buffer("confidences", torch.zeros(2, 0, dtype=torch.int64))

    def begin_task(self, *, has_unknown: bool) -> None:
        """Add an empty row.

        Args:
            has_unknown: Whether the stream may have samples of classes that the source does not know.
        """
        self.counts = torch.cat([self.counts, self.counts.new_zeros(1, 2)])
        self.confidences = self.confidences.new_zeros(2, CONFIDENCE_BINS if has_unknown else 0)

    @torch.no_grad()
    def add(self, scores: Tensor, labels: Tensor, num_source: int) -> None:
        """Count a batch of the current task.

        Args:
            scores: Scores of the classes of the source, ``(B, num_source)``.
            labels: Columns, int64 ``(B,)``; -1 for hidden ones, which are not counted, and from ``num_source`` on for
                unknown classes.
            num_source: Number of classes of the source.
        """
        known = (labels >= 0) & (labels < num_source)
        counts = torch.stack([known.sum(), (known & (scores.argmax(dim=1) == labels)).sum()])
        if not self.confidences.numel():
            self.counts[-1] += all_sum(counts)
            return
        shown = labels >= 0
        confidences = confidence_counts(scores[shown], labels[shown] >= num_source)
        total = all_sum(torch.cat([counts, confidences.flatten()]))
        self.counts[-1] += total[:2]
        self.confidences += total[2:].view(2, -1)

    def num_bytes(self) -> int:
        """Bytes of the counts."""
        return self.counts.nbytes + self.confidences.nbytes

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        restore_shapes(self, state_dict, prefix, ("counts", "confidences"))
        super()._load_from_state_dict(state_dict, prefix, *args)


class OnlineEvaluation(Evaluation):
    """Evaluation whose result also has the online error of the last domain, and how well unknown classes are rejected.

    Args:
        strategy: The strategy.
        online: Its counts.
    """

    def __init__(self, strategy: ContinualStrategy, online: OnlineCounts) -> None:
        super().__init__(strategy)
        self._online = (online,)

    def finish(self) -> EvaluationResult:
        result = super().finish()
        online = self._online[0]
        if len(online.counts) > 1:
            result.online_error = float(online_error(online.counts[-1]))
            if online.confidences.numel():
                result.unknown_auroc = unknown_auroc(online.confidences)
        return result
