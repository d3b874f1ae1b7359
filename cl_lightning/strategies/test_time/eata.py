"""EATA, efficient test-time adaptation without forgetting (Niu et al., ICML 2022, arXiv:2204.02610).

``Tent`` that learns from reliable samples which differ from what came before, and holds what mattered for the source.
Of a batch with predictions p_i and entropies H_i those are kept that have

    H_i < E_0 = margin ln C   and   |cos(p_i, m)| < eps,   m <- 0.9 m + 0.1 mean of the kept p_i

(m begins as the first such mean, which the second condition does not bear on), and with K of them

    L = 1/K sum_kept exp(E_0 - H_i) H_i + beta sum_j F_j (theta_j - theta_0j)^2

over the scales and shifts theta of the normalisation layers; the weight exp(E_0 - H_i) takes no gradient. Where none is
kept, no step is taken, for which the loss of each step is waited for. theta_0 are the source's values, and F is their
Fisher information by the network's own labels y^, measured once when the source domain ends,

    F = 1/n sum_b (d/dtheta mean_{i in b} CE(f(x_i), y^_i))^2    over n batches b of images of the source

with squares of the means of batches, as in the authors' code. eps -> diversity, beta -> fisher_weight; 0 for ETA.
Departs from that code, which has the network in train mode: dropout and the like are off.
"""

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import Batch
from cl_lightning.distributed import all_sum, world_size
from cl_lightning.importance import Importance
from cl_lightning.losses import entropy, full_precision
from cl_lightning.network import Output
from cl_lightning.normalization import set_statistics
from cl_lightning.strategies.test_time.base import TestTimeAdaptation, Trained, tiny_resnet
from cl_lightning.stream import Task


def kept_samples(logits: Tensor, mean: Tensor, *, most_entropy: float, diversity: float) -> Tensor:
    """Which samples are learnt from: of low entropy, and unlike the mean prediction so far.

    Args:
        logits: ``(B, C)``.
        mean: m, ``(C,)``; zeros before the first, where all pass.
        most_entropy: E_0 in nats; what is not below is left out.
        diversity: eps, above 0.

    Returns:
        bool ``(B,)``.
    """
    p = full_precision(logits).softmax(dim=1)
    return (entropy(logits) < most_entropy) & (F.cosine_similarity(p, mean[None], dim=1).abs() < diversity)


def weighted_entropy(logits: Tensor, kept: Tensor, *, most_entropy: float) -> Tensor:
    """``sum_kept exp(E_0 - H_i) H_i``, a scalar; the weights take no gradient."""
    values = entropy(logits)
    weights = (most_entropy - values.detach()).exp() if math.isfinite(most_entropy) else torch.ones_like(values)
    return (weights * values).where(kept, 0.0).sum()


