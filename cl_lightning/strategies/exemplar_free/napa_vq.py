"""NAPA-VQ: Neighborhood-Aware Prototype Augmentation with Vector Quantization (Malepathirana et al., ICCV 2023,
arXiv:2308.09297).

As in PASS, each pair of a class and a rotation by 90 k degrees is a separate class. Each of the 4 C has a learnt coding
vector w_j, and d_ij = || f(x_i) - w_j || replaces the logits. A symmetric matrix E over the 4 C classes holds which of
them are neighbours in feature space. For each sample let j be the nearest coding vector and N the K nearest ones:

    E_jn <- 1, n in N;   E_jn <- delta E_jn for all others;   E_jn <- 0 where E_jn < delta^10;   E <- (E + E^T) / 2

for a batch at once: E_jn <- (1 if a sample of j has n in N, else E_jn) delta^(samples of j whose N is without n). With
Nb(y) the neighbours of y apart from y, X the 4 B images, and f' and p the backbone and class means before the task:

    L_DCE = CE(-d / tau, y)
    L_NA = mean_i max(0, d_i,y^2 - sum_{j in Nb(y)} a_ij d_ij^2)
    a_ij = exp(-0.001 d_ij^2) / sum_{j in Nb(y)} exp(-0.001 d_ij^2)                          without gradient
    L = L_DCE(X) + L_NA(X) + lambda L_DCE(p~) + L_NA(p~) + gamma || f(X) - f'(X) ||_2
    p~ = u p_a + (1 - u) p_b,   u ~ U(0.5, 1),   a one of the old classes without rotation, b with E_ab > 0, B times

b is a, a rotation, or another class, also a new one, whose mean is measured with f' when the task begins. p~ updates E
as the samples do; E is made symmetric at the end of a step. Means of the classes of the task are measured again at its
end. The first task has the first two terms. Coding vectors of earlier tasks are frozen; new ones take plain SGD steps
with a learning rate of their own, since they start far from the features. The prediction is the nearest coding vector
of the rotation by 0, after features and vectors are scaled to norm 1 (``DistanceHead``).
K -> neighbours, delta -> decay, lambda -> prototype_weight, gamma -> distill_weight, tau -> temperature.
Departs from the released code: means are of un-augmented images. In a step with fewer images than processes, E is not
changed. The steps of the coding vectors are not clipped.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import ImageShape
from cl_lightning.checks import above, at_least, within
from cl_lightning.data import rotate_batch, rotated
from cl_lightning.distributed import all_sum, world_size
from cl_lightning.losses import cross_entropy, feature_norm_distillation, mean_over_rows
from cl_lightning.memory import GrowingBuffers, Prototypes, Teacher, restore_shapes
from cl_lightning.models import DistanceHead, Network, distances, head_as
from cl_lightning.strategies.base import AddsLosses, separate_group
from cl_lightning.strategy import Batch, ContinualStrategy, HeadFactory, Output, Phase, Task, Traits

_CLASSES, _NEIGHBOURS, _SHARES = 0x4A9A1, 0x4A9A2, 0x4A9A3  # salts
_SOFTNESS, _FLOOR = 0.001, 10  # of a_ij; an edge is removed after more than 10 decays


def rotation_classes(labels: Tensor) -> Tensor:
    """``4 y + k`` for images with labels y, int64 ``(B,)``, followed by their rotations, k in 1 .. 3: ``(4 B,)``."""
    return torch.cat([4 * labels + turn for turn in range(4)])


@torch.no_grad()
def updated_edges(edges: Tensor, gaps: Tensor, neighbours: int = 15, decay: float = 0.9, *, reduce: bool) -> Tensor:
    """E after a batch, before it is made symmetric.

    Args:
        edges: E, ``(n, n)``.
        gaps: Distances d of this process's samples to the coding vectors, ``(B, n)``.
        neighbours: K; all n where n is smaller.
        decay: delta.
        reduce: Whether the samples of all processes count; then every process must call this.

    Returns:
        ``(n, n)``, in [0, 1].
    """
    nearest = gaps.topk(min(neighbours, gaps.shape[1]), dim=1, largest=False).indices  # (B, K), the nearest first
    near = torch.zeros_like(gaps, dtype=edges.dtype).scatter_(1, nearest, 1.0)
    first = torch.zeros_like(near).scatter_(1, nearest[:, :1], 1.0)
    with torch.autocast(gaps.device.type, enabled=False):
        counts = torch.cat([first.T @ near, first.sum(dim=0)[:, None]], dim=1)  # of pairs, and of samples of j
    counts = all_sum(counts) if reduce else counts
    pairs, visits = counts[:, :-1], counts[:, -1:]
    edges = edges.masked_fill(pairs > 0, 1.0) * decay ** (visits - pairs)
    return edges.masked_fill(edges < decay**_FLOOR * (1 - 1e-6), 0.0)


def neighbour_loss(gaps: Tensor, labels: Tensor, edges: Tensor) -> Tensor:
    """L_NA of distances ``(B, n)``, classes int64 ``(B,)`` and E ``(n, n)``; without neighbours the mean of d_i,y^2."""
    squares = gaps.square()
    near = (edges[labels] > 0).scatter(1, labels[:, None], value=False)  # Nb(y), (B, n)
    scores = (-_SOFTNESS * squares.detach()).masked_fill(~near, -torch.inf)
    a = scores.softmax(dim=1).masked_fill(~near, 0.0)  # a row without neighbours is nan before it is filled
    own = squares.gather(1, labels[:, None]).squeeze(1)
    return mean_over_rows((own - (a * squares).sum(dim=1)).relu())


class NeighbourGraph(GrowingBuffers):
    """The matrix E; it grows by rows without neighbours.

    Attributes:
        edges: E, ``(n, n)``, symmetric between two steps, in [0, 1], with a diagonal above 0.
    """

    kept_as: ClassVar[str] = "prototypes"
    edges: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("edges", torch.zeros(0, 0))

    def grow(self, count: int) -> None:
        """Append ``count`` rows and columns: 1 on the diagonal, else 0. A diagonal element of E is 1 at any time."""
        self.edges = F.pad(self.edges, (0, count, 0, count))
        self.edges.fill_diagonal_(1.0)

    def num_bytes(self) -> int:
        return self.edges.nbytes

    def restore_buffers(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        restore_shapes(self, state_dict, prefix, ("edges",), keep_dtype=True)


class NapaVQ(ContinualStrategy):
    """Coding vectors of classes and rotations; neighbours shape the features, and the pseudo-features of old classes.

    Args:
        prototype_weight: lambda, at least 0.
        distill_weight: gamma, at least 0.
        temperature: tau, above 0.
        neighbours: K, at least 1.
        decay: delta, in (0, 1).
        vector_lr, later_vector_lr: Learning rates of the coding vectors in the first task and in later tasks, above 0.
        vector_epochs: This learning rate is multiplied by 0.1 after each of this number of epochs, at least 1.
        head: Builds a ``DistanceHead``; None for ``DistanceHead``.
        kwargs: Options of the base class.
    """

    traits = Traits(
        family="exemplar-free", paper="Malepathirana et al., ICCV 2023, arXiv:2308.09297", inputs=("image",)
    )

    def __init__(
        self,
        *,
        prototype_weight: float = 10.0,
        distill_weight: float = 10.0,
        temperature: float = 0.1,
        neighbours: int = 15,
        decay: float = 0.9,
        vector_lr: float = 5.0,
        later_vector_lr: float = 0.5,
        vector_epochs: int = 20,
        head: HeadFactory | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(head=head or DistanceHead, loss_classes="all", **kwargs)
        at_least(self, 0, prototype_weight=prototype_weight, distill_weight=distill_weight)
        above(self, 0, temperature=temperature, vector_lr=vector_lr, later_vector_lr=later_vector_lr)
        at_least(self, 1, neighbours=neighbours, vector_epochs=vector_epochs)
        within(self, "(0, 1)", decay=decay)
        self.prototype_weight, self.distill_weight = prototype_weight, distill_weight
        self.temperature, self.neighbours, self.decay = temperature, neighbours, decay
        self.vector_lrs, self.vector_epochs = (vector_lr, later_vector_lr), vector_epochs
        self.teacher = Teacher(reference=True)
        self.rotation_head: DistanceHead  # row 3 y + k - 1: rotation k of class y
        self.class_means: Prototypes  # row 4 y + k
        self.graph = NeighbourGraph()
        self._old = torch.zeros(0, dtype=torch.int64)  # rows 4 y of classes with a mean, on the CPU

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        head = head_as(self.network, DistanceHead, self, "whose rows are coding vectors")
        self.rotation_head, self.class_means = DistanceHead(head.num_features), Prototypes(head.num_features)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.rotation_head.grow(3 * task.num_new)
        self.graph.grow(4 * task.num_new)
        self.class_means.grow(4 * task.num_seen)

    def begin_phase(self, phase: Phase, origin: int, sources: Sequence[AddsLosses] = ()) -> None:
        super().begin_phase(phase, origin, sources)
        old = self.task.num_seen - self.task.num_new
        self._old = 4 * self.class_means.known[: 4 * old : 4].nonzero().squeeze(1).cpu()

    def on_train_start(self) -> None:
        before = self.teacher.network
        if before is not None and not self.class_means.known.all():  # known already in a fit that is resumed
            self._measure(before)

    def trainable(self) -> Iterable[nn.Parameter]:
        yield from self.network.backbone.parameters()
        if self.task.num_new:
            for head in (self.network.head, self.rotation_head):
                yield from head.blocks[-1].parameters()

    def parameter_groups(self, parameters: list[nn.Parameter]) -> list[nn.Parameter] | list[dict[str, Any]]:
        # In the optimizer, for the unscaling of mixed precision, but moved by `edit_gradients`.
        return separate_group(parameters, self._coding_vectors(), lr=0.0, weight_decay=0.0)

    def prepare_batch(self, batch: Batch) -> Batch:
        return rotate_batch(batch)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        together = batch.draw.total >= world_size()  # a process without rows takes no part in an exchange
        labels = rotation_classes(batch.labels[: len(batch) // 4])
        ce, neighbours = self._of_vectors(output.features, labels, together)
        terms = {"ce": ce, "neighbours": neighbours}
        if self.teacher:
            old = self._old[batch.draw.fork(_CLASSES).randint(len(self._old))].to(self.device)
            ce, neighbours = self._of_vectors(self._pseudo_features(batch, old), old, together)
            before = self.teacher(batch.images).features
            distill = feature_norm_distillation(output.features, before, batch)
            terms["prototypes"], terms["distill"] = self.prototype_weight * ce, self.distill_weight * distill
            terms["prototype_neighbours"] = neighbours
        self.graph.edges = (self.graph.edges + self.graph.edges.T) / 2
        return terms

    @torch.no_grad()
    def edit_gradients(self, batch: Batch) -> None:
        trained = [vectors for vectors in self._coding_vectors() if vectors.grad is not None]
        gradients = [cast(Tensor, vectors.grad) for vectors in trained]
        if not trained:
            return
        finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all()  # else the step is skipped
        lr = self.vector_lrs[not self.task.is_first] * 0.1 ** (self.epoch // self.vector_epochs)
        for vectors, gradient in zip(trained, gradients, strict=True):
            vectors.sub_((lr * gradient).where(finite, 0.0))

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        self._measure(self.network)
        self.teacher.learn_from(self.network)

    def bytes_kept(self) -> dict[str, int]:
        rotations = sum(tensor.nbytes for tensor in self.rotation_head.state_dict().values())
        return {**super().bytes_kept(), "heads": rotations}

    def _coding_vectors(self) -> list[nn.Parameter]:
        return [*self.network.head.parameters(), *self.rotation_head.parameters()]

    def _vectors(self) -> Tensor:
        """Coding vectors ``(4 C, d)``, in the order 4 y + k."""
        plain, turned = self.network.head.weight(), self.rotation_head.weight()
        return torch.cat([plain[:, None], turned.view(len(plain), 3, -1)], dim=1).flatten(0, 1)

    def _of_vectors(self, features: Tensor, labels: Tensor, together: bool) -> tuple[Tensor, Tensor]:
        """L_DCE and L_NA of features ``(B, d)`` of the classes ``labels``; E is updated between them."""
        gaps = distances(features, self._vectors())
        if together:
            self.graph.edges = updated_edges(self.graph.edges, gaps, self.neighbours, self.decay, reduce=True)
        return cross_entropy(-gaps / self.temperature, labels), neighbour_loss(gaps, labels, self.graph.edges)

    def _pseudo_features(self, batch: Batch, old: Tensor) -> Tensor:
        """p~ of classes ``old``, ``(B, d)``."""
        chances = batch.draw.fork(_NEIGHBOURS).rand(len(self.graph.edges)).to(self.device)
        partner = chances.masked_fill(self.graph.edges[old] <= 0, -1.0).argmax(dim=1)
        share = 0.5 + batch.draw.fork(_SHARES).rand(1).to(self.device) / 2  # u
        return torch.lerp(self.class_means.means[partner], self.class_means.means[old], share)

    @torch.no_grad()
    def _measure(self, network: Network) -> None:
        """Replace the means of the classes of the task and of their rotations, with the features of a network."""
        features = [torch.zeros(0, self.class_means.num_features, device=self.device)]
        labels = [torch.zeros(0, dtype=torch.int64, device=self.device)]
        for batch in self.passes.batches():
            if len(batch):
                with self.trainer.precision_plugin.forward_context():
                    features.append(network.backbone(rotated(batch.images)).float())
                labels.append(rotation_classes(batch.labels))
        self.class_means.update(torch.cat(features), torch.cat(labels), replace=True)
