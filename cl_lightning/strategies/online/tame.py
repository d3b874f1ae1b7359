"""Task Agnostic Continual Learning using Multiple Experts, TAME (Zhu et al., CVPR-W 2024, arXiv:2210.03869).

A stream without boundaries is learnt by several networks, the experts, of which one is trained at a time. A change of
the data shows in the loss. With l the mean cross-entropy of the current expert e on a batch, before the step,

    s <- a l + (1 - a) s,        theta_e = mean(W_e) + z std(W_e)        W_e: the last losses of expert e
    s <= theta_e:  train e on the batch, and append l to W_e
    s >  theta_e:  evaluate all experts on the batch; continue with the expert of the smallest loss among those whose
                   loss is at most their threshold, or with a new one; s starts again

A selector, a network of its own, tells which expert answers. It is trained on a uniform sample of the stream, a memory
of images with the number of the expert that was trained on them:

    L = CE(f_e(B)) + CE(selector(R), experts of R),     prediction: f_i(x) with i = argmax selector(x)

a -> smoothing, z -> deviations, the length of W -> window, the size of the memory -> memory_size, R has
``replay_size`` samples. theta is infinite as long as W_e has fewer than ``warmup`` losses. After a change s is the
loss of the next batch, so that the smoothed loss of an expert that is not in use is its loss on the batch (our
reading), and the batch of the change is trained on, but its loss is not appended. Losses of the detector are computed
in eval mode. Their deviation is over the n of W, not n - 1. All ``max_experts`` networks exist from the start; when
all of them are in use, the expert of the smallest loss takes the place of a new one.
Departs from the paper: the selector is trained in each step, not after the stream, so that predictions are possible at
any time. The pruning of experts and selector after the stream, with the samples that are kept to train them again, and
the sigmoid on the outputs are left out.
"""

import functools
from collections.abc import Iterable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import Batch, ImageShape
from cl_lightning.checks import at_least, within
from cl_lightning.distributed import all_sum
from cl_lightning.losses import cross_entropy, full_precision
from cl_lightning.models import Backbone, Network, Output, built, in_eval_mode
from cl_lightning.strategies.online.growing import GrowingMixture
from cl_lightning.strategy import BackboneFactory, Traits


