"""TTT, test-time training with rotation prediction (Sun et al., ICML 2020, arXiv:1909.13231).

A network of two branches on shared layers e: the classifier f, and g, which predicts by how many quarter turns an image
was rotated. On the source domain both are trained together, with R_k the rotation by 90 k degrees,

    L = mean_i CE(f(x_i), y_i) + mean_i 1/4 sum_k CE(g(R_k x_i), k)

In the stream, with N copies of each image that are cropped, flipped and rotated by k_n quarter turns at random,

    L = mean_i 1/N sum_n CE(g(R_k_n crop_n(x_i)), k_n)          a step on e and g

The prediction is f(x) after the step. N -> copies. g has a copy of the layers of the backbone that are not ``shared``,
and a linear layer. In the paper a step is taken on one image (data.batch_size 1) with N = 32, here on a batch of any
size; weights are kept from step to step (the online form of the paper). Of a source network that was trained
elsewhere, g is trained on the source domain, with the shared layers frozen (``branch_options``, ours).
The paper's form with 10 steps on an image and a reset, and its threshold on the confidence of g, are not implemented.
Normalisation uses the running statistics of the source; copies of one image have no statistics of their own. The paper
recommends group normalisation: statistics of shared layers are updated with plain and with rotated images.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import Draw, ImageShape
from cl_lightning.checks import at_least, matching
from cl_lightning.data import rotated
from cl_lightning.losses import cross_entropy, full_precision
from cl_lightning.models import Backbone
from cl_lightning.strategies.test_time.base import ADAPT, TestTimeAdaptation
from cl_lightning.strategy import Batch, Output, Phase, PhaseOptions, Task

BRANCH = "branch"
_COPY, _CROP, _FLIP, _TURN = 0xCA, 0xCB, 0xCC, 0xCD  # salts
_ONE_EPOCH = PhaseOptions(epochs=1)
_SHARED = ("conv1", "bn1", "layer1", "layer2")


def cropped(images: Tensor, draw: Draw) -> Tensor:
    """Images ``(B, C, H, W)``, shifted at random by up to H/8 pixels in zeros, and flipped with probability 1/2."""
    pad = images.shape[-2] // 8
    padded = F.pad(images, (pad, pad, pad, pad))
    shift = draw.fork(_CROP).randint(2 * pad + 1, 2, device=images.device)
    rows, columns = (
        shift[:, place, None] + torch.arange(size, device=images.device) for place, size in enumerate(images.shape[-2:])
    )
    picture = torch.arange(len(images), device=images.device)[:, None, None]
    found = padded.movedim(1, -1)[picture, rows[:, :, None], columns[:, None]].movedim(-1, 1)
    flipped = draw.fork(_FLIP).randint(2, device=images.device).bool()
    return torch.where(flipped[:, None, None, None], found.flip(-1), found)


def turned(images: Tensor, turns: Tensor) -> Tensor:
    """Square images ``(B, C, S, S)``, each rotated by its number of quarter turns, int64 ``(B,)`` in 0 .. 3."""
    every = rotated(images).view(4, *images.shape)
    return every[turns, torch.arange(len(images), device=images.device)]


class TwoBranches(Backbone):
    """A backbone, and a second one that shares some of its modules and predicts quarter turns.

    Args:
        image_shape: Channels, height, width.
        backbone: Builds the backbone.
        shared: Patterns of names of modules that both share.

    Raises:
        ValueError: If a pattern matches no module.
    """

    def __init__(
        self, image_shape: ImageShape, *, backbone: Callable[[ImageShape], Backbone], shared: Sequence[str]
    ) -> None:
        super().__init__(image_shape)
        self.base = backbone(image_shape)
        self.num_features = self.base.num_features
        self.branch = copy.deepcopy(self.base)
        self.classifier = nn.Linear(self.num_features, 4)
        names = [name for name, _ in self.base.named_modules() if name]
        self.shared = matching("TTT", names, shared=shared)
        self.share()

    def share(self) -> None:
        """Put the shared modules of the backbone into the branch, also after they were replaced."""
        for name in self.shared:
            parent, _, leaf = name.rpartition(".")
            setattr(self.branch.get_submodule(parent), leaf, self.base.get_submodule(name))

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.base(images)
        return features

    def turns(self, images: Tensor) -> Tensor:
        """Logits ``(B, 4)`` of the number of quarter turns of images."""
        logits: Tensor = self.classifier(self.branch(images))
        return logits


class TTT(TestTimeAdaptation):
    """Adaptation of shared layers by predicting the rotation of test images.

    Args:
        copies: N, at least 1: 32 in the paper, for one image.
        shared: Patterns of names of the modules of the backbone that both branches share; the default are the layers
            of a ResNet for CIFAR before its last stage.
        branch_options: Options of the training of g for a source network that was trained elsewhere; the optimizer is
            ``first_optimizer`` by default. 0 epochs leave it out.
        statistics: Statistics of batch normalisation, see ``TestTimeAdaptation``.
        predict_when: Prediction that is scored: ``before`` or ``after`` the step on the batch.
        optimizer: Optimizer in the stream; None for SGD with learning rate 0.001.
        kwargs: Options of ``TestTimeAdaptation``, without ``params``.
    """

    traits = TestTimeAdaptation.traits.but(family="test-time", paper="Sun et al., ICML 2020, arXiv:1909.13231")

    def __init__(
        self,
        *,
        copies: int = 32,
        shared: Sequence[str] = _SHARED,
        branch_options: PhaseOptions = _ONE_EPOCH,
        statistics: Literal["source", "batch", "mix", "moving"] = "source",
        predict_when: Literal["before", "after"] = "after",
        optimizer: OptimizerCallable | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            statistics=statistics,
            params=["backbone.*"],  # chosen in trained_parameters
            predict_when=predict_when,
            optimizer=optimizer or partial(torch.optim.SGD, lr=1e-3),
            **kwargs,
        )
        at_least(self, 1, copies=copies)
        self.copies, self.branch_options = copies, branch_options
        self.build_backbone = partial(TwoBranches, backbone=self.build_backbone, shared=shared)

    @property
    def branches(self) -> TwoBranches:
        """The backbone and the branch that predicts rotations."""
        return cast(TwoBranches, self.network.backbone)

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        self.branches.share()  # normalisation layers were replaced

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        own = {id(value) for part in (self.branches.branch, self.branches.classifier) for value in part.parameters()}
        return {name: value for name, value in super().trained_parameters().items() if id(value) in own}

    def phases(self, task: Task) -> list[Phase]:
        found = super().phases(task)
        if not found and self.branch_options.epochs != 0:
            parts = self.branches
            found = [
                Phase(
                    BRANCH,
                    self.branch_options,
                    trains=lambda: [*parts.branch.parameters(), *parts.classifier.parameters()],
                    freezes=lambda: [parts.base, self.network.head],
                )
            ]
        return found

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.phase.name == ADAPT:
            return super().losses(batch, output)
        turns = torch.arange(4, device=batch.images.device).repeat_interleave(len(batch.images))
        terms = {"rotation": cross_entropy(self.branches.turns(rotated(batch.images)), turns)}
        return terms if self.phase.name == BRANCH else {**super().losses(batch, output), **terms}

    def adapt(self, batch: Batch, output: Output) -> tuple[Tensor, dict[str, Tensor]]:
        draws = [batch.draw.fork(_COPY, number) for number in range(self.copies)]
        turns = torch.cat([draw.fork(_TURN).randint(4, device=batch.images.device) for draw in draws])
        images = turned(torch.cat([cropped(batch.images, draw) for draw in draws]), turns)
        loss = F.cross_entropy(full_precision(self.branches.turns(images)), turns, reduction="none")
        return output.logits, {"rotation": loss.view(self.copies, len(batch.images)).mean(dim=0)}
