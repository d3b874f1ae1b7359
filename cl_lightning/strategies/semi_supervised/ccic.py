"""CCIC, contrastive interpolation consistency (Boschini, Buzzega, Bonicelli, Porrello, Calderara, Pattern Recognition
Letters 2022, arXiv:2108.06552).

A step has labelled samples S of the stream, samples R of a memory of labelled samples of past tasks, and unlabelled
samples U in K augmentations each. The label of an unlabelled sample is guessed without gradient, in eval mode:

    q = p^(1/T) / sum_c p_c^(1/T),     p = 1/K sum_k softmax f(a_k(u))

As in MixMatch, each sample x of S, R and all a_k(U) is mixed with a sample x' of them, drawn by a permutation, and its
target y (one-hot, or q) with the target y':

    x~ = l x + (1 - l) x',   y~ = l y + (1 - l) y',   l = max(b, 1 - b),   b ~ Beta(a, a) for each sample

    L = L_triplet + CE_S(f(x~), y~) + m CE_R(f(x~), y~) + w_u 1/C mean_U || softmax f(x~) - y~ ||^2 + w_p L_push

With h the features, d_ij = ||h_i - h_j||^2 and k a tenth of the number of samples of S, at least 1:

    L_triplet = mean over i and j <= k of max(0, 1 + (j-th largest d of the class of i) - (j-th smallest d of others))
    L_push    = mean over i and j <= k of max(0, 1 - (j-th smallest d between i and the samples of the other set))

L_triplet is over S and R, and L_push over U and R. From the second task on, in the first 0.9 of the epochs, L_triplet
is of images l x + (1 - l) x' with b ~ Beta(1, 1) within S and R, each with the label of x, its larger part; only then
is there L_push. L_triplet can shrink features to 0 where the backbone does not normalise them. Predictions are by the
two nearest samples in the memory, by normalised features: the score of a class is its number of votes, minus 1e-5 times
the distance to its nearest sample.
K -> augmentations, T -> temperature, a -> mixing_alpha, m -> memory_penalty, w_u -> consistency_weight, w_p ->
push_weight, the number of samples of S -> labelled_size.
Departs from the paper: labelled samples come from the loader as often as the steps need them, in place of ring buffers
of the last labelled and unlabelled samples. The memory takes all labelled samples of a task with equal probability when
the task ends, so it holds past tasks alone. Not in our source, and chosen here: that positives and negatives are paired
by rank, that both sets of L_push count, and one l for each sample. The released code sharpens outputs without a softmax
and trains mixed images on targets that are not mixed; here all follows the equations.
"""

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import join
from cl_lightning.checks import above, at_least
from cl_lightning.data import LabelledRows, apart, row_places
from cl_lightning.distributed import all_gather_together
from cl_lightning.losses import full_precision, mean_over_rows, rows_of_all
from cl_lightning.memory import GrowingBuffers
from cl_lightning.models import in_eval_mode
from cl_lightning.strategies.base import MemoryReplay
from cl_lightning.strategy import Batch, Output, Phase, Task, Traits

_VIEW, _MIX, _SELF_MIX = 0xCC1, 0xCC2, 0xCC3
_TARGETS = "targets"
_FARTHEST = 2.0  # largest distance of two vectors of norm 1


def sharpened(probabilities: Tensor, temperature: float) -> Tensor:
    """p^(1/T), divided by its sum over classes.

    Args:
        probabilities: p, ``(n, C)``.
        temperature: T, above 0.
    """
    logs = full_precision(probabilities).clamp(min=torch.finfo(torch.float32).tiny).log()
    return (logs / temperature).softmax(dim=1)


def hardest_triplets(features: Tensor, labels: Tensor, count: int) -> Tensor:
    """L_triplet. A rank at which there is no positive or no negative is left out of the mean, 0 without any.

    Args:
        features: h, ``(n, d)``.
        labels: Columns, int64 ``(n,)``.
        count: k, at least 1.
    """
    distances = _squared_distances(features, features)
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    same = labels[:, None] == labels
    count = min(count, len(labels))
    if count == 0:
        return features.sum() * 0.0
    positives = distances.masked_fill(~same | itself, -torch.inf).topk(count, dim=1).values
    negatives = distances.masked_fill(same, torch.inf).topk(count, dim=1, largest=False).values
    there = positives.isfinite() & negatives.isfinite()
    margin = 1 + positives.where(there, 0.0) - negatives.where(there, 0.0)
    return margin.clamp(min=0).where(there, 0.0).sum() / there.sum().clamp(min=1)


