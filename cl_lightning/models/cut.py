"""A network cut at one of its modules: what is computed before it, and rows that enter behind it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cl_lightning.checks import matching


def joined_rows(network: nn.Module) -> int:
    """Number of rows of the last output of a network that joined it at a :class:`Cut`, after the rows of its input."""
    cut: Cut | None = getattr(network, "_cut", None)
    return 0 if cut is None else cut.joined


class Cut:
    """Output of one module of a network, which further rows can join on the next forward pass.

    With the activations a(x) at the cut, the network is f(x) = top(a(x)). After ``insert(r)`` the next forward pass of
    images x gives the rows of ``top([a(x), r])``, so that stored activations r are trained on as images are, from the
    cut upwards. The network keeps its modules and the names of its parameters.

    Args:
        owner: Name for errors.
        network: Any module of one input with one row per sample; it is run once, on a blank input.
        name: Name of a module of it, such as ``layers.2``, ``layer3`` or ``model.blocks.5``, which returns a tensor
            with one row per sample.
        shape: Shape of an input of the network, without the rows.

    Attributes:
        below: Modules that are called before the output of the cut and not after it, the cut included.
        parameters_below: Parameters on which the activations depend.
        joined: Number of rows that joined the last forward pass.

    Raises:
        ValueError: If there is no such module, it is called more than once or returns no tensor, or if the output of
            the network depends on its input by another way than the cut.
    """

    def __init__(self, owner: str, network: nn.Module, name: str, shape: tuple[int, ...]) -> None:
        modules = dict(network.named_modules())
        matching(owner, (found for found in modules if found), latent_layer=[name])
        self._owner, self._name, self._module = owner, name, modules[name]
        self.joined = 0
        self._inserted: Tensor | None = None
        self._found: Tensor | None = None
        self.below, self.parameters_below = self._trace(network, shape)
        self._module.register_forward_hook(self._join)
        object.__setattr__(network, "_cut", self)

    def insert(self, rows: Tensor | None) -> None:
        """Let activations ``(n, ...)`` join the next forward pass, after the rows of its input; None for none."""
        self._inserted = rows

    @torch.no_grad()
    def activations(self, network: nn.Module, inputs: Tensor) -> Tensor:
        """Activations at the cut, ``(B, ...)`` in float32, of inputs ``(B, ...)`` of the network."""
        handle = self._module.register_forward_hook(self._note)
        try:
            network(inputs)
        finally:
            handle.remove()
        found, self._found = self._found, None
        assert found is not None
        return found.detach().float()

    def _note(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._found = output

    def _join(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        rows, self._inserted = self._inserted, None
        self.joined = 0 if rows is None else len(rows)
        if rows is None:
            return output
        return torch.cat([output, rows.to(output)])

    def _trace(self, network: nn.Module, shape: tuple[int, ...]) -> tuple[list[nn.Module], list[nn.Parameter]]:
        like = next(network.parameters())
        calls: list[nn.Module] = []
        outputs: list[Any] = []

        def cut(module: nn.Module, inputs: Any, output: Any) -> Tensor:
            if outputs or not isinstance(output, Tensor):
                what = "is called more than once" if outputs else f"returns a {type(output).__name__}"
                raise ValueError(
                    f"{self._owner}: latent_layer {self._name!r} {what}; name a module that returns one tensor"
                )
            outputs.append((output, len(calls)))
            return output.detach().requires_grad_()

        def note(called: nn.Module) -> Callable[..., None]:
            return lambda *_: calls.append(called)

        handles = [module.register_forward_hook(note(module)) for module in network.modules()]
        handles.append(self._module.register_forward_hook(cut))
        mode, needed = network.training, [parameter.requires_grad for parameter in network.parameters()]
        try:
            network.eval().requires_grad_(True)
            with torch.enable_grad():
                inputs = torch.zeros(2, *shape, device=like.device, dtype=like.dtype, requires_grad=True)
                features = network(inputs)
                if not outputs:
                    raise ValueError(
                        f"{self._owner}: latent_layer {self._name!r} is not called; name a module of the forward pass"
                    )
                activations, count = outputs[0]
                parameters = list(network.parameters())
                around = torch.autograd.grad(features.sum(), inputs, allow_unused=True, retain_graph=True)[0]
                if around is not None or len(activations) != len(features):
                    raise ValueError(
                        f"{self._owner}: latent_layer {self._name!r} does not cut the network: its output "
                        "depends on the images in another way too; name a module that all of it passes through"
                    )
                gradients = torch.autograd.grad(activations.sum(), [inputs, *parameters], allow_unused=True)[1:]
        finally:
            for handle in handles:
                handle.remove()
            network.train(mode)
            for parameter, required in zip(network.parameters(), needed, strict=True):
                parameter.requires_grad_(required)
        after = {id(module) for module in calls[count:]}
        below = [module for module in dict.fromkeys(calls[:count]) if id(module) not in after]
        found = [p for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None]
        return below, found
