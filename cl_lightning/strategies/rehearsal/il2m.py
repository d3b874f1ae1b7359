"""IL2M: Class Incremental Learning With Dual Memory (Belouadah & Popescu, ICCV 2019).

The network is fine-tuned by cross-entropy on the data of the task and on herded exemplars, without distillation. Its
softmax scores p are biased towards the classes of the current task t, of which there are more images. A second memory
holds numbers of each class from the time when it was new, and rectifies the scores of the old classes o (eq. 1):

    if argmax_c p_c is a class of task t:   p_o <- p_o * (mu_N(o) / mu_t(o)) * (mu(t) / mu(t_o))
    otherwise                               p is unchanged

mu_N(o) is the mean score of class o over its data at the end of task t_o, which brought it; mu_t(o) its mean score over
its exemplars under the present network; mu(t) the mean of the largest score over the data of the new classes at the end
of task t. The prediction is the class of the largest score.
All means are of un-augmented training images. Departs from FACIL and Avalanche, which multiply logits: a factor above 1
makes a negative logit smaller. The scores of a class without exemplars are unchanged. While a task is trained, its
numbers are not known, and the scores of the network predict.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.losses import full_precision
from cl_lightning.memory import GrowingBuffers, Memory, class_means
from cl_lightning.strategy import Batch, ExemplarReplay, Output, Task, Traits

_EPS = 1e-12


class ScoreMemory(GrowingBuffers):
    """Mean scores of each class and task: the second memory of IL2M.

    Attributes:
        initial: mu_N, mean score of each class when it was new, ``(C,)``.
        current: mu_t, mean score of each old class over its exemplars, ``(C,)``; 0 if it is not known.
        owners: Task that brought each class, int64 ``(C,)``.
        confidence: mu, mean of the largest score over the new classes of each task, ``(T,)``; 1 for a task without any.
    """

    kept_as: ClassVar[str] = "statistics"
    initial: Tensor
    current: Tensor
    owners: Tensor
    confidence: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("initial", "current", "confidence"):
            self.register_buffer(name, torch.zeros(0))
        self.register_buffer("owners", torch.zeros(0, dtype=torch.int64))

    def add(self, initial: Tensor, confidence: Tensor) -> None:
        """Append the numbers of a task: mean scores of its new classes, ``(C_new,)``, and of the largest, scalar."""
        self.owners = torch.cat([self.owners, torch.full_like(initial, len(self.confidence), dtype=torch.int64)])
        self.initial = torch.cat([self.initial, initial.float()])
        self.confidence = torch.cat([self.confidence, confidence.float()[None]])

    def factors(self) -> Tensor:
        """Factor of each class's score, ``(C,)``: 1 for classes of the newest task and for unknown mu_t."""
        ratio = self.initial.clamp(min=_EPS) / self.current.clamp(min=_EPS)
        trust = self.confidence[-1] / self.confidence[self.owners].clamp(min=_EPS)
        known = (self.owners < len(self.confidence) - 1) & (self.current > 0)
        return torch.where(known, ratio * trust, 1.0)

    def rectify(self, logits: Tensor) -> Tensor:
        """Logarithms of the rectified scores, ``(B, C)``, of the logits of the network, ``(B, C)``."""
        logits = full_precision(logits)
        newest = (self.owners == len(self.confidence) - 1)[logits.argmax(dim=1), None]
        return logits.log_softmax(dim=1) + torch.where(newest, self.factors().log(), 0.0)

    def num_bytes(self) -> int:
        """Size of all buffers in bytes."""
        return sum(buffer.nbytes for buffer in self.buffers())


class IL2M(ExemplarReplay):
    """Fine-tuning with exemplars; scores of old classes are rectified by statistics from when they were new.

    Args:
        memory_size: K, in samples, over all classes and processes.
        kwargs: Options of the base class.
    """

    traits = Traits(family="rehearsal", paper="Belouadah & Popescu, ICCV 2019", keeps_exemplars=True)

    def __init__(self, *, memory_size: int = 2000, **kwargs: Any) -> None:
        super().__init__(memory_size=memory_size, **kwargs)
        self.scores = ScoreMemory()

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": self.classification_loss(output, batch)}

    def end_task(self, task: Task) -> None:
        self._measure(task)  # before the lists of old exemplars are shortened
        super().end_task(task)

    @torch.no_grad()
    def _measure(self, task: Task) -> None:
        """Compute mu_N and mu of the new classes, and mu_t of the old ones, over all processes."""
        first = task.num_seen - task.num_new
        own, largest, labels = self._scores(None)
        new = labels >= first
        means = class_means(own[new, None], labels[new], task.num_seen)[first:, 0]
        confidence = class_means(largest[new, None], torch.zeros_like(labels[new]), 1)[0, 0]
        self.scores.add(means, confidence if task.num_new else torch.ones_like(confidence))
        own, _, labels = self._scores(self.memory)
        of_old = class_means(own[:, None], labels, task.num_seen)[:, 0]
        self.scores.current = F.pad(of_old[:first], (0, task.num_new))

    def _scores(self, memory: Memory | None) -> tuple[Tensor, Tensor, Tensor]:
        """Score of the own class and largest score of each sample of the task or of a memory, and its column."""
        features, labels = self.passes.features(memory=memory)
        scores = self.network.head.classify(features).softmax(dim=1)
        if not len(labels):
            return scores.sum(dim=1), scores.sum(dim=1), labels
        return scores.gather(1, labels[:, None])[:, 0], scores.amax(dim=1), labels

    def predict_within_task(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        return self.network.classify(images)

    def predict(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        logits = self.network.classify(images)
        measured = len(self.scores.confidence) == len(self.task_columns)
        return self.scores.rectify(logits) if measured else logits
