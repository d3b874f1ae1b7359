"""Prompts that depend on the image, inserted into a frozen transformer of timm from outside.

    q(x) = f(x)                   query: features of the model without prompts, without gradient
    z(x) = f(x; prompts(q(x)))    features with the prompts of the query

Each image therefore passes through the model twice. A `Prompts` computes prompts from queries: it is a ``Peft`` whose
sites receive other tokens at each pass. ``PromptedBackbone`` combines the backbone and its prompts.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import ImageShape
from cl_lightning.checks import at_least, one_of, within
from cl_lightning.losses import full_precision
from cl_lightning.models.backbones import Backbone
from cl_lightning.models.growing import GrowingParameters
from cl_lightning.models.peft.base import Peft, blocks_of
from cl_lightning.models.peft.tokens import PrefixSite, PromptSite


class Prompts(Peft):
    """Base class of prompts computed from queries; a subclass owns the parameters, its sites have none.

    Outside of ``answering`` there are no prompts, and the model computes its original function.
    """

    @abstractmethod
    def answer(self, query: Tensor) -> None:
        """Set the prompts of the sites from queries ``(B, d)``."""

    @abstractmethod
    def forget(self) -> None:
        """Remove the prompts from the sites."""

    def settled(self) -> Iterator[nn.Parameter]:
        """Parameters of earlier tasks, which are used but not trained any more."""
        return iter(())

    @contextmanager
    def answering(self, query: Tensor) -> Iterator[None]:
        """Context manager: inside, the model uses the prompts of queries ``(B, d)``."""
        self.answer(query)
        self._enable(True)
        try:
            yield
        finally:
            self._enable(False)
            self.forget()


class PromptedBackbone(Backbone):
    """A frozen backbone with prompts computed from its own features of the image.

    Args:
        image_shape: Channels, height, width.
        backbone: Builds the backbone.
        prompts: Builds the prompts for a backbone.

    Attributes:
        base: The backbone.
        prompts: The prompts inserted into it.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        *,
        backbone: Callable[[ImageShape], Backbone],
        prompts: Callable[[nn.Module], Prompts],
    ) -> None:
        super().__init__(image_shape)
        self.base = backbone(image_shape)
        self.prompts = prompts(self.base)
        self.num_features = self.base.num_features
        self._ahead: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def query(self, images: Tensor) -> Tensor:
        """Features ``(B, d)`` of the backbone without prompts, float32 or float64."""
        return full_precision(self.base(images))

    def look_ahead(self, images: Tensor) -> Tensor:
        """Query ``(B, d)`` for a step that needs it before its forward pass.

        The next ``forward`` reuses it if it gets the same images object.
        """
        query = self.query(images)
        self._ahead = (images, query)
        return query

    def forward(self, images: Tensor) -> Tensor:
        ahead, self._ahead = self._ahead, None
        query = ahead[1] if ahead is not None and ahead[0] is images else self.query(images)
        with self.prompts.answering(query):
            features: Tensor = self.base(images)
        return features


class KeyedPrompts(Prompts):
    """Base class of prompts with learnt keys, which are compared with the queries.

    Attributes:
        choice: Ids that the samples of the next pass use instead of their own selection; None for own selection.
    """

    def __init__(self) -> None:
        super().__init__()
        self.choice: Tensor | None = None
        self._matched: Tensor | None = None

    @abstractmethod
    def key_rows(self) -> Tensor:
        """Keys ``(M, d)``."""

    def similarity(self, query: Tensor) -> Tensor:
        """Cosine similarities ``(B, M)`` of queries ``(B, d)`` and keys."""
        with torch.autocast(query.device.type, enabled=False):
            return F.normalize(query, dim=1) @ F.normalize(self.key_rows(), dim=1).T

    def take_matched(self) -> Tensor:
        """``1/B sum_i sum_{m in S_i} cos(q_i, k_m)`` of the last training pass, a scalar; call it once per pass."""
        assert self._matched is not None
        matched, self._matched = self._matched, None
        return matched

    def forget(self) -> None:
        self.choice = None


def most_frequent(counts: Tensor, size: int) -> Tensor:
    """Indices ``(size,)`` of the largest counts ``(M,)``; ties go to the smaller index."""
    return counts.argsort(descending=True, stable=True)[:size]


class _PoolSite(PromptSite):
    """Tokens appended to the image tokens; with a norm, their mean replaces all tokens after it (``readout``)."""

    def __init__(self, first: nn.Module, last: nn.Module, norm: nn.Module | None) -> None:
        super().__init__(first, last if norm is None else None)
        if norm is not None:
            self.hook_output(norm, self.mean)

    def mean(self, inputs: Tensor, output: Tensor) -> Tensor:
        length = self.tokens.shape[-2]
        # Replaces every token, so that it is the output of the model whether it reads the class token or a mean.
        return output[:, -length:].mean(dim=1, keepdim=True).expand(-1, output.shape[1] - length, -1)


