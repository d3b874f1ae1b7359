"""BEEF: Bi-Compatible Class-Incremental Learning via Energy-Based Expansion and Fusion (Wang et al., ICLR 2023).

In each task a feature extractor f is trained apart from the earlier ones, which are frozen, and then fused with them.
It starts as a copy of the first extractor. The first task is ordinary training, with the energy term.

``expand``: the old classes of each earlier task k are one class for f, with a backward prototype b_k; the new classes c
have rows w_c. With a, a constant that keeps the backward prototypes from dominating,

    u = [ (b_0 f(x) + beta_0) / a, ..., (b_{t-1} f(x) + beta_{t-1}) / a, w_c f(x) + beta_c, ... ]
    L = CE(u, y~) + lambda CE([u, e](x'), forward prototype of y, without u_y~),   e = E f(x')

y~ is the task of an old sample, or the entry of the new class. E are forward prototypes, one per class seen, for what
is unlike all classes. The negatives x' start as x rotated by 180 degrees and descend the share of these prototypes, so
that the network takes them for known classes,

    x' <- x' - eta grad log( sum_j exp e_j / (sum_i exp u_i + sum_j exp e_j) ) + noise,   S steps

``fuse``: with everything else frozen, on equally many samples of each class, one pair per earlier task is trained in

    z_c = z_c^old + (1 + alpha_k)(b_k f(x) + beta_k) + delta_k   for a class c of the earlier task k,
    z_c = w_c f(x) + beta_c                                      for a new class,      L = CE(z, y)

All classes of an earlier task are shifted by the same amount, so that their order does not change. At the end of the
task the shifts are merged into a linear head on the features of all extractors, and b, E, alpha and delta are removed.
a -> backward_divisor, lambda -> energy_weight, S -> energy_steps, eta -> energy_lr, noise -> energy_noise (its standard
deviation), (alpha, delta) -> pairs.

Departs from the released code: the old biases stay in z, which the code leaves out until they are merged; each negative
is found by itself, not through the logarithm of a sum over the batch; u_y~ is excluded for its own sample, where the
code sets the columns of all samples to about 0; a divides the backward prototypes in the energy term too.
"""

import copy
import functools
from collections.abc import Iterable
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import ImageShape, mix
from cl_lightning.checks import above, at_least
from cl_lightning.data.balance import balanced_subset
from cl_lightning.losses import cross_entropy, full_precision
from cl_lightning.models import Head, LinearHead, Pairs
from cl_lightning.strategies.base import ExpandingReplay
from cl_lightning.strategy import Batch, Output, Phase, PhaseOptions, Task, Traits

_NOISE = 0xBEE  # salt of the noise of the negatives


def pseudo_labels(labels: Tensor, sizes: list[int]) -> Tensor:
    """y~: k for a class of the k-th earlier task, t for the first new class, t + 1 for the next one; -1 stays -1.

    Args:
        labels: Columns, int64 ``(B,)``.
        sizes: Number of classes of each of the t earlier tasks.

    Returns:
        int64 ``(B,)``.
    """
    pseudo = (labels - sum(sizes)).clamp(min=0)
    for end in accumulate(sizes):
        pseudo = pseudo + (labels >= end)
    return torch.where(labels < 0, labels, pseudo)


def log_share(u: Tensor, e: Tensor) -> Tensor:
    """``log( sum_j exp e_j / (sum_i exp u_i + sum_j exp e_j) )`` of each row, ``(B,)``, at least float32.

    Args:
        u: ``(B, m)``.
        e: ``(B, n)``.
    """
    u, e = full_precision(u), full_precision(e)
    return e.logsumexp(dim=1) - torch.cat([u, e], dim=1).logsumexp(dim=1)


