"""Bias Correction: "Large Scale Incremental Learning" (Wu et al., CVPR 2019, arXiv:1905.13260).

From the second task on, a small share of the new data and exemplars, with the same number of samples of each class, is
held out. Training has two stages:

    stage 1, phase ``train``   L(x, y) = (1 - lambda) CE(q(x), y) + lambda CE(softmax(g(x) / T), softmax(q_old(x) / T))
    stage 2                    CE(q(x), y) on the held-out share, over two numbers alpha, beta; the network is frozen

where q are the corrected logits of the network f, and g the corrected logits of its copy before the task:

    q_c(x) = alpha_k f_c(x) + beta_k    for the classes c of task k;  alpha, beta = 1, 0 for the newest until stage 2

lambda = C_old / C -> distill_weight, T -> temperature. The parameters alpha, beta of earlier tasks are fixed and still
applied. Exemplars are chosen by herding among all data of the task, including the held-out share. The prediction is the
class of the largest q_c.
Stage 2 is convex in (alpha, beta) and needs the logits only. By default it is solved by Newton's method, with sums over
all processes, on un-augmented images, like the images of predictions:

    min over alpha, beta of   mean_i CE(q(x_i), y_i) + r / 2 ((alpha - 1)^2 + beta^2),      r -> bias_ridge

The paper has r = 0. A small r bounds the solution where a threshold separates the few held-out samples: CE then has no
minimum. The default is from validation data, 10,000 training images of Fashion-MNIST (MLP, 5 tasks, 500 exemplars, mean
accuracy of tasks 2 to 5 in % over 3 seeds): 84.4 with 1e-5, 84.5 with 1e-3 and 3e-3, 84.3 with 1e-2, 82.7 with 0.1,
80.7 with 1; without stage 2 69.9, with the pair of least CE on the validation data itself 84.7. The paper does not give
the optimizer of stage 2. With ``solver="sgd"`` stage 2 is a phase ``bias`` with r = 0 and augmented images, trained by
Adam with learning rate 0.01 for 100 epochs: where the share is a single batch, beta is then far from the minimum, and
at the learning rate of mammoth (0.001, 250 epochs) alpha hardly changes.
Departs from the authors' code: the held-out exemplars were trained on in the task in which they were new; the authors
reserve a part of the memory for stage 2 that is never trained on. Their code also adds 0.05 beta^2, without a penalty
on alpha, to the loss of stage 2: its minimum has a beta closer to 0.
Departs from re-implementations in which stage 2 computes the softmax of a softmax, or applies weight decay to alpha.
Of each class ``int(held_out * K / C_old)`` samples are held out (as in PyCIL), at least 1 and never all. If a class has
a single exemplar, no sample can be held out, and stage 2 is skipped with a warning; use ``WA`` in this case.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import mix
from cl_lightning.checks import above, at_least, one_of, within
from cl_lightning.distributed import all_sum
from cl_lightning.losses import balanced_distillation
from cl_lightning.memory import Teacher, random_per_class
from cl_lightning.models import Pairs
from cl_lightning.strategy import Batch, ExemplarReplay, Output, Phase, PhaseOptions, Task, Traits

Solver = Literal["exact", "sgd"]
_BIAS_OPTIONS = PhaseOptions(epochs=100)


def correct(logits: Tensor, pairs: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Corrected logits ``alpha_k z_c + beta_k`` for the classes c of task k.

    Args:
        logits: z, ``(B, C)``, where C is the sum of the first sizes; further pairs and sizes are not used.
        pairs: (alpha, beta) of each task, ``(2,)`` each.
        sizes: Number of classes of each task.

    Returns:
        q, ``(B, C)``.
    """
    columns = torch.cat([pair.expand(size, 2) for pair, size in zip(pairs, sizes, strict=True)])[: logits.shape[1]]
    return logits * columns[:, 0] + columns[:, 1]


