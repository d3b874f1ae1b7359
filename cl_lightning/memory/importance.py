"""Importance of each weight for earlier tasks, and the quadratic penalty on its changes.

:class:`Importance` keeps an anchor and an importance per weight and computes the penalty of EWC, SI, MAS and L2.
Importances that are measured along the path of training (SI, RWalk) are in ``cl_lightning.memory.paths``, importances
that are measured on data (EWC, MAS) in ``cl_lightning.memory.sensitivity``. Parameters are identified by their names in
``named_parameters``.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from cl_lightning.memory.growing import GrowingBuffers, restore_shapes

Tensors = Mapping[str, Tensor]


class NamedBuffers(GrowingBuffers):
    """Buffers by kind and parameter name, such as the anchor of ``backbone.conv.weight``.

    The buffer is called ``anchor/backbone/conv/weight``: names of buffers may not contain dots. Buffers without a slash
    in their name, which a subclass registers, are always present. The other buffers, and all shapes and dtypes, come
    from the state dict that is loaded.
    """

    def _get(self, kind: str) -> dict[str, Tensor]:
        start = f"{kind}/"
        buffers = ((key, buffer) for key, buffer in self._buffers.items() if buffer is not None)
        return {key.removeprefix(start).replace("/", "."): b for key, b in buffers if key.startswith(start)}

    def _set(self, kind: str, name: str, value: Tensor) -> None:
        if "/" in name:
            raise ValueError(f"{type(self).__name__}: a parameter is named {name!r}; use a name without '/'")
        self.register_buffer(f"{kind}/{name.replace('.', '/')}", value.detach().clone())

    def _clear(self) -> None:
        for key in [key for key in self._buffers if "/" in key]:
            del self._buffers[key]

    def num_bytes(self) -> int:
        """Size of all buffers in bytes."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def restore_buffers(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        scalars = {key: buffer for key, buffer in self._buffers.items() if "/" not in key and buffer is not None}
        if any(prefix + key not in state_dict for key in scalars):
            return  # the state dict has nothing for this module
        device = next(iter(scalars.values())).device
        self._clear()
        own = (key.removeprefix(prefix) for key in state_dict if key.startswith(prefix))
        named = [name for name in own if "." not in name and "/" in name]
        for name in named:
            self.register_buffer(name, torch.empty(0, device=device))
        restore_shapes(self, state_dict, prefix, [*scalars, *named])


class _Quadratic(torch.autograd.Function):
    """``sum_j omega_j (theta_j - anchor_j)^2`` over lists of tensors; the forward pass computes the gradient too."""

    @staticmethod
    def forward(ctx: Any, anchors: list[Tensor], omegas: list[Tensor], *parameters: Tensor) -> Tensor:
        gaps = torch._foreach_sub(parameters, anchors)
        pulls = torch._foreach_mul(gaps, omegas)
        ctx.save_for_backward(*pulls)
        # An inner product writes no intermediate tensor, unlike a product that is summed.
        return torch.stack([torch.dot(g.flatten(), p.flatten()) for g, p in zip(gaps, pulls, strict=True)]).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *torch._foreach_mul(ctx.saved_tensors, 2 * gradient)


