"""Weight Aligning: "Maintaining Discrimination and Fairness in Class Incremental Learning" (Zhao et al., CVPR 2020,
arXiv:1911.07053).

The network f learns the data of the task together with herded exemplars, taught by a copy g of the network before,

    L(x, y) = (1 - lambda) CE(f(x), y) + lambda CE(softmax(g(x) / T), softmax(f_old(x) / T)),   lambda = C_old / C

and its head comes out biased to the new classes: their rows are longer. So when the task is over they are scaled,

    w_c <- gamma w_c for new c,   gamma = mean_c ||w_c||, c old  /  mean_c ||w_c||, c new

before the exemplars are chosen and the next teacher is copied. lambda -> distill_share, T -> temperature. The alignment
is also a callback for any strategy: ``WeightAlignment``.
After each step the rows of the head are clipped at 0 (``clip_weights``), so that with features of a ReLU the length of
a row is the scale of its logit; published re-implementations do without. Biases stay.
The alignment undoes a bias to the new classes where their rows came out longer, which takes many steps: in few ones
they come out shorter, and alignment can make things worse, without ``clip_weights`` above all.
"""

from typing import Any, ClassVar, cast

from torch import Tensor

from cl_lightning.backbones import ImageShape
from cl_lightning.batch import Batch
from cl_lightning.exemplars import check_distill_share, exemplar_memory, update_exemplars
from cl_lightning.heads import align_head
from cl_lightning.losses import balanced_distillation
from cl_lightning.memory import Memory
from cl_lightning.network import Output
from cl_lightning.strategy import ContinualStrategy
from cl_lightning.stream import Task
from cl_lightning.teacher import Teacher


class WA(ContinualStrategy):
    """Distillation on the task and on herded exemplars, then new rows of the head as long as old ones.

    Args:
        memory_size: K, in samples, over all classes and processes.
        temperature: T, above 0.
        distill_share: lambda in [0, 1]; None for the share of old classes, which asks for new classes in every task.
        align: Whether to align; False for the paper's ablation.
        clip_weights: Keep the rows of the head non-negative; False for backbones whose features can be negative.
        kwargs: Of the base.
    """

    family: ClassVar[str] = "rehearsal"
    paper: ClassVar[str] = "Zhao et al., CVPR 2020, arXiv:1911.07053"
    keeps_exemplars: ClassVar[bool] = True

    def __init__(
        self,
        *,
        memory_size: int = 2000,
        temperature: float = 2.0,
        distill_share: float | None = None,
        align: bool = True,
        clip_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if temperature <= 0 or not 0 <= (distill_share or 0.0) <= 1:
            raise ValueError(
                f"WA: temperature={temperature}, distill_share={distill_share}; above 0, and in [0, 1] or null"
            )
        self.temperature, self.distill_share = temperature, distill_share
        self.align, self.clip_weights = align, clip_weights
        self.memory = exemplar_memory(memory_size, owner="WA", visible=self.visible)
        self.teacher = Teacher()
        self.plain_first_task = not clip_weights

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        align_head(self.network.head)  # tells now that a head cannot be aligned

    def begin_task(self, task: Task) -> None:
        check_distill_share(self.distill_share, task, owner="WA")
        super().begin_task(task)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        ce = self.classification_loss(output, batch)
        if not self.teacher:
            return {"ce": ce}
        taught = self.teacher(batch.images).logits  # (batch, classes before this task)
        return balanced_distillation(ce, output.logits, taught, self.temperature, self.distill_share)

    def observe(self, batch: Batch) -> None:
        if self.clip_weights:
            for block in self.network.head.blocks:
                cast(Tensor, block.weight).clamp_(min=0)

    def end_task(self, task: Task) -> None:
        if self.align and task.num_new:
            align_head(self.network.head)
        super().end_task(task)
        update_exemplars(self, self.memory)
        self.teacher.learn_from(self.network)

    def rehearsal(self) -> Memory | None:
        return self.memory