class EATA(TestTimeAdaptation):
    """Entropy of reliable and diverse samples, minimised near the source in directions that it depends on.

    Args:
        margin: Of the entropy, as a share of its largest value ln C; ``inf`` for no bound and no weights.
        diversity: eps, above 0: 0.4 and 0.1 for CIFAR-10 and CIFAR-100 in benchmarks, 0.05 in the paper for ImageNet;
            above 1 all pass.
        fisher_weight: beta, at least 0: 1 in benchmarks for CIFAR, 2,000 in the paper for ImageNet.
        fisher_samples: Images of the source domain that the Fisher information is measured on.
        fisher_batch_size: How many of them at a time.
        trained: See the base.
        kwargs: Of ``TestTimeAdaptation``.
    """

    family: ClassVar[str] = "test-time"
    paper: ClassVar[str] = "Niu et al., ICML 2022, arXiv:2204.02610"
    uses_test_batch = True

    def __init__(
        self,
        *,
        margin: float = 0.4,
        diversity: float = 0.4,
        fisher_weight: float = 1.0,
        fisher_samples: int = 2000,
        fisher_batch_size: int = 64,
        trained: Literal["norm", "all"] | list[str] = "norm",
        **kwargs: Any,
    ) -> None:
        chosen: Trained = trained
        super().__init__(trained=chosen, **kwargs)
        if not margin > 0 or not diversity > 0 or not fisher_weight >= 0:
            raise ValueError(
                f"EATA: margin={margin}, diversity={diversity}, fisher_weight={fisher_weight}; the first two are above "
                "0, the last is at least 0"
            )
        if min(fisher_samples, fisher_batch_size) < 1:
            raise ValueError(
                f"EATA: fisher_samples={fisher_samples}, fisher_batch_size={fisher_batch_size}; at least 1 each"
            )
        self.margin, self.diversity, self.fisher_weight = margin, diversity, fisher_weight
        self.fisher_samples, self.fisher_batch_size = fisher_samples, fisher_batch_size
        self.importance = Importance()
        self.register_buffer("mean", torch.zeros(0))  # m, (classes of the source,)
        self.mean: Tensor
        self._kept_in_step: Tensor | None = None

    @classmethod
    def conformance_options(cls) -> dict[str, Any]:
        return {"backbone": tiny_resnet, "margin": 0.8, "diversity": 0.9, "fisher_weight": 1.0}

    def adapt(self, batch: Batch, output: Output) -> tuple[Tensor, dict[str, Tensor]]:
        logits, most = output.logits, self.margin * math.log(self.num_source)
        kept = kept_samples(logits.detach(), self.mean, most_entropy=most, diversity=self.diversity)
        p = full_precision(logits.detach()).softmax(dim=1)
        sums = all_sum(torch.cat([(p * kept[:, None]).sum(dim=0), kept.sum()[None]]))  # of all processes
        count = sums[-1]
        self._update_mean(sums[:-1] / count.clamp(min=1), count > 0)
        self._kept_in_step = count if self._kept_in_step is None else self._kept_in_step + count
        # The base weighs the terms of a process by its share of the batch; here its share of the kept samples counts.
        share = world_size() / batch.weight if batch.weight else 0.0
        terms = {"entropy": share * weighted_entropy(logits, kept, most_entropy=most) / count.clamp(min=1)}
        if self.importance:
            terms["fisher"] = self.fisher_weight * self.importance.penalty(self.trained_parameters()) * (count > 0)
        return logits, terms

    @torch.no_grad()
    def _update_mean(self, mean: Tensor, any_kept: Tensor) -> None:
        follows = torch.where(self.mean.sum() == 0, mean, 0.9 * self.mean + 0.1 * mean)
        self.mean.copy_(torch.where(any_kept, follows, self.mean))

    def edit_gradients(self, batch: Batch) -> None:
        count, self._kept_in_step = self._kept_in_step, None
        if count is not None and not bool(count):  # momentum would move the parameters without a gradient
            for parameter in self.trained_parameters().values():
                parameter.grad = None

    def bytes_kept(self) -> dict[str, int]:
        return {**super().bytes_kept(), "statistics": self.mean.nbytes}

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if task.is_first:
            self.mean = torch.zeros(self.num_source)

    def reset(self) -> None:
        super().reset()
        self.mean = torch.zeros_like(self.mean)

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        if task.is_first and self.fisher_weight:
            parameters = self.trained_parameters()
            self.importance.add(parameters, self._fisher(parameters))

    @torch.enable_grad()
    def _fisher(self, parameters: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
        """F by name, the same on every process."""
        squares = {name: torch.zeros_like(value) for name, value in parameters.items()}
        wanted, count = [value.requires_grad for value in parameters.values()], 0
        set_statistics(self.network, self.norm_statistics)
        for value in parameters.values():
            value.requires_grad_(True)
        for batch in self.statistics_batches(samples=self.fisher_samples, batch_size=self.fisher_batch_size):
            logits = self.network(batch.images).logits[:, : self.num_source].float()
            loss = F.cross_entropy(logits, logits.argmax(dim=1), reduction="sum") / batch.draw.total
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            for total, gradient in zip(squares.values(), gradients, strict=True):
                total += all_sum(gradient).square()
            count += 1
        for value, before in zip(parameters.values(), wanted, strict=True):
            value.requires_grad_(before)
        self._choose_statistics()
        return {name: (total / max(count, 1)).detach() for name, total in squares.items()}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if (saved := state_dict.get(f"{prefix}mean")) is not None:
            self.mean = torch.zeros_like(saved, device=self.mean.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
