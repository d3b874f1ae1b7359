"""Proxy-based Contrastive Replay, PCR (Lin et al., CVPR 2023, arXiv:2304.04408), for online streams.

The rows w_c of a cosine classifier are proxies of the classes. A step takes the batch and as many samples of a memory,
each in two views, plain and strongly augmented. With cos_ic = <z_i, w_c> / (||z_i|| ||w_c||), features z, and the
proxy of each of the N rows as a candidate,

    L = -1/N sum_i 1/|{j: y_j = y_i}| sum_{j: y_j = y_i} log( exp(cos_i,y_j / tau) / sum_k exp(cos_i,y_k / tau) )

tau -> temperature. Rows of one class have one proxy, so that with n_c rows of class c this is

    L = 1/N sum_i [ log sum_c n_c exp(cos_ic / tau) - cos_i,y_i / tau ]

cross-entropy over the classes that are present in the step, by their numbers: rows of a class that is absent get no
gradient, and new classes do not push the old ones away. Counts are of all processes. After the step the batch is
offered to a reservoir, un-augmented.
Departs from the authors' code: the first step of the stream, which finds the memory empty, learns its batch alone,
where there it has no loss; the classifier grows with the classes. The augmentation of the data module is not used.
Where the stream is gone through in several epochs, the first one feeds the memory.
"""

from functools import cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from cl_lightning.batch import Batch, cat
from cl_lightning.distributed import all_sum
from cl_lightning.heads import CosineHead
from cl_lightning.losses import full_precision
from cl_lightning.memory import Memory, Policy, check_replay
from cl_lightning.network import Output
from cl_lightning.strategy import ContinualStrategy, HeadFactory
from cl_lightning.transforms import (
    ColorJitter,
    Compose,
    Context,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    Transform,
)

_VIEW = 0x9C2  # salt of the second view


def proxy_contrastive(logits: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """Contrast of samples with the proxies of the classes around them, the mean over the rows, in nats.

        L = 1/B sum_i [ log sum_c n_c exp(z_ic) - z_i,y_i ]

    Where the classes that are present have k rows each, this is their cross-entropy plus log k.

    Args:
        logits: Cosines over the temperature, ``(B, C)``, at least one row.
        labels: Columns, int64 ``(B,)``.
        counts: n_c, rows of each class in the step, ``(C,)``; classes with 0 get no gradient (exactly 0).
    """
    logits = full_precision(logits)
    total = (logits + counts.to(logits.dtype).log()).logsumexp(dim=1)
    return (total - logits.gather(1, labels[:, None]).squeeze(1)).mean()


@cache
def strong_augmentation(height: int, width: int) -> Transform:
    """The augmentation of the paper's second view."""
    jitter = ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8)
    crop = RandomResizedCrop((height, width), scale=(0.2, 1.0))
    return Compose([crop, RandomHorizontalFlip(), jitter, RandomGrayscale(p=0.2)])


class PCR(ContinualStrategy):
    """Samples of a batch and of a memory are drawn to the proxies of their classes, among those present in the step.

    Args:
        memory_size: In samples, over all processes; 0 to learn from the stream alone.
        temperature: tau, above 0; the default head has 1 / tau as its scale.
        transforms: Augmentation of the second view, in order; None for the paper's. Mirror images are part of that:
            give others where they are of another class.
        replay_size: Samples drawn from the memory per step, over all processes; None for as many as the batch has.
        policy: Which samples a full memory keeps; None for a reservoir.
        head: Builds the classifier; None for a ``CosineHead``. The logits of another one are taken as cos / tau.
        kwargs: Of the base.
    """

    family: ClassVar[str] = "online"
    paper: ClassVar[str] = "Lin et al., CVPR 2023, arXiv:2304.04408"
    keeps_exemplars: ClassVar[bool] = True
    plain_first_task = False

    def __init__(
        self,
        *,
        memory_size: int = 1000,
        temperature: float = 0.09,
        transforms: list[Transform] | None = None,
        replay_size: int | None = None,
        policy: Policy | None = None,
        head: HeadFactory | None = None,
        **kwargs: Any,
    ) -> None:
        if temperature <= 0:
            raise ValueError(f"PCR: temperature is {temperature}; it must be above 0")
        super().__init__(head=head or partial(CosineHead, scale=1 / temperature), **kwargs)
        if self.visible != "all":
            raise ValueError(
                f"PCR: visible is {self.visible!r}, but the step decides which classes are seen; use 'all'"
            )
        check_replay("PCR", self.visible, replay_size)
        self.memory = Memory(memory_size, policy)
        self.transforms = None if transforms is None else Compose(transforms)
        self.replay_size = replay_size
        self._counts: Tensor | None = None

    @property
    def plain_batches(self) -> bool:
        return True

    def prepare(self, batch: Batch) -> Batch:
        parts = [batch]
        if len(self.memory):
            parts.append(self.finish(self.memory.sample(self.replay_size or batch.draw.total, batch.draw)))
        joint = cat([view for part in parts for view in self.views(part)], self.trainer.world_size)
        # Here, not in the loss: of a small batch some processes have no rows and are not asked for a loss.
        columns = torch.arange(self.network.head.num_columns, device=joint.labels.device)
        self._counts = all_sum((joint.labels[:, None] == columns).sum(dim=0))
        return joint

    def views(self, part: Batch) -> tuple[Batch, Batch]:
        """The samples as they come, un-augmented, and strongly augmented."""
        transform = self.transforms or strong_augmentation(*part.raw.shape[-2:])
        context = Context(indices=part.indices, epoch=self.epoch, seed=self.seed)
        strong = transform(part.raw, part.draw.fork(_VIEW), context)
        return part, self.finish(part.replace(raw=strong)).replace(raw=part.raw)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        assert self._counts is not None
        return {"pcr": proxy_contrastive(output.logits, batch.labels, self._counts)}

    def observe(self, batch: Batch) -> None:
        if self.first_sight:
            self.memory.add(batch.raw, batch.labels, batch.tasks, batch.draw)
