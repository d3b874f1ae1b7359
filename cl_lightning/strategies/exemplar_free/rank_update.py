"""Incremental rank updates (Hyder, Shao, Hou, Markopoulos, Prater-Bennette & Asif, ECCV 2022, arXiv:2207.09074).

The weight of each layer is a matrix of low rank, to which each task adds r_2 dimensions. With U_k and V_k the columns
that task k has added, R_k = r_1 + k r_2 columns so far, and a selector s_k over all of them, task k predicts with

    W_k = [V_0 ... V_k] diag(s_k) [U_0 ... U_k]^T    (outputs, inputs)

and with biases b_k and a block of the head of its own. Task k trains U_k, V_k, s_k, b_k and its block. U_k and V_k
start with orthonormal columns, s_k with 0 for the old columns and 1 for the new ones, b_k with 0. Nothing of an earlier
task is trained, so its predictions never change. The loss is the cross-entropy, or, in the authors' code, the mean
squared error of the probabilities, 1/(B C) sum_i sum_c (softmax(z_i)_c - [c = y_i])^2 over the C classes of the task.
r_1 -> first_rank, r_2 -> rank.
A kernel (outputs, channels, height, width) is a matrix with channels * height * width inputs, which is our choice. A
layer has at most as many columns per task as it has inputs and outputs. Parameters of other layers (normalisation) are
trained in the first task only and frozen afterwards, running statistics included.
"""

from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from cl_lightning.batch import Batch, ImageShape
from cl_lightning.checks import at_least, one_of
from cl_lightning.losses import full_precision, masked_logits
from cl_lightning.memory import linear_maps
from cl_lightning.models import Backbone, Network, batch_norms
from cl_lightning.strategies.base import BY_TASK, TaskIncremental, routed
from cl_lightning.strategy import Output, Task, Traits

Loss = Literal["ce", "mse"]


class LowRankLayer(nn.Module):
    """Factors of the weight of one layer, for each task.

    Args:
        shape: Shape of the weight: ``(outputs, inputs)`` or ``(outputs, channels, height, width)``.
        bias: Whether the layer has a bias.

    Attributes:
        inputs: U_k of each task, ``(inputs, r)``.
        outputs: V_k of each task, ``(outputs, r)``.
        selectors: s_k of each task, ``(R_k,)``.
        biases: b_k of each task, ``(outputs,)``; empty without bias.
    """

    def __init__(self, shape: torch.Size, *, bias: bool) -> None:
        super().__init__()
        self.shape, self.bias = shape, bias
        self.inputs, self.outputs = nn.ParameterList(), nn.ParameterList()
        self.selectors, self.biases = nn.ParameterList(), nn.ParameterList()

    def add_task(self, rank: int, like: Tensor) -> None:
        """Append the parameters of a task with ``rank`` new columns, on the device of ``like``; drawn on the CPU."""
        sides = self.shape[0], self.shape[1:].numel()
        rank = min(rank, *sides)
        old = len(self.selectors[-1]) if len(self.selectors) else 0
        for factors, side in zip((self.outputs, self.inputs), sides, strict=True):
            columns = nn.init.orthogonal_(torch.empty(side, rank))
            factors.append(nn.Parameter(columns.to(like)))
        selector = torch.cat([torch.zeros(old), torch.ones(rank)])
        self.selectors.append(nn.Parameter(selector.to(like)))
        if self.bias:
            self.biases.append(nn.Parameter(torch.zeros(self.shape[0]).to(like)))

    def of(self, task: int) -> dict[str, Tensor]:
        """Weight W_k, of the shape of the layer, and bias b_k, if there is one, by name."""
        left, right = (torch.cat(list(x)[: task + 1], dim=1) for x in (self.outputs, self.inputs))
        weight = ((left * self.selectors[task]) @ right.T).view(self.shape)
        return {"weight": weight, "bias": self.biases[task]} if self.bias else {"weight": weight}

    def keep(self, tasks: int) -> None:
        """Remove the parameters of all tasks except the first ``tasks``."""
        for name in ("inputs", "outputs", "selectors", "biases"):
            setattr(self, name, nn.ParameterList(list(getattr(self, name))[:tasks]))

    def parameters_of(self, task: int) -> list[nn.Parameter]:
        """What a task trains."""
        lists = (self.outputs, self.inputs, self.selectors, *([self.biases] if self.bias else []))
        return [list(x)[task] for x in lists]