class Importance(NamedBuffers):
    """Quadratic penalty on the distance of each weight from an anchor, weighted by the weight's importance.

        P(theta) = sum_j omega_j (theta_j - anchor_j)^2 + offset

    EWC (Kirkpatrick et al., PNAS 2017, arXiv:1612.00796) uses lambda/2 P, MAS (arXiv:1711.09601) lambda P or
    lambda/2 P, SI (arXiv:1703.04200) c P; the caller applies the factor. The update after each task depends on the
    method:

        add       exact sum of all tasks' penalties (EWC with one term per task)
        merge     omega <- decay * omega + new, anchor <- theta (online EWC; decay 1: SI, MAS)
        average   omega <- alpha * omega + (1 - alpha) * new, anchor <- theta (FACIL's EWC and MAS)
        anchor_at omega <- constant, anchor <- theta (L2)

    Parameters without a stored importance (blocks by which a head has grown since) and stored names that are not among
    the given parameters contribute no penalty. State is in buffers, whose shapes come from the state dict that is
    loaded. It is the same on all processes if parameters and importances are.
    """

    kept_as: ClassVar[str] = "importance"
    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.zeros(()))

    def __len__(self) -> int:
        """Number of parameters with an importance."""
        return len(self.anchors)

    def __bool__(self) -> bool:
        return any(key.startswith("anchor/") for key in self._buffers)

    @property
    def anchors(self) -> dict[str, Tensor]:
        return self._get("anchor")

    @property
    def omegas(self) -> dict[str, Tensor]:
        """Importances by name: of the shape of the parameter, or a scalar for all of its weights."""
        return self._get("omega")

    def penalty(self, parameters: Tensors) -> Tensor:
        """P(theta), a scalar with gradient; 0 before the first task has ended.

        Args:
            parameters: The present weights theta, by name.

        Raises:
            ValueError: If the shape of a parameter differs from the shape of its anchor, or if no name has an
                importance (names with a missing or an additional prefix).
        """
        if not self:
            return torch.zeros_like(self.offset)
        weights, anchors, omegas = self._matched(parameters)
        value: Tensor = _Quadratic.apply(anchors, omegas, *weights.values())
        return value + self.offset.to(value.dtype)

    @torch.no_grad()
    def gradient(self, parameters: Tensors, factor: float = 1.0) -> dict[str, Tensor]:
        """``factor * dP/dtheta`` by name, with ``dP/dtheta = 2 omega (theta - anchor)``, without a backward pass."""
        if not self:
            return {}
        weights, anchors, omegas = self._matched(parameters)
        pulls = torch._foreach_sub(list(weights.values()), anchors)
        torch._foreach_mul_(pulls, omegas)
        torch._foreach_mul_(pulls, 2.0 * factor)
        return dict(zip(weights, pulls, strict=True))

    def _matched(self, parameters: Tensors) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
        anchors, omegas = self.anchors, self.omegas
        weights = {name: parameters[name] for name in anchors if name in parameters}
        if not weights:
            raise ValueError(
                f"Importance: none of its parameters ({next(iter(anchors))}, ...) is among those given "
                f"({next(iter(parameters), 'none')}, ...); take the names from the same module as for the importances"
            )
        for name, weight in weights.items():
            if weight.shape != anchors[name].shape:  # broadcasting would hide the mistake
                raise ValueError(
                    f"Importance: {name} has shape {tuple(weight.shape)}, its anchor {tuple(anchors[name].shape)}; "
                    "let a layer grow by new parameters instead of reshaping one"
                )
        return weights, [anchors[name] for name in weights], [omegas[name] for name in weights]

    @torch.no_grad()
    def add(self, parameters: Tensors, omega: Tensors) -> None:
        """Add the quadratic ``sum_j omega_j (theta_j - parameters_j)^2``, exactly, value and gradient.

        A sum of quadratics is one quadratic, so the memory does not grow with the number of tasks:

            F (t - a)^2 + G (t - b)^2 = (F + G) (t - m)^2 + F G / (F + G) (a - b)^2,   m = (F a + G b) / (F + G)

        Args:
            parameters: Minimum of the new term, by name.
            omega: Importances, at least 0, by name; all names are in ``parameters``.
        """
        anchors, omegas = self.anchors, self.omegas
        for name, new in omega.items():
            theta = parameters[name].detach()
            if name in anchors:
                total = omegas[name] + new
                share = torch.where(total > 0, new / total, 1.0)  # with total importance 0 any anchor will do
                constant = (omegas[name] * share * (theta - anchors[name]).square()).sum()
                self.offset = self.offset.to(constant.dtype) + constant
                self._set("anchor", name, torch.lerp(anchors[name], theta, share))
                self._set("omega", name, total)
            else:
                self._set("anchor", name, theta)
                self._set("omega", name, new)

    def merge(self, parameters: Tensors, omega: Tensors, decay: float = 1.0) -> None:
        """Multiply the old importances by ``decay``, add the new ones, and set the anchor to the given weights.

        Online EWC (Schwarz et al., Progress & Compress, ICML 2018, arXiv:1805.06370); SI and MAS with decay 1.

        Args:
            parameters: The new anchors, by name.
            omega: New importances by name; all names are in ``parameters``.
            decay: Factor of the old importances, in [0, 1].
        """
        self._blend(parameters, omega, decay, 1.0)

    def average(self, parameters: Tensors, omega: Tensors, alpha: float = 0.5) -> None:
        """Average old and new importances and set the anchor to the given weights (FACIL, arXiv:2010.15277).

        Args:
            parameters: The new anchors, by name.
            omega: New importances by name; all names are in ``parameters``.
            alpha: Weight of the old importances, in [0, 1]. They are 0 before the first task, as in FACIL, so the
                importances of the first task are multiplied by ``1 - alpha``.
        """
        self._blend(parameters, omega, alpha, 1 - alpha)

    @torch.no_grad()
    def _blend(self, parameters: Tensors, omega: Tensors, keep: float, take: float) -> None:
        omegas = self.omegas
        self.offset = torch.zeros_like(self.offset)
        # The order is the same on all processes, which exchange buffers by position.
        for name in dict.fromkeys((*omegas, *omega)):
            old, new = omegas.get(name), omega.get(name)
            terms = ([] if old is None else [keep * old]) + ([] if new is None else [take * new])
            self._set("omega", name, sum(terms[1:], start=terms[0]))
            if new is not None or name in parameters:
                self._set("anchor", name, parameters[name])

    def anchor_at(self, parameters: Tensors, omega: float = 1.0) -> None:
        """Reset to the given weights as anchor, with one importance for all of them.

        This is L2 to the previous weights (Smith et al., CVPR-W 2023, arXiv:2203.17269).

        Args:
            parameters: The new anchors, by name.
            omega: Importance of every weight, at least 0; one number per parameter is stored.
        """
        self._clear()
        self.offset = torch.zeros_like(self.offset)
        for name, value in parameters.items():
            self._set("anchor", name, value)
            self._set("omega", name, torch.full((), omega, dtype=value.dtype, device=value.device))
