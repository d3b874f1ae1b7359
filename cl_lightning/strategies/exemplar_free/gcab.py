"""Gated Class-Attention and Cascaded Feature Drift Compensation (Cotogni, Yang, Cusano, Bagdanov & van de Weijer,
IJCV 2025, arXiv:2211.12292).

A transformer is trained from scratch. Its self-attention blocks S, shared by all tasks, turn an image into patch
features; one class-attention block C reads them for each task c with the class token, the gates and the head of c:

    z_c(x) = head_c(C(token_c, F_c(x); g_c)),   all z_c concatenated,   F_c = S(x) in training
    g_c = sigmoid(s e_c),   one gate u over the d units and one gate v over the hidden units of the MLP

With N = LayerNorm, the gates multiply in C the inputs and the outputs of all linear maps:

    x = u * N([token, patches]),   q = u * W_q x_token,   k = u * W_k x,   value = W_v x
    token <- token + u * W_o (u * attention(q, k, value)),   token <- token + u * W_2 (v * gelu(W_1 (u * N(token))))

Gates of earlier tasks are rounded to 0 or 1. In task t, with M the units that a task before t uses, S' the blocks S
before the task, and P_t a projector (linear map, LayerNorm over the whole map, ReLU, linear map) from the new features
to the old ones,

    L = mean BCE over all classes + gate_weight * R(g_t) + drift_weight * || S'(X) - P_t(S(X)) ||_2
    R = sum_i g_i (1 - M_i) / sum_i (1 - M_i),   M <- max(M, [sigmoid(s_max e_t) > 0.5]) at the end of a task

The norm is of the differences of the whole batch as one vector. Weights of C between two units of M do not move. Within
an epoch of n batches, s = 1/s_max + (s_max - 1/s_max) b/n in batch b = 0 .. n - 1; gradients of e are made equal to
gradients at the largest scale (HAT, arXiv:1801.01423), and e stays in [-6, 6].
Predictions use s_max, and the cascade F_c = P_{c+1} ( ... P_t(S(x))), which returns to the features that task c had.
From the second task on, the LayerNorms of S and C and of the new head are frozen.
s_max -> scale. Embeddings start from N(0, 1), as in HAT.
Departs from the paper: weights that are held are restored after each step, since weight decay and the moments of AdamW
move weights whose gradient is 0.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from cl_lightning.batch import ImageShape
from cl_lightning.checks import above, at_least, within
from cl_lightning.losses import binary_cross_entropy, feature_norm_distillation, lwf_mc_targets
from cl_lightning.memory import Held, PastMasks, Teacher
from cl_lightning.models import (
    Backbone,
    Head,
    Network,
    clamp_embeddings,
    compensate_scale,
    newly_used,
    risen_scale,
)
from cl_lightning.strategies.base import AddsLosses
from cl_lightning.strategy import BackboneFactory, Batch, ContinualStrategy, Output, Phase, Task, Traits

INPUTS = {"q": 0, "k": 0, "v": 0, "proj": 0, "fc1": 0, "fc2": 1}
"""The gate on the inputs of each linear map of the class attention: 0 is u, 1 is v."""
OUTPUTS = {"q": 0, "k": 0, "v": 0, "proj": 0, "fc1": 1, "fc2": 0}
"""The gate on the outputs of each linear map."""


class ClassAttention(nn.Module):
    """Block in which a class token attends to itself and to the patches, between gates.

    Args:
        dim: Size of a token, d.
        heads: Number of attention heads, a divisor of ``dim``.
        hidden: Hidden units of the MLP.
        drop_path_rate: Probability with which a branch is skipped in training, in [0, 1).
    """

    def __init__(self, dim: int, heads: int, hidden: int, *, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.heads, self.drop_path = heads, StochasticDepth(drop_path_rate, mode="row")
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.proj = nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, token: Tensor, patches: Tensor, units: Tensor, hidden: Tensor) -> Tensor:
        """The class token after the block, ``(B, d)``.

        Args:
            token: ``(1, 1, d)``.
            patches: ``(B, N, d)``.
            units: u, ``(d,)``.
            hidden: v, ``(hidden,)``.
        """
        token = token.expand(len(patches), 1, -1)
        inputs = self.norm1(torch.cat([token, patches], dim=1)) * units
        parts = (self.q(inputs[:, :1]) * units, self.k(inputs) * units, self.v(inputs))
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)  # (B, heads, tokens, d/heads)
        read = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        token = token + self.drop_path(self.proj(read * units) * units)
        inner = F.gelu(self.fc1(self.norm2(token) * units)) * hidden
        result: Tensor = (token + self.drop_path(self.fc2(inner) * units)).squeeze(1)
        return result

    def trained(self, past: Sequence[Tensor]) -> dict[str, Tensor]:
        """Masks of the weights that may move, bool, by parameter name: all but those between two used units.

        Args:
            past: M of u and of v, 0 or 1.
        """
        used, masks = [mask > 0.5 for mask in past], {}
        for name, place in OUTPUTS.items():
            masks[f"{name}.weight"] = ~(used[place][:, None] & used[INPUTS[name]])
            if getattr(self, name).bias is not None:
                masks[f"{name}.bias"] = ~used[place]
        return masks


class Projector(nn.Module):
    """Map from patch features ``(B, N, d)`` to the features of the same images before a task.

    Args:
        patches: Number of patches, N.
        dim: Size of a patch feature, d.
    """

    def __init__(self, patches: int, dim: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm = nn.LayerNorm((patches, dim))

    def forward(self, features: Tensor) -> Tensor:
        projected: Tensor = self.outer(self.norm(self.inner(features)).relu())
        return projected


class GatedClassAttention(Backbone):
    """Transformer with a gated class-attention block, to the class tokens of all tasks, ``(B, tasks * dim)``.

    The self-attention blocks are blocks of ConViT (d'Ascoli et al., ICML 2021, arXiv:2103.10697), as timm has them.
    In training mode the newest gates are soft and all tokens attend to the same patch features; in eval mode gates have
    the largest scale, and patch features are projected back to each earlier task.

    Args:
        image_shape: Channels, height, width; the sides are multiples of ``patch_size``.
        dim: Size of a token, d.
        heads: Number of attention heads, a divisor of ``dim``.
        depth: Number of self-attention blocks.
        local: Number of first blocks whose heads also attend by position (gated positional self-attention), which
            needs square images.
        patch_size: Side of a patch in pixels.
        mlp_ratio: Hidden units of an MLP per unit of a token.
        drop_path_rate: Probability with which a branch of the class attention is skipped in training, in [0, 1); in the
            blocks before it, the probability rises linearly from 0. None for 0.1.

    Attributes:
        scale: s of the newest gates in training mode.
        largest: s_max.

    Raises:
        ValueError: If an option is out of range, or does not fit the images.
    """

    dimensions = (3,)

    def __init__(
        self,
        image_shape: ImageShape,
        *,
        dim: int = 384,
        heads: int = 12,
        depth: int = 5,
        local: int = 5,
        patch_size: int = 4,
        mlp_ratio: float = 4.0,
        drop_path_rate: float | None = None,
    ) -> None:
        super().__init__(image_shape)
        at_least(self, 1, dim=dim, heads=heads, depth=depth, patch_size=patch_size)
        within(self, f"[0, {depth}]", local=local)
        above(self, 0, mlp_ratio=mlp_ratio)
        rate = 0.1 if drop_path_rate is None else drop_path_rate
        within(self, "[0, 1)", drop_path_rate=rate)
        channels, height, width = image_shape
        if dim % heads:
            raise ValueError(f"GatedClassAttention: dim is {dim}, heads is {heads}; use a divisor of dim for heads")
        if height % patch_size or width % patch_size or (local and height != width):
            shape = "square images" if local and height != width else f"a divisor of {height} and {width}"
            name = "local" if local and height != width else "patch_size"
            value = local if name == "local" else patch_size
            raise ValueError(
                f"GatedClassAttention: {name} is {value} with images of {height} x {width} pixels; use {shape}"
                + (", or local 0" if name == "local" else "")
            )
        from timm.models.convit import Block  # the import of timm takes about 1 s

        self.dim, self.patches = dim, (height // patch_size) * (width // patch_size)
        self.embed = nn.Conv2d(channels, dim, patch_size, patch_size)
        self.position = nn.Parameter(torch.zeros(1, self.patches, dim))
        self.blocks = nn.ModuleList(
            Block(
                dim,
                heads,
                mlp_ratio=mlp_ratio,
                drop_path=rate * place / depth,
                norm_layer=nn.LayerNorm,
                use_gpsa=place < local,
            )
            for place in range(depth)
        )
        self.attention = ClassAttention(dim, heads, int(dim * mlp_ratio), drop_path_rate=rate)
        self.tokens, self.embeddings, self.projectors = nn.ParameterList(), nn.ModuleList(), nn.ModuleList()
        self.scale = self.largest = 1.0
        self._features: Tensor | None = None
        nn.init.trunc_normal_(self.position, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        for block in self.blocks[:local]:
            block.attn.local_init()  # type: ignore[operator,union-attr]

    @property
    def num_features(self) -> int:  # type: ignore[override]
        return max(1, len(self.tokens)) * self.dim

    @property
    def sizes(self) -> list[int]:
        """Number of units of the gates u and v."""
        return [self.dim, self.attention.fc1.out_features]

    def add_task(self) -> None:
        """Append the class token, the gates and, from the second task on, the projector of a new task."""
        like = self.position
        token = nn.init.trunc_normal_(torch.empty(1, 1, self.dim), std=0.02)
        if self.tokens:
            self.projectors.append(Projector(self.patches, self.dim).to(like.device, like.dtype))
        self.tokens.append(nn.Parameter(token.to(like)))
        self.embeddings.append(nn.ParameterList(nn.Parameter(torch.randn(size).to(like)) for size in self.sizes))

    def embeddings_of(self, task: int) -> list[nn.Parameter]:
        """e of the gates u and v of a task."""
        return list(self.embeddings[task].parameters())

    def gates(self, task: int) -> list[Tensor]:
        """u ``(d,)`` and v ``(hidden,)`` of a task: 0 or 1 for an earlier task, in [0, 1] for the newest one."""
        if task < len(self.tokens) - 1:
            return [(e > 0).to(e.dtype) for e in self.embeddings_of(task)]
        scale = self.scale if self.training else self.largest
        return [torch.sigmoid(scale * e) for e in self.embeddings_of(task)]

    def patch_features(self, images: Tensor) -> Tensor:
        """S(x), ``(B, N, d)``, of images ``(B, C, H, W)``."""
        features: Tensor = self.embed(images).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            features = block(features)
        return features

    def forward(self, images: Tensor) -> Tensor:
        features, tokens = self.patch_features(images), []
        self._features = features if self.training else None
        for task in reversed(range(len(self.tokens))):
            tokens.append(self.attention(self.tokens[task], features, *self.gates(task)))
            if task and not self.training:
                features = self.projectors[task - 1](features)  # the features that task - 1 had
        return torch.cat(tokens[::-1], dim=1)

    def take_features(self) -> Tensor:
        """S(x) of the last forward pass in training mode; each is given once."""
        features, self._features = self._features, None
        assert features is not None
        return features

    def restore_network(self, student: Network, state: Mapping[str, Any], prefix: str) -> None:
        """Prepare for loading ``state``: have as many tasks as it has."""
        tasks = 0
        while f"{prefix}tokens.{tasks}" in state:
            tasks += 1
        with torch.random.fork_rng(devices=[]):  # the initial values are overwritten
            if tasks < len(self.tokens):
                self.tokens, self.embeddings, self.projectors = nn.ParameterList(), nn.ModuleList(), nn.ModuleList()
            while len(self.tokens) < tasks:
                self.add_task()


class _TokenBlock(nn.Linear):
    def __init__(self, dim: int, num_new: int) -> None:
        super().__init__(dim, num_new)
        self.norm = nn.LayerNorm(dim)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(self.norm(input))


class TokenHead(Head):
    """LayerNorm and linear classifier for the class token of each task.

    Args:
        num_features: Size of a class token, d.

    Attributes:
        num_features: Size of the tokens of all tasks together.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.dim = num_features

    def new_block(self, num_new: int) -> nn.Module:
        return _TokenBlock(self.dim, num_new)

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(B, columns)`` of the tokens of all tasks, ``(B, tasks * d)``."""
        tokens = torch.split(features, self.dim, dim=1)
        return torch.cat([block(token) for block, token in zip(self.blocks, tokens, strict=True)], dim=1)

    def _append(self, block: nn.Module) -> None:
        super()._append(block)
        self.num_features = len(self.blocks) * self.dim

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.num_features = max(1, len(self.blocks)) * self.dim


class GCAB(ContinualStrategy):
    """Gates protect the class attention of earlier tasks; projectors return patch features to the features of the task.

    Args:
        gate_weight: Weight of R, at least 0.
        drift_weight: Weight of the norm, at least 0.
        scale: s_max, above 1.
        backbone: Builds a ``GatedClassAttention``; None for its defaults.
        kwargs: Options of the base class, apart from ``head``, ``loss_classes`` and ``freeze_backbone``.
    """

    traits = Traits(
        family="exemplar-free",
        paper="Cotogni et al., IJCV 2025, arXiv:2211.12292",
        scenarios=("class-incremental",),
        inputs=("image",),
    )

    def __init__(
        self,
        *,
        gate_weight: float = 0.05,
        drift_weight: float = 0.001,
        scale: float = 800.0,
        backbone: BackboneFactory | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            backbone=backbone or GatedClassAttention,
            head=TokenHead,
            loss_classes="all",
            freeze_backbone=False,
            **kwargs,
        )
        at_least(self, 0, gate_weight=gate_weight, drift_weight=drift_weight)
        above(self, 1, scale=scale)
        self.gate_weight, self.drift_weight, self.scale = gate_weight, drift_weight, scale
        self.teacher = Teacher(reference=True)
        self.past_masks: PastMasks
        self._held: Held | None = None

    @property
    def backbone(self) -> GatedClassAttention:
        backbone = self.network.backbone
        assert isinstance(backbone, GatedClassAttention)
        return backbone

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        if not isinstance(self.network.backbone, GatedClassAttention):
            name = type(self.network.backbone).__name__
            raise ValueError(f"GCAB: backbone is {name}; use GatedClassAttention, whose class attention has gates")
        self.backbone.largest = self.scale
        self.past_masks = PastMasks(self.backbone.sizes)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.backbone.add_task()

    def begin_phase(self, phase: Phase, origin: int, sources: Sequence[AddsLosses] = ()) -> None:
        super().begin_phase(phase, origin, sources)
        self._held = None

    def trainable(self) -> Iterator[nn.Parameter]:
        backbone, task = self.backbone, self.task.index
        earlier = [*backbone.tokens[:task], *backbone.embeddings[:task].parameters()]
        earlier += [
            *backbone.projectors[: max(0, task - 1)].parameters(),
            *self.network.head.blocks[:task].parameters(),
        ]
        if task:
            newest = self.network.head.blocks[-1]
            norms = (layer for part in (backbone.blocks, backbone.attention, newest) for layer in part.modules())
            earlier += [p for layer in norms if isinstance(layer, nn.LayerNorm) for p in layer.parameters()]
        left_out = {id(parameter) for parameter in earlier}
        return (parameter for parameter in super().trainable() if id(parameter) not in left_out)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self.backbone.scale = risen_scale(batch_idx / int(self.trainer.num_training_batches), self.scale)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        classes, backbone = output.logits.shape[1], self.backbone
        features = backbone.take_features()
        targets = lwf_mc_targets(batch.labels, classes)
        terms = {"bce": binary_cross_entropy(output.logits, targets) / classes}
        terms["gates"] = self.gate_weight * newly_used(backbone.gates(self.task.index), self.past_masks.masks())
        if self.teacher.network is not None:
            with torch.no_grad():
                before = self.teacher.network.backbone.patch_features(batch.images)  # type: ignore[operator,union-attr]
            projected = backbone.projectors[-1](features)
            terms["drift"] = self.drift_weight * feature_norm_distillation(projected, before, batch)
        return terms

    def edit_gradients(self, batch: Batch) -> None:
        compensate_scale(self.backbone.embeddings_of(self.task.index), self.backbone.scale, self.scale)
        if self.task.is_first:
            return
        if self._held is None:  # before the first step since the fit began or was resumed
            attention = self.backbone.attention
            self._held = Held(dict(attention.named_parameters()), attention.trained(self.past_masks.masks()))
        self._held.mask_gradients()

    def after_step(self, batch: Batch) -> None:
        clamp_embeddings(self.backbone.embeddings_of(self.task.index))
        if self._held is not None:
            self._held.restore()

    def end_phase(self, phase: Phase) -> None:
        self._held = None

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        self.past_masks.merge([(e > 0).to(e.dtype) for e in self.backbone.embeddings_of(task.index)])
        self.teacher.learn_from(self.network)
