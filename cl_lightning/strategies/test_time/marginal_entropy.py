"""MEMO, marginal entropy minimisation with one test point (Zhang, Levine, Finn, NeurIPS 2022, arXiv:2110.09506).

Each test image starts from the source network. One step on the mean prediction of B augmented views x_1 .. x_B of the
image, after which the image itself is predicted:

    L(x) = -sum_c p^_c log p^_c,   p^ = 1/B sum_b softmax(f(x_b)),   log p^ = logsumexp_b(log p_b) - log B

B -> views. All parameters are trained. L is the mean entropy of the views plus their Jensen-Shannon divergence: views
become certain and equal. A view is a crop of the padded image, a random flip, and ``AugMix``. Batch normalisation
uses 16/17 of the source statistics and 1/17 of those of the views, and of the image when it is predicted
(``statistics="mix"``, alpha = 1/17, for a prior of N = 16 and one image). The class is not called MEMO, a name of
a rehearsal method.

The paper takes batches of one image (``--data.batch_size 1``). A larger batch takes one step on the mean of L over
its images, from the source network: faster, and another method, which does not lower the error on digits.
Departs from the paper: variances of a batch are biased; the severity of AugMix, 3, is the default of its authors.
"""

import math
from functools import cache
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.checks import at_least
from cl_lightning.data import AugMix, Compose, Context, RandomCrop, RandomHorizontalFlip, Transform
from cl_lightning.losses import full_precision
from cl_lightning.strategies.test_time.base import TestTimeAdaptation, Trained
from cl_lightning.strategy import Batch, Output

_VIEW = 0xC8  # salt


def entropy_of_views(logits: Tensor) -> Tensor:
    """Entropy of the mean prediction over the views of each image, ``(n,)``, in nats; logits ``(n, B, C)``."""
    log_p = F.log_softmax(full_precision(logits), dim=2).logsumexp(dim=1) - math.log(logits.shape[1])
    return -(log_p.exp() * log_p).sum(dim=1)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """SGD with learning rate 0.005, without momentum: the optimizer of the paper for CIFAR-10."""
    return torch.optim.SGD(parameters, lr=0.005)


@cache
def augmentation() -> Transform:
    """The augmentation of the paper for CIFAR-10."""
    return Compose([RandomCrop(4), RandomHorizontalFlip(), AugMix()])


class MarginalEntropy(TestTimeAdaptation):
    """Entropy of the mean prediction over augmented views of an image, from the source network for each image.

    Args:
        views: B, at least 1: 32 for CIFAR-10, 64 for ImageNet in the paper.
        transforms: Augmentation of a view, in order; None for the augmentation of the paper for CIFAR-10. The latter
            mirrors images: give other transforms if a mirrored image belongs to another class.
        statistics: Statistics of batch normalisation, see ``TestTimeAdaptation``.
        alpha: Weight of the views with ``mix``, in [0, 1].
        params: Parameters that are trained, see ``TestTimeAdaptation``.
        reset: When the network is reset, see ``TestTimeAdaptation``.
        predict_when: Prediction that is scored, ``before`` or ``after`` the step.
        optimizer: Optimizer in the stream; None for SGD with learning rate 0.005.
        kwargs: Options of ``TestTimeAdaptation``.
    """

    traits = TestTimeAdaptation.traits.but(
        family="test-time", paper="Zhang et al., NeurIPS 2022, arXiv:2110.09506", transductive=True
    )

    def __init__(
        self,
        *,
        views: int = 32,
        transforms: list[Transform] | None = None,
        statistics: Literal["source", "batch", "mix", "moving"] = "mix",
        alpha: float = 1 / 17,
        params: Literal["norm", "early_norm", "all"] | list[str] = "all",
        reset: Literal["never", "domain", "batch"] = "batch",
        predict_when: Literal["before", "after"] = "after",
        optimizer: OptimizerCallable | None = None,
        **kwargs: Any,
    ) -> None:
        chosen: Trained = params
        super().__init__(
            statistics=statistics,
            alpha=alpha,
            params=chosen,
            reset=reset,
            predict_when=predict_when,
            optimizer=optimizer or sgd,
            **kwargs,
        )
        at_least(self, 1, views=views)
        self.views = views
        self.transforms = None if transforms is None else Compose(transforms)

    def adapt(self, batch: Batch, output: Output) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.forward_source_classes(self.views_of(batch)).logits
        return output.logits, {"entropy": entropy_of_views(logits.view(len(batch), self.views, logits.shape[1]))}

    def views_of(self, batch: Batch) -> Tensor:
        """Finished views, all of the first image, then all of the second one, ..., ``(n * views, C, H, W)``."""
        raw = batch.raw if batch.raw.is_floating_point() else batch.raw.float() / 255
        draw = batch.draw.share(batch.draw.total * self.views, _VIEW)
        context = Context(batch.indices.repeat_interleave(self.views), self.epoch, self.seed)
        views = (self.transforms or augmentation())(raw.repeat_interleave(self.views, dim=0), draw, context)
        return self.data.finish(batch.replace(raw=views, draw=draw)).images
