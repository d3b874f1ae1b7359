"""Self-distillation: targets are refined by the network of the previous epoch."""

from typing import TYPE_CHECKING

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from cl_lightning.batch import Batch
from cl_lightning.callbacks._snapshot import Taught
from cl_lightning.checks import within
from cl_lightning.losses import cross_entropy, full_precision
from cl_lightning.models import Output
from cl_lightning.stream import Task

if TYPE_CHECKING:
    from cl_lightning.strategy import ContinualStrategy


class SelfDistillation(Taught):
    """Progressive refinement of targets, PS-KD, for strategies whose loss is the cross-entropy over all classes.

    In epoch t of T of a phase, counted from 1, with p the predictions of the network at the end of the previous epoch,
    the target of a sample is ``(1 - alpha_t) onehot(y) + alpha_t p(x)`` with ``alpha_t = alpha t / T`` (Kim et al.,
    ICCV 2021, arXiv:2006.12000). The loss of the strategy has the first part, so the term ``self_distill`` is

        alpha_t * mean_i [ -sum_c p_c(x_i) log f_c(x_i) + log f_{y_i}(x_i) ]

    alpha -> final_weight. Each phase starts without a previous network: its first epoch has no term. p is computed in
    eval mode on the images of the step. Samples without a label have no term. With ``loss_classes`` other than ``all``
    the strategy is refused. With final_weight 0 the run equals the run without the callback to the bit.

    Args:
        final_weight: alpha, in [0, 1); 0.8 in the paper.
    """

    paper: str = "Kim et al., ICCV 2021, arXiv:2006.12000"

    def __init__(self, *, final_weight: float = 0.8) -> None:
        super().__init__()
        within(self, "[0, 1)", final_weight=final_weight)
        self.final_weight = final_weight

    def on_task_start(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        if strategy.loss_classes != "all":
            raise ValueError(
                f"SelfDistillation: the loss of {type(strategy).__name__} is over the classes "
                f"{strategy.loss_classes!r}; give --model.loss_classes all"
            )

    def losses(self, strategy: "ContinualStrategy", batch: Batch, output: Output) -> dict[str, Tensor]:
        if not self.teacher or self.final_weight == 0:
            return {}
        share = self.final_weight * (strategy.epoch + 1) / (strategy.phase.options.epochs or 1)
        with torch.no_grad():
            target = full_precision(self.teacher(batch.images).logits).softmax(dim=1)
        labelled = batch.labels >= 0
        soft = -(target * full_precision(output.logits).log_softmax(dim=1)).sum(1)
        mean = (soft * labelled).sum() / labelled.sum().clamp(min=1)
        return {"self_distill": share * (mean - cross_entropy(output.logits, batch.labels))}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy: ContinualStrategy = pl_module  # type: ignore[assignment]
        if strategy.epoch == 0:
            self.teacher.forget()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy: ContinualStrategy = pl_module  # type: ignore[assignment]
        self.teacher.forget()
        if self.final_weight and strategy.epoch + 1 < (strategy.phase.options.epochs or 0):
            self.teacher.learn_from(strategy.network)
            self.teacher.to(strategy.device)
