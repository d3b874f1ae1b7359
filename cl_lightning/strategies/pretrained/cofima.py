"""CoFiMA and CoMA: continual Fisher-weighted model averaging (Marouf et al., ECCV 2024, arXiv:2312.08977).

Each task is trained as in SLCA: a slow learner, then an alignment of the classifier. Between the two, from the second
task on, the network is averaged with the network before the task, elementwise over all weights that both have:

    theta = [ (1 - lambda) F_0 theta_0 + lambda F_1 theta_1 ] / [ (1 - lambda) F_0 + lambda F_1 ]
    F_k = min( mean_i (d CE(f(x_i; theta_k), y_i) / d theta)^2, fisher_max )     over the images of a task

theta_0 is the averaged and aligned network after the previous task, theta_1 the network that the task has trained. F_1
is computed at theta_1 on the images of the task, F_0 is F_1 of the previous task; the cross-entropy is over all classes
so far. CoMA has F_0 = F_1 = 1. lambda -> new_share. ``importance`` chooses F: ``fisher`` as above, ``equal`` for CoMA,
and ``batch`` for the released code, which squares the gradient of the mean loss of a batch, so that F is smaller by
about the batch size and fewer entries reach ``fisher_max``. Rows of new classes keep their trained values (the code
multiplies them by F). Where both F are 0, the plain average is taken. The class statistics and the alignment use the
averaged network. When the next task begins, its backbone is the averaged one, and the heads are reset to their trained
values before the averaging.
Departs from the code, which computes F in train mode: here the network is in eval mode. The running statistics of batch
normalisation are computed again for the averaged weights, on the images of the task.
"""

import math
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from cl_lightning.batch import Batch
from cl_lightning.checks import above, at_least, one_of, within
from cl_lightning.losses import cross_entropy
from cl_lightning.memory import WeightSets, fisher_average, fisher_diagonal, write_weights
from cl_lightning.models import in_eval_mode
from cl_lightning.strategies.base import mean_gradient, output_at
from cl_lightning.strategies.pretrained.slca import SLCA
from cl_lightning.strategy import Phase, Task, Traits

ImportanceKind = Literal["fisher", "batch", "equal"]


def squared_mean_gradients(network: nn.Module, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Mean over batches of the squared gradient of the mean cross-entropy of a batch, by parameter name.

    Args:
        network: Its logits are over all classes so far; not wrapped for distributed training. In eval mode here.
        batches: This process's share of each batch; the gradients are of the batches over all processes.
    """
    values = {name: value.detach().requires_grad_() for name, value in network.named_parameters()}
    total, count = {name: torch.zeros_like(value) for name, value in values.items()}, 0
    with in_eval_mode(network), torch.enable_grad():
        for batch in batches:
            logits = output_at(network, values, batch.images).logits if len(batch) else None
            loss = None if logits is None else cross_entropy(logits, batch.labels)
            for name, gradient in mean_gradient(loss, values, batch.weight).items():
                total[name] += gradient.square()
            count += 1
    return {name: value / max(count, 1) for name, value in total.items()}


class CoFiMA(SLCA):
    """SLCA, and after the training of each task an average with the network before the task, weighted by Fisher.

    Args:
        new_share: lambda, share of the trained network, in [0, 1].
        importance: F: ``fisher``, ``batch`` (squared gradients of batches) or ``equal`` (CoMA).
        fisher_max: Largest value of an F, above 0; None for no limit.
        fisher_samples: Number of images of a task for F, at least 1; None for all.
        kwargs: Options of ``SLCA`` and of the base class.

    Attributes:
        weights: The sets ``before`` (theta_0, while a task is trained) and ``fisher`` (F_0).
    """

    traits = Traits(family="pretrained", paper="Marouf et al., ECCV 2024, arXiv:2312.08977", needs_pretrained=True)

    def __init__(
        self,
        *,
        new_share: float = 0.4,
        importance: ImportanceKind = "fisher",
        fisher_max: float | None = 1e-4,
        fisher_samples: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        within(self, "[0, 1]", new_share=new_share)
        one_of(self, get_args(ImportanceKind), importance=importance)
        above(self, 0, fisher_max=fisher_max, optional=True)
        at_least(self, 1, fisher_samples=fisher_samples, optional=True)
        self.new_share, self.importance = new_share, importance
        self.fisher_max, self.fisher_samples = fisher_max, fisher_samples
        self.weights = WeightSets()

    def begin_task(self, task: Task) -> None:
        if not task.is_first:
            self.weights.keep("before", dict(self.network.named_parameters()))
        super().begin_task(task)

    def end_phase(self, phase: Phase) -> None:
        if phase.features is not None:
            super().end_phase(phase)
            return
        trained_head = {name: value.clone() for name, value in self.network.head.state_dict().items()}
        fisher = {} if self.importance == "equal" else self._fisher()
        if not self.task.is_first:
            self._average(fisher)
        super().end_phase(phase)
        self.unaligned_head.load_state_dict(trained_head)
        self.weights.keep("fisher", fisher)

    def _fisher(self) -> dict[str, Tensor]:
        """F of the present network on the images of the task, by parameter name."""
        size = self.data.module.batch_size if self.importance == "batch" else None
        batches = self.passes.batches(samples=self.fisher_samples, batch_size=size)
        if self.importance == "batch":
            found = squared_mean_gradients(self.network, batches)
        else:
            parameters = dict(self.network.named_parameters())
            found = fisher_diagonal(self.network, parameters, batches, labels="empirical")
        limit = math.inf if self.fisher_max is None else self.fisher_max
        return {name: value.clamp(max=limit) for name, value in found.items()}

    def _average(self, fisher: dict[str, Tensor]) -> None:
        before, trained = self.weights["before"], dict(self.network.named_parameters())
        importances = [self.weights["fisher"], fisher]
        if self.importance == "equal" or "fisher" not in self.weights:  # resumed after tasks of CoMA
            importances = [{name: torch.ones_like(value) for name, value in before.items()}] * 2
        merged = fisher_average([before, trained], importances, [1 - self.new_share, self.new_share])
        write_weights(self.network, merged)
        self.weights.drop("before")
        if not self.freeze_backbone:
            self.passes.refit_norms(self._frozen_norms())
