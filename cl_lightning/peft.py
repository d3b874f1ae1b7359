"""Parameter-efficient fine-tuning: small modules that are put into a model from outside, and taken out again.

A `Peft` is built for a model and hooks itself into it. The model's own modules, parameters and names of parameters stay
what they are; the ``Peft`` holds the new parameters, so its state dict is theirs alone. ``disabled()`` gives the model
as it was for a while, ``remove()`` for good, to the bit. ``merge()`` writes the change into the model's weights where
it is linear (LoRA, SSF, FiLM), and then there is nothing left to compute. Copying model and ``Peft`` together (as parts
of one module) gives a pair that is hooked up alike.

For a transformer of timm a block computes ``x' = x + Attn(LN1(x))``, ``y = x' + MLP(LN2(x'))``. Classes that need such
blocks say so; SSF, FiLM and LoRA go into any model by the kind and the names of its layers.
"""

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from cl_lightning.backbones import Backbone, ImageShape
from cl_lightning.teacher import frozen_copy

_NORMS = (nn.LayerNorm, nn.GroupNorm, _BatchNorm)


class Site(nn.Module):
    """What is put in at one place: its parameters, and what it does to what passes there.

    Hooks are bound methods, so that a copy of the model and its ``Peft`` has hooks of its own.
    """

    enabled: bool = True

    def __init__(self) -> None:
        super().__init__()
        self.handles: list[RemovableHandle] = []

    def hook_output(self, host: nn.Module, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Have a bound method of a site, ``function(input, output)``, replace the output of ``host``."""
        self.handles.append(host.register_forward_hook(_Output(self, function)))

    def hook_input(self, host: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        """Have a bound method of a site replace the first input of ``host``."""
        self.handles.append(host.register_forward_pre_hook(_Input(self, function)))


class _Output:
    def __init__(self, site: Site, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.site, self.function = site, function

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return self.function(args[0], output) if self.site.enabled else None


class _Input:
    def __init__(self, site: Site, function: Callable[[Tensor], Tensor]) -> None:
        self.site, self.function = site, function

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (self.function(args[0]), *args[1:]) if self.site.enabled else None


class Peft(nn.Module):
    """Base of all modules that are put into a model.

    Attributes:
        sites: One for each place.
        trains_model: Whether what is trained are the model's own parameters, and it puts nothing in.
    """

    trains_model: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.sites = nn.ModuleList()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model as it was before, inside a ``with`` block."""
        before = [site.enabled for site in self._sites()]
        self._enable(False)
        try:
            yield
        finally:
            for site, enabled in zip(self._sites(), before, strict=True):
                site.enabled = enabled

    def remove(self) -> None:
        """Leave the model, which then is what it was before."""
        for site in self._sites():
            for handle in site.handles:
                handle.remove()
            site.handles.clear()

    @torch.no_grad()
    def merge(self) -> None:
        """Write the change into the weights of the model and leave it.

        Raises:
            ValueError: If the change is not a linear one.
        """
        raise ValueError(f"{type(self).__name__}: what it does depends on the input, and cannot be merged into weights")

    def _enable(self, enabled: bool) -> None:
        for site in self._sites():
            site.enabled = enabled

    def _sites(self) -> Iterator[Site]:
        return (cast(Site, site) for site in self.sites)


PeftFactory = Callable[[nn.Module], Peft]


class WholeModel(Peft):
    """Puts nothing in: the model itself is what is trained.

    Args:
        model: The model.
    """

    trains_model: ClassVar[bool] = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()

    def merge(self) -> None:
        """Nothing has to be done."""


# ---------------------------------------------------------------------- finding places


def blocks_of(model: nn.Module, chosen: Sequence[int] | None, owner: str) -> list[nn.Module]:
    """Blocks of a transformer as timm builds it, in order.

    Args:
        model: Contains them, at any depth.
        chosen: Indices of some of them, negative ones from the end; None for all.
        owner: Who asks, for messages.

    Raises:
        ValueError: If there are none, or no such ones.
    """
    parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp")
    found = [module for module in model.modules() if all(_has(module, part) for part in parts)]
    if not found:
        raise ValueError(
            f"{owner}: {type(model).__name__} has no transformer blocks with {', '.join(parts)}; use a ViT of timm, or "
            "LoRA, SSF or FiLM, which go into other models too"
        )
    if chosen is None:
        return found
    if not chosen or any(not -len(found) <= index < len(found) for index in chosen):
        raise ValueError(f"{owner}: blocks {list(chosen)}; the model has blocks 0 to {len(found) - 1}")
    return [found[index] for index in sorted({index % len(found) for index in chosen})]


def layers_of(
    model: nn.Module, kinds: tuple[type[nn.Module], ...], targets: Sequence[str] | None, owner: str
) -> list[nn.Module]:
    """Layers of some kinds, in the order of their names in the model.

    Args:
        model: Contains them.
        kinds: Classes.
        targets: Patterns of names, such as ``*.attn.qkv``; None for all. A name counts from the model, and from a
            submodule ``model`` if there is one (as in ``Timm``).
        owner: Who asks, for messages.

    Raises:
        ValueError: If there are none, or a pattern finds none.
    """
    layers = [(name.removeprefix("model."), layer) for name, layer in model.named_modules() if isinstance(layer, kinds)]
    words = ", ".join(kind.__name__.strip("_") for kind in kinds)
    patterns = ["*"] if targets is None else targets
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name, _ in layers):
            names = ", ".join(name for name, _ in layers[:8]) or "none"
            raise ValueError(f"{owner}: no layer ({words}) of the model is called {pattern!r}; there are: {names}")
    return [layer for name, layer in layers if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def _has(module: nn.Module, path: str) -> bool:
    for name in path.split("."):
        if not isinstance(getattr(module, name, None), nn.Module):
            return False
        module = getattr(module, name)
    return True


def _part(module: nn.Module, path: str) -> nn.Module:
    return module.get_submodule(path)


def _width(block: nn.Module) -> int:
    return cast(nn.Linear, _part(block, "attn.qkv")).in_features


# ---------------------------------------------------------------------- LoRA


class _LowRank(Site):
    """``output + s B A x``, on some equal parts of the output of a linear layer."""

    def __init__(self, host: nn.Linear, rank: int, parts: list[bool], scale: float, learn_scale: bool) -> None:
        super().__init__()
        size, count = host.out_features // len(parts), sum(parts)
        self.parts, self.host = parts, (host,)  # in a tuple, so that it is no submodule
        self.down = nn.Parameter(torch.empty(count, rank, host.in_features))
        self.up = nn.Parameter(torch.zeros(count, size, rank))
        for matrix in self.down:
            nn.init.kaiming_uniform_(matrix, a=5**0.5)
        self.factor: Tensor
        if learn_scale:
            self.factor = nn.Parameter(torch.tensor(float(scale)))
        else:
            self.register_buffer("factor", torch.tensor(float(scale)), persistent=False)
        self.hook_output(host, self.add)

    def add(self, inputs: Tensor, output: Tensor) -> Tensor:
        maps = iter(zip(self.down, self.up, strict=True))
        pieces = list(output.chunk(len(self.parts), dim=-1))
        for number, chosen in enumerate(self.parts):
            if chosen:
                down, up = next(maps)
                change = self.factor * F.linear(F.linear(inputs, down), up)
                pieces[number] = pieces[number] + change.to(output.dtype)
        return torch.cat(pieces, dim=-1)

    def merge(self) -> None:
        weight = self.host[0].weight
        places = [number for number, chosen in enumerate(self.parts) if chosen]
        size = len(weight) // len(self.parts)
        for number, down, up in zip(places, self.down, self.up, strict=True):
            weight[number * size : (number + 1) * size] += self.factor * up @ down


class LoRA(Peft):
    """Low-rank change of linear layers (Hu et al., ICLR 2022, arXiv:2106.09685).

        y = (W + s B A) x + b,   A (r, d_in) from Kaiming's uniform distribution, B (d_out, r) = 0

    r -> rank, s -> scale (alpha / r in the paper). At the beginning nothing changes. ``parts`` names which of the
    thirds q, k and v of a fused layer change, each with matrices of its own (LAE: Gao et al., ICCV 2023,
    arXiv:2303.10070, has ``kv``, rank 5, a learnt scale and ``targets`` of the first five blocks).

    Args:
        model: Any model with linear layers.
        rank: r, at least 1.
        scale: s.
        learn_scale: Whether s is a parameter, one per layer.
        targets: Patterns of names of linear layers.
        parts: ``qkv`` or some letters of it, for layers with ``d_out = 3 d``; None for the whole output as one.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rank: int = 4,
        scale: float = 1.0,
        learn_scale: bool = False,
        targets: Sequence[str] = ("*.attn.qkv",),
        parts: str | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"LoRA: rank is {rank}; it must be at least 1")
        if parts is not None and (not parts or set(parts) - set("qkv")):
            raise ValueError(f"LoRA: parts is {parts!r}; give some of the letters qkv, or null for the whole output")
        places = [True] if parts is None else [letter in parts for letter in "qkv"]
        for host in layers_of(model, (nn.Linear,), targets, "LoRA"):
            assert isinstance(host, nn.Linear)
            if host.out_features % len(places):
                raise ValueError(f"LoRA: a layer of {host.out_features} outputs has no thirds; leave parts out")
            self.sites.append(_LowRank(host, rank, places, scale, learn_scale))

    @torch.no_grad()
    def merge(self) -> None:
        for site in self.sites:
            cast(_LowRank, site).merge()
        self.remove()


# ---------------------------------------------------------------------- adapters


class _Bottleneck(Site):
    """``s W_up Dropout(act(W_down x))``, 0 at the beginning."""

    def __init__(self, width: int, bottleneck: int, activation: str, scale: float, learn_scale: bool, p: float) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        nn.init.zeros_(self.down.bias)  # its weight is Kaiming's uniform, as nn.Linear makes it
        self.activation: nn.Module = nn.GELU() if activation == "gelu" else nn.ReLU()
        self.dropout = nn.Dropout(p)
        self.factor: Tensor
        if learn_scale:
            self.factor = nn.Parameter(torch.tensor(float(scale)))
        else:
            self.register_buffer("factor", torch.tensor(float(scale)), persistent=False)
        self._seen: list[Tensor] = []

    def change(self, inputs: Tensor) -> Tensor:
        change: Tensor = self.factor * self.up(self.dropout(self.activation(self.down(inputs))))
        return change

    def see(self, inputs: Tensor) -> Tensor:
        self._seen = [inputs]
        return inputs

    def add_of_seen(self, inputs: Tensor, output: Tensor) -> Tensor:
        change = self.change(self._seen.pop())
        return output + change.to(output.dtype)

    def add_of_input(self, inputs: Tensor, output: Tensor) -> Tensor:
        return output + self.change(inputs).to(output.dtype)

    def add_of_output(self, inputs: Tensor, output: Tensor) -> Tensor:
        return output + self.change(output).to(output.dtype)


class Adapter(Peft):
    """Bottlenecks in the blocks of a transformer.

        h(u) = s W_up Dropout(act(W_down u)),   W_down from Kaiming's uniform distribution, W_up = 0, biases 0
        parallel:    y = x' + MLP(LN2(x')) + h(x')       AdaptFormer (Chen et al., NeurIPS 2022, arXiv:2205.13535)
        attention:   x' = x + Attn(u) + h(u), u = LN1(x)  LAE (Gao et al., ICCV 2023, arXiv:2303.10070)
        sequential:  y = x' + m + h(m), m = MLP(LN2(x'))  Houlsby et al. (ICML 2019, arXiv:1902.00751), after the MLP

    s -> scale. At the beginning nothing changes. ``parallel`` takes x' as it is, before LN2, and adds to the output of
    the block, whatever layer scale or stochastic depth it has.

    Args:
        model: Contains the blocks of a ViT of timm.
        place: ``parallel``, ``attention`` or ``sequential``.
        bottleneck: Rows of W_down: 64 in APER and RanPAC, 16 in MOS, 5 in LAE.
        scale: s: 0.1 in APER and RanPAC, 1 in LAE.
        learn_scale: Whether s is a parameter, one per block.
        dropout: In the bottleneck, while it is trained.
        activation: ``relu``, or ``gelu``.
        blocks: Indices of blocks; None for all.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        place: Literal["parallel", "attention", "sequential"] = "parallel",
        bottleneck: int = 64,
        scale: float = 0.1,
        learn_scale: bool = False,
        dropout: float = 0.1,
        activation: Literal["relu", "gelu"] = "relu",
        blocks: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if place not in ("parallel", "attention", "sequential") or activation not in ("relu", "gelu"):
            raise ValueError(
                f"Adapter: place={place!r}, activation={activation!r}; use parallel, attention or sequential, relu or "
                "gelu"
            )
        if bottleneck < 1 or not 0 <= dropout < 1:
            raise ValueError(f"Adapter: bottleneck={bottleneck}, dropout={dropout}; at least 1, in [0, 1)")
        for block in blocks_of(model, blocks, "Adapter"):
            site = _Bottleneck(_width(block), bottleneck, activation, scale, learn_scale, dropout)
            if place == "parallel":
                site.hook_input(_part(block, "norm2"), site.see)
                site.hook_output(block, site.add_of_seen)
            elif place == "attention":
                site.hook_output(_part(block, "attn"), site.add_of_input)
            else:
                site.hook_output(_part(block, "mlp"), site.add_of_output)
            self.sites.append(site)


