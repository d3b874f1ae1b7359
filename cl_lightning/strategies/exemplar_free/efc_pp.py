"""EFC++ (Magistri et al. 2025, arXiv:2503.10439): EFC with a rebalancing phase of the heads after each task.

With the terms of :class:`~cl_lightning.strategies.exemplar_free.efc.EFC` apart from L_PR:

    phase ``train``       L = L_cur(X) + L_EFM(X)              trains the backbone and the head of the task
    phase ``rebalance``   L = CE over all classes              trains all heads; the backbone is frozen

Between the phases the means of old classes are corrected for the drift of the features. Each epoch of the second phase
consists of the features of the task's images, with a new augmentation, and of n_c pseudo-features f~ ~ N(p_c, Sigma_c)
of each old class c, where n_c is the number of samples that the class had.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cl_lightning.batch import Draw, mix
from cl_lightning.data import FeaturePool
from cl_lightning.losses import cross_entropy
from cl_lightning.memory import GaussianPrototypes
from cl_lightning.strategies.exemplar_free.efc import EFC
from cl_lightning.strategy import Batch, ContinualStrategy, Output, Phase, PhaseOptions, Task

_NOISE, _VIEWS = 0xEFC3, 0xEFC4  # salts


class RebalancingFeatures(FeaturePool):
    """Features of the task, with a new augmentation in each epoch, and n_c pseudo-features of each old class c.

    Args:
        gaussians: Normal distributions of the classes, with their numbers of samples n_c.
        views: Returns features ``(n, d)`` and columns ``(n,)`` of the augmented images of an epoch.
        epoch: Epoch whose features are computed first.
    """

    def __init__(
        self, gaussians: GaussianPrototypes, views: Callable[[int], tuple[Tensor, Tensor]], epoch: int
    ) -> None:
        super().__init__(*views(epoch))
        self.gaussians, self.views, self.epoch = gaussians, views, epoch
        counts = gaussians.counts * (self.labels.bincount(minlength=len(gaussians))[: len(gaussians)] == 0)
        self.old = torch.arange(len(counts)).repeat_interleave(counts.cpu())

    def __len__(self) -> int:
        return len(self.labels) + len(self.old)

    def begin_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            (self.features, self.labels), self.epoch = self.views(epoch), epoch

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
        def views(epoch: int) -> tuple[Tensor, Tensor]:
            return self.passes.all_features(augment=mix(self.seed, _VIEWS, self.task.index, epoch))

        if self.data.is_augmented:
            return RebalancingFeatures(self.gaussians, views, self.epoch)
        same = self.passes.all_features()  # one pass for all epochs
        return RebalancingFeatures(self.gaussians, lambda epoch: same, self.epoch)

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
