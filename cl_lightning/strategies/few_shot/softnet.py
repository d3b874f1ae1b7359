"""Soft-SubNetworks, SoftNet (Kang et al., ICLR 2023, arXiv:2209.07529).

Each matrix and kernel theta of the backbone has a score s of the same shape and is used as ``theta * m`` with the mask

    m_j = 1          if |s_j| is among the largest c of the layer: the major part
    m_j = u_j        otherwise, u_j ~ U(0, 1): the minor part; u_j = 0 for the HardNet

In the base session u is drawn anew in each step, theta gets its gradient, which has the factor m, and s the gradient of
m (straight through). Then s and the last u are fixed. In a later session, with class means o and distance d,

    L = -1/n sum_i log [ exp(-d(o_{y_i}, f(x_i))) / sum_c exp(-d(o_c, f(x_i))) ]

trains the minor part of some layers, ``theta <- theta - eta * grad * m_minor``, and the major part does not change by
a bit. Means of earlier classes are fixed, means of new classes are the means of the batch; after the session they are
computed again. c -> major_share.
Chosen here: grad is the gradient with respect to ``theta * m``, so that theta gets its own gradient, which has the
factor m; the tuned layers are the last stage of the backbone. Departs from the paper: the classifier of the base
session has cosines; biases and batch normalisation are not tuned; the last epoch of the base session is used. The
authors' configuration has ``distance="cosine"`` with temperature 0.1; their released session trains scores instead of
weights, which is not an option here.
"""

import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cl_lightning.batch import Batch, Draw, ImageShape
from cl_lightning.checks import above, matching, one_of, within
from cl_lightning.losses import full_precision
from cl_lightning.memory import PrototypeHead
from cl_lightning.models import Backbone
from cl_lightning.strategies.few_shot.tuned_sessions import TunedSessions, batch_means
from cl_lightning.strategy import PhaseOptions

Distance = Literal["euclidean", "cosine"]
_NOISE = 0x50F7  # salt of the draws


def major_part(scores: Tensor, share: float) -> Tensor:
    """Entries of the largest absolute value, bool, of the shape of ``scores``.

    Args:
        scores: s of one layer, any shape.
        share: c, in (0, 1]; the number of entries is the share of all, rounded to the nearest integer, at least 1.
    """
    values = scores.detach().abs().flatten()
    rank = 1 + round((1 - share) * (len(values) - 1))
    return scores.detach().abs() >= values.kthvalue(rank).values


def soft_mask(scores: Tensor, minor: Tensor, share: float) -> Tensor:
    """m: 1 on the major part, ``minor`` elsewhere; its gradient reaches the scores unchanged.

    Args:
        scores: s of one layer.
        minor: u, of the same shape, in [0, 1].
        share: c, in (0, 1].
    """
    mask = torch.where(major_part(scores, share), 1.0, minor)
    return mask + (scores - scores.detach())


class SoftMasks(nn.Module):
    """Scores and minor parts of the masks of all matrices and kernels of a backbone.

    Args:
        weights: Matrices and kernels by name.
        share: c.

    Attributes:
        names: Names of the weights, in the order of the scores.
        scores: s of each weight.
    """

    kept_as: ClassVar[str] = "masks"

    def __init__(self, weights: Mapping[str, Tensor], share: float) -> None:
        super().__init__()
        self.share, self.names = share, tuple(weights)
        self.scores = nn.ParameterList(torch.empty_like(weight) for weight in weights.values())
        for place, score in enumerate(self.scores):
            nn.init.kaiming_uniform_(score, a=5**0.5)
            self.register_buffer(f"minor_{place}", torch.zeros_like(score))

    @torch.no_grad()
    def redraw(self, draw: Draw) -> None:
        """Draw u anew, the same on every process."""
        for place, minor in enumerate(self.buffers()):
            minor.copy_(torch.rand(minor.shape, generator=draw.fork(_NOISE, place).generator()))

    def masks(self) -> dict[str, Tensor]:
        """m by name, with the gradient of the scores."""
        parts = zip(self.names, self.scores, self.buffers(), strict=True)
        return {name: soft_mask(score, minor, self.share) for name, score, minor in parts}

    def minor_parts(self) -> dict[str, Tensor]:
        """Entries of the minor part, bool, by name."""
        return {name: ~major_part(score, self.share) for name, score in zip(self.names, self.scores, strict=True)}

    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.scores, *self.buffers()))