# ---------------------------------------------------------------------- SSF and FiLM


class _ScaleShift(Site):
    """``gamma * output + beta`` per channel."""

    def __init__(self, host: nn.Module, spread: float) -> None:
        super().__init__()
        self.host = (host,)  # in a tuple, so that it is no submodule
        channels = _channels(host)
        self.gamma = nn.Parameter(1 + spread * torch.randn(channels))
        self.beta = nn.Parameter(spread * torch.randn(channels))
        self.last = not isinstance(host, (nn.Conv2d, _BatchNorm, nn.GroupNorm)) and not type(host).__name__.endswith(
            "2d"
        )
        # timm's BatchNormAct2d applies its activation too; what comes before it is the output of its dropout.
        inner = getattr(host, "drop", None) if hasattr(host, "act") else None
        self.hook_output(inner if isinstance(inner, nn.Module) else host, self.scale)

    def scale(self, inputs: Tensor, output: Tensor) -> Tensor:
        shape = (-1,) if self.last else (-1, *[1] * (output.ndim - 2))
        return (output * self.gamma.view(shape) + self.beta.view(shape)).to(output.dtype)

    def merge(self) -> None:
        host = cast(Any, self.host[0])
        if host.weight is None:
            raise ValueError(f"{type(host).__name__} has no weights that a scale could be merged into")
        host.weight.mul_(self.gamma.view(-1, *[1] * (host.weight.ndim - 1)))
        if host.bias is None:
            host.bias = nn.Parameter(self.beta.detach().clone().to(host.weight))
        else:
            host.bias.mul_(self.gamma).add_(self.beta)


