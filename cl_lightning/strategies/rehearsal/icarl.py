"""Incremental Classifier and Representation Learning (Rebuffi et al., CVPR 2017, arXiv:1611.07725).

The network f learns the data of the task together with exemplars of earlier classes, taught by a frozen copy g of the
network before the task (alg. 3):

    L(x, y) = sum_c BCE(sigmoid f_c(x), t_c),  t_c = sigmoid g_c(x) for old classes, 1[y = c] for new ones  sigmoid form
    L(x, y) = CE(f(x), y) + lambda * CE(softmax(g(x) / T), softmax(f_old(x) / T))                           softmax form

lambda -> distill_weight, T -> temperature. When the task ends, K // (number of classes) exemplars of each class are
kept, chosen by herding (alg. 4, 5): ``cl_lightning.exemplars``. A test image goes to the nearest mean of exemplars,

    y* = argmin_y || phi(x) - mu_y ||,   mu_y = mean of phi over the exemplars of y,  phi = features / ||features||

with mu_y of norm 1 again (alg. 1). The softmax form is that of PyCIL, which most published tables come from.
Departs from the paper: the sigmoid form is summed over the classes, where the authors' code takes the mean over all
outputs (a learning rate of 2.0 and weight decay of 1e-5 there are 0.02 and 1e-3 here for 100 classes), and has outputs
for the classes seen so far only; features of the mirrored image are not averaged in. While a task is being learnt its
classes have no exemplars yet: then predictions are those of the head, and so are all of ``ContinualEvaluation``.
"""

from typing import Any, ClassVar, Literal

from torch import Tensor

from cl_lightning.backbones import ImageShape
from cl_lightning.batch import Batch
from cl_lightning.exemplars import exemplar_memory, nearest_exemplar_mean, update_exemplar_means, update_exemplars
from cl_lightning.losses import binary_cross_entropy, lwf_mc_targets, softmax_distillation
from cl_lightning.memory import Memory
from cl_lightning.network import Output
from cl_lightning.prototypes import Prototypes
from cl_lightning.strategy import ContinualStrategy
from cl_lightning.stream import Task
from cl_lightning.teacher import Teacher


class ICaRL(ContinualStrategy):
    """Distillation on the task and on herded exemplars; the nearest mean of exemplars classifies.

    Args:
        memory_size: K, in samples, over all classes and processes.
        form: ``sigmoid`` for the paper's loss, ``softmax`` for PyCIL's.
        distill_weight: lambda of the softmax form, at least 0.
        temperature: T of the softmax form, above 0.
        classifier: ``nme``, the nearest mean of exemplars, or the network's own head.
        kwargs: Of the base.
    """

    family: ClassVar[str] = "rehearsal"
    paper: ClassVar[str] = "Rebuffi et al., CVPR 2017, arXiv:1611.07725"
    keeps_exemplars: ClassVar[bool] = True

    def __init__(
        self,
        *,
        memory_size: int = 2000,
        form: Literal["sigmoid", "softmax"] = "sigmoid",
        distill_weight: float = 1.0,
        temperature: float = 2.0,
        classifier: Literal["nme", "head"] = "nme",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if form not in ("sigmoid", "softmax") or classifier not in ("nme", "head"):
            raise ValueError(
                f"ICaRL: form={form!r}, classifier={classifier!r}; use sigmoid or softmax, and nme or head"
            )
        if distill_weight < 0 or temperature <= 0:
            raise ValueError(
                f"ICaRL: distill_weight={distill_weight}, temperature={temperature}; at least 0 and above 0 are allowed"
            )
        if classifier == "nme" and memory_size < 1:
            raise ValueError(
                f"ICaRL: memory_size is {memory_size}, but exemplars classify; give at least one per class"
            )
        self.form, self.distill_weight, self.temperature = form, distill_weight, temperature
        self.classifier = classifier
        self.memory = exemplar_memory(memory_size, owner="ICaRL", visible=self.visible)
        self.teacher = Teacher()
        self.means: Prototypes
        self.plain_first_task = form == "softmax" and classifier == "head"

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        self.means = Prototypes(self.network.head.num_features)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.means = Prototypes(self.network.head.num_features)  # what was measured is of another network from now on

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        taught = self.teacher(batch.images).logits if self.teacher else None  # (batch, classes before this task)
        if self.form == "sigmoid":
            targets = lwf_mc_targets(batch.labels, output.logits.shape[1], taught)
            return {"bce": binary_cross_entropy(output.logits, targets)}
        terms = {"ce": self.classification_loss(output, batch)}
        if taught is not None:
            old = output.logits[:, : taught.shape[1]]
            terms["distill"] = self.distill_weight * softmax_distillation(old, taught, self.temperature)
        return terms

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        update_exemplars(self, self.memory)
        if self.classifier == "nme":
            update_exemplar_means(self, self.memory, self.means)
        self.teacher.learn_from(self.network)

    def rehearsal(self) -> Memory | None:
        return self.memory

    def predict_within_task(self, images: Tensor) -> Tensor:
        return self.network.classify(images)

    def predict(self, images: Tensor) -> Tensor:
        if len(self.means) == 0:
            return self.network.classify(images)
        return nearest_exemplar_mean(self.network.backbone(images), self.means, self.network.head.num_columns)
