"""A training step without the overhead of Lightning's empty hooks and of its profiler.

A step of Lightning calls about thirty hooks of the module, the strategy and each callback, nearly all of them empty.
For a small network and a small batch these calls take as long as the network. `FastOptimization` takes the same step
and calls only the hooks that are overridden. All other cases (accumulated gradients, a gradient scaler, an optimizer
that needs a closure, a module that overrides ``optimizer_step``, another version of Lightning) use Lightning's own
step.
"""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from cl_lightning.lightning_private import AutomaticOptimization, clip_gradients, set_hook

_NOTHING: AbstractContextManager[Any] = nullcontext()
_MOMENTS = ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")
_STEPS = ("optimizer_step", "optimizer_zero_grad", "backward", "configure_gradient_clipping", "lr_scheduler_step")


class SilentProfiler(PassThroughProfiler):
    """A profiler that records nothing; Lightning's default one creates a generator for each of ~40 parts of a step."""

    def profile(self, action_name: str) -> Any:
        return _NOTHING


@dataclass(frozen=True)
class _Hooks:
    """Hooks of one name that callbacks and the module override."""

    callbacks: list[Callable[..., Any]]
    module: Callable[..., Any] | None


class FastOptimization(AutomaticOptimization):
    """One step of automatic optimisation: forward, zero gradients, backward, clip, step, and the overridden hooks."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self._known: torch.optim.Optimizer | None = None
        self._hooks: dict[str, _Hooks | None] | None = None

    def run(self, optimizer: torch.optim.Optimizer, batch_idx: int, kwargs: OrderedDict[str, Any]) -> dict[str, Any]:
        if optimizer is not self._known:  # each fit has a new optimizer
            self._known, self._hooks = optimizer, _hooks(self.trainer, optimizer)
        if self._hooks is None:
            return super().run(optimizer, batch_idx, kwargs)
        trainer, progress = self.trainer, self.optim_progress.optimizer
        module, strategy = trainer.lightning_module, trainer.strategy
        set_hook(module, "training_step")
        loss = strategy.training_step(*kwargs.values())
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"{type(module).__name__}: training_step returned {type(loss).__name__}; it must return a scalar tensor"
            )
        progress.zero_grad.increment_ready()
        self._call("on_before_zero_grad", optimizer)
        progress.zero_grad.increment_started()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        progress.zero_grad.increment_completed()
        strategy.pre_backward(loss)
        self._call("on_before_backward", loss)
        loss.backward()  # type: ignore[no-untyped-call]
        loss = loss.detach()
        self._call("on_after_backward")
        strategy.post_backward(loss)
        progress.step.increment_ready()
        self._call("on_before_optimizer_step", optimizer)
        clip_gradients(trainer, module, optimizer)
        optimizer.step()
        progress.step.increment_completed()
        set_hook(module, None)
        return {"loss": loss}

    def _call(self, name: str, *args: Any) -> None:
        if self._hooks is None or (hooks := self._hooks[name]) is None:
            return
        trainer = self.trainer
        module = trainer.lightning_module
        set_hook(module, name)
        for hook in hooks.callbacks:
            hook(trainer, module, *args)
        if hooks.module is not None:
            hooks.module(*args)


def _hooks(trainer: Trainer, optimizer: torch.optim.Optimizer) -> dict[str, _Hooks | None] | None:
    """Overridden hooks of a step, by name; None if the step has to be Lightning's."""
    own: Any = trainer
    module, strategy, precision = own.lightning_module, own.strategy, own.precision_plugin
    plain = (
        type(strategy) in (SingleDeviceStrategy, DDPStrategy)
        and (type(precision) is Precision or (type(precision) is MixedPrecision and precision.scaler is None))
        and own.accumulate_grad_batches == 1
        and type(optimizer).__module__.startswith("torch.optim.")
        and not isinstance(optimizer, torch.optim.LBFGS)
        and not any(_written(module, name, LightningModule) for name in _STEPS)
    )
    if not plain:
        return None
    found: dict[str, _Hooks | None] = {}
    for name in _MOMENTS:
        callbacks = [getattr(callback, name) for callback in own.callbacks if _written(callback, name, Callback)]
        of_module = getattr(module, name) if _written(module, name, LightningModule) else None
        found[name] = _Hooks(callbacks, of_module) if callbacks or of_module is not None else None
    return found


def _written(owner: Any, name: str, base: type) -> bool:
    return name in vars(owner) or getattr(type(owner), name) is not getattr(base, name)


def install_fast_steps(trainer: Trainer) -> None:
    """Replace the default optimisation and the default profiler of a Trainer; others are left as they are."""
    own: Any = trainer
    if type(own.profiler) is PassThroughProfiler:
        own.profiler = SilentProfiler()
    loop = own.fit_loop.epoch_loop
    if type(loop.automatic_optimization) is AutomaticOptimization:
        loop.automatic_optimization = FastOptimization(trainer)

        build_kwargs, names = loop._build_kwargs, dict[type, tuple[str, ...]]()

        def arguments(kwargs: OrderedDict[str, Any], batch: Any, batch_idx: int) -> OrderedDict[str, Any]:
            # Lightning inspects the signature of training_step in each step; here it is inspected once per class.
            kind, values = type(own.lightning_module), {"batch": batch, "batch_idx": batch_idx}
            if kind not in names:
                names[kind] = tuple(build_kwargs(OrderedDict(), batch, batch_idx))
            return OrderedDict((name, values[name]) for name in names[kind])

        loop._build_kwargs = arguments
