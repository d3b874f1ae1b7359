"""Rainbow Memory, RM (Bang et al., CVPR 2021, arXiv:2103.17230): a memory of easy to hard samples, for blurry tasks.

A step trains on the batch and as many samples of a memory, with CutMix. When a task ends, the memory is chosen again
among its samples and all samples of the task, by their uncertainty: with A fixed perturbations p_a of an image, and c_a
the class that the network in eval mode predicts for p_a(x),

    u(x) = 1 - max_c |{a: c_a = c}| / A                       0 where all predictions agree
    memory of class c: of its n_c candidates in the order of increasing u, every (n_c // m_c)-th, m_c of them

m_c is M // (number of classes), and the remainder goes to the first classes, one sample each; a class with fewer
candidates gives the rest of its share to the others. A -> perturbations, M -> memory_size. The first memory is chosen
at random, with the same numbers m_c.

The paper trains a task for 256 epochs with warm restarts (``WarmRestarts``), AutoAugment and CutMix; blurry streams
need ``one_pass: false`` for it. Departs from the paper: the perturbations are ours, shears, rotations and changes of
colour of a fixed amount, without Cutout.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from cl_lightning.batch import Draw
from cl_lightning.checks import above, at_least, within
from cl_lightning.data import cutmix, mixed_loss
from cl_lightning.data.transforms import OPERATIONS, change
from cl_lightning.distributed import all_gather_together
from cl_lightning.memory import rank_in_group
from cl_lightning.strategies.base import MemoryReplay, check_loss_classes, of_memory
from cl_lightning.strategy import Batch, Output, Task, Traits

PERTURBATIONS: tuple[tuple[str, float], ...] = (
    ("ShearX", 0.2),
    ("Rotate", -20.0),
    ("Brightness", 0.5),
    ("Contrast", -0.5),
    ("ShearY", -0.2),
    ("Color", -0.9),
    ("Rotate", 20.0),
    ("Sharpness", 0.9),
    ("ShearX", -0.2),
    ("Brightness", -0.5),
    ("Contrast", 0.5),
    ("ShearY", 0.2),
)
"""Operation and amount of each perturbation; A of them are the first A."""
_NAMES = list(OPERATIONS)
_FIRST = 0x4A1  # salt of the choice after the first task


def perturbed(raw: Tensor, number: int) -> Tensor:
    """Raw images after a perturbation of the table, uint8 ``(B, C, H, W)``.

    Args:
        raw: uint8 ``(B, C, H, W)``.
        number: Place in ``PERTURBATIONS``.
    """
    name, amount = PERTURBATIONS[number]
    return change(raw, torch.full((len(raw),), _NAMES.index(name)), torch.full((len(raw),), amount))


def disagreement(predictions: Tensor) -> Tensor:
    """u of each row, ``(n,)``, in [0, 1 - 1/A]: the share of predictions other than the most frequent one.

    Args:
        predictions: Predicted classes, int64 ``(n, A)``.
    """
    votes = (predictions[:, :, None] == predictions[:, None, :]).sum(dim=2).amax(dim=1)
    return 1 - votes / predictions.shape[1]


def balanced_quotas(counts: Tensor, size: int) -> Tensor:
    """Number of samples of each class in a memory, int64 ``(C,)``, as equal as the numbers of candidates allow.

    Args:
        counts: Number of candidates of each class, int64 ``(C,)``.
        size: M; the quotas sum to M, or to the number of candidates if there are fewer.
    """
    level = torch.arange(int(counts.max()) + 1 if len(counts) else 1, device=counts.device)
    totals = torch.minimum(counts, level[:, None]).sum(dim=1)  # with at most this number of each class
    equal = int((totals <= size).sum()) - 1
    quotas = counts.clamp(max=equal)
    more = counts > equal
    return quotas + (more & (more.cumsum(0) <= size - int(totals[equal]))).long()


def evenly_chosen(labels: Tensor, order: Tensor, size: int) -> Tensor:
    """Samples of a memory, in even steps from the first to the last of each class, bool ``(n,)``.

    Args:
        labels: Columns of the candidates, int64 ``(n,)``.
        order: Candidates are sorted by this number, ``(n,)``; equal ones stay in their order.
        size: M.
    """
    counts = labels.bincount()
    quotas = balanced_quotas(counts, size)
    place = torch.empty_like(labels)
    place[order.argsort(stable=True)] = torch.arange(len(labels), 0, -1, device=labels.device)
    level, _ = rank_in_group(place, labels)  # 0 for the first of each class
    steps = (counts // quotas.clamp(min=1))[labels].clamp(min=1)
    return (level % steps == 0) & (level // steps < quotas[labels])


class RainbowMemory(MemoryReplay):
    """Replay of a memory whose samples range from certain to uncertain predictions under perturbations.

    Args:
        memory_size: M, in samples, over all processes, at least 1.
        perturbations: A, in 1 .. 12; with 1 all samples are equally certain.
        mix_probability: Probability of CutMix in a step, in [0, 1].
        mix_alpha: alpha of CutMix, above 0.
        kwargs: Options of ``MemoryReplay``, apart from ``policy``.
    """

    traits = Traits(
        family="rehearsal", paper="Bang et al., CVPR 2021, arXiv:2103.17230", keeps_exemplars=True, inputs=("image",)
    )

    def __init__(
        self,
        *,
        memory_size: int = 500,
        perturbations: int = 12,
        mix_probability: float = 0.5,
        mix_alpha: float = 1.0,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("policy") is not None:
            raise ValueError("RainbowMemory: remove policy: the memory is chosen by uncertainty")
        super().__init__(memory_size=memory_size, **kwargs)
        check_loss_classes(self)
        at_least(self, 1, memory_size=memory_size)
        within(self, f"[1, {len(PERTURBATIONS)}]", perturbations=perturbations)
        within(self, "[0, 1]", mix_probability=mix_probability)
        above(self, 0, mix_alpha=mix_alpha)
        self.perturbations, self.mix_probability, self.mix_alpha = perturbations, mix_probability, mix_alpha

    def prepare_batch(self, batch: Batch) -> Batch:
        return cutmix(super().prepare_batch(batch), self.mix_probability, self.mix_alpha)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": mixed_loss(partial(self.classification_loss, output), batch)}

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        super().end_task(task)
        memory = self.memory
        held = of_memory(self, memory, self.uncertainty) if len(memory) else torch.zeros(0, device=self.device)
        own, labels, indices = self._of_task(task)
        chosen = evenly_chosen(torch.cat([memory.labels, labels]), torch.cat([held, own]), memory.size)
        kept, new = torch.split(chosen, [len(memory), len(labels)])
        memory.keep(kept.nonzero().flatten())
        for batch in self.passes.batches(indices=indices[new].cpu()):
            self.offer(batch)

    def _of_task(self, task: Task) -> tuple[Tensor, Tensor, Tensor]:
        """Order, columns and indices of the samples of the task, ``(n,)`` each, the same on every process."""
        found = []
        for batch in self.passes.batches():
            order = torch.zeros(len(batch), device=self.device) if task.is_first else self.uncertainty(batch)
            found.append((order, batch.labels, batch.indices))
        order, labels, indices = all_gather_together(torch.cat(column) for column in zip(*found, strict=True))
        by_index = indices.argsort()
        random = Draw.of(len(order), self.seed, _FIRST).rand().to(order.device)
        return random if task.is_first else order[by_index], labels[by_index], indices[by_index]

    def uncertainty(self, batch: Batch) -> Tensor:
        """u of each sample, float32 ``(B,)``; call it in eval mode.

        Args:
            batch: Samples with raw images.
        """
        if not len(batch):
            return torch.zeros(0, device=self.device)
        predictions = []
        for number in range(self.perturbations):
            images = self.data.finish(batch.replace(raw=perturbed(batch.raw, number))).images
            with self.trainer.precision_plugin.forward_context():
                predictions.append(self.predict(images).argmax(dim=1))
        return disagreement(torch.stack(predictions, dim=1))
