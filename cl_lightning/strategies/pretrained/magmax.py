"""MagMax: sequential fine-tuning, and the largest change of each weight (Marczak et al., ECCV 2024, arXiv:2407.06322).

Each task trains the network further from its weights after the task before, by cross-entropy over the classes of the
task. When task t ends, its task vector, the change from the pretrained weights theta_0, is merged with earlier ones,
and the merged network predicts:

    tau_i = theta_i - theta_0,   tau[p] = tau_{i*}[p],  i* = argmax_i |tau_i[p]|   (of equal ones the last)
    theta = theta_0 + lambda tau

The next task begins with theta_t, not with the merged weights. lambda -> scale. ``rule`` replaces the choice of the
largest magnitude by another rule of ``cl_lightning.memory``: ``Average``, ``Slerp``, ``Ties`` (with scale 0.55 in the
paper's comparison), ``Dare``, ``Breadcrumbs``. ``MaxMagnitude`` keeps one merged vector; the others keep all vectors.
Merged are the weights that exist before the first task: the backbone, and what the head has apart from the rows of
classes, such as the projection of a ``TextHead``. The paper has a frozen head of text embeddings; rows of a head that
are trained keep their trained values, since rows of different tasks have no common change.
The running statistics of batch normalisation are computed again for the merged weights, on the un-augmented images of
the task, because images of earlier tasks are gone; with ``freeze_norm`` they stay as they are.
Validation during a task, and curves of ``ContinualEvaluation``, measure the network that is trained.
"""

from typing import Any

from torch import Tensor

from cl_lightning.checks import at_least
from cl_lightning.memory import (
    MaxMagnitude,
    MergeRule,
    WeightSets,
    network_tensors,
    shifted,
    task_vector,
    write_weights,
)
from cl_lightning.strategy import Batch, ContinualStrategy, Output, Task, Traits


class MagMax(ContinualStrategy):
    """Sequential fine-tuning; predictions by the pretrained weights plus the largest change of each weight.

    Args:
        scale: lambda, at least 0; 0 predicts with the pretrained backbone.
        rule: Merges the task vectors; None for ``MaxMagnitude``.
        kwargs: Options of the base class.

    Attributes:
        weights: The sets ``start`` (theta_0), ``trained`` (theta_t with running statistics), and the task vectors
            ``task_0``, ``task_1``, ...; a merged vector takes the place of the vectors that it is made of.
    """

    traits = Traits(
        family="pretrained",
        paper="Marczak et al., ECCV 2024, arXiv:2407.06322",
        needs_pretrained=True,
        losses_use_images=False,
    )

    def __init__(self, *, scale: float = 0.5, rule: MergeRule | None = None, **kwargs: Any) -> None:
        super().__init__(loss_classes="current", **kwargs)
        at_least(self, 0, scale=scale)
        self.scale, self.rule = scale, rule or MaxMagnitude()
        self.weights = WeightSets()

    def begin_task(self, task: Task) -> None:
        if task.is_first:
            start = {name: value for name, value in self.network.named_parameters() if value.is_floating_point()}
            self.weights.keep("start", start)
        else:
            write_weights(self.network, self.weights["trained"])
        super().begin_task(task)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": self.classification_loss(output, batch)}

    def end_task(self, task: Task) -> None:
        trained, start = network_tensors(self.network), self.weights["start"]
        self.weights.keep("trained", trained)
        vectors = [*self._vectors(), task_vector(trained, start)]
        merged = self.rule(vectors)
        kept = merged if self.rule.stepwise else vectors[-1]
        self.weights.keep("task_0" if self.rule.stepwise else f"task_{task.index}", kept)
        write_weights(self.network, shifted(start, merged, self.scale))
        if not self.freeze_backbone:
            self.passes.refit_norms(self._frozen_norms())
        super().end_task(task)

    def _vectors(self) -> list[dict[str, Tensor]]:
        found = (self.weights[f"task_{index}"] for index in range(self.task.index))
        return [vector for vector in found if vector]