def push_apart(features: Tensor, others: Tensor, count: int) -> Tensor:
    """L_push of two sets of features, ``(n, d)`` and ``(m, d)``; 0 if one of them is empty.

    Args:
        features, others: h.
        count: k, at least 1; at most as many neighbours count as the other set has.
    """
    if not len(features) or not len(others):
        return features.sum() * 0.0 + others.sum() * 0.0
    distances = _squared_distances(features, others)
    nearest = [
        table.topk(min(count, table.shape[1]), dim=1, largest=False).values.flatten()
        for table in (distances, distances.T)
    ]
    return (1 - torch.cat(nearest)).clamp(min=0).mean()


def _squared_distances(rows: Tensor, others: Tensor) -> Tensor:
    """``(n, m)``; without the square root of ``cdist``, whose gradient at 0 is not finite."""
    rows, others = full_precision(rows), full_precision(others)
    return (rows[:, None] - others).square().sum(dim=2)


def neighbour_votes(features: Tensor, held: Tensor, labels: Tensor, columns: int, neighbours: int = 2) -> Tensor:
    """Scores of classes: number of votes of the nearest samples - 1e-5 * distance to the nearest sample of the class.

    Args:
        features: Features of the samples to classify, of norm 1, ``(B, d)``.
        held: Features of the labelled samples, of norm 1, ``(n, d)``.
        labels: Their columns, int64 ``(n,)``.
        columns: Number of classes, C.
        neighbours: Number of nearest samples that vote.

    Returns:
        ``(B, C)``; the distance to a class without samples counts as 2, the largest one.
    """
    distances = (2 - 2 * features @ held.T).clamp(min=0).sqrt()
    nearest = distances.topk(min(neighbours, len(labels)), dim=1, largest=False).indices
    votes = F.one_hot(labels[nearest], columns).sum(dim=1)
    closest = distances.new_full((len(features), columns), _FARTHEST)
    closest = closest.scatter_reduce(1, labels.expand_as(distances), distances, "amin")
    return votes - 1e-5 * closest


