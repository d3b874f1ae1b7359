"""SLCA: Slow Learner with Classifier Alignment (Zhang et al., ICCV 2023, arXiv:2303.05118).

Phase ``train``, the slow learner: a pretrained backbone f and the head of the task learn the task, the backbone with a
learning rate that is a hundredth of the head's, by cross-entropy over the classes of the task. Older heads stay. Then
mean and covariance of the features of each new class are kept:

    mu_c = mean f(x),   Sigma_c = cov f(x) + jitter I      over its images, un-augmented, in eval mode

Phase ``align``, from the second task on: all heads learn from ``align_samples`` draws of each class seen so far in each
epoch, with logits divided by the mean n(z) of their norms over the tasks:

    f~ ~ N(m_c, Sigma_c),   m_c = mu_c (1 - shrink (1 - (t_c + 1) / (t + 1)))     t_c: task of class c, t: the newest
    L = CE(z / (n(z) tau), y),   n(z) = 1/(t + 1) sum_j || z of the classes of task j ||

shrink -> mean_shrink (0.1: means of the first task are multiplied by 0.9 + 0.1 / (t + 1)), tau -> align_temperature.
The aligned heads predict, by plain logits. The heads as they were before are put back when the next task begins.
Statistics of old classes are not corrected for the drift of the features. Where a class comes again, they are taken
anew, and its t_c is the task it came with last.
Departs from the code, whose float32 covariances can be singular: Sigma is factorised in float64, once per class.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from cl_lightning.backbones import ImageShape
from cl_lightning.batch import Batch
from cl_lightning.features import GaussianFeatures
from cl_lightning.heads import Head, LinearHead
from cl_lightning.losses import cross_entropy, full_precision
from cl_lightning.network import Output
from cl_lightning.prototypes import GaussianPrototypes
from cl_lightning.schedules import CosineOverPhase
from cl_lightning.strategy import ContinualStrategy, HeadFactory, Phase
from cl_lightning.stream import Task


def normalised_logits(logits: Tensor, sizes: Sequence[int], temperature: float = 0.1) -> Tensor:
    """``z / (n(z) tau)`` with n(z) the mean over tasks of the norm of a task's logits; the scale of z does not matter.

    Args:
        logits: z, ``(B, C)``.
        sizes: Number of columns of each task; their sum is C.
        temperature: tau, above 0.

    Returns:
        ``(B, C)``, float32 at least.
    """
    logits = full_precision(logits)
    norms = torch.stack([part.norm(dim=1) + 1e-7 for part in torch.split(logits, list(sizes), dim=1)])  # (tasks, B)
    return logits / (norms.mean(dim=0)[:, None] * temperature)


def mean_scales(tasks: Tensor, shrink: float = 0.1) -> Tensor:
    """Factor of each class mean, ``1 - shrink (1 - (t_c + 1) / (t + 1))``: less for older classes, 1 for the newest.

    Args:
        tasks: Which columns belong to which task, bool ``(tasks, C)``; of several the last one counts.
        shrink: In [0, 1].

    Returns:
        ``(C,)``, float32.
    """
    numbers = torch.arange(1, len(tasks) + 1, device=tasks.device)
    last = (tasks * numbers[:, None]).amax(dim=0)  # t_c + 1
    return 1 - shrink * (1 - last / len(tasks))


class SLCA(ContinualStrategy):
    """A backbone that learns slowly, and heads aligned on features drawn from normal distributions.

    Args:
        lr_factors: Of the learning rate; None for 0.01 for the backbone.
        align_epochs: Epochs of the phase ``align``; 0 to leave it out.
        align_samples: Draws of each class in an epoch, at least 1.
        align_batch_size: Of that phase, over all processes.
        align_temperature: tau, above 0.
        align_optimizer: Of that phase; None for SGD with learning rate 0.01, momentum 0.9 and weight decay 5e-4.
        align_scheduler: Of that phase; None for a cosine, where ``align_optimizer`` is None too.
        mean_shrink: How far the means of old classes are pulled to 0, in [0, 1].
        jitter: Variance that is added in each direction, above 0.
        head: Builds the head; None for ``LinearHead`` with rows that begin at a standard deviation of 0.02.
        kwargs: Of the base.
    """

    family: ClassVar[str] = "pretrained"
    paper: ClassVar[str] = "Zhang et al., ICCV 2023, arXiv:2303.05118"
    needs_pretrained: ClassVar[bool] = True

    def __init__(
        self,
        *,
        lr_factors: dict[str, float] | None = None,
        align_epochs: int = 5,
        align_samples: int = 256,
        align_batch_size: int = 256,
        align_temperature: float = 0.1,
        align_optimizer: OptimizerCallable | None = None,
        align_scheduler: LRSchedulerCallable | None = None,
        mean_shrink: float = 0.1,
        jitter: float = 1e-4,
        head: HeadFactory | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            head=head or functools.partial(LinearHead, init_std=0.02),
            lr_factors={"backbone.*": 0.01} if lr_factors is None else lr_factors,
            visible="current",
            **kwargs,
        )
        if align_epochs < 0 or min(align_samples, align_batch_size) < 1:
            raise ValueError(
                f"SLCA: align_epochs={align_epochs}, align_samples={align_samples}, align_batch_size="
                f"{align_batch_size}; at least 0, at least 1, at least 1"
            )
        if align_temperature <= 0 or not 0 <= mean_shrink <= 1:
            raise ValueError(
                f"SLCA: align_temperature={align_temperature}, mean_shrink={mean_shrink}; above 0, in [0, 1]"
            )
        GaussianPrototypes(1, jitter=jitter)  # so that a mistake is told now
        self.align_samples, self.align_temperature = align_samples, align_temperature
        self.mean_shrink, self.jitter = mean_shrink, jitter
        self.align_phase = Phase(
            "align",
            align_epochs,
            align_optimizer or functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=5e-4),
            align_scheduler or (None if align_optimizer is not None else CosineOverPhase),
            on_features=True,
            batch_size=align_batch_size,
        )
        self.gaussians: GaussianPrototypes
        self.unaligned_head: Head  # as the slow learner left it; empty before the first task ends

    @classmethod
    def conformance_options(cls) -> dict[str, Any]:
        return {"align_epochs": 2, "align_samples": 8, "align_batch_size": 24}

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        num_features = self.network.head.num_features
        self.gaussians = GaussianPrototypes(num_features, jitter=self.jitter)
        self.unaligned_head = self.build_head(num_features)

    def begin_task(self, task: Task) -> None:
        if self.unaligned_head.num_columns:
            self.network.head.load_state_dict(self.unaligned_head.state_dict())
        super().begin_task(task)

    def phases(self, task: Task) -> list[Phase]:
        return [Phase()] if task.is_first or not self.align_phase.epochs else [Phase(), self.align_phase]

    def trainable(self) -> Iterable[nn.Parameter]:
        return self.network.head.parameters() if self.phase.on_features else super().trainable()

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.phase.on_features:
            sizes = self.network.head.block_sizes()
            logits = normalised_logits(output.logits, sizes, self.align_temperature)
            return {"ce": cross_entropy(logits, batch.labels)}  # over all classes
        return {"ce": self.classification_loss(output, batch)}  # over those of the task

    def feature_pool(self) -> GaussianFeatures:
        return GaussianFeatures(self.gaussians, self.align_samples, mean_scales(self.task_columns, self.mean_shrink))

    def end_phase(self, phase: Phase) -> None:
        if phase.on_features or not self.align_phase.epochs:
            return
        self.eval()
        features, labels = self.features()
        self.train()
        self.gaussians.update(features, labels, num_classes=self.task.num_seen, replace=True)
        self.unaligned_head.load_state_dict(self.network.head.state_dict())

    def bytes_kept(self) -> dict[str, int]:
        heads = sum(value.nbytes for value in self.unaligned_head.state_dict().values())
        return {**super().bytes_kept(), "heads": heads}
