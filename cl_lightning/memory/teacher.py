"""Frozen copies of a network, as teachers for distillation or as references for features."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from cl_lightning.models import Network, Output, batch_norms, frozen_copy


class Teacher(nn.Module):
    """Frozen copy of the network, as it was before this task; empty until :meth:`learn_from` is called.

    The copy stays in eval mode when its owner changes mode, takes no gradient, and is saved with its owner. Its weights
    are exact copies, in the precision of the student's weights.

    Args:
        reference: Whether the copy must stay the network before the task, because features or prototypes are compared
            with its outputs. A callback that adapts teachers to the new images (``TeacherAdaptation``) refuses such a
            teacher.
        adapts: Whether batch normalisation of the copy uses the statistics of the batch in training steps, and its
            running statistics follow them; all weights stay frozen.
    """

    kept_as: ClassVar[str] = "teachers"

    def __init__(self, *, reference: bool = False, adapts: bool = False) -> None:
        super().__init__()
        self.reference, self.adapts = reference, adapts
        self.network: Network | None = None

    def __bool__(self) -> bool:
        return self.network is not None

    @property
    def num_columns(self) -> int:
        """Number of columns of the teacher's logits; 0 while it is empty."""
        return 0 if self.network is None else self.network.head.num_columns

    def learn_from(self, student: Network) -> None:
        """Replace the network of the teacher by a frozen copy of ``student``."""
        self.network = frozen_copy(student)
        self.train(student.training)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Output:
        if self.network is None:
            raise RuntimeError("Teacher: check `if teacher` before the call; there is no teacher during the first task")
        output: Output = self.network(images)
        return output

    def pair(self, images: Tensor, output: Output) -> tuple[Tensor, Tensor]:
        """Logits of student and teacher for the classes that both know, as distillation losses take them.

        With 60 classes in a student's logits ``(128, 60)`` and 50 in the teacher, both tensors are ``(128, 50)``.

        Args:
            images: Images ``(B, C, H, W)`` as the student saw them.
            output: Output of the student for ``images``, with logits ``(B, columns)``.

        Returns:
            Logits of the student, with gradient, and of the teacher, without, each ``(B, C_old)``: their columns are
            the classes that the teacher knows.

        Raises:
            RuntimeError: If the teacher is empty.
        """
        target = self(images).logits
        return output.logits[:, : target.shape[1]], target

    def train(self, mode: bool = True) -> Self:
        super().train(False)
        if self.adapts:
            self.train_norms(mode)
        return self

    def train_norms(self, mode: bool = True) -> None:
        """Set the mode of batch normalisation alone; the rest of the copy stays in eval mode."""
        for layer in batch_norms(self):
            layer.training = mode

    def restore_network(self, student: Network, state: Mapping[str, Any], prefix: str) -> None:
        """Prepare for loading ``state``: hold a copy of ``student`` if and only if the state has a network."""
        if not any(key.startswith(f"{prefix}network.") for key in state):
            self.network = None
        elif self.network is None:
            self.learn_from(student)

    def num_bytes(self) -> int:
        """Size of the copy in bytes; 0 while the teacher is empty."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state_dict().values())


class Teachers(nn.ModuleList):
    """A frozen copy of the network after each task so far, in the order of the tasks; empty in the first task."""

    def learn_from(self, student: Network) -> None:
        """Append a frozen copy of ``student``."""
        teacher = Teacher(reference=True)
        teacher.learn_from(student)
        self.append(teacher)

    def restore_network(self, student: Network, state: Mapping[str, Any], prefix: str) -> None:
        """Prepare for loading ``state``: hold as many copies of ``student`` as the state has networks."""
        numbers = {key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)}
        del self[len(numbers) :]
        while len(self) < len(numbers):
            self.learn_from(student)