def _channels(layer: nn.Module) -> int:
    for name in ("out_features", "out_channels", "num_features", "num_channels"):
        if isinstance(size := getattr(layer, name, None), int):
            return size
    return cast(nn.LayerNorm, layer).normalized_shape[-1]


class SSF(Peft):
    """Scale and shift per channel after each layer (Lian et al., NeurIPS 2022, arXiv:2210.08823).

        y = gamma * x + beta,   gamma ~ N(1, spread^2), beta ~ N(0, spread^2)

    after each linear layer, convolution and normalisation: in a ViT after the patch embedding, LN1, the fused qkv, the
    projection of the attention, LN2, both layers of the MLP and the last norm. At the beginning it is close to the
    model as it was, and the same with ``spread=0``. Weight decay pulls gamma to 0: leave it out, or keep it small.

    Args:
        model: Any model.
        spread: Standard deviation at the beginning, at least 0.
        targets: Patterns of names of layers; None for all of these kinds.
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, nn.Conv2d, *_NORMS)

    def __init__(self, model: nn.Module, *, spread: float = 0.02, targets: Sequence[str] | None = None) -> None:
        super().__init__()
        if spread < 0:
            raise ValueError(f"{type(self).__name__}: spread is {spread}; it must be at least 0")
        for host in layers_of(model, self.kinds, targets, type(self).__name__):
            self.sites.append(_ScaleShift(host, spread))

    @torch.no_grad()
    def merge(self) -> None:
        for site in self.sites:
            cast(_ScaleShift, site).merge()
        self.remove()


class FiLM(SSF):
    """Scale and shift per channel after normalisation layers (Perez et al., AAAI 2018; Panos et al., ICCV 2023).

    As ``SSF``, with gamma = 1 and beta = 0 at the beginning, when nothing changes. In timm's layers that normalise and
    apply an activation, it comes between the two.

    Args:
        model: Any model with normalisation layers.
        targets: Patterns of their names; None for all. First Session Adaptation takes those of the stem, of the
            depthwise convolutions and of the last convolution.
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]] = _NORMS

    def __init__(self, model: nn.Module, *, targets: Sequence[str] | None = None) -> None:
        super().__init__(model, spread=0.0, targets=targets)


