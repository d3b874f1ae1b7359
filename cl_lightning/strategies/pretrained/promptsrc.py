"""PromptSRC, self-regulating prompts (Khattak et al., ICCV 2023, arXiv:2307.06948): its image part, without text.

Tokens p are learnt in the first blocks of a frozen transformer f, and held close to what f computes without them. With
v = f(x; p), v_0 = f(x), a hat for a vector of norm 1, z = h(v) and z_0 = h(v_0) the logits of the head h:

    L = CE(z, y) + lambda_1 || v^ - v_0^ ||_1 / d + lambda_2 KL(softmax(z_0) || softmax(z)) / C     mean over the batch

over C classes: of the current task (``loss_classes="current"``), or all. v_0 and z_0 have no gradient. After a task of
E epochs, what was trained (tokens and rows of the head) is replaced by its average over the ends of the epochs:

    theta = sum_{e=1..E} w_e theta_e,   w_e proportional to N(e; mu, sigma^2),   mu = 0.75 E,   sigma = 0.05 E

lambda_1 -> feature_weight, lambda_2 -> logit_weight, mu / E -> average_centre, sigma / E -> average_width. The paper
has 20 epochs, and a sigma of 1 epoch; of 5 epochs the fourth has a weight of 0.98.

The paper tunes CLIP on one data set, and its claim is that the zero-shot network is not forgotten. Here the tokens are
shared by all tasks, as in ``OnePrompt``, and held by the frozen features. The text part needs the text encoder of CLIP
at each step and is not implemented: prompts in the text encoder, their regularisation with weight 25, and its target,
the mean over many templates. The head is a linear one that is trained. With a ``TextHead`` the rows are stored
embeddings of the class names, and z_0 are zero-shot logits if the backbone ends in the space of the text. Departs from
the code in that the first tokens enter after the norm in front of the blocks of CLIP.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.checks import above, at_least, one_of, within
from cl_lightning.losses import full_precision, mean_over_rows
from cl_lightning.memory import WeightSets, write_weights
from cl_lightning.models import VPT, AdaptedBackbone, blocks_of
from cl_lightning.strategies.pretrained.linear_probe import ProbeClasses
from cl_lightning.strategy import Batch, ContinualStrategy, Output, Phase, Traits


def feature_consistency(features: Tensor, frozen: Tensor) -> Tensor:
    """``|| v^ - v_0^ ||_1 / d``, mean over the batch: the mean absolute difference of the normalised features.

    Args:
        features: v, ``(B, d)``.
        frozen: v_0, ``(B, d)``, without gradient.
    """
    v, v_0 = (F.normalize(full_precision(rows), dim=1) for rows in (features, frozen.detach()))
    return mean_over_rows((v - v_0).abs().mean(dim=1))


def logit_consistency(logits: Tensor, frozen: Tensor, columns: Tensor | None = None) -> Tensor:
    """``KL(softmax(z_0) || softmax(z)) / C``, mean over the batch, in nats.

    Args:
        logits: z, ``(B, columns)``.
        frozen: z_0, ``(B, columns)``, without gradient.
        columns: The C classes of both softmaxes, bool ``(columns,)``; None for all.
    """
    columns = torch.ones_like(logits[0], dtype=torch.bool) if columns is None else columns
    log_p, log_q = (
        full_precision(z).masked_fill(~columns, -torch.inf).log_softmax(dim=1).masked_fill(~columns, 0.0)
        for z in (logits, frozen.detach())
    )
    return mean_over_rows((log_q.exp() * (log_q - log_p)).sum(dim=1)) / columns.sum()


def running_share(epoch: int, mean: float, deviation: float) -> float:
    """Share of the weights after an epoch in their average so far, ``w_e / (w_1 + ... + w_e)``, with w_i = N(i; mean,
    deviation^2).

    Args:
        epoch: e, at least 1.
        mean: mu.
        deviation: sigma, above 0.
    """
    logs = [-((i - mean) ** 2) / (2 * deviation**2) for i in range(1, epoch + 1)]
    return math.exp(logs[-1] - max(logs)) / sum(math.exp(value - max(logs)) for value in logs)


def _tokens(model: nn.Module, *, length: int, depth: int | None, spread: float) -> VPT:
    count = len(blocks_of(model, None, "PromptSRC"))
    if depth is not None and depth > count:
        raise ValueError(f"PromptSRC: depth is {depth}; give at most {count}, the number of blocks, or null for all")
    blocks = None if depth is None else list(range(depth))
    return VPT(model, length=length, spread=spread, blocks=blocks, through=True)


class PromptSRC(ContinualStrategy):
    """Prompts in a frozen transformer, held close to its features and logits without them, and averaged over epochs.

    Args:
        length: Number of tokens of a block, at least 1.
        depth: Number of the first blocks with tokens of their own, at least 1; None for all. The tokens of the last of
            them stay in the sequence.
        spread: Standard deviation of the initial tokens, at least 0.
        feature_weight: lambda_1, at least 0.
        logit_weight: lambda_2, at least 0.
        average_centre: mu as a share of the epochs, in [0, 1]; None for the weights after the last epoch, not averaged.
        average_width: sigma as a share of the epochs, above 0.
        loss_classes: Classes of CE and KL: the classes of the ``current`` task, or ``all`` classes seen so far.
        kwargs: Options of the base class. The backbone must be a transformer of timm.

    Attributes:
        weights: The set ``average`` while a task is trained.
    """

    traits = Traits(family="pretrained", paper="Khattak et al., ICCV 2023, arXiv:2307.06948", needs_pretrained=True)

    def __init__(
        self,
        *,
        length: int = 4,
        depth: int | None = 9,
        spread: float = 0.02,
        feature_weight: float = 10.0,
        logit_weight: float = 1.0,
        average_centre: float | None = 0.75,
        average_width: float = 0.05,
        loss_classes: ProbeClasses = "current",
        **kwargs: Any,
    ) -> None:
        one_of(self, get_args(ProbeClasses), loss_classes=loss_classes)
        super().__init__(loss_classes=loss_classes, freeze_backbone=False, **kwargs)
        at_least(self, 1, length=length)
        at_least(self, 1, depth=depth, optional=True)
        at_least(self, 0, spread=spread, feature_weight=feature_weight, logit_weight=logit_weight)
        within(self, "[0, 1]", average_centre=average_centre, optional=True)
        above(self, 0, average_width=average_width)
        self.feature_weight, self.logit_weight = feature_weight, logit_weight
        self.average_centre, self.average_width = average_centre, average_width
        tokens = functools.partial(_tokens, length=length, depth=depth, spread=spread)
        self.build_backbone = functools.partial(AdaptedBackbone, backbone=self.build_backbone, peft=tokens)
        self.weights = WeightSets()

    def frozen(self) -> Iterable[nn.Module]:
        return self.prompted.unadapted()

    @property
    def prompted(self) -> AdaptedBackbone:
        """The backbone with its tokens."""
        return cast(AdaptedBackbone, self.network.backbone)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        terms = {"ce": self.classification_loss(output, batch)}
        if self.feature_weight or self.logit_weight:
            with torch.no_grad(), self.prompted.peft.disabled():
                frozen = self.network(batch.images)
            terms["features"] = self.feature_weight * feature_consistency(output.features, frozen.features)
            kl = logit_consistency(output.logits, frozen.logits, self.loss_columns())
            terms["logits"] = self.logit_weight * kl
        return terms

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        if self.average_centre is None:
            return
        epochs = max(self.phase.options.epochs or 1, self.epoch + 1)
        share = running_share(self.epoch + 1, self.average_centre * epochs, self.average_width * epochs)
        average = self.weights["average"]
        trained = {name: full_precision(p.detach()) for name, p in self.network.named_parameters() if p.requires_grad}
        start = average if average.keys() == trained.keys() else trained
        self.weights.keep("average", {name: start[name].lerp(value, share) for name, value in trained.items()})

    def end_phase(self, phase: Phase) -> None:
        super().end_phase(phase)
        write_weights(self.network, self.weights["average"])
        self.weights.drop("average")
