"""Incremental Classifier and Representation Learning (Rebuffi et al., CVPR 2017, arXiv:1611.07725).

The network f is trained on the data of the task and on exemplars of earlier classes, with distillation from a frozen
copy g of the network before the task (alg. 3):

    L(x, y) = sum_c BCE(sigmoid f_c(x), t_c),  t_c = sigmoid g_c(x) for old classes, 1[y = c] for new ones  sigmoid form
    L(x, y) = CE(f(x), y) + lambda * CE(softmax(g(x) / T), softmax(f_old(x) / T))                           softmax form

f_old(x) are the logits of f for the classes that g knows. lambda -> distill_weight, T -> temperature. When the task
ends, K // (number of classes) exemplars of each class are kept, chosen by herding (alg. 4, 5): ``ExemplarReplay``. A
test image is classified by the nearest mean of exemplars,

    y* = argmin_y || phi(x) - mu_y ||,   mu_y = mean of phi over the exemplars of y,  phi = features / ||features||

with mu_y normalised to norm 1 again (alg. 1). The softmax form is the loss of PyCIL, which most published tables use.
Departs from the paper: the sigmoid form is a sum over the classes seen so far, while the authors' code takes the mean
over all outputs. For 100 classes its learning rate of 2.0 is 0.02 here, the default of the sigmoid form, and its
penalty 1e-5 ||theta||^2, which has no factor 1/2, is a weight decay of 2e-3. The features of an image are not averaged
with the features of its mirror image. During a task its classes have no exemplars yet: predictions are then by the
head, and so are all predictions of the callback ``ContinualEvaluation``.
"""

from typing import Any, Literal

from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from cl_lightning.checks import above, at_least, one_of
from cl_lightning.losses import binary_cross_entropy, lwf_mc_targets, softmax_distillation
from cl_lightning.memory import Teacher
from cl_lightning.strategies.base import NearestExemplars, sigmoid_optimizer
from cl_lightning.strategy import Batch, Output, Task, Traits


class ICaRL(NearestExemplars):
    """Distillation on the task and on herded exemplars, and classification by the nearest mean of exemplars.

    Args:
        memory_size: K, in samples, over all classes and processes.
        form: ``sigmoid`` for the loss of the paper, ``softmax`` for the loss of PyCIL.
        distill_weight: lambda of the softmax form, at least 0.
        temperature: T of the softmax form, above 0.
        optimizer: As in the base class; None for SGD with momentum 0.9 and learning rate 0.02 in the sigmoid form,
            0.05 in the softmax form.
        kwargs: Options of the base class, such as ``classifier``.
    """

    traits = Traits(family="rehearsal", paper="Rebuffi et al., CVPR 2017, arXiv:1611.07725", keeps_exemplars=True)

    def __init__(
        self,
        *,
        memory_size: int = 2000,
        form: Literal["sigmoid", "softmax"] = "sigmoid",
        distill_weight: float = 1.0,
        temperature: float = 2.0,
        optimizer: OptimizerCallable | None = None,
        **kwargs: Any,
    ) -> None:
        default = sigmoid_optimizer if form == "sigmoid" else None
        super().__init__(memory_size=memory_size, optimizer=optimizer or default, **kwargs)
        one_of(self, ("sigmoid", "softmax"), form=form)
        at_least(self, 0, distill_weight=distill_weight)
        above(self, 0, temperature=temperature)
        self.form, self.distill_weight, self.temperature = form, distill_weight, temperature
        self.teacher = Teacher()

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.form == "sigmoid":
            old = self.teacher(batch.images).logits if self.teacher else None  # (batch, classes before this task)
            targets = lwf_mc_targets(batch.labels, output.logits.shape[1], old)
            return {"bce": binary_cross_entropy(output.logits, targets)}
        terms = {"ce": self.classification_loss(output, batch)}
        if self.teacher:
            old, target = self.teacher.pair(batch.images, output)  # (batch, classes before this task) each
            terms["distill"] = self.distill_weight * softmax_distillation(old, target, self.temperature)
        return terms

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        self.teacher.learn_from(self.network)
