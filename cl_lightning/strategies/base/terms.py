"""Sums of the loss terms over steps, and their logging."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from cl_lightning.batch import Batch
from cl_lightning.distributed import all_names, all_sum, world_size
from cl_lightning.models import Output

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


@runtime_checkable
class AddsLosses(Protocol):
    """A callback that adds terms to the loss of each step."""

    def losses(self, strategy: Any, batch: Batch, output: Output) -> dict[str, Tensor]:
        """Additional terms by name; ``output`` is the output of the forward pass of this step."""
        ...


class LossTerms:
    """Sums the terms of the loss on the device and logs their means every ``log_every_n_steps`` steps.

    Attributes:
        sources: Callbacks whose losses are added in the current phase; set when the phase begins.
        samples: Number of samples in the forward passes of the last step, samples of a memory included; None before the
            first step.
        shown: Values of the last logging, for progress bars.
        rate: Learning rate of the last step; None before the first step.
    """

    def __init__(self) -> None:
        self.sources: Sequence[AddsLosses] = ()
        self.samples: int | None = None
        self.shown: Mapping[str, float] = {}
        self._sums: dict[str, Tensor] = {}
        self._steps, self._logged_step = 0, 0
        self.rate: float | None = None
        self._logged: dict[str, float] = {}  # sums of all logged steps of the run
        self._logged_steps = 0
        self._of_earlier_epochs: tuple[dict[str, float], int] = {}, 0

    def add(self, terms: Mapping[str, Tensor], weight: float) -> None:
        """Add the terms of a step, weighted by this process's share of the batch. An empty batch has no terms."""
        for name, term in terms.items():
            value = term.detach() if weight == 1.0 else term.detach() * weight
            previous = self._sums.get(name)
            self._sums[name] = value.float() if previous is None else previous + value
        self._steps += 1

    def means(self) -> dict[str, float]:
        """Means over the steps of this process since the last logging. Synchronises with the device."""
        return {name: float(value) / max(self._steps, 1) for name, value in self._sums.items()}

    def log_if_due(self, module: "LightningModule", further: Mapping[str, float]) -> None:
        """Log if the current step is a multiple of the Trainer's ``log_every_n_steps``."""
        step = module.trainer.global_step
        every: int = module.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self._steps and step % every == 0 and step > self._logged_step:  # step unchanged: gradients are accumulated
            self.log(module, further)

    def log(self, module: "LightningModule", further: Mapping[str, float]) -> None:
        """Log means over all processes, and ``further`` values, if there were steps since the last logging."""
        if not self._steps:
            return
        step = module.trainer.global_step
        names, sums = self._summed(module.device)
        values = [value / self._steps for value in sums]
        self._logged = _added(self._logged, names, sums)
        self._logged_steps += self._steps
        self._sums, self._steps, self._logged_step = {}, 0, step
        metrics = {f"train/{name}": value for name, value in zip(names, values, strict=True)}
        metrics["train/loss"] = sum(values)
        optimizer = module.optimizers()
        if isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "param_groups"):
            # The schedule may have changed the learning rate since the step.
            metrics["train/lr"] = optimizer.param_groups[0]["lr"] if self.rate is None else self.rate  # type: ignore[union-attr]
        self.shown = metrics = {**metrics, **further}
        for logger in module.loggers:
            logger.log_metrics(metrics, step=step)

    def epoch_means(self, device: torch.device) -> dict[str, float]:
        """Mean of each term and of the loss over the steps since the last call, and over all processes.

        Names are those of the log: ``train/ce``, ``train/loss``. Empty without steps. Called on all processes, once at
        the end of each epoch; synchronises with the device.
        """
        sums, steps = _added(self._logged, *self._summed(device)), self._logged_steps + self._steps
        earlier, count = self._of_earlier_epochs
        self._of_earlier_epochs = sums, steps
        if steps == count:
            return {}
        means = {name: (total - earlier.get(name, 0.0)) / (steps - count) for name, total in sums.items()}
        return {f"train/{name}": mean for name, mean in means.items()} | {"train/loss": sum(means.values())}

    def state_dict(self, device: torch.device) -> dict[str, Any]:
        """Sums that are not logged yet, as plain values. Called on all processes."""
        names, sums = self._summed(device)
        return {
            "sums": dict(zip(names, sums, strict=True)),
            "recorded": self._steps,
            "logged_step": self._logged_step,
            "logged": [self._logged, self._logged_steps],
            "of_earlier_epochs": list(self._of_earlier_epochs),
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        self._sums = {name: torch.tensor(value, device=device) for name, value in state["sums"].items()}
        self._steps, self._logged_step = state["recorded"], state["logged_step"]
        logged, self._logged_steps = state.get("logged", ({}, 0))  # missing in checkpoints of earlier releases
        earlier, count = state.get("of_earlier_epochs", ({}, 0))
        self._logged, self._of_earlier_epochs = dict(logged), (dict(earlier), count)

    def _summed(self, device: torch.device) -> tuple[list[str], list[float]]:
        """Names of the terms, and their sums over steps, as means over processes. Synchronises with the device."""
        names, nothing = all_names(self._sums), torch.zeros((), device=device)
        terms = [self._sums.get(name, nothing) for name in names]  # terms are missing where all batches were empty
        return names, all_sum(torch.stack(terms) / world_size()).tolist() if terms else []


def _added(sums: Mapping[str, float], names: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    """``sums`` and further values by name."""
    return {**sums, **{name: sums.get(name, 0.0) + value for name, value in zip(names, values, strict=True)}}