class PromptPool(KeyedPrompts):
    """Prompt pool with learnable keys; each query selects the nearest (L2P: Wang et al., CVPR 2022, arXiv:2112.08654).

        S(q) = the N keys k_m with the largest cos(q, k_m);   tokens [P_m : m in S] are appended to the image tokens

    Prompts are appended after the position embedding is added, so their position in the sequence has no effect.

    Args:
        model: Contains the blocks of a ViT of timm.
        size: M, number of prompts.
        length: L, tokens per prompt.
        top_k: N, number of selected prompts, in 1 .. M.
        readout: ``prompt``: features are the mean of the prompt tokens after the last norm; ``token``: the model's own
            readout, usually the class token.
        low: Lower bound of the uniform initialisation of prompts and keys.
        high: Upper bound of the uniform initialisation.

    Attributes:
        prompts: P, ``(M, L, d)``.
        keys: k, ``(M, d)``.
        choice: Ids ``(N,)`` that all samples of the next pass use; None for own selection.
        selections: Number of samples that selected each prompt in training passes, of this process, int64 ``(M,)``.

    Raises:
        ValueError: If an option is out of range, or the model has no such blocks or no norm after them.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        size: int = 10,
        length: int = 10,
        top_k: int = 4,
        readout: Literal["prompt", "token"] = "prompt",
        low: float = 0.0,
        high: float = 0.01,
    ) -> None:
        super().__init__()
        at_least(self, 1, size=size, length=length)
        within(self, f"[1, {size}]", top_k=top_k)
        one_of(self, ("prompt", "token"), readout=readout)
        if low > high:
            raise ValueError(f"PromptPool: low is {low}; it must be at most high, which is {high}")
        blocks = blocks_of(model, None, "PromptPool")
        width = cast(nn.LayerNorm, blocks[0].norm1).normalized_shape[-1]
        self.prompts = nn.Parameter(torch.empty(size, length, width).uniform_(low, high))
        self.keys = nn.Parameter(torch.empty(size, width).uniform_(low, high))
        self.register_buffer("selections", torch.zeros(size, dtype=torch.int64), persistent=False)
        self.selections: Tensor
        self.top_k = top_k
        norm = _last_norm(model, blocks[-1]) if readout == "prompt" else None
        self.sites.append(_PoolSite(blocks[0], blocks[-1], norm))
        self._enable(False)

    def key_rows(self) -> Tensor:
        return self.keys

    def select(self, query: Tensor) -> Tensor:
        """Ids ``(B, N)`` of the nearest keys of queries ``(B, d)``."""
        return self.similarity(query).topk(self.top_k, dim=1).indices

    def votes(self, query: Tensor) -> Tensor:
        """Number of queries ``(B, d)`` that select each prompt, int64 ``(M,)``."""
        return self._counts(self.select(query))

    def _counts(self, ids: Tensor) -> Tensor:
        """Number of occurrences of each prompt in ids, int64 ``(M,)``; bincount would wait for the GPU."""
        return torch.zeros_like(self.selections).index_add_(0, ids.flatten(), torch.ones_like(ids).flatten())

    def answer(self, query: Tensor) -> None:
        similarity = self.similarity(query)
        if self.choice is not None:
            ids, near = self.choice, similarity[:, self.choice]
        else:
            near, ids = similarity.topk(self.top_k, dim=1)
        trains = self.training and torch.is_grad_enabled()
        self._matched = near.sum(dim=1).mean() if trains else None
        if trains:
            self.selections += self._counts(ids.expand(len(query), -1))
        cast(PromptSite, self.sites[0]).tokens = self.prompts[ids].flatten(-3, -2)  # (N L, d) or (B, N L, d)

    def forget(self) -> None:
        super().forget()
        cast(PromptSite, self.sites[0]).tokens = torch.empty(0)


def _last_norm(model: nn.Module, last: nn.Module) -> nn.Module:
    for module in model.modules():
        blocks, norm = getattr(module, "blocks", None), getattr(module, "norm", None)
        if isinstance(blocks, nn.Module) and isinstance(norm, nn.Module) and any(b is last for b in blocks.children()):
            return norm
    raise ValueError(
        f"PromptPool: {type(model).__name__} has no norm after its blocks; use a ViT of timm with one, or readout token"
    )


@torch.no_grad()
def orthonormal_rows(old: Tensor, count: int) -> Tensor:
    """Random rows of norm 1, orthogonal to each other and to the old rows, drawn from torch's global generator.

    If the space has no dimensions left, the remaining rows are random rows of norm 1.

    Args:
        old: ``(n, d)``, any rows.
        count: Number of new rows.

    Returns:
        ``(count, d)``, float32.
    """
    d = old.shape[1]
    rows = torch.randn(count, d, dtype=torch.float64)
    room = max(d - len(old), 0)
    basis = old.double().cpu().T if room else rows.new_zeros(d, 0)
    for number in range(min(count, room)):
        known = torch.linalg.qr(torch.cat([basis, rows[:number].T], dim=1)).Q
        for _ in range(2):  # twice, to remove the rounding error of the first projection
            rows[number] -= known @ (known.T @ rows[number])
        rows[number] /= rows[number].norm()
    return F.normalize(rows, dim=1).float()


def orthogonality(rows: Tensor) -> Tensor:
    """Deviation of rows ``(f, d)`` from orthonormal ones: mean squared entry of ``R R^T - I``, a scalar."""
    with torch.autocast(rows.device.type, enabled=False):
        return (rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)).square().mean()


def component_weights(query: Tensor, attention: Tensor, keys: Tensor) -> Tensor:
    """``alpha_m = cos(q * A_m, K_m)`` of queries ``(B, d)``, attention vectors and keys ``(f, d)``: ``(B, f)``."""
    with torch.autocast(query.device.type, enabled=False):
        length = (query.square() @ attention.square().T).sqrt().clamp(min=1e-12)
        return query @ (attention * F.normalize(keys, dim=1)).T / length


class DecomposedPrompts(Prompts):
    """Prefixes that are weighted sums of learnt components (CODA-Prompt: Smith et al., CVPR 2023, arXiv:2211.13218).

        p(q) = sum_m alpha_m P_m,   alpha_m = cos(q * A_m, K_m)       in each of the chosen blocks
        K' = [K; first half of p],   V' = [V; second half of p]

    Components are stored in groups, one per task, so that old groups can be frozen.

    Args:
        model: Contains the blocks of a ViT of timm.
        length: L, even: L/2 keys and L/2 values.
        blocks: Indices of the blocks with prefixes.

    Attributes:
        prompts: P, for each group ``(blocks, n, L, d)``.
        keys: K, for each group ``(blocks, n, d)``.
        attention: A, for each group ``(blocks, n, d)``.

    Raises:
        ValueError: If the length is not even, or the model has no such blocks.
    """

    def __init__(self, model: nn.Module, *, length: int = 8, blocks: Sequence[int] = (0, 1, 2, 3, 4)) -> None:
        super().__init__()
        if length < 2 or length % 2:
            raise ValueError(f"DecomposedPrompts: length is {length}; it must be even (half keys, half values)")
        chosen = blocks_of(model, blocks, "DecomposedPrompts")
        self.length, self.width = length, cast(nn.LayerNorm, chosen[0].norm1).normalized_shape[-1]
        self.prompts, self.keys, self.attention = (GrowingParameters() for _ in range(3))
        self.sites.extend(PrefixSite(cast(nn.Module, block.attn)) for block in chosen)
        self._enable(False)

    def grow(self, count: int) -> None:
        """Add a group of ``count`` components of norm 1, orthogonal to the earlier components (Gram-Schmidt)."""
        for group, shape in self._groups():
            size = int(torch.Size(shape).numel())
            layers = [
                orthonormal_rows(torch.cat([torch.zeros(0, size), *(p[i].flatten(1).cpu() for p in group)]), count)
                for i in range(len(self.sites))
            ]
            group.append(torch.stack(layers).view(len(layers), count, *shape))

    def settled(self) -> Iterator[nn.Parameter]:
        return (parameter for group, _ in self._groups() for parameter in list(group)[:-1])

    def penalty(self) -> Tensor:
        """Sum over the blocks of ``orthogonality`` of K, A and P, a scalar."""
        terms = [orthogonality(rows[i].flatten(1)) for rows in self._all() for i in range(len(self.sites))]
        return torch.stack(terms).sum()

    def answer(self, query: Tensor) -> None:
        half = self.length // 2
        for site, prompts, keys, attention in zip(self.sites, *self._all(), strict=True):
            weights = component_weights(query, attention, keys)
            with torch.autocast(query.device.type, enabled=False):
                prefix = torch.einsum("bm,mld->bld", weights, prompts)  # (B, L, d)
            place = cast(PrefixSite, site)
            place.keys, place.values = prefix[:, :half], prefix[:, half:]

    def forget(self) -> None:
        for site in self.sites:
            place = cast(PrefixSite, site)
            place.keys = place.values = torch.empty(0)

    def _groups(self) -> Iterator[tuple[GrowingParameters, tuple[int, ...]]]:
        yield self.prompts, (self.length, self.width)
        yield self.keys, (self.width,)
        yield self.attention, (self.width,)

    def _all(self) -> list[Tensor]:
        """P, K and A with all groups concatenated, ``(blocks, f, ...)``."""
        return [torch.cat(list(group), dim=1) for group, _ in self._groups()]
