"""Filters choose the samples of a batch that a test-time adaptation method learns from, and weight them.

    EntropyFilter      H_i < E_0 = margin ln C; weight 1, or exp(E_0 - H_i)          (Niu et al., ICML 2022)
    DiversityFilter    |cos(p_i, m)| < eps,  m <- 0.9 m + 0.1 mean of the selected p_i   (Niu et al., ICML 2022)
    DiversityCertainty d_i >= mean d, weight exp(d_i c_i / T),  d_i = 1 - cos(p_i, m) and c_i = -H_i, both scaled to
                       [0, 1] over the batch;  m <- 0.9 m + 0.1 mean of all p_i          (Marsden et al., WACV 2024)
    ObjectFilter       p_i,y - p'_i,y > D with p' of the image after its patches are shuffled, y = argmax p_i; weight
                       exp(E_w - H_i) + exp(p_i,y - p'_i,y)                              (Lee et al., ICLR 2024)
    SourceConfidence   p_i,y >= p0_i,y with p0 of the source network, y = argmax p0_i    (Lee et al., ICCV 2023)

H_i is the entropy of the prediction p_i, C the number of classes. A sample is selected if all filters select it; its
weight is the product of their weights.
"""

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import Batch, Draw
from cl_lightning.checks import above, at_least, one_of, within
from cl_lightning.distributed import all_gather_together, all_sum
from cl_lightning.losses import entropy, full_precision
from cl_lightning.strategies.test_time.parts.part import Adapting, Part
from cl_lightning.strategy import Output

_SHUFFLE = 0xC3  # salt


def probabilities(logits: Tensor) -> Tensor:
    """Softmax of logits ``(B, C)`` in single precision or more, without gradient."""
    return full_precision(logits.detach()).softmax(dim=1)


class SampleFilter(Part, ABC):
    """Chooses samples of a batch, and weights them."""

    @abstractmethod
    def forward(self, strategy: Adapting, batch: Batch, output: Output) -> Tensor:
        """Weights ``(B,)`` of the rows of this process, at least 0, without gradient; 0 rejects a sample.

        Args:
            strategy: The method.
            batch: Batch of the stream.
            output: Features ``(B, d)`` and logits ``(B, classes of the source)`` of the network.
        """

    def learn(self, output: Output, selected: Tensor) -> None:
        """Update the state, once per batch, with the rows ``(B,)``, bool, that all filters selected."""


class EntropyFilter(SampleFilter):
    """Selects samples whose prediction has a low entropy.

    Args:
        margin: Threshold of the entropy as a share of its largest value ln C, above 0; ``inf`` for no threshold.
        weighted: Whether the weight is exp(E_0 - H_i) instead of 1; without a threshold weights are 1.
    """

    def __init__(self, margin: float = 0.4, *, weighted: bool = False) -> None:
        super().__init__()
        above(self, 0, margin=margin)
        self.margin, self.weighted = margin, weighted

    def forward(self, strategy: Adapting, batch: Batch, output: Output) -> Tensor:
        values, most = entropy(output.logits.detach()), self.margin * math.log(strategy.num_source)
        selected = values < most
        if self.weighted and math.isfinite(most):
            return (most - values).exp() * selected
        return selected.to(values)


