"""Hindsight Anchor Learning, HAL (Chaudhry et al., AAAI 2021, arXiv:2002.08165).

For each class there is an anchor e_c, an image whose output is held while the network learns from the batch B of the
stream and samples R of a memory. With theta' the weights after a virtual step on B and R,

    L = CE(B u R) + lambda * mean_c (f_theta(e_c) - f_theta'(e_c))^2,    theta' = theta - lr grad CE(B u R)

with the outputs at theta' as constants, and the mean over anchors and logits. When a task ends, the anchor of each of
its classes is the image that the network would forget most if it was trained on the memory alone, close to the
features of the class: with theta_M the weights theta_t at the end of the task after a short training on the memory,

    e_c = argmax_e  CE(f_theta_M(e), c) - CE(f_theta_t(e), c) - gamma || phi(e) - phi_c ||^2

by gradient ascent from noise. phi are the features, phi_c their running mean for class c,
phi_c <- b phi_c + (1 - b) * the mean of class c in the batch. lambda -> anchor_weight, b -> mean_decay, gamma ->
feature_weight. Anchors stay as they are after their task. The memory keeps the latest samples of each class.

Departs from the code of the mammoth framework: there the gradient of CE is counted in two optimizer steps, of the
virtual step and of the real one, so momentum and weight decay count twice. Here phi_c starts with the first mean, not
with 0, anchors are clamped to the range of the pixels, and the passes over anchors do not change the running statistics
of batch normalisation.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import Batch, Draw, mix
from cl_lightning.checks import above, at_least, within
from cl_lightning.distributed import all_sum
from cl_lightning.losses import full_precision
from cl_lightning.memory import GrowingBuffers, Policy, Ring, restore_shapes
from cl_lightning.models import Network, frozen_copy
from cl_lightning.strategies.base import (
    check_loss_classes,
    finetune_on_memory,
    output_at,
    step_on,
)
from cl_lightning.strategy import Output, Replay, Task, Traits

_HINDSIGHT = 0x4A1  # seed of the training on the memory and of the noise


class Anchors(GrowingBuffers):
    """An image per class, and the running mean of the features of each class.

    Attributes:
        images: Finished images, ``(A, C, H, W)``; ``(0,)`` before the first task has ended.
        labels: Their columns, int64 ``(A,)``.
        means: phi, ``(classes so far, d)``; rows of classes without a sample are nan.
    """

    kept_as: ClassVar[str] = "anchors"
    images: Tensor
    labels: Tensor
    means: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("images", torch.zeros(0))
        self.register_buffer("labels", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("means", torch.zeros(0, 0))

    def num_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers())

    def restore_buffers(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        restore_shapes(self, state_dict, prefix, ("images", "labels", "means"))

    def add(self, images: Tensor, labels: Tensor) -> None:
        """Add the anchors of some classes."""
        self.images = torch.cat([self.images, images]) if len(self.labels) else images
        self.labels = torch.cat([self.labels, labels])

    def update_means(self, sums: Tensor, counts: Tensor, decay: float) -> None:
        """phi_c <- b phi_c + (1 - b) mean for the classes of a batch; the mean itself for a class that is new.

        Args:
            sums: Sum of the features of each class, ``(C, d)``.
            counts: Number of samples of each class, ``(C,)``.
            decay: b.
        """
        missing = len(sums) - len(self.means)
        before = self.means if len(self.means) else sums[:0]
        before = F.pad(before, (0, 0, 0, missing), value=torch.nan)
        mean = sums / counts.clamp(min=1)[:, None]
        moved = torch.where(before.isnan(), mean, decay * before + (1 - decay) * mean)
        self.means = torch.where((counts > 0)[:, None], moved, before)


def hindsight(
    network: Network,
    after: Network,
    start: Tensor,
    labels: Tensor,
    means: Tensor,
    *,
    feature_weight: float,
    steps: int,
    lr: float,
    bounds: tuple[Tensor, Tensor],
) -> Tensor:
    """Images that a network forgets most in a training, by gradient ascent, clamped to a range.

        max_e  CE(f_after(e), c) - CE(f(e), c) - gamma || phi(e) - phi_c ||^2

    Args:
        network: f, with the features phi, in eval mode.
        after: f after the training, in eval mode.
        start: Images to start from, ``(A, C, H, W)``.
        labels: c, ``(A,)``.
        means: phi_c, ``(A, d)``.
        feature_weight: gamma.
        steps: Number of steps.
        lr: Learning rate of each image.
        bounds: Smallest and largest value of each pixel, of a shape that is broadcast to ``(A, C, H, W)``.
    """
    images = start.clamp(*bounds)
    for _ in range(steps):
        images = images.detach().requires_grad_()
        with torch.enable_grad():
            now, later = network(images), after(images)
            forgotten = F.cross_entropy(later.logits, labels, reduction="none")
            known = F.cross_entropy(now.logits, labels, reduction="none")
            apart = (now.features - means).square().sum(dim=1)
            (gradient,) = torch.autograd.grad((forgotten - known - feature_weight * apart).sum(), images)
        images = (images.detach() + lr * gradient).clamp(*bounds)
    return images.detach()


class HAL(Replay):
    """Cross-entropy on batch and memory, and the outputs on an anchor per class held where a virtual step moves them.

    Args:
        anchor_weight: lambda, at least 0.
        mean_decay: b, in [0, 1].
        feature_weight: gamma, at least 0.
        anchor_steps: Number of steps to find the anchors, at least 0.
        anchor_lr: Learning rate of these steps, above 0.
        memory_steps: Number of steps on the memory to theta_M, at least 1; None for one pass over the memory.
        memory_lr: Learning rate of these steps, above 0.
        policy: Policy that decides which samples a full memory keeps; None for the latest samples of each class.
        kwargs: Options of ``Replay``.
    """

    traits = Traits(
        family="rehearsal",
        paper="Chaudhry et al., AAAI 2021, arXiv:2002.08165",
        keeps_exemplars=True,
        uses_old_logits=True,
    )

    def __init__(
        self,
        *,
        anchor_weight: float = 0.1,
        mean_decay: float = 0.5,
        feature_weight: float = 0.1,
        anchor_steps: int = 100,
        anchor_lr: float = 0.1,
        memory_steps: int | None = None,
        memory_lr: float = 0.1,
        policy: Policy | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy=policy or Ring(), **kwargs)
        check_loss_classes(self)
        at_least(self, 0, anchor_weight=anchor_weight, feature_weight=feature_weight, anchor_steps=anchor_steps)
        at_least(self, 1, memory_steps=memory_steps, optional=True)
        above(self, 0, anchor_lr=anchor_lr, memory_lr=memory_lr)
        within(self, "[0, 1]", mean_decay=mean_decay)
        self.anchor_weight, self.mean_decay, self.feature_weight = anchor_weight, mean_decay, feature_weight
        self.anchor_steps, self.anchor_lr = anchor_steps, anchor_lr
        self.memory_steps, self.memory_lr = memory_steps, memory_lr
        self.anchors = Anchors()
        self._target: Tensor | None = None
        self._features: tuple[Tensor, Tensor] | None = None

    def prepare_batch(self, batch: Batch) -> Batch:
        joint, self._target, self._features = super().prepare_batch(batch), None, None
        if len(self.anchors.labels) and self.anchor_weight > 0:
            moved = step_on(self, joint)
            with torch.no_grad():
                self._target = full_precision(output_at(self.network, moved, self.anchors.images).logits)
        return joint

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        terms = {"ce": self.classification_loss(output, batch)}
        samples, of_part, _ = batch.part("stream", output)
        self._features = full_precision(of_part.features.detach()), samples.labels
        if self._target is not None:
            now = full_precision(output_at(self.network, {}, self.anchors.images).logits)
            terms["anchors"] = self.anchor_weight * F.mse_loss(now, self._target)
        return terms

    def after_step(self, batch: Batch) -> None:
        super().after_step(batch)
        columns = torch.arange(self.network.head.num_columns, device=self.device)
        features, labels = self._features or (torch.zeros(0, self.network.head.num_features), batch.labels[:0])
        of_class = (labels == columns[:, None]).float()
        sums = of_class @ features.to(of_class)
        both = all_sum(torch.cat([sums, of_class.sum(dim=1, keepdim=True)], dim=1))
        self.anchors.update_means(both[:, :-1], both[:, -1], self.mean_decay)

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        if not len(self.memory) or not self.anchor_weight:
            return
        new = self.task_columns[-1].nonzero().flatten()
        new = new[~torch.isin(new, self.anchors.labels) & ~self.anchors.means[new].isnan().any(dim=1)]
        now, after = frozen_copy(self.network), frozen_copy(self.network)
        size, key = self.replay_size or 32, mix(self.seed, _HINDSIGHT, task.index)
        finetune_on_memory(
            self,
            after,
            self.memory,
            [name for name, _ in after.named_parameters()],
            steps=self.memory_steps or -(-len(self.memory) // size),
            batch_size=size,
            lr=self.memory_lr,
            key=key,
            decays=False,
        )
        after.eval()
        shape = self.memory.images.shape[1:]
        start = Draw.of(len(new), key).randn(*shape).to(self.device)
        images = hindsight(
            now,
            after,
            start,
            new,
            self.anchors.means[new],
            feature_weight=self.feature_weight,
            steps=self.anchor_steps,
            lr=self.anchor_lr,
            bounds=self.data.pixel_range(self.memory.images),
        )
        self.anchors.add(images, new)
