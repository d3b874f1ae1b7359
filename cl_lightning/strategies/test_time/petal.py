"""PETAL, a probabilistic framework for lifelong test-time adaptation (Brahma and Rai, CVPR 2023, arXiv:2212.09713).

``CoTTA`` with an approximate posterior of the source weights as prior, and with a restoration that depends on the data.
After the training on the source domain, E further epochs with a constant learning rate give the mean mu and the
variance s^2 of each weight over the ends of the epochs (SWAG-diagonal, Maddox et al., NeurIPS 2019). The stream begins
at theta_0 = mu, with statistics of batch normalisation of its own. For each batch x, with z' the scores of the mean
teacher as in CoTTA,

    L = -mean_i sum_c softmax(z'_i)_c log softmax(f_theta(x_i))_c + lambda / 2 sum_j (theta_j - mu_j)^2 / (s_j^2 + eps)
    g = dL / dtheta                                              a step on all parameters of theta
    theta' <- m theta' + (1 - m) theta                           parameters only, not buffers
    theta_j <- mu_j  where g_j^2 < q,  q the delta-quantile of all g^2     restoration

g^2 is the diagonal of the Fisher information of the batch, and q is taken over all parameters jointly. The prediction
is z'. E -> posterior_options, lambda -> prior_weight, eps -> damping, delta -> restore, m -> teacher_momentum. Without
a prior and with ``select="random"``, the method is CoTTA on the source weights mu. With 0 further epochs mu are the
source weights, s^2 = 0, and the prior is an L2 penalty with the factor 1 / eps. s^2 is computed by Welford's update,
which is E[theta^2] - mu^2 without cancellation. The views of a batch are those of ``CoTTA``, with its departures.
Departs from the authors' code, where the first of the 5 further epochs does not count, and the learning rate reaches
0.01 after three of them: here all epochs count, with a constant learning rate.
"""

from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from cl_lightning.checks import above, at_least, one_of, within
from cl_lightning.memory import Importance, WeightSets, write_weights
from cl_lightning.strategies.test_time.base import TestTimeAdaptation
from cl_lightning.strategies.test_time.mean_teacher import ViewAveragedTeacher
from cl_lightning.strategies.test_time.parts.restoration import FisherRestore, RestorationRule, StochasticRestore
from cl_lightning.strategies.test_time.source_run import needs_training_images
from cl_lightning.strategy import Batch, Output, Phase, PhaseOptions, Task

POSTERIOR = "posterior"
_FURTHER_EPOCHS = PhaseOptions(epochs=5)


def add_value(mean: Tensor, variance: Tensor, value: Tensor, count: int) -> None:
    """Update mean and biased variance of ``count - 1`` values with one more value, in place (Welford)."""
    gap = value - mean
    mean += gap / count
    variance.mul_((count - 1) / count).add_(gap * (value - mean), alpha=1 / count)


class PETAL(ViewAveragedTeacher):
    """Mean teacher with a Gaussian prior around the source weights, and restoration of weights of low information.

    Args:
        prior_weight: lambda, at least 0: 1e-9 for CIFAR, 1e-11 for ImageNet.
        damping: eps, above 0.
        restore: delta, in [0, 1]: share of the weights that are reset at each step. 0.03 for CIFAR, 0.003 for ImageNet.
        select: Weights that are reset: those with the smallest squared gradients (``fisher``), or ``random`` ones.
        posterior_options: Options of the further epochs on the source domain; None for their optimizer is SGD with
            learning rate 0.01, momentum 0.9 and weight decay 0.0005. 0 epochs leave them out.
        restoration: Further rules, see ``TestTimeAdaptation``.
        kwargs: Options of ``ViewAveragedTeacher``.
    """

    traits = TestTimeAdaptation.traits.but(
        family="test-time", paper="Brahma and Rai, CVPR 2023, arXiv:2212.09713", transductive=True
    )

    def __init__(
        self,
        *,
        prior_weight: float = 1e-9,
        damping: float = 1e-6,
        restore: float = 0.03,
        select: Literal["fisher", "random"] = "fisher",
        posterior_options: PhaseOptions = _FURTHER_EPOCHS,
        restoration: list[RestorationRule] | None = None,
        **kwargs: Any,
    ) -> None:
        within(self, "[0, 1]", restore=restore)
        one_of(self, ("fisher", "random"), select=select)
        rule = FisherRestore(restore) if select == "fisher" else StochasticRestore(restore)
        super().__init__(restoration=[rule, *(restoration or ())], **kwargs)
        at_least(self, 0, prior_weight=prior_weight)
        above(self, 0, damping=damping)
        self.prior_weight, self.damping = prior_weight, damping
        sgd = partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=5e-4)
        self.posterior_options = posterior_options.filled(sgd)
        self.weights = WeightSets()  # mean and variance over the further epochs, until the prior is made
        self.prior = Importance()

    def phases(self, task: Task) -> list[Phase]:
        further = task.is_first and self.posterior_options.epochs != 0
        return [*super().phases(task), *([Phase(POSTERIOR, self.posterior_options)] if further else [])]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        if self.phase.name == POSTERIOR:
            epochs = self.posterior_options.epochs
            needs_training_images(self, f"posterior_options.epochs is {epochs}", "--model.posterior_options.epochs 0")
        return super().configure_optimizers()

    def adapt(self, batch: Batch, output: Output) -> tuple[Tensor, dict[str, Tensor]]:
        scores, terms = super().adapt(batch, output)
        if self.prior:
            terms["prior"] = self.prior_weight / 2 * self.prior.penalty(self.trained_parameters())
        return scores, terms

    @torch.no_grad()
    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        if self.phase.name == POSTERIOR:
            theta = {name: value.detach() for name, value in self.network.named_parameters() if value.requires_grad}
            if self.epoch == 0:
                self.weights.keep("mean", theta)
                self.weights.keep("variance", {name: torch.zeros_like(value) for name, value in theta.items()})
            mean, variance = self.weights["mean"], self.weights["variance"]
            for name, value in theta.items():
                add_value(mean[name], variance[name], value, self.epoch + 1)

    def end_phase(self, phase: Phase) -> None:
        super().end_phase(phase)
        if phase.name == POSTERIOR:
            write_weights(self.network, self.weights["mean"])
            self.weights.drop("mean")

    def end_task(self, task: Task) -> None:
        if task.is_first and "variance" in self.weights:
            self.passes.refit_norms(self._frozen_norms())
        super().end_task(task)
        if task.is_first and self.prior_weight:
            weights, variance = self.trained_parameters(), self.weights["variance"]
            variances = {name: variance.get(name, torch.zeros_like(value)) for name, value in weights.items()}
            self.prior.add(weights, {name: (1 / (value + self.damping)).detach() for name, value in variances.items()})
        self.weights.drop("variance")
