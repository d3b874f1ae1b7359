"""A backbone with a head that grows."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cl_lightning.models.heads import Head

Module = TypeVar("Module", bound=nn.Module)
HeadKind = TypeVar("HeadKind", bound=Head)


class Output(NamedTuple):
    """Output of one forward pass.

    Attributes:
        features: Features of the backbone, ``(B, d)``.
        logits: One logit per class seen so far, in order of arrival, ``(B, columns)``.
        maps: Feature map at the end of each stage, before its ReLU, ``(B, C, H, W)`` each; empty unless the network
            ``gives_maps``.
    """

    features: Tensor
    logits: Tensor
    maps: tuple[Tensor, ...] = ()


def head_as(network: "Network", kind: type[HeadKind], owner: object, reason: str) -> HeadKind:
    """The head of a network, for a method that works with one kind of head only.

    Args:
        network: The network.
        kind: Class of the head.
        owner: Object to name in the error.
        reason: Why, as a relative clause for the error, such as "whose rows can be imprinted".

    Raises:
        ValueError: If the head is of another kind.
    """
    head = network.head
    if not isinstance(head, kind):
        article = "an" if kind.__name__[0] in "AEIO" else "a"
        raise ValueError(
            f"{type(owner).__name__}: head is {type(head).__name__}; use {article} {kind.__name__}, {reason}"
        )
    return head


def joined(outputs: Sequence[Output]) -> Output:
    """Output of several forward passes, at least one, row after row."""
    if len(outputs) == 1:
        return outputs[0]
    features, logits = (torch.cat(parts) for parts in zip(*((x.features, x.logits) for x in outputs), strict=True))
    return Output(features, logits, tuple(torch.cat(parts) for parts in zip(*(x.maps for x in outputs), strict=True)))


def perceptron(*sizes: int) -> nn.Sequential:
    """Linear layers with a ReLU between each two, such as the projection of a contrastive loss.

    Args:
        sizes: Number of inputs, of the units of each hidden layer, and of outputs; at least 2 numbers.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def batch_norms(module: nn.Module) -> Iterator[nn.Module]:
    """The batch normalisation layers of a module; a strategy freezes them by returning them from ``frozen``."""
    return (layer for layer in module.modules() if isinstance(layer, _BatchNorm))


class Network(nn.Module):
    """Backbone and head: images ``(B, C, H, W)`` to :class:`Output`.

    Args:
        backbone: Images to features ``(B, d)``.
        head: Features to logits ``(B, columns)``.
        backbone_is_frozen: Whether the backbone keeps its initial weights in all tasks.

    Attributes:
        gives_maps: Whether the output has the maps of the stages of the backbone (``Backbone.has_maps``), for methods
            that compare them with the maps of a teacher. A frozen copy of the network gives them too.
    """

    def __init__(self, backbone: nn.Module, head: Head, *, backbone_is_frozen: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.backbone_is_frozen = backbone_is_frozen
        self.gives_maps = False

    def forward(self, images: Tensor) -> Output:
        maps: list[Tensor] = []
        features = self.backbone(images, maps) if self.gives_maps else self.backbone(images)
        return Output(features, self.head(features), tuple(maps))

    def classify(self, images: Tensor) -> Tensor:
        """Scores ``(B, columns)`` for predictions, of images ``(B, C, H, W)``."""
        return self.head.classify(self.backbone(images))


def frozen_copy(module: Module) -> Module:
    """Deep copy of a module in eval mode whose parameters require no gradient."""
    return copy.deepcopy(module).eval().requires_grad_(False)


class Temporary(nn.Module):
    """A module that exists only during some tasks; when a state dict is loaded, it exists if the state has it.

    Args:
        make: Builds the module. A method or a function of a module, so that a copy of its owner calls its own.

    Attributes:
        module: The module, or None.
    """

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.make = make
        self.module: nn.Module | None = None

    def __bool__(self) -> bool:
        return self.module is not None

    def create(self) -> None:
        """Build the module, in place of the present one."""
        self.module = self.make()

    def remove(self) -> None:
        self.module = None

    def forward(self, *inputs: Any) -> Any:
        """Output of the module.

        Raises:
            RuntimeError: If the module does not exist.
        """
        if self.module is None:
            raise RuntimeError("Temporary: call create before the module is used")
        return self.module(*inputs)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if not any(key.startswith(f"{prefix}module.") for key in state_dict):
            self.module = None
        elif self.module is None:
            with torch.random.fork_rng(devices=[]):  # the initial values are overwritten by the state dict
                self.create()
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Context in which a module is in eval mode; at its end each submodule has its earlier mode again."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def uncompiled(network: nn.Module) -> Iterator[None]:
    """Context in which compiled modules of a network run as they are written, with their hooks and any weights."""
    compiled = [(module, call) for module in network.modules() if (call := module._compiled_call_impl) is not None]
    for module, _ in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled:
            module._compiled_call_impl = call
