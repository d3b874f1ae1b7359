"""SLCA: Slow Learner with Classifier Alignment (Zhang et al., ICCV 2023, arXiv:2303.05118).

Phase ``train``, the slow learner: cross-entropy over the classes of the task trains a pretrained backbone f and the
head of the task; the learning rate of the backbone is 0.01 times the learning rate of the head. Heads of earlier
tasks do not change. Then mean and covariance of the features of each new class are stored:

    mu_c = mean f(x),   Sigma_c = cov f(x) + jitter I      over its images, un-augmented, in eval mode

Phase ``align``, from the second task on: all heads are trained on features drawn for all classes seen so far,
``align_samples`` per class and epoch, with logits divided by the mean n(z) of their norms over the tasks:

    f~ ~ N(m_c, Sigma_c),   m_c = mu_c (1 - shrink (1 - (t_c + 1) / (t + 1)))     t_c: task of class c, t: the newest
    L = CE(z / (n(z) tau), y),   n(z) = 1/(t + 1) sum_j || z of the classes of task j ||

shrink -> mean_shrink (0.1: means of the first task are multiplied by 0.9 + 0.1 / (t + 1)), tau -> align_temperature.
The aligned heads predict, by z without normalisation. When the next task begins, the heads are reset to their state
before the alignment. Statistics of old classes are not corrected for the drift of the features. If a class recurs, its
statistics are computed again, and t_c is the last task that contains it.
The released code discards the last LayerNorm of the pretrained transformer, and trains a fresh one at the learning rate
of the backbone: ``fresh_norm``. By default the pretrained one is kept.
Departs from the code, whose float32 covariances can be singular: Sigma is factorised in float64, once per class.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cl_lightning.batch import ImageShape
from cl_lightning.checks import above, within
from cl_lightning.data import GaussianFeatures
from cl_lightning.losses import cross_entropy, full_precision
from cl_lightning.models import Head, LinearHead
from cl_lightning.strategies.base.schedules import CosineOverPhase
from cl_lightning.strategies.pretrained.alignment import AlignedClassifier, last_tasks
from cl_lightning.strategy import Batch, HeadFactory, Output, PhaseOptions, Task, Traits


def normalised_logits(logits: Tensor, sizes: Sequence[int], temperature: float = 0.1) -> Tensor:
    """``z / (n(z) tau)`` with n(z) the mean over tasks of the norm of a task's logits; independent of the scale of z.

    Args:
        logits: z, ``(B, C)``.
        sizes: Number of columns of each task; their sum is C.
        temperature: tau, above 0.

    Returns:
        ``(B, C)``, in float32 or float64.
    """
    logits = full_precision(logits)
    norms = torch.stack([part.norm(dim=1) + 1e-7 for part in torch.split(logits, list(sizes), dim=1)])  # (tasks, B)
    return logits / (norms.mean(dim=0)[:, None] * temperature)


def mean_scales(tasks: Tensor, shrink: float = 0.1) -> Tensor:
    """Factor of each class mean, ``1 - shrink (1 - (t_c + 1) / (t + 1))``: smaller for older classes, 1 for the newest.

    Args:
        tasks: Whether a task contains the class of a column, bool ``(tasks, C)``; t_c is the last such task.
        shrink: In [0, 1].

    Returns:
        ``(C,)``, float32.
    """
    return 1 - shrink * (1 - (last_tasks(tasks) + 1) / len(tasks))


class SLCA(AlignedClassifier):
    """A small learning rate for the backbone, and classifier alignment on features drawn from class-wise Gaussians.

    Args:
        lr_factors: Factors of the learning rate by patterns of names; None for 0.01 for the backbone.
        align_options: Options of the phase ``align``; 0 epochs to leave it out. The default optimizer is SGD with
            learning rate 0.01, momentum 0.9 and weight decay 5e-4, with a cosine schedule.
        align_samples: Number of features drawn per class and epoch, at least 1.
        align_temperature: tau, above 0.
        mean_shrink: shrink, in [0, 1]; 0 leaves the means unchanged.
        jitter: Variance that is added in each direction, above 0.
        fresh_norm: Whether the last LayerNorm of the backbone is reset to weights 1, biases 0 and PyTorch's eps.
        head: Builds the head; None for ``LinearHead`` with initial rows of standard deviation 0.02.
        kwargs: Options of the base class.
    """

    traits = Traits(family="pretrained", paper="Zhang et al., ICCV 2023, arXiv:2303.05118", needs_pretrained=True)

    def __init__(
        self,
        *,
        lr_factors: dict[str, float] | None = None,
        align_options: PhaseOptions = PhaseOptions(epochs=5, batch_size=256),
        align_samples: int = 256,
        align_temperature: float = 0.1,
        mean_shrink: float = 0.1,
        jitter: float = 1e-4,
        fresh_norm: bool = False,
        head: HeadFactory | None = None,
        **kwargs: Any,
    ) -> None:
        sgd = functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=5e-4)
        super().__init__(
            head=head or functools.partial(LinearHead, init_std=0.02),
            lr_factors={"backbone.*": 0.01} if lr_factors is None else lr_factors,
            loss_classes="current",
            align_options=align_options.filled(sgd, CosineOverPhase),
            align_samples=align_samples,
            jitter=jitter,
            **kwargs,
        )
        above(self, 0, align_temperature=align_temperature)
        within(self, "[0, 1]", mean_shrink=mean_shrink)
        self.align_temperature, self.mean_shrink, self.fresh_norm = align_temperature, mean_shrink, fresh_norm
        self.unaligned_head: Head  # head before the alignment; without columns until the first task ends

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        if self.fresh_norm:
            self._reset_last_norm()
        self.unaligned_head = self.build_head(self.network.head.num_features)

    def _reset_last_norm(self) -> None:
        norms = [module for module in self.network.backbone.modules() if isinstance(module, nn.LayerNorm)]
        if not norms:
            name = type(self.network.backbone).__name__
            raise ValueError(f"SLCA: fresh_norm is True, but {name} has no LayerNorm; remove fresh_norm")
        norms[-1].reset_parameters()
        norms[-1].eps = nn.LayerNorm(1).eps

    def begin_task(self, task: Task) -> None:
        if self.unaligned_head.num_columns:
            self.network.head.load_state_dict(self.unaligned_head.state_dict())
        super().begin_task(task)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.phase.features is not None:
            sizes = self.network.head.block_sizes()
            logits = normalised_logits(output.logits, sizes, self.align_temperature)
            return {"ce": cross_entropy(logits, batch.labels)}  # over all classes
        return {"ce": self.classification_loss(output, batch)}  # over the classes of the task

    def drawn_features(self) -> GaussianFeatures:
        return GaussianFeatures(self.gaussians, self.align_samples, mean_scales(self.task_columns, self.mean_shrink))

    def learn_statistics(self) -> None:
        if self.align_options.epochs == 0:
            return
        super().learn_statistics()
        self.unaligned_head.load_state_dict(self.network.head.state_dict())

    def bytes_kept(self) -> dict[str, int]:
        heads = sum(value.nbytes for value in self.unaligned_head.state_dict().values())
        return {**super().bytes_kept(), "heads": heads}
