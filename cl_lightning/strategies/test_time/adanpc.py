"""AdaNPC, adaptive non-parametric classifier (Zhang et al., ICML 2023, arXiv:2304.12566).

The classifier is replaced by a memory of normalised features with labels: at first features of source images, then
features of the stream with the labels that the memory gave to them. No parameter changes. With z the normalised feature
of an image and N_k(z) the k most similar features of the memory,

    p_c = min(1, 1e-5 + sum_{j in N_k(z), y_j = c} w_j),   w = softmax over N_k(z) of (z . z_j / t)
    the prediction is y^ = argmax_c p_c
    memory <- memory + (z, y^)   if max_c softmax(p)_c >= b

The images of a batch are predicted before any of them is stored. The confidence, a softmax of probabilities, lies
between 1/C and e / (e + C - 1), which is 0.23 with ten classes: b = 0 stores everything, a larger b than this nothing.
k -> neighbours, t -> temperature, b -> threshold; the paper selects them on validation data, the defaults are ours. The
memory grows with the stream; ``capacity`` limits the number of features of the stream that are kept, the latest ones
(ours).
``NeighbourMemory`` does the same to the features of any other test-time adaptation method: ``--model Tent
--model.output NeighbourMemory``. The encoder is trained by cross-entropy; the paper's loss of neighbours in the
training on the source, and its variant with batch normalisation of the features, are not implemented. The labels of
source images are read: in a stream whose source images are clean test images (``source_part="test"``) these are labels
of test images, and results are not to be compared with other methods. Selecting what is stored synchronises with the
device.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.checks import above, at_least
from cl_lightning.distributed import all_gather_together
from cl_lightning.losses import full_precision
from cl_lightning.strategies.test_time.base import TestTimeAdaptation
from cl_lightning.strategies.test_time.parts.part import Adapting, OutputHead
from cl_lightning.strategy import Output

_FLOOR = 1e-5


def neighbour_shares(
    features: Tensor, memory: Tensor, labels: Tensor, num_classes: int, *, neighbours: int, temperature: float
) -> Tensor:
    """p ``(B, C)`` of features ``(B, d)`` from a memory ``(n, d)`` with labels ``(n,)``; all features of length 1.

    Args:
        features, memory, labels: See above.
        num_classes: C.
        neighbours: k, at least 1; all of the memory if it has fewer features.
        temperature: t, above 0.
    """
    nearest = (features @ memory.T).topk(min(neighbours, len(memory)), dim=1)
    weights = (nearest.values / temperature).softmax(dim=1)
    shares = weights.new_zeros(len(features), num_classes).scatter_add_(1, labels[nearest.indices], weights)
    return (shares + _FLOOR).clamp(max=1.0)


class NeighbourMemory(OutputHead):
    """Scores by the labels of the nearest features in a memory of source and stream.

    Args:
        neighbours: k, at least 1.
        temperature: t, above 0.
        threshold: b, at least 0.
        source_samples: Number of source images that are stored, at least 1.
        capacity: Number of features of the stream that are kept, at least 0; None to keep all.
    """

    transductive = False  # evaluations do not learn
    source: Tensor
    features: Tensor
    latest: Tensor
    source_labels: Tensor
    labels: Tensor
    latest_labels: Tensor

    def __init__(
        self,
        neighbours: int = 10,
        temperature: float = 0.1,
        threshold: float = 0.0,
        source_samples: int = 100_000,
        capacity: int | None = None,
    ) -> None:
        super().__init__()
        at_least(self, 1, neighbours=neighbours, source_samples=source_samples)
        above(self, 0, temperature=temperature)
        at_least(self, 0, threshold=threshold)
        at_least(self, 0, capacity=capacity, optional=True)
        self.neighbours, self.temperature, self.threshold = neighbours, temperature, threshold
        self.source_samples, self.capacity = source_samples, capacity
        for name in ("source", "features", "latest"):  # of the source, of the stream, of the last batch; (n, d)
            self.register_buffer(name, torch.zeros(0, 0))
        for name in ("source_labels", "labels", "latest_labels"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.int64))

    @torch.no_grad()
    def learn_source(self, strategy: Adapting) -> None:
        with strategy.stream_statistics():  # gathered by batch, for the order of the data on any number of processes
            found = [
                all_gather_together([full_precision(strategy.network.backbone(batch.images)), batch.labels])
                for batch in strategy.passes.batches(samples=self.source_samples)
            ]
        features, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        known = labels >= 0
        self.source, self.source_labels = F.normalize(features[known].float(), dim=1), labels[known]
        self.reset()

    def reset(self) -> None:
        self.features, self.labels = self.source[:0], self.source_labels[:0]
        self.latest, self.latest_labels = self.source[:0], self.source_labels[:0]

    @torch.no_grad()
    def learn(self, output: Output) -> None:
        """Store the batch before, and note this one, so that no image of a batch is predicted by another one of it."""
        held = len(self.labels) + len(self.latest_labels)
        first = 0 if self.capacity is None else max(0, held - self.capacity)
        self.features = torch.cat([self.features, self.latest])[first:]
        self.labels = torch.cat([self.labels, self.latest_labels])[first:]
        rows = [F.normalize(full_precision(output.features).float(), dim=1), self._shares(output)]
        features, shares = all_gather_together(rows)
        sure = shares.softmax(dim=1).amax(dim=1) >= self.threshold
        self.latest, self.latest_labels = features[sure], shares[sure].argmax(dim=1)

    @torch.no_grad()
    def forward(self, output: Output) -> Tensor:
        """log p ``(B, C)`` of the rows of this process."""
        return self._shares(output).log()

    def _shares(self, output: Output) -> Tensor:
        """p ``(B, C)``."""
        with torch.autocast(output.features.device.type, enabled=False):
            return neighbour_shares(
                F.normalize(full_precision(output.features).float(), dim=1),
                torch.cat([self.source, self.features]),
                torch.cat([self.source_labels, self.labels]),
                output.logits.shape[1],
                neighbours=self.neighbours,
                temperature=self.temperature,
            )


class AdaNPC(TestTimeAdaptation):
    """Classification by the nearest features of a memory that grows with the stream, without training.

    Args:
        neighbours, temperature, threshold, source_samples, capacity: Options of ``NeighbourMemory``.
        statistics: Statistics of batch normalisation, see ``TestTimeAdaptation``.
        reset: When the memory is reset to the source, see ``TestTimeAdaptation``.
        kwargs: Options of ``TestTimeAdaptation``.
    """

    traits = TestTimeAdaptation.traits.but(family="test-time", paper="Zhang et al., ICML 2023, arXiv:2304.12566")

    def __init__(
        self,
        *,
        neighbours: int = 10,
        temperature: float = 0.1,
        threshold: float = 0.0,
        source_samples: int = 100_000,
        capacity: int | None = None,
        statistics: Literal["source", "batch", "mix", "moving"] = "source",
        reset: Literal["never", "domain", "batch"] = "never",
        **kwargs: Any,
    ) -> None:
        output = NeighbourMemory(neighbours, temperature, threshold, source_samples, capacity)
        super().__init__(
            statistics=statistics, params=None, reset=reset, predict_when="before", output=output, **kwargs
        )
