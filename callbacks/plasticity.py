"""Measures of plasticity after each task: dormant units, rank, norms, and accuracy on the new task."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from cl_lightning import measures
from cl_lightning.batch import Batch
from cl_lightning.callback import ContinualCallback
from cl_lightning.callbacks.continual_backprop import hidden_layers
from cl_lightning.checks import at_least
from cl_lightning.distributed import all_gather_rows, all_sum, world_size
from cl_lightning.losses import cross_entropy
from cl_lightning.measures import PLASTICITY
from cl_lightning.models import Output
from cl_lightning.stream import Task

if TYPE_CHECKING:
    from cl_lightning.strategy import ContinualStrategy


class Plasticity(ContinualCallback):
    """Records per task how well the network learns it, and what a network that cannot learn any more looks like.

    For each task t, on un-augmented training samples of the task after it is learnt, except for the first measure:

        online_accuracy   share of the new samples of all training steps of t that the network predicts correctly before
                          it learns from them: the accuracy on a fresh task
        task_accuracy     share of the samples that are predicted correctly
        dormant_units     share of the hidden units whose activity is at most ``threshold`` times the mean activity of
                          their layer (Sokar et al., ICML 2023, arXiv:2302.12902)
        effective_rank    exp of the entropy of the normalised singular values of the features (Roy & Vetterli 2007)
        weight_norm       Euclidean norm of all weights of the backbone
        gradient_norm     Euclidean norm of the gradient of the mean cross-entropy with respect to the backbone

    The units are the ones that ``ContinualBackprop`` can replace (see there); the features, for other backbones. The
    head is left out of the norms, because it grows. Samples with a hidden label are left out of the accuracies and of
    the gradient.

    Args:
        samples: Number of samples of each task, drawn by seed and task, at least 1; None for all.
        threshold: Relative activity up to which a unit is dormant, at least 0; the default is our choice.
    """

    paper: str = "Sokar et al., ICML 2023, arXiv:2302.12902; Dohare et al., Nature 2024, arXiv:2108.06325"
    observer_only: bool = True

    def __init__(self, *, samples: int | None = 1000, threshold: float = 0.025) -> None:
        at_least(self, 1, samples=samples, optional=True)
        at_least(self, 0, threshold=threshold)
        self.samples, self.threshold = samples, threshold
        self.table = torch.zeros(0, len(PLASTICITY), dtype=torch.float64)
        """Measures in the order of ``PLASTICITY``, float64 ``(tasks, measures)``; nan where undefined."""
        self._counts = torch.zeros(2, dtype=torch.float64)  # correct and all predictions of the task in training
        self._is_new_batch = self._is_local = False

    # ------------------------------------------------------------------ during a task

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._counts = self._counts.to(pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self._is_new_batch = self._is_local = True

    @torch.no_grad()
    def losses(self, strategy: "ContinualStrategy", batch: Batch, output: Output) -> dict[str, Tensor]:
        """Count predictions; there is no loss. Of several passes for one step the first one counts."""
        if self._is_new_batch and len(output.logits) == len(batch):
            new = (batch.tasks == strategy.task.index) & (batch.labels >= 0)
            right = new & (output.logits.argmax(dim=1) == batch.labels)
            self._counts += torch.stack([right.sum(), new.sum()])
        self._is_new_batch = False
        return {}

    # ------------------------------------------------------------------ after a task

    def on_task_end(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        right, seen = all_sum(self._counts.to(strategy.device)).tolist()
        self._counts = torch.zeros_like(self._counts)
        row = [right / seen if seen else torch.nan, *self._measured(strategy)]
        new = torch.tensor([row], dtype=torch.float64)
        self.table = torch.cat([self.table[: task.index], new])
        for logger in trainer.loggers:
            found = {f"plasticity/{name}": value for name, value in zip(PLASTICITY, row, strict=True) if value == value}
            logger.log_metrics(found, step=trainer.global_step)

    def _measured(self, strategy: "ContinualStrategy") -> list[float]:
        """All measures but the first one."""
        network = strategy.network
        layers = {layer.name: layer.outgoing for layer in hidden_layers(network)} or {"features": network.head}
        units = {layer.name: len(layer.incoming.weight) for layer in hidden_layers(network)}
        activity: dict[str, Tensor] = {}

        def adding(name: str) -> Any:
            def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                h = inputs[0].detach().double()
                h = h.reshape(len(h), units.get(name, h.shape[1]), -1).abs().mean(2).sum(0)
                activity[name] = activity.get(name, 0) + h

            return add

        weights = [value for value in network.backbone.parameters() if value.requires_grad]
        gradient = [torch.zeros_like(value) for value in weights]
        counts = torch.zeros(2, dtype=torch.float64, device=strategy.device)
        features: list[Tensor] = []
        for batch in strategy.passes.batches(samples=self.samples):
            handles = [outgoing.register_forward_pre_hook(adding(name)) for name, outgoing in layers.items()]
            try:
                with torch.enable_grad():
                    output = network(batch.images)
                    labelled = batch.labels >= 0
                    loss = cross_entropy(output.logits, batch.labels) * labelled.sum()
                    found = torch.autograd.grad(loss, weights, allow_unused=True) if weights and len(batch) else ()
            finally:
                for handle in handles:
                    handle.remove()
            for total, value in zip(gradient, found, strict=False):
                if value is not None:
                    total += value
            right = labelled & (output.logits.argmax(dim=1) == batch.labels)
            counts += torch.stack([right.sum(), labelled.sum()])
            features.append(output.features.detach().float())
        right_count, labelled_count = all_sum(counts).tolist()
        for total in gradient:
            all_sum(total)
        dormant = [measures.dormant_units(all_sum(activity[name]), self.threshold) for name in layers]
        return [
            right_count / labelled_count if labelled_count else torch.nan,
            float(torch.cat(dormant).double().mean()),
            measures.effective_rank(all_gather_rows(torch.cat(features))),
            measures.joint_norm(network.backbone.parameters()),
            measures.joint_norm(gradient) / max(labelled_count, 1),
        ]

    # ------------------------------------------------------------------ results and state

    def results(self) -> dict[str, Any]:
        columns = self.table.T.tolist()
        found = {
            name: [None if v != v else v for v in values] for name, values in zip(PLASTICITY, columns, strict=True)
        }
        return {"samples": self.samples, "threshold": self.threshold, **found} if len(self.table) else {}

    def state_dict(self) -> dict[str, Any]:
        counts = self._counts
        if self._is_local:  # called on all processes
            counts = all_sum(counts.clone()) / world_size()
        return {"table": self.table, "counts": counts}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.table, self._counts = state_dict["table"], state_dict["counts"]
