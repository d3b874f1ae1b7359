"""Weight consolidation (EWC, MAS, SI, L2) for any strategy."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from cl_lightning.batch import Batch
from cl_lightning.consolidation import Consolidation, Estimator, Merge
from cl_lightning.hooks import ContinualCallback
from cl_lightning.network import Output
from cl_lightning.sensitivity import Labels
from cl_lightning.stream import Task

if TYPE_CHECKING:
    from cl_lightning.strategy import ContinualStrategy


class ImportancePenalty(ContinualCallback):
    """Holds each weight where earlier tasks left it, by how much it mattered to them.

    With theta* the weights after earlier tasks and Omega their importances, term ``penalty``,

        fisher  lambda/2 sum_j F_j (theta_j - theta*_j)^2      EWC (Kirkpatrick et al., PNAS 2017, arXiv:1612.00796)
        mas     lambda/2 sum_j Omega_j (theta_j - theta*_j)^2  Memory Aware Synapses (Aljundi et al., ECCV 2018,
                                                               arXiv:1711.09601; there without the 1/2)
        si      c sum_j Omega_j (theta_j - theta*_j)^2         Synaptic Intelligence (Zenke et al., ICML 2017,
                                                               arXiv:1703.04200)
        l2      lambda sum_j (theta_j - theta*_j)^2            Smith et al. (CVPR-W 2023, arXiv:2203.17269)

    lambda, c -> weight. F: squared gradients of the log-likelihood; Omega of MAS: absolute gradients of the squared
    norm of the logits; Omega of SI: share of each weight in the decrease of the loss along the path of training. The
    first two are taken over the un-augmented data of each task when it ends. ``Finetune`` with ``fisher`` is ``EWC``,
    to the bit. With weight 0 nothing is added, and the run is what it is without the callback, to the bit.

    Weights of a frozen backbone are not held. SI notes gradients before each optimizer step, averaged over
    processes and unscaled but not yet clipped, and takes the penalty's part out of them.

    Args:
        estimator: How importance is measured.
        weight: lambda or c, at least 0.
        merge: What a new task does to earlier importances, see ``Consolidation``. None for that of the papers: ``add``
            for ``fisher``, ``decay`` for ``mas`` and ``si``; ``l2`` always moves its anchor.
        decay: Factor in [0, 1] of earlier importances, for ``decay`` and ``average``.
        labels: For ``fisher``: labels of the log-likelihood whose gradient is squared.
        per_sample: Square (or take the absolute value of) the gradient of each sample; False takes that of each batch's
            mean, to reproduce frameworks that do.
        on: Hold the ``backbone``, or ``all`` weights that earlier tasks have trained.
        xi: Damping of ``si``, positive.
        clamp: For ``si``: a weight whose moves raised the loss has no importance; the paper lets it be negative.
        samples: For ``fisher`` and ``mas``: samples of a task that importance is measured on; None for all.
        hold_initial: For ``l2``: hold the backbone at its first weights during the first task, as for pretrained ones.
    """

    paper: str = "Kirkpatrick et al., PNAS 2017, arXiv:1612.00796"

    def __init__(
        self,
        *,
        estimator: Estimator = "fisher",
        weight: float = 100.0,
        merge: Merge | None = None,
        decay: float = 1.0,
        labels: Labels = "sampled",
        per_sample: bool = True,
        on: Literal["backbone", "all"] = "all",
        xi: float = 0.1,
        clamp: bool = True,
        samples: int | None = None,
        hold_initial: bool = False,
    ) -> None:
        if hold_initial and estimator != "l2":
            raise ValueError(
                f"ImportancePenalty: hold_initial with estimator {estimator!r}, which has no importance before the "
                "first task; use estimator 'l2'"
            )
        default: Merge = "add" if estimator == "fisher" else "decay"
        self.consolidation = Consolidation(
            estimator,
            weight,
            merge=default if merge is None else merge,
            decay=decay,
            labels=labels,
            per_sample=per_sample,
            on=on,
            xi=xi,
            clamp=clamp,
            samples=samples,
        )
        self.hold_initial = hold_initial

    def losses(self, strategy: "ContinualStrategy", batch: Batch, output: Output) -> dict[str, Tensor]:
        if not self.consolidation.importance or self.consolidation.weight == 0:
            return {}
        return {"penalty": self.consolidation.penalty()}

    def on_task_start(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        self.consolidation.begin_task(strategy.network, anchor_now=self.hold_initial and task.is_first)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.consolidation.to(pl_module.device)
        skips = getattr(trainer.precision_plugin, "scaler", None) is not None
        self.consolidation.begin_phase(pl_module.network, skips=skips)  # type: ignore[arg-type]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.consolidation.before_step()

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.consolidation.after_step()

    def on_task_end(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        self.consolidation.to(strategy.device)
        batches = strategy.statistics_batches(samples=self.consolidation.samples)
        self.consolidation.end_task(strategy.network, batches, strategy.visible_columns())

    def bytes_kept(self) -> dict[str, int]:
        return {"importance": self.consolidation.importance.num_bytes()}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.consolidation.state_dict())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.consolidation.load_state_dict(state_dict)
