"""Hypernetwork interval training, HINT (Krukowski et al., 2024, arXiv:2405.15444).

A hypernetwork H makes the weights of the network that classifies. Each task t has a box of embeddings, with centre e_t
and half-widths eps_t = gamma softmax(rho_t), whose sum is gamma. H maps the box to an interval of each weight,

    h, r <- W h + b, |W| r                                            linear layer
    h, r <- (act(h + r) + act(h - r))/2, (act(h + r) - act(h - r))/2  activation, here ReLU

with the lower, middle and upper weights h - r, h, h + r at its end. The loss of task t uses logits of the middle
weights, z, and the worst logits of the interval, z', the lower end for the label and the upper end for all others:

    L = kappa CE(z, y) + (1 - kappa) CE(z', y) + beta/t R
    R = 1/t sum_{k<t} ||H(e_k) - H*(e_k)||^2      middle weights now and before the task, t >= 1 earlier tasks

Intervals of the logits are ``full``: bounds through all layers of an MLP whose activations are ReLU,

    lower = W_l+ x_l + W_l- x_u + b_l,   upper = W_u+ x_u + W_u- x_l + b_u        with x >= 0

or ``light``: the network with the lower, the middle and the upper weights; the three logits are sorted. In the first
half of the steps of a task gamma grows linearly from 0, and kappa is max(1 - 5e-5 step, kappa_end); afterwards both
stay. beta -> regularization, gamma -> radius, kappa_end -> nominal_weight, 5e-5 -> nominal_decay.

The task of an image, where it is not given, is the one with the lowest entropy of softmax((lower + upper)/2), in which
each class is weighted by 1/(upper - lower). With ``universal``, for streams of domains, embeddings are
c_t = sigma cos(e_t), sigma = gamma/(2 M), M the size of an embedding, and all images are predicted with the weights for
the centre of the intersection of all boxes; in a coordinate where it is empty, for the mean of its two ends.

Choices of ours: the bias of the last layer of H starts at usual initial weights of the network, and the matrix of this
layer in +-1/inputs, so that training starts near these weights; predictions use the middle weights, unsorted; running
statistics of batch normalisation belong to the first task and are frozen afterwards.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from cl_lightning.batch import Batch, ImageShape
from cl_lightning.checks import at_least, one_of, within
from cl_lightning.losses import full_precision
from cl_lightning.memory import restore_shapes
from cl_lightning.models import MLP, Backbone, GrowingParameters, Head, batch_norms
from cl_lightning.strategies.base import TaskIncremental
from cl_lightning.strategy import Output, Task, Traits

Intervals = Literal["full", "light"]
_LEAST_WIDTH = 1e-6  # of an interval of logits, whose reciprocal is a weight


class HyperNetwork(nn.Module):
    """An MLP from a box of embeddings to an interval of each weight of a network.

    Args:
        size: Size of an embedding, M.
        hidden: Units of the hidden layers.
        start: Weights that the MLP makes at the beginning, about, ``(P,)``.
    """

    def __init__(self, size: int, hidden: Sequence[int], start: Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise((size, *hidden, len(start))))
        last = cast(nn.Linear, self.layers[-1])
        nn.init.uniform_(last.weight, -1 / last.in_features, 1 / last.in_features)
        last.bias = nn.Parameter(start.detach().clone())

    def forward(self, centre: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        """Middle and half-width of the interval of each weight, ``(n, P)`` each, of boxes ``(n, M)``, ``(n, M)``."""
        for place, module in enumerate(self.layers):
            layer = cast(nn.Linear, module)
            if place:
                low, high = (centre - radius).relu(), (centre + radius).relu()
                centre, radius = (high + low) / 2, (high - low) / 2
            centre, radius = layer(centre), F.linear(radius, layer.weight.abs())
        return centre, radius


class GeneratedBackbone(Backbone):
    """A network, from images to the outputs of a task, whose weights a hypernetwork makes.

    Args:
        backbone: Network from images to features; a linear layer follows. All their parameters are made.
        outputs: Number of outputs.
        hidden: Units of the hidden layers of the hypernetwork.
        size: Size of an embedding, M.
        radius: Sum of the half-widths of a box, gamma.
        universal: Whether embeddings are ``sigma cos(e)``.

    Attributes:
        task: Task whose weights are used; -1 for the weights at the intersection of the boxes of all tasks.
        growth: Part of ``radius`` that is used for the task of ``task``, in [0, 1].
    """

    def __init__(
        self, backbone: Backbone, outputs: int, *, hidden: Sequence[int], size: int, radius: float, universal: bool
    ) -> None:
        super().__init__(backbone.image_shape)
        self.num_features, self.size, self.radius, self.universal = outputs, size, radius, universal
        self.target = nn.Sequential(backbone, nn.Linear(backbone.num_features, outputs))
        made = dict(self.target.named_parameters())
        self.shapes = {name: value.shape for name, value in made.items()}
        self.hypernetwork = HyperNetwork(size, hidden, torch.cat([value.flatten() for value in made.values()]))
        for name in self.shapes:
            owner, _, own = name.rpartition(".")
            module = self.target.get_submodule(owner)
            delattr(module, own)
            module.register_buffer(own, torch.empty(0), persistent=False)  # replaced in each forward pass
        self.embeddings, self.radii = GrowingParameters(), GrowingParameters()
        self.task, self.growth = 0, 1.0

    def add_task(self) -> None:
        """Append e_t, drawn from N(0, 1), and rho_t = 0."""
        like = next(self.hypernetwork.parameters())
        self.embeddings.append(torch.randn(self.size).to(like))
        self.radii.append(torch.zeros(self.size).to(like))

    def boxes(self, tasks: Sequence[int], growth: float = 1.0) -> tuple[Tensor, Tensor]:
        """Centres and half-widths of the boxes of tasks, ``(n, M)`` each."""
        centres = torch.stack([self.embeddings[task] for task in tasks])
        widths = torch.stack([self.radii[task] for task in tasks]).softmax(dim=1)
        if self.universal:
            centres = 0.5 * self.radius / self.size * centres.cos()
        return centres, growth * self.radius * widths

    def intersection(self) -> tuple[Tensor, Tensor]:
        """Centre and half-widths of the intersection of the boxes of all tasks, ``(1, M)`` each."""
        centres, widths = self.boxes(range(len(self.embeddings)))
        low, high = (centres - widths).amax(dim=0), (centres + widths).amin(dim=0)
        return ((low + high) / 2)[None], ((high - low) / 2).clamp(min=0)[None]

    def middle(self, tasks: Sequence[int]) -> Tensor:
        """Middle weights of tasks, ``(n, P)``."""
        return self._generate(*self.boxes(tasks))[0]

    def _made(self) -> tuple[Tensor, Tensor]:
        """Middle and half-width of the present weights, ``(P,)`` each."""
        box = self.intersection() if self.task < 0 else self.boxes([self.task], self.growth)
        middle, radius = self._generate(*box)
        return middle[0], radius[0]

    def _generate(self, centre: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(centre.device.type, enabled=False):  # the loss compares weights with earlier weights
            made: tuple[Tensor, Tensor] = self.hypernetwork(centre, radius)
        return made

    def _named(self, weights: Tensor) -> dict[str, Tensor]:
        parts = torch.split(weights, [shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def forward(self, images: Tensor) -> Tensor:
        return self._run(self._made()[0], images)

    def _run(self, weights: Tensor, images: Tensor) -> Tensor:
        outputs: Tensor = functional_call(self.target, self._named(weights), (images,))
        return outputs

    def interval(self, images: Tensor, middle: Tensor, kind: Intervals) -> tuple[Tensor, Tensor, Tensor]:
        """Lower, middle and upper outputs, ``(B, outputs)`` each.

        Args:
            images: ``(B, C, H, W)``.
            middle: Outputs of the middle weights, ``(B, outputs)``.
            kind: ``full`` for bounds through all layers, ``light`` for the sorted outputs of three networks.
        """
        weights, radius = self._made()
        ends = weights - radius, weights + radius
        if kind == "light":
            three = torch.stack([self._run(ends[0], images), middle, self._run(ends[1], images)])
            low, between, high = three.sort(dim=0).values
            return low, between, high
        backbone, last = cast(MLP, self.target[0]), cast(nn.Linear, self.target[1])
        lowest, highest = (self._named(end) for end in ends)
        names = {id(module): name for name, module in self.target.named_modules()}
        x_low = x_high = images.flatten(1)
        for module in (*backbone.layers, last):
            if isinstance(module, nn.Linear):
                name = names[id(module)]
                bounds = ((ends[f"{name}.weight"], ends[f"{name}.bias"]) for ends in (lowest, highest))
                x_low, x_high = interval_linear(x_low, x_high, *bounds)
            elif isinstance(module, nn.ReLU):
                x_low, x_high = x_low.relu(), x_high.relu()
        return x_low, middle, x_high


def interval_linear(
    x_low: Tensor, x_high: Tensor, low: tuple[Tensor, Tensor], high: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Bounds of ``x W^T + b`` for all x, W, b between their bounds.

    Args:
        x_low: Lower bounds, ``(B, n)``: at least 0, or the same tensor as ``x_high``, whose signs are then arbitrary.
        x_high: Upper bounds, ``(B, n)``.
        low: Lower bounds of W, ``(m, n)``, and b, ``(m,)``.
        high: Upper bounds of W and b.

    Returns:
        Lower and upper bounds, ``(B, m)`` each.
    """
    (w_low, b_low), (w_high, b_high) = low, high
    if x_low is x_high:
        positive, negative = x_low.clamp(min=0), x_low.clamp(max=0)
        lower = F.linear(positive, w_low, b_low) + F.linear(negative, w_high)
        return lower, F.linear(positive, w_high, b_high) + F.linear(negative, w_low)
    lower = F.linear(x_low, w_low.clamp(min=0), b_low) + F.linear(x_high, w_low.clamp(max=0))
    return lower, F.linear(x_high, w_high.clamp(min=0), b_high) + F.linear(x_low, w_high.clamp(max=0))


