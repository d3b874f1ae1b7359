"""Continual Prototype Evolution, CoPE (De Lange & Tuytelaars, ICCV 2021, arXiv:2009.00919), for online streams.

Images are embedded as unit vectors x, a linear map of the features that is normalised, and the class of the nearest
prototype p_c is predicted. With B^c the samples of class c of the joint batch B of the stream and a class-balanced
memory, T the temperature, and q a prototype or another sample in its place,

    Pr(c | x; q) = exp(q x / T) / (exp(q x / T) + sum_{k != c} exp(p_k x / T))
    attract_i = -log mean_{q in {p_c} u B^c without i} Pr(c | x_i; q)                            for i in B^c
    repel_ij = -log( 1 - 1/2 (Pr(c | x_j; x_i) + Pr(c | x_j; p_c)) )                             for j not in B^c
    L = 1/|B| ( sum_i attract_i + sum_ij repel_ij )
    p_c <- normalise( m p_c + (1 - m) mean_{i in B^c} x_i )                                      after the step

T -> temperature, m -> momentum. All q are constants of the gradient. k runs over the classes of which a sample has
arrived; other classes are never predicted. Prototypes are random unit vectors at first. With several passes over a
batch of an online stream, prototypes move once, to the mean over all passes, samples of the memory included.
In the authors' code the x_i of repel_ij is no constant, and is repelled too; ``released=True`` does the same.
Departs from the paper: the memory is balanced by ``ClassBalanced``. With a single class so far the loss is 0, where the
authors' code divides 0 by 0.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import Batch
from cl_lightning.checks import above, at_least, within
from cl_lightning.distributed import all_gather_rows, all_sum, gather_rows, world_size
from cl_lightning.losses import classes_present, full_precision
from cl_lightning.memory import ClassBalanced, GrowingBuffers, Policy
from cl_lightning.models import Head
from cl_lightning.models.heads import FixedBlock
from cl_lightning.strategy import Output, Replay, Traits

_NONE = -1e4  # in place of the logit of a class without samples; not infinite, whose gradient would be nan


def pseudo_prototypical(
    embeddings: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    known: Tensor,
    temperature: float = 0.1,
    *,
    released: bool = False,
) -> Tensor:
    """Pseudo-prototypical proxy loss L of a batch, in nats, a sum over pairs divided by the number of samples.

    Args:
        embeddings: x, unit vectors, ``(B, d)``, at least one row.
        labels: Columns, int64 ``(B,)``.
        prototypes: p, unit vectors, ``(C, d)``.
        known: Classes that count, bool ``(C,)``; the classes of the batch are among them.
        temperature: T, above 0.
        released: Whether q has a gradient in the second sum, as in the authors' code.
    """
    x = full_precision(embeddings)
    same = labels[:, None] == labels
    with torch.autocast(x.device.type, enabled=False):
        samples = x @ x.detach().T / temperature  # (B, B): x_i of the row, q of the column
        if released:
            samples = torch.where(same, samples, x @ x.T / temperature)
        proxies = x @ prototypes.detach().to(x.dtype).T / temperature  # (B, C)
    proxies = proxies.masked_fill(~known, _NONE)
    columns = torch.arange(len(prototypes), device=x.device)
    own = labels[:, None] == columns  # (B, C)
    # Log of the sum over the other classes, for the class of each q: d_ij of row i and the class of q = x_j.
    others = proxies[:, None, :].masked_fill(own, _NONE).logsumexp(dim=2)  # (B, B)
    by_sample = samples - others  # logit of Pr(y_j | x_i; x_j)
    by_proxy = proxies[:, labels] - others  # logit of Pr(y_j | x_i; p_{y_j})
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)

    positive = F.logsigmoid(by_sample).masked_fill(~same | itself, -torch.inf)
    positive = torch.cat([positive, F.logsigmoid(by_proxy.diagonal())[:, None]], dim=1)
    attract = same.sum(dim=1).to(x.dtype).log() - positive.logsumexp(dim=1)
    repel = math.log(2) - torch.logaddexp(F.logsigmoid(-by_sample), F.logsigmoid(-by_proxy))
    return (attract.sum() + repel.masked_fill(same, 0.0).sum()) / len(x)


class _Pool(GrowingBuffers):
    """Sum and number of the embeddings of each class since the prototypes moved, and which classes have arrived."""

    sums: Tensor
    counts: Tensor
    known: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(0, dim))
        self.register_buffer("counts", torch.zeros(0))
        self.register_buffer("known", torch.zeros(0, dtype=torch.bool))

    def grow(self, num_new: int) -> None:
        for name, buffer in list(self.named_buffers(recurse=False)):
            self.register_buffer(name, torch.cat([buffer, buffer.new_zeros(num_new, *buffer.shape[1:])]))


class PrototypeSpace(Head):
    """A linear map to unit vectors, and a prototype of each class, which is not trained but moves to the mean.

    Args:
        num_features: Size of a feature vector, d.
        dim: Size of an embedding, at least 1.
    """

    def __init__(self, num_features: int, *, dim: int = 100) -> None:
        super().__init__(num_features)
        at_least(self, 1, dim=dim)
        self.dim = dim
        self.projection = nn.Linear(num_features, dim)
        self.pool = _Pool(dim)

    def new_block(self, num_new: int) -> nn.Module:
        block = FixedBlock(self.dim, num_new)
        block.weight.copy_(F.normalize(torch.randn(num_new, self.dim), dim=1))
        return block

    def grow(self, num_new: int) -> None:
        super().grow(num_new)
        self.pool.grow(num_new)

    def embed(self, features: Tensor) -> Tensor:
        """Unit vectors, ``(B, dim)``, of features ``(B, d)``."""
        return F.normalize(full_precision(self.projection(features)), dim=1)

    def forward(self, features: Tensor) -> Tensor:
        """Cosines to the prototypes, ``(B, columns)``; -inf for classes of which no sample has arrived."""
        if not self.blocks:
            return features.new_zeros(len(features), 0)
        return F.linear(self.embed(features), self.weight()).masked_fill(~self.pool.known, -torch.inf)

    @torch.no_grad()
    def observe(self, embeddings: Tensor, labels: Tensor) -> None:
        """Pool embeddings for the next move. Every process must call this.

        Args:
            embeddings: This process's share, ``(n, dim)``; n may be 0.
            labels: Columns, int64 ``(n,)``.
        """
        one_hot = (labels[:, None] == torch.arange(self.num_columns, device=labels.device)).to(self.pool.sums.dtype)
        found = one_hot.T @ torch.cat([embeddings.to(one_hot.dtype), torch.ones_like(one_hot[:, :1])], dim=1)
        all_sum(found)
        self.pool.sums += found[:, :-1]
        self.pool.counts += found[:, -1]

    @torch.no_grad()
    def move(self, momentum: float) -> None:
        """Move the prototypes towards the mean of what was pooled; prototypes of other classes stay, to the bit.

        Args:
            momentum: m, in [0, 1].
        """
        present = (self.pool.counts > 0)[:, None]
        old = self.weight()
        means = self.pool.sums / self.pool.counts.clamp(min=1)[:, None]
        new = torch.where(present, F.normalize(momentum * old + (1 - momentum) * means, dim=1), old)
        torch._foreach_copy_(self._weights(), list(torch.split(new, self.block_sizes())))
        self.pool.sums.zero_()
        self.pool.counts.zero_()


class CoPE(Replay):
    """Prototypes that follow the embeddings of a batch and a memory, and a loss that holds samples to them.

    Args:
        memory_size: M, in samples, over all processes; with 0 only the stream is trained on.
        temperature: T, above 0.
        momentum: m, in [0, 1]; 1 leaves the prototypes where they are.
        dim: Size of an embedding, at least 1.
        released: Whether samples in the place of a prototype are repelled too, as in the authors' code.
        policy: Policy that decides which samples a full memory keeps; None for equal numbers of each class.
        kwargs: Options of ``Replay``, apart from ``head``.
    """

    traits = Traits(
        family="online",
        paper="De Lange & Tuytelaars, ICCV 2021, arXiv:2009.00919",
        keeps_exemplars=True,
        task_free=True,
    )

    def __init__(
        self,
        *,
        memory_size: int = 1000,
        temperature: float = 0.1,
        momentum: float = 0.99,
        dim: int = 100,
        released: bool = False,
        policy: Policy | None = None,
        **kwargs: Any,
    ) -> None:
        above(self, 0, temperature=temperature)
        within(self, "[0, 1]", momentum=momentum)
        at_least(self, 1, dim=dim)
        if kwargs.pop("head", None) is not None:
            raise ValueError("CoPE: remove head: the head has an embedding and a prototype of each class")
        super().__init__(
            memory_size=memory_size,
            policy=policy or ClassBalanced(),
            head=partial(PrototypeSpace, dim=dim),
            **kwargs,
        )
        if self.loss_classes != "all":
            raise ValueError(
                f"CoPE: loss_classes is {self.loss_classes!r}, but the loss is over all classes so far; use 'all'"
            )
        self.temperature, self.momentum, self.released = temperature, momentum, released
        self._embedded: tuple[Tensor, Tensor] | None = None  # of this process, in the present step

    @property
    def space(self) -> PrototypeSpace:
        head = self.network.head
        assert isinstance(head, PrototypeSpace)
        return head

    def prepare_batch(self, batch: Batch) -> Batch:
        joint = super().prepare_batch(batch)
        # Here, not in `losses`, which is not called on a process without rows.
        self.space.pool.known |= classes_present(joint.labels, self.space.num_columns)
        return joint

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        space = self.space
        x, labels = space.embed(output.features), batch.labels
        self._embedded = x.detach(), labels
        share = 1.0
        if batch.draw.total >= world_size():  # a process without rows takes no part in an exchange
            x, labels = gather_rows(x), all_gather_rows(labels)
            share = batch.weight  # the base class multiplies by the weight
        loss = pseudo_prototypical(
            x, labels, space.weight(), space.pool.known, self.temperature, released=self.released
        )
        return {"ppp": loss / share}

    def after_step(self, batch: Batch) -> None:
        space, nothing = self.space, torch.zeros(0, self.space.dim, device=self.device)
        space.observe(*(self._embedded or (nothing, batch.labels[:0])))
        self._embedded = None
        if self.data.module.stream.passes == 1 or batch.last_pass:
            space.move(self.momentum)
        super().after_step(batch)
