"""Parameter-efficient fine-tuning: small modules that are inserted into a model from outside and can be removed.

A `Peft` is built for a model and registers hooks on it. The model's modules, parameters and parameter names do not
change; the ``Peft`` holds the new parameters, so its state dict contains them alone. ``disabled()`` restores the
original model temporarily, ``remove()`` permanently, both exactly. ``merge()`` folds a linear change (LoRA, SSF, FiLM)
into the model's weights, after which it costs no computation. A deep copy of a module that contains model and ``Peft``
gives an independent pair with hooks of its own.

A block of a timm transformer computes ``x' = x + Attn(LN1(x))``, ``y = x' + MLP(LN2(x'))``. Classes that need such
blocks document it; SSF, FiLM and LoRA are inserted into any model, by the type and name of its layers.
"""

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Site(nn.Module):
    """Insertion point of a PEFT module: its parameters, and the change it makes to the activations there.

    Hooks are bound methods, so a deep copy of the model and its ``Peft`` has hooks of its own.
    """

    enabled: bool = True

    def __init__(self) -> None:
        super().__init__()
        self.handles: list[RemovableHandle] = []

    def hook_output(self, host: nn.Module, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Replace the output of ``host`` by ``function(input, output)``, a bound method of a site."""
        self.handles.append(host.register_forward_hook(_Output(self, function)))

    def hook_input(self, host: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        """Replace the first input of ``host`` by ``function(input)``, a bound method of a site."""
        self.handles.append(host.register_forward_pre_hook(_Input(self, function)))


class _Output:
    def __init__(self, site: Site, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.site, self.function = site, function

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return self.function(args[0], output) if self.site.enabled else None


class _Input:
    def __init__(self, site: Site, function: Callable[[Tensor], Tensor]) -> None:
        self.site, self.function = site, function

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (self.function(args[0]), *args[1:]) if self.site.enabled else None


class Peft(nn.Module):
    """Base class of modules that are inserted into a model.

    Attributes:
        sites: One site per insertion point.
        trains_model: Whether the model's own parameters are trained and nothing is inserted.
    """

    trains_model: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.sites = nn.ModuleList()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Context manager: inside, the model computes its original function."""
        before = [site.enabled for site in self._sites()]
        self._enable(False)
        try:
            yield
        finally:
            for site, enabled in zip(self._sites(), before, strict=True):
                site.enabled = enabled

    @contextmanager
    def replaced_by(self, other: "Peft") -> Iterator[None]:
        """Context manager: inside, this module is disabled and ``other``, otherwise disabled, is enabled."""
        with self.disabled():
            other._enable(True)
            try:
                yield
            finally:
                other._enable(False)

    def remove(self) -> None:
        """Remove all hooks; the model then computes its original function."""
        for site in self._sites():
            for handle in site.handles:
                handle.remove()
            site.handles.clear()

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the change into the weights of the model, then remove the hooks.

        Raises:
            ValueError: If the change depends on the input and cannot be expressed by weights.
        """
        raise ValueError(
            f"{type(self).__name__}: its change depends on the input and cannot be merged into weights; use LoRA, SSF "
            "or FiLM"
        )

    def _enable(self, enabled: bool) -> None:
        for site in self._sites():
            site.enabled = enabled

    def _sites(self) -> Iterator[Site]:
        return (cast(Site, site) for site in self.sites)


PeftFactory = Callable[[nn.Module], Peft]


class WholeModel(Peft):
    """Full fine-tuning: inserts nothing, the model's own parameters are trained.

    Args:
        model: The model.
    """

    trains_model: ClassVar[bool] = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()

    def merge(self) -> None:
        """No effect: nothing was inserted."""


def blocks_of(model: nn.Module, chosen: Sequence[int] | None, owner: str) -> list[nn.Module]:
    """Blocks of a transformer as built by timm, in order.

    Args:
        model: Contains the blocks, at any depth.
        chosen: Indices of blocks, negative from the end; None for all.
        owner: Name of the caller, for messages.

    Raises:
        ValueError: If the model has no transformer blocks, or no blocks with these indices.
    """
    parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp")
    found = [module for module in model.modules() if all(_has(module, part) for part in parts)]
    if not found:
        raise ValueError(
            f"{owner}: {type(model).__name__} has no transformer blocks with {', '.join(parts)}; use a ViT of timm, or "
            "LoRA, SSF or FiLM, which support other models"
        )
    if chosen is None:
        return found
    if not chosen or any(not -len(found) <= index < len(found) for index in chosen):
        raise ValueError(f"{owner}: blocks {list(chosen)}; the model has blocks 0 to {len(found) - 1}")
    return [found[index] for index in sorted({index % len(found) for index in chosen})]


def layers_of(
    model: nn.Module, kinds: tuple[type[nn.Module], ...], targets: Sequence[str] | None, owner: str
) -> list[nn.Module]:
    """Layers of given types, in the order of their names in the model.

    Args:
        model: Contains the layers.
        kinds: Layer classes.
        targets: Patterns of names, such as ``*.attn.qkv``; None for all. Names are relative to the model, or to its
            submodule ``model`` if there is one (as in ``Timm``).
        owner: Name of the caller, for messages.

    Raises:
        ValueError: If there is no such layer, or a pattern matches none.
    """
    layers = [(name.removeprefix("model."), layer) for name, layer in model.named_modules() if isinstance(layer, kinds)]
    words = ", ".join(kind.__name__.strip("_") for kind in kinds)
    patterns = ["*"] if targets is None else targets
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name, _ in layers):
            names = ", ".join(name for name, _ in layers[:8]) or "none"
            raise ValueError(f"{owner}: no layer ({words}) of the model matches {pattern!r}; there are: {names}")
    return [layer for name, layer in layers if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def _has(module: nn.Module, path: str) -> bool:
    for name in path.split("."):
        if not isinstance(getattr(module, name, None), nn.Module):
            return False
        module = getattr(module, name)
    return True


def _part(module: nn.Module, path: str) -> nn.Module:
    return module.get_submodule(path)


def _width(block: nn.Module) -> int:
    return cast(nn.Linear, _part(block, "attn.qkv")).in_features
