"""SAVC, semantic-aware virtual contrast (Song et al., CVPR 2023, arXiv:2304.00426).

M fixed transforms make M virtual classes of each class (``transformed.py``). In the base session, a cosine classifier
of all virtual classes is trained, together with a contrast between crops of the images and a queue of earlier keys:

    L = CE(s cos(f(t_m(x)), w), y M + m) + alpha L_g + beta L_l

    q = g(f(t_m(crop(x)))) / ||.||,   k = g'(f'(t_m(crop'(x)))) / ||.||
    L_q = 1/|P| sum_{p in P} log( 1 + sum_{n in N} exp((q . n - q . p) / T) )

P has the own key k and the keys of the queue with the virtual class of q, and N the other keys of the queue. L_g is the
mean of L_q over queries of a large crop, L_l over queries of ``local_crops`` small crops of the crop of the key. f' and
g' are moving averages, theta' <- m theta' + (1 - m) theta after each step; then the keys of the step replace the oldest
ones. When the session ends f is frozen, and w, g, f', g' and the queue are removed. Classes are means of features for
each transform:

    score_c(x) = 1/M sum_m cos(f(t_m(x)), mu_{c,m})

M, t -> copies, s -> scale, alpha -> global_weight, beta -> local_weight, T -> temperature, m of the averages ->
momentum, size of the queue -> queue_size. With one transform, and weights of 0, the method is ``ProtoCosine``.
Chosen here: g is a perceptron with one hidden layer as wide as the features; after a crop, images are mirrored and
their colours are changed. Departs from the authors' code: small crops are inside the crop of the key, where the code
has at least a tenth of their area in it; the last epoch of the base session is used instead of the best one by test
accuracy. Later sessions do not train.
"""

import functools
from collections.abc import Iterable
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import Batch, ImageShape
from cl_lightning.checks import above, at_least, one_of, within
from cl_lightning.data import ColorJitter, Compose, Context, RandomHorizontalFlip, RandomResizedCrop, Transform
from cl_lightning.distributed import all_gather_together
from cl_lightning.losses import cross_entropy, full_precision
from cl_lightning.memory import Teacher, move_towards
from cl_lightning.models import Temporary, frozen_copy, perceptron
from cl_lightning.strategies.few_shot.proto_cosine import ProtoCosine
from cl_lightning.strategies.few_shot.transformed import (
    NUMBER,
    Copies,
    JointCosineHead,
    JointMeansHead,
    check_copies,
    features_of_copies,
    over_copies,
    transformed,
    transformed_batch,
    virtual_labels,
)
from cl_lightning.strategy import Output, Phase, Task

_QUERY, _KEY, _LOCAL = 0x5A7C, 0x5A7D, 0x5A80  # salts


def virtual_contrast(
    queries: Tensor, own: Tensor, labels: Tensor, keys: Tensor, key_labels: Tensor, temperature: float
) -> Tensor:
    """L_q of each query, ``(n,)``, in nats: each positive is compared with the negatives, not with other positives.

    Args:
        queries: q, unit vectors ``(n, e)``.
        own: The own key of each query, unit vectors ``(n, e)``.
        labels: Virtual classes of the queries, int64 ``(n,)``; -1 if unknown.
        keys: Unit vectors of the queue, ``(Q, e)``.
        key_labels: Their virtual classes, int64 ``(Q,)``; keys with -1 are left out.
        temperature: T, above 0.
    """
    positive = (labels[:, None] == key_labels) & (key_labels >= 0)
    negative = (labels[:, None] != key_labels) & (key_labels >= 0)
    similarity, to_own = queries @ keys.T / temperature, (queries * own).sum(dim=1) / temperature
    others = similarity.masked_fill(~negative, -torch.inf).logsumexp(dim=1)
    of_queue = F.softplus(others[:, None] - similarity).masked_fill(~positive, 0.0).sum(dim=1)
    return (of_queue + F.softplus(others - to_own)) / (1 + positive.sum(dim=1))


