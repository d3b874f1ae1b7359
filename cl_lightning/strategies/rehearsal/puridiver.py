"""Purity and Diversity aware Episode Replay, PuriDivER (Bang et al., "Online Continual Learning on a Contaminated Data
Stream with Blurry Task Boundaries", CVPR 2022, arXiv:2203.15355), for streams with noisy labels.

A task has two phases. In ``train`` the stream is learnt as in experience replay, and a memory chooses samples that are
likely labelled correctly and unlike each other: as long as it has too many, the sample of the largest score

    S(x_i) = (1 - a) l_i + a mean_{j != i in its class} cos( r(x_i), r(x_j) ),     a = a_0 min(1, 1 / mean of all l)

of its largest class is dropped; l is the cross-entropy, and r(x) the features f_k(x) that matter for the class y, with
w_yk > mean_c w_ck for the rows w of the head. In ``memory`` the network learns the memory alone, in weakly and strongly
augmented views x_w and x_s. At the start of each epoch after the warm-up, two Gaussians are fitted to the losses l of
the memory; C are the samples that more likely belong to the smaller one, with probability p_i. Two further ones are
fitted to the uncertainty u = 1 - max_c softmax f(x)_c of the others, and separate certain ones R from uncertain ones U.
With n samples in a batch

    L = 1/n ( sum_C CE(f(x_s), y)  +  sum_R CE(f(x_s), q)  +  eta sum_U mean_c (f_c(x_w) - f_c(x_s))^2 )

    q = p y + (1 - p) softmax f(x_w),   without gradient

a_0 -> similarity_weight, eta -> consistency_weight. In the warm-up all samples are in C. All l and u are of
un-augmented images in eval mode.
Departs from the paper: the samples of a step enter together, after it, and then the surplus is dropped one by one; a
batch has C, R and U as the memory has them; without CutMix, and without batch normalisation of the logits. Three
details are not from the paper, which could not be read in whole: that p is the probability of the loss, that logits are
compared, and that the mean of all l is over the memory and the batch. In the framework mammoth, R has the uncertain
samples and U the certain ones, and each feature vector is compared with itself.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import Draw, join
from cl_lightning.checks import at_least, within
from cl_lightning.data import MEMORY_ROWS, AutoAugment, Compose, Context, Transform
from cl_lightning.distributed import all_gather_rows, all_gather_together
from cl_lightning.losses import full_precision
from cl_lightning.memory import Memory
from cl_lightning.models import in_eval_mode
from cl_lightning.strategies.base import of_memory
from cl_lightning.strategies.base.schedules import WarmRestarts
from cl_lightning.strategy import Batch, Output, Phase, PhaseOptions, Replay, Task, Traits

_MEMORY = "memory"
_OPTIONS = PhaseOptions(epochs=255)
_TIES, _STRONG = 0xD17, 0xD18
_CLEAN, _CERTAIN, _UNCERTAIN = 0, 1, 2
_FLOOR = 5e-4  # added to the variances of values that are scaled to [0, 1]


def remaining(
    losses: Tensor,
    features: Tensor,
    labels: Tensor,
    rows: Tensor,
    size: int,
    similarity_weight: float,
    draw: Draw,
) -> Tensor:
    """Samples that remain when the sample of the largest score in the largest class is dropped, again and again.

    Without a synchronisation with a GPU.

    Args:
        losses: l, ``(n,)``.
        features: f, ``(n, d)``.
        labels: Columns, int64 ``(n,)``.
        rows: w, rows of the head, ``(columns, d)``.
        size: Number of samples that remain, at most n.
        similarity_weight: a_0.
        draw: Random numbers that choose among classes of the same size; only its key is used.

    Returns:
        int64 ``(size,)``, ascending.
    """
    relevant = (rows > rows.mean(dim=0))[labels]
    unit = F.normalize(features * relevant, dim=1)
    ones = torch.ones_like(labels, dtype=unit.dtype)
    counts = torch.zeros(len(rows), dtype=unit.dtype, device=unit.device).index_add_(0, labels, ones)
    sums = torch.zeros_like(rows, dtype=unit.dtype).index_add_(0, labels, unit)
    weight = similarity_weight * (1 / losses.mean()).clamp(max=1)
    ties = Draw.of(len(rows), draw.key, _TIES).rand().to(counts, non_blocking=True)
    dropped = torch.zeros_like(labels, dtype=torch.bool)
    own = unit.square().sum(dim=1)  # 1, or 0 without relevant features
    for _ in range(len(labels) - size):
        largest = (counts + ties).argmax(keepdim=True)
        similarity = (unit @ sums[largest].T)[:, 0] - own
        scores = (1 - weight) * losses + weight * similarity / (counts[largest] - 1).clamp(min=1)
        worst = scores.masked_fill((labels != largest) | dropped, -torch.inf).argmax(keepdim=True)
        dropped.index_fill_(0, worst, True)
        counts.index_add_(0, largest, -ones[worst])
        sums.index_add_(0, largest, -unit[worst])
    return dropped.to(torch.uint8).argsort(stable=True)[:size]


def lower_component(values: Tensor, chosen: Tensor, iterations: int = 50) -> Tensor:
    """Probability that each value belongs to the lower one of two Gaussians that are fitted to the chosen values.

    The values are scaled to [0, 1]; expectation maximisation begins with means 0 and 1, equal shares and the variance
    of all values. Equal values belong to the lower one.

    Args:
        values: ``(n,)``.
        chosen: Values to which the Gaussians are fitted, bool ``(n,)``.
        iterations: Number of iterations.

    Returns:
        float64 ``(n,)``, also of values that are not chosen.
    """
    x, weight = values.double(), chosen.double()
    low, high = x.masked_fill(~chosen, torch.inf).amin(), x.masked_fill(~chosen, -torch.inf).amax()
    x = torch.where(chosen, (x - low) / (high - low).clamp(min=1e-12), 0.0)
    total = weight.sum().clamp(min=1)
    mean = torch.tensor([0.0, 1.0], dtype=torch.float64).to(x.device, non_blocking=True)
    spread = (weight * (x - (weight * x).sum() / total).square()).sum() / total
    variance, share = (spread + _FLOOR).expand(2), torch.full_like(mean, 0.5)

    def responsibilities() -> Tensor:
        squares = (x[:, None] - mean).square() / variance
        return (share.log() - (squares + variance.log()) / 2).softmax(dim=1)

    for _ in range(iterations):
        parts = responsibilities() * weight[:, None]
        sizes = parts.sum(dim=0) + 1e-12
        mean = (parts * x[:, None]).sum(dim=0) / sizes
        variance = (parts * (x[:, None] - mean).square()).sum(dim=0) / sizes + _FLOOR
        share = sizes / total
    first, second = responsibilities().unbind(dim=1)
    return torch.where(mean[0] <= mean[1], first, second)


def groups(losses: Tensor, uncertainty: Tensor) -> tuple[Tensor, Tensor]:
    """Group of each sample, 0 for C, 1 for R and 2 for U, int64 ``(n,)``, and p, float32 ``(n,)``.

    Args:
        losses: l, ``(n,)``.
        uncertainty: u, ``(n,)``.
    """
    clean = lower_component(losses, torch.ones_like(losses, dtype=torch.bool))
    noisy = clean < 0.5
    certain = lower_component(uncertainty, noisy) >= 0.5
    group = torch.where(noisy, torch.where(certain, _CERTAIN, _UNCERTAIN), _CLEAN)
    return group, clean.float()


def robust_terms(weak: Tensor, strong: Tensor, labels: Tensor, group: Tensor, clean: Tensor) -> tuple[Tensor, ...]:
    """Terms of the samples of C, R and U, 0 for all others, ``(n,)`` each.

    Args:
        weak, strong: Logits of the two views, ``(n, columns)``.
        labels: Columns, int64 ``(n,)``.
        group: 0 for C, 1 for R, 2 for U, int64 ``(n,)``.
        clean: p, ``(n,)``.
    """
    weak, strong = full_precision(weak), full_precision(strong)
    given = F.one_hot(labels, strong.shape[1]).to(strong)
    p = torch.where(group == _CLEAN, 1.0, clean.to(strong))[:, None]
    wanted = (p * given + (1 - p) * weak.detach().softmax(dim=1)).detach()
    ce = -(wanted * strong.log_softmax(dim=1)).sum(dim=1)
    distance = (weak - strong).square().mean(dim=1)
    found = zip((_CLEAN, _CERTAIN, _UNCERTAIN), (ce, ce, distance), strict=True)
    return tuple(torch.where(group == number, term, 0.0) for number, term in found)


class PuriDivER(Replay):
    """A memory of samples of low loss that are unlike each other, and robust training on it at the end of each task.

    Choosing the samples takes a forward pass over the memory in each step of the stream, once it is full.

    Args:
        memory_options: Options of the phase ``memory``, 255 epochs by default; 0 for none. None for their optimizer is
            SGD with learning rate 0.05, Nesterov momentum 0.9 and weight decay 1e-4, with ``WarmRestarts``.
        warm_up: Number of epochs of this phase in which all labels are trusted, at least 0.
        similarity_weight: a_0, in [0, 1].
        consistency_weight: eta, at least 0.
        transforms: Augmentation of the strong view, before the augmentation of the data; None for ``AutoAugment``,
            which rotates and inverts images: give others if such an image belongs to another class.
        kwargs: Options of ``Replay``, apart from ``policy``.
    """

    traits = Traits(
        family="rehearsal", paper="Bang et al., CVPR 2022, arXiv:2203.15355", keeps_exemplars=True, inputs=("image",)
    )

    def __init__(
        self,
        *,
        memory_options: PhaseOptions = _OPTIONS,
        warm_up: int = 10,
        similarity_weight: float = 0.5,
        consistency_weight: float = 1.0,
        transforms: list[Transform] | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("policy") is not None:
            raise ValueError(
                "PuriDivER: policy is given, but the memory is chosen by losses and features; leave it out"
            )
        super().__init__(**kwargs)
        if self.loss_classes != "all":
            raise ValueError(
                f"PuriDivER: loss_classes is {self.loss_classes!r}, but labels are replaced by predictions over all "
                "classes; use 'all'"
            )
        at_least(self, 0, warm_up=warm_up, consistency_weight=consistency_weight)
        within(self, "[0, 1]", similarity_weight=similarity_weight)
        sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
        self.memory_options, self.warm_up = memory_options.filled(sgd, WarmRestarts), warm_up
        self.similarity_weight, self.consistency_weight = similarity_weight, consistency_weight
        self.strong = Compose([AutoAugment()] if transforms is None else transforms)

    # ------------------------------------------------------------------ the phase on the memory

    def phases(self, task: Task) -> list[Phase]:
        alone = Phase(
            _MEMORY,
            self.memory_options,
            samples=lambda labels, replayed: replayed,
            on_memory=True,
            needed=lambda: len(self.memory) > 0,
        )
        return [Phase(), *([] if self.memory_options.epochs == 0 else [alone])]

    @property
    def _on_memory(self) -> bool:
        return self.phase.name == _MEMORY

    def replay_memory(self) -> Memory | None:
        return self.memory if self._on_memory else None

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if batch_idx == 0 and self._on_memory:
            fields = self.memory.fields
            if self.epoch < self.warm_up:
                fields["group"].fill_(_CLEAN)
            else:
                values = of_memory(self, self.memory, self.values)
                fields["group"][:], fields["clean"][:] = groups(values[:, 0], values[:, 1])

    def prepare_batch(self, batch: Batch) -> Batch:
        if not self._on_memory:
            return super().prepare_batch(batch)
        context = Context(indices=batch.indices, epoch=self.epoch, seed=self.seed)
        changed = self.strong(batch.raw, batch.draw.fork(_STRONG), context)
        strong = self.data.augment(batch.replace(raw=changed, draw=batch.draw.fork(_STRONG))).replace(raw=batch.raw)
        return join({"weak": batch, "strong": strong})

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if not self._on_memory:
            return super().losses(batch, output)
        samples, weak, share = batch.part("weak", output)
        rows, fields = samples.extra[MEMORY_ROWS], self.memory.fields
        strong = batch.part("strong", output).output.logits
        clean, certain, uncertain = robust_terms(
            weak.logits, strong, samples.labels, fields["group"][rows], fields["clean"][rows]
        )
        weights = self.data.weights_of(samples)
        if weights is not None:
            clean, certain = weights * clean, weights * certain
        return {
            "ce": share * clean.mean(),
            "relabelled": share * certain.mean(),
            "consistency": self.consistency_weight * share * uncertain.mean(),
        }

    # ------------------------------------------------------------------ the memory

    def after_step(self, batch: Batch) -> None:
        if not self._on_memory:
            super().after_step(batch)

    @torch.no_grad()
    def offer(self, batch: Batch, **extra: Tensor) -> None:
        memory = self.memory
        if memory.size == 0:
            return
        fields = {"group": torch.zeros_like(batch.labels), "clean": torch.ones(len(batch), device=self.device), **extra}
        columns = {"images": batch.raw, "labels": batch.labels, "tasks": batch.tasks, **fields}
        rows = dict(zip(columns, all_gather_together(value.to(self.device) for value in columns.values()), strict=True))
        seen = memory.num_seen + len(rows["labels"])
        if len(memory) + len(rows["labels"]) > memory.size:
            values = all_gather_rows(self.values(self.data.finish(batch)))
            if len(memory):
                values = torch.cat([of_memory(self, memory, self.values), values])
                held = {"images": memory.images, "labels": memory.labels, "tasks": memory.tasks, **memory.fields}
                rows = {name: torch.cat([held[name], value]) for name, value in rows.items()}
            weights = self.network.head.weight().to(values)
            options = (memory.size, self.similarity_weight, batch.draw)
            kept = remaining(values[:, 0], values[:, 2:], rows["labels"], weights, *options)
            rows = {name: value[kept] for name, value in rows.items()}
            memory.keep(kept[:0])
        memory.add(**rows, draw=batch.draw, gathered=True)
        memory.num_seen = seen

    def values(self, batch: Batch) -> Tensor:
        """l, u and the features of samples in eval mode, without gradient, float32 ``(B, 2 + d)``.

        Args:
            batch: Samples with finished images.
        """
        if not len(batch):
            return torch.zeros(0, 2 + self.network.head.num_features, device=self.device)
        with torch.no_grad(), in_eval_mode(self.network), self.trainer.precision_plugin.forward_context():
            output = self.network(batch.images)
        logits = full_precision(output.logits)
        losses = F.cross_entropy(logits, batch.labels, reduction="none")
        uncertainty = 1 - logits.softmax(dim=1).amax(dim=1)
        return torch.cat([losses[:, None], uncertainty[:, None], output.features], dim=1).float()
