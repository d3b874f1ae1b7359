"""Tuning in the input space (Marullo, Tiezzi, Gori, Melacci & Tuytelaars, IJCNN 2023, arXiv:2306.02947).

A pretrained backbone f is frozen. Learnt are parameters psi that transform the input image, and the head W, b:

    L(x, y) = CE(W f(T_psi(x)) + b, y over the classes of the task)

psi is shared by all tasks, and the same path predicts. T_psi adds an image (``add``) or a frame of an image
(``frame``), surrounds the smaller image by a frame (``pad``), scales and shifts the channels (``affine``) or adds a
convolution of 3 x 3 pixels (``conv``), see ``InputTransform``. It acts on the augmented and normalised image, so that
its pixels have fixed places in the input of the network. Gradients pass through the frozen backbone: a step needs the
memory of training it, and features cannot be stored. Later tasks change psi, and with it the features under the rows of
earlier classes; with ``per_task`` each task has its own psi, which is then frozen, and predictions need the task.

kind -> T, transform_lr -> learning rate of psi. Only the abstract of the paper was available: the four
transformations ``add``, ``pad``, ``affine`` and ``conv``, the cross-entropy over the classes of the task, the optimizer
and ``per_task`` are our choices. psi has no weight decay.
"""

import functools
from collections.abc import Iterable
from typing import Any, cast, get_args

from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import SGD

from cl_lightning.checks import at_least, one_of
from cl_lightning.models import InputKind, InputTransform, PeftSets, check_input_options
from cl_lightning.strategies.base import separate_group
from cl_lightning.strategies.base.task_incremental import by_task
from cl_lightning.strategies.pretrained.linear_probe import ProbeClasses
from cl_lightning.strategy import Batch, ContinualStrategy, Output, Task, Traits

_RATES: dict[InputKind, float] = {"add": 1.0, "frame": 1.0, "pad": 1.0, "affine": 0.01, "conv": 0.01}


class InputTuning(ContinualStrategy):
    """A learnt transformation of the input image and a linear head, with a frozen pretrained backbone between them.

    Args:
        kind: The transformation: ``add``, ``frame``, ``pad``, ``affine`` or ``conv``.
        frame_width: Width of the frame of ``pad`` or ``frame`` in pixels, at least 1; None for 30.
        transform_lr: Learning rate of the transformation, at least 0. None for the rate of ``optimizer`` or, where that
            is None, 1.0 for ``add``, ``frame`` and ``pad``, whose gradients are small, and 0.01 for the other kinds.
        per_task: Whether each task has a transformation of its own; the task of a test image must then be known.
        loss_classes: Classes of the cross-entropy: the classes of the ``current`` task, or ``all`` classes seen so far.
        optimizer: Builds the optimizer; None for SGD with learning rate 0.01 and momentum 0.9.
        kwargs: Options of the base class, without ``freeze_backbone``.
    """

    traits = Traits(family="pretrained", paper="Marullo et al., IJCNN 2023, arXiv:2306.02947", needs_pretrained=True)

    def __init__(
        self,
        *,
        kind: InputKind = "add",
        frame_width: int | None = None,
        transform_lr: float | None = None,
        per_task: bool = False,
        loss_classes: ProbeClasses = "current",
        optimizer: OptimizerCallable | None = None,
        **kwargs: Any,
    ) -> None:
        check_input_options(self, kind, frame_width)
        at_least(self, 0, transform_lr=transform_lr, optional=True)
        one_of(self, get_args(ProbeClasses), loss_classes=loss_classes)
        if per_task and loss_classes == "all":
            raise ValueError(
                "InputTuning: loss_classes is 'all' with per_task; use 'current', the classes of the task whose "
                "transformation is trained"
            )
        default = functools.partial(SGD, lr=0.01, momentum=0.9)
        super().__init__(loss_classes=loss_classes, freeze_backbone=False, optimizer=optimizer or default, **kwargs)
        self.transform_lr = _RATES[kind] if transform_lr is None and optimizer is None else transform_lr
        self.per_task = per_task
        if per_task:
            self.traits = self.traits.but(task_ids="needed")
        transform = functools.partial(InputTransform, kind=kind, frame_width=frame_width)
        self.build_backbone = functools.partial(PeftSets, backbone=self.build_backbone, peft=transform)

    @property
    def transforms(self) -> PeftSets:
        """The backbone with the transformations in front."""
        return cast(PeftSets, self.network.backbone)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if task.is_first or self.per_task:
            self.transforms.add()

    def frozen(self) -> Iterable[nn.Module]:
        return [self.transforms.base, *list(self.transforms.sets)[:-1]]

    def parameter_groups(self, parameters: list[nn.Parameter]) -> list[nn.Parameter] | list[dict[str, Any]]:
        rate = {} if self.transform_lr is None else {"lr": self.transform_lr}
        return separate_group(parameters, self.transforms.sets.parameters(), weight_decay=0.0, **rate)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": self.classification_loss(output, batch)}

    def predict(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        if not self.per_task:
            return super().predict(images)
        if tasks is None:
            raise ValueError("InputTuning: with per_task predictions need the task of each image; give tasks")
        return by_task(images, tasks, self._predict_task)

    def _predict_task(self, images: Tensor, task: int) -> Tensor:
        with self.transforms.active(task):
            return self.network.classify(images)