# ---------------------------------------------------------------------- prompts and prefixes


class PromptSite(Site):
    """Tokens that are appended to a sequence ``(B, N, d)`` and, where ``last`` is given, taken off after it.

    Attributes:
        tokens: Of all samples, ``(p, d)``, or of each, ``(B, p, d)``; a subclass or an owner sets them.
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
    """Tokens that are learnt."""

    def __init__(self, first: nn.Module, last: nn.Module, length: int, spread: float) -> None:
        super().__init__(first, last)
        self.tokens = nn.Parameter(spread * torch.randn(length, _width(first)))


class VPT(Peft):
    """Visual prompt tuning (Jia et al., ECCV 2022, arXiv:2203.12119): learnt tokens beside those of the image.

    ``deep``: each block gets tokens of its own, which are taken off after it. Shallow: tokens are appended before the
    first block and taken off after the last one. They stand at the end, so that the class token stays the first. Tokens
    of 0, as in the code of APER, still take part in the attention: the output is not that of the model as it was.

    Args:
        model: Contains the blocks of a ViT of timm.
        length: Number of tokens.
        deep: See above.
        spread: Standard deviation of the tokens at the beginning.
        blocks: Indices of blocks; None for all.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        length: int = 5,
        deep: bool = True,
        spread: float = 0.0,
        blocks: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if length < 1 or spread < 0:
            raise ValueError(f"VPT: length={length}, spread={spread}; at least 1, at least 0")
        chosen = blocks_of(model, blocks, "VPT")
        pairs = [(block, block) for block in chosen] if deep else [(chosen[0], chosen[-1])]
        for first, last in pairs:
            self.sites.append(_Prompt(first, last, length, spread))