class DiversityFilter(SampleFilter):
    """Selects samples whose prediction differs from the mean prediction so far.

    Before the first selection there is no mean, and all samples are selected.

    Args:
        diversity: eps, above 0: largest absolute cosine between prediction and mean prediction; above 1 all samples
            are selected.
        momentum: Weight of the previous mean, in [0, 1].
    """

    transductive = True
    mean: Tensor

    def __init__(self, diversity: float = 0.4, momentum: float = 0.9) -> None:
        super().__init__()
        above(self, 0, diversity=diversity)
        within(self, "[0, 1]", momentum=momentum)
        self.diversity, self.momentum = diversity, momentum
        self.register_buffer("mean", torch.zeros(0))  # m, (classes of the source,); zeros before the first selection

    def learn_source(self, strategy: Adapting) -> None:
        self.mean = self.mean.new_zeros(strategy.num_source)

    def reset(self) -> None:
        self.mean = torch.zeros_like(self.mean)

    def forward(self, strategy: Adapting, batch: Batch, output: Output) -> Tensor:
        p = probabilities(output.logits)
        return (F.cosine_similarity(p, self.mean[None], dim=1).abs() < self.diversity).to(p)

    @torch.no_grad()
    def learn(self, output: Output, selected: Tensor) -> None:
        p = probabilities(output.logits)
        sums = all_sum(torch.cat([(p * selected[:, None]).sum(dim=0), selected.sum()[None]]))  # over all processes
        mean = sums[:-1] / sums[-1].clamp(min=1)
        mean = torch.where(self.mean.sum() == 0, mean, torch.lerp(mean, self.mean, self.momentum))
        self.mean.copy_(torch.where(sums[-1] > 0, mean, self.mean))


def scaled_to_unit(values: Tensor, of: Tensor) -> Tensor:
    """``values`` after the map that takes the least of ``of`` to 0 and the largest to 1; 0 if all of ``of`` agree."""
    if not of.numel():
        return torch.zeros_like(values)
    low, high = of.amin(), of.amax()
    return torch.where(high > low, (values - low) / (high - low), 0.0)


class DiversityCertainty(SampleFilter):
    """Selects samples whose prediction differs from the mean prediction, and weights diverse and sure ones most.

    Scales, and the mean of the diversity, are over the batch of all processes. In a batch of equal predictions,
    or of one sample, all weights are 1.

    Args:
        temperature: T, above 0.
        momentum: Weight of the previous mean prediction, in [0, 1].
    """

    transductive = True
    mean: Tensor

    def __init__(self, temperature: float = 1 / 3, momentum: float = 0.9) -> None:
        super().__init__()
        above(self, 0, temperature=temperature)
        within(self, "[0, 1]", momentum=momentum)
        self.temperature, self.momentum = temperature, momentum
        self.register_buffer("mean", torch.zeros(0))  # m, (classes of the source,)

    def learn_source(self, strategy: Adapting) -> None:
        self.mean = self.mean.new_full((strategy.num_source,), 1 / strategy.num_source)

    def reset(self) -> None:
        self.mean = torch.full_like(self.mean, 1 / max(len(self.mean), 1))

    def forward(self, strategy: Adapting, batch: Batch, output: Output) -> Tensor:
        p = probabilities(output.logits)
        diverse, certain = 1 - F.cosine_similarity(p, self.mean[None], dim=1), -entropy(output.logits.detach())
        all_diverse, all_certain = all_gather_together([diverse, certain])
        diverse, threshold = (
            scaled_to_unit(values, all_diverse) for values in (diverse, all_diverse.sum() / max(len(all_diverse), 1))
        )
        weights = (diverse * scaled_to_unit(certain, all_certain) / self.temperature).exp()
        return weights * (diverse >= threshold - 1e-6)  # rounding may put equal values below their mean

    @torch.no_grad()
    def learn(self, output: Output, selected: Tensor) -> None:
        p = probabilities(output.logits)
        sums = all_sum(torch.cat([p.sum(dim=0), p.new_full((1,), len(p))]))
        self.mean.lerp_(sums[:-1] / sums[-1].clamp(min=1), 1 - self.momentum)


Destruction = Literal["patches", "pixels", "occlusion"]


