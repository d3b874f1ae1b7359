"""Tokens added to a transformer: prompts (VPT) and prefixes."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.checks import at_least
from cl_lightning.models.peft.base import Peft, Site, _part, _width, blocks_of


class PromptSite(Site):
    """Tokens that are appended to a sequence ``(B, N, d)`` before module ``first`` and removed after module ``last``.

    Without ``last`` the tokens are not removed.

    Attributes:
        tokens: Shared by all samples, ``(p, d)``, or per sample, ``(B, p, d)``; set by a subclass or an owner.
    """

    tokens: Tensor

    def __init__(self, first: nn.Module, last: nn.Module | None) -> None:
        super().__init__()
        self.hook_input(first, self.append)
        if last is not None:
            self.hook_output(last, self.take_off)

    def append(self, sequence: Tensor) -> Tensor:
        return torch.cat([sequence, self.tokens.to(sequence.dtype).expand(len(sequence), -1, -1)], dim=1)

    def take_off(self, inputs: Tensor, output: Tensor) -> Tensor:
        return output[:, : -self.tokens.shape[-2]]


class _Prompt(PromptSite):
    """Learnt tokens."""

    def __init__(self, first: nn.Module, last: nn.Module, length: int, spread: float) -> None:
        super().__init__(first, last)
        self.tokens = nn.Parameter(spread * torch.randn(length, _width(first)))


class VPT(Peft):
    """Visual prompt tuning: learnt tokens in the sequence of image tokens (Jia et al., ECCV 2022, arXiv:2203.12119).

    ``deep``: each block has its own tokens, which are removed after the block. Shallow: tokens are appended before the
    first block and removed after the last one. Tokens are appended at the end, so the class token stays first. Tokens
    that are 0, as in the code of APER, take part in the attention as well: the output of the model changes.

    Args:
        model: Contains the blocks of a ViT of timm.
        length: Number of tokens.
        deep: Whether each block has its own tokens.
        spread: Standard deviation of the initial tokens, at least 0.
        blocks: Indices of blocks; None for all.
        through: Whether the tokens of the last of ``blocks`` stay in the sequence until the last block of the model.

    Raises:
        ValueError: If an option is out of range or the model has no such blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        length: int = 5,
        deep: bool = True,
        spread: float = 0.0,
        blocks: Sequence[int] | None = None,
        through: bool = False,
    ) -> None:
        super().__init__()
        at_least(self, 1, length=length)
        at_least(self, 0, spread=spread)
        chosen = blocks_of(model, blocks, "VPT")
        pairs = [(block, block) for block in chosen] if deep else [(chosen[0], chosen[-1])]
        if through:
            pairs[-1] = (pairs[-1][0], blocks_of(model, None, "VPT")[-1])
        for first, last in pairs:
            self.sites.append(_Prompt(first, last, length, spread))


