"""LAFTR: Function-space distance by linearised activations (Dhawan, Huang, Bae & Grosse, ICML 2023, arXiv:2302.03519).

The outputs for earlier tasks are held in expectation over a model of their inputs. With theta_k the parameters at the
end of task k, and z the logits of the classes of task k,

    L = CE + distance_weight / t sum_{k < t} E_x rho( z(x; theta_k), z(x; theta) )
    rho = 1/2 || softmax(z_k) - softmax(z) ||^2 (softmax),  KL( softmax(z_k) || softmax(z) ) (kl),  1/2 || z_k - z ||^2

The change D of the activations a is propagated through the layers, with the gates m of the ReLUs of the old network for
both, starting from a = x, D = 0:

    s = W_k a + b_k,   Ds = (W - W_k) a + (b - b_k) + W D,   a <- m * s,   D <- m * Ds,   z_k = s, z = s + Ds at the end

    lin_act   m = [s > 0]; the change of a ReLU to first order. Exact while no unit changes its sign.
    bern      m ~ Bernoulli(mu), independently for each unit and sample
    determ    E 1/2 || Ds ||^2 of ``bern`` in closed form, without sampling (:func:`expected_change`)

x ~ N(mean, covariance) of the inputs of task k, and mu is the mean of each unit's gate, [s > 0], over the training data
of task k without augmentation, at theta_k. With ``per_class`` each class has its own mean, covariance and mu.
The change behind a maximum pooling is the difference of the maxima.
Departs from the released code: its ``determ`` leaves out terms between a and D and the variance of gates, its ``bern``
draws one gate per unit for all samples, and mu is of the batches of the last epoch. No inputs are stored here.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import Batch, Draw, ImageShape
from cl_lightning.checks import at_least, one_of
from cl_lightning.distributed import all_sum
from cl_lightning.losses import full_precision
from cl_lightning.memory import NamedBuffers
from cl_lightning.models import LinearHead
from cl_lightning.strategies.base import LossClasses
from cl_lightning.strategy import ContinualStrategy, Output, Task, Traits

Estimator = Literal["lin_act", "bern", "determ"]
Distance = Literal["softmax", "kl", "logits"]
Covariance = Literal["full", "diagonal"]
Parameters = Mapping[str, tuple[Tensor, Tensor | None]]
"""Weight and bias of each linear layer and convolution by its place in the chain, and of the head under ``head``."""
HEAD = "head"
_KNOWN = (nn.Linear, nn.Conv2d, nn.ReLU, nn.Flatten, nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d)
_GROUPS, _INPUTS, _GATES = 0x1AF1, 0x1AF2, 0x1AF3  # salts


def linear_map(layer: nn.Module, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer or a convolution with another weight and bias."""
    if isinstance(layer, nn.Conv2d):
        moved: Tensor = layer._conv_forward(values, weight, bias)
        return moved
    return F.linear(values, weight, bias)


