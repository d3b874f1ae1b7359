"""Weight regularisation (EWC, MAS, SI, RWalk, L2) for any strategy."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from cl_lightning.batch import Batch
from cl_lightning.callback import ContinualCallback
from cl_lightning.memory import Consolidation, bytes_by_kind
from cl_lightning.memory.consolidation import Estimator, Merge
from cl_lightning.memory.sensitivity import Labels
from cl_lightning.models import Output
from cl_lightning.stream import Task

if TYPE_CHECKING:
    from cl_lightning.strategy import ContinualStrategy


class ImportancePenalty(ContinualCallback):
    """Quadratic penalty on weight changes, weighted by the importance of each weight for earlier tasks.

    With theta* the weights after earlier tasks and F or Omega their importances, the term ``penalty`` is

        fisher  lambda/2 sum_j F_j (theta_j - theta*_j)^2      EWC (Kirkpatrick et al., PNAS 2017, arXiv:1612.00796)
        mas     lambda/2 sum_j Omega_j (theta_j - theta*_j)^2  Memory Aware Synapses (Aljundi et al., ECCV 2018,
                                                               arXiv:1711.09601; there without the 1/2)
        si      c sum_j Omega_j (theta_j - theta*_j)^2         Synaptic Intelligence (Zenke et al., ICML 2017,
                                                               arXiv:1703.04200)
        rwalk   lambda sum_j omega_j (theta_j - theta*_j)^2    Riemannian Walk (Chaudhry et al., ECCV 2018,
                                                               arXiv:1801.10112)
        l2      lambda sum_j (theta_j - theta*_j)^2            Smith et al. (CVPR-W 2023, arXiv:2203.17269)

    lambda, c -> weight. F is the mean of squared gradients of the log-likelihood. Omega of MAS is the mean of absolute
    gradients of the squared norm of the logits. Omega of SI is the contribution of each weight to the decrease of the
    loss along the path of training; omega of RWalk adds a running F of the gradients of training to a score of the
    path. F and Omega of MAS are computed on the un-augmented data of each task when it ends.
    ``Finetune`` with ``estimator="fisher"`` equals ``EWC`` to the bit. With weight 0 no term is added, and the run
    equals the run without the callback to the bit.

    There is no penalty on weights of a frozen backbone. SI and RWalk read the gradients before each optimizer step,
    averaged over processes and unscaled but not yet clipped, and subtract the gradient of the penalty.

    Args:
        estimator: Estimator of the importance: ``fisher``, ``mas``, ``si``, ``rwalk`` or ``l2``.
        weight: lambda or c, at least 0.
        merge: How importances of a new task are merged with earlier ones: ``add``, ``decay`` or ``average``, see
            ``Consolidation``. None for the rule of the papers: ``add`` for ``fisher``, ``decay`` for ``mas`` and
            ``si``. With ``l2`` and ``rwalk`` anchor and importances are always replaced.
        decay: Factor of earlier importances for ``decay`` and ``average``, in [0, 1].
        labels: Labels of the log-likelihood for ``fisher``: ``exact``, ``sampled``, ``predicted`` or ``empirical``.
        per_sample: Whether the gradient of each sample is squared (``mas``: its absolute value is taken); False uses
            the gradient of the mean loss of each batch, to reproduce frameworks that do.
        on: Penalise changes of the ``backbone``, or of ``all`` weights that earlier tasks have trained.
        names: Patterns of parameter names, such as ``backbone.*.attn.qkv.*``: of the weights of ``on``, only those that
            match a pattern are penalised; None for all.
        xi: Damping of ``si`` and ``rwalk``, above 0.
        clamp: Whether negative importances of ``si``, of weights whose changes increased the loss, are set to 0; the
            paper keeps them negative.
        samples: Number of samples of a task for ``fisher`` and ``mas``, at least 1; None for all.
        hold_initial: Whether ``l2`` penalises changes from the initial weights of the backbone during the first task,
            for pretrained backbones.
        rate: alpha of ``rwalk``: weight of the newest squared gradient, in [0, 1].
        interval: delta_t of ``rwalk``: steps between two updates of the score, at least 1.
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
        names: Sequence[str] | None = None,
        xi: float = 0.1,
        clamp: bool = True,
        samples: int | None = None,
        hold_initial: bool = False,
        rate: float = 0.9,
        interval: int = 10,
    ) -> None:
        if hold_initial and estimator != "l2":
            raise ValueError(
                f"ImportancePenalty: hold_initial is True, but estimator {estimator!r} has no importance before the "
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
            names=names,
            xi=xi,
            clamp=clamp,
            samples=samples,
            rate=rate,
            interval=interval,
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
        batches = strategy.passes.batches(samples=self.consolidation.samples)
        self.consolidation.end_task(strategy.network, batches, strategy.loss_columns())

    def bytes_kept(self) -> dict[str, int]:
        return bytes_by_kind(self.consolidation)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.consolidation.state_dict())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.consolidation.load_state_dict(state_dict)
