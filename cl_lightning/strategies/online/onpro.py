"""Online Prototype Learning, OnPro (Wei et al., ICCV 2023, arXiv:2308.00301), for online streams.

With X the batch, R samples drawn uniformly from a memory, M mixed images of the memory, and z the normalised
projections of the features,

    L = CE(M) + L_ins(X) + L_ins(M) + L_pro(X) + L_pro(R)            from the second task on
    L = CE(X) + L_ins(X) + L_pro(X) + L_pro(R)                       in the first task

- *Online prototypes*: p_c and q_c are the normalised means of z over the samples of class c in two views, un-augmented
  and at random. ``prototype_equilibrium`` contrasts them among the K classes of X or R:

      L_pro = -1/(2K) sum_c [ log( exp(p_c . q_c / tau_p) / sum_{v != p_c} exp(p_c . v / tau_p) ) + the same of q_c ]

- *Instances* (from OCM, Guo et al., ICML 2022): X and M have S rotated copies, each in both views, and each rotation of
  a class is a class. ``instance_contrast`` has the similarities lambda (z_i . z_j + z_i . u_j), where u are as many of
  the normalised features, from a random place on. A mixture of two classes is a class of its own.
- *Feedback*: the images of M are (1 - l) x_a + l x_b with probability p, else x_a, and their cross-entropy is
  (1 - l) CE(y_a) + l CE(y_b), on a further random view. A share of M mixes samples of R, with l uniform in (0, 0.6).
  The rest are pairs of classes that are confused: ``pair_probabilities`` of the prototypes of R in the last step, with
  l ~ Beta(0.4, 0.4). In the first step of a task there are no prototypes, and M is R.

S -> rotations, tau_p -> prototype_temperature, lambda -> similarity_weight, p -> mix_probability, the share that mixes
samples of R -> uniform_share. After the step X is offered to a reservoir, without augmentation. Predictions are by the
linear head.

Departs from the authors' code: it has log(q + 1e-8) in L_ins, and a constant for each row; pairs of classes are drawn
independently, while it rounds their expected numbers, and each image is mixed or not, while it mixes all images of a
pair or none; R has replay_per_class samples of each class in the first task too. While the memory is empty, the
cross-entropy is on X. The augmentation of the data module is not used. As in the code, the views of X and M are one
forward pass, the views of R another, and the images for the cross-entropy a third. The method depends on where tasks
begin, so it is not task-free.
With several processes the rows of all processes are contrasted. If a batch of the stream has fewer samples than there
are processes, each process contrasts its own rows.
"""

from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import Draw, ImageShape, RowDraw, join
from cl_lightning.checks import above, at_least, one_of, within
from cl_lightning.data import (
    Compose,
    Context,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    Transform,
    rotated,
)
from cl_lightning.distributed import all_sum
from cl_lightning.losses import cross_entropy, full_precision, mean_over_rows, rows_of_all
from cl_lightning.memory import GrowingBuffers
from cl_lightning.models import distances
from cl_lightning.strategy import Batch, Output, Phase, Replay, Task, Traits

Rotations = Literal[1, 4, 16]

_VIEW, _CLASSIFY = 0x0A1, 0x0A2  # salts of the random views
_PICK, _MIX, _PLACE = 0x0A3, 0x0A4, 0x0A5  # salts of R, of M and of the place of u


def rotated_copies(images: Tensor, copies: Rotations) -> Tensor:
    """Images, followed by their rotations.

    With 4 copies, the whole image is rotated by 0, 90, 180 and 270 degrees. With 16, these are the rotations of four
    images: as they are, and with the left half, the right half or each half rotated by 180 degrees (OCM).

    Args:
        images: ``(B, C, S, S)``; S is even for 16 copies.
        copies: 1, 4 or 16.

    Returns:
        ``(copies * B, C, S, S)``; the first B are the images.

    Raises:
        ValueError: If the images are not square, or have an odd side for 16 copies.
    """
    if copies == 1:
        return images
    if copies == 4:
        return rotated(images)
    half, odd = divmod(images.shape[-1], 2)
    if odd:
        raise ValueError(
            f"rotated_copies: images of {images.shape[-1]} pixels have no halves; resize them (data.resize) or use 4 "
            "rotations"
        )
    left, right = images[..., :half], images[..., half:]
    halves = [(a, b) for a in (left, left.flip(-2, -1)) for b in (right, right.flip(-2, -1))]
    return torch.cat([rotated(torch.cat(pair, dim=-1)) for pair in halves])