def _bias_sums(pair: Tensor, logits: Tensor, labels: Tensor, num_new: int) -> tuple[float, Tensor, Tensor]:
    """Mean cross-entropy over all processes, its gradient ``(2,)`` and its Hessian ``(2, 2)`` in (alpha, beta)."""
    new = logits[:, -num_new:]
    log_p = torch.cat([logits[:, :-num_new], pair[0] * new + pair[1]], dim=1).log_softmax(dim=1)
    inputs = torch.stack([new, torch.ones_like(new)], dim=2)  # derivative of q_c, (B, num_new, 2)
    p = log_p.exp()[:, -num_new:, None]
    target = F.one_hot(labels, logits.shape[1])[:, -num_new:, None]
    mean = (p * inputs).sum(dim=1)  # (B, 2)
    slope = ((p - target) * inputs).sum(dim=(0, 1))
    curvature = torch.einsum("bci,bcj->ij", p * inputs, inputs) - mean.T @ mean
    loss = -log_p.gather(1, labels[:, None]).sum()
    count = loss.new_tensor(float(len(labels)))
    sums = all_sum(torch.cat([torch.stack([count, loss]), slope, curvature.flatten()])).cpu()
    means = sums[1:] / sums[0]
    return float(means[0]), means[1:3], means[3:].view(2, 2)


def fit_pair(logits: Tensor, labels: Tensor, num_new: int, *, ridge: float) -> Tensor:
    """(alpha, beta) of the newest task, by Newton's method with a line search.

        min over alpha, beta of   mean_i CE(q_i, y_i) + ridge / 2 ((alpha - 1)^2 + beta^2)

    where q are the logits with alpha z + beta in the last ``num_new`` columns. The objective is strictly convex.

    Args:
        logits: z, those of this process's samples, ``(n, C)``; means are taken over all processes.
        labels: Columns of the samples, int64 ``(n,)``.
        num_new: Number of classes of the newest task, at least 1.
        ridge: Weight of the penalty, above 0.

    Returns:
        alpha and beta, float64 ``(2,)``, on the CPU, the same on every process.
    """
    logits, start = logits.double(), torch.tensor([1.0, 0.0], dtype=torch.float64)

    def measured(pair: Tensor) -> tuple[float, Tensor, Tensor]:
        loss, slope, curvature = _bias_sums(pair.to(logits.device), logits, labels, num_new)
        gap = pair - start
        return loss + ridge / 2 * float(gap @ gap), slope + ridge * gap, curvature + ridge * torch.eye(2).double()

    pair, (value, slope, curvature) = start, measured(start)
    for _ in range(100):  # about 10 in practice
        step: Tensor = torch.linalg.solve(curvature, slope)
        decrement = float(slope @ step)  # twice the distance to the minimum, to second order
        if decrement < 1e-12:  # below the precision of the line search; the last step converges quadratically
            return pair - step
        scale = 1.0
        while (trial := measured(pair - scale * step))[0] > value - 1e-4 * scale * decrement and scale > 1e-6:
            scale /= 2
        pair, (value, slope, curvature) = pair - scale * step, trial
    return pair


def held_out(labels: Tensor, count: int, key: int) -> Tensor:
    """Choose ``count`` random samples of each class to be held out, but never all samples of a class.

    Args:
        labels: Columns of the samples, int64 ``(n,)``, at least 0.
        count: Number of samples to hold out of each class.
        key: Key of the random numbers.

    Returns:
        Mask of the held-out samples, bool ``(n,)``.
    """
    return random_per_class(labels, (labels.bincount()[labels] - 1).clamp(max=count), key)