def destroyed(images: Tensor, how: Destruction, draw: Draw, parts: int = 4) -> Tensor:
    """Images whose objects have lost their shape.

    ``patches``: the image is resized to a multiple of ``parts``, its parts x parts tiles are permuted, one permutation
    per image, and the image is resized back; ``pixels``: the pixels are permuted, one permutation for the batch;
    ``occlusion``: the window of half the side in the centre is filled with the mean of each channel.

    Args:
        images: ``(B, C, H, W)``, floating point.
        how: ``patches``, ``pixels`` or ``occlusion``.
        draw: Draw of these rows.
        parts: Number of tiles per side, at least 1.

    Returns:
        ``(B, C, H, W)``.
    """
    if not len(images):
        return images
    height, width = images.shape[2:]
    if how == "occlusion":
        top, left = height // 4, width // 4
        images = images.clone()
        means = images.mean(dim=(2, 3), keepdim=True)
        images[:, :, top : top + height // 2, left : left + width // 2] = means
        return images
    if how == "pixels":
        generator = torch.Generator().manual_seed(draw.key)
        order = torch.randperm(height * width, generator=generator).to(images.device, non_blocking=True)
        return images.flatten(2)[:, :, order].view_as(images)
    rows, columns = (max(side // parts, 1) for side in (height, width))
    size = (rows * parts, columns * parts)
    resized = images if size == (height, width) else F.interpolate(images, size, mode="bilinear", antialias=True)
    tiles = resized.reshape(*resized.shape[:2], parts, rows, parts, columns).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    order = draw.rand(parts * parts, device=images.device).argsort(dim=1)
    tiles = tiles.gather(1, order[:, :, None, None, None].expand_as(tiles))
    tiles = tiles.reshape(len(images), parts, parts, *tiles.shape[2:])
    mixed: Tensor = tiles.permute(0, 3, 1, 4, 2, 5).reshape(resized.shape)
    if size == (height, width):
        return mixed
    return F.interpolate(mixed, (height, width), mode="bilinear", antialias=True)


class ObjectFilter(SampleFilter):
    """Selects samples whose prediction loses probability if the shape of objects is destroyed.

    Args:
        threshold: D, in [-1, 1]: the probability of the predicted class falls by more than D.
        destruction: How the shape is destroyed, see ``destroyed``.
        parts: Number of tiles per side, at least 1.
        entropy_margin: E_w as a share of ln C, above 0; None for no such weight.
        weighted: Whether exp(p_y - p'_y) is part of the weight. Without both parts the weight is 1.
    """

    def __init__(
        self,
        threshold: float = 0.2,
        *,
        destruction: Destruction = "patches",
        parts: int = 4,
        entropy_margin: float | None = 0.4,
        weighted: bool = True,
    ) -> None:
        super().__init__()
        within(self, "[-1, 1]", threshold=threshold)
        one_of(self, get_args(Destruction), destruction=destruction)
        at_least(self, 1, parts=parts)
        above(self, 0, entropy_margin=entropy_margin, optional=True)
        self.threshold, self.parts, self.weighted = threshold, parts, weighted
        self.destruction: Destruction = destruction
        self.entropy_margin = entropy_margin

    def forward(self, strategy: Adapting, batch: Batch, output: Output) -> Tensor:
        p, raw = probabilities(output.logits), batch.raw
        raw = raw if raw.is_floating_point() else raw.float() / 255
        changed = batch.replace(raw=destroyed(raw, self.destruction, batch.draw.fork(_SHUFFLE), self.parts))
        other = probabilities(strategy.forward_source_classes(strategy.data.finish(changed).images).logits)
        label = p.argmax(dim=1, keepdim=True)
        fall = (p.gather(1, label) - other.gather(1, label))[:, 0]
        weights = torch.zeros_like(fall)
        if self.entropy_margin is not None:
            most = self.entropy_margin * math.log(strategy.num_source)
            weights = weights + (most - entropy(output.logits.detach())).exp()
        if self.weighted:
            weights = weights + fall.exp()
        if self.entropy_margin is None and not self.weighted:
            weights = torch.ones_like(fall)
        return weights * (fall > self.threshold)


class SourceConfidence(SampleFilter):
    """Selects samples for which the network is at least as confident as the source network was.

    The class is the prediction of the source network, which normalises with the statistics of the stream.
    """

    needs_source: ClassVar[bool] = True

    def forward(self, strategy: Adapting, batch: Batch, output: Output) -> Tensor:
        p, source = (
            probabilities(logits[:, : strategy.num_source])
            for logits in (output.logits, strategy.source(batch.images).logits)
        )
        label = source.argmax(dim=1, keepdim=True)
        return (p.gather(1, label) >= source.gather(1, label) - 1e-6)[:, 0].to(p)  # rounding, if both are equal