def instance_contrast(
    embeddings: Tensor,
    features: Tensor,
    groups: Tensor,
    *,
    weight: float = 1.0,
    temperature: float = 0.07,
    of_memory: bool = False,
) -> Tensor:
    """Contrastive loss of the instances of a step, in nats; row i and row n + i are the two views of an instance.

        s_ij = lambda (z_i . z_j + z_i . u_j) / tau
        of the stream:    L = -1/(2n) sum_i [ log q_i,pair(i) + 2 / |G_i| sum_{j in G_i, j != i} log q_ij ]
        of the memory:    L = -1/(2n) sum_i 1 / |G_i| sum_{j in G_i} log q_ij

    where G_i are the rows of the group of row i, row i included, and q_i is the softmax of s_ij over j, without j = i
    for the stream.

    Args:
        embeddings: z, of norm 1, ``(2n, d)``.
        features: u, ``(2n, d)``.
        groups: Group of each row, class and rotation, int64 ``(2n,)``.
        weight: lambda.
        temperature: tau, positive.
        of_memory: Whether the loss is the one of the memory.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        z = full_precision(embeddings)
        similarity = weight * (z @ (z + full_precision(features)).T) / temperature
    same = groups[:, None] == groups
    share = 1 / same.sum(dim=1)  # 1 / |G_i|
    if of_memory:
        each = similarity.log_softmax(dim=1).masked_fill(~same, 0.0).sum(dim=1) * share
        return -mean_over_rows(each)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_q = similarity.masked_fill(itself, -torch.inf).log_softmax(dim=1).masked_fill(itself, 0.0)
    pair = torch.cat([log_q.diagonal(len(z) // 2), log_q.diagonal(-(len(z) // 2))])
    return -mean_over_rows(pair + 2 * share * log_q.masked_fill(~same, 0.0).sum(dim=1))


def members_of(labels: Tensor, num_classes: int) -> Tensor:
    """Whether a row is of a class, bool ``(B, C)``, for labels ``(B,)``."""
    return labels[:, None] == torch.arange(num_classes, device=labels.device)


def prototype_equilibrium(
    first: Tensor, second: Tensor, labels: Tensor, num_classes: int, temperature: float = 0.5
) -> Tensor:
    """L_pro: contrastive loss between the online prototypes of two views, the mean over the prototypes, in nats.

    A prototype is the normalised mean of the rows of its class in a view; its positive is the prototype of the class in
    the other view, and all other prototypes of both views are negatives. It is 0 for a single class.

    Args:
        first: z of one view, of norm 1, ``(B, d)``.
        second: z of the other view of the same samples, ``(B, d)``.
        labels: Columns, int64 ``(B,)``.
        num_classes: Number of columns.
        temperature: tau_p, positive.
    """
    with torch.autocast(first.device.type, enabled=False):
        members = members_of(labels, num_classes).to(full_precision(first).dtype)  # (B, C)
        present = (members.sum(dim=0) > 0).repeat(2)
        prototypes = torch.cat([F.normalize(members.T @ full_precision(z), dim=1) for z in (first, second)])
        similarity = prototypes @ prototypes.T / temperature
    itself = torch.eye(len(present), dtype=torch.bool, device=first.device)
    # Not minus infinity: without any sample the gradient would be nan.
    log_p = similarity.masked_fill(itself | ~present, torch.finfo(similarity.dtype).min).log_softmax(dim=1)
    positive = torch.cat([log_p.diagonal(num_classes), log_p.diagonal(-num_classes)])
    return -positive.where(present, 0.0).sum() / present.sum().clamp(min=1)


def pair_probabilities(prototypes: Tensor) -> Tensor:
    """Probability of each pair of classes a < b, the softmax of 1 / || p_a - p_b ||; closer classes are more probable.

    Args:
        prototypes: ``(C, d)``; 0 for a class without a prototype, which is in no pair.

    Returns:
        ``(C, C)``, above 0 for pairs a < b only; their sum is 1, or 0 with fewer than two prototypes.
    """
    known = (prototypes != 0).any(dim=1)
    pairs = (known[:, None] & known).triu(1)
    closeness = (1 / distances(prototypes, prototypes).clamp(min=1e-6)).masked_fill(~pairs, -torch.inf)
    return closeness.flatten().softmax(dim=0).view_as(closeness).where(pairs, 0.0)


@cache
def random_view(height: int, width: int) -> Transform:
    """The random view in the paper: mirrored, grey with probability 0.25, a crop of 0.3 to 1 of the area."""
    crop = RandomResizedCrop((height, width), scale=(0.3, 1.0))
    return Compose([RandomHorizontalFlip(), RandomGrayscale(p=0.25), crop])


class OnlinePrototypes(GrowingBuffers):
    """Mean of z of each class in the samples of the memory in the last step, over both views.

    Attributes:
        means: ``(C, d)``; 0 for a class without a sample in that step.
    """

    kept_as: ClassVar[str] = "prototypes"
    means: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(0, size))

    def clear(self, num_classes: int) -> None:
        """Forget all means."""
        self.means = self.means.new_zeros(num_classes, self.means.shape[1])

    def num_bytes(self) -> int:
        return self.means.nbytes


class Vectors(NamedTuple):
    """z and u of the rows of a step, ``(B, d)`` each."""

    embeddings: Tensor
    features: Tensor


class OnPro(Replay):
    """Contrast of online prototypes and of instances, and mixed images of confused classes for the cross-entropy.

    Args:
        memory_size: Number of samples in the memory, over all processes; with 0 only the stream is trained on.
        replay_size: Largest number of samples in R, and in M, per step, over all processes, at least 1.
        replay_per_class: Number of samples in R for each class so far, up to ``replay_size``, at least 1.
        rotations: S: 1, 4, or 16 with rotations of the quarters of an image.
        prototype_temperature: tau_p, above 0.
        temperature: tau of L_ins, above 0.
        similarity_weight: lambda from the second task on, at least 0; the authors have 0.5 for CIFAR-10.
        mix_probability: p, in [0, 1]; the authors have 0.6 for CIFAR-10.
        uniform_share: Share of M that mixes samples of R, in [0, 1]; the authors have 0.75 for CIFAR-10.
        projection_size: Number of outputs of the projection, at least 1 and at most the number of features.
        transforms: Augmentation of the random views, in order; None for the augmentation of the paper. The latter
            mirrors images: give other transforms if a mirrored image belongs to another class.
        kwargs: Options of ``Replay``.
    """

    traits = Traits(
        family="online", paper="Wei et al., ICCV 2023, arXiv:2308.00301", keeps_exemplars=True, inputs=("image",)
    )

    def __init__(
        self,
        *,
        memory_size: int = 1000,
        replay_size: int = 64,
        replay_per_class: int = 7,
        rotations: Rotations = 16,
        prototype_temperature: float = 0.5,
        temperature: float = 0.07,
        similarity_weight: float = 1.0,
        mix_probability: float = 0.2,
        uniform_share: float = 0.9,
        projection_size: int = 128,
        transforms: list[Transform] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(memory_size=memory_size, replay_size=replay_size, **kwargs)
        at_least(self, 1, replay_size=replay_size, replay_per_class=replay_per_class, projection_size=projection_size)
        one_of(self, get_args(Rotations), rotations=rotations)
        above(self, 0, prototype_temperature=prototype_temperature, temperature=temperature)
        at_least(self, 0, similarity_weight=similarity_weight)
        within(self, "[0, 1]", mix_probability=mix_probability, uniform_share=uniform_share)
        if self.loss_classes != "all":
            raise ValueError(
                f"OnPro: loss_classes is {self.loss_classes!r}, but mixed images have two classes; use 'all'"
            )
        self.per_step, self.replay_per_class, self.rotations = replay_size, replay_per_class, rotations
        self.prototype_temperature, self.temperature = prototype_temperature, temperature
        self.similarity_weight, self.mix_probability = similarity_weight, mix_probability
        self.uniform_share, self.projection_size = uniform_share, projection_size
        self.transforms = None if transforms is None else Compose(transforms)
        self.online = OnlinePrototypes(projection_size)
        self.projection: nn.Linear
        self._sums: Tensor | None = None  # sums of z of the memory's samples, and their numbers, (C, d + 1)

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        width = self.network.head.num_features
        if self.projection_size > width:
            raise ValueError(
                f"OnPro: projection_size is {self.projection_size}, of {width} features; use at most as many, since "
                "projections are compared with as many features"
            )
        self.projection = nn.Linear(width, self.projection_size)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.online.clear(self.network.head.num_columns)

    def phases(self, task: Task) -> list[Phase]:
        return [Phase(unaugmented=True)]

    def trainable(self) -> Iterable[nn.Parameter]:
        yield from super().trainable()
        yield from self.projection.parameters()

    # ------------------------------------------------------------------ the samples of a step

    def prepare_batch(self, batch: Batch) -> Batch:
        self._sums = None
        parts: dict[str, Batch] = {}
        parts["stream"], parts["random stream"] = self.views(batch, batch.raw, self.rotations)
        count = min(self.per_step, self.replay_per_class * self.network.head.num_columns, len(self.memory))
        rows = torch.randperm(len(self.memory), generator=batch.draw.fork(_PICK).generator())[:count]
        if count and not self.task.is_first:
            mixed, pixels = self.mixtures(batch, rows)
            parts["mixed"], parts["random mixed"] = self.views(mixed, pixels, self.rotations)
            parts["classify"] = self.at_random(mixed, pixels)
        else:
            parts["classify"] = self.at_random(batch, batch.raw)
        if count:
            samples = self.of_memory(batch, rows, _PICK)
            parts["replay"], parts["random replay"] = self.views(samples, samples.raw, 1)
        joint = join(parts).replace(draw=batch.draw)
        begins = [joint.parts[name][0].start for name in ("classify", "replay") if name in parts]
        bounds = [0, *begins, len(joint)]
        return joint.replace(passes=tuple(slice(*pair) for pair in pairwise(bounds)))

    def of_memory(self, batch: Batch, rows: Tensor, salt: int) -> Batch:
        """This process's share of some rows of the memory, which are given on the CPU or on the memory's device."""
        share = batch.draw.share(len(rows), salt)
        place = self.memory.labels.device
        return self.memory.at(rows[share.start : share.stop].to(place, non_blocking=True), share)

    def mixtures(self, batch: Batch, rows: Tensor) -> tuple[Batch, Tensor]:
        """M: the samples x_a, and the mixed images in [0, 1].

        The fields of ``extra`` are the shares l of the partners, and labels and tasks of x_b.

        Args:
            batch: Batch of the stream.
            rows: Rows of R in the memory, on the CPU.
        """
        count, held, place = len(rows), len(self.memory), self.memory.labels.device
        draw = Draw.of(count, batch.draw.key, _MIX)  # the same on every process, of which each takes its share
        base = int(self.uniform_share * count)
        own, other = rows, rows.clone()
        other[:base] = rows[:base][torch.randperm(base, generator=draw.generator())]
        beta = np.random.default_rng(draw.fork(1).key).beta(0.4, 0.4, count).astype(np.float32)
        uniform, coin, chance = (draw.fork(number).rand() for number in (2, 3, 4))
        of_classes = draw.fork(5).rand(2, held)
        own, other, share, confused, coin, chance, of_classes = (
            value.to(place, non_blocking=True)
            for value in (own, other, 0.6 * uniform, torch.from_numpy(beta), coin, chance, of_classes)
        )
        means = self.online.means.to(place)
        cumulated = pair_probabilities(means).flatten().cumsum(dim=0)
        cells = torch.searchsorted(cumulated, chance * cumulated[-1], right=True).clamp(max=len(cumulated) - 1)
        pair = torch.stack([cells // len(means), cells % len(means)], dim=1)  # (count, 2)
        of_pair = of_classes.masked_fill(self.memory.labels != pair[:, :, None], -1.0).argmax(dim=2)
        closer = (torch.arange(count, device=place) >= base) & (cumulated[-1] > 0)
        own, other = of_pair[:, 0].where(closer, own), of_pair[:, 1].where(closer, other)
        mixes = (coin < self.mix_probability) & (means != 0).any() & (other != own)
        share = torch.where(mixes, confused.where(closer, share), 0.0)
        samples, partners = self.of_memory(batch, own, _MIX), self.of_memory(batch, other, _MIX)
        mine = samples.draw
        share = share[mine.start : mine.stop].to(self.device)
        pixels = torch.lerp(samples.raw.float(), partners.raw.float(), share[:, None, None, None]) / 255
        return samples.replace(extra={"share": share, "labels": partners.labels, "tasks": partners.tasks}), pixels

    def views(self, part: Batch, pixels: Tensor, copies: Rotations) -> tuple[Batch, Batch]:
        """Both views of all copies of the samples, which are equal in the field ``groups`` of ``extra`` for the rows of
        a class with the same rotation. Labels of rotated copies and of mixtures of two classes are hidden, -1.

        Args:
            part: The samples.
            pixels: Their images, uint8 or in [0, 1].
            copies: Number of copies.
        """
        draw, device = part.draw, part.labels.device
        places = torch.arange(draw.start, draw.stop)
        labels, columns = part.labels, self.network.head.num_columns
        if "share" in part.extra:
            single = (part.extra["share"] == 0) | (labels == part.extra["labels"])
            labels = labels.where(single, -1)
            classes = labels.where(single, columns + places.to(device, non_blocking=True))
        else:
            classes = labels
        whole = part.replace(
            raw=part.raw.repeat(copies, 1, 1, 1),
            labels=torch.cat([labels, torch.full_like(labels, -1).repeat(copies - 1)]),
            tasks=part.tasks.repeat(copies),
            indices=part.indices.repeat(copies),
            extra={"groups": (classes * copies + torch.arange(copies, device=device)[:, None]).flatten()},
            draw=Draw(draw.key, copies * draw.start, copies * draw.stop, copies * draw.total),
        )
        pixels = rotated_copies(pixels, copies)
        keys = (torch.arange(copies)[:, None] * draw.total + places).flatten()
        plain = self.data.finish(whole.replace(raw=pixels, draw=RowDraw.of_rows(keys, draw.key)))
        return plain.replace(raw=whole.raw, draw=whole.draw), self.at_random(whole, pixels, keys)

    def at_random(self, part: Batch, pixels: Tensor, keys: Tensor | None = None) -> Batch:
        """A random view of the samples.

        Args:
            part: The samples.
            pixels: Their images, uint8 or in [0, 1].
            keys: Key of the random numbers of each row, int64; None for the images that are classified.
        """
        salt = _CLASSIFY if keys is None else _VIEW
        keys = torch.arange(part.draw.start, part.draw.stop) if keys is None else keys
        draw = RowDraw.of_rows(keys, part.draw.key, salt)
        transform = self.transforms or random_view(*pixels.shape[-2:])
        seen = transform(pixels, draw, Context(indices=part.indices, epoch=self.epoch, seed=self.seed))
        return self.data.finish(part.replace(raw=seen, draw=draw)).replace(raw=part.raw, draw=part.draw)

    # ------------------------------------------------------------------ the loss

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        z = F.normalize(full_precision(self.projection(output.features)), dim=1)
        terms = {"ce": self.mixed_loss(batch, output)}
        features = F.normalize(full_precision(output.features), dim=1)
        for name in ("stream", "mixed"):
            if name in batch.parts:
                terms[f"{name}_instances"] = self.instance_loss(batch, name, z, features)
        for name in ("stream", "replay"):
            if name in batch.parts:
                terms[f"{name}_prototypes"] = self.prototype_loss(batch, name, z)
        return terms

    def instance_loss(self, batch: Batch, name: str, z: Tensor, features: Tensor) -> Tensor:
        """L_ins of a part; normalised features ``(B, d)``."""
        rows, factor = rows_of_all(batch)
        span = features.shape[1] - self.projection_size
        place = int(Draw.of(1, batch.draw.key, _PLACE, len(name)).randint(span + 1))
        vectors = Vectors(z, features[:, place : place + self.projection_size])
        views = batch.part(name, vectors).output, batch.part(f"random {name}", vectors).output
        return factor * instance_contrast(
            torch.cat([rows(view.embeddings) for view in views]),
            torch.cat([rows(view.features) for view in views]),
            rows(batch.parts[name][1].extra["groups"]).repeat(2),
            weight=1.0 if self.task.is_first else self.similarity_weight,
            temperature=self.temperature,
            of_memory=name == "mixed",
        )

    def prototype_loss(self, batch: Batch, name: str, z: Tensor) -> Tensor:
        """L_pro of a part, without rotated copies. Those of the memory are summed for the prototypes of the step."""
        rows, factor = rows_of_all(batch)
        samples, columns = batch.parts[name][1], self.network.head.num_columns
        size = len(samples) // (self.rotations if name == "stream" else 1)
        labels = samples.labels[:size]
        first, second = (batch.part(part, Vectors(z, z)).output.embeddings[:size] for part in (name, f"random {name}"))
        if name == "replay":
            self._sums = class_sums((first + second).detach() / 2, labels, columns)
        views = rows(first), rows(second)
        return factor * prototype_equilibrium(*views, rows(labels), columns, self.prototype_temperature)

    def mixed_loss(self, batch: Batch, output: Output) -> Tensor:
        """Cross-entropy of the images that are classified, with the labels of both partners of a mixture."""
        samples, of_part, share = batch.part("classify", output)
        if "share" not in samples.extra:
            return share * self.classification_loss(of_part, samples)
        other = samples.replace(labels=samples.extra["labels"], tasks=samples.extra["tasks"])
        loss = of_part.logits.new_zeros(())
        for labelled, part in ((samples, 1 - samples.extra["share"]), (other, samples.extra["share"])):
            weights = self.data.weights_of(labelled)
            weights = part if weights is None else weights * part
            loss = loss + cross_entropy(of_part.logits, labelled.labels, weights=weights)
        return share * loss

    def after_step(self, batch: Batch) -> None:
        super().after_step(batch)
        columns, size = self.network.head.num_columns, self.projection_size
        sums = torch.zeros(columns, size + 1, device=self.device) if self._sums is None else self._sums
        sums = all_sum(sums)
        self.online.means = sums[:, :-1] / sums[:, -1:].clamp(min=1)
        self._sums = None

    def bytes_kept(self) -> dict[str, int]:
        return {**super().bytes_kept(), "heads": sum(value.nbytes for value in self.projection.state_dict().values())}


def class_sums(rows: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Sum of the rows of each class, and in the last column their number, float32 ``(C, d + 1)``."""
    with torch.autocast(rows.device.type, enabled=False):
        return members_of(labels, num_classes).float().T @ F.pad(rows.float(), (0, 1), value=1.0)
