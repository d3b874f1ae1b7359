"""TagFex: Task-Agnostic Guided Feature Expansion (Zheng et al., CVPR 2025, arXiv:2503.00823).

Extractors f_1, ..., f_t as in ``DERExpand``, and a task-agnostic network g, which learns in all tasks by contrast and
guides the newest extractor. A step has two augmented views of each image. With kappa = C_old / C the share of old
classes, P a projection, g' and P' copies of g and P before the task, and h a linear predictor, in later tasks

    L = CE(W phi(x), y) + a CE(A f_t(x), y_aux)                                                     as ``DERExpand``
        + b (1 - kappa) NCE(P(g(x)), P(g(x))) + c kappa NCE(P'(h(g(x))), P'(g'(x)))
        + d CE(m(x), y) + e KL( softmax(m(x) / T) || softmax(W_new phi(x) / T) )                    new classes only
    NCE(u, v) = mean_i -log( exp(cos(u_i, v_i') / tau) / sum_{j != i} exp(cos(u_i, v_j) / tau) )    i' other view of i

In the first task, L = CE + b NCE(P(g(x)), P(g(x))). m(x) are logits of merged features: attention whose queries are of
the positions of f_t's last feature map, and whose keys and values are of these and of the positions of g's map, without
gradient to g. Both maps have a layer norm and linear maps of their own. The mean over the positions and a linear map
follow. The last two terms are means over the samples of new classes; W_new are their rows of the head, and m has no
gradient in the KL term. This transfer takes place in steps in which m classifies the samples of new classes better than
W_new phi, in cross-entropy.

f_t starts as ``(1 - mix) f_{t-1} + mix g``, and the new columns of the old rows of W as 0, so that old logits do not
change. Predictions use W phi alone; m is new in each task and removed at its end. a -> aux_weight,
b -> contrast_weight, c -> predict_weight, d -> merge_weight, e -> transfer_weight, tau -> contrast_temperature,
T -> transfer_temperature.

The last feature map of a backbone that is no ``ResNet`` is its feature vector.
With several processes, the contrast is between the views of all of them, unless a batch has fewer images than there are
processes.
Departs from the authors' code in the running statistics of f_t, which are mixed as its weights are, and in the
condition of the transfer: the code compares the loss of m on samples of new classes with the loss of W phi on all
samples and classes.
"""

from collections.abc import Iterable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import ImageShape, cat
from cl_lightning.checks import above, at_least, within
from cl_lightning.distributed import all_sum, world_size
from cl_lightning.losses import cross_entropy, row_factor, rows_of_all, softmax_distillation, supervised_contrastive
from cl_lightning.models import (
    ExpandableBackbone,
    Head,
    Temporary,
    feature_map,
    frozen_copy,
    map_stage,
    perceptron,
    positions,
)
from cl_lightning.strategies.rehearsal.der_expand import DERExpand
from cl_lightning.strategy import Batch, Output, Task, Traits

_VIEW = 0x7A6  # salt of the second view


def transferred(student: Tensor, teacher: Tensor, rows: Tensor, temperature: float) -> Tensor:
    """Sum over some rows of KL( softmax(teacher / T) || softmax(student / T) ), in nats; no gradient to the teacher.

    Args:
        student: Logits, ``(B, C)``.
        teacher: Logits, ``(B, C)``.
        rows: Mask of the rows that count, bool ``(B,)``.
        temperature: T, above 0.
    """
    teacher = teacher.detach()
    own = torch.where(rows[:, None], student, teacher.to(student.dtype))  # 0 where both are the same
    return softmax_distillation(own, teacher, temperature, form="kl") * len(rows)


