"""S3C, self-supervised stochastic classifiers (Kalla & Biswas, ECCV 2022).

The rotations of an image by 90 m degrees, m = 0 .. M - 1 with M = 4, are M virtual classes of each class
(``transformed.py``). The row of each virtual class is drawn from a Gaussian at each step, the same for the whole batch:

    w = mu + softplus(sigma - 4) eps,   eps ~ N(0, I),   score(x) = s cos(a(f(x)), w)

In the base session f, a, mu and sigma are trained with CE over all virtual classes. Then f and a are frozen. A later
session begins with the mean vectors a(f(t_m(x))) of its classes as mu, and trains mu and sigma of its own classes:

    L = CE(score(t_m(x)), y M + m) + lambda mean_p CE(score(p), its virtual class)

over all virtual classes so far. p are the mean vectors of all earlier virtual classes, whose rows do not change.
Predictions have eps = 0 and are averaged over the rotations. s -> scale, lambda -> prototype_weight, t -> copies.
Chosen here: a(f) = f + f sigmoid(W_2 relu(W_1 f)), an attention over the features with a connection around it, of a
quarter of the units; sigma is initially 0; images of later sessions are not augmented; momentum 0.9. The last epoch of
the base session is used.
"""

import functools
from collections.abc import Iterable
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import Batch, Draw, ImageShape
from cl_lightning.checks import above, at_least, one_of
from cl_lightning.losses import cross_entropy
from cl_lightning.memory import Prototypes
from cl_lightning.models import head_as, perceptron
from cl_lightning.strategies.few_shot.transformed import (
    NUMBER,
    Copies,
    JointCosineHead,
    check_copies,
    features_of_copies,
    over_copies,
    transformed,
    transformed_batch,
    virtual_labels,
)
from cl_lightning.strategy import ContinualStrategy, Output, Phase, PhaseOptions, Task, Traits

_ROWS = 0x53C  # salt


