"""EATA, efficient test-time adaptation without forgetting (Niu et al., ICML 2022, arXiv:2204.02610).

``Tent`` on reliable and diverse samples, with a penalty on changes of parameters that are important for the source.
A sample with prediction p_i and entropy H_i is selected if

    H_i < E_0 = margin ln C   and   |cos(p_i, m)| < eps,   m <- 0.9 m + 0.1 mean of the selected p_i

m is initialised with the first such mean; before that the second condition does not apply. With K selected samples

    L = 1/K sum_selected exp(E_0 - H_i) H_i + beta sum_j F_j (theta_j - theta_0j)^2

over the scales and shifts theta of the normalisation layers; no gradient passes through the weight exp(E_0 - H_i). If
no sample is selected, no step is taken; this check synchronises with the device at each step. theta_0 are the source
values. F is the Fisher information of theta_0 for the labels y^ that the network predicts, measured once when the
source domain ends,

    F = 1/n sum_b (d/dtheta mean_{i in b} CE(f(x_i), y^_i))^2    over n batches b of source images

with squares of batch means, as in the authors' code. eps -> diversity, beta -> fisher_weight; beta = 0 is ETA.
Departs from the code, where the network is in train mode: here it is in eval mode, without dropout.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.checks import above, at_least
from cl_lightning.distributed import all_sum, world_size
from cl_lightning.losses import entropy, full_precision
from cl_lightning.memory import Importance, restore_shapes
from cl_lightning.models import set_statistics
from cl_lightning.strategies.test_time.base import TestTimeAdaptation, Trained
from cl_lightning.strategy import Batch, Output, Task


def kept_samples(logits: Tensor, mean: Tensor, *, most_entropy: float, diversity: float) -> Tensor:
    """Select reliable and diverse samples: low entropy, and a prediction that differs from the mean prediction so far.

    Args:
        logits: ``(B, C)``.
        mean: m, ``(C,)``; zeros before the first selection, where the second condition holds for all samples.
        most_entropy: E_0 in nats; samples with an entropy of E_0 or more are not selected.
        diversity: eps, above 0.

    Returns:
        bool ``(B,)``.
    """
    p = full_precision(logits).softmax(dim=1)
    return (entropy(logits) < most_entropy) & (F.cosine_similarity(p, mean[None], dim=1).abs() < diversity)


def weighted_entropy(logits: Tensor, kept: Tensor, *, most_entropy: float) -> Tensor:
    """``sum_kept exp(E_0 - H_i) H_i``, a scalar; no gradient passes through the weights. Weights are 1 if E_0 = inf."""
    values = entropy(logits)
    weights = (most_entropy - values.detach()).exp() if math.isfinite(most_entropy) else torch.ones_like(values)
    return (weights * values).where(kept, 0.0).sum()


class EATA(TestTimeAdaptation):
    """Entropy minimisation on reliable and diverse samples, with a Fisher-weighted penalty on changes of parameters.

    Args:
        margin: Threshold of the entropy as a share of its largest value ln C, above 0; ``inf`` for no threshold and no
            weights.
        diversity: eps, above 0: 0.4 and 0.1 for CIFAR-10 and CIFAR-100 in benchmarks, 0.05 in the paper for ImageNet;
            above 1 every sample fulfils the condition.
        fisher_weight: beta, at least 0: 1 in benchmarks for CIFAR, 2,000 in the paper for ImageNet.
        fisher_samples: Number of source images for the Fisher information, at least 1.
        fisher_batch_size: Number of images per batch b of the Fisher information, at least 1: 200 in benchmarks for
            CIFAR, 64 in the paper. beta belongs to it: where gradients of images are mostly noise, F is inversely
            proportional to it.
        params: Parameters that are trained, see ``TestTimeAdaptation``.
        kwargs: Options of ``TestTimeAdaptation``.
    """

    traits = TestTimeAdaptation.traits.but(
        family="test-time", paper="Niu et al., ICML 2022, arXiv:2204.02610", transductive=True
    )

    def __init__(
        self,
        *,
        margin: float = 0.4,
        diversity: float = 0.4,
        fisher_weight: float = 1.0,
        fisher_samples: int = 2000,
        fisher_batch_size: int = 200,
        params: Literal["norm", "all"] | list[str] = "norm",
        **kwargs: Any,
    ) -> None:
        chosen: Trained = params
        super().__init__(params=chosen, **kwargs)
        above(self, 0, margin=margin, diversity=diversity)
        at_least(self, 0, fisher_weight=fisher_weight)
        at_least(self, 1, fisher_samples=fisher_samples, fisher_batch_size=fisher_batch_size)
        self.margin, self.diversity, self.fisher_weight = margin, diversity, fisher_weight
        self.fisher_samples, self.fisher_batch_size = fisher_samples, fisher_batch_size
        self.importance = Importance()
        self.register_buffer("mean", torch.zeros(0))  # m, (classes of the source,)
        self.mean: Tensor
        self._kept_in_step: Tensor | None = None

    def adapt(self, batch: Batch, output: Output) -> tuple[Tensor, dict[str, Tensor]]:
        logits, most = output.logits, self.margin * math.log(self.num_source)
        kept = kept_samples(logits.detach(), self.mean, most_entropy=most, diversity=self.diversity)
        p = full_precision(logits.detach()).softmax(dim=1)
        sums = all_sum(torch.cat([(p * kept[:, None]).sum(dim=0), kept.sum()[None]]))  # over all processes
        count = sums[-1]
        self._update_mean(sums[:-1] / count.clamp(min=1), count > 0)
        self._kept_in_step = count if self._kept_in_step is None else self._kept_in_step + count
        # The base class weights the terms of a process by its share of the batch. Undo that: the mean is over the
        # selected samples of all processes.
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
        if count is not None and not bool(count):  # momentum would change the parameters even for a gradient of 0
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
        """F by name of the parameter; the same on every process."""
        squares = {name: torch.zeros_like(value) for name, value in parameters.items()}
        wanted, count = [value.requires_grad for value in parameters.values()], 0
        set_statistics(self.network, self.norm_statistics)
        for value in parameters.values():
            value.requires_grad_(True)
        for batch in self.passes.batches(samples=self.fisher_samples, batch_size=self.fisher_batch_size):
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
        restore_shapes(self, state_dict, prefix, ("mean",))
        super()._load_from_state_dict(state_dict, prefix, *args)
