"""Weight-space rotation, WaRP (Kim et al., ICLR 2023).

When the base session ends, the space of inputs of each linear map W, ``(outputs, D)``, is rotated onto the principal
directions V of its inputs x (patches of a convolution), and the coefficients W~ take the place of the weights:

    Sigma = E[x x^T] = V diag(lambda) V^T,   W~ = W V,   W x = W~ V^T x

The importance of a coefficient is ``sum_batches |dCE / dW~|``. The most important share of all coefficients is frozen.
A later session computes the means of its classes, trains the other coefficients by

    L = CE(s cos(f(x), mu_c), y)    over all classes so far, with fixed means,

and adds the most important coefficients for its own images to the frozen ones. s -> scale.
CE is of cosines with the class means, in eval mode. Chosen here: importance is of all images of the task, and Sigma of
``rotation_batches`` batches; biases and batch normalisation are not tuned. The last epoch of the base session is used.
"""

import functools
from collections.abc import Iterable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from cl_lightning.batch import Batch, ImageShape
from cl_lightning.checks import at_least, within
from cl_lightning.distributed import all_sum
from cl_lightning.losses import cross_entropy, full_precision
from cl_lightning.memory import NamedBuffers, input_grams, linear_maps
from cl_lightning.models import Backbone, in_eval_mode
from cl_lightning.strategies.few_shot.tuned_sessions import TunedSessions
from cl_lightning.strategy import PhaseOptions, Task


def principal_directions(gram: Tensor) -> Tensor:
    """Orthonormal eigenvectors of a symmetric matrix in columns, by descending eigenvalue, ``(D, D)``.

    The sign of each is such that its entry of the largest absolute value is positive.
    """
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors.flip(1)
    return vectors * vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).sign()


