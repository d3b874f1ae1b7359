"""What each step need not do: call hooks that nobody wrote, time what nobody looks at, update parameters one by one.

A step of Lightning calls some thirty hooks of the module, the strategy and each callback, nearly all empty; with
a small network and a small batch that takes as long as the network. `LeanOptimization` takes the same step with those
that are written. What it does not know (accumulated gradients, a gradient scaler, an optimizer that needs a closure, a
module with an ``optimizer_step`` of its own, another version of Lightning) is left to Lightning.
"""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

_FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
_DEVICES = ("cpu", "cuda")
_NOTHING: AbstractContextManager[Any] = nullcontext()
_MOMENTS = ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")
_STEPS = ("optimizer_step", "optimizer_zero_grad", "backward", "configure_gradient_clipping", "lr_scheduler_step")


class Unwatched(PassThroughProfiler):
    """Lightning's profiler that records nothing, without a generator for each of some forty sections of a step."""

    def profile(self, action_name: str) -> Any:
        return _NOTHING


@dataclass(frozen=True)
class _Hooks:
    """Hooks that are written, of callbacks and of the module."""

    callbacks: list[Callable[..., Any]]
    module: Callable[..., Any] | None


class LeanOptimization(_AutomaticOptimization):
    """A step of automatic optimisation: forward, zero gradients, backward, clip, step, and the hooks in between."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self._known: torch.optim.Optimizer | None = None
        self._hooks: dict[str, _Hooks | None] | None = None

    def run(self, optimizer: torch.optim.Optimizer, batch_idx: int, kwargs: OrderedDict[str, Any]) -> dict[str, Any]:
        if optimizer is not self._known:  # it is another one in each fit
            self._known, self._hooks = optimizer, _hooks(self.trainer, optimizer)
        if self._hooks is None:
            return super().run(optimizer, batch_idx, kwargs)
        trainer, progress = self.trainer, self.optim_progress.optimizer
        module, strategy = trainer.lightning_module, trainer.strategy
        module._current_fx_name = "training_step"
        loss = strategy.training_step(*kwargs.values())
        if not isinstance(loss, Tensor):
            raise TypeError(f"{type(module).__name__}: training_step gave {type(loss).__name__}; it must give a scalar")
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
        if trainer.gradient_clip_val is not None:
            trainer.precision_plugin._clip_gradients(
                module,
                optimizer,
                trainer.gradient_clip_val,
                gradient_clip_algorithm=trainer.gradient_clip_algorithm,
            )
        optimizer.step()
        progress.step.increment_completed()
        module._current_fx_name = None
        return {"loss": loss}

    def _call(self, name: str, *args: Any) -> None:
        if self._hooks is None or (hooks := self._hooks[name]) is None:
            return
        trainer = self.trainer
        module = trainer.lightning_module
        module._current_fx_name = name
        for hook in hooks.callbacks:
            hook(trainer, module, *args)
        if hooks.module is not None:
            hooks.module(*args)


def _hooks(trainer: Trainer, optimizer: torch.optim.Optimizer) -> dict[str, _Hooks | None] | None:
    """The hooks of the moments of a step; None where it has to be Lightning's."""
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


def install(trainer: Trainer) -> None:
    """Make the steps of a Trainer lean, where it is the Lightning that this was written for."""
    own: Any = trainer
    if type(own.profiler) is PassThroughProfiler:
        own.profiler = Unwatched()
    loop = own.fit_loop.epoch_loop
    if type(loop.automatic_optimization) is _AutomaticOptimization:
        loop.automatic_optimization = LeanOptimization(trainer)

        ask, names = loop._build_kwargs, dict[type, tuple[str, ...]]()

        def arguments(kwargs: OrderedDict[str, Any], batch: Any, batch_idx: int) -> OrderedDict[str, Any]:
            # Lightning looks at the signature of training_step anew in each step.
            kind, values = type(own.lightning_module), {"batch": batch, "batch_idx": batch_idx}
            if kind not in names:
                names[kind] = tuple(ask(OrderedDict(), batch, batch_idx))
            return OrderedDict((name, values[name]) for name in names[kind])

        loop._build_kwargs = arguments


def fuse(optimizer: torch.optim.Optimizer) -> None:
    """Let SGD, Adam and AdamW update all parameters in one pass, where neither ``fused`` nor ``foreach`` was given.

    The flag is set on the groups, not in the constructor, so that gradients may still be clipped under mixed precision:
    an optimizer that was made a fused one also claims to unscale gradients itself.
    """
    if type(optimizer) not in _FUSED:
        return
    for group in optimizer.param_groups:
        told = any(group.get(key) for key in ("fused", "foreach", "capturable", "differentiable"))
        told |= group.get("fused") is False or group.get("foreach") is False
        plain = all(p.is_floating_point() and p.device.type in _DEVICES for p in group["params"])
        if told or not plain or isinstance(group["lr"], Tensor) or group.get("dampening"):
            continue
        group["fused"] = True
        if group.get("momentum"):
            # A fused SGD cannot begin with some parameters and take others in later. From 0 its first step is the same.
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
