"""Less-Forgetting Learning (Jung et al., arXiv:1607.00122), for the same classes in new domains.

With z the logits, f the features, and f' the features of a frozen copy of the network before the task,

    L(x, y) = CE(z(x), y) + lambda * 1/d || f(x) - f'(x) ||^2

and the head is frozen after the first task, so that it still separates the features of earlier domains.
lambda -> distill_weight.
The mean over the d features is the form of Avalanche, whose weight and result are known (Permuted MNIST); the paper has
half of the sum, for which lambda is d / 2 times as large. The first task is fine-tuning.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from cl_lightning.checks import at_least
from cl_lightning.losses import feature_distillation
from cl_lightning.memory import Teacher
from cl_lightning.strategy import Batch, ContinualStrategy, Output, Task, Traits


class LFL(ContinualStrategy):
    """Cross-entropy with a frozen head, and distillation of features from the network before the task.

    Args:
        distill_weight: lambda, at least 0.
        freeze_head: Whether the head is frozen after the first task.
        kwargs: Options of the base class.
    """

    traits = Traits(
        family="exemplar-free",
        paper="Jung et al., arXiv:1607.00122",
        scenarios=("domain-incremental", "online"),
        remedy="use Finetune with the callback Distillation(space='features')",
    )

    def __init__(self, *, distill_weight: float = 1e-4, freeze_head: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        at_least(self, 0, distill_weight=distill_weight)
        self.distill_weight, self.freeze_head = distill_weight, freeze_head
        self.teacher = Teacher()

    def frozen(self) -> Iterable[nn.Module]:
        yield from super().frozen()
        if self.freeze_head and not self.task.is_first:
            yield self.network.head

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        terms = {"ce": self.classification_loss(output, batch)}
        if self.teacher:
            before = self.teacher(batch.images).features
            weight = self.distill_weight / before.shape[1]
            terms["distill"] = weight * feature_distillation(output.features, before)
        return terms

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        self.teacher.learn_from(self.network)
