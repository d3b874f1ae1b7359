"""EFC++ (Magistri et al. 2025, arXiv:2503.10439): EFC with a rebalancing phase of the heads after each task.

With the terms of :class:`~cl_lightning.strategies.exemplar_free.efc.EFC` apart from L_PR:

    phase ``train``       L = L_cur(X) + L_EFM(X)              trains the backbone and the head of the task
    phase ``rebalance``   L = CE over all classes              trains all heads; the backbone is frozen

Between the phases the means of old classes are corrected for the drift of the features. Each epoch of the second phase
consists of the features of the task's images and of n_c pseudo-features f~ ~ N(p_c, Sigma_c) of each old class c, where
n_c is the number of samples that the class had.
Departs from the released code, which takes augmented images for the features of the task and for N(p_c, Sigma_c): here
both are of un-augmented images, as in ``EFC``, so that new and old classes are balanced on the same kind of features,
and one pass over the images serves all epochs.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from cl_lightning.batch import Draw
from cl_lightning.data import FeaturePool
from cl_lightning.losses import cross_entropy
from cl_lightning.memory import GaussianPrototypes
from cl_lightning.strategies.exemplar_free.efc import EFC
from cl_lightning.strategy import Batch, ContinualStrategy, Output, Phase, PhaseOptions, Task

_NOISE = 0xEFC3  # salt


class RebalancingFeatures(FeaturePool):
    """Features of the task, and n_c pseudo-features of each old class c, drawn again for each step.

    Args:
        features, labels: Features ``(n, d)`` and columns ``(n,)`` of the samples of the task.
        gaussians: Normal distributions of the classes, with their numbers of samples n_c.
    """

    def __init__(self, features: Tensor, labels: Tensor, gaussians: GaussianPrototypes) -> None:
        super().__init__(features, labels)
        self.gaussians = gaussians
        counts = gaussians.counts * (labels.bincount(minlength=len(gaussians))[: len(gaussians)] == 0)
        self.old = torch.arange(len(counts)).repeat_interleave(counts.cpu())

    def __len__(self) -> int:
        return len(self.labels) + len(self.old)

    def take(self, rows: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        size, device = len(self.labels), self.labels.device
        real = rows < size  # on the CPU, without a synchronisation
        own, old = rows[real].to(device), self.old[rows[~real] - size]
        noise = draw.fork(_NOISE).randn(self.features.shape[1], device=device)[(~real).nonzero().squeeze(1).to(device)]
        features = torch.cat([self.features[own], self.gaussians.sample(old, noise)])
        return features, torch.cat([self.labels[own], old.to(device)])


class EFCpp(EFC):
    """EFC without pseudo-features while the backbone is trained, and with a rebalancing phase of the heads afterwards.

    Args:
        rebalance_options: Options of the phase ``rebalance``; it is skipped with 0 epochs. The default optimizer is SGD
            with learning rate 1e-3, momentum 0.9 and weight decay 5e-4.
        kwargs: Options of ``EFC``.
    """

    traits = EFC.traits.but(paper="Magistri et al. 2025, arXiv:2503.10439", uses_old_logits=False)

    def __init__(
        self,
        *,
        rebalance_options: PhaseOptions = PhaseOptions(epochs=50, batch_size=256),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._measured: tuple[Tensor, Tensor] | None = None
        sgd = functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9, weight_decay=5e-4)
        self.rebalance_options = rebalance_options.filled(sgd)

    def phases(self, task: Task) -> list[Phase]:
        if task.is_first or self.rebalance_options.epochs == 0:
            return [Phase()]
        head = self.network.head
        return [
            Phase(),
            Phase("rebalance", self.rebalance_options, trains=head.parameters, features=self.rebalancing_features),
        ]

    def prepare_batch(self, batch: Batch) -> Batch:
        return super().prepare_batch(batch) if self.task.is_first else batch

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.phase.features is not None:
            return {"ce": cross_entropy(output.logits, batch.labels)}  # over all classes
        return super().losses(batch, output)

    def rebalancing_features(self) -> RebalancingFeatures:
        return RebalancingFeatures(*self.passes.all_features(), self.gaussians)  # un-augmented, like the Gaussians

    def end_phase(self, phase: Phase) -> None:
        if self.teacher and phase.features is None:  # the rebalancing phase needs corrected means
            self.eval()
            self._measured = self.passes.features()
            self.follow_drift(self._measured[0])
            self.train()

    def end_task(self, task: Task) -> None:
        ContinualStrategy.end_task(self, task)
        measured, self._measured = self._measured, None  # the backbone is unchanged since; None in a resumed run
        self.remember(*(self.passes.features() if measured is None else measured))