class LossDetector(nn.Module):
    """Thresholds on the loss of each expert, and the smoothed loss of the current one.

    Args:
        experts: Number of experts, at least 1.
        smoothing: a, in (0, 1].
        deviations: z, at least 0.
        window: Losses that are kept of each expert, at least 1.
        warmup: Losses from which on an expert has a finite threshold, in 1 .. window.

    Attributes:
        losses: The last losses of each expert, a ring, float64 ``(experts, window)``.
        counts: Number of all losses of each expert, int64 ``(experts,)``.
        smoothed: s, float64.
        steps: Losses in s since it started again, int64.

    Raises:
        ValueError: If an option is out of range.
    """

    kept_as: ClassVar[str] = "statistics"
    losses: Tensor
    counts: Tensor
    smoothed: Tensor
    steps: Tensor

    def __init__(
        self, experts: int, *, smoothing: float = 0.2, deviations: float = 3.0, window: int = 100, warmup: int = 20
    ) -> None:
        super().__init__()
        at_least(self, 1, experts=experts, window=window)
        within(self, "(0, 1]", smoothing=smoothing)
        at_least(self, 0, deviations=deviations)
        within(self, f"[1, {window}]", warmup=warmup)
        self.smoothing, self.deviations, self.warmup = smoothing, deviations, warmup
        self.register_buffer("losses", torch.zeros(experts, window, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(experts, dtype=torch.int64))
        self.register_buffer("smoothed", torch.zeros((), dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def thresholds(self) -> Tensor:
        """theta of each expert, float64 ``(experts,)``; infinite before ``warmup`` losses."""
        window = self.losses.shape[1]
        held = self.counts.clamp(max=window)[:, None]
        kept = torch.arange(window, device=held.device) < held
        mean = (self.losses * kept).sum(dim=1) / held.squeeze(1).clamp(min=1)
        square = ((self.losses - mean[:, None]).square() * kept).sum(dim=1) / held.squeeze(1).clamp(min=1)
        return torch.where(self.counts >= self.warmup, mean + self.deviations * square.sqrt(), torch.inf)

    def smooth(self, loss: Tensor) -> Tensor:
        """Add the loss of a batch to s; returns s."""
        share = 1 + (self.smoothing - 1) * (self.steps > 0).double()  # 1 for the first loss
        self.smoothed = self.smoothed + share * (loss.double() - self.smoothed)  # exact for a constant loss
        self.steps = self.steps + 1
        return self.smoothed

    def append(self, expert: int, loss: Tensor) -> None:
        """Append the loss of a batch to the losses of an expert."""
        place = self.counts[expert] % self.losses.shape[1]
        self.losses[expert] = torch.where(
            torch.arange(self.losses.shape[1], device=place.device) == place, loss.double(), self.losses[expert]
        )
        self.counts[expert] += 1

    def restart(self) -> None:
        """Start s again with the next loss."""
        self.steps = torch.zeros_like(self.steps)

    def num_bytes(self) -> int:
        """Size of the losses in bytes."""
        return sum(buffer.nbytes for buffer in self.buffers())


class Selector(nn.Module):
    """A network whose classes are experts.

    Args:
        backbone: Backbone of the network.
        experts: Number of experts.
    """

    kept_as: ClassVar[str] = "selector"

    def __init__(self, backbone: Backbone, experts: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.linear = nn.Linear(backbone.num_features, experts)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.backbone(images))
        return logits

    def num_bytes(self) -> int:
        """Size of the weights in bytes."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())


class TAME(GrowingMixture):
    """Experts that are added when the loss jumps, and a selector that is trained on a sample of the stream.

    Args:
        smoothing: a, in (0, 1].
        deviations: z, at least 0.
        window: Losses that are kept of each expert, at least 1.
        warmup: Losses that an expert must have before a change is detected, in 1 .. window.
        max_experts: Largest number of experts, at least 1.
        selector: Builds the backbone of the selector for a shape of images; None for the backbone of an expert.
        kwargs: Options of ``Replay``: ``memory_size`` and ``replay_size`` are of the selector; ``policy``, ....
    """

    traits = Traits(
        family="online", paper="Zhu et al., CVPR-W 2024, arXiv:2210.03869", keeps_exemplars=True, task_free=True
    )

    def __init__(
        self,
        *,
        smoothing: float = 0.2,
        deviations: float = 3.0,
        window: int = 100,
        warmup: int = 20,
        max_experts: int = 10,
        selector: BackboneFactory | None = None,
        **kwargs: Any,
    ) -> None:
        at_least(self, 1, max_experts=max_experts)
        super().__init__(members=max_experts, **kwargs)
        self.detector = LossDetector(
            max_experts, smoothing=smoothing, deviations=deviations, window=window, warmup=warmup
        )
        self.max_experts = max_experts
        self._build_selector = functools.partial(built, selector) if selector is not None else None
        self.selector: Selector
        self._drawn: Batch | None = None

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        self.selector = Selector((self._build_selector or self.build_backbone)(image_shape), self.max_experts)

    def parts(self) -> list[nn.Module]:
        return [*super().parts(), self.selector]

    @torch.no_grad()
    def batch_losses(self, batch: Batch, experts: Iterable[int]) -> Tensor:
        """Mean cross-entropy of experts on the labelled samples of all processes, in eval mode, float64 ``(n,)``."""
        sums = []
        for number in experts:
            total = torch.zeros((), dtype=torch.float64, device=self.device)
            if len(batch):
                member = cast(Network, self.mixture.members[number])
                with in_eval_mode(member):
                    logits = full_precision(member(batch.images).logits)
                total += F.cross_entropy(logits, batch.labels, ignore_index=-1, reduction="sum")
            sums.append(total)
        count = (batch.labels >= 0).sum().to(sums[0])
        *totals, count = all_sum(torch.stack([*sums, count]))
        means: Tensor = torch.stack(totals) / count.clamp(min=1)
        return means

    def choose_expert(self, batch: Batch) -> None:
        """Follow the loss of the current expert, and change to another one if it has jumped."""
        mixture, detector = self.mixture, self.detector
        [loss] = self.batch_losses(batch, [mixture.current])
        if not bool(detector.smooth(loss) > detector.thresholds()[mixture.current]):
            detector.append(mixture.current, loss)
            return
        losses = self.batch_losses(batch, range(mixture.used))
        thresholds = detector.thresholds()[: mixture.used]
        fits = losses <= thresholds
        fits[mixture.current] = False
        detector.restart()
        if bool(fits.any()):
            mixture.choose(int(losses.where(fits, torch.inf).argmin()))
        elif mixture.used < self.max_experts:
            mixture.choose(mixture.used)
        else:
            mixture.choose(int(losses.argmin()))

    def prepare_batch(self, batch: Batch) -> Batch:
        self.choose_expert(batch)
        self._drawn = self.replay(batch)
        selector = [self.selector] if self._drawn is not None else []
        self.train_parts(self.mixture.members[self.mixture.current], *selector)
        return batch

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        terms, drawn = {"ce": self.classification_loss(output, batch)}, self._drawn
        if drawn is not None:
            logits = self.selector(drawn.images)[:, : self.mixture.used]
            share = drawn.weight / batch.weight if batch.weight else 0.0
            terms["selector"] = share * cross_entropy(logits, drawn.extra["expert"])
        return {**terms, "ce": self.with_all_gradients(terms["ce"])}

    def offer(self, batch: Batch, **extra: Tensor) -> None:
        super().offer(batch, expert=torch.full_like(batch.labels, self.mixture.current), **extra)

    def predict(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        scores = self.mixture.scores_of(images)  # (experts in use, B, columns)
        chosen = self.selector(images)[:, : len(scores)].argmax(dim=1)
        return scores[chosen, torch.arange(len(images), device=chosen.device)]