def change_of_outputs(
    chain: Iterable[nn.Module],
    old: Parameters,
    new: Parameters,
    inputs: Tensor,
    gates: Callable[[str, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs of a chain of layers and a head, and their change by linearised activations.

    Args:
        chain: Layers of the backbone, without their parameters; dropout has no effect.
        old: W_k, b_k by the place of the layer in the chain, ``"0"``, ``"1"``, ..., and ``"head"``.
        new: W, b.
        inputs: x, ``(n, ...)``.
        gates: Gates of a ReLU from its place and s, of the shape of s; None for ``[s > 0]``.

    Returns:
        Outputs s of the old parameters and their change Ds, each ``(n, classes)``.
    """
    a, change = inputs, torch.zeros_like(inputs)
    for place, layer in enumerate(chain):
        name = str(place)
        if isinstance(layer, nn.Linear | nn.Conv2d):
            a, change = _moved(partial(linear_map, layer), old[name], new[name], a, change)
        elif isinstance(layer, nn.ReLU):
            mask = (a > 0).to(a.dtype) if gates is None else gates(name, a)
            a, change = mask * a, mask * change
        elif isinstance(layer, nn.Dropout | nn.Dropout2d):
            continue
        elif isinstance(layer, nn.MaxPool2d):
            a, change = layer(a), layer(a + change) - layer(a)
        else:
            a, change = layer(a), layer(change)
    return _moved(F.linear, old[HEAD], new[HEAD], a, change)


def _moved(
    apply: Callable[..., Tensor],
    old: tuple[Tensor, Tensor | None],
    new: tuple[Tensor, Tensor | None],
    a: Tensor,
    change: Tensor,
) -> tuple[Tensor, Tensor]:
    """``W_k a + b_k`` and ``(W - W_k) a + (b - b_k) + W D``."""
    (weight, bias), (other, other_bias) = old, new
    shift = None if bias is None or other_bias is None else other_bias - bias
    return apply(a, weight, bias), apply(a, other - weight, shift) + apply(change, other, None)


def distance(logits: Tensor, change: Tensor, kind: Distance) -> Tensor:
    """rho of logits z_k and their change ``z - z_k``, each ``(n, classes)``; the mean over the rows."""
    logits, change = full_precision(logits), full_precision(change)
    if kind == "logits":
        return 0.5 * change.square().sum(dim=1).mean()
    before, after = logits.log_softmax(dim=1), (logits + change).log_softmax(dim=1)
    if kind == "kl":
        return (before.exp() * (before - after)).sum(dim=1).mean()
    return 0.5 * (before.exp() - after.exp()).square().sum(dim=1).mean()


def expected_change(
    chain: Iterable[nn.Module],
    old: Parameters,
    new: Parameters,
    mean: Tensor,
    covariance: Tensor,
    gates: Mapping[str, Tensor],
) -> Tensor:
    """``E 1/2 ||Ds||^2`` of the outputs over inputs of given moments and independent Bernoulli gates, in closed form.

    With u = [a; D], e = E u and M = E u u^T, a linear layer has A = [[W_k, 0], [W - W_k, W]], c = [b_k; b - b_k]:

        M <- A M A^T + (A e) c^T + c (A e)^T + c c^T,   e <- A e + c
        M <- M * (mu mu^T + diag(mu (1 - mu))) in each of the four blocks,   e <- [mu; mu] * e           at a ReLU

    Args:
        chain: Linear layers and ReLUs; flattening and dropout have no effect.
        old, new: As in :func:`change_of_outputs`.
        mean: ``(d,)``.
        covariance: ``(d, d)``.
        gates: mu of each ReLU by its place, ``(units,)``.
    """
    size = len(mean)
    e, m = torch.cat([mean, torch.zeros_like(mean)]), mean.new_zeros(2 * size, 2 * size)
    m[:size, :size] = covariance + mean.outer(mean)
    for name in [*(str(place) for place, layer in enumerate(chain) if isinstance(layer, nn.Linear | nn.ReLU)), HEAD]:
        if name in gates:
            mu = gates[name]
            m = m * (mu.outer(mu) + (mu * (1 - mu)).diag()).repeat(2, 2)
            e = mu.repeat(2) * e
        else:
            (weight, bias), (other, other_bias) = old[name], new[name]
            zero = weight.new_zeros(len(weight))
            b, db = (zero, zero) if bias is None or other_bias is None else (bias, other_bias - bias)
            block = torch.cat([torch.cat([weight, torch.zeros_like(weight)], 1), torch.cat([other - weight, other], 1)])
            c, moved = torch.cat([b, db]), block @ e
            m = block @ m @ block.T + moved.outer(c) + c.outer(moved) + c.outer(c)
            e = moved + c
    return 0.5 * m.diagonal()[len(m) // 2 :].sum()


def spread(noise: Tensor, roots: Tensor, groups: Tensor) -> Tensor:
    """Noise with the covariance of its group, ``R_g eps`` row by row.

    Args:
        noise: eps, ``(n, d)``.
        roots: R of each group, ``(g, d, d)``, or ``(g, d)`` for diagonal matrices.
        groups: Group of each row, int64 ``(n,)``.
    """
    if roots.dim() == 2:
        return noise * roots[groups]
    total = torch.zeros_like(noise)
    for group, root in enumerate(roots):
        total = torch.where((groups == group)[:, None], noise @ root.T, total)
    return total


class Snapshots(NamedBuffers):
    """Parameters, moments of inputs and means of gates at the end of each task.

    State is in buffers, whose shapes come from the state dict that is loaded; it is the same on all processes.
    """

    kept_as: ClassVar[str] = "snapshots"
    tasks: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("tasks", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        """Number of tasks."""
        return sum(key.endswith("/shares") for key in self._buffers)

    def store(self, parameters: Parameters, moments: Mapping[str, Tensor]) -> None:
        """Append the parameters and moments of a task."""
        task = len(self)
        for name, (weight, bias) in parameters.items():
            self._set(f"weight_{task}", name, weight)
            if bias is not None:
                self._set(f"bias_{task}", name, bias)
        for name, value in moments.items():
            self._set(f"moments_{task}", name, value)

    def parameters_of(self, task: int) -> dict[str, tuple[Tensor, Tensor | None]]:
        """theta_k."""
        biases = self._get(f"bias_{task}")
        return {name: (weight, biases.get(name)) for name, weight in self._get(f"weight_{task}").items()}

    def moments_of(self, task: int) -> dict[str, Tensor]:
        """Moments of g groups of inputs, float32: ``shares (g,)``, ``means (g, d)``, ``roots`` of the covariances
        ``(g, d, d)``, of diagonal ones ``(g, d)``, and mu of each ReLU, ``gates.PLACE (g, units)``."""
        return self._get(f"moments_{task}")


class LAFTR(ContinualStrategy):
    """Cross-entropy, and the distance of the outputs for earlier tasks over a Gaussian model of their inputs.

    Args:
        distance_weight: Weight of the distance, at least 0.
        estimator: ``lin_act``, ``bern`` or ``determ``.
        distance: rho: ``softmax``, ``kl`` or ``logits``; ``logits`` for ``determ``.
        samples: Number of inputs that are drawn for each earlier task in each step, at least 1.
        covariance: Whether the ``full`` covariance of the inputs is kept or its ``diagonal``.
        per_class: Whether each class of a task has its own moments.
        loss_classes: Classes of the cross-entropy, see the base class.
        kwargs: Options of the base class. The backbone is a chain of layers, ``MLP`` or ``ConvNet``, of linear layers
            for ``determ``; the head must be a ``LinearHead``.
    """

    traits = Traits(family="exemplar-free", paper="Dhawan et al., ICML 2023, arXiv:2302.03519", uses_old_logits=True)

    def __init__(
        self,
        *,
        distance_weight: float = 1.0,
        estimator: Estimator = "lin_act",
        distance: Distance = "softmax",
        samples: int = 40,
        covariance: Covariance = "full",
        per_class: bool = False,
        loss_classes: LossClasses = "current",
        **kwargs: Any,
    ) -> None:
        super().__init__(loss_classes=loss_classes, **kwargs)
        at_least(self, 0, distance_weight=distance_weight)
        one_of(self, get_args(Estimator), estimator=estimator)
        one_of(self, get_args(Distance), distance=distance)
        one_of(self, get_args(Covariance), covariance=covariance)
        at_least(self, 1, samples=samples)
        if estimator == "determ" and distance != "logits":
            raise ValueError(
                f"LAFTR: estimator is 'determ' with distance {distance!r}, which has no closed form; use distance "
                "'logits', or another estimator"
            )
        self.distance_weight, self.samples, self.per_class = distance_weight, samples, per_class
        self.estimator, self.distance, self.covariance = estimator, distance, covariance
        self.snapshots = Snapshots()

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        layers, head = getattr(self.network.backbone, "layers", None), self.network.head
        name = type(self.network.backbone).__name__
        if not isinstance(layers, nn.Sequential):
            raise ValueError(f"LAFTR: {name} is no chain of layers; use MLP or ConvNet")
        refused = [layer for layer in layers if not isinstance(layer, _KNOWN)]
        if self.estimator == "determ":
            refused += [layer for layer in layers if isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d)]
        if refused:
            raise ValueError(
                f"LAFTR: {name} has {type(refused[0]).__name__}, which estimator {self.estimator!r} does not take; use "
                f"MLP{'' if self.estimator == 'determ' else ' or ConvNet'}"
            )
        if not isinstance(head, LinearHead) or head.needs_statistics:
            raise ValueError(f"LAFTR: head is {type(head).__name__}; use a LinearHead")

    @property
    def chain(self) -> nn.Sequential:
        layers = self.network.backbone.layers
        assert isinstance(layers, nn.Sequential)
        return layers

    def parameters_for(self, columns: Tensor) -> dict[str, tuple[Tensor, Tensor | None]]:
        """theta: the present parameters of the layers and, of the head, of some columns, int64 ``(classes,)``."""
        found: dict[str, tuple[Tensor, Tensor | None]] = {}
        for place, layer in enumerate(self.chain):
            if isinstance(layer, nn.Linear | nn.Conv2d):
                found[str(place)] = (layer.weight, layer.bias)
        head = self.network.head
        biases = [block.bias for block in head.blocks if isinstance(block.bias, Tensor)]
        found[HEAD] = (head.weight()[columns], torch.cat(biases)[columns] if biases else None)
        return found

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        terms, tasks = {"ce": self.classification_loss(output, batch)}, len(self.snapshots)
        if tasks and self.distance_weight:
            with torch.autocast(self.device.type, enabled=False):
                parts = [self._distance_of(task, Draw.of(self.samples, batch.draw.key, task)) for task in range(tasks)]
            terms["distance"] = self.distance_weight * torch.stack(parts).mean()
        return terms

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        (columns,) = self.task_columns[task.index].nonzero(as_tuple=True)
        self.snapshots.store(self.parameters_for(columns), {"columns": columns, **self._moments(columns)})

    def _distance_of(self, task: int, draw: Draw) -> Tensor:
        """E rho for an earlier task; all processes draw the same inputs."""
        moments, old = self.snapshots.moments_of(task), self.snapshots.parameters_of(task)
        new = self.parameters_for(moments["columns"])
        gates = {name.partition(".")[2]: mu for name, mu in moments.items() if name.startswith("gates.")}
        shares, means, roots = (moments[name] for name in ("shares", "means", "roots"))
        if self.estimator == "determ":
            parts = []
            for group, (mean, root) in enumerate(zip(means, roots, strict=True)):
                covariance = root.square().diag() if root.dim() == 1 else root @ root.T
                of_group = {place: mu[group] for place, mu in gates.items()}
                parts.append(expected_change(self.chain, old, new, mean, covariance, of_group))
            return shares @ torch.stack(parts)
        chosen = torch.searchsorted(shares.cumsum(0), draw.fork(_GROUPS).rand(device=self.device), right=True)
        chosen = chosen.clamp(max=len(shares) - 1)
        noise = draw.fork(_INPUTS).randn(means.shape[1], device=self.device)
        inputs = means[chosen] + spread(noise, roots, chosen)

        def sampled(place: str, values: Tensor) -> Tensor:
            mu = gates[place][chosen]
            below = draw.fork(_GATES, int(place)).rand(mu.shape[1], device=self.device) < mu
            return below.to(values.dtype).view_as(values)

        assert self.image_shape is not None
        images = inputs.view(-1, *self.image_shape)
        return distance(
            *change_of_outputs(self.chain, old, new, images, sampled if self.estimator == "bern" else None),
            self.distance,
        )

    @torch.no_grad()
    def _moments(self, columns: Tensor) -> dict[str, Tensor]:
        """Moments of the training data of the task, see ``Snapshots.moments_of``; sums over all processes."""
        assert self.image_shape is not None
        groups, size = len(columns) if self.per_class else 1, math.prod(self.image_shape)
        shape = (groups, size, size) if self.covariance == "full" else (groups, size)
        counts, first, second = (
            torch.zeros(*s, dtype=torch.float64, device=self.device) for s in ((groups,), (groups, size), shape)
        )
        gates: dict[str, Tensor] = {}
        for batch in self.passes.batches():
            values, rows = batch.images, batch.images.flatten(1).double()
            member = torch.ones(len(batch), 1, dtype=torch.float64, device=self.device)
            if self.per_class:
                member = (batch.labels[:, None] == columns).double()
            counts += member.sum(dim=0)
            first += member.T @ rows
            for group, weights in enumerate(member.T):
                second[group] += rows.T @ (weights[:, None] * rows) if self.covariance == "full" else weights @ rows**2
            for place, layer in enumerate(self.chain):
                if isinstance(layer, nn.ReLU):
                    active = member.T @ (values > 0).flatten(1).double()
                    gates[str(place)] = gates.get(str(place), 0) + active
                values = layer(values)
        for total in (counts, first, second, *gates.values()):
            all_sum(total)
        number = counts.clamp(min=1)
        means = first / number[:, None]
        if self.covariance == "full":
            squares, vectors = torch.linalg.eigh(second / number[:, None, None] - means[:, :, None] * means[:, None, :])
            roots = vectors * squares.clamp(min=0).sqrt()[:, None, :]
        else:
            roots = (second / number[:, None] - means.square()).clamp(min=0).sqrt()
        found = {"shares": counts / counts.sum(), "means": means, "roots": roots}
        found |= {f"gates.{place}": active / number[:, None] for place, active in gates.items()}
        return {name: value.float() for name, value in found.items()}
