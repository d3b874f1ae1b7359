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

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.checks import above, at_least
from cl_lightning.distributed import all_sum
from cl_lightning.memory import Importance
from cl_lightning.strategies.test_time.base import TestTimeAdaptation, Trained
from cl_lightning.strategies.test_time.parts.filters import DiversityFilter, EntropyFilter, SampleFilter
from cl_lightning.strategies.test_time.tent import Tent
from cl_lightning.strategy import Batch, Output, Task


class EATA(Tent):
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
        filters: Further filters, see ``TestTimeAdaptation``.
        kwargs: Options of ``Tent``.
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
        params: Literal["norm", "early_norm", "all"] | list[str] = "norm",
        filters: list[SampleFilter] | None = None,
        **kwargs: Any,
    ) -> None:
        above(self, 0, margin=margin, diversity=diversity)
        chosen: Trained = params
        reliable = [EntropyFilter(margin, weighted=True), DiversityFilter(diversity), *(filters or ())]
        super().__init__(params=chosen, filters=reliable, **kwargs)
        at_least(self, 0, fisher_weight=fisher_weight)
        at_least(self, 1, fisher_samples=fisher_samples, fisher_batch_size=fisher_batch_size)
        self.fisher_weight = fisher_weight
        self.fisher_samples, self.fisher_batch_size = fisher_samples, fisher_batch_size
        self.importance = Importance()

    def adapt(self, batch: Batch, output: Output) -> tuple[Tensor, dict[str, Tensor]]:
        scores, terms = super().adapt(batch, output)
        if self.importance:
            terms["fisher"] = self.fisher_weight * self.importance.penalty(self.trained_parameters())
        return scores, terms

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
        for value in parameters.values():
            value.requires_grad_(True)
        with self.stream_statistics():
            for batch in self.passes.batches(samples=self.fisher_samples, batch_size=self.fisher_batch_size):
                logits = self.network(batch.images).logits[:, : self.num_source].float()
                loss = F.cross_entropy(logits, logits.argmax(dim=1), reduction="sum") / batch.draw.total
                gradients = torch.autograd.grad(loss, list(parameters.values()))
                for total, gradient in zip(squares.values(), gradients, strict=True):
                    total += all_sum(gradient).square()
                count += 1
        for value, before in zip(parameters.values(), wanted, strict=True):
            value.requires_grad_(before)
        return {name: (total / max(count, 1)).detach() for name, total in squares.items()}
