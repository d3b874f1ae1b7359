"""ER with asymmetric metric learning, ER-AML (Caccia et al., ICLR 2022, arXiv:2104.05025).

New classes are learnt by a contrastive loss among themselves, which does not push the features of old classes away; the
classifier of all classes is trained on a memory alone. For each sample a of the batch B, one positive p(a), of its
class but not a itself, and one negative n(a), of another class that B has, are drawn uniformly from B and the memory.
With f the normalised features, D the drawn samples of all a, P(a) the samples of D with the class of a, and R samples
drawn from the memory,

    L = gamma L_in + CE(R; all classes seen so far)
    L_in = mean_a -1/|P(a)| sum_{p in P(a)} log( exp(f_a f_p / tau) / sum_{j in D} exp(f_a f_j / tau) )

gamma -> contrast_weight, tau -> temperature; the classifier is a ``CosineHead`` of scale 10, which L_in does not train.
A sample without a possible positive or negative has no term, and nothing is drawn for it: a batch of a single class has
L_in = 0. As long as the memory is empty, L is the cross-entropy of B. Drawn samples are augmented on their own.
The authors' code multiplies L_in by tau / 0.07, which ``contrast_weight`` 2.857 does with tau = 0.2; with task ids it
draws negatives from the classes of the task, here always from the classes of the batch.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import join
from cl_lightning.checks import above, at_least
from cl_lightning.data.pixels import choose
from cl_lightning.distributed import all_gather_together, gather_rows, world_size
from cl_lightning.losses import full_precision
from cl_lightning.models import CosineHead
from cl_lightning.strategy import Batch, HeadFactory, Output, Replay, Traits

_POSITIVE, _NEGATIVE = 0xA31, 0xA32  # salts of the draws and of the augmentation of positives and negatives


def draw_pairs(labels: Tensor, pool: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a positive and a negative for each sample of a batch, each uniformly from a pool that begins with the batch.

    Args:
        labels: Columns of the batch, int64 ``(B,)``.
        pool: Columns of the pool, int64 ``(n,)``; its first B rows are the batch.
        positive, negative: Uniform numbers, ``(B, n)`` each; of the possible rows the one with the largest is drawn.

    Returns:
        Rows of the positives and of the negatives, int64 ``(B,)`` each, and which samples have both, bool ``(B,)``. The
        rows of a sample that has not are its own.
    """
    own = torch.arange(len(labels), device=labels.device)
    same = labels[:, None] == pool
    fitting = same & (own[:, None] != torch.arange(len(pool), device=pool.device))
    other = ~same & (pool[:, None] == labels).any(dim=1)
    both = fitting.any(dim=1) & other.any(dim=1)
    chosen = (
        numbers.masked_fill(~possible, -1.0).argmax(dim=1)
        for numbers, possible in ((positive, fitting), (negative, other))
    )
    first, second = (torch.where(both, rows, own) for rows in chosen)
    return first, second, both


def asymmetric_contrast(
    features: Tensor, labels: Tensor, drawn: Tensor, drawn_labels: Tensor, used: Tensor, temperature: float
) -> Tensor:
    """Supervised contrastive loss of samples against drawn samples, the mean over the samples that are used, in nats.

    Args:
        features: Features of the batch, ``(B, d)``; they are normalised here.
        labels: Columns, int64 ``(B,)``.
        drawn: Features of the positives, then of the negatives, ``(2 B, d)``.
        drawn_labels: Their columns, int64 ``(2 B,)``.
        used: Which samples have a positive and a negative, bool ``(B,)``; the drawn rows of others do not count.
        temperature: tau, above 0.

    Returns:
        A scalar; 0 if no sample is used.
    """
    f, g = (F.normalize(full_precision(each), dim=1) for each in (features, drawn))
    with torch.autocast(f.device.type, enabled=False):
        similarity = f @ g.T / temperature
    counted = used.repeat(2)
    log_p = similarity.masked_fill(~counted, torch.finfo(f.dtype).min).log_softmax(dim=1)
    positive = (labels[:, None] == drawn_labels) & counted
    of_sample = -torch.where(positive, log_p, 0.0).sum(dim=1) / positive.sum(dim=1).clamp(min=1)
    return torch.where(used, of_sample, 0.0).sum() / used.sum().clamp(min=1)


