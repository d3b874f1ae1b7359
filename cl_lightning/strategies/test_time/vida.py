"""ViDA, visual domain adapter (Liu et al., ICLR 2024, arXiv:2306.04344).

A student theta and its mean teacher theta' have adapters of low and of high rank parallel to their layers
(``TwoRanks``), y = W x + b + s_l U_l D_l x + s_h U_h D_h x. The adapters are trained on the source domain first, with
s_l = s_h = 1 and the rest of the network frozen. For each batch x of the stream, with N views aug_n(x),

    u = 0.1 mean_{i,c} Var_n f_theta'(aug_n(x_i))_c      unbiased, with the scales of the batch before
    s_h = 1 + u,  s_l = 1 - u   if u >= t,   else   s_h = 1 - u,  s_l = 1 + u      in student and teacher
    L = -mean_i sum_c softmax(z'_i)_c log softmax(f_theta(x_i))_c          a step on all parameters of theta
    theta' <- m theta' + (1 - m) theta                                     with m_v for the adapters
    theta <- M theta_0 + (1 - M) theta,   M ~ Bernoulli(p_r) elementwise   restoration

The prediction is f_theta'(x) with the new scales. N -> views, t -> threshold, m -> teacher_momentum,
m_v -> adapter_momentum, p_r -> restore. u depends on the scale of the logits, and so does t.
Departs from the authors' code:
- z' is the mean of f_theta' over the views of u, which costs nothing in addition. In the code z' = f_theta'(x)
  (``target="image"``): teacher and student begin as equals, in eval mode, and the gradient of the loss is 0 as long as
  they are, since the teacher only follows the student;
- in the code only s_l changes and s_h stays 1, by a mistake (``released=True``);
- the training of the adapters on the source is not in the code; the number of epochs and the optimizer are our choice;
- adapters of convolutions are ours, for networks without attention.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from cl_lightning.checks import at_least, one_of, within
from cl_lightning.distributed import all_sum
from cl_lightning.models import AdaptedBackbone, Network, TwoRanks
from cl_lightning.strategies.base import separate_group
from cl_lightning.strategies.test_time.base import ADAPT, TestTimeAdaptation, Trained
from cl_lightning.strategies.test_time.mean_teacher import MeanTeacherAdaptation, consistency, move_teacher
from cl_lightning.strategies.test_time.parts.restoration import RestorationRule, StochasticRestore
from cl_lightning.strategies.test_time.parts.views import viewed
from cl_lightning.strategies.test_time.source_run import needs_training_images
from cl_lightning.strategy import Batch, Output, Phase, PhaseOptions, Task

ADAPTERS = "adapters"
_VIEWS = 0xC8  # salt
_TARGET = "mean over views"
_ONE_EPOCH = PhaseOptions(epochs=1)


def adapter_scales(uncertainty: Tensor, threshold: float) -> Tensor:
    """s_l and s_h, ``(2,)``: 1 - u and 1 + u for an uncertainty u, a scalar; exchanged if u is below the threshold."""
    low = torch.where(uncertainty >= threshold, 1 - uncertainty, 1 + uncertainty)
    return torch.stack([low, 2 - low])


def adapters(network: Network) -> TwoRanks:
    """The adapters of a network."""
    return cast(TwoRanks, cast(AdaptedBackbone, network.backbone).peft)


class ViDA(MeanTeacherAdaptation):
    """Mean teacher with adapters of low and high rank, whose shares depend on the uncertainty of the teacher.

    Args:
        low_rank: Rank of the adapters with s_l, at least 1.
        high_rank: Rank of the adapters with s_h, at least 1.
        targets: Patterns of names of layers that get adapters, see ``TwoRanks``.
        views: N, at least 2.
        threshold: t, at least 0; the command line of the authors' code has 0.05 for CIFAR.
        target: Logits that the student learns: the teacher's mean over the ``views``, or for the ``image`` itself.
        released: Whether s_h stays 1, as in the authors' code.
        adapter_rate: Learning rate of the adapters in the stream as a share of the optimizer's, at least 0: 0.1 for
            CIFAR-10 with Adam and learning rate 1e-4, 0.4 for ImageNet with SGD and learning rate 5e-7.
        adapter_momentum: m_v, in [0, 1]: 0.999 for CIFAR, 0.8 for ImageNet.
        restore: p_r, in [0, 1]: 0.01 for CIFAR, 0 for ImageNet.
        symmetric: Whether the loss is the mean of both directions, as in the paper for ImageNet.
        adapter_options: Options of the training of the adapters on the source domain; None for their optimizer is Adam
            with learning rate 0.001. 0 epochs leave the training out.
        params: Parameters that are trained, see ``TestTimeAdaptation``; ``[backbone.peft.*]`` for the adapters alone.
        restoration: Further rules, see ``TestTimeAdaptation``.
        kwargs: Options of ``MeanTeacherAdaptation``.
    """

    traits = TestTimeAdaptation.traits.but(
        family="test-time", paper="Liu et al., ICLR 2024, arXiv:2306.04344", transductive=True
    )

    def __init__(
        self,
        *,
        low_rank: int = 1,
        high_rank: int = 128,
        targets: Sequence[str] | None = ("*.attn.qkv", "*.attn.proj"),
        views: int = 10,
        threshold: float = 0.2,
        target: Literal["views", "image"] = "views",
        released: bool = False,
        adapter_rate: float = 0.1,
        adapter_momentum: float = 0.999,
        restore: float = 0.01,
        symmetric: bool = False,
        adapter_options: PhaseOptions = _ONE_EPOCH,
        params: Literal["norm", "early_norm", "all"] | list[str] = "all",
        restoration: list[RestorationRule] | None = None,
        **kwargs: Any,
    ) -> None:
        chosen: Trained = params
        within(self, "[0, 1]", restore=restore)
        rules = [StochasticRestore(restore), *(restoration or ())]
        super().__init__(params=chosen, restoration=rules, **kwargs)
        at_least(self, 1, low_rank=low_rank, high_rank=high_rank)
        at_least(self, 2, views=views)
        at_least(self, 0, threshold=threshold, adapter_rate=adapter_rate)
        one_of(self, ("views", "image"), target=target)
        within(self, "[0, 1]", adapter_momentum=adapter_momentum)
        self.views, self.threshold, self.target, self.released = views, threshold, target, released
        self.adapter_rate, self.adapter_momentum, self.symmetric = adapter_rate, adapter_momentum, symmetric
        self.adapter_options = adapter_options.filled(partial(torch.optim.Adam, lr=1e-3))
        peft = partial(TwoRanks, low_rank=low_rank, high_rank=high_rank, targets=targets)
        self.build_backbone = partial(AdaptedBackbone, backbone=self.build_backbone, peft=peft)

    def phases(self, task: Task) -> list[Phase]:
        training = Phase(
            ADAPTERS,
            self.adapter_options,
            trains=lambda: adapters(self.network).parameters(),
            freezes=lambda: [cast(AdaptedBackbone, self.network.backbone).base, self.network.head],
        )
        wanted = task.is_first and self.adapter_options.epochs != 0
        return [*super().phases(task), *([training] if wanted else [])]

    def trainable(self) -> Iterable[nn.Parameter]:
        own = set() if self.phase.name == ADAPT else {id(p) for p in adapters(self.network).parameters()}
        return [parameter for parameter in super().trainable() if id(parameter) not in own]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        if self.phase.name == ADAPTERS:
            epochs = self.adapter_options.epochs
            needs_training_images(self, f"adapter_options.epochs is {epochs}", "--model.adapter_options.epochs 0")
        return super().configure_optimizers()

    def parameter_groups(self, parameters: list[nn.Parameter]) -> list[nn.Parameter] | list[dict[str, Any]]:
        if self.phase.name != ADAPT or self.adapter_rate == 1:
            return super().parameter_groups(parameters)
        return separate_group(parameters, adapters(self.network).parameters(), lr_factor=self.adapter_rate)

    @torch.no_grad()
    def prepare_batch(self, batch: Batch) -> Batch:
        batch = super().prepare_batch(batch)
        if self.phase.name == ADAPT:
            assert self.teacher.network is not None
            draws = (batch.draw.fork(_VIEWS, number) for number in range(self.views))
            logits = torch.stack([self.of_teacher(viewed(self, batch, draw)).logits for draw in draws])
            if self.target == "views":
                batch = batch.replace(extra={**batch.extra, _TARGET: logits.mean(dim=0)})
            variance = all_sum(logits.var(dim=0).sum()) / (batch.draw.total * self.num_source)
            scales = adapter_scales(0.1 * variance, self.threshold)
            if self.released:
                scales[1] = 1.0
            for network in (self.network, self.teacher.network):
                adapters(network).set_scales(scales)
        return batch

    def adapt(self, batch: Batch, output: Output) -> tuple[Tensor, dict[str, Tensor]]:
        scores = self.of_teacher(batch.images).logits
        target = batch.extra.get(_TARGET, scores)
        return scores, {"consistency": consistency(output.logits, target, symmetric=self.symmetric)}

    def after_update(self, batch: Batch) -> None:
        assert self.teacher.network is not None
        mine, theirs = (cast(AdaptedBackbone, one.backbone) for one in (self.teacher.network, self.network))
        move_teacher(mine.peft, theirs.peft, self.adapter_momentum)
        move_teacher(mine.base, theirs.base, self.teacher_momentum)
        move_teacher(self.teacher.network.head, self.network.head, self.teacher_momentum)
        super(MeanTeacherAdaptation, self).after_update(batch)

    def reset(self) -> None:
        super().reset()
        for network in (self.network, self.teacher.network):
            if network is not None:
                adapters(network).set_scales(torch.ones(2, device=self.device))
