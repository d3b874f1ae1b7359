"""Unbias Experience Replay, UER (Lin et al. 2023, arXiv:2309.04081), for online streams.

The logit of class c for features h is o_c = w_c . h = ||w_c|| ||h|| cos_c. The bias to the classes of the last batches
is mostly in the angle, while the norms help to keep earlier classes. With B the batch of the stream, R samples drawn
from a memory, and CE over all classes seen so far,

    L = CE(cos / tau; B) + CE(o; R)                  tau -> temperature

The batch trains the angles only: its gradient with respect to h is orthogonal to h, and its gradient with respect to
w_c to w_c. Predictions are by o. As long as the memory is empty, L is the first term.
The head has no bias, so that each logit is the product of norms and angle. The abstract of the paper does not state the
temperature and the weights of the terms: 0.09, as in PCR by the same authors, and equal weights are our choices.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import ImageShape
from cl_lightning.checks import above
from cl_lightning.losses import full_precision
from cl_lightning.models import LinearHead, head_as
from cl_lightning.strategies.base import check_loss_classes
from cl_lightning.strategy import Batch, HeadFactory, Output, Replay, Traits


def angle_logits(features: Tensor, rows: Tensor, temperature: float) -> Tensor:
    """Cosines between features and rows, divided by the temperature, ``(B, C)``, at least float32.

    Args:
        features: h, ``(B, d)``.
        rows: w, ``(C, d)``.
        temperature: tau, positive.
    """
    with torch.autocast(features.device.type, enabled=False):
        features = full_precision(features)
        directions = F.normalize(rows.to(features.dtype), dim=1)
        return F.linear(F.normalize(features, dim=1), directions) / temperature


class UER(Replay):
    """Cross-entropy of the angles for the stream, and of whole inner products for samples from a memory.

    Args:
        temperature: tau, above 0.
        head: Builds a ``LinearHead`` without bias; None for one.
        kwargs: Options of ``Replay``: ``memory_size``, ``policy``, ``replay_size``, ``update_memory``.
    """

    traits = Traits(family="online", paper="Lin et al. 2023, arXiv:2309.04081", keeps_exemplars=True, task_free=True)

    def __init__(self, *, temperature: float = 0.09, head: HeadFactory | None = None, **kwargs: Any) -> None:
        super().__init__(head=head or partial(LinearHead, bias=False), **kwargs)
        check_loss_classes(self)
        above(self, 0, temperature=temperature)
        self.temperature = temperature

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        reason = "whose logits are products of norms and cosines"
        if head_as(self.network, LinearHead, self, reason).bias:
            raise ValueError(f"UER: head has a bias; use a LinearHead with bias false, {reason}")

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        samples, of_part, share = batch.part("stream", output)
        angles = angle_logits(of_part.features, self.network.head.weight(), self.temperature)
        terms = {"angles": share * self.classification_loss(of_part._replace(logits=angles), samples)}
        if "replay" in batch.parts:
            samples, of_part, share = batch.part("replay", output)
            terms["replay"] = share * self.classification_loss(of_part, samples)
        return terms