class KeyQueue(nn.Module):
    """Projections g and g', and the latest keys with their virtual classes.

    Args:
        num_features: Size of a feature vector, d.
        size: Size of a key, e.
        length: Number of keys, Q.

    Attributes:
        keys: ``(Q, e)``.
        labels: int64 ``(Q,)``; -1 for a place without a key.
        place: Place of the next key, an int64 scalar.
    """

    keys: Tensor
    labels: Tensor
    place: Tensor

    def __init__(self, num_features: int, size: int, length: int) -> None:
        super().__init__()
        self.projection = perceptron(num_features, num_features, size)
        self.key_projection = frozen_copy(self.projection)
        self.register_buffer("keys", torch.zeros(length, size))
        self.register_buffer("labels", torch.full((length,), -1))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, keys: Tensor, labels: Tensor) -> None:
        """Replace the oldest keys by these, in order; of more than Q keys the last ones are kept.

        Args:
            keys: ``(n, e)``, the same on every process.
            labels: int64 ``(n,)``.
        """
        length = len(self.labels)
        keys, labels = keys[-length:], labels[-length:]
        places = (self.place + torch.arange(len(labels), device=labels.device)) % length
        self.keys[places] = keys.to(self.keys.dtype)
        self.labels[places] = labels
        self.place.add_(len(labels)).remainder_(length)


