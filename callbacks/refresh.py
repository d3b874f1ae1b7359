"""Refresh learning: an unlearning step before each learning step."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from cl_lightning.batch import Batch, mix
from cl_lightning.callback import ContinualCallback
from cl_lightning.checks import at_least
from cl_lightning.distributed import rank
from cl_lightning.memory import fisher_diagonal
from cl_lightning.memory.sensitivity import Labels
from cl_lightning.models import Output
from cl_lightning.strategies.base import mean_gradient, output_at, relative_step, trained_weights
from cl_lightning.stream import Task

if TYPE_CHECKING:
    from cl_lightning.strategy import ContinualStrategy

_NOISE, _DROPOUT = 0x2EF1, 0x2EF2


class Refresh(ContinualCallback):
    """Unlearns the batch a little before each step of any strategy, and adds noise to the weights.

    Before a step on the batch B, each trained tensor w of the network moves along the gradient g_w of the cross-entropy
    of B, upwards, by a share of its own norm, and less where the Fisher information F of earlier tasks is large:

        w <- w + delta * ( ||w|| g_w / ||g_w|| + sigma xi ) / (1 + kappa F_w),    xi ~ N(0, 1)

    Then the step of the strategy follows. At the end of a task F <- tau F + F of the task (Wang et al., "A Unified and
    General Framework for Continual Learning", ICLR 2024, arXiv:2403.13249, as in the authors' code). delta -> strength,
    sigma -> noise, kappa -> fisher_weight, tau -> decay. The learning rate of the code's unlearning step has no effect,
    since the change of each tensor is normalised. With tau = 1e-5 F is nearly the F of the last task.

    Departs from the authors' code: there F is the mean of p(y|x) (d log p(y|x) / d theta)^2 over the samples with their
    labels y, here it is the Fisher information of ``labels``. Running statistics of batch normalisation do not change
    in the unlearning step, as there. With accumulated gradients there is one unlearning step, on the first batch.

    Args:
        strength: delta, at least 0; with 0 the run equals the run without the callback to the bit.
        noise: sigma, at least 0.
        fisher_weight: kappa, at least 0; with 0 no Fisher information is computed.
        decay: tau, at least 0.
        steps: Number of unlearning steps before each step, at least 1.
        labels: Labels of the log-likelihood in F: ``exact``, ``sampled``, ``predicted`` or ``empirical``, see
            ``fisher_diagonal``.
        samples: Number of samples of a task for F, at least 1; None for all.
    """

    paper: str = "Wang et al., ICLR 2024, arXiv:2403.13249"

    def __init__(
        self,
        *,
        strength: float = 1e-5,
        noise: float = 1e-3,
        fisher_weight: float = 1e-3,
        decay: float = 1e-5,
        steps: int = 1,
        labels: Labels = "sampled",
        samples: int | None = None,
    ) -> None:
        at_least(self, 0, strength=strength, noise=noise, fisher_weight=fisher_weight, decay=decay)
        at_least(self, 1, steps=steps)
        at_least(self, 1, samples=samples, optional=True)
        self.strength, self.noise, self.fisher_weight, self.decay = strength, noise, fisher_weight, decay
        self.steps, self.labels, self.samples = steps, labels, samples
        self.fisher: dict[str, Tensor] = {}
        """F by the names of the network's parameters."""

    def losses(self, strategy: Any, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {}  # a source of losses: batches then hold images, not stored features

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.fisher = {name: value.to(pl_module.device) for name, value in self.fisher.items()}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        strategy: Any = pl_module
        if self.strength == 0 or strategy.phase.features is not None or batch_idx % trainer.accumulate_grad_batches:
            return
        device = strategy.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for step in range(self.steps):
                torch.manual_seed(mix(batch.draw.key, _DROPOUT, rank(), step))
                with trainer.precision_plugin.forward_context():
                    self.unlearn(strategy, batch, batch.draw.fork(_NOISE, step).generator(device))

    def unlearn(self, strategy: Any, batch: Batch, generator: torch.Generator) -> None:
        """Move the trained weights of the network away from a batch, in place; on every process."""
        weights = trained_weights(strategy.network)
        loss = None
        if len(batch):
            loss = strategy.classification_loss(output_at(strategy.network, weights, batch.images), batch)
        move = relative_step(weights, mean_gradient(loss, weights, batch.weight), 1.0)
        with torch.no_grad():
            for name, value in weights.items():
                change = move[name]
                if self.noise:
                    xi = torch.randn(value.shape, generator=generator, device=value.device, dtype=value.dtype)
                    change = change + self.noise * xi
                fisher = self.fisher.get(name)
                if fisher is not None and fisher.shape == value.shape:
                    change = change / (1 + self.fisher_weight * fisher)
                value.add_(change, alpha=self.strength)

    def on_task_end(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        if self.strength == 0 or self.fisher_weight == 0:
            return
        parameters = dict(strategy.network.named_parameters())
        found = fisher_diagonal(
            strategy.network,
            {name: value for name, value in parameters.items() if value.is_floating_point()},
            strategy.passes.batches(samples=self.samples),
            labels=self.labels,
            loss_classes=strategy.loss_columns(),
        )
        before = {name: value.to(strategy.device) for name, value in self.fisher.items()}
        self.fisher = {
            name: self.decay * before[name] + value if name in before and before[name].shape == value.shape else value
            for name, value in found.items()
        }

    def bytes_kept(self) -> dict[str, int]:
        return {"importance": sum(value.numel() * value.element_size() for value in self.fisher.values())}

    def state_dict(self) -> dict[str, Any]:
        return {"fisher": dict(self.fisher)} if self.fisher else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.fisher = {name: value.clone() for name, value in state_dict["fisher"].items()}