class SoftBackbone(Backbone):
    """A backbone whose matrices and kernels are multiplied by soft masks.

    Args:
        backbone: Any backbone with matrices or kernels.
        share: c.

    Raises:
        ValueError: If the backbone has none.
    """

    def __init__(self, backbone: Backbone, share: float) -> None:
        super().__init__(backbone.image_shape)
        self.backbone, self.num_features = backbone, backbone.num_features
        weights = self.weights()
        if not weights:
            raise ValueError(f"SoftNet: {type(backbone).__name__} has no matrices or kernels to mask; use another one")
        self.soft = SoftMasks(weights, share)

    def weights(self) -> dict[str, nn.Parameter]:
        """Matrices and kernels of the backbone, by name."""
        return {name: weight for name, weight in self.backbone.named_parameters() if weight.dim() > 1}

    def forward(self, images: Tensor) -> Tensor:
        weights = self.weights()
        masked = {name: weights[name] * mask for name, mask in self.soft.masks().items()}
        features: Tensor = functional_call(self.backbone, masked, (images,))
        return features


class SoftNet(TunedSessions):
    """Soft subnetworks: later sessions train the minor weights, and the major ones do not change.

    Args:
        major_share: c, share of the weights of a layer in the major part, in (0, 1]. The paper has 0.03 to 0.99; with 1
            no weight is trained in a session.
        hard: Whether the minor part is 0, the HardNet of the paper. Its sessions train no weight that has an effect.
        session_layers: Patterns of the names of the matrices and kernels that sessions train, in the backbone, such as
            ``layer4.*``; None for the last stage.
        distance: d between features and class means: ``euclidean``, or ``cosine`` for minus the cosine.
        temperature: Divisor of d, above 0; None for 1, or 0.1 with cosines.
        session_options: As for ``TunedSessions``; by default 15 epochs of SGD with learning rate 0.02.
        kwargs: Options of ``ProtoCosine``.
    """

    traits = TunedSessions.traits.but(family="few-shot", paper="Kang et al., ICLR 2023, arXiv:2209.07529")

    def __init__(
        self,
        *,
        major_share: float = 0.5,
        hard: bool = False,
        session_layers: list[str] | None = None,
        distance: Distance = "euclidean",
        temperature: float | None = None,
        session_options: PhaseOptions = PhaseOptions(epochs=15),
        **kwargs: Any,
    ) -> None:
        within(self, "(0, 1]", major_share=major_share)
        one_of(self, get_args(Distance), distance=distance)
        above(self, 0, temperature=temperature, optional=True)
        sgd = functools.partial(torch.optim.SGD, lr=0.02)
        super().__init__(session_options=session_options.filled(sgd), **kwargs)
        self.build_head = functools.partial(PrototypeHead, metric=distance)
        self.major_share, self.hard, self.distance, self.session_layers = major_share, hard, distance, session_layers
        self.temperature = (1.0 if distance == "euclidean" else 0.1) if temperature is None else temperature

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        self._adapted.base = SoftBackbone(self._adapted.base, self.major_share)
        self.session_parameters()  # raises errors before training

    @property
    def soft_backbone(self) -> SoftBackbone:
        """The backbone with its masks."""
        base = self._adapted.base
        assert isinstance(base, SoftBackbone)
        return base

    def prepare_batch(self, batch: Batch) -> Batch:
        if not self.in_session and not self.hard:
            self.soft_backbone.soft.redraw(batch.draw)
        return super().prepare_batch(batch)

    def session_parameters(self) -> dict[str, nn.Parameter]:
        weights = self.soft_backbone.weights()
        if self.session_layers is not None:
            return {name: weights[name] for name in matching(self, weights, session_layers=self.session_layers)}
        last = {id(weight) for weight in self.soft_backbone.backbone.divide()[1].parameters()}
        return {name: weight for name, weight in weights.items() if id(weight) in last}

    def session_masks(self) -> dict[str, Tensor]:
        return self.soft_backbone.soft.minor_parts()

    def session_scores(self, features: Tensor, labels: Tensor) -> Tensor:
        columns = torch.tensor(self.task.columns, device=labels.device)
        features = full_precision(features)
        means = batch_means(features, labels, self.prototypes.means.to(features.dtype), columns)
        if self.distance == "cosine":
            unit = nn.functional.normalize
            return unit(features, dim=1) @ unit(means, dim=1).T / self.temperature
        distances = torch.cdist(features, means, compute_mode="donot_use_mm_for_euclid_dist")
        return -distances / self.temperature
