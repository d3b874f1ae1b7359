"""EFC++ (Magistri et al. 2025, arXiv:2503.10439): EFC whose heads are balanced after the backbone has learnt.

With the terms of :class:`~cl_lightning.strategies.exemplar_free.efc.EFC`, whose L_PR is missing,

    phase ``train``       L = L_cur(X) + L_EFM(X)              the backbone and the head of the task; old heads stay
    phase ``rebalance``   L = CE over all classes              all heads; the backbone is frozen

Between them the means of old classes follow the features. The second phase goes, in each epoch, through the features of
the task's images, newly augmented, and n_c draws f~ ~ N(p_c, Sigma_c) of each old class c, which had n_c samples.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from cl_lightning.batch import Batch, Draw, mix
from cl_lightning.features import FeaturePool
from cl_lightning.losses import cross_entropy
from cl_lightning.network import Output
from cl_lightning.prototypes import GaussianPrototypes
from cl_lightning.strategies.exemplar_free.efc import EFC
from cl_lightning.strategy import ContinualStrategy, Phase
from cl_lightning.stream import Task

_NOISE, _VIEWS = 0xEFC3, 0xEFC4  # salts


class RebalancingFeatures(FeaturePool):
    """The task's features, augmented anew in each epoch, and as many draws of each old class as it had samples."""

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
        real = rows < size  # on the CPU, so that nothing waits for the device
        own, old = rows[real].to(device), self.old[rows[~real] - size]
        noise = draw.fork(_NOISE).randn(self.features.shape[1], device=device)[(~real).nonzero().squeeze(1).to(device)]
        features = torch.cat([self.features[own], self.gaussians.sample(old, noise)])
        return features, torch.cat([self.labels[own], old.to(device)])


class EFCpp(EFC):
    """EFC without imitated classes while the backbone learns, and heads balanced afterwards.

    Args:
        rebalance_epochs: Epochs of the phase ``rebalance``; 0 to leave it out.
        rebalance_batch_size: Of that phase, over all processes.
        rebalance_optimizer: Of that phase; None for SGD with learning rate 1e-3, momentum 0.9 and weight decay 5e-4.
        rebalance_scheduler: Of that phase; None for a constant learning rate.
        kwargs: Of EFC.
    """

    paper: ClassVar[str] = "Magistri et al. 2025, arXiv:2503.10439"
    uses_old_logits = False

    def __init__(
        self,
        *,
        rebalance_epochs: int = 50,
        rebalance_batch_size: int = 256,
        rebalance_optimizer: OptimizerCallable | None = None,
        rebalance_scheduler: LRSchedulerCallable | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if rebalance_epochs < 0 or rebalance_batch_size < 1:
            raise ValueError(
                f"EFCpp: rebalance_epochs={rebalance_epochs}, rebalance_batch_size={rebalance_batch_size}; at least 0 "
                "and at least 1"
            )
        self._measured: tuple[Tensor, Tensor] | None = None
        self.rebalance_phase = Phase(
            "rebalance",
            rebalance_epochs,
            rebalance_optimizer or functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9, weight_decay=5e-4),
            rebalance_scheduler,
            on_features=True,
            batch_size=rebalance_batch_size,
        )

    @classmethod
    def conformance_options(cls) -> dict[str, Any]:
        return {"rebalance_epochs": 2}

    def phases(self, task: Task) -> list[Phase]:
        return [Phase(), *([self.rebalance_phase] if self.rebalance_phase.epochs and not task.is_first else [])]

    def trainable(self) -> Iterable[nn.Parameter]:
        return self.network.head.parameters() if self.phase.on_features else super().trainable()

    def prepare(self, batch: Batch) -> Batch:
        return super().prepare(batch) if self.task.is_first else batch

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.phase.on_features:
            return {"ce": cross_entropy(output.logits, batch.labels)}  # over all classes
        return super().losses(batch, output)

    def feature_pool(self) -> RebalancingFeatures:
        def views(epoch: int) -> tuple[Tensor, Tensor]:
            return self.all_features(augment=mix(self.seed, _VIEWS, self.task.index, epoch))

        if self.images_are_augmented:
            return RebalancingFeatures(self.gaussians, views, self.epoch)
        same = self.all_features()  # one pass for all epochs
        return RebalancingFeatures(self.gaussians, lambda epoch: same, self.epoch)

    def end_phase(self, phase: Phase) -> None:
        if self.teacher and not phase.on_features:  # the heads are balanced with distributions that are where they must
            self.eval()
            self._measured = self.features()
            self.follow_drift(self._measured[0])
            self.train()

    def end_task(self, task: Task) -> None:
        ContinualStrategy.end_task(self, task)
        measured, self._measured = self._measured, None  # of a backbone that has not moved since; None after a resume
        self.remember(*(self.features() if measured is None else measured))