class ResidualAttention(nn.Module):
    """``f + f sigmoid(W_2 relu(W_1 f))``, with d / 4 hidden units.

    Args:
        num_features: d.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.gate = perceptron(num_features, max(1, num_features // 4), num_features)

    def forward(self, features: Tensor) -> Tensor:
        gate: Tensor = self.gate(features)
        return features + features * gate.sigmoid()


class _StochasticBlock(nn.Module):
    def __init__(self, mean: nn.Module) -> None:
        super().__init__()
        assert isinstance(mean.weight, nn.Parameter)
        self.weight = mean.weight
        self.sigma = nn.Parameter(torch.zeros_like(self.weight))


class StochasticCosineHead(JointCosineHead):
    """Cosine classifier with M Gaussian rows for each class; logits and predictions use their means.

    Args:
        num_features: Size of a feature vector, d.
        scale: s, above 0.
        copies: M, at least 1.
        attention: Whether features pass a :class:`ResidualAttention`.
    """

    def __init__(self, num_features: int, *, scale: float = 16.0, copies: int = 1, attention: bool = True) -> None:
        super().__init__(num_features, scale=scale, copies=copies)
        self.attention = ResidualAttention(num_features) if attention else nn.Identity()

    def new_block(self, num_new: int) -> nn.Module:
        return _StochasticBlock(super().new_block(num_new))

    def embed(self, features: Tensor) -> Tensor:
        embedded: Tensor = self.attention(features)
        return embedded

    def sampled_rows(self, key: int) -> Tensor:
        """w, ``(C M, d)``.

        Args:
            key: Seed of eps, the same on every process.
        """
        sigma = torch.cat([cast(_StochasticBlock, block).sigma for block in self.blocks]).view(-1, self.num_features)
        eps = Draw.of(len(sigma), key).randn(self.num_features).to(sigma)
        return self.rows() + F.softplus(sigma - 4) * eps


class S3C(ContinualStrategy):
    """Gaussian rows of a cosine classifier of rotations; later sessions train the rows of their classes.

    Args:
        copies: t, the transforms.
        scale: s, above 0.
        prototype_weight: lambda, at least 0.
        attention: Whether features pass the block a.
        session_options: Options of the phase ``session``; with 0 epochs rows of new classes are their means. The
            default is 100 epochs of SGD with learning rate 0.01 and momentum 0.9.
        kwargs: Options of ``ContinualStrategy``.
    """

    traits = Traits(family="few-shot", paper="Kalla & Biswas, ECCV 2022", inputs=("image",))

    def __init__(
        self,
        *,
        copies: Copies = "rotation4",
        scale: float = 16.0,
        prototype_weight: float = 5.0,
        attention: bool = True,
        session_options: PhaseOptions = PhaseOptions(epochs=100),
        **kwargs: Any,
    ) -> None:
        one_of(self, get_args(Copies), copies=copies)
        above(self, 0, scale=scale)
        at_least(self, 0, prototype_weight=prototype_weight)
        count = NUMBER[copies]
        head = functools.partial(StochasticCosineHead, scale=scale, copies=count, attention=attention)
        super().__init__(head=head, **kwargs)
        one_of(self, ("all",), loss_classes=self.loss_classes)
        self.copies: Copies = copies
        self.prototype_weight = prototype_weight
        self.session_options = session_options.filled(functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9))
        self.means: Prototypes  # of the virtual classes

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        check_copies(self, self.copies, image_shape)
        self.means = Prototypes(self.network.head.num_features)

    @property
    def head(self) -> StochasticCosineHead:
        """The head of the network."""
        return head_as(self.network, StochasticCosineHead, self, "whose rows are drawn")

    @property
    def backbone_is_final(self) -> bool:
        return self.freeze_backbone or not self.task.is_first

    def phases(self, task: Task) -> list[Phase]:
        if task.is_first:
            return [Phase()]
        if self.session_options.epochs == 0 or not task.num_new:
            return []
        return [
            Phase(
                "session",
                self.session_options,
                trains=lambda: self.head.blocks[-1].parameters(),
                freezes=self.session_frozen,
                unaugmented=True,
            )
        ]

    def session_frozen(self) -> Iterable[nn.Module]:
        """Modules that a session does not train."""
        return self.network.backbone, self.head.attention

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.phase.name == "session":
            self.begin_rows()

    def begin_rows(self) -> None:
        """Set the rows of the classes of a later session to their means, unless these are known already."""
        new = self.head.num_columns * self.head.proxies - len(self.means)
        if new:  # a resumed session has these means in its checkpoint
            self.measure()
            with torch.no_grad():
                rows = cast(_StochasticBlock, self.head.blocks[-1]).weight
                rows.copy_(self.means.means[-new:].view_as(rows))

    def prepare_batch(self, batch: Batch) -> Batch:
        return transformed_batch(batch, self.copies)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        head, count = self.head, self.head.proxies
        rows = head.sampled_rows(batch.draw.fork(_ROWS).key)
        labels = virtual_labels(batch.labels[: len(batch) // count], count)
        terms = {"ce": cross_entropy(head.compared(head.embed(output.features), rows), labels)}
        if self.phase.name == "session" and self.prototype_weight:
            known = self.means.means[: -head.block_sizes()[-1] * count]
            places = torch.arange(len(known), device=known.device)
            terms["prototypes"] = self.prototype_weight * cross_entropy(head.compared(known, rows), places)
        return terms

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        if task.is_first or not task.num_new:
            self.measure()
        else:
            self.begin_rows()

    @torch.no_grad()
    def measure(self) -> None:
        """Compute the mean vectors of the virtual classes of the task, pooled with earlier ones of the same class."""
        features, labels = features_of_copies(self, self.copies)
        vectors = self.head.embed(features.flatten(0, 1))
        virtual = virtual_labels(labels, self.head.proxies)
        self.means.update(vectors, virtual, num_classes=self.head.num_columns * self.head.proxies)

    def predict(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        features = self.network.backbone(transformed(images, self.copies))
        return over_copies(self.head.joint_scores(features), self.head.proxies)
