"""PROOF: projection fusion for models of images and text (Zhou et al., TPAMI 2025, arXiv:2305.19270).

Each task b adds a linear map P_b of the normalised features f(x) of a frozen image tower, a linear map Q_b of the text
embeddings e_c of the class names, and context vectors c_b. The maps are summed over the tasks; maps of earlier tasks
are frozen:

    q = norm( sum_b P_b f(x) ),   t_c = norm( sum_b Q_b e_c ),   p_c = norm( sum_b P_b mu_c )

with mu_c the mean of the normalised features of class c, measured when its task begins. Self-attention, with a residual
connection and layer normalisation (LN), adapts the vectors of the set of an image to each other:

    X = [q; t_1; ..; t_C; p_1; ..; p_C; c_1; ..; c_B]
    [q~; t~_1; ..; p~_1; ..] = LN( X + W_o softmax(W_q X (W_k X)^T / sqrt(e)) W_v X )

    score_c(x) = s ( cos(q, t_c) + cos(q~, t~_c) + cos(q~, p~_c) )
    L = CE(s cos(q~, t~), y) + CE(s cos(q~, p~), y) + contrast(q, t_y)

contrast is the symmetric loss of CLIP between the images of the batch and the names of their classes. Herded exemplars
are mixed with the data of a task. s is the scale of the ``TextHead``; number of vectors in c_b -> context_size.
``similarity="dot"``, as in the released code, has inner products in place of ``s cos``. They are about e cos for q~, t~
and p~, so the first term of the score has little weight. The code trains the text maps of all tasks
(``train_texts="all"``), and starts each map at random (``initial="random"``), which changes the classifier when a task
begins; ``neutral`` is ours.
Departs from the code: t~ and p~ are of the set of one image, where the code averages them over the batch, so that a
prediction depends on the batch; training has the same embeddings of the classes as evaluation; maps have no biases, and
attention no dropout; context vectors start with a norm near 1, like the other vectors. If a class recurs, its images
are pooled in mu_c. A class without images has its text in place of its mean in the score.
"""

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import ImageShape
from cl_lightning.checks import at_least, one_of
from cl_lightning.losses import cross_entropy, full_precision, masked_logits, rows_of_all
from cl_lightning.memory import Prototypes
from cl_lightning.models import GrowingParameters
from cl_lightning.strategies.pretrained.text import TextTower
from cl_lightning.strategy import Batch, ExemplarReplay, Output, Task, Traits

Initial = Literal["neutral", "random"]
Similarity = Literal["cosine", "dot"]


def pair_contrast(images: Tensor, texts: Tensor, scale: Tensor | float, known: Tensor) -> Tensor:
    """Loss of CLIP: ``1/2 [CE over the rows + CE over the columns]`` of ``s q_i . t_j``, with pair i as the target.

    Equal texts of two images are negatives of each other too.

    Args:
        images: q, ``(n, e)``, rows of norm 1.
        texts: t, the text of each image, ``(n, e)``, rows of norm 1.
        scale: s.
        known: Which images have a text, bool ``(n,)``; the others take no part.

    Returns:
        A scalar, in nats; 0 without any pair.
    """
    with torch.autocast(images.device.type, enabled=False):
        similarity = scale * images @ texts.T
    own = torch.arange(len(images), device=images.device)
    targets = own.where(known, -1)
    mask = known | (own[:, None] == own)  # the diagonal, so that no row is empty
    by_image, by_text = (cross_entropy(masked_logits(each, mask), targets) for each in (similarity, similarity.T))
    return (by_image + by_text) / 2


