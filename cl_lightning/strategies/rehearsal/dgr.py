"""Gradient reweighting for imbalanced class-incremental learning, DGR (He, CVPR 2024, arXiv:2402.18528).

The network is trained on the data of the task and on herded exemplars, with classes of unequal size. pi_c is the share
of class c among the samples of an epoch, z the logits, z_old the logits of the network before the task:

    L = CE(z + log pi, y) + KD(z, z_old)

*Gradient reweighting* of the rows of the head, g_c the gradient of CE and h_c of KD with respect to row c. Phi_c is the
sum of ||g_c|| over the steps of the task, n_old and n_new are numbers of training samples, of the K old classes before
the task and of the new classes. The optimizer gets

    old classes   w_c g_c + rho h_c         w_c = r_old min Phi / Phi_c,  minimum over the old classes
    new classes   w_c g_c                   w_c = r_new min Phi / Phi_c,  minimum over the new classes
    r_old = min(1, R),   r_new = min(1, gamma R),   R = mean Phi_new / mean Phi_old
    gamma = exp(-n_old / (n_old + n_new))
    rho = || (w_c ||g_c||)_c || / || (||h_c||)_c ||        the part of KD is as long as the part of CE, over all classes

Biases are scaled with their rows; the backbone gets the plain gradient. In the first task r_new = 1.

*Distribution-aware distillation.* p_c is the number of samples of an old class that were not kept as exemplars, H the
entropy, q = (p / sum p) / ||p / sum p||_2 and T the temperature:

    z^ = q z + (1 - q) z_old,   e = H(p / sum p) / ln K
    KD = -lambda T^2 sqrt(n_old / n_new) softmax(z_old / T) . [e log softmax(z / T) + (1 - e) log softmax(z^ / T)]

as mean over the batch. Where as many samples of each class were removed, e = 1, and it is plain distillation.
lambda -> distill_weight, T -> temperature.

R in r_new is as in both public codes: rows of new classes are held back where gradients of old classes are the larger
ones. ``inverse_ratio``, which is ours, has 1 / R in r_new, and holds back the group with the larger gradients. Departs
from the code where it divides 0 by 0: classes without samples have no gradient of CE and do not count in minimum and
means, and rho is 1 while h is no more than rounding, as in the first step of a task. Equal p, also 0, and K = 1 have
e = 1. In the second public code, for pretrained networks, KD is plain and n counts classes.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cl_lightning.batch import ImageShape
from cl_lightning.checks import above, at_least
from cl_lightning.distributed import all_sum, world_size
from cl_lightning.losses import full_precision, mean_over_rows
from cl_lightning.memory import GrowingBuffers, Teacher
from cl_lightning.models import LinearHead, head_as
from cl_lightning.strategies.base import trained_weights
from cl_lightning.strategy import Batch, ExemplarReplay, Output, Phase, Task, Traits

_ROUNDING = 1e-6  # of the other gradient: KD begins at 0 where the network computes what its teacher does


def class_factors(sums: Tensor, num_old: int) -> Tensor:
    """``alpha_c = min Phi / Phi_c`` with the minimum over the group of class c, ``(C,)`` in (0, 1].

    Args:
        sums: Phi, at least 0, ``(C,)``; classes with 0 do not count, and have alpha = 1.
        num_old: K, number of old classes, the first ones.
    """
    parts = []
    for group in (sums[:num_old], sums[num_old:]):
        if len(group):
            least = group.masked_fill(group == 0, torch.inf).amin()
            parts.append(torch.where(group > 0, least / group, 1.0))
    return torch.cat(parts)


def group_factors(sums: Tensor, num_old: int, gamma: float, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """``r_old`` and ``r_new``, scalars in (0, 1]; both 1 without old or new classes of Phi above 0.

    Args:
        sums: Phi, at least 0, ``(C,)``; classes with 0 do not count.
        num_old: K, number of old classes, the first ones.
        gamma: Factor of new classes, in (0, 1].
        inverse: Whether r_new has 1 / R instead of R.
    """
    old, new = ((group.sum() / (group > 0).sum().clamp(min=1)) for group in (sums[:num_old], sums[num_old:]))
    known = (old > 0) & (new > 0)
    ratio = torch.where(known, new / old, 1.0)
    of_new = torch.where(known, gamma * (1 / ratio if inverse else ratio), 1.0)
    return ratio.clamp(max=1), of_new.clamp(max=1)


def distribution_aware_distillation(
    student: Tensor, teacher: Tensor, removed: Tensor | None = None, temperature: float = 2.0
) -> Tensor:
    """KD without lambda sqrt(n_old / n_new): cross-entropy form, times T^2, mean over the batch, in nats.

    Args:
        student: z of the old classes, ``(B, K)``.
        teacher: z_old, ``(B, K)``, without gradient.
        removed: p, at least 0, ``(K,)``; None for plain distillation.
        temperature: T, positive.
    """
    z, z_old = full_precision(student), full_precision(teacher.detach())
    target = (z_old / temperature).softmax(dim=1)
    fit = (target * (z / temperature).log_softmax(dim=1)).sum(dim=1)
    if removed is not None:
        p = removed.to(z) / removed.sum().clamp(min=1)
        evenness = -torch.xlogy(p, p).sum() / math.log(max(len(p), 2))
        evenness = torch.where((removed == removed[0]).all(), 1.0, evenness)
        q = p / p.norm().clamp(min=torch.finfo(p.dtype).tiny)
        mixed = (q * z + (1 - q) * z_old) / temperature
        fit = evenness * fit + (1 - evenness) * (target * mixed.log_softmax(dim=1)).sum(dim=1)
    return -mean_over_rows(fit) * temperature**2


class ClassBalance(GrowingBuffers):
    """What DGR knows of each class.

    Attributes:
        sums: Phi of the task, ``(C,)``.
        counts: Number of training samples in finished tasks, int64 ``(C,)``.
    """

    kept_as: ClassVar[str] = "statistics"
    sums: Tensor
    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(0))
        self.register_buffer("counts", torch.zeros(0, dtype=torch.int64))

    def begin(self, num_classes: int) -> None:
        """Begin a task with Phi = 0 of all classes."""
        self.sums = self.sums.new_zeros(num_classes)
        self.counts = torch.cat([self.counts, self.counts.new_zeros(num_classes - len(self.counts))])

    def num_bytes(self) -> int:
        """Size of all buffers in bytes."""
        return sum(buffer.nbytes for buffer in self.buffers())


class DGR(ExemplarReplay):
    """Cross-entropy with adjusted logits, reweighted gradients of the head, and distribution-aware distillation.

    Made for exemplars and tasks with classes of unequal size (``LongTailed``).

    Args:
        memory_size: Number of exemplars, over all classes and processes, at least 0.
        distill_weight: lambda, at least 0.
        temperature: T, above 0.
        distribution_aware: Whether KD considers the removed samples; False for plain distillation.
        reweight: Whether the gradients of the rows are reweighted; False for the paper's ablation.
        inverse_ratio: Whether r_new has the inverse of R.
        kwargs: Options of the base class. The head is a ``LinearHead``.

    Attributes:
        balance: Phi, and numbers of samples.
    """

    traits = Traits(
        family="rehearsal",
        paper="He, CVPR 2024, arXiv:2402.18528",
        keeps_exemplars=True,
        scenarios=("class-incremental", "online"),
    )

    def __init__(
        self,
        *,
        memory_size: int = 2000,
        distill_weight: float = 0.7,
        temperature: float = 2.0,
        distribution_aware: bool = True,
        reweight: bool = True,
        inverse_ratio: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(memory_size=memory_size, **kwargs)
        at_least(self, 0, distill_weight=distill_weight)
        above(self, 0, temperature=temperature)
        if inverse_ratio and not reweight:
            raise ValueError("DGR: inverse_ratio is True, but reweight is False; give reweight=True")
        self.distill_weight, self.temperature = distill_weight, temperature
        self.distribution_aware, self.reweight, self.inverse_ratio = distribution_aware, reweight, inverse_ratio
        self.teacher, self.balance = Teacher(), ClassBalance()
        self._log_prior = self._removed = torch.zeros(0)
        self._sizes = 0, 1  # n_old and n_new
        self._gradients: Tensor | None = None  # of CE and KD for the rows, of this process, since the last step

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        head_as(self.network, LinearHead, self, "whose rows have gradients of their own")

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.balance.begin(task.num_seen)

    def phases(self, task: Task) -> list[Phase]:
        return [Phase(samples=self._count)]

    def _count(self, labels: Tensor, replayed: Tensor) -> None:
        """Compute log(pi) and p when the phase begins or is resumed. Returns None: all samples are used."""
        counts = labels[labels >= 0].bincount(minlength=self.task.num_seen).double()
        if self.data.module.sampler == "balanced":
            counts = (counts > 0).double()
        self._log_prior = (counts / counts.sum()).log().float()
        held = self.memory.labels.cpu()
        known = self.balance.counts.cpu()
        removed = known - held[held >= 0].bincount(minlength=len(known))
        self._removed = removed[: self.teacher.num_columns].clamp(min=0).float()
        num_old = self.task.num_seen - self.task.num_new
        self._sizes = int(known.sum()), int((labels[~replayed] >= num_old).sum())

    def on_train_start(self) -> None:
        super().on_train_start()
        self._log_prior, self._removed = self._log_prior.to(self.device), self._removed.to(self.device)
        self._gradients = None

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        adjusted = output._replace(logits=full_precision(output.logits) + self._log_prior)
        terms = {"ce": self.classification_loss(adjusted, batch)}
        if self.teacher:
            student, target = self.teacher.pair(batch.images, output)
            removed = self._removed if self.distribution_aware else None
            weight = self.distill_weight * math.sqrt(self._sizes[0] / max(self._sizes[1], 1))
            kd = distribution_aware_distillation(student, target, removed, self.temperature)
            terms["distill"] = weight * kd
        if self.reweight and torch.is_grad_enabled():
            self._record(list(terms.values()), batch.weight)
        return terms

    # ------------------------------------------------------------------ gradients

    def _rows(self) -> dict[str, nn.Parameter]:
        """Parameters of the head that are trained, by name."""
        return trained_weights(self.network.head)

    def _record(self, terms: list[Tensor], weight: float) -> None:
        """Add the gradients of CE and KD for the rows to what was recorded since the last optimizer step."""
        rows = list(self._rows().values())
        if not rows:
            return
        both = torch.zeros(2, sum(row.numel() for row in rows), device=self.device)
        for part, term in zip(both, terms, strict=False):
            share = torch.full_like(term, weight)
            found = torch.autograd.grad(term, rows, share, retain_graph=True, allow_unused=True, materialize_grads=True)
            part.copy_(torch.cat([gradient.flatten() for gradient in found]))
        self._gradients = both if self._gradients is None else self._gradients + both

    @torch.no_grad()
    def edit_gradients(self, batch: Batch) -> None:
        rows = self._rows()
        if not self.reweight or not rows:
            return
        sizes = [row.numel() for row in rows.values()]
        both, self._gradients = self._gradients, None
        if both is None:  # this process had no samples
            both = torch.zeros(2, sum(sizes), device=self.device)
        both = all_sum(both) / (world_size() * self.trainer.accumulate_grad_batches)
        ce, kd = (
            {name: part.view_as(rows[name]) for name, part in zip(rows, torch.split(flat, sizes), strict=True)}
            for flat in both
        )
        norms, num_old = self._norms(ce), self.task.num_seen - self.task.num_new  # ||g_c||
        self.balance.sums += norms
        n_old, n_new = self._sizes
        gamma = math.exp(-n_old / max(n_old + n_new, 1))
        of_old, of_new = group_factors(self.balance.sums, num_old, gamma, inverse=self.inverse_ratio)
        factors = class_factors(self.balance.sums, num_old)  # w
        factors = torch.cat([factors[:num_old] * of_old, factors[num_old:] * of_new])
        length, of_kd = (factors * norms).norm(), self._norms(kd)[:num_old].norm()
        rho = torch.where(of_kd > _ROUNDING * length, length / of_kd, 1.0)
        for number, of_rows in enumerate(torch.split(factors, self.network.head.block_sizes())):
            for name, column in ((f"blocks.{number}.weight", of_rows[:, None]), (f"blocks.{number}.bias", of_rows)):
                if name in rows and (gradient := rows[name].grad) is not None:
                    gradient += ((column - 1) * ce[name] + (rho - 1) * kd[name]).to(gradient.dtype)

    def _norms(self, gradients: dict[str, Tensor]) -> Tensor:
        """Norm of the gradient of each row, ``(C,)``; 0 for rows that are not trained."""
        sizes = self.network.head.block_sizes()
        found = (gradients.get(f"blocks.{number}.weight") for number in range(len(sizes)))
        parts = [
            torch.zeros(size, device=self.device) if rows is None else rows.norm(dim=1)
            for rows, size in zip(found, sizes, strict=True)
        ]
        return torch.cat(parts)

    # ------------------------------------------------------------------ end of a task

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        labels = self.data.labels()
        self.balance.counts += labels[labels >= 0].bincount(minlength=task.num_seen).to(self.balance.counts.device)
        self.teacher.learn_from(self.network)
