"""A mean teacher for test-time adaptation: a copy of the network whose parameters follow the student."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import Batch
from cl_lightning.checks import within
from cl_lightning.losses import full_precision
from cl_lightning.memory import Teacher
from cl_lightning.strategies.test_time.base import TestTimeAdaptation
from cl_lightning.strategy import Output, Task


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
