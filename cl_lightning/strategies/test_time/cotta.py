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

from typing import Any

from cl_lightning.checks import within
from cl_lightning.strategies.test_time.base import TestTimeAdaptation
from cl_lightning.strategies.test_time.mean_teacher import ViewAveragedTeacher
from cl_lightning.strategies.test_time.parts.restoration import RestorationRule, StochasticRestore


class CoTTA(ViewAveragedTeacher):
    """Consistency with an augmentation-averaged mean teacher, and stochastic restoration of source weights.

    Args:
        restore: p_r, in [0, 1]: at each step each weight is reset to its source value with this probability. 0.01 in
            the paper for CIFAR, 0.001 for ImageNet.
        restoration: Further rules, see ``TestTimeAdaptation``.
        kwargs: Options of ``ViewAveragedTeacher``.
    """

    traits = TestTimeAdaptation.traits.but(
        family="test-time", paper="Wang et al., CVPR 2022, arXiv:2203.13591", transductive=True, inputs=("image",)
    )

    def __init__(
        self, *, restore: float = 0.01, restoration: list[RestorationRule] | None = None, **kwargs: Any
    ) -> None:
        within(self, "[0, 1]", restore=restore)
        super().__init__(restoration=[StochasticRestore(restore), *(restoration or ())], **kwargs)