class LowRankBackbone(Backbone):
    """A backbone whose linear layers and convolutions have weights of low rank, which grow by task.

    Args:
        backbone: Any backbone; the weights and biases of its layers are removed.
        first_rank: Columns of the first task, r_1.
        rank: Columns of each later task, r_2.

    Attributes:
        task: Index of the task whose weights are used.

    Raises:
        ValueError: If the backbone has no such layers, or a convolution with groups.
    """

    def __init__(self, backbone: Backbone, *, first_rank: int, rank: int) -> None:
        super().__init__(backbone.image_shape)
        found = linear_maps(backbone, "RankUpdate")
        if not found:
            raise ValueError(f"RankUpdate: {type(backbone).__name__} has no linear layers and convolutions; use others")
        self.first_rank, self.rank, self.task = first_rank, rank, 0
        self.num_features = backbone.num_features
        self.factors = nn.ModuleDict()  # names may not contain dots
        for name, layer in found.items():
            self.factors[name.replace(".", "/")] = LowRankLayer(layer.weight.shape, bias=layer.bias is not None)
            for own in ("weight", "bias"):
                if getattr(layer, own) is not None:
                    delattr(layer, own)
                    layer.register_buffer(own, torch.empty(0), persistent=False)  # replaced in each forward pass
        self.backbone = backbone

    @property
    def layers(self) -> dict[str, LowRankLayer]:
        """Factors by the name of the layer."""
        return {name.replace("/", "."): cast(LowRankLayer, layer) for name, layer in self.factors.items()}

    @property
    def tasks(self) -> int:
        """Number of tasks that have been added."""
        return len(next(iter(self.layers.values())).selectors)

    def add_task(self) -> None:
        """Append the parameters of a new task to each layer."""
        like = next(iter(self.parameters()), torch.zeros(()))
        for layer in self.layers.values():
            layer.add_task(self.rank if len(layer.selectors) else self.first_rank, like)

    def forward(self, images: Tensor) -> Tensor:
        made = {f"{name}.{own}": x for name, layer in self.layers.items() for own, x in layer.of(self.task).items()}
        features: Tensor = functional_call(self.backbone, made, (images,))
        return features

    def restore_network(self, student: Network, state: Mapping[str, Any], prefix: str) -> None:
        """Prepare for loading ``state``: have as many tasks as it has."""
        first, tasks = next(iter(self.factors)), 0
        while f"{prefix}factors.{first}.selectors.{tasks}" in state:
            tasks += 1
        with torch.random.fork_rng(devices=[]):  # the initial values are overwritten
            for layer in self.layers.values():
                layer.keep(tasks)
            while self.tasks < tasks:
                self.add_task()


class RankUpdate(TaskIncremental):
    """Weights of low rank, to which each task adds dimensions; selectors reuse the dimensions of earlier tasks.

    Args:
        first_rank: r_1, at least 1.
        rank: r_2, at least 1.
        loss: ``ce`` for cross-entropy, ``mse`` for the squared error of the probabilities.
        kwargs: Options of the base class.
    """

    traits = Traits(
        family="exemplar-free",
        paper="Hyder et al., ECCV 2022, arXiv:2207.09074",
        task_ids="needed",
        scenarios=BY_TASK,
    )

    def __init__(self, *, first_rank: int = 11, rank: int = 1, loss: Loss = "ce", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        at_least(self, 1, first_rank=first_rank, rank=rank)
        one_of(self, get_args(Loss), loss=loss)
        self.first_rank, self.rank, self.loss = first_rank, rank, loss

    @property
    def backbone(self) -> LowRankBackbone:
        backbone = self.network.backbone
        assert isinstance(backbone, LowRankBackbone)
        return backbone

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        dense = cast(Backbone, self.network.backbone)
        self.network.backbone = LowRankBackbone(dense, first_rank=self.first_rank, rank=self.rank)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.backbone.add_task()
        self.backbone.task = task.index

    def frozen(self) -> list[nn.Module]:
        later = [] if self.task.is_first else list(batch_norms(self.network.backbone))
        return [*super().frozen(), *later]

    def trainable(self) -> list[nn.Parameter]:
        self.backbone.task = self.task.index
        kept = {id(x) for layer in self.backbone.layers.values() for x in layer.parameters_of(self.task.index)}
        once = list(self.backbone.backbone.parameters()) if self.task.is_first else []
        kept |= {id(x) for x in (*once, *self.network.head.parameters())}
        return [parameter for parameter in super().trainable() if id(parameter) in kept]

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.loss == "ce":
            return {"ce": self.classification_loss(output, batch)}
        columns = self.task_columns[-1]
        found = masked_logits(full_precision(output.logits), columns).softmax(dim=1)
        wanted = F.one_hot(batch.labels.clamp(min=0), output.logits.shape[1])
        errors = (found - wanted).square().sum(dim=1) / columns.sum()  # 0 in the columns of other tasks
        labelled = batch.labels >= 0  # others are hidden
        return {"mse": (errors * labelled).sum() / labelled.sum().clamp(min=1)}

    def predict_task(self, images: Tensor, task: int) -> Tensor:
        with routed(self.backbone, task):
            return self.network.classify(images)