class PrefixSite(Site):
    """Further keys and values of an attention layer.

    Rows are appended to its input, get the keys and values in the output of its ``qkv`` layer, and are taken off its
    output: their queries ask for nobody, and the others see them.

    Attributes:
        keys: Of all samples, ``(p, d)``, or of each, ``(B, p, d)``; a subclass or an owner sets them.
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

    def fill(self, inputs: Tensor, output: Tensor) -> Tensor:
        rows = torch.cat([torch.zeros_like(self.keys), self.keys, self.values], dim=-1).to(output.dtype)
        return torch.cat([output[:, : -rows.shape[-2]], rows.expand(len(output), -1, -1)], dim=1)

    def take_off(self, inputs: Tensor, output: Tensor) -> Tensor:
        return output[:, : -self.keys.shape[-2]]


class _Prefix(PrefixSite):
    """Keys and values that are learnt; ``compensate``: attention to them sums to 1 by itself."""

    def __init__(self, attention: nn.Module, length: int, low: float, high: float, compensate: bool) -> None:
        super().__init__(attention)
        qkv = cast(nn.Linear, _part(attention, "qkv"))
        self.keys, self.values = (
            nn.Parameter(torch.empty(length, qkv.out_features // 3).uniform_(low, high)) for _ in range(2)
        )
        self.compensate, self.host = compensate, (attention,)  # in a tuple, so that it is no submodule
        self._queries: list[Tensor] = []
        if compensate:
            self.hook_input(_part(attention, "proj"), self.add)

    def fill(self, inputs: Tensor, output: Tensor) -> Tensor:
        filled = super().fill(inputs, output)
        if not self.compensate:
            return filled
        queries, keys, values = filled.chunk(3, dim=-1)
        self._queries = [queries]
        own = -len(self.values)  # with values of 0 they take their share of the attention and add nothing
        return torch.cat([queries, keys, F.pad(values[:, :own], (0, 0, 0, -own))], dim=-1)

    def add(self, mixed: Tensor) -> Tensor:
        attention = cast(Any, self.host[0])

        def heads(rows: Tensor) -> Tensor:  # (B, heads, n, d / heads)
            return rows.view(*rows.shape[:2], attention.num_heads, -1).transpose(1, 2)

        # Copies for each sample: what counts operations takes no views of parameters where there are no gradients.
        queries = self._queries.pop()
        keys, values = (rows.to(mixed.dtype).repeat(len(queries), 1, 1) for rows in (self.keys, self.values))
        queries, keys = attention.q_norm(heads(queries.contiguous())), attention.k_norm(heads(keys))
        of_prefix = F.scaled_dot_product_attention(queries, keys, heads(values))
        return mixed + of_prefix.transpose(1, 2).flatten(2)


class Prefix(Peft):
    """Learnt keys and values beside those of the image (prefix tuning: Li & Liang, ACL 2021, arXiv:2101.00190).

        K' = [K; p_K],   V' = [V; p_V],   p ~ U(low, high),   queries as they are

    in each block (where they stand among the keys does not matter). It changes the output from the beginning. Of an
    attention that normalises its keys, p_K is normalised too. With ``compensate`` (LAE: Gao et al., ICCV 2023,
    arXiv:2303.10070) the attention a to the prefix, lambda in sum, is scaled to sum to 1, so that a small lambda does
    not slow learning down:

        output = sum_i a_i v_i + 1/lambda sum_p a_p p_V     i: tokens of the image, with 1 - lambda in sum

    Args:
        model: Contains the blocks of a ViT of timm.
        length: Number of keys, and of values.
        low: Least value at the beginning.
        high: Largest value at the beginning.
        blocks: Indices of blocks; None for all.
        compensate: See above; for attention without a gate or a norm of its output.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        length: int = 5,
        low: float = -1.0,
        high: float = 1.0,
        blocks: Sequence[int] | None = None,
        compensate: bool = False,
    ) -> None:
        super().__init__()
        if length < 1 or low > high:
            raise ValueError(f"Prefix: length={length}, low={low}, high={high}; at least 1, low at most high")
        for block in blocks_of(model, blocks, "Prefix"):
            self.sites.append(_Prefix(_part(block, "attn"), length, low, high, compensate))


