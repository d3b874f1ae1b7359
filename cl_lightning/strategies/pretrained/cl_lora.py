"""CL-LoRA: shared and task-specific low-rank adapters (He et al., CVPR 2025, arXiv:2505.24816).

LoRA on queries and values of a frozen pretrained transformer, initially with random orthonormal rows of A and B = 0. In
the first half of the blocks it is shared by all tasks: A is not trained, B is trained on from task to task. In the
second half each task t has its own, with a scale mu_t of each adapted part of each block, initially from U(0.5, 1.5):

    first blocks   W x + B A x,  A A^T = I          last blocks, task t   W x + mu_t B_t A_t x

    L = CE(s cos(phi_t(x), w), y over the classes of the task)
        + distill_weight KD(e(x), e_old(x)) + ortho_weight 1/t sum_{i < t} |cos(mu_t, mu_i)|      from task 1 on

phi_t(x): features with the adapters of task t. e(x): early features, of the first blocks and the last norm; e_old(x)
with B of the task before. KD is the cross-entropy of softened class probabilities (T -> temperature, no factor T^2) of
both under the classifier of the task; e_old and the classifier on it get no gradient. In the gradient of KD, row i of B
(d rows) is multiplied by the relative size of this row at the end of the task before (gradient reassignment):

    d || B_old,i || / sum_j || B_old,j ||,     1 on average

A class is represented by its mean under the adapters of its own task, mu_c, and compared there, without task id:

    score_c(x) = cos(phi_i(x), mu_c),   i: task of class c

The first blocks are computed once for a prediction, the last blocks once for each task. The means are not corrected
for the drift of the first blocks. If a class recurs, its mean is computed again, with the adapters of the last task
that contains it, and its row of the classifier continues from its earlier value.
Departs from the code, which takes two optimizer steps for each batch, on KD and on the other terms, that share their
momentum: here the gradients are added in one step. To first order in the learning rate both are equal. In the code the
classifier gets a gradient from the teacher, too, and mu has entries for keys, which are not adapted.
"""

import functools
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import ImageShape
from cl_lightning.checks import above, at_least
from cl_lightning.losses import full_precision, softmax_distillation
from cl_lightning.memory import Prototypes, dense_columns
from cl_lightning.models import CosineHead, LoRA, PeftBranches
from cl_lightning.strategy import Batch, ContinualStrategy, HeadFactory, Output, Task, Traits


def row_shares(up: Tensor) -> Tensor:
    """Size of each row relative to the mean row, ``d ||B_i|| / sum_j ||B_j||``; 1 for rows that are all 0.

    Args:
        up: B, ``(..., d, r)``.

    Returns:
        ``(..., d)``, at least 0.
    """
    norms = up.norm(dim=-1)
    total = norms.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, up.shape[-2] * norms / total, 1.0)


def mean_overlap(scales: Tensor, earlier: Tensor) -> Tensor:
    """Mean absolute cosine of the scales of a task and of each earlier task.

    Args:
        scales: Scales of a task, ``(blocks, parts)``.
        earlier: Scales of earlier tasks, ``(tasks, blocks, parts)``, at least one.

    Returns:
        A scalar in [0, 1].
    """
    return F.cosine_similarity(scales.flatten()[None], earlier.flatten(1), dim=1).abs().mean()


class BranchPrototypes(Prototypes):
    """Mean of each class in the feature space of its own branch.

    Attributes:
        branches: Branch of each class, int64 ``(C,)``.
    """

    branches: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.register_buffer("branches", torch.zeros(0, dtype=torch.int64))

    @torch.no_grad()
    def assign(self, features: Tensor, labels: Tensor, num_classes: int, branch: int) -> None:
        """Replace the means of the classes in ``labels`` by their means in a branch.

        Args:
            features: This process's share, in the branch, ``(n, d)``.
            labels: Columns, int64 ``(n,)``; -1 for unlabelled samples.
            num_classes: C, number of classes seen so far.
            branch: Number of the branch.
        """
        self.update(features, labels, num_classes=num_classes, replace=True)
        columns, _ = dense_columns(labels, len(self))
        self.branches[columns] = branch

    def branch_scores(self, features: Tensor, num_classes: int) -> Tensor:
        """Cosine of a feature vector and the mean of each class, in the branch of the class.

        Args:
            features: Features in each branch, ``(T, B, d)``.
            num_classes: Number of columns of the result.

        Returns:
            ``(B, num_classes)``, at least float32; minus infinity for classes without samples.
        """
        features = full_precision(features)
        with torch.autocast(features.device.type, enabled=False):
            own = F.normalize(features, dim=2)[self.branches]  # (C, B, d)
            cosines = torch.einsum("cbd,cd->bc", own, F.normalize(self.means.to(features.dtype), dim=1))
        scores = features.new_full((features.shape[1], num_classes), -torch.inf)
        scores[:, : len(self)] = cosines.masked_fill(~self.known, -torch.inf)
        return scores