class SAVC(ProtoCosine):
    """Virtual classes by transforms of the images, and contrast of crops with a queue of keys, in the base session.

    Args:
        copies: t, the transforms: ``rotation2`` for CIFAR-100 and CUB-200, ``rotation_color12`` for miniImageNet.
        global_weight: alpha, at least 0.
        local_weight: beta, at least 0.
        momentum: m of the moving average, in [0, 1]; 0.999 in the authors' code for larger images.
        queue_size: Q, at least 1.
        temperature: T, above 0.
        projection_size: e, number of outputs of g, at least 1; 128 in the authors' code for larger images.
        global_scale: Range of the area of a large crop, as a share of the image.
        local_scale: Range of the area of a small crop, as a share of the crop of the key.
        local_crops: Number of small crops of an image, at least 1.
        local_size: Side of the small crops in pixels, 18 for CIFAR-100; None for the size of the image, which a
            backbone needs that takes images of one size, such as ``MLP``.
        transforms: Changes of a crop, in order; None for mirroring and changes of colours. The former is wrong if a
            mirrored image belongs to another class.
        kwargs: Options of ``ProtoCosine``.
    """

    traits = ProtoCosine.traits.but(paper="Song et al., CVPR 2023, arXiv:2304.00426", inputs=("image",))

    def __init__(
        self,
        *,
        copies: Copies = "rotation2",
        global_weight: float = 0.2,
        local_weight: float = 0.8,
        momentum: float = 0.995,
        queue_size: int = 8192,
        temperature: float = 0.07,
        projection_size: int = 32,
        global_scale: tuple[float, float] = (0.9, 1.0),
        local_scale: tuple[float, float] = (0.2, 0.7),
        local_crops: int = 4,
        local_size: int | None = None,
        transforms: list[Transform] | None = None,
        scale: float = 16.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(scale=scale, **kwargs)
        one_of(self, get_args(Copies), copies=copies)
        at_least(self, 0, global_weight=global_weight, local_weight=local_weight)
        within(self, "[0, 1]", momentum=momentum)
        at_least(self, 1, queue_size=queue_size, projection_size=projection_size, local_crops=local_crops)
        at_least(self, 1, local_size=local_size, optional=True)
        above(self, 0, temperature=temperature)
        self.copies: Copies = copies
        self.global_weight, self.local_weight = global_weight, local_weight
        self.momentum, self.temperature = momentum, temperature
        self.queue_size, self.projection_size = queue_size, projection_size
        self.global_scale, self.local_scale = global_scale, local_scale
        self.local_crops, self.local_size = local_crops, local_size
        self.changes = Compose([RandomHorizontalFlip(), ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8)])
        if transforms is not None:
            self.changes = Compose(transforms)
        count = NUMBER[copies]
        self.build_session_head = functools.partial(JointCosineHead, scale=scale, copies=count)
        self.build_head = functools.partial(JointMeansHead, copies=count)
        self.queue = Temporary(self._new_queue)
        self.key_encoder = Teacher(adapts=True)  # f', with batch normalisation as during training
        self._fresh: tuple[Tensor, Tensor] | None = None  # keys of a step, and their virtual classes

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        check_copies(self, self.copies, image_shape)

    def _new_queue(self) -> KeyQueue:
        return KeyQueue(self._adapted.width, self.projection_size, self.queue_size)

    @property
    def keys(self) -> KeyQueue:
        """The projections and the queue of the base session."""
        assert isinstance(self.queue.module, KeyQueue)
        return self.queue.module

    @property
    def joint_head(self) -> JointCosineHead | JointMeansHead:
        """The classifier in use."""
        head = self.network.head
        if self.adapt:
            head = self._session_head.temporary if self._session_head.in_session else self._session_head.final
        assert isinstance(head, JointCosineHead | JointMeansHead)
        return head

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if task.is_first and self.adapt and (self.global_weight or self.local_weight):
            self.queue.create()
            self.key_encoder.learn_from(self.network)

    def trainable(self) -> Iterable[nn.Parameter]:
        yield from super().trainable()
        if self.queue:
            yield from self.keys.projection.parameters()

    def prepare_batch(self, batch: Batch) -> Batch:
        return transformed_batch(batch, self.copies)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        count = NUMBER[self.copies]
        plain = batch.select(slice(0, len(batch) // count))
        labels = virtual_labels(plain.labels, count)
        weights = self.data.weights_of(plain)
        weights = None if weights is None else weights.repeat(count)
        terms = {"ce": cross_entropy(self.joint_head.joint_scores(output.features), labels, weights=weights)}
        if not self.queue:
            return terms
        size = (plain.raw.shape[-2], plain.raw.shape[-1])
        large = RandomResizedCrop(size, scale=self.global_scale)
        box = large(plain.raw, plain.draw.fork(_KEY), self._context(plain))  # the crop of the key
        key = F.normalize(self._keys(self._copied(plain, box, _KEY)), dim=1)
        self._fresh = key.view(count, len(plain), -1).transpose(0, 1).flatten(0, 1), labels.view(count, -1).T.flatten()
        if self.global_weight:
            crop = large(plain.raw, plain.draw.fork(_QUERY), self._context(plain))
            found = self._contrast(self._copied(plain, crop, _QUERY), key, labels)
            terms["global"] = self.global_weight * found.mean()
        if self.local_weight:
            small = RandomResizedCrop(self.local_size or size, scale=self.local_scale)
            crops = [
                self._copied(plain, small(box, plain.draw.fork(salt), self._context(plain)), salt)
                for salt in range(_LOCAL, _LOCAL + self.local_crops)
            ]
            times = self.local_crops
            found = self._contrast(torch.cat(crops), key.repeat(times, 1), labels.repeat(times))
            terms["local"] = self.local_weight * found.mean()
        return terms

    def _context(self, batch: Batch) -> Context:
        return Context(indices=batch.indices, epoch=self.epoch, seed=self.seed)

    def _copied(self, batch: Batch, crops: Tensor, salt: int) -> Tensor:
        """Transformed copies of crops ``(B, ...)``, changed and finished: ``(M B, ...)``."""
        changed = self.changes(crops, batch.draw.fork(salt, 1), self._context(batch))
        return transformed(self.data.finish(batch.replace(raw=changed)).images, self.copies)

    @torch.no_grad()
    def _keys(self, images: Tensor) -> Tensor:
        return full_precision(self.keys.key_projection(self.key_encoder(images).features))

    def _contrast(self, images: Tensor, own: Tensor, labels: Tensor) -> Tensor:
        """L_q of queries from images ``(n, ...)``, ``(n,)``."""
        projected = full_precision(self.keys.projection(self.network.backbone(images)))
        with torch.autocast(images.device.type, enabled=False):
            queue = self.keys
            keys = queue.keys.to(projected.dtype)
            queries = F.normalize(projected, dim=1)
            return virtual_contrast(queries, own, labels, keys, queue.labels, self.temperature)

    def after_step(self, batch: Batch) -> None:
        super().after_step(batch)
        if not self.queue:
            return
        nothing = self.keys.keys[:0], self.keys.labels[:0]  # a process without rows has no keys
        self.keys.push(*all_gather_together(self._fresh or nothing))
        self._fresh = None
        assert self.key_encoder.network is not None
        slow = (self.key_encoder.network.backbone, self.keys.key_projection)
        fast = (self.network.backbone, self.keys.projection)
        for mine, other in zip(slow, fast, strict=True):
            move_towards(list(mine.parameters()), list(other.parameters()), self.momentum)

    def end_phase(self, phase: Phase) -> None:
        super().end_phase(phase)
        self.queue.remove()
        self.key_encoder.network = None

    def end_task(self, task: Task) -> None:
        head = self.joint_head
        assert isinstance(head, JointMeansHead)
        head.fit_copies(*features_of_copies(self, self.copies))

    def predict(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        features = self.network.backbone(transformed(images, self.copies))
        return over_copies(self.joint_head.joint_scores(features), NUMBER[self.copies])
