"""Proxy-based Contrastive Replay, PCR (Lin et al., CVPR 2023, arXiv:2304.04408), for online streams.

The rows w_c of a cosine classifier are proxies of the classes. A step uses the batch and an equal number of samples of
a memory, each in two views: un-augmented and strongly augmented, N rows in total. The loss contrasts each row with the
proxies of all rows. With cos_ic = <z_i, w_c> / (||z_i|| ||w_c||) and features z,

    L = -1/N sum_i 1/|{j: y_j = y_i}| sum_{j: y_j = y_i} log( exp(cos_i,y_j / tau) / sum_k exp(cos_i,y_k / tau) )

tau -> temperature. All rows of a class have the same proxy. With n_c rows of class c, counted over all processes, the
loss is therefore

    L = 1/N sum_i [ log sum_c n_c exp(cos_ic / tau) - cos_i,y_i / tau ]

a cross-entropy over the classes present in the step, weighted by their numbers of rows. Weights of absent classes get
no gradient, so that training on new classes does not lower the logits of old classes. After the step the batch is
offered to a reservoir, without augmentation.
In the released code the two views of the batch and the two views of the samples of the memory are two passes of the
network, so that batch normalisation takes the statistics of each; ``separate_passes=True`` does the same.
Departs from the authors' code: the first step of the stream, with an empty memory, trains on its batch alone, while it
has no loss there; the classifier grows with the classes. The augmentation of the data module is not used. With several
epochs over the stream, batches are offered to the memory in the first epoch only.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from cl_lightning.checks import above
from cl_lightning.distributed import all_sum
from cl_lightning.losses import full_precision
from cl_lightning.models import CosineHead
from cl_lightning.strategies.online.two_views import TwoViews
from cl_lightning.strategy import Batch, HeadFactory, Output, Traits


def proxy_contrastive(logits: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """Contrastive loss between samples and the proxies of the classes in the step, the mean over the rows, in nats.

        L = 1/B sum_i [ log sum_c n_c exp(z_ic) - z_i,y_i ]

    If all classes of the step have k rows each, this is the cross-entropy over these classes plus log k.

    Args:
        logits: z, cosines divided by the temperature, ``(B, C)``, at least one row.
        labels: y, columns, int64 ``(B,)``.
        counts: n_c, number of rows of each class in the step, ``(C,)``; the gradient of a class with 0 rows is 0.
    """
    logits = full_precision(logits)
    total = (logits + counts.to(logits.dtype).log()).logsumexp(dim=1)
    return (total - logits.gather(1, labels[:, None]).squeeze(1)).mean()


class PCR(TwoViews):
    """Contrastive loss between the samples of a batch and a memory and the proxies of the classes present in the step.

    Args:
        memory_size: Number of samples in the memory, over all processes; with 0 only the stream is trained on.
        temperature: tau, above 0; the default head has the scale 1 / tau.
        separate_passes: Whether the batch and the samples of the memory are two passes, as in the authors' code.
        head: Builds the classifier; None for a ``CosineHead`` of scale 1 / tau. The logits of another head are used in
            place of cos / tau.
        kwargs: Options of ``TwoViews``: ``transforms``, and of ``Replay``.
    """

    traits = Traits(
        family="online",
        paper="Lin et al., CVPR 2023, arXiv:2304.04408",
        keeps_exemplars=True,
        task_free=True,
        inputs=("image",),
    )

    def __init__(
        self,
        *,
        memory_size: int = 1000,
        temperature: float = 0.09,
        separate_passes: bool = False,
        head: HeadFactory | None = None,
        **kwargs: Any,
    ) -> None:
        above(self, 0, temperature=temperature)
        super().__init__(memory_size=memory_size, head=head or partial(CosineHead, scale=1 / temperature), **kwargs)
        self.separate_passes = separate_passes
        self._counts: Tensor | None = None

    def prepare_batch(self, batch: Batch) -> Batch:
        order = ("stream", "strong stream", "replay", "strong replay")
        joint = self.joined_views(batch, order, 2 if self.separate_passes else 1)
        # Here, not in `losses`, which is not called on a process without rows.
        columns = torch.arange(self.network.head.num_columns, device=joint.labels.device)
        self._counts = all_sum((joint.labels[:, None] == columns).sum(dim=0))
        return joint

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        assert self._counts is not None
        return {"pcr": proxy_contrastive(output.logits, batch.labels, self._counts)}
