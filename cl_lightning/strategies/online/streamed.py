"""Heads in closed form that learn each batch of a stream as it arrives, on a frozen backbone.

A task is one epoch without augmentation and without an optimizer step: each batch is passed through the backbone once,
and its features are added to the state of the head. The state never depends on later samples, so that the head can
predict at any time; the linear map is solved from the state when a prediction is needed.

Several processes gather the rows of each batch, in the order of the stream, and compute the same state.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cl_lightning.distributed import all_gather_together
from cl_lightning.models import ClosedFormHead
from cl_lightning.strategy import Batch, ContinualStrategy, HeadFactory, Output, Phase, PhaseOptions, Task, Traits


class StreamedHead(ClosedFormHead):
    """Base class of heads that learn batch by batch, and are solved when a prediction is needed.

    A subclass defines ``learn`` and ``solution``.
    """

    needs_statistics = False
    _solved = False  # whether the blocks hold the solution for the present state

    def learn(self, inputs: Tensor, labels: Tensor, known: Tensor) -> None:
        """Add rows to the state.

        Args:
            inputs: Features, float64 ``(n, d)``, of all processes, in the order of the stream.
            labels: Columns, int64 ``(n,)``; 0 where ``known`` is 0.
            known: 1 for a row with a label and 0 for a row without, float64 ``(n,)``. ``counts`` does not include the
                rows yet.
        """
        raise NotImplementedError

    @torch.no_grad()
    def observe(self, features: Tensor, labels: Tensor) -> None:
        """Learn from the rows of a batch. Every process must call this.

        Args:
            features: This process's share, ``(n, d)``; n may be 0.
            labels: Columns, int64 ``(n,)``; rows with label -1 are left out.
        """
        features, labels = all_gather_together((features.double(), labels))
        known = (labels >= 0).double()
        labels = labels.clamp(min=0)
        self.learn(features, labels, known)
        self.counts += (self.one_hot(labels) * known[:, None]).sum(dim=0).long()
        self._solved = False

    def forward(self, features: Tensor) -> Tensor:
        """Scores ``(n, C)``; in training mode by the last solution, since a step does not use them."""
        if not self.training:
            self._solve()
        return super().forward(features)

    def classify(self, features: Tensor) -> Tensor:
        self._solve()
        return super().classify(features)

    def _solve(self) -> None:
        if not self._solved and self.blocks:
            with torch.no_grad(), torch.autocast(self.counts.device.type, enabled=False):
                self._place(*self.solution())
            self._solved = True

    def grow(self, num_new: int) -> None:
        super().grow(num_new)
        self._solved = False

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._solved = False


class StreamedStrategy(ContinualStrategy):
    """Base class of methods whose head, a ``StreamedHead``, learns each batch of the stream on a frozen backbone.

    A sample is learnt once, in its first pass, whatever the number of epochs or passes is.

    Args:
        head: Builds the head.
        kwargs: Options of the base class.
    """

    traits = Traits(needs_empty_batches=True, losses_use_images=False)

    def __init__(self, *, head: HeadFactory, **kwargs: Any) -> None:
        super().__init__(head=head, loss_classes="all", freeze_backbone=True, **kwargs)
        # A fit and DistributedDataParallel need a trained parameter, also if the method trains none.
        self.nothing = nn.Parameter(torch.zeros(()))

    def phases(self, task: Task) -> list[Phase]:
        return [Phase("stream", PhaseOptions(epochs=1), unaugmented=True)]

    def trainable(self) -> Iterable[nn.Parameter]:
        return [self.nothing]

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        head = self.network.head
        assert isinstance(head, StreamedHead)
        if batch.first_pass:
            head.observe(output.features, batch.labels)
        return {"nothing": 0.0 * self.nothing}