def energy_loss(u: Tensor, e: Tensor, pseudo: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of [u, e] to the forward prototype of each label, without the entry ``pseudo`` of u; mean, in nats.

    Args:
        u: ``(B, m)``.
        e: ``(B, C)``.
        pseudo: y~, int64 ``(B,)``.
        labels: y, columns, int64 ``(B,)``; rows with -1 are ignored.
    """
    masked = full_precision(u).scatter(1, pseudo.clamp(min=0)[:, None], -torch.inf)
    target = torch.where(labels < 0, labels, labels + u.shape[1])
    return cross_entropy(torch.cat([masked, full_precision(e)], dim=1), target)


class BEEF(ExpandingReplay):
    """A feature extractor per task is trained apart, with prototypes for old and unknown classes, and then fused.

    Args:
        memory_size: K, in samples, over all classes and processes.
        backward_divisor: a, above 0.
        energy_weight: lambda, at least 0; 0 leaves the negatives out.
        energy_steps: S, at least 0.
        energy_lr: eta, at least 0, in normalised pixels.
        energy_noise: Standard deviation of the noise, at least 0, in normalised pixels.
        fuse_options: Options of the phase ``fuse``, at least 1 epoch; the default optimizer is SGD with learning rate
            0.05 and momentum 0.9.
        kwargs: Options of the base class, apart from ``freeze_backbone`` and ``loss_classes``; the head must be a
            ``LinearHead`` with biases.
    """

    traits = Traits(
        family="rehearsal",
        paper="Wang et al., ICLR 2023",
        keeps_exemplars=True,
        scenarios=("class-incremental", "online"),
    )

    copied_extractor = 0

    def __init__(
        self,
        *,
        memory_size: int = 2000,
        backward_divisor: float = 1.7,
        energy_weight: float = 0.01,
        energy_steps: int = 3,
        energy_lr: float = 0.01,
        energy_noise: float = 0.001,
        fuse_options: PhaseOptions = PhaseOptions(),
        **kwargs: Any,
    ) -> None:
        super().__init__(memory_size=memory_size, **kwargs)
        above(self, 0, backward_divisor=backward_divisor)
        at_least(self, 0, energy_weight=energy_weight, energy_steps=energy_steps)
        at_least(self, 0, energy_lr=energy_lr, energy_noise=energy_noise)
        at_least(self, 1, **{"fuse_options.epochs": fuse_options.epochs}, optional=True)
        if self.loss_classes != "all":
            raise ValueError(
                f"BEEF: loss_classes is {self.loss_classes!r}, but the loss is over tasks and new classes; use 'all'"
            )
        self.backward_divisor, self.energy_weight = backward_divisor, energy_weight
        self.energy_steps, self.energy_lr, self.energy_noise = energy_steps, energy_lr, energy_noise
        self.fuse_options = fuse_options.filled(functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9))
        self.old_head: Head  # of z^old; this head and the next ones are empty between tasks
        self.new_head: Head  # w
        self.backward_head: Head  # b, a block per earlier task
        self.forward_head: Head  # E
        self.pairs = Pairs((0.0, 0.0))

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        if not cast(LinearHead, self.network.head).bias:
            raise ValueError("BEEF: head has no biases, into which shifts are merged; use bias=True")
        self._empty_heads()

    def _empty_heads(self) -> None:
        self.old_head, self.new_head, self.backward_head, self.forward_head = (
            self.extractor_head().to(self.device) for _ in range(4)
        )
        self.pairs.clear()

    def begin_task(self, task: Task) -> None:
        if not task.is_first:
            self.old_head = self.network.head
            self.network.head = copy.deepcopy(self.old_head)
            for _ in self.old_head.blocks:
                self.backward_head.grow(1)
                self.pairs.grow()
            self.new_head.grow(task.num_new)
        super().begin_task(task)
        if self.energy_weight:
            self.forward_head.grow(task.num_seen)

    def phases(self, task: Task) -> list[Phase]:
        if task.is_first:
            return [Phase()]
        fuse = Phase(
            "fuse",
            self.fuse_options,
            trains=self.pairs.parameters,
            freezes=lambda: [self.network, self.old_head, self.new_head, self.backward_head],
            samples=functools.partial(self._balance, task=task),
        )
        return [Phase("expand"), fuse]

    def _balance(self, labels: Tensor, replayed: Tensor, *, task: Task) -> Tensor:
        return balanced_subset(labels, mix(self.seed, 0xBEEF, task.index))

    def trainable(self) -> Iterable[nn.Parameter]:
        if self.task.is_first:
            yield from super().trainable()
        else:
            for module in (self.network.backbone, self.new_head, self.backward_head):
                yield from module.parameters()
        yield from self.forward_head.parameters()

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.phase.name == "fuse":
            return {"ce": self.classification_loss(output._replace(logits=self.fused(output.features)), batch)}
        _, newest = self.backbone.split(output.features)
        pseudo = pseudo_labels(batch.labels, self.old_head.block_sizes())
        terms = {"ce": cross_entropy(self._scores(newest), pseudo, weights=self.data.weights_of(batch))}
        if self.energy_weight:
            features = self.backbone.extractors[-1](self._negatives(batch))
            scores = self._scores(features), self.forward_head(features)
            terms["energy"] = self.energy_weight * energy_loss(*scores, pseudo, batch.labels)
        return terms

    def _scores(self, features: Tensor) -> Tensor:
        """u, of features of the newest extractor; the logits of the head in the first task."""
        if self.task.is_first:
            logits: Tensor = self.network.head(features)
            return logits
        return torch.cat([self.backward_head(features) / self.backward_divisor, self.new_head(features)], dim=1)

    def _negatives(self, batch: Batch) -> Tensor:
        """x', ``(B, C, H, W)``, without gradient."""
        newest, images = self.backbone.extractors[-1], batch.images.detach().flip((2, 3))
        mode = newest.training
        newest.eval()
        try:
            for step in range(self.energy_steps):
                images = images.requires_grad_()
                features = newest(images)
                share = log_share(self._scores(features), self.forward_head(features)).sum()
                (slope,) = torch.autograd.grad(share, images)
                noise = batch.draw.fork(_NOISE, step).randn(*images.shape[1:], device=images.device)
                images = images.detach() - self.energy_lr * slope + self.energy_noise * noise
        finally:
            newest.train(mode)
        return images.detach()

    def fused(self, features: Tensor) -> Tensor:
        """z, ``(B, columns)``, of the features of all extractors ``(B, n d)``, before the shifts are merged."""
        earlier, newest = self.backbone.split(features)
        pairs = torch.stack(list(self.pairs.values))  # (tasks, 2)
        shifts = (1 + pairs[:, 0]) * self.backward_head(newest) + pairs[:, 1]  # (B, tasks)
        sizes = self.old_head.block_sizes()
        spread = torch.cat([shifts[:, k : k + 1].expand(-1, size) for k, size in enumerate(sizes)], dim=1)
        return torch.cat([self.old_head(earlier) + spread, self.new_head(newest)], dim=1)

    @torch.no_grad()
    def _merge(self) -> None:
        """Write the linear map of :meth:`fused` into the head of the network."""
        width, count = self.backbone.width, len(self.old_head.blocks)
        wide, of_old, of_backward, of_new = (
            cast(list[nn.Linear], list(head.blocks))
            for head in (self.network.head, self.old_head, self.backward_head, self.new_head)
        )
        for block, old, backward, pair in zip(wide[:count], of_old, of_backward, self.pairs.values, strict=True):
            block.weight[:, :-width] = old.weight
            block.weight[:, -width:] = (1 + pair[0]) * backward.weight
            block.bias.copy_(old.bias + (1 + pair[0]) * backward.bias + pair[1])
        for block, new in zip(wide[count:], of_new, strict=True):
            block.weight.copy_(F.pad(new.weight, (self.backbone.num_features - width, 0)))
            block.bias.copy_(new.bias)

    def end_phase(self, phase: Phase) -> None:
        if not self.task.is_first:
            self._merge()

    def predict_within_task(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        if self.task.is_first or not self.pairs.values:
            return self.predict(images)
        return self.fused(self.network.backbone(images))

    def end_task(self, task: Task) -> None:
        self._empty_heads()
        super().end_task(task)
