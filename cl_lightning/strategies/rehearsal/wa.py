"""Weight Aligning: "Maintaining Discrimination and Fairness in Class Incremental Learning" (Zhao et al., CVPR 2020,
arXiv:1911.07053).

The network f is trained on the data of the task and on herded exemplars, with distillation from a copy g of the network
before the task:

    L(x, y) = (1 - lambda) CE(f(x), y) + lambda CE(softmax(g(x) / T), softmax(f_old(x) / T)),   lambda = C_old / C

The head is then biased towards the new classes: the norms of their rows are larger. At the end of the task the new rows
are therefore scaled to the mean norm of the old rows,

    w_c <- gamma w_c for new c,   gamma = mean_c ||w_c||, c old  /  mean_c ||w_c||, c new

before the exemplars are chosen and the next teacher is copied. Biases are unchanged. lambda -> distill_weight,
T -> temperature. The alignment is also a callback for any strategy: ``WeightAlignment``. After each step negative
weights of the head are set to 0 (``clip_weights``), so that with the non-negative features of a ReLU the norm of a row
corresponds to the scale of its logit; published re-implementations omit this. The alignment removes a bias towards the
new classes only where the norms of their rows are larger, which takes many steps. After few steps the norms are smaller
than those of old rows, and alignment can lower the accuracy, above all without ``clip_weights``.
"""

from typing import Any, cast

from torch import Tensor

from cl_lightning.batch import ImageShape
from cl_lightning.checks import above, within
from cl_lightning.losses import balanced_distillation
from cl_lightning.memory import Teacher
from cl_lightning.models import align_head
from cl_lightning.strategy import Batch, ExemplarReplay, Output, Task, Traits


class WA(ExemplarReplay):
    """Distillation on the task and on herded exemplars, then new rows of the head are scaled to the norm of old rows.

    Args:
        memory_size: K, in samples, over all classes and processes.
        temperature: T, above 0.
        distill_weight: lambda, in [0, 1]; None for C_old / C, which requires new classes in each task.
        align: Whether new rows are scaled; False for the paper's ablation.
        clip_weights: Whether negative weights of the head are set to 0 after each step; use False for a backbone whose
            features can be negative.
        kwargs: Options of the base class.
    """

    traits = Traits(family="rehearsal", paper="Zhao et al., CVPR 2020, arXiv:1911.07053", keeps_exemplars=True)

    def __init__(
        self,
        *,
        memory_size: int = 2000,
        temperature: float = 2.0,
        distill_weight: float | None = None,
        align: bool = True,
        clip_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(memory_size=memory_size, **kwargs)
        above(self, 0, temperature=temperature)
        within(self, "[0, 1]", distill_weight=distill_weight, optional=True)
        if distill_weight is None:  # C_old / C is 1 without new classes: no classification loss
            self.traits = self.traits.but(
                scenarios=("class-incremental", "online"), remedy="give distill_weight, such as 0.5"
            )
        self.temperature, self.distill_weight = temperature, distill_weight
        self.align, self.clip_weights = align, clip_weights
        self.teacher = Teacher()

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        align_head(self.network.head)  # raises here if the head cannot be aligned; without rows it changes nothing

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        ce = self.classification_loss(output, batch)
        if not self.teacher:
            return {"ce": ce}
        target = self.teacher(batch.images).logits  # (batch, classes before this task)
        return balanced_distillation(ce, output.logits, target, self.temperature, self.distill_weight)

    def after_step(self, batch: Batch) -> None:
        if self.clip_weights:
            for block in self.network.head.blocks:
                cast(Tensor, block.weight).clamp_(min=0)

    def end_task(self, task: Task) -> None:
        if self.align and task.num_new:
            align_head(self.network.head)
        super().end_task(task)
        self.teacher.learn_from(self.network)