class BiC(ExemplarReplay):
    """Distillation on the task and on herded exemplars, then a linear correction of the bias towards new classes.

    The correction has two parameters per task, fitted to a held-out share of both.

    Args:
        memory_size: K, in samples, over all classes and processes.
        temperature: T, above 0.
        distill_weight: lambda, in [0, 1]; None for C_old / C, which requires new classes in each task.
        held_out: Share of the exemplars of each class that is held out for stage 2, in (0, 1).
        solver: Stage 2 by ``exact`` minimisation, or by steps of an optimizer (``sgd``) in a phase ``bias``.
        bias_ridge: r of the exact solution, above 0.
        bias_options: Options of the phase ``bias``, at least 1 epoch. Its optimizer should have no weight decay; the
            default is Adam with learning rate 0.01.
        kwargs: Options of the base class.
    """

    traits = Traits(family="rehearsal", paper="Wu et al., CVPR 2019, arXiv:1905.13260", keeps_exemplars=True)

    def __init__(
        self,
        *,
        memory_size: int = 2000,
        temperature: float = 2.0,
        distill_weight: float | None = None,
        held_out: float = 0.1,
        solver: Solver = "exact",
        bias_ridge: float = 1e-3,
        bias_options: PhaseOptions = _BIAS_OPTIONS,
        **kwargs: Any,
    ) -> None:
        super().__init__(memory_size=memory_size, **kwargs)
        above(self, 0, temperature=temperature)
        within(self, "[0, 1]", distill_weight=distill_weight, optional=True)
        if distill_weight is None:  # C_old / C is 1 without new classes: no classification loss
            self.traits = self.traits.but(
                scenarios=("class-incremental", "online"), remedy="give distill_weight, such as 0.5"
            )
        within(self, "(0, 1)", held_out=held_out)
        one_of(self, get_args(Solver), solver=solver)
        above(self, 0, bias_ridge=bias_ridge)
        if solver == "exact" and bias_options != _BIAS_OPTIONS:
            raise ValueError("BiC: give solver sgd with bias_options; the exact solver has no phase 'bias'")
        at_least(self, 1, **{"bias_options.epochs": bias_options.epochs}, optional=True)
        self.temperature, self.distill_weight = temperature, distill_weight
        self.held_out, self.solver, self.bias_ridge = held_out, solver, bias_ridge
        self.bias_options = bias_options.filled(functools.partial(torch.optim.Adam, lr=0.01))
        self.teacher = Teacher()
        self.pairs = Pairs()  # (alpha, beta) of each task

    def correct(self, logits: Tensor) -> Tensor:
        """Corrected logits of the network or of the teacher, whose pairs are unchanged since it was copied."""
        return correct(logits, list(self.pairs.values), self.network.head.block_sizes())

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if task.num_new:
            self.pairs.grow()

    def phases(self, task: Task) -> list[Phase]:
        if task.is_first or not task.num_new:
            return [Phase()]
        train = Phase(samples=functools.partial(self._share, held=False))
        if self.solver == "exact":
            return [train]
        bias = Phase(
            "bias",
            self.bias_options,
            trains=lambda: [self.pairs.values[-1]],
            freezes=lambda: [self.network],
            samples=functools.partial(self._share, held=True),
            needed=self._holds_out,
        )
        return [train, bias]

    def end_phase(self, phase: Phase) -> None:
        if self.solver == "exact" and not self.task.is_first and self.task.num_new and self._holds_out():
            self.eval()
            self._solve()
            self.train()

    @torch.no_grad()
    def _solve(self) -> None:
        """Set (alpha, beta) of the newest task to the exact solution on the held-out share."""
        logits, labels = [], []
        held = functools.partial(self._share, held=True)
        for batch in self.passes.batches(memory=self.memory, where=held):
            if len(batch):
                with self.trainer.precision_plugin.forward_context():
                    found = self.network(batch.images).logits
                logits.append(self.correct(found.double()))
                labels.append(batch.labels)
        logits = logits or [torch.zeros(0, self.task.num_seen, dtype=torch.float64, device=self.device)]
        labels = labels or [torch.zeros(0, dtype=torch.int64, device=self.device)]
        pair = fit_pair(torch.cat(logits), torch.cat(labels), self.task.num_new, ridge=self.bias_ridge)
        self.pairs.values[-1].copy_(pair)

    def _holds_out(self) -> bool:
        if self._count(self.task) > 0:
            return True
        warnings.warn(
            f"BiC: give a larger memory_size; at task {self.task.index} a class has fewer than two exemplars, so none "
            "can be held out, and stage 2 (bias correction) is skipped",
            stacklevel=2,
        )
        return False

    def _share(self, labels: Tensor, replayed: Tensor, *, held: bool) -> Tensor | None:
        """Mask of the samples that are held out for stage 2, or of the others; None for all if none are held out."""
        count = self._count(self.task)
        if count == 0:
            return None
        chosen = held_out(labels, count, mix(self.seed, 0xB1C, self.task.index))
        return chosen if held else ~chosen

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        output = output._replace(logits=self.correct(output.logits))
        ce = self.classification_loss(output, batch)
        if self.phase.name == "bias" or not self.teacher:
            return {"ce": ce}
        target = self.correct(self.teacher(batch.images).logits)  # (batch, classes before this task)
        return balanced_distillation(ce, output.logits, target, self.temperature, self.distill_weight)

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        self.teacher.learn_from(self.network)

    def predict(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        return self.correct(self.network.classify(images))

    def _count(self, task: Task) -> int:
        """Number of samples of each class to hold out; 0 if there is no stage 2."""
        if task.is_first or not task.num_new:
            return 0
        counts = self.memory.counts(task.num_seen - task.num_new)
        return max(int(self.held_out * self.memory.size / len(counts)), 1) if int(counts.min()) > 1 else 0
