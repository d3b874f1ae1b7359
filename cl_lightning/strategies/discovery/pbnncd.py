"""PBN, projection-based novel class discovery, and its baselines (Troisemaine, Reiffers-Masson, Gosselin, Lemaire,
Vaton, "A Practical Approach to Novel Class Discovery in Tabular Data", DMKD 2024, arXiv:2311.05440).

An encoder, whose output z has norm 1, a decoder d and a linear classifier l are trained on labelled samples of known
classes and unlabelled samples of a session:

    L = w CE(l(z), y) over the known samples + (1 - w) 1/B sum over all samples || d(z) - x ||^2

Then the unlabelled samples are clustered by z: by k-means (PBN); by NCD k-means, in which the means of the known
classes are centres that do not move; or by spectral clustering of known and unlabelled samples together, with NCD
k-means in the space of the eigenvectors. With w = 1 the encoder is trained by CE alone, the baseline of the paper.
w -> classification_weight, clustering -> the three clusterings.

The paper has one step of discovery, and all unlabelled samples are of new classes (``mixed=False``). In a stream each
session is such a step: samples of the clusters of a session enter the memory with the columns of its new classes, and
are known ones in the next session. With ``mixed=True`` unlabelled samples may be of known classes as well: known
centres then take part in the assignment, and k-means has centres for the known classes too, each claimed by one.
The number of new classes is the stream's, or the one of the largest silhouette. Predictions are by the nearest centre:
means of the samples in the memory for known classes, and the clusters found for new ones.
Departs from the paper: samples are shuffled, and a step has as many labelled samples as unlabelled ones. Clusterings
all use z of norm 1, as in training (the released code predicts with z before the normalisation). k-means++ and the
width of the kernel have their textbook forms.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import ImageShape, join, mix
from cl_lightning.checks import at_least, one_of, within
from cl_lightning.data import LabelledRows, apart
from cl_lightning.distributed import all_gather_together
from cl_lightning.losses import cross_entropy, full_precision, mean_over_rows
from cl_lightning.memory import ClassBalanced, GrowingBuffers, Memory, class_means
from cl_lightning.models import Backbone, ncd_kmeans, plain_kmeans, silhouette, spectral_embedding
from cl_lightning.strategies.base import MemoryReplay, sum_of_zeros
from cl_lightning.strategy import BackboneFactory, Batch, Output, Phase, Task, Traits

Clustering = Literal["kmeans", "ncd_kmeans", "spectral"]
_CLUSTERS = 0x9B1
_NO_CLUSTER = -4.0  # below the negative distance of any two vectors of norm 1
_LARGEST_TABLE = 2000  # rows whose distances to each other are all computed


def layers(sizes: Iterable[int], dropout: float) -> list[nn.Module]:
    """Linear layers of these sizes, with batch normalisation, ReLU and dropout between them."""
    found: list[nn.Module] = []
    for first, second in pairwise(sizes):
        found += [nn.Linear(first, second), nn.BatchNorm1d(second), nn.ReLU(), nn.Dropout(dropout)]
    return found[:-3]


class TabularEncoder(Backbone):
    """Layers of 3/4, 1/2 of the number of inputs and of the latent size; the output has norm 1.

    Args:
        image_shape: Shape of a sample, of any number of dimensions.
        latent: Size of the output, at least 1.
        dropout: Probability of dropout, in [0, 1).
    """

    dimensions = (1, 2, 3)

    def __init__(self, image_shape: ImageShape, *, latent: int = 32, dropout: float = 0.1) -> None:
        super().__init__(image_shape)
        at_least(self, 1, latent=latent)
        within(self, "[0, 1)", dropout=dropout)
        size = torch.Size(image_shape).numel()
        self.layers = nn.Sequential(*layers((size, max(3 * size // 4, 1), max(size // 2, 1), latent), dropout))
        self.num_features = latent

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.layers(images.flatten(1)), dim=1)


class Decoder(nn.Module):
    """The encoder's layers in reverse order.

    Args:
        latent: Size of z.
        size: Number of values of a sample.
        dropout: Probability of dropout.
    """

    kept_as: ClassVar[str] = "decoder"

    def __init__(self, latent: int, size: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers((latent, max(size // 2, 1), max(3 * size // 4, 1), size), dropout))

    def num_bytes(self) -> int:
        """Size in bytes."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    def forward(self, latents: Tensor) -> Tensor:
        found: Tensor = self.layers(latents)
        return found


class Centres(GrowingBuffers):
    """Centres of the classes, in the order of their columns, then of clusters that no column stands for.

    Attributes:
        rows: float32 ``(n, d)``.
        classes: A row, of no numbers, for each class of the stream when they were computed, ``(C, 0)``.
    """

    kept_as: ClassVar[str] = "centres"
    rows: Tensor
    classes: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(0, width))
        self.register_buffer("classes", torch.zeros(0, 0))

    def num_bytes(self) -> int:
        """Size in bytes."""
        return self.rows.nbytes

    def fill(self, rows: Tensor, classes: int) -> None:
        """Replace the centres, ``(n, d)``, of so many classes."""
        self.rows, self.classes = rows.float(), rows.new_zeros(classes, 0, dtype=torch.float32)