class SetAttention(nn.Module):
    """Self-attention in sets that share all vectors but one, with a residual connection and layer normalisation.

        LN( X + W_o softmax(W_q X (W_k X)^T / sqrt(e)) W_v X ),   X = [q_i; Y]   for each q_i

    The attention among the rows of Y is computed once: a row j of Y attends to q_i with the weight
    sigmoid(b_ij - L_j), b_ij its product with q_i and L_j the logsumexp of its products with Y, and to Y with the rest.

    Args:
        width: e, the size of a vector.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.norm = nn.LayerNorm(width)
        self.width = width

    def forward(self, single: Tensor, shared: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Adapted vectors of each set.

        Args:
            single: q, ``(B, e)``.
            shared: Y, ``(S, e)``.
            present: Rows of Y that others attend to, bool ``(S,)``, at least one.

        Returns:
            ``(B, e)`` and ``(B, S, e)``.
        """
        (query, key, value), (queries, keys, values) = (self._maps(rows) for rows in (single, shared))
        itself = (query * key).sum(dim=1, keepdim=True)  # (B, 1)
        weights = torch.cat([itself, masked_logits(query @ keys.T, present)], dim=1).softmax(dim=1)  # (B, 1 + S)
        one = single + weights[:, :1] * value + weights[:, 1:] @ values
        among = masked_logits(queries @ keys.T, present)  # (S, S)
        share = (key @ queries.T - among.logsumexp(dim=1)).sigmoid()[:, :, None]  # (B, S, 1)
        others = shared + torch.lerp(among.softmax(dim=1) @ values, value[:, None], share)
        return self.norm(one), self.norm(others)

    def _maps(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, divided by sqrt(e), keys, and values after W_o."""
        return self.query(rows) / self.width**0.5, self.key(rows), self.output(self.value(rows))


class ProjectionFusion(nn.Module):
    """Linear maps of images and texts and context vectors for each task, and attention that adapts them to each other.

    Args:
        num_features: d.
        width: e, the size of an embedding.
        context_size: Number of context vectors of a task.
        initial: Initial maps of a task, as in :class:`PROOF`.
        similarity: Of adapted vectors, as in :class:`PROOF`.
    """

    def __init__(
        self, num_features: int, width: int, context_size: int, initial: Initial, similarity: Similarity
    ) -> None:
        super().__init__()
        self.num_features, self.width = num_features, width
        self.context_size, self.initial, self.similarity = context_size, initial, similarity
        self.images, self.texts, self.contexts = GrowingParameters(), GrowingParameters(), GrowingParameters()
        self.attention = SetAttention(width)

    def grow(self) -> None:
        """Add maps and contexts of a task."""
        self.images.append(self._new_map(self.num_features, len(self.images) == 0))
        self.texts.append(self._new_map(self.width, len(self.texts) == 0))
        self.contexts.append(torch.randn(self.context_size, self.width) / self.width**0.5)

    def _new_map(self, inputs: int, first: bool) -> Tensor:
        if self.initial == "random" or (first and inputs != self.width):
            return nn.Linear(inputs, self.width, bias=False).weight
        return torch.eye(self.width) if first else torch.zeros(self.width, inputs)

    def forward(self, features: Tensor) -> Tensor:
        """``sum_b P_b f / |f|``, ``(n, e)``, of features or means ``(n, d)``."""
        return F.linear(F.normalize(features, dim=1), torch.stack(list(self.images)).sum(dim=0))

    def project_texts(self, embeddings: Tensor) -> Tensor:
        """t, ``(C, e)``, of embeddings ``(C, e)``."""
        projected = F.linear(embeddings, torch.stack(list(self.texts)).sum(dim=0))
        return F.normalize(full_precision(projected), dim=1)

    def similarities(self, images: Tensor, texts: Tensor, prototypes: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines or inner products of q~ and t~ and of q~ and p~, each ``(B, C)``.

        Args:
            images: q, ``(B, e)``.
            texts: t, ``(C, e)``.
            prototypes: p, ``(C, e)``.
            known: Which classes have a prototype, bool ``(C,)``; the others take no part.
        """
        contexts = torch.cat(list(self.contexts))
        shared = torch.cat([texts, prototypes, contexts.to(texts.dtype)])
        present = F.pad(torch.cat([torch.ones_like(known), known]), (0, len(contexts)), value=True)
        adapted, others = self.attention(images, shared, present)
        count = len(texts)
        if self.similarity == "cosine":
            adapted, others = F.normalize(adapted, dim=1), F.normalize(others, dim=2)
        near = (others[:, : 2 * count] @ adapted[:, :, None])[:, :, 0]
        return near[:, :count], near[:, count:]


class PROOF(TextTower, ExemplarReplay):
    """Summed projections of images and class names, fused by attention among them, class means and contexts.

    Args:
        context_size: Number of context vectors that a task adds, at least 0.
        initial: Maps of a task at its start. ``neutral``: the identity in the first task, and zeros later, so that the
            classifier does not change at the start of a task; ``random``: as a linear layer.
        similarity: ``cosine``: s cos(.); ``dot``: inner products, without s.
        train_texts: Text maps that are trained: the map of the ``newest`` task, or ``all``, as in the released code.
        kwargs: Options of ``TextTower`` and ``ExemplarReplay``.

    Attributes:
        image_means: mu, the means of the normalised features.
        measured: Number of tasks whose classes have a mean.
    """

    traits = Traits(
        family="pretrained",
        paper="Zhou et al., TPAMI 2025, arXiv:2305.19270",
        keeps_exemplars=True,
        needs_pretrained=True,
        losses_use_images=False,
    )
    image_means: Prototypes
    measured: Tensor

    def __init__(
        self,
        *,
        context_size: int = 3,
        initial: Initial = "neutral",
        similarity: Similarity = "cosine",
        train_texts: Literal["newest", "all"] = "newest",
        **kwargs: Any,
    ) -> None:
        super().__init__(loss_classes="all", **kwargs)
        at_least(self, 0, context_size=context_size)
        one_of(self, get_args(Initial), initial=initial)
        one_of(self, get_args(Similarity), similarity=similarity)
        one_of(self, ("newest", "all"), train_texts=train_texts)
        self.context_size, self.train_texts = context_size, train_texts
        self.initial: Initial = initial
        self.similarity: Similarity = similarity
        self.register_buffer("measured", torch.zeros((), dtype=torch.int64))

    @property
    def fusion(self) -> ProjectionFusion:
        fusion: ProjectionFusion = self.text_head.projection  # type: ignore[assignment]
        return fusion

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        head = self.text_head
        sizes = head.num_features, head.num_embedding, self.context_size
        head.projection = ProjectionFusion(*sizes, self.initial, self.similarity)
        self.image_means = Prototypes(head.num_features)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.fusion.grow()
        self.image_means.grow(task.num_seen)

    def trainable(self) -> Iterable[nn.Parameter]:
        fusion = self.fusion
        yield fusion.images[-1]
        yield from fusion.texts if self.train_texts == "all" else [fusion.texts[-1]]
        if self.context_size:
            yield fusion.contexts[-1]
        yield from fusion.attention.parameters()
        yield from self.text_head.parameters(recurse=False)  # the scale, if it is trained

    def on_train_start(self) -> None:
        super().on_train_start()
        if int(self.measured) > self.task.index:
            return  # the run was interrupted in this task
        self.eval()
        features, labels = self.passes.features()
        self.image_means.update(F.normalize(features, dim=1), labels)
        self.measured.fill_(self.task.index + 1)
        self.train()

    def vectors(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q ``(B, e)``, t ``(C, e)``, and the similarities of q~ to t~ and of q~ to p~, ``(B, C)`` each, without s.

        The similarity to the prototype of a class without images is -inf. Under autocast the maps of the tasks are
        computed in half precision, cosines and attention in float32.

        Args:
            features: f(x), ``(B, d)``.
        """
        fusion, known = self.fusion, self.image_means.known
        features = full_precision(features)
        rows, means = (own.to(features.dtype) for own in (self.text_head.weight(), self.image_means.means))
        texts = fusion.project_texts(rows)
        images, prototypes = (F.normalize(full_precision(fusion(own)), dim=1) for own in (features, means))
        with torch.autocast(features.device.type, enabled=False):
            to_texts, to_means = fusion.similarities(images, texts, prototypes, known)
        return images, texts, to_texts, masked_logits(to_means, known)

    @property
    def _scale(self) -> Tensor | float:
        """Factor of the similarities."""
        return self.text_head.scale if self.similarity == "cosine" else 1.0

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        images, texts, to_texts, to_means = self.vectors(output.features)
        weights, (rows, factor) = self.data.weights_of(batch), rows_of_all(batch)
        labels = rows(batch.labels)
        contrast = pair_contrast(rows(images), texts[labels.clamp(min=0)], self.text_head.scale, labels >= 0)
        return {
            "text": cross_entropy(self._scale * to_texts, batch.labels, weights=weights),
            "prototypes": cross_entropy(self._scale * to_means, batch.labels, weights=weights),
            "contrast": factor * contrast,
        }

    def predict(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        features = self.network.backbone(images)
        with torch.autocast(features.device.type, enabled=False):  # as heads classify
            projected, texts, to_texts, to_means = self.vectors(features)
            to_means = to_means.where(self.image_means.known, to_texts)
            return self._scale * (projected @ texts.T + to_texts + to_means)
