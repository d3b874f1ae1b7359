"""Visual domain prompts for continual test-time adaptation (Gan et al., AAAI 2023, arXiv:2212.04145).

Two prompts are added to the pixels of a frame of the image: psi, specific to the domain, and phi, common to all
domains. The network f is frozen. A mean teacher has prompts psi' and phi' of its own. For each batch x, with N views,

    q_i = 1/(1 + N) [ softmax(f(x_i + psi' + phi')) + sum_n softmax(f(aug_n(x_i) + psi' + phi')) ]
    L = -mean_i sum_c q_ic log softmax(f(x_i + psi + phi))_c + w sum_j Lambda_j (phi_j - phi*_j)^2
    (psi', phi') <- m (psi', phi') + (1 - m) (psi, phi)

Lambda measures which pixels of phi have reduced the consistency loss in a domain, as in Synaptic Intelligence (Zenke et
al., ICML 2017). With g the gradient of this loss in a step, and phi* the value of phi when the domain began,

    rho_j <- rho_j - g_j (change of phi_j)      in each step, and when the domain changes
    Lambda_j <- Lambda_j + max(rho_j, 0) / ((phi_j - phi*_j)^2 + xi),   rho <- 0,   phi* <- phi

Domains are not known: a change is detected before the step on a batch if the mean confidence of the teacher, mean_i
max_c softmax(f(x_i + psi' + phi'))_c, differs by more than S from its value for the batch before. The comparison
synchronises with the device. A slow drift is never detected; ``changes`` counts the detections. The prediction is
f(x + psi' + phi'). N -> views, w -> importance_weight, m -> teacher_momentum, xi -> damping, S -> shift.
The abstract, a caption and a note on the paper were available, not the paper. The frame and its width, the numbers of
all options, the score, and which confidence is compared are our choices. Prompts are added to the normalised image,
which is not clipped.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from cl_lightning.checks import above, at_least
from cl_lightning.distributed import all_sum
from cl_lightning.losses import full_precision
from cl_lightning.memory import Importance, PathIntegral
from cl_lightning.models import AdaptedBackbone, InputTransform, Peft
from cl_lightning.strategies.test_time.base import ADAPT, TestTimeAdaptation
from cl_lightning.strategies.test_time.mean_teacher import MeanTeacherAdaptation, consistency
from cl_lightning.strategies.test_time.parts.views import viewed
from cl_lightning.strategy import Batch, Output, Task

_VIEWS = 0xC9  # salt
_SHARE = 0.16  # width of the frame, of the smaller side


class _TwoFrames(Peft):
    """Two frames that are added to the input of a model: psi, then phi."""

    def __init__(self, model: nn.Module, *, width: int | None) -> None:
        super().__init__()
        shape = cast(AdaptedBackbone, model).image_shape
        width = max(1, round(_SHARE * min(shape[1:]))) if width is None else width
        for _ in range(2):
            self.sites.extend(InputTransform(model, kind="frame", frame_width=width).sites)


class VisualDomainPrompt(MeanTeacherAdaptation):
    """Pixel prompts of a frozen network, one of which keeps the pixels that mattered in earlier domains.

    Args:
        frame_width: Width of the prompts in pixels, at least 1; None for 16 % of the smaller side: 5 for 32 x 32
            pixels, 36 for 224 x 224.
        views: N, at least 0; with 0 teacher and student begin as equals, and nothing is learnt.
        importance_weight: w, at least 0.
        damping: xi, above 0.
        shift: S, at least 0: change of the mean confidence between two batches that is a change of the domain.
        kwargs: Options of ``MeanTeacherAdaptation``, without ``params``.
    """

    traits = TestTimeAdaptation.traits.but(
        family="test-time", paper="Gan et al., AAAI 2023, arXiv:2212.04145", transductive=True
    )
    confidence: Tensor
    changes: Tensor

    def __init__(
        self,
        *,
        frame_width: int | None = None,
        views: int = 1,
        importance_weight: float = 1.0,
        damping: float = 1e-3,
        shift: float = 0.1,
        **kwargs: Any,
    ) -> None:
        at_least(self, 1, frame_width=frame_width, optional=True)
        above(self, 0, damping=damping)
        super().__init__(params=["backbone.peft.*"], **kwargs)
        at_least(self, 0, views=views, importance_weight=importance_weight, shift=shift)
        self.views, self.importance_weight, self.shift = views, importance_weight, shift
        frames = partial(_TwoFrames, width=frame_width)
        self.build_backbone = partial(AdaptedBackbone, backbone=self.build_backbone, peft=frames)
        self.path, self.importance = PathIntegral(damping), Importance()
        self.register_buffer("confidence", torch.full((), -1.0))  # of the batch before; -1 for the first one
        self.register_buffer("changes", torch.zeros((), dtype=torch.int64))

    def trainable(self) -> Iterable[nn.Parameter]:
        prompts = cast(AdaptedBackbone, self.network.backbone).peft
        own = set() if self.phase.name == ADAPT else {id(parameter) for parameter in prompts.parameters()}
        return [parameter for parameter in super().trainable() if id(parameter) not in own]

    def _common(self) -> dict[str, Tensor]:
        """phi, by name."""
        return dict(cast(AdaptedBackbone, self.network.backbone).peft.sites[1].named_parameters())

    def adapt(self, batch: Batch, output: Output) -> tuple[Tensor, dict[str, Tensor]]:
        scores = self.of_teacher(batch.images).logits
        self._notice(scores, batch)
        draws = (batch.draw.fork(_VIEWS, number) for number in range(self.views))
        logits = [scores, *(self.of_teacher(viewed(self, batch, draw)).logits for draw in draws)]
        target = torch.stack([one.log_softmax(dim=1) for one in logits]).logsumexp(dim=0)
        penalty = self.importance_weight * self.importance.penalty(self._common())
        return scores, {"consistency": consistency(output.logits, target), "importance": penalty}

    @torch.no_grad()
    def _notice(self, logits: Tensor, batch: Batch) -> None:
        """Begin a new domain if the mean confidence has changed."""
        confidence = all_sum(full_precision(logits).softmax(dim=1).amax(dim=1).sum()) / batch.draw.total
        if bool((self.confidence >= 0) & ((confidence - self.confidence).abs() > self.shift)):
            phi = self._common()
            self.importance.merge(phi, self.path.importance(phi))
            self.path.begin(phi)
            self.changes += 1
        self.confidence.copy_(confidence)

    def edit_gradients(self, batch: Batch) -> None:
        super().edit_gradients(batch)
        if self.phase.name == ADAPT:
            phi = self._common()
            self.path.before_step(phi, self.importance.gradient(phi, self.importance_weight))

    def after_update(self, batch: Batch) -> None:
        self.path.after_step(self._common())
        super().after_update(batch)

    def bytes_kept(self) -> dict[str, int]:
        return {**super().bytes_kept(), "path": self.path.num_bytes()}

    def reset(self) -> None:
        super().reset()
        self._begin()

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        if task.is_first:
            self._begin()

    def _begin(self) -> None:
        """Begin the stream: no pixel is important yet."""
        phi = self._common()
        self.path.begin(phi)
        self.importance.anchor_at(phi, 0.0)
        self.confidence.fill_(-1.0)
        self.changes.zero_()