class OutputsOfTask(Head):
    """Places the outputs of a task at the columns of its classes; all other columns are 1 below the smallest of them.

    Attributes:
        places: Column of each output that is used, int64 ``(k,)``.
        outputs: Index of each output that is used, int64 ``(k,)``.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.places = self.outputs = torch.zeros(0, dtype=torch.int64)

    def new_block(self, num_new: int) -> nn.Module:
        block = nn.Module()
        block.register_buffer("weight", torch.zeros(num_new, 0))  # says how many columns there are
        return block

    def forward(self, features: Tensor) -> Tensor:
        used = features[:, self.outputs.to(features.device)]
        below = used.detach().amin(dim=1, keepdim=True) - 1
        logits = below.expand(-1, self.num_columns).clone()
        return logits.index_copy(1, self.places.to(features.device), used)


def interval_entropy(low: Tensor, high: Tensor) -> Tensor:
    """Entropy of ``softmax((low + high)/2)``, each class weighted by ``1/(high - low)``, ``(B, k)`` to ``(B,)``."""
    logs = ((low + high) / 2).log_softmax(dim=1)
    return -(logs.exp() * logs / (high - low).clamp(min=_LEAST_WIDTH)).sum(dim=1)


def _has_dropout(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Dropout) for part in module.modules())


class HyperInterval(TaskIncremental):
    """A hypernetwork makes the weights of each task from a box of embeddings; earlier boxes keep their weights.

    Args:
        size: Size of an embedding, M, at least 1.
        hidden: Units of the hidden layers of the hypernetwork.
        radius: gamma, at least 0; 0 is a hypernetwork without intervals (von Oswald et al., ICLR 2020).
        nominal_weight: kappa at its end, in [0, 1].
        nominal_decay: Decrease of kappa per step, at least 0.
        regularization: beta, at least 0.
        intervals: ``full`` for bounds through the layers of an MLP, ``light`` for three networks.
        universal: Whether one network predicts all tasks, for streams whose later tasks have no new classes.
        kwargs: Options of the base class. The network has no head of its own.

    Raises:
        ValueError: If an option is outside its range, a head is given, or ``full`` intervals are asked for a backbone
            that is not an MLP, or one with dropout.
    """

    targets: Tensor

    traits = Traits(family="exemplar-free", paper="Krukowski et al., 2024, arXiv:2405.15444", task_ids="inferred")

    def __init__(
        self,
        *,
        size: int = 72,
        hidden: Sequence[int] = (75, 75),
        radius: float = 1.0,
        nominal_weight: float = 0.5,
        nominal_decay: float = 5e-5,
        regularization: float = 0.01,
        intervals: Intervals = "light",
        universal: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        at_least(self, 1, size=size, hidden=min(hidden, default=1))
        at_least(self, 0, radius=radius, nominal_decay=nominal_decay, regularization=regularization)
        within(self, "[0, 1]", nominal_weight=nominal_weight)
        one_of(self, get_args(Intervals), intervals=intervals)
        if kwargs.get("head") is not None:
            raise ValueError("HyperInterval: remove head; the hypernetwork makes the last layer too")
        self.size, self.hidden, self.radius, self.universal = size, tuple(hidden), radius, universal
        self.nominal_weight, self.nominal_decay = nominal_weight, nominal_decay
        self.regularization, self.intervals = regularization, intervals
        self._nominal = 1.0  # kappa of the step
        self.register_buffer("targets", torch.zeros(0, 0))  # middle weights of earlier tasks before the present one
        if universal:
            self.traits = self.traits.but(task_ids="unused", scenarios=("domain-incremental", "online"))

    @property
    def backbone(self) -> GeneratedBackbone:
        backbone = self.network.backbone
        assert isinstance(backbone, GeneratedBackbone)
        return backbone

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        backbone = self.network.backbone
        if self.intervals == "full" and (not isinstance(backbone, MLP) or _has_dropout(backbone)):
            raise ValueError(
                f"HyperInterval: full intervals need an MLP without dropout, the backbone is {type(backbone).__name__};"
                " use --model.intervals light"
            )
        self.network.head = OutputsOfTask(0)

    def begin_task(self, task: Task) -> None:
        if task.is_first:
            self._generate(self._num_outputs())
        super().begin_task(task)
        if len(task.columns) > self.backbone.num_features:
            raise ValueError(
                f"HyperInterval: task {task.name!r} has {len(task.columns)} classes, the network has "
                f"{self.backbone.num_features} outputs, as many as the largest task of the stream in which it began; "
                "split the task"
            )
        before = range(task.index)
        self.targets = self.backbone.middle(before).detach() if before else self.targets[:0]
        self.backbone.add_task()

    def _num_outputs(self) -> int:
        stream = self.data.stream
        return len(stream.order) if self.universal else max(len(task.columns) for task in stream.tasks)

    def _generate(self, outputs: int) -> None:
        """Put a hypernetwork in place of the weights of the backbone."""
        dense = cast(Backbone, self.network.backbone)
        device = next(dense.parameters(), self.targets).device
        self.network.backbone = GeneratedBackbone(
            dense, outputs, hidden=self.hidden, size=self.size, radius=self.radius, universal=self.universal
        ).to(device)
        self.network.head.num_features = outputs

    def frozen(self) -> list[nn.Module]:
        later = [] if self.task.is_first else list(batch_norms(self.network.backbone))
        return [*super().frozen(), *later]

    def trainable(self) -> list[nn.Parameter]:
        self._select(self.task.index)
        own = {id(group[self.task.index]) for group in (self.backbone.embeddings, self.backbone.radii)}
        own |= {id(parameter) for parameter in self.backbone.hypernetwork.parameters()}
        return [parameter for parameter in super().trainable() if id(parameter) in own]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        steps = int(self.trainer.num_training_batches)
        half = steps * (self.phase.options.epochs or 1) / 2
        step = min(self.epoch * steps + batch_idx, half)
        self.backbone.growth = step / half
        self._nominal = max(1 - self.nominal_decay * step, self.nominal_weight)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        head, index = self.network.head, self.task.index
        low, middle, high = self.backbone.interval(batch.images, output.features, self.intervals)
        low, high = head(low), head(high)
        labels = F.one_hot(batch.labels.clamp(min=0), low.shape[1]).bool()
        nominal, worst = (
            self.classification_loss(output._replace(logits=logits), batch)
            for logits in (head(middle), torch.where(labels, low, high))
        )
        terms = {"ce": self._nominal * nominal, "worst_ce": (1 - self._nominal) * worst}
        if index and self.regularization:
            change = full_precision(self.backbone.middle(range(index))) - self.targets
            terms["regularization"] = self.regularization / index * change.square().sum() / index
        return terms

    def predict_task(self, images: Tensor, task: int) -> Tensor:
        with self._selected(task):
            return self.network.classify(images)

    def predict(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        if self.universal:
            return self.predict_task(images, -1)
        return super().predict(images, self.infer_tasks(images) if tasks is None else tasks)

    def infer_tasks(self, images: Tensor) -> Tensor:
        """Task of each image, the one whose logits have the lowest entropy, int64 ``(B,)``."""
        entropies = []
        for task in range(len(self.task_columns)):
            with self._selected(task):
                low, _, high = self.backbone.interval(images, self.backbone(images), self.intervals)
                used = cast(OutputsOfTask, self.network.head).outputs.to(low.device)
                entropies.append(interval_entropy(full_precision(low)[:, used], full_precision(high)[:, used]))
        return torch.stack(entropies).argmin(dim=0)

    def bytes_kept(self) -> dict[str, int]:
        return {**super().bytes_kept(), "weights": self.targets.nbytes}

    def _select(self, task: int) -> None:
        """Use the weights and the columns of a task; -1 for the network of all tasks."""
        self.backbone.task, self.backbone.growth = task, 1.0
        places = self.task_columns.any(dim=0) if task < 0 else self.task_columns[task]
        head = cast(OutputsOfTask, self.network.head)
        head.places = places.nonzero()[:, 0]
        head.outputs = head.places if self.universal else torch.arange(len(head.places))

    @contextmanager
    def _selected(self, task: int) -> Iterator[None]:
        backbone, head = self.backbone, cast(OutputsOfTask, self.network.head)
        present = backbone.task, backbone.growth, head.places, head.outputs
        self._select(task)
        try:
            yield
        finally:
            backbone.task, backbone.growth, head.places, head.outputs = present

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        restore_shapes(self, state_dict, prefix, ("targets",))
        made = state_dict.get(f"{prefix}network.backbone.hypernetwork.layers.{len(self.hidden)}.bias")
        if made is not None and not isinstance(dense := self.network.backbone, GeneratedBackbone):
            others = sum(parameter.numel() for parameter in dense.parameters())
            with torch.random.fork_rng(devices=[]):  # the initial values are overwritten
                self._generate((len(made) - others) // (cast(Backbone, dense).num_features + 1))
        super()._load_from_state_dict(state_dict, prefix, *args)