class ERAML(Replay):
    """Contrastive loss among the classes of the batch for the stream, and cross-entropy on samples from a memory.

    Args:
        contrast_weight: gamma, at least 0.
        temperature: tau, above 0.
        head: Builds the classifier; None for a ``CosineHead`` of scale 10.
        kwargs: Options of ``Replay``: ``memory_size``, ``policy``, ``replay_size``, ``update_memory``. The paper gives
            the size of the memory per class.
    """

    traits = Traits(
        family="online", paper="Caccia et al., ICLR 2022, arXiv:2104.05025", keeps_exemplars=True, task_free=True
    )

    def __init__(
        self,
        *,
        contrast_weight: float = 1.0,
        temperature: float = 0.2,
        head: HeadFactory | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(head=head or partial(CosineHead, scale=10.0), **kwargs)
        at_least(self, 0, contrast_weight=contrast_weight)
        above(self, 0, temperature=temperature)
        if self.loss_classes != "all":
            raise ValueError(
                f"ERAML: loss_classes is {self.loss_classes!r}, but the loss chooses classes by the batch; use 'all'"
            )
        self.contrast_weight, self.temperature = contrast_weight, temperature
        self._used: Tensor | None = None

    def prepare_batch(self, batch: Batch) -> Batch:
        replay = self.replay(batch)
        if replay is None:
            return join({"stream": batch})
        raw, labels, tasks = all_gather_together([batch.raw, batch.labels, batch.tasks])
        held = self.memory
        numbers = (
            torch.rand(len(labels), len(labels) + len(held), generator=batch.draw.fork(salt).generator())
            for salt in (_POSITIVE, _NEGATIVE)
        )
        pool = torch.cat([labels, held.labels])
        *rows, used = draw_pairs(labels, pool, *(each.to(pool.device) for each in numbers))
        mine, parts = slice(batch.draw.start, batch.draw.stop), {}
        self._used = used[mine]
        for name, salt, chosen in zip(("positive", "negative"), (_POSITIVE, _NEGATIVE), rows, strict=True):
            drawn = held.at((chosen[mine] - len(labels)).clamp(min=0), batch.draw.fork(salt))
            here, place = chosen[mine] < len(labels), chosen[mine].clamp(max=len(labels) - 1)
            images = choose(here, raw[place], drawn.raw)
            mixed = drawn.replace(
                raw=images,
                images=images,
                labels=torch.where(here, labels[place], drawn.labels),
                tasks=torch.where(here, tasks[place], drawn.tasks),
            )
            parts[name] = self.data.augment(mixed)
        return join({"stream": batch, "replay": replay, **parts})

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if "replay" not in batch.parts:
            return {"ce": self.classification_loss(output, batch)}
        samples, of_part, share = batch.part("replay", output)
        terms = {"replay": share * self.classification_loss(of_part, samples)}
        assert self._used is not None
        together = batch.draw.total >= world_size()  # a process without rows takes no part in an exchange
        parts = [batch.part(name, output) for name in ("stream", "positive", "negative")]
        features, labels = [part.output.features for part in parts], [part.batch.labels for part in parts]
        used = self._used
        if together:
            features = [gather_rows(each) for each in features]
            *labels, used = all_gather_together([*labels, used])
        contrast = asymmetric_contrast(
            features[0], labels[0], torch.cat(features[1:]), torch.cat(labels[1:]), used, self.temperature
        )
        # All processes have the same mean over the global batch; the base class multiplies it by the weight.
        terms["contrast"] = self.contrast_weight * contrast / (batch.weight if together else 1.0)
        return terms
