"""ER with asymmetric cross-entropy, ER-ACE (Caccia et al., ICLR 2022, arXiv:2104.05025).

With B the batch of the stream, R samples drawn from a memory, P the classes present in B, and z the logits,

    L = a CE(B; P) + b CE(R; all classes seen so far),    CE(B; P) = mean_B -log( exp z_y / sum_{c in P} exp z_c )

a = b = 1, or with ``stream_weight`` alpha: a = alpha and b = 1 - alpha. The batch has no gradient for the rows of
absent classes, so that new classes do not push the features of old classes away at the start of a task; old and new
classes are told apart on the memory alone. A batch of a single class has loss 0.
As long as the memory is empty, L is a CE(B; P).
"""

from typing import Any

from torch import Tensor

from cl_lightning.checks import within
from cl_lightning.losses import classes_present, masked_logits
from cl_lightning.strategy import Batch, Output, Replay, Traits


class ERACE(Replay):
    """Cross-entropy over the classes of the batch for the stream, and over all classes for samples from a memory.

    Args:
        stream_weight: alpha, in [0, 1]; None for the weight 1 of both terms.
        kwargs: Options of ``Replay``: ``memory_size``, ``policy``, ``replay_size``, ``update_memory``.
    """

    traits = Traits(
        family="online", paper="Caccia et al., ICLR 2022, arXiv:2104.05025", keeps_exemplars=True, task_free=True
    )

    def __init__(self, *, stream_weight: float | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        within(self, "[0, 1]", stream_weight=stream_weight, optional=True)
        if self.loss_classes != "all":
            raise ValueError(
                f"ERACE: loss_classes is {self.loss_classes!r}, but the loss chooses classes by the batch; use 'all'"
            )
        self.weights = (1.0, 1.0) if stream_weight is None else (stream_weight, 1.0 - stream_weight)
        self._present: Tensor | None = None

    def prepare_batch(self, batch: Batch) -> Batch:
        # Here, not in `losses`, which is not called on a process without rows.
        self._present = classes_present(batch.labels, self.network.head.num_columns)
        return super().prepare_batch(batch)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        assert self._present is not None
        samples, of_part, share = batch.part("stream", output)
        masked = of_part._replace(logits=masked_logits(of_part.logits, self._present))
        terms = {"ce": self.weights[0] * share * self.classification_loss(masked, samples)}
        if "replay" in batch.parts:
            samples, of_part, share = batch.part("replay", output)
            terms["replay"] = self.weights[1] * share * self.classification_loss(of_part, samples)
        return terms
