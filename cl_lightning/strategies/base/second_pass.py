"""The second gradient of a step with an optimizer such as SAM: the same losses at perturbed weights."""

from typing import Any

import torch
from torch import Tensor, nn

from cl_lightning.batch import Batch, mix
from cl_lightning.distributed import rank
from cl_lightning.optim import SAM
from cl_lightning.strategies.base.virtual import mean_gradient, no_half_precision


def seed_layers(batch: Batch, device: torch.device) -> None:
    """Seed the global generators for the layers that draw numbers, such as dropout, by the batch as it arrived."""
    key = mix(batch.draw.key, 0xD80, rank())
    torch.default_generator.manual_seed(key)
    if device.type == "cuda":
        torch.cuda.manual_seed(key)


class SecondPass:
    """Keeps the prepared batches of a step, and replaces its gradients by the gradients at perturbed weights.

    The layers draw the same numbers as in the first pass, and the buffers of the network keep their values of the first
    pass. Under ``16-mixed`` the pass is in single precision, since half precision would need a loss scale of its own.
    """

    def __init__(self, strategy: Any) -> None:
        self._strategy = strategy
        self._batches: list[tuple[Batch, Batch]] = []
        self._keeps = False

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Called when the optimizer of a phase was built."""
        self._batches, self._keeps = [], isinstance(optimizer, SAM)

    def keep(self, arrived: Batch, prepared: Batch) -> None:
        """Keep a batch until the next optimizer step, if the optimizer needs a second pass."""
        if self._keeps:
            self._batches.append((arrived, prepared))

    def run(self, optimizer: torch.optim.Optimizer) -> None:
        """Replace the gradients, if the optimizer needs a second pass. Every process must call this.

        Raises:
            ValueError: If the losses of the strategy change buffers outside the network, which would happen twice.
        """
        if not isinstance(optimizer, SAM):
            return
        batches, self._batches = self._batches, []
        module: nn.Module = self._strategy
        own = {
            id(value) for group in optimizer.param_groups for value in group["params"]
        }  # others may have old gradients
        parameters = {
            name: value for name, value in module.named_parameters() if id(value) in own and value.grad is not None
        }
        buffers = {name: value for name, value in module.named_buffers() if name.startswith("network.")}
        before = {name: value.clone() for name, value in buffers.items()}
        others = {name: (value, value._version) for name, value in module.named_buffers() if name not in buffers}
        with optimizer.perturbed():
            total: dict[str, Tensor] = {}
            for arrived, prepared in batches:
                seed_layers(arrived, self._strategy.device)
                gradient = mean_gradient(self._loss(prepared), parameters, prepared.weight)
                total = {name: total[name] + part if name in total else part for name, part in gradient.items()}
            share = 1 / getattr(self._strategy.trainer, "accumulate_grad_batches", 1)
            for name, part in total.items():
                # In place: with DDP it may be a view of a bucket.
                parameters[name].grad.copy_(part * share if share != 1 else part)  # type: ignore[union-attr]
        with torch.no_grad():
            for name, value in before.items():
                buffers[name].copy_(value)
        current = dict(module.named_buffers())
        changed = [name for name, (value, version) in others.items() if current.get(name) is not value]
        changed += [name for name, (value, version) in others.items() if value._version != version]
        if changed:
            raise ValueError(
                f"{type(self._strategy).__name__}: optimizer is {type(optimizer).__name__}, which computes the losses "
                f"twice per step, but the losses change the buffer {changed[0]!r}; use another optimizer"
            )

    def _loss(self, batch: Batch) -> Tensor | None:
        strategy = self._strategy
        if len(batch) == 0 and not strategy.traits.needs_empty_batches:
            return None
        with (
            torch.enable_grad(),
            strategy.trainer.precision_plugin.forward_context(),
            no_half_precision(strategy.device),
        ):
            loss = sum(strategy._loss_terms(batch).values())
        return loss if isinstance(loss, Tensor) and loss.requires_grad else None
