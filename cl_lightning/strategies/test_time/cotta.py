"""CoTTA, continual test-time domain adaptation (Wang et al., CVPR 2022, arXiv:2203.13591).

A student theta is trained on the predictions of a mean teacher theta'. With the source network theta_0 and a batch x:

    z' = 1/N sum_k f_theta'(aug_k(x))  if  mean_i max_c softmax(f_theta_0(x_i))_c < p_th,  else  f_theta'(x)
    L = -mean_i sum_c softmax(z'_i)_c log softmax(f_theta(x_i))_c          a step on all parameters of theta
    theta' <- m theta' + (1 - m) theta                                      parameters only, not buffers
    theta <- M theta_0 + (1 - M) theta,   M ~ Bernoulli(p_r) elementwise    restoration

The prediction is z'. All three networks normalise with the statistics of the test batch. m -> teacher_momentum,
p_r -> restore, p_th -> threshold, N -> views. Views are computed only for batches below the threshold; the comparison
synchronises with the device. The parameters of a view (colours, angle, ...) are drawn once per batch, noise per pixel.
Draws depend on the step alone, so any number of processes restores the same weights.
Departs from the authors' code:
- the networks are in eval mode; in the code dropout, if a network has it, is on;
- pixels outside the image repeat its edge during the rotation, where the code pads the image before; blur follows the
  rotation;
- the translation is up to 1/8 of the image, our reading of 1/16 of the padded image, and not rounded to whole pixels.
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from cl_lightning.checks import at_least, within
from cl_lightning.distributed import all_sum
from cl_lightning.losses import full_precision
from cl_lightning.strategies.test_time.base import TestTimeAdaptation, Trained
from cl_lightning.strategies.test_time.mean_teacher import MeanTeacherAdaptation, consistency
from cl_lightning.strategies.test_time.parts.restoration import RestorationRule, StochasticRestore
from cl_lightning.strategies.test_time.parts.views import viewed
from cl_lightning.strategy import Batch, Output

_VIEWS = 0xC0  # salt


class CoTTA(MeanTeacherAdaptation):
    """Consistency with an augmentation-averaged mean teacher, and stochastic restoration of source weights.

    Args:
        teacher_momentum: m, in [0, 1].
        restore: p_r, in [0, 1]: at each step each weight is reset to its source value with this probability. 0.01 in
            the paper for CIFAR, 0.001 for ImageNet.
        threshold: p_th: 0.92 for CIFAR-10, 0.72 for CIFAR-100, 0.1 for ImageNet (5 % of the source images are below).
        views: N, at least 0; 0 for a mean teacher without augmentation.
        symmetric: Whether the loss is the mean of both directions, as in the paper for ImageNet.
        params: Parameters that are trained, see ``TestTimeAdaptation``.
        restoration: Further rules, see ``TestTimeAdaptation``.
        kwargs: Options of ``TestTimeAdaptation``.
    """

    traits = TestTimeAdaptation.traits.but(
        family="test-time", paper="Wang et al., CVPR 2022, arXiv:2203.13591", transductive=True, inputs=("image",)
    )
    needs_source: ClassVar[bool] = True

    def __init__(
        self,
        *,
        teacher_momentum: float = 0.999,
        restore: float = 0.01,
        threshold: float = 0.92,
        views: int = 32,
        symmetric: bool = False,
        params: Literal["norm", "early_norm", "all"] | list[str] = "all",
        restoration: list[RestorationRule] | None = None,
        **kwargs: Any,
    ) -> None:
        chosen: Trained = params
        within(self, "[0, 1]", restore=restore)
        rules = [StochasticRestore(restore), *(restoration or ())]
        super().__init__(teacher_momentum=teacher_momentum, params=chosen, restoration=rules, **kwargs)
        at_least(self, 0, views=views)
        self.threshold, self.views, self.symmetric = threshold, views, symmetric

    def adapt(self, batch: Batch, output: Output) -> tuple[Tensor, dict[str, Tensor]]:
        target = self._target(batch)
        return target, {"consistency": consistency(output.logits, target, symmetric=self.symmetric)}

    @torch.no_grad()
    def _target(self, batch: Batch) -> Tensor:
        """z', ``(B, classes of the source)``."""
        if self.views:
            source = full_precision(self.source(batch.images).logits[:, : self.num_source])
            confidence = all_sum(source.softmax(dim=1).amax(dim=1).sum()) / batch.draw.total
            if bool(confidence < self.threshold):
                total = torch.zeros_like(source)
                for number in range(self.views):
                    total += self.of_teacher(viewed(self, batch, batch.draw.fork(_VIEWS, number))).logits
                return total / self.views
        return self.of_teacher(batch.images).logits
