"""A mean teacher for test-time adaptation: a copy of the network whose parameters follow the student."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import Batch
from cl_lightning.checks import at_least, within
from cl_lightning.distributed import all_sum
from cl_lightning.losses import full_precision
from cl_lightning.memory import Teacher
from cl_lightning.strategies.test_time.base import TestTimeAdaptation, Trained
from cl_lightning.strategies.test_time.parts.views import viewed
from cl_lightning.strategy import Output, Task

_VIEWS = 0xC0  # salt


@torch.no_grad()
def move_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """``theta' <- m theta' + (1 - m) theta``, in place, for all parameters of the teacher, paired by name."""
    names = [name for name, _ in teacher.named_parameters()]
    pairs = [(teacher.get_parameter(name), student.get_parameter(name).detach()) for name in names]
    mine, theirs = (list(column) for column in zip(*pairs, strict=True))
    torch._foreach_lerp_(mine, theirs, 1 - momentum)


def consistency(logits: Tensor, target: Tensor, *, symmetric: bool = False) -> Tensor:
    """Cross-entropy between the softmax of teacher and student for each row, ``(B,)``, in nats.

    Args:
        logits: Logits of the student, ``(B, C)``.
        target: Logits of the teacher, ``(B, C)``; no gradient passes through them.
        symmetric: Whether to return the mean of both directions: teacher as target, and student as target.
    """
    student, teacher = (F.log_softmax(full_precision(values), dim=1) for values in (logits, target.detach()))
    forward = -(teacher.exp() * student).sum(dim=1)
    return (forward - (student.exp() * teacher).sum(dim=1)) / 2 if symmetric else forward


class MeanTeacherAdaptation(TestTimeAdaptation):
    """Base class of methods with a mean teacher theta'; evaluations predict with the teacher.

    After each step theta' <- m theta' + (1 - m) theta for all parameters, not for buffers, before restoration rules
    change the student theta.

    Args:
        teacher_momentum: m, in [0, 1].
        kwargs: Options of ``TestTimeAdaptation``.
    """

    def __init__(self, *, teacher_momentum: float = 0.999, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        within(self, "[0, 1]", teacher_momentum=teacher_momentum)
        self.teacher_momentum = teacher_momentum
        self.teacher = Teacher()

    def of_teacher(self, images: Tensor) -> Output:
        """Features ``(B, d)`` and logits ``(B, classes of the source)`` of the teacher, without gradient."""
        output: Output = self.teacher(images)
        return output._replace(logits=full_precision(output.logits[:, : self.num_source]))

    def forward_source_classes(self, images: Tensor) -> Output:
        return self.of_teacher(images) if self.teacher and self.adapting else super().forward_source_classes(images)

    def after_update(self, batch: Batch) -> None:
        assert self.teacher.network is not None
        move_teacher(self.teacher.network, self.network, self.teacher_momentum)
        super().after_update(batch)

    def reset(self) -> None:
        super().reset()
        if self.teacher.network is not None:
            self.start.restore(self.teacher.network)

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        if task.is_first:
            self.teacher.learn_from(self.network)


class ViewAveragedTeacher(MeanTeacherAdaptation):
    """Base class of methods whose teacher averages over augmented views where the source network is not confident.

        z' = 1/N sum_k f_theta'(aug_k(x))  if  mean_i max_c softmax(f_theta_0(x_i))_c < p_th,  else  f_theta'(x)

    Views are computed only for batches below the threshold; the comparison synchronises with the device.

    Args:
        threshold: p_th: 0.92 for CIFAR-10, 0.72 for CIFAR-100, 0.1 for ImageNet (5 % of the source images are below).
        views: N, at least 0; 0 for a mean teacher without augmentation.
        symmetric: Whether the loss is the mean of both directions, as in CoTTA for ImageNet.
        params: Parameters that are trained, see ``TestTimeAdaptation``.
        kwargs: Options of ``MeanTeacherAdaptation``.
    """

    needs_source: ClassVar[bool] = True

    def __init__(
        self,
        *,
        threshold: float = 0.92,
        views: int = 32,
        symmetric: bool = False,
        params: Literal["norm", "early_norm", "all"] | list[str] = "all",
        **kwargs: Any,
    ) -> None:
        chosen: Trained = params
        super().__init__(params=chosen, **kwargs)
        at_least(self, 0, views=views)
        self.threshold, self.views, self.symmetric = threshold, views, symmetric

    def adapt(self, batch: Batch, output: Output) -> tuple[Tensor, dict[str, Tensor]]:
        target = self._target(batch)
        return target, {"consistency": consistency(output.logits, target, symmetric=self.symmetric)}

    @torch.no_grad()
    def _target(self, batch: Batch) -> Tensor:
        """z', ``(B, classes of the source)``."""
        if self.views:
            source = full_precision(self.source(batch.images).logits[:, : self.num_source])
            confidence = all_sum(source.softmax(dim=1).amax(dim=1).sum()) / batch.draw.total
            if bool(confidence < self.threshold):
                total = torch.zeros_like(source)
                for number in range(self.views):
                    total += self.of_teacher(viewed(self, batch, batch.draw.fork(_VIEWS, number))).logits
                return total / self.views
        return self.of_teacher(batch.images).logits
