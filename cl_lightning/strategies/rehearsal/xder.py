"""eXtended Dark Experience Replay, X-DER (Boschini et al., TPAMI 2023, arXiv:2201.00766).

The number of all classes is known, and the classifier has an output for each class from the start: past, present and
future ones. With t the present task, (x, y) from the stream, and (x', z', y') and (x'', y'') two draws from a memory of
earlier tasks,

    L = CE(f(x)[present], y) + alpha * mean (f(x') - z')^2 + beta * CE(f(x'')[past], y'') + future terms

with the mean over samples and all classes. alpha -> logit_weight, beta -> label_weight. The future terms prepare the
outputs f_h of each later task h, with v views of the samples of the stream and of x',

    lambda * mean_h SupCon(f_h / ||f_h||, temperature T)                        contrastive_weight, temperature, views
    delta * mean_h || G(f_h(x')) - G(z'_h) ||^2 / n^2                           similarity_weight
    eta * mean over violators of ( max f[future] + m - max f[own task] )        constraint_weight, margin

G has the inner products of the outputs of n samples, with rows divided by their norms. ``released=True`` divides them
by the sums of their absolute values, as the authors' code does; its weight of 3000 depends on it. Violators are samples
of the stream, of x' and of x'' for which the bracket is above 0. The logits z' are stored when a task ends, and edited:
with H some outputs and v = f[H],

    if max v > z'_y:   v <- v * gamma z'_y / max v;       z'[H] <- v            decay

(a) when a sample is stored, on the outputs of the past tasks; (b) for samples of earlier tasks, on the outputs of the
present and later tasks, after a step in which a sample is drawn, with the probability 1 / number of its draws, and for
all samples at the end of a task. So the targets follow what the network has learned of later classes.

Departs from the authors' code: the factor gamma z'_y / max v is clipped to [0, 1], since a negative z'_y would change
the sign of v. Outputs of later tasks are a layer of their own, whose rows become the rows of the head when their task
begins. Stored logits are of images without augmentation, in eval mode. The views have the augmentation of the data, and
the similarity term has the one view of x'. All parts of a step are one forward pass. The constraint on past outputs in
the space of probabilities, the separate normalisation statistics (``align_bn``) and the simplex classifier (X-DER RPC)
are not implemented. Several processes compute the future terms among their own samples.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import Draw, cat, join
from cl_lightning.checks import above, at_least, within
from cl_lightning.distributed import all_gather_together, world_size
from cl_lightning.losses import cross_entropy, full_precision, masked_logits, mean_over_rows, supervised_contrastive
from cl_lightning.memory import ClassBalanced, Policy
from cl_lightning.models import LinearHead
from cl_lightning.strategies.base import TaskEndReplay, sum_of_zeros
from cl_lightning.strategy import Batch, Output, Task, Traits

_DARK, _VIEW, _EDIT = 0xDE2, 0x71E, 0xED1  # salts of the second draw, of the views and of the editing


def transplanted(old: Tensor, new: Tensor, labels: Tensor, columns: Tensor, decay: float) -> Tensor:
    """Logits with some columns replaced by new ones, which are scaled to stay below the logit of the label.

        v = new[H];   if max v > old_y:  v <- clip(gamma old_y / max v, 0, 1) v;   old[H] <- v

    Args:
        old: ``(B, C)``.
        new: ``(B, C)``.
        labels: y, int64 ``(B,)``.
        columns: H, bool ``(C,)``.
        decay: gamma, in [0, 1].

    Returns:
        ``(B, C)``; other columns equal ``old``, to the bit. With no column in H it is ``old``.
    """
    of_label = old.gather(1, labels[:, None])
    largest = new.masked_fill(~columns, -torch.inf).amax(dim=1, keepdim=True)
    over = largest > of_label
    factor = (decay * of_label / largest.where(over, 1.0)).clamp(0, 1)
    return torch.where(columns, torch.where(over, factor * new, new), old)


def similarity_distance(outputs: Tensor, stored: Tensor, order: float = 2.0) -> Tensor:
    """Squared distance of the similarity matrices of two outputs of the same samples, divided by the squared number.

        L = || G(a) - G(b) ||^2 / n^2,   G(a) = a a^T with each row divided by its norm

    (similarity-preserving distillation, Tung & Mori, ICCV 2019, arXiv:1907.09682).

    Args:
        outputs: a, ``(n, c)``.
        stored: b, ``(n, c)``, without gradient.
        order: Order of the norm of the rows.
    """
    with torch.autocast(outputs.device.type, enabled=False):
        both = full_precision(outputs), full_precision(stored.detach())
        first, second = (F.normalize(z @ z.T, p=order, dim=1) for z in both)
    return (first - second).square().sum() / max(len(outputs), 1) ** 2


def violation(largest_future: Tensor, largest_own: Tensor, margin: float) -> Tensor:
    """Mean of ``future + margin - own`` over the samples for which it is above 0; 0 without any, ``(B,)`` each."""
    gap = (largest_future + margin - largest_own).clamp(min=0)
    return gap.sum() / (gap > 0).sum().clamp(min=1)


class FutureOutputs(nn.Module):
    """Linear outputs for all classes of a stream, of which the classes of later tasks are used.

    Attributes:
        weight: ``(C, d)``.
        bias: ``(C,)``.
    """

    kept_as: ClassVar[str] = "future outputs"

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(0, 0)), nn.Parameter(torch.zeros(0))

    def grow(self, num_classes: int, num_features: int) -> None:
        """Add outputs, initialised as outputs of ``nn.Linear``; present ones keep their values."""
        more = num_classes - len(self.bias)
        if more > 0:
            new = nn.Linear(num_features, more)
            weight = self.weight if len(self.bias) else new.weight[:0]
            self.weight = nn.Parameter(torch.cat([weight.detach(), new.weight.detach().to(weight.device)]))
            self.bias = nn.Parameter(torch.cat([self.bias.detach(), new.bias.detach().to(weight.device)]))

    def num_bytes(self) -> int:
        return sum(value.nbytes for value in self.parameters())

    def forward(self, features: Tensor, start: int) -> Tensor:
        """Outputs of the classes from ``start`` on, ``(B, C - start)``."""
        return F.linear(features, self.weight[start:], self.bias[start:])

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        for name in ("weight", "bias"):
            saved, value = state_dict.get(prefix + name), getattr(self, name)
            if saved is not None and saved.shape != value.shape:
                setattr(self, name, nn.Parameter(torch.zeros_like(saved, device=value.device)))
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]


class XDER(TaskEndReplay):
    """Cross-entropy on present and past outputs, stored logits as targets that are edited, and prepared future outputs.

    For class-incremental streams whose number of classes is known.

    Args:
        logit_weight: alpha, at least 0.
        label_weight: beta, at least 0.
        decay: gamma of the editing, in [0, 1].
        contrastive_weight: lambda, at least 0.
        temperature: T, above 0.
        views: v, number of augmented views, at least 2.
        similarity_weight: delta, at least 0.
        constraint_weight: eta, at least 0.
        margin: m, at least 0.
        released: Whether G divides by sums of absolute values, as in the released code, instead of Euclidean norms.
        policy: Policy that decides which samples a full memory keeps; None for equal numbers of each class.
        kwargs: Options of ``TaskEndReplay``; the head is a ``LinearHead``.
    """

    traits = Traits(
        family="rehearsal",
        paper="Boschini et al., TPAMI 2023, arXiv:2201.00766",
        keeps_exemplars=True,
        uses_old_logits=True,
    )

    def __init__(
        self,
        *,
        logit_weight: float = 0.3,
        label_weight: float = 0.8,
        decay: float = 0.85,
        contrastive_weight: float = 0.05,
        temperature: float = 5.0,
        views: int = 4,
        similarity_weight: float = 0.0,
        constraint_weight: float = 0.1,
        margin: float = 0.3,
        released: bool = False,
        policy: Policy | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy=policy or ClassBalanced(), **kwargs)
        at_least(self, 0, logit_weight=logit_weight, label_weight=label_weight, contrastive_weight=contrastive_weight)
        at_least(self, 0, similarity_weight=similarity_weight, constraint_weight=constraint_weight, margin=margin)
        at_least(self, 2, views=views)
        above(self, 0, temperature=temperature)
        within(self, "[0, 1]", decay=decay)
        if self.loss_classes != "all":
            raise ValueError(f"XDER: loss_classes is {self.loss_classes!r}, but it has a loss for each part; use 'all'")
        self.logit_weight, self.label_weight, self.decay = logit_weight, label_weight, decay
        self.contrastive_weight, self.temperature, self.views = contrastive_weight, temperature, views
        self.similarity_weight, self.constraint_weight, self.margin = similarity_weight, constraint_weight, margin
        self.released = released
        self.future = FutureOutputs()
        self._drawn: list[tuple[Tensor, Batch]] = []
        self._outputs: list[Tensor] = []

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        head = self.network.head
        if type(head) is not LinearHead:
            raise ValueError(f"XDER: head is {type(head).__name__}, whose rows cannot be prepared; use LinearHead")
        self.future.grow(len(self.data.stream.class_names), head.num_features)
        if task.num_new:
            rows = slice(task.num_seen - task.num_new, task.num_seen)
            block: Any = head.blocks[-1]
            with torch.no_grad():
                block.weight.copy_(self.future.weight[rows])
                if block.bias is not None:
                    block.bias.copy_(self.future.bias[rows])

    def trainable(self) -> Any:
        yield from super().trainable()
        if self._sizes():
            yield from self.future.parameters()

    def _sizes(self) -> list[int]:
        """Number of classes of each later task that has any."""
        return [task.num_new for task in self.data.stream.tasks[self.task.index + 1 :] if task.num_new]

    def all_logits(self, output: Output) -> Tensor:
        """Logits of all classes of the stream, ``(B, C)``, in float32."""
        logits = full_precision(output.logits)
        return torch.cat([logits, full_precision(self.future(output.features, logits.shape[1]))], dim=1)

    # ------------------------------------------------------------------ steps

    def prepare_batch(self, batch: Batch) -> Batch:
        self._drawn, self._outputs = [], []
        parts: dict[str, Batch | None] = {"stream": batch}
        for name, salt in (("dark", (_DARK,)), ("replay", ())):
            drawn = self.draw(batch, *salt)
            if drawn is not None:
                count, draw = self.replay_size or batch.draw.total, batch.draw.fork(*salt) if salt else batch.draw
                self._drawn.append((self.memory.pick(count, draw)[0], drawn))
                parts[name] = self.data.augment(drawn)
        if self.contrastive_weight and self._sizes():
            sources = [batch, *(drawn for _, drawn in self._drawn[:1])]
            for view in range(self.views):
                forked = [source.replace(draw=source.draw.fork(_VIEW, view)) for source in sources]
                augmented = [self.data.augment(source) for source in forked]
                parts[f"view {view}"] = cat([each.replace(extra={}) for each in augmented], world_size())
        return join(parts)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        seen, sizes = output.logits.shape[1], self._sizes()
        whole = output._replace(logits=self.all_logits(output))
        every = torch.arange(whole.logits.shape[1], device=output.logits.device)
        samples, stream, share = batch.part("stream", whole)
        present = F.pad(self.task_columns[-1], (0, len(every) - seen))
        ce = cross_entropy(masked_logits(stream.logits, present), samples.labels, weights=self.data.weights_of(samples))
        if sizes:  # outputs of later tasks may have no term in this step
            ce = ce + sum_of_zeros(self.future.parameters())
        terms, own = {"ce": share * ce}, [(samples, stream.logits)]
        if "dark" in batch.parts:
            samples, of_part, share = batch.part("dark", whole)
            own.append((samples, of_part.logits))
            self._outputs.append(of_part.logits.detach())
            stored = samples.extra["logits"]
            stored = F.pad(stored, (0, len(every) - stored.shape[1]), value=torch.nan)
            known = ~stored.isnan()  # all, unless the stream has grown
            error = (of_part.logits - stored).square().where(known, 0.0).sum(dim=1) / known.sum(dim=1)
            terms["dark"] = self.logit_weight * share * mean_over_rows(error)
            if sizes and self.similarity_weight:
                pairs = zip(
                    torch.split(of_part.logits[:, seen:], sizes, dim=1),
                    torch.split(stored[:, seen:].nan_to_num(), sizes, dim=1),
                    strict=True,
                )
                order = 1.0 if self.released else 2.0
                distances = torch.stack([similarity_distance(now, before, order) for now, before in pairs])
                terms["similarity"] = self.similarity_weight * share * distances.mean()
        if "replay" in batch.parts:
            samples, of_part, share = batch.part("replay", whole)
            own.append((samples, of_part.logits))
            self._outputs.append(of_part.logits.detach())
            past = F.pad(self.task_columns[:-1].any(dim=0), (0, len(every) - seen))
            weights = self.data.weights_of(samples)
            of_labels = cross_entropy(masked_logits(of_part.logits, past), samples.labels, weights=weights)
            terms["replay"] = self.label_weight * share * of_labels
        if sizes and self.constraint_weight:
            logits, tasks = torch.cat([each for _, each in own]), torch.cat([part.tasks for part, _ in own])
            mine = F.pad(self.task_columns[tasks], (0, len(every) - seen))
            largest = logits.masked_fill(~mine, -torch.inf).amax(dim=1)
            over = violation(logits[:, seen:].amax(dim=1), largest, self.margin)
            terms["constraint"] = self.constraint_weight * over
        if "view 0" in batch.parts:
            views = [batch.part(f"view {view}", whole) for view in range(self.views)]
            labels = torch.cat([view.batch.labels for view in views])
            of_future = torch.split(torch.cat([view.output.logits for view in views])[:, seen:], sizes, dim=1)
            contrasts = [
                supervised_contrastive(each, labels, self.temperature, base_temperature=self.temperature)
                for each in of_future
            ]
            terms["contrastive"] = self.contrastive_weight * views[0].share * torch.stack(contrasts).mean()
        return terms

    # ------------------------------------------------------------------ the memory

    def after_step(self, batch: Batch) -> None:
        super().after_step(batch)
        for number, (rows, drawn) in enumerate(self._drawn):
            outputs = self._outputs[number : number + 1] or [torch.zeros(0, len(self.future.bias), device=self.device)]
            random = drawn.draw.fork(_EDIT).rand().to(self.device)
            self._edit(*all_gather_together([rows.to(self.device), outputs[0], random]))
        self._drawn, self._outputs = [], []

    def _edit(self, rows: Tensor, outputs: Tensor, random: Tensor | None = None) -> None:
        """Edit the stored logits of some rows of the memory on the outputs of the present and later tasks.

        Args:
            rows: Rows, int64 ``(n,)``.
            outputs: Logits of all classes now, ``(n, C)``.
            random: Uniform numbers, ``(n,)``, for the probability 1 / number of draws; None to edit all.
        """
        place = self.memory.labels.device
        rows, outputs = rows.to(place), outputs.to(place)
        stored, draws = self.memory.fields["logits"], self.memory.fields["draws"]
        old = F.pad(stored[rows], (0, outputs.shape[1] - stored.shape[1]), value=torch.nan)
        first = int(self.task.num_seen - self.task.num_new)
        columns = torch.arange(outputs.shape[1], device=place) >= first
        edited = transplanted(old, outputs.to(old.dtype), self.memory.labels[rows], columns, self.decay)
        if random is not None:
            draws[rows] += 1
            edited = torch.where((random.to(place) < 1 / draws[rows])[:, None], edited, old)
        stored[rows] = edited[:, : stored.shape[1]]

    def targets(self, batch: Batch) -> Tensor:
        if not len(batch):
            return torch.zeros(0, len(self.future.bias), device=self.device)
        with self.trainer.precision_plugin.forward_context():
            logits = self.all_logits(self.network(batch.images))
        past = torch.arange(logits.shape[1], device=logits.device) < self.task.num_seen - self.task.num_new
        return transplanted(logits, logits, batch.labels, past, self.decay)

    def offer(self, batch: Batch, **extra: Tensor) -> None:
        super().offer(batch, draws=torch.zeros(len(batch), device=self.device), **extra)

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        every = torch.arange(len(self.memory), device=self.memory.labels.device)
        for rows in torch.split(every, 256) if len(every) else ():
            images, labels, tasks = (value.to(self.device) for value in self.memory.gather(rows))
            raw = Batch(images, labels, tasks, torch.full_like(labels, -1), images, Draw.of(len(rows), 0))
            with self.trainer.precision_plugin.forward_context():
                logits = self.all_logits(self.network(self.data.finish(raw).images))
            self._edit(rows, logits)
        if len(self.memory):
            self.memory.fields["draws"].zero_()
        super().end_task(task)