class PrefixSite(Site):
    """Additional keys and values of an attention layer.

    p rows are appended to the input of the layer, receive the keys and values in the output of its ``qkv`` layer, and
    are removed from its output. Their queries are 0 and their outputs are not used; all other rows attend to them.

    Attributes:
        keys: Shared by all samples, ``(p, d)``, or per sample, ``(B, p, d)``; set by a subclass or an owner.
        values: Likewise.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.hook_input(attention, self.append)
        self.hook_output(_part(attention, "qkv"), self.fill)
        self.hook_output(attention, self.take_off)

    def append(self, sequence: Tensor) -> Tensor:
        return F.pad(sequence, (0, 0, 0, self.keys.shape[-2]))

    def rows(self) -> tuple[Tensor, Tensor]:
        """Keys and values as they enter the attention."""
        return self.keys, self.values

    def fill(self, inputs: Tensor, output: Tensor) -> Tensor:
        keys, values = self.rows()
        rows = torch.cat([torch.zeros_like(keys), keys, values], dim=-1).to(output.dtype)
        return torch.cat([output[:, : -rows.shape[-2]], rows.expand(len(output), -1, -1)], dim=1)

    def take_off(self, inputs: Tensor, output: Tensor) -> Tensor:
        return output[:, : -self.keys.shape[-2]]


class _Prefix(PrefixSite):
    """Learnt keys and values; with ``compensate``, the attention to them is normalised to sum to 1."""

    def __init__(
        self, attention: nn.Module, length: int, low: float, high: float, compensate: bool, learn_scale: bool
    ) -> None:
        super().__init__(attention)
        qkv = cast(nn.Linear, _part(attention, "qkv"))
        self.keys, self.values = (
            nn.Parameter(torch.empty(length, qkv.out_features // 3).uniform_(low, high)) for _ in range(2)
        )
        self.scales = nn.Parameter(torch.ones(2)) if learn_scale else None  # of keys and of values
        self.compensate, self.host = compensate, (attention,)  # in a tuple, so that it is not a registered submodule
        self._queries: list[Tensor] = []
        if compensate:
            self.hook_input(_part(attention, "proj"), self.add)

    def rows(self) -> tuple[Tensor, Tensor]:
        if self.scales is None:
            return self.keys, self.values
        return self.scales[0] * self.keys, self.scales[1] * self.values

    def fill(self, inputs: Tensor, output: Tensor) -> Tensor:
        filled = super().fill(inputs, output)
        if not self.compensate:
            return filled
        queries, keys, values = filled.chunk(3, dim=-1)
        self._queries = [queries]
        own = -len(self.values)  # with values 0 they keep their share of the attention and contribute nothing
        return torch.cat([queries, keys, F.pad(values[:, :own], (0, 0, 0, -own))], dim=-1)

    def add(self, mixed: Tensor) -> Tensor:
        attention = cast(Any, self.host[0])

        def heads(rows: Tensor) -> Tensor:  # (B, heads, n, d / heads)
            return rows.view(*rows.shape[:2], attention.num_heads, -1).transpose(1, 2)

        # A copy per sample: without gradients, the FLOP counter does not support views of parameters.
        queries = self._queries.pop()
        keys, values = (rows.to(mixed.dtype).repeat(len(queries), 1, 1) for rows in self.rows())
        queries, keys = attention.q_norm(heads(queries.contiguous())), attention.k_norm(heads(keys))
        of_prefix = F.scaled_dot_product_attention(queries, keys, heads(values))
        return mixed + of_prefix.transpose(1, 2).flatten(2)


class Prefix(Peft):
    """Prefix tuning: learnt keys and values in each attention layer (Li & Liang, ACL 2021, arXiv:2101.00190).

        K' = [K; s_K p_K],   V' = [V; s_V p_V],   p ~ U(low, high),   queries unchanged

    The order of the keys has no effect. The output of the model changes from the beginning. In an attention layer that
    normalises its keys, p_K is normalised too. With ``compensate`` (LAE: Gao et al., ICCV 2023, arXiv:2303.10070) the
    attention a_p to the prefix, whose sum is lambda, is divided by lambda, so that a small lambda does not slow down
    learning:

        output = sum_i a_i v_i + 1/lambda sum_p a_p p_V     i: tokens of the image, whose attention sums to 1 - lambda

    LAE learns the scales s_K and s_V of each block, initially 1 (``learn_scale``), and draws p from U(0, 0.01).

    Args:
        model: Contains the blocks of a ViT of timm.
        length: Number of keys, and of values; or a number for each of ``blocks``, in their order.
        low: Lower bound of the uniform initialisation.
        high: Upper bound of the uniform initialisation.
        blocks: Indices of blocks; None for all.
        compensate: Whether to divide by lambda; for attention layers without a gate or a norm of their output.
        learn_scale: Whether s_K and s_V are parameters of each block; otherwise they are 1.

    Raises:
        ValueError: If an option is out of range or the model has no such blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        length: int | Sequence[int] = 5,
        low: float = -1.0,
        high: float = 1.0,
        blocks: Sequence[int] | None = None,
        compensate: bool = False,
        learn_scale: bool = False,
    ) -> None:
        super().__init__()
        if low > high:
            raise ValueError(f"Prefix: low is {low}; it must be at most high, which is {high}")
        chosen = blocks_of(model, blocks, "Prefix")
        lengths = [length] * len(chosen) if isinstance(length, int) else list(length)
        at_least(self, 1, length=min(lengths, default=0))
        if not isinstance(length, int):
            if blocks is None or not len(lengths) == len(blocks) == len(chosen):
                raise ValueError(
                    f"Prefix: length has {len(lengths)} numbers for blocks {None if blocks is None else list(blocks)}; "
                    "give one number for each of blocks, or one for all"
                )
            chosen = [blocks_of(model, [index], "Prefix")[0] for index in blocks]
        for block, size in zip(chosen, lengths, strict=True):
            self.sites.append(_Prefix(_part(block, "attn"), size, low, high, compensate, learn_scale))