class PBNNCD(MemoryReplay):
    """An encoder of known and unlabelled samples by classification and reconstruction, whose features are clustered.

    Args:
        memory_size: Number of samples in the memory, over all processes, at least 1: the known samples of a session.
        classification_weight: w, in [0, 1].
        clustering: How the samples of a session are clustered: ``kmeans``, ``ncd_kmeans`` or ``spectral``.
        mixed: Whether the unlabelled samples may be of known classes; False if all of them are of new classes.
        new_classes: ``known``: as many as the stream has; ``estimated``: the number of the largest silhouette.
        most_classes: Largest number of new classes that is tried, at least 2.
        least_similarity: m of the kernel of ``spectral``, in (0, 1).
        labelled_size: Number of labelled samples in a step, over all processes, at least 1; None for the batch size.
        latent: Size of z of the default encoder, at least 1.
        dropout: Probability of dropout in it and in the decoder, in [0, 1).
        backbone: Builds another encoder, whose output is normalised; None for ``TabularEncoder``.
        kwargs: Options of ``MemoryReplay``, apart from ``policy`` and ``replay_size``.
    """

    traits = Traits(
        family="discovery",
        paper="Troisemaine et al., DMKD 2024, arXiv:2311.05440",
        keeps_exemplars=True,
        uses_unlabelled=True,
        inputs=("image", "vector", "sequence"),
        scenarios=("class-incremental",),
        remedy="sessions bring new classes; use Discovery around a class-incremental scenario",
    )

    def __init__(
        self,
        *,
        memory_size: int = 2000,
        classification_weight: float = 0.8,
        clustering: Clustering = "ncd_kmeans",
        mixed: bool = True,
        new_classes: Literal["known", "estimated"] = "known",
        most_classes: int = 30,
        least_similarity: float = 1e-3,
        labelled_size: int | None = None,
        latent: int = 32,
        dropout: float = 0.1,
        backbone: BackboneFactory | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("policy") is not None or kwargs.get("replay_size") is not None:
            raise ValueError(
                "PBNNCD: policy and replay_size are given, but the memory is class-balanced and the loader mixes it "
                "in; leave them out"
            )
        kwargs.pop("policy", None)
        at_least(self, 1, memory_size=memory_size, latent=latent)
        within(self, "[0, 1]", classification_weight=classification_weight)
        within(self, "[0, 1)", dropout=dropout)
        within(self, "(0, 1)", least_similarity=least_similarity)
        at_least(self, 2, most_classes=most_classes)
        one_of(self, get_args(Clustering), clustering=clustering)
        one_of(self, ("known", "estimated"), new_classes=new_classes)

        def encoder(image_shape: ImageShape) -> Backbone:
            return TabularEncoder(image_shape, latent=latent, dropout=dropout)

        super().__init__(memory_size=memory_size, policy=ClassBalanced(), backbone=backbone or encoder, **kwargs)
        self.classification_weight, self.clustering, self.mixed = classification_weight, clustering, mixed
        self.new_classes, self.most_classes, self.dropout = new_classes, most_classes, dropout
        self.least_similarity, self.rows = least_similarity, LabelledRows(count=labelled_size)

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        width = self.network.head.num_features
        self.decoder = Decoder(width, torch.Size(image_shape).numel(), self.dropout)
        self.centres = Centres(width)

    def phases(self, task: Task) -> list[Phase]:
        return [Phase(labelled=self.rows)]

    def trainable(self) -> Iterable[nn.Parameter]:
        yield from super().trainable()
        yield from self.decoder.parameters()

    def replay_memory(self) -> Memory | None:
        return self.memory

    def prepare_batch(self, batch: Batch) -> Batch:
        unlabelled, labelled = apart(batch)
        return join({"unlabelled": unlabelled, "labelled": labelled})

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        samples, known, share = batch.part("labelled", output)
        columns = self.task.num_seen - self._num_new(self.task)
        weight = self.classification_weight
        ce = share * cross_entropy(known.logits[:, :columns], samples.labels, weights=self.data.weights_of(samples))
        ce = ce + 0.0 * output.logits.sum()  # the columns of new classes have no samples
        if len(batch) < 2:
            nothing = sum_of_zeros(self.decoder.parameters())  # batch normalisation has no statistics of one row
            return {"ce": weight * ce, "reconstruction": nothing}
        found = full_precision(self.decoder(F.normalize(full_precision(output.features), dim=1)))
        errors = (found - full_precision(batch.images.flatten(1))).square().sum(dim=1)
        return {"ce": weight * ce, "reconstruction": (1 - weight) * mean_over_rows(errors)}

    # ------------------------------------------------------------------ clusters of a session

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        super().end_task(task)
        new = self._num_new(task)
        seen = task.num_seen - new
        for batch in self.passes.batches():  # labelled samples
            self.offer(batch)
        known, labels = self._latents(memory=self.memory)
        means = class_means(known, labels, seen, reduce=False).float()
        if not new:
            self.centres.fill(means, seen)
            return
        session = torch.as_tensor(self.data.stream.train[task.index].copy())
        points, _ = self._latents(indices=session)
        found = self._discovered(points, known, labels, means, task)
        nearest = torch.cdist(points, torch.cat([means, found])).argmin(dim=1)
        sizes = (nearest[:, None] == seen + torch.arange(len(found), device=self.device)).sum(dim=0)
        found = found[sizes.argsort(descending=True, stable=True)]  # the largest ones have the columns
        self.centres.fill(torch.cat([means, found]), task.num_seen)
        for batch in self.passes.batches(indices=session):
            clusters = self.clusters(batch.images)
            found_here = (clusters >= seen) & (clusters < task.num_seen)
            self.offer(batch.replace(labels=clusters).select(found_here))

    def _num_new(self, task: Task) -> int:
        """Number of classes without labels: 0 in the first task, and in a later one that has labels."""
        hidden = len(self.data.stream.unlabelled[task.index])
        return task.num_new if hidden == len(self.data.stream.train[task.index]) else 0

    def _latents(self, **chosen: Any) -> tuple[Tensor, Tensor]:
        """z and columns of all processes, in the order of the data."""
        found = []
        for batch in self.passes.batches(**chosen):
            with self.trainer.precision_plugin.forward_context():
                latents = self._latent(batch.images)
            found.append(all_gather_together((latents, batch.labels)))
        latents, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        return latents, labels

    def _latent(self, images: Tensor) -> Tensor:
        if not len(images):
            return torch.zeros(0, self.network.head.num_features, device=self.device)
        return F.normalize(self.network.backbone(images).float(), dim=1)

    def _discovered(self, points: Tensor, known: Tensor, labels: Tensor, means: Tensor, task: Task) -> Tensor:
        """Centres of new classes, float32 ``(count, d)``."""
        key = mix(self.seed, _CLUSTERS, task.index)
        if self.new_classes == "known":
            return self._new_centres(points, known, labels, means, task.num_new, key)
        some = points[:: -(-len(points) // _LARGEST_TABLE)]
        fixed = means if self.mixed else means[:0]
        best, most = points[:0], -torch.inf
        for count in range(1 if self.mixed else 2, min(self.most_classes, len(points)) + 1):
            centres = self._new_centres(points, known, labels, means, count, key)
            value = silhouette(some, torch.cdist(some, torch.cat([fixed, centres])).argmin(dim=1))
            if value > most:
                best, most = centres, value
        return best

    def _new_centres(
        self, points: Tensor, known: Tensor, labels: Tensor, means: Tensor, count: int, key: int
    ) -> Tensor:
        if self.clustering == "kmeans":
            return plain_kmeans(points, means, count, key=key, among_known=self.mixed).float()
        if self.clustering == "ncd_kmeans":
            return ncd_kmeans(points, means, count, key=key, among_known=self.mixed).float()
        points, (known, labels) = self._fewer(points), (self._fewer(known), self._fewer(labels))
        rows = spectral_embedding(torch.cat([known, points]), len(means) + count, self.least_similarity)
        centres = class_means(rows[: len(known)], labels, len(means), reduce=False)
        rows = rows[len(known) :]
        new = ncd_kmeans(rows, centres, count, key=key, among_known=self.mixed)
        fixed = centres if self.mixed else centres[:0]
        nearest = torch.cdist(rows, torch.cat([fixed, new])).argmin(dim=1) - len(fixed)
        return class_means(points[nearest >= 0], nearest[nearest >= 0], count, reduce=False).float()

    def _fewer(self, rows: Tensor) -> Tensor:
        return rows[:: -(-len(rows) // (_LARGEST_TABLE // 2))]

    # ------------------------------------------------------------------ predictions

    def num_clusters(self) -> int:
        """Number of known classes and of clusters found."""
        return len(self.centres.rows)

    def clusters(self, images: Tensor) -> Tensor:
        """Nearest centre of each image, int64 ``(B,)``: a column, or a number from the number of columns on."""
        return torch.cdist(self._latent(images), self.centres.rows).argmin(dim=1)

    def predict(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        columns, centres = self.network.head.num_columns, self.centres
        if len(centres.classes) != columns:
            return self.network.classify(images)  # during a session its clusters are not known
        scores = -torch.cdist(self._latent(images), centres.rows[:columns])
        return F.pad(scores, (0, columns - scores.shape[1]), value=_NO_CLUSTER)

    def predict_within_task(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        return self.network.classify(images)