class FeatureBank(GrowingBuffers):
    """Normalised features and columns of the samples of a memory, as they were when the last task ended."""

    kept_as: ClassVar[str] = "features"

    features: Tensor
    labels: Tensor
    columns: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("features", torch.zeros(0, 0))
        self.register_buffer("labels", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("columns", torch.zeros(0, 0))  # a row for each class that was known; no numbers

    def restore_buffers(self, state_dict: Any, prefix: str) -> None:
        self.features = self.features.new_zeros(state_dict.get(f"{prefix}features", self.features).shape)
        super().restore_buffers(state_dict, prefix)

    def num_bytes(self) -> int:
        """Size of the features and columns in bytes."""
        return self.features.nbytes + self.labels.nbytes

    def fill(self, features: Tensor, labels: Tensor, columns: int) -> None:
        """Replace the features ``(n, d)``, which are normalised, and columns ``(n,)``, of so many classes."""
        self.features, self.labels = F.normalize(features.float(), dim=1), labels
        self.columns = features.new_zeros(columns, 0, dtype=torch.float32)


class CCIC(MemoryReplay):
    """MixMatch on labelled, replayed and unlabelled samples, and metric losses that separate classes and past tasks.

    Args:
        labelled_size: Number of labelled samples of the stream in each step, over all processes, at least 1; None for
            the batch size, which is the number of unlabelled samples.
        augmentations: K, at least 1.
        temperature: T, above 0.
        mixing_alpha: a, above 0.
        memory_penalty: m, at least 0.
        consistency_weight: w_u, at least 0.
        push_weight: w_p, at least 0.
        neighbours: Number of samples of the memory that vote, at least 1.
        kwargs: Options of ``MemoryReplay``; None for ``replay_size`` is the number of labelled samples.
    """

    traits = Traits(
        family="semi-supervised",
        paper="Boschini et al., Pattern Recognition Letters 2022, arXiv:2108.06552",
        keeps_exemplars=True,
        needs_empty_batches=True,
        uses_unlabelled=True,
        inputs=("image", "vector", "sequence"),
        scenarios=("class-incremental", "domain-incremental"),
        remedy="labelled samples are repeated; use a stream of several epochs",
    )

    def __init__(
        self,
        *,
        labelled_size: int | None = None,
        augmentations: int = 3,
        temperature: float = 0.5,
        mixing_alpha: float = 0.75,
        memory_penalty: float = 0.7,
        consistency_weight: float = 0.75,
        push_weight: float = 0.5,
        neighbours: int = 2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if self.loss_classes != "all":
            raise ValueError(
                f"CCIC: loss_classes is {self.loss_classes!r}, but samples of different classes are mixed; use 'all'"
            )
        at_least(self, 1, augmentations=augmentations, neighbours=neighbours)
        above(self, 0, temperature=temperature, mixing_alpha=mixing_alpha)
        at_least(self, 0, memory_penalty=memory_penalty, consistency_weight=consistency_weight, push_weight=push_weight)
        self.rows = LabelledRows(count=labelled_size)
        self.augmentations, self.temperature, self.mixing_alpha = augmentations, temperature, mixing_alpha
        self.memory_penalty, self.consistency_weight = memory_penalty, consistency_weight
        self.push_weight, self.neighbours = push_weight, neighbours
        self.bank = FeatureBank()

    def phases(self, task: Task) -> list[Phase]:
        return [Phase(labelled=self.rows)]

    @property
    def _contrasts(self) -> bool:
        """Whether past tasks are pushed apart, and the metric loss is of mixed images."""
        return not self.task.is_first and self.epoch < 0.9 * (self.phase.options.epochs or 1)

    # ------------------------------------------------------------------ a step

    def prepare_batch(self, batch: Batch) -> Batch:
        unlabelled, labelled = apart(batch)
        views = [unlabelled.replace(draw=unlabelled.draw.fork(_VIEW, k)) for k in range(1, self.augmentations)]
        views = [unlabelled, *(self.data.augment(view) for view in views)]
        known = {"stream": labelled, "replay": self.replay(labelled)}
        mixing = join({**known, **{f"view {k}": view for k, view in enumerate(views)}})
        images, targets = self._mixed(mixing, self._targets(mixing, views), batch)
        metric = join(known)
        shown = self._mixed_with_itself(metric, batch) if self._contrasts else metric.images
        parts = {name: part for name, (_, part) in mixing.parts.items()}
        parts |= {f"metric {name}": part for name, (_, part) in metric.parts.items()}
        pushed = self._contrasts and self.push_weight > 0
        joint = join({**parts, "metric unlabelled": unlabelled if pushed else None})
        images = torch.cat([images, shown, *([unlabelled.images] if pushed else [])])
        return joint.replace(images=images, extra={_TARGETS: targets})

    @torch.no_grad()
    def _targets(self, mixing: Batch, views: list[Batch]) -> Tensor:
        """Targets y of the rows of S, R and the views: one-hot, or q; ``(B, C)``."""
        columns, views_rows = self.network.head.num_columns, torch.cat([view.images for view in views])
        if len(views_rows):
            with in_eval_mode(self.network), self.trainer.precision_plugin.forward_context():
                logits = full_precision(self.network(views_rows).logits)
            guesses = logits.softmax(dim=1).view(len(views), -1, columns).mean(dim=0)
            guesses = sharpened(guesses, self.temperature).repeat(len(views), 1)
        else:
            guesses = torch.zeros(0, columns, device=self.device)
        known = len(mixing) - len(views_rows)
        return torch.cat([F.one_hot(mixing.labels[:known], columns).to(guesses), guesses])

    def _mixed(self, mixing: Batch, targets: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """x~ and y~ of the rows of this process."""
        shares, partners = self._partners(mixing, batch, _MIX, self.mixing_alpha)
        images, wanted, places = all_gather_together((mixing.images, targets, row_places(mixing)))
        others = places.argsort()[partners]
        wide = shares.view(-1, *(1 for _ in images.shape[1:]))
        return (
            wide * mixing.images + (1 - wide) * images[others],
            shares[:, None] * targets + (1 - shares[:, None]) * wanted[others],
        )

    def _mixed_with_itself(self, metric: Batch, batch: Batch) -> Tensor:
        shares, partners = self._partners(metric, batch, _SELF_MIX, 1.0)
        images, places = all_gather_together((metric.images, row_places(metric)))
        wide = shares.view(-1, *(1 for _ in images.shape[1:]))
        return wide * metric.images + (1 - wide) * images[places.argsort()[partners]]

    def _partners(self, rows: Batch, batch: Batch, salt: int, alpha: float) -> tuple[Tensor, Tensor]:
        """l of the rows of this process, float32, and the places of their partners in the rows of all processes."""
        total = sum(part.draw.total for _, part in rows.parts.values())
        random = np.random.default_rng(batch.draw.fork(salt).key)
        beta, order = random.beta(alpha, alpha, total), random.permutation(total)
        drawn = np.stack([np.maximum(beta, 1 - beta), order.astype(np.float64)])
        shares, partners = torch.from_numpy(drawn).to(self.device, torch.float32, non_blocking=True)
        places = row_places(rows)
        return shares[places], partners.long()[places]

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        targets, log_p = batch.extra[_TARGETS], full_precision(output.logits).log_softmax(dim=1)
        terms: dict[str, Tensor] = {}
        count = max(batch.parts["stream"][1].draw.total // 10, 1)
        for name, factor in (("stream", 1.0), ("replay", self.memory_penalty)):
            if name in batch.parts:
                rows, share = batch.parts[name][0], batch.part(name, output).share
                errors = -(targets[rows] * log_p[rows]).sum(dim=1)
                terms["ce" if name == "stream" else name] = factor * share * mean_over_rows(errors)
        views = [
            (batch.parts[f"view {k}"][0], batch.part(f"view {k}", output).share) for k in range(self.augmentations)
        ]
        errors_of_views = [
            share * mean_over_rows((log_p[r].exp() - targets[r]).square().mean(dim=1)) for r, share in views
        ]
        terms["consistency"] = self.consistency_weight * torch.stack(errors_of_views).mean()
        rows_of, factor = rows_of_all(batch)
        known = [batch.part(f"metric {name}", output) for name in ("stream", "replay") if name in batch.parts]
        features = [rows_of(part.output.features) for part in known]
        labels = [rows_of(part.batch.labels) for part in known]
        terms["triplet"] = factor * hardest_triplets(torch.cat(features), torch.cat(labels), count)
        if "metric unlabelled" in batch.parts and len(known) == 2:
            unlabelled = rows_of(batch.part("metric unlabelled", output).output.features)
            terms["push"] = self.push_weight * factor * push_apart(unlabelled, features[1], count)
        return terms

    # ------------------------------------------------------------------ memory and predictions

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        super().end_task(task)
        for batch in self.passes.batches():
            self.offer(batch)
        if not len(self.memory):
            return
        found = []
        for batch in self.passes.batches(memory=self.memory):  # gathered by batch, for the order of the memory
            with self.trainer.precision_plugin.forward_context():
                features = self.network.backbone(batch.images)
            found.append(all_gather_together((features.float(), batch.labels)))
        features, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        self.bank.fill(features, labels, self.network.head.num_columns)

    def predict(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        bank, columns = self.bank, self.network.head.num_columns
        if len(bank.columns) != columns or not len(bank.labels):
            return self.network.classify(images)  # during a task the memory has no samples of its classes
        features = F.normalize(self.network.backbone(images).float(), dim=1)
        return neighbour_votes(features, bank.features, bank.labels, columns, self.neighbours)

    def predict_within_task(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        return self.network.classify(images)