class Merger(nn.Module):
    """Features of the newest extractor, merged with a task-agnostic feature map by attention.

    Args:
        width: Number of channels of both maps, d, divisible by ``heads``.
        heads: Number of attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.own_norm, self.agnostic_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries, self.own_keys, self.own_values, self.agnostic_keys, self.agnostic_values = (
            nn.Linear(width, width, bias=False) for _ in range(5)
        )
        for module in self.children():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)

    def forward(self, own: Tensor, agnostic: Tensor) -> Tensor:
        """Merged features ``(B, d)`` of the positions of both maps, ``(B, n, d)`` each."""
        own, agnostic = self.own_norm(own), self.agnostic_norm(agnostic)
        keys = torch.cat([self.own_keys(own), self.agnostic_keys(agnostic)], dim=1)
        values = torch.cat([self.own_values(own), self.agnostic_values(agnostic)], dim=1)
        parts = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.queries(own), keys, values))
        merged = F.scaled_dot_product_attention(*parts)  # (B, heads, n, d / heads)
        return merged.mean(dim=2).flatten(1)


class TaskAgnostic(nn.Module):
    """The network g, its projection P, from the second task on the predictor h, and during a task the frozen g', P'.

    Args:
        net: g, a backbone.
        projection: P.
        width: Number of features of g.
    """

    kept_as: ClassVar[str] = "task_agnostic"

    def __init__(self, net: nn.Module, projection: nn.Module, width: int) -> None:
        super().__init__()
        self.net, self.projection, self.width = net, projection, width
        self.predictor = Temporary(self._linear)
        self.before = Temporary(self._frozen)

    def _linear(self) -> nn.Module:
        return nn.Linear(self.width, self.width)

    def _frozen(self) -> nn.Module:
        return nn.ModuleDict({"net": frozen_copy(self.net), "projection": frozen_copy(self.projection)})

    def num_bytes(self) -> int:
        return sum(value.nbytes for value in self.state_dict().values())


class TagFex(DERExpand):
    """DER whose newest extractor is guided by a task-agnostic network that learns in all tasks by contrast.

    Args:
        aux_weight: a, at least 0.
        contrast_weight: b, at least 0.
        predict_weight: c, at least 0.
        merge_weight: d, at least 0.
        transfer_weight: e, at least 0.
        contrast_temperature: tau, above 0.
        transfer_temperature: T, above 0.
        mix: Share of g in the initial weights of a new extractor, in [0, 1].
        projection_hidden: Number of hidden units of P, at least 1.
        projection_size: Number of outputs of P, at least 1.
        attention_heads: Number of heads of the attention, at least 1; a divisor of the number of features.
        kwargs: Options of ``DERExpand``.
    """

    traits = Traits(family="rehearsal", paper="Zheng et al., CVPR 2025, arXiv:2503.00823", keeps_exemplars=True)

    def __init__(
        self,
        *,
        aux_weight: float = 2.0,
        contrast_weight: float = 1.0,
        predict_weight: float = 2.0,
        merge_weight: float = 1.0,
        transfer_weight: float = 1.0,
        contrast_temperature: float = 0.2,
        transfer_temperature: float = 2.0,
        mix: float = 0.05,
        projection_hidden: int = 2048,
        projection_size: int = 1024,
        attention_heads: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(aux_weight=aux_weight, **kwargs)
        at_least(self, 0, contrast_weight=contrast_weight, predict_weight=predict_weight)
        at_least(self, 0, merge_weight=merge_weight, transfer_weight=transfer_weight)
        above(self, 0, contrast_temperature=contrast_temperature, transfer_temperature=transfer_temperature)
        within(self, "[0, 1]", mix=mix)
        at_least(self, 1, projection_hidden=projection_hidden, projection_size=projection_size)
        at_least(self, 1, attention_heads=attention_heads)
        self.contrast_weight, self.predict_weight = contrast_weight, predict_weight
        self.merge_weight, self.transfer_weight = merge_weight, transfer_weight
        self.contrast_temperature, self.transfer_temperature = contrast_temperature, transfer_temperature
        self.mix, self.attention_heads = mix, attention_heads
        self.projection_sizes = (projection_hidden, projection_size)
        self.agnostic: TaskAgnostic
        self.merged_head: Head  # of m; empty between tasks
        self.merger = Temporary(self._new_merger)
        self._maps: list[Tensor] = []  # of the newest extractor, between the forward pass of a step and its losses
        self._tap: torch.utils.hooks.RemovableHandle | None = None

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        width, (hidden, size) = self.backbone.width, self.projection_sizes
        if width % self.attention_heads:
            raise ValueError(
                f"TagFex: attention_heads is {self.attention_heads}; use a divisor of the number of features, {width}"
            )
        net = cast(ExpandableBackbone, self.build_backbone(image_shape)).extractors[0]
        projection = perceptron(width, hidden, size)
        self.agnostic = TaskAgnostic(net, projection, width)
        self.merged_head = self.extractor_head()

    def _new_merger(self) -> nn.Module:
        return Merger(self.backbone.width, self.attention_heads)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if task.is_first:
            return
        self.agnostic.before.create()
        if not self.agnostic.predictor:
            self.agnostic.predictor.create()
        self._mix_in()
        old = self.network.head.blocks[:-1] if task.num_new else self.network.head.blocks
        with torch.no_grad():
            for block in old:
                cast(Tensor, block.weight)[:, -self.backbone.width :] = 0.0
        if task.num_new:
            self.merger.create()
            self.merged_head.grow(task.num_new)

    @torch.no_grad()
    def _mix_in(self) -> None:
        """Move the newest extractor towards g, running statistics included."""
        newest, guide = self.backbone.extractors[-1].state_dict(), self.agnostic.net.state_dict()
        for name, value in newest.items():
            if value.is_floating_point():
                value.lerp_(guide[name], self.mix)

    def trainable(self) -> Iterable[nn.Parameter]:
        yield from super().trainable()
        agnostic = self.agnostic
        for module in (agnostic.net, agnostic.projection, agnostic.predictor, self.merger, self.merged_head):
            yield from module.parameters()

    def frozen(self) -> Iterable[nn.Module]:
        return [*super().frozen(), self.agnostic.before]

    def prepare_batch(self, batch: Batch) -> Batch:
        if self.phase.name == "retrain":
            return batch
        if self.merger:
            self._maps.clear()
            stage = map_stage(self.backbone.extractors[-1])
            self._tap = stage.register_forward_hook(lambda module, inputs, maps: self._maps.append(maps))
        second = self.data.augment(batch.replace(draw=batch.draw.fork(_VIEW)))
        return cat([batch, second], world_size())

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        terms = super().losses(batch, output)
        if self.phase.name == "retrain":
            return terms
        maps = positions(feature_map(self.agnostic.net, batch.images))  # (2B, n, d)
        features = maps.mean(dim=1)
        old = (self.task.num_seen - self.task.num_new) / self.task.num_seen  # kappa
        contrast = self._contrast(self.agnostic.projection(features), None, batch)
        terms["contrast"] = self.contrast_weight * (1 - old) * contrast
        if self.agnostic.before:
            before = cast(nn.ModuleDict, self.agnostic.before.module)
            with torch.no_grad():
                target = before["projection"](positions(feature_map(before["net"], batch.images)).mean(dim=1))
            predicted = before["projection"](self.agnostic.predictor(features))
            terms["predict"] = self.predict_weight * old * self._contrast(predicted, target, batch)
        if self.merger:
            terms.update(self._guidance(batch, output, maps.detach()))
        return terms

    def _contrast(self, embeddings: Tensor, targets: Tensor | None, batch: Batch) -> Tensor:
        """NCE over the views of all processes; the base class multiplies the result by the weight of the batch."""
        rows, factor = rows_of_all(batch)

        def views(values: Tensor) -> Tensor:
            return torch.cat([rows(view) for view in values.float().chunk(2)])

        embeddings = views(embeddings)
        images = torch.arange(len(embeddings) // 2, device=embeddings.device).repeat(2)
        tau = self.contrast_temperature
        loss = supervised_contrastive(
            embeddings, images, tau, base_temperature=tau, targets=None if targets is None else views(targets)
        )
        return factor * loss

    def _guidance(self, batch: Batch, output: Output, maps: Tensor) -> dict[str, Tensor]:
        """Cross-entropy of the merged features and transfer from them, on samples of new classes."""
        assert self._tap is not None
        self._tap.remove()
        merged = self.merged_head(self.merger(positions(self._maps.pop()), maps))
        labels = (batch.labels - (self.task.num_seen - self.task.num_new)).clamp(min=-1)
        own = output.logits[:, -self.task.num_new :]
        ce, own_ce = cross_entropy(merged, labels), cross_entropy(own, labels)  # means over the new classes' samples
        new = labels >= 0
        count = new.sum()
        gain = (own_ce - ce).detach() * count
        if batch.draw.total >= world_size():
            all_sum(gain)
        per_row, better = row_factor(count, batch), (gain > 0).to(ce.dtype)
        transfer = transferred(own, merged, new, self.transfer_temperature)
        return {
            "merge": self.merge_weight * per_row * count * ce,
            "transfer": self.transfer_weight * per_row * better * transfer,
        }

    def end_task(self, task: Task) -> None:
        self.agnostic.before.remove()
        self.merger.remove()
        self.merged_head = self.extractor_head().to(self.device)
        super().end_task(task)
