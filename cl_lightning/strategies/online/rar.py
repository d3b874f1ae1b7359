"""Retrospective Adversarial Replay, RAR (Kumari et al., NeurIPS 2022), on Experience Replay.

Samples of the memory are replayed as they are, and moved towards the classes of the batch that would be confused with
them after the coming step, where forgetting begins. With B the batch of the stream, R samples of the memory with pixels
x in [0, 1], f' the network after a virtual step of plain gradient descent on CE(B), and t the class of the sample of B
that is nearest to x in the features of f' among the samples of another class than x,

    delta_0 = 0,   delta_{i+1} = mu delta_i + g_i / ||g_i||_1,   g_i = grad_x CE(f'(x_i), t)
    x_{i+1} = clip( x_i - eps / n sign(delta_{i+1}), 0, 1 ),     i = 0 .. n - 1,     x~ = x_n
    L = CE(B) + (1 - beta) CE(R) + beta CE(R~),                  R~: x~ with the labels of R

beta -> adversarial_weight, eps -> radius, n -> steps, mu -> decay. A sample whose class is the only class of B stays as
it is. The features and g are computed in eval mode, so that a sample does not depend on the others; the gradient of the
virtual step takes the statistics of the batch. R is augmented, and moved after that.
Departs from the code of Avalanche, which takes the farthest sample of another class, moves away from its class,
computes the gradient once, clips normalised images, and leaves the term of R out. The paper's MixUp is not part of it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import Batch, join
from cl_lightning.checks import above, at_least, within
from cl_lightning.data.pixels import choose
from cl_lightning.distributed import all_gather_together
from cl_lightning.losses import full_precision
from cl_lightning.models import distances, in_eval_mode
from cl_lightning.strategies.base import check_loss_classes, output_at, step_on
from cl_lightning.strategy import Output, Replay, Traits


def nearest_foreign(features: Tensor, labels: Tensor, others: Tensor, other_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Class of the nearest other sample of another class, for each sample.

    Args:
        features, labels: Of the samples, ``(n, d)`` and int64 ``(n,)``.
        others, other_labels: Of the samples to choose from, ``(m, d)`` and int64 ``(m,)``, m at least 1.

    Returns:
        Classes, int64 ``(n,)``, and whether there is a sample of another class, bool ``(n,)``.
    """
    foreign = labels[:, None] != other_labels
    nearest = distances(features, others).masked_fill(~foreign, torch.inf).argmin(dim=1)
    return other_labels[nearest], foreign.any(dim=1)


def moved_towards(
    logits_of: Callable[[Tensor], Tensor], pixels: Tensor, targets: Tensor, *, radius: float, steps: int, decay: float
) -> Tensor:
    """Images whose loss with the target classes is smaller: signed gradient steps with momentum (MI-FGSM, targeted).

    Args:
        logits_of: Logits ``(n, C)`` of images ``(n, ...)``, each of its own image alone.
        pixels: x, in [0, 1], ``(n, ...)``.
        targets: t, int64 ``(n,)``.
        radius: eps; no pixel moves farther.
        steps: n.
        decay: mu.
    """
    moved, momentum = pixels.detach(), torch.zeros_like(pixels)
    for _ in range(steps):
        at = moved.requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(full_precision(logits_of(at)), targets, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, at)
        norm = gradient.abs().flatten(1).sum(dim=1).clamp(min=torch.finfo(gradient.dtype).tiny)
        momentum = decay * momentum + gradient / norm.view(-1, *(1 for _ in gradient.shape[1:]))
        moved = (at.detach() - radius / steps * momentum.sign()).clamp(0, 1)
    return moved


class RAR(Replay):
    """Cross-entropy on the batch, on samples of a memory, and on these samples moved towards classes of the batch.

    Args:
        adversarial_weight: beta, in [0, 1]; 0 is ``ER`` with the sum of the means.
        radius: eps, in units of the range of the pixels, above 0.
        steps: n, at least 1.
        decay: mu, at least 0.
        virtual_lr: Learning rate of the virtual step, at least 0; None for the learning rate of the optimizer.
        kwargs: Options of ``Replay``.
    """

    traits = Traits(family="online", paper="Kumari et al., NeurIPS 2022", keeps_exemplars=True, task_free=True)

    def __init__(
        self,
        *,
        adversarial_weight: float = 0.1,
        radius: float = 0.0314,
        steps: int = 2,
        decay: float = 1.0,
        virtual_lr: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_loss_classes(self)
        within(self, "[0, 1]", adversarial_weight=adversarial_weight)
        above(self, 0, radius=radius)
        at_least(self, 1, steps=steps)
        at_least(self, 0, decay=decay)
        at_least(self, 0, virtual_lr=virtual_lr, optional=True)
        self.adversarial_weight, self.virtual_lr = adversarial_weight, virtual_lr
        self.radius, self.steps, self.decay = radius, steps, decay

    def prepare_batch(self, batch: Batch) -> Batch:
        replay = self.replay(batch)
        moved = None if replay is None or not self.adversarial_weight else self.adversarial(batch, replay)
        return join({"stream": batch, "replay": replay, "adversarial": moved})

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        beta, terms = self.adversarial_weight, {}
        for name, weight in (("stream", 1.0), ("replay", 1 - beta), ("adversarial", beta)):
            if name in batch.parts:
                samples, of_part, share = batch.part(name, output)
                terms["ce" if name == "stream" else name] = weight * share * self.classification_loss(of_part, samples)
        return terms

    def adversarial(self, batch: Batch, replay: Batch) -> Batch:
        """R~: the samples of the memory, moved towards classes of the batch.

        Args:
            batch: This process's rows of the batch, with finished images.
            replay: This process's rows of R, augmented.
        """
        network = self.network
        weights = {name: value.detach() for name, value in step_on(self, batch, self.virtual_lr).items()}
        with in_eval_mode(network):
            with torch.no_grad():
                near, own = (
                    full_precision(output_at(network, weights, part.images).features) for part in (batch, replay)
                )
            near, labels = all_gather_together([near, batch.labels])
            targets, found = nearest_foreign(own, replay.labels, near, labels)
            low, high = self.data.pixel_range(replay.raw)
            pixels = moved_towards(
                lambda x: output_at(network, weights, low + (high - low) * x).logits,
                (replay.images - low) / (high - low),
                targets,
                radius=self.radius,
                steps=self.steps,
                decay=self.decay,
            )
        images = low + (high - low) * pixels
        return replay.replace(images=choose(found, images, replay.images))