# ---------------------------------------------------------------------- a backbone with one or two of them


class AdaptedBackbone(Backbone):
    """A backbone with a ``Peft`` in it; if asked to, its features stand beside those of the backbone as it was.

    Args:
        image_shape: Channels, height, width.
        backbone: Builds the backbone.
        peft: Builds what is put in.
        concatenate: Whether features become ``[original; adapted]`` once ``finish`` is called. Where the backbone
            itself is trained, a frozen copy is kept for that.

    Attributes:
        base: The backbone.
        peft: What is in it.
        original: The copy, or None.
        width: Number of features of the backbone.
    """

    finished: Tensor

    def __init__(
        self,
        image_shape: ImageShape,
        *,
        backbone: Callable[[ImageShape], Backbone],
        peft: PeftFactory,
        concatenate: bool = False,
    ) -> None:
        super().__init__(image_shape)
        self.base = backbone(image_shape)
        self.peft = peft(self.base)
        self.original = frozen_copy(self.base) if concatenate and self.peft.trains_model else None
        self.concatenate, self.width = concatenate, self.base.num_features
        self.num_features = 2 * self.width if concatenate else self.width
        self.register_buffer("finished", torch.zeros((), dtype=torch.bool))
        self._both = False  # concatenate and finished: asked at each forward pass, which a tensor would have wait

    def forward(self, images: Tensor) -> Tensor:
        adapted: Tensor = self.base(images)
        if not self._both:
            return adapted
        with torch.no_grad():
            if self.original is not None:
                return torch.cat([self.original(images), adapted], dim=1)
            with self.peft.disabled():
                return torch.cat([self.base(images), adapted], dim=1)

    def adapted_parameters(self) -> Iterable[nn.Parameter]:
        """Those that adaptation trains."""
        return (self.base if self.peft.trains_model else self.peft).parameters()

    def unadapted(self) -> Iterator[nn.Module]:
        """Modules that adaptation leaves as they are."""
        if not self.peft.trains_model:
            yield self.base
        if self.original is not None:
            yield self.original

    def finish(self) -> None:
        """Say that adaptation is over."""
        self.finished.fill_(True)
        self._both = self.concatenate

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self._both = self.concatenate and bool(state_dict.get(f"{prefix}finished", False))
        super()._load_from_state_dict(state_dict, prefix, *args)