def _low_rank(model: nn.Module, blocks: list[int], **options: Any) -> LoRA:
    targets = [f"*blocks.{number}.attn.qkv" for number in blocks]
    return LoRA(model, parts="qv", targets=targets, orthonormal=True, **options)


class CLLoRA(ContinualStrategy):
    """LoRA shared by all tasks in the first blocks, with distillation, and LoRA of each task in the last blocks.

    Args:
        rank: r of both, at least 1.
        shared_blocks: Number of first blocks; None for half of the blocks.
        distill_weight: Weight of KD, at least 0.
        temperature: T, above 0.
        ortho_weight: Weight of the overlap of the scales, at least 0.
        head: Builds the classifier of the losses; None for ``CosineHead`` with a learnt scale that begins each task at
            1.
        kwargs: Options of the base class. The backbone must be a ViT of timm.
    """

    traits = Traits(family="pretrained", paper="He et al., CVPR 2025, arXiv:2505.24816", needs_pretrained=True)

    def __init__(
        self,
        *,
        rank: int = 10,
        shared_blocks: int | None = None,
        distill_weight: float = 5.0,
        temperature: float = 2.0,
        ortho_weight: float = 1e-4,
        head: HeadFactory | None = None,
        **kwargs: Any,
    ) -> None:
        cosine = functools.partial(CosineHead, scale=1.0, learn_scale=True)
        super().__init__(head=head or cosine, loss_classes="current", freeze_backbone=False, **kwargs)
        at_least(self, 1, rank=rank)
        at_least(self, 1, shared_blocks=shared_blocks, optional=True)
        at_least(self, 0, distill_weight=distill_weight, ortho_weight=ortho_weight)
        above(self, 0, temperature=temperature)
        self.distill_weight, self.temperature, self.ortho_weight = distill_weight, temperature, ortho_weight
        self.build_backbone = functools.partial(
            PeftBranches,
            backbone=self.build_backbone,
            shared=functools.partial(_low_rank, rank=rank, train_down=False),
            peft=functools.partial(_low_rank, rank=rank, learn_scale=True, scale_spread=0.5),
            shared_blocks=shared_blocks,
        )
        self.class_means: BranchPrototypes

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        self.class_means = BranchPrototypes(self._branches.num_features)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self._branches.store_shared()
        self._branches.add()
        self.network.head.reset_shared(self.build_head)

    def frozen(self) -> Iterable[nn.Module]:
        return [self._branches.base, self._branches.previous, *self._branches.sets[:-1]]

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        terms = {"ce": self.classification_loss(output, batch)}  # over the classes of the task
        if self.task.is_first:
            return terms
        branches = self._branches
        shared, previous = cast(LoRA, branches.shared), cast(LoRA, branches.previous)
        if self.distill_weight:
            with torch.no_grad():
                shares = [row_shares(up) for up in previous.up_weights()]
                teacher = self.network.head(branches.early_features(batch.images, previous=True))
            with shared.scaled_gradients(shares):
                student = self.network.head(branches.early_features(batch.images))
            distilled = softmax_distillation(student, teacher, self.temperature, groups=[list(self.task.columns)])
            terms["distill"] = self.distill_weight * distilled
        if self.ortho_weight:
            *earlier, newest = (cast(LoRA, one).scales() for one in branches.sets)
            terms["ortho"] = self.ortho_weight * mean_overlap(newest, torch.stack(earlier).detach())
        return terms

    def end_task(self, task: Task) -> None:
        features, labels = self.passes.features()  # with the newest set
        self.class_means.assign(features, labels, task.num_seen, len(self._branches.sets) - 1)

    def predict(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        if not len(self.class_means):  # the first task is being trained
            return self.network.classify(images)
        features = self._branches.features(images, range(len(self._branches.sets)))
        return self.class_means.branch_scores(features, self.network.head.num_columns)

    def predict_within_task(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        return self.network.classify(images)

    def bytes_kept(self) -> dict[str, int]:
        teacher = sum(value.nbytes for value in self._branches.previous.state_dict().values())
        return {**super().bytes_kept(), "teachers": teacher}

    @property
    def _branches(self) -> PeftBranches:
        return cast(PeftBranches, self.network.backbone)
