"""COIL: co-transport for class-incremental learning (Zhou et al., ACM MM 2021, arXiv:2107.12654).

The head is a cosine classifier z_c(x) = sigma <f^(x), w^_c> with unit vectors f^, w^ and a learnt scale sigma. From the
second task on, a classifier of the new classes is transported from the old classes, and a classifier of the old classes
from the new ones, by plans of optimal transport with entropy between the classes:

    T = argmin_T <T, Q> - eps H(T),   T 1 = 1 / C_old,   T^T 1 = 1 / C_new,   Q_cd = || mu_c - mu_d ||_3
    prospective:    P = g C_old T^T W^_old     the first rows of the new classes; mean norm as the old rows, by g
    retrospective:  V = T W^_new               rows of the old classes

mu_c: mean of the unit features of a class, normalised again: of its exemplars if it is an old class, of its images if
it is a new one. With l = C_old / C, z' the logits of the network before the task, and H(p, z) the cross-entropy of
targets p and logits z,

    L = (1 - l) CE(z, y) + l H(softmax(z' / tau), z_old / tau) + weight * R
    R = H(softmax(P^ f^ / tau), z_new / tau)               in epoch 0; no gradient of the target
    R = (e / E)^2 H(softmax(z' / tau), V^ f^ / tau)        in epoch e >= 1 of E; V^ is constant

on the data of the task and on herded exemplars. eps -> transport_reg, tau -> temperature, weight -> transport_weight.
The prediction is the class of the largest logit, or of the nearest mean of exemplars.
Departs from a released implementation: the plan of a task is made when the task begins, since class means of the next
task are not known when a task ends; its second marginal is 1 / C_new; V is computed at the start of each epoch instead
of each 30 iterations, by a pass over the task and the exemplars. That R takes unit rows P^ in epoch 0 is our reading of
the paper, as in the implementation. Sinkhorn's iterations are the ones of
``cl_lightning.models.transport``, with logarithms in float64: a transport library would add a dependency for ten lines.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import ImageShape
from cl_lightning.checks import above, at_least
from cl_lightning.losses import balanced_distillation, full_precision, softmax_distillation
from cl_lightning.memory import Prototypes, Teacher, WeightSets
from cl_lightning.models import CosineHead, head_as, transport
from cl_lightning.strategies.base import Classifier, NearestExemplars
from cl_lightning.strategy import Batch, HeadFactory, Output, Task, Traits


def class_plan(old: Tensor, new: Tensor, reg: float) -> Tensor:
    """Transport plan T between classes, with the 3-norm of the difference of their means as cost.

    Args:
        old: Means of the old classes, ``(C_old, d)``.
        new: Means of the new classes, ``(C_new, d)``.
        reg: eps, above 0.

    Returns:
        ``(C_old, C_new)``, float64.
    """
    cost: Tensor = torch.cdist(old.double(), new.double(), p=3.0)
    return transport(cost, reg)


def prospective_rows(plan: Tensor, old_rows: Tensor) -> Tensor:
    """``g C_old T^T W^_old``: rows of the new classes with the mean norm of the old rows.

    Args:
        plan: T, ``(C_old, C_new)``.
        old_rows: W_old, ``(C_old, d)``.

    Returns:
        ``(C_new, d)``, float64.
    """
    old_rows = old_rows.double()
    moved = len(old_rows) * plan.T @ F.normalize(old_rows, dim=1)
    rows: Tensor = moved * old_rows.norm(dim=1).mean() / moved.norm(dim=1).mean().clamp(min=1e-12)
    return rows


def retrospective_rows(plan: Tensor, new_rows: Tensor) -> Tensor:
    """V^: the rows of ``T W^_new``, rows of the old classes, normalised.

    Args:
        plan: T, ``(C_old, C_new)``.
        new_rows: W_new, ``(C_new, d)``.

    Returns:
        ``(C_old, d)``, float64.
    """
    return F.normalize(plan @ F.normalize(new_rows.double(), dim=1), dim=1)


def projections(features: Tensor, rows: Tensor) -> Tensor:
    """``<f^, w>`` of the unit vectors of features ``(B, d)`` with rows ``(C, d)``: ``(B, C)``, at least float32."""
    with torch.autocast(features.device.type, enabled=False):
        directions = F.normalize(full_precision(features), dim=1)
        return F.linear(directions, rows.to(directions.dtype))


class COIL(NearestExemplars):
    """Cosine classifier and distillation, with classifiers of new and old classes that are transported to each other.

    Args:
        memory_size: K of :class:`ExemplarReplay`, in samples, at least 1: the means of old classes are of exemplars.
        temperature: tau of both distillations, above 0.
        transport_reg: eps, above 0; a large one makes all transported rows equal.
        transport_weight: Weight of the term of the transported classifier, at least 0.
        classifier: ``head``, or ``nme`` for the nearest mean of exemplars.
        head: Builds a :class:`CosineHead` with one row per class; None for a learnt scale that starts at 1.
        kwargs: Options of the base class.

    Attributes:
        transported: The set ``rows``: P^ in the first epoch of a task, V^ later; empty between tasks.
    """

    traits = Traits(
        family="rehearsal",
        paper="Zhou et al., ACM MM 2021, arXiv:2107.12654",
        keeps_exemplars=True,
        scenarios=("class-incremental", "online"),
    )

    def __init__(
        self,
        *,
        memory_size: int = 2000,
        temperature: float = 2.0,
        transport_reg: float = 0.464,
        transport_weight: float = 1e-3,
        classifier: Classifier = "head",
        head: HeadFactory | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(memory_size=memory_size, classifier=classifier, head=head or _learnt_scale, **kwargs)
        at_least(self, 1, memory_size=memory_size)
        above(self, 0, temperature=temperature, transport_reg=transport_reg)
        at_least(self, 0, transport_weight=transport_weight)
        self.temperature, self.transport_reg, self.transport_weight = temperature, transport_reg, transport_weight
        self.teacher, self.transported = Teacher(), WeightSets()

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        if (proxies := self.cosine_head.proxies) > 1:
            raise ValueError(f"COIL: its head has {proxies} proxies, but one row of a class is transported; use 1")

    @property
    def cosine_head(self) -> CosineHead:
        """The head of the network."""
        return head_as(self.network, CosineHead, self, "whose rows are transported between classes")

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if not self.teacher:
            return
        self.eval()
        old = self.teacher.num_columns
        means = self.class_means()
        known = (means.known[:old].nonzero().squeeze(1), old + means.known[old:].nonzero().squeeze(1))
        if min(len(columns) for columns in known):
            self._transport(old, known, F.normalize(means.means, dim=1))
        self.train()

    @torch.no_grad()
    def _transport(self, old: int, known: tuple[Tensor, Tensor], means: Tensor) -> None:
        """Make P, the rows of the new classes, and P^, or V^; classes without samples keep their own rows.

        Args:
            old: Number of old classes, the first columns.
            known: Columns of the old and of the new classes with samples.
            means: mu, ``(C, d)``.
        """
        plan = class_plan(means[known[0]], means[known[1]], self.transport_reg)
        rows = self.cosine_head.weight()
        if self.epoch == 0:
            newest = cast(Tensor, self.cosine_head.blocks[-1].weight)
            newest[known[1] - old] = prospective_rows(plan, rows[known[0]]).to(newest)
            made = F.normalize(newest, dim=1)
        else:
            made = F.normalize(rows[:old], dim=1)
            made[known[0]] = retrospective_rows(plan, rows[known[1]]).to(made)
        self.transported.keep("rows", {"rows": made})

    def class_means(self) -> Prototypes:
        """Means of the unit features of all classes with the present network, the same on every process.

        Every process must call it, in eval mode.
        """
        means = Prototypes(self.network.head.num_features).to(self.device)
        self.measure_exemplar_means(means)
        features, labels = self.passes.features()
        means.update(F.normalize(features, dim=1), labels, replace=True)
        return means

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        ce = self.classification_loss(output, batch)
        if not self.teacher:
            return {"ce": ce}
        target = self.teacher(batch.images).logits
        terms = balanced_distillation(ce, output.logits, target, self.temperature)
        if not self.transport_weight or "rows" not in self.transported:
            return terms
        synthesised = projections(output.features, self.transported["rows"]["rows"])
        if self.epoch == 0:
            new = output.logits[:, target.shape[1] :]
            term = softmax_distillation(new, synthesised, self.temperature)
        else:
            share = self.epoch / (self.phase.options.epochs or 1)
            term = share**2 * softmax_distillation(synthesised, target, self.temperature)
        return {**terms, "transport": self.transport_weight * term}

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        self.teacher.learn_from(self.network)
        self.transported.drop("rows")


def _learnt_scale(num_features: int) -> CosineHead:
    return CosineHead(num_features, scale=1.0, learn_scale=True)