class PeftPair(Backbone):
    """A frozen backbone with two sets of the same kind in it: one is trained, one follows it slowly.

    Args:
        image_shape: Channels, height, width.
        backbone: Builds the backbone.
        peft: Builds what is put in, twice.

    Attributes:
        base: The backbone.
        online: What is trained; on, except in ``offline_features``.
        offline: What follows.

    Raises:
        ValueError: If what is put in is the model itself.
    """

    def __init__(
        self, image_shape: ImageShape, *, backbone: Callable[[ImageShape], Backbone], peft: PeftFactory
    ) -> None:
        super().__init__(image_shape)
        self.base = backbone(image_shape)
        self.online, self.offline = peft(self.base), peft(self.base)
        if self.online.trains_model:
            raise ValueError(
                f"PeftPair: {type(self.online).__name__} trains the model itself, which cannot be there twice; use "
                "Adapter, LoRA, Prefix or SSF"
            )
        self.offline._enable(False)
        self.num_features = self.base.num_features

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.base(images)
        return features

    def offline_features(self, images: Tensor) -> Tensor:
        """Features ``(B, d)`` with the set that follows."""
        with self.online.disabled():
            self.offline._enable(True)
            try:
                features: Tensor = self.base(images)
            finally:
                self.offline._enable(False)
        return features

    def catch_up(self) -> None:
        """Make the one that follows equal to the other."""
        self.offline.load_state_dict(self.online.state_dict())

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """``offline <- momentum offline + (1 - momentum) online``, the same on every process."""
        own: list[Tensor] = list(self.offline.parameters())
        torch._foreach_lerp_(own, list[Tensor](self.online.parameters()), 1 - momentum)
