"""PackNet (Mallya & Lazebnik, CVPR 2018, arXiv:1711.05769).

One network for many tasks, whose weights are divided among the tasks. Task k

    1. trains all weights that no earlier task owns; owned weights take part in the forward pass and do not change,
    2. sets the share p of smallest absolute value of the weights that it has just trained to 0, layer by layer, and
       frees them for later tasks,
    3. trains the weights that are left, which it owns from then on.

A sample of task k is predicted with the weights of the owners 0 .. k; all other weights count as 0. So task k owns
(1 - p) p^k of each layer, and its predictions never change again. p -> prune.
Weights are the matrices and kernels of the backbone. Its biases and batch normalisation are trained in the first task
only and frozen afterwards, running statistics included. The head has a block per task.
The last task could keep all weights that it trained; here each task frees its share, since a stream may be continued.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.func import functional_call

from cl_lightning.checks import within
from cl_lightning.memory import Held, Owners
from cl_lightning.strategies.base import BY_TASK, AddsLosses, SharesWeights
from cl_lightning.strategy import Batch, Output, Phase, PhaseOptions, Task, Traits

RETRAIN = "retrain"


class PackNet(SharesWeights):
    """Iterative pruning: each task trains the free weights, keeps the largest ones and frees the others.

    Args:
        prune: p, share of the weights of a layer that a task has trained which it frees, in [0, 1]; or one share per
            task, the last of which holds for all later tasks.
        retrain_options: Options of the phase ``retrain``, in which the weights that are left are trained; 0 epochs to
            leave it out.
        kwargs: Options of the base class.
    """

    traits = Traits(
        family="exemplar-free",
        paper="Mallya & Lazebnik, CVPR 2018, arXiv:1711.05769",
        task_ids="needed",
        scenarios=BY_TASK,
    )

    def __init__(
        self,
        *,
        prune: float | Sequence[float] = 0.75,
        retrain_options: PhaseOptions = PhaseOptions(),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.prune = (prune,) if isinstance(prune, int | float) else tuple(prune)
        for share in self.prune or (None,):
            within(self, "[0, 1]", prune=share)
        self.retrain_options = retrain_options
        self.owners = Owners()
        self._held: Held | None = None

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.owners.claim(self.weights(), task.index)

    def phases(self, task: Task) -> list[Phase]:
        return [Phase()] if self.retrain_options.epochs == 0 else [Phase(), Phase(RETRAIN, self.retrain_options)]

    def begin_phase(self, phase: Phase, origin: int, sources: Sequence[AddsLosses] = ()) -> None:
        super().begin_phase(phase, origin, sources)
        self._held = None

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": self.classification_loss(output, batch)}

    def edit_gradients(self, batch: Batch) -> None:
        if self._held is None:  # before the first step since the fit began or was resumed
            self._held = Held(self.weights(), self.owners.owned_by(self.task.index))
        self._held.mask_gradients()

    def after_step(self, batch: Batch) -> None:
        if self._held is not None:
            self._held.restore()

    def end_phase(self, phase: Phase) -> None:
        if phase.name != RETRAIN:
            share = self.prune[min(self.task.index, len(self.prune) - 1)]
            self.owners.prune(self.weights(), self.task.index, share)

    def predict_task(self, images: Tensor, task: int) -> Tensor:
        used, weights = self.owners.used_by(task), self.weights()
        masked = {name: weight * used[name] for name, weight in weights.items()}
        features = functional_call(self.network.backbone, masked, (images,))
        return self.network.head.classify(features)