def largest(values: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """The largest share of all entries of several tensors together, bool, by name; ties go to the first entries.

    Args:
        values: Tensors by name.
        share: In [0, 1]; the number of entries is rounded to the nearest integer.
    """
    joint = torch.cat([value.flatten() for value in values.values()])
    chosen = joint.argsort(descending=True, stable=True)[: round(share * len(joint))]
    mask = torch.zeros_like(joint, dtype=torch.bool).index_fill_(0, chosen, True)
    parts = torch.split(mask, [value.numel() for value in values.values()])
    return {name: part.view_as(value) for (name, value), part in zip(values.items(), parts, strict=True)}


class Directions(NamedBuffers):
    """Principal directions and frozen coefficients of each layer; empty before the base session ends."""

    kept_as: ClassVar[str] = "bases"
    tasks: Tensor  # number of tasks that have frozen coefficients

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("tasks", torch.zeros((), dtype=torch.int64))

    @property
    def bases(self) -> dict[str, Tensor]:
        """V of each layer, float32 ``(D, D)``."""
        return self._get("basis")

    @property
    def frozen(self) -> dict[str, Tensor]:
        """Frozen coefficients of each layer, bool, of the shape of its weight."""
        return self._get("frozen")

    def turn(self, bases: dict[str, Tensor]) -> None:
        """Keep the directions of each layer."""
        for name, basis in bases.items():
            self._set("basis", name, basis)

    def freeze(self, masks: dict[str, Tensor]) -> None:
        """Add the frozen coefficients of a task."""
        self.tasks.add_(1)
        before = self.frozen
        for name, mask in masks.items():
            self._set("frozen", name, mask | before[name] if name in before else mask)


class RotatedBackbone(Backbone):
    """A backbone whose linear maps have coefficients in rotated input spaces, once :meth:`rotate` was called.

    Args:
        backbone: A backbone with linear layers or convolutions without groups.

    Raises:
        ValueError: If it has none.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone.image_shape)
        self.backbone, self.num_features = backbone, backbone.num_features
        if not linear_maps(backbone, "WaRP"):
            raise ValueError(f"WaRP: {type(backbone).__name__} has no linear layers and convolutions; use another one")
        self.directions = Directions()

    @property
    def layers(self) -> dict[str, nn.Linear | nn.Conv2d]:
        """Linear layers and convolutions by name."""
        return linear_maps(self.backbone, "WaRP")

    def coefficients(self) -> dict[str, nn.Parameter]:
        """W~ of each layer by its name, in the shape of its weight."""
        return {name: cast(nn.Parameter, layer.weight) for name, layer in self.layers.items()}

    @torch.no_grad()
    def rotate(self, bases: dict[str, Tensor]) -> None:
        """Replace the weights W by W V, and keep V."""
        for name, weight in self.coefficients().items():
            rotated = weight.flatten(1).double() @ bases[name].to(weight.device).double()
            weight.copy_(rotated.view_as(weight))
        self.directions.turn(bases)

    def forward(self, images: Tensor) -> Tensor:
        bases = self.directions.bases
        if not bases:
            return cast(Tensor, self.backbone(images))
        weights = {
            f"{name}.weight": (weight.flatten(1) @ bases[name].T).view_as(weight)
            for name, weight in self.coefficients().items()
        }
        features: Tensor = functional_call(self.backbone, weights, (images,))
        return features


class WaRP(TunedSessions):
    """Weights in rotated spaces; later sessions train the coefficients that earlier classes do not need.

    Args:
        scale: s, above 0.
        frozen_share: Share of all coefficients that each task freezes, in [0, 1]; with 1 it is ``ProtoCosine``.
        rotation_batches: Number of batches of evaluation from which V is computed, at least 1; None for all images.
        session_options: As for ``TunedSessions``; by default 30 epochs of SGD with learning rate 0.01 and momentum 0.9.
        kwargs: Options of ``ProtoCosine``.
    """

    traits = TunedSessions.traits.but(family="few-shot", paper="Kim et al., ICLR 2023")

    def __init__(
        self,
        *,
        scale: float = 16.0,
        frozen_share: float = 0.1,
        rotation_batches: int | None = 20,
        session_options: PhaseOptions = PhaseOptions(epochs=30),
        **kwargs: Any,
    ) -> None:
        within(self, "[0, 1]", frozen_share=frozen_share)
        at_least(self, 1, rotation_batches=rotation_batches, optional=True)
        sgd = functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9)
        super().__init__(scale=scale, session_options=session_options.filled(sgd), **kwargs)
        self.scale = scale
        self.frozen_share, self.rotation_batches = frozen_share, rotation_batches

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        self._adapted.base = RotatedBackbone(self._adapted.base)

    @property
    def rotated(self) -> RotatedBackbone:
        """The backbone with its rotations."""
        base = self._adapted.base
        assert isinstance(base, RotatedBackbone)
        return base

    def session_parameters(self) -> dict[str, nn.Parameter]:
        return self.rotated.coefficients()

    def session_masks(self) -> dict[str, Tensor]:
        return {name: ~frozen for name, frozen in self.rotated.directions.frozen.items()}

    def session_scores(self, features: Tensor, labels: Tensor) -> Tensor:
        features = full_precision(features)
        means = self.prototypes.means.to(features.dtype)
        return self.scale * F.normalize(features, dim=1) @ F.normalize(means, dim=1).T

    def end_task(self, task: Task) -> None:
        if self.session_options.epochs == 0:
            super().end_task(task)
            return
        if task.is_first:
            self.rotated.rotate(self._directions())
            super().end_task(task)  # later sessions keep the means that they begin with
        self.rotated.directions.freeze(largest(self._importance(), self.frozen_share))

    def _directions(self) -> dict[str, Tensor]:
        """V of each layer, float32, the same on every process."""
        with in_eval_mode(self.network):
            grams = input_grams(self.network, self.rotated.layers, self._first(self.passes.batches()))
        return {name: principal_directions(gram).float() for name, gram in grams.items()}

    def _first(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        """The batches whose inputs count."""
        for number, batch in enumerate(batches):  # all batches are served: processes begin and end a pass together
            if self.rotation_batches is None or number < self.rotation_batches:
                yield batch

    @torch.enable_grad()
    def _importance(self) -> dict[str, Tensor]:
        """``sum_batches |dCE / dW~|`` over the images of the task by layer, the same on every process."""
        weights = self.rotated.coefficients()
        sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        wanted = [weight.requires_grad for weight in weights.values()]
        for weight in weights.values():
            weight.requires_grad_(True)
        with in_eval_mode(self.network):
            for batch in self.passes.batches():
                scores = self.session_scores(self.network.backbone(batch.images), batch.labels)
                loss = cross_entropy(scores, batch.labels) * len(batch) / batch.draw.total
                found = torch.autograd.grad(loss, list(weights.values()))
                for total, gradient in zip(sums.values(), found, strict=True):
                    total += all_sum(gradient).abs()
        for weight, before in zip(weights.values(), wanted, strict=True):
            weight.requires_grad_(before)
        return sums
