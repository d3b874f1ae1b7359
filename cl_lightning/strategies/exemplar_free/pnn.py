"""Progressive Neural Networks (Rusu et al., 2016, arXiv:1606.04671).

A network, called a column, for each task. Column t has the inputs of the layers of all earlier columns as additional
inputs. With h_l^t the input of layer l + 1 of column t, and f what follows the layer (activation, pooling, ...),

    h_l^t = f( W_l^t h_{l-1}^t + b_l^t + A_l^t(h_{l-1}^1, ..., h_{l-1}^{t-1}) ),   l > 1            eq. (1), (2)
    A(h^1, ..., h^{t-1}) = sum_k U_k h^k                                               adapter: linear
    A(h^1, ..., h^{t-1}) = U relu( V [alpha_1 h^1, ..., alpha_{t-1} h^{t-1}] + c )     adapter: mlp

Only column t and its block of the head are trained in task t, so that the predictions for earlier tasks never change.
U has the shape of W and no bias; V reduces all earlier columns to the size of one of them, by a convolution of size 1
in front of a convolution; the scalars alpha start with random values in (0, 0.1), which is our choice.
The first layer has no adapter: its input is the image. The head has none either; in the paper the output layer has one.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from cl_lightning.batch import Batch, ImageShape
from cl_lightning.checks import one_of
from cl_lightning.memory import linear_maps
from cl_lightning.models import Backbone, Network
from cl_lightning.strategies.base import BY_TASK, TaskIncremental, routed
from cl_lightning.strategy import Output, Task, Traits

AdapterKind = Literal["linear", "mlp"]
Layer = nn.Linear | nn.Conv2d


def _like(layer: Layer) -> Layer:
    """A new layer of the same shape, without bias."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, layer.out_features, bias=False)
    return nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        cast(tuple[int, int], layer.kernel_size),
        cast(tuple[int, int], layer.stride),
        cast(tuple[int, int] | str, layer.padding),
        cast(tuple[int, int], layer.dilation),
        bias=False,
        padding_mode=layer.padding_mode,
    )


class LinearAdapter(nn.Module):
    """``sum_k U_k h^k`` of ``earlier`` columns."""

    def __init__(self, layer: Layer, earlier: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(_like(layer) for _ in range(earlier))

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        parts = [own(h) for own, h in zip(self.maps, inputs, strict=True)]
        return torch.stack(parts).sum(dim=0)


class MLPAdapter(nn.Module):
    """``U relu(V [alpha_k h^k]_k + c)`` of ``earlier`` columns."""

    def __init__(self, layer: Layer, earlier: int) -> None:
        super().__init__()
        self.alphas = nn.Parameter(0.1 * torch.rand(earlier))
        if isinstance(layer, nn.Linear):
            self.reduce: nn.Module = nn.Linear(earlier * layer.in_features, layer.in_features)
        else:
            self.reduce = nn.Conv2d(earlier * layer.in_channels, layer.in_channels, 1)
        self.map = _like(layer)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        scaled = torch.cat([alpha * h for alpha, h in zip(self.alphas, inputs, strict=True)], dim=1)
        result: Tensor = self.map(self.reduce(scaled).relu())
        return result


class Column(nn.Module):
    """A chain of layers with adapters from earlier columns.

    Args:
        layers: The chain.
        adapter: Kind of the adapters.
        earlier: Number of earlier columns.
    """

    def __init__(self, layers: nn.Sequential, *, adapter: AdapterKind, earlier: int) -> None:
        super().__init__()
        self.layers, self.adapters = layers, nn.ModuleDict()
        places = [place for place, layer in enumerate(layers) if isinstance(layer, Layer)]
        made = LinearAdapter if adapter == "linear" else MLPAdapter
        for place in places[1:] if earlier else ():
            self.adapters[str(place)] = made(cast(Layer, layers[place]), earlier)
        self.places = places[1:]

    def forward(self, images: Tensor, earlier: Sequence[dict[int, Tensor]]) -> tuple[Tensor, dict[int, Tensor]]:
        """Features ``(B, d)``, and the input of each layer after the first one, by its place in the chain.

        Args:
            images: ``(B, C, H, W)``.
            earlier: Inputs of the layers of each earlier column.
        """
        found, values = {}, images
        for place, layer in enumerate(self.layers):
            inputs, values = values, layer(values)
            if place in self.places:
                found[place] = inputs
                if earlier:
                    values = values + self.adapters[str(place)]([column[place] for column in earlier])
        return values, found


class ProgressiveBackbone(Backbone):
    """A column for each task; the columns of earlier tasks are computed without gradient.

    Args:
        chain: First column: a backbone with a ``Sequential`` of name ``layers``, to which all its linear layers and
            convolutions belong (``MLP``, ``ConvNet``).
        build: Builds the chain of each further column.
        adapter: ``linear`` or ``mlp``.

    Attributes:
        task: Index of the task whose column gives the features.

    Raises:
        ValueError: If the backbone is no such chain.
    """

    def __init__(self, chain: Backbone, build: Callable[[ImageShape], Backbone], *, adapter: AdapterKind) -> None:
        super().__init__(chain.image_shape)
        layers, name = getattr(chain, "layers", None), type(chain).__name__
        direct = [x for x in layers if isinstance(x, Layer)] if isinstance(layers, nn.Sequential) else []
        if not direct or len(linear_maps(chain, "PNN")) != len(direct):
            raise ValueError(f"PNN: {name} is no chain of layers; use MLP or ConvNet, with at least one layer")
        self._build, self.adapter, self.task = build, adapter, 0
        self.num_features = chain.num_features
        self.columns = nn.ModuleList([self._column(chain, 0)])

    def add_task(self) -> None:
        """Append a column."""
        like = next(self.parameters())
        column = self._column(self._build(self.image_shape), len(self.columns))
        self.columns.append(column.to(like.device, like.dtype))

    def forward(self, images: Tensor) -> Tensor:
        earlier: list[dict[int, Tensor]] = []
        with torch.no_grad():
            for column in self.columns[: self.task]:
                earlier.append(column(images, earlier)[1])
        features: Tensor = self.columns[self.task](images, earlier)[0]
        return features

    def restore_network(self, student: Network, state: Mapping[str, Any], prefix: str) -> None:
        """Prepare for loading ``state``: have as many columns as it has."""
        start = f"{prefix}columns."
        count = len({key.removeprefix(start).partition(".")[0] for key in state if key.startswith(start)})
        with torch.random.fork_rng(devices=[]):  # the initial values are overwritten
            del self.columns[max(count, 1) :]
            while len(self.columns) < count:
                self.add_task()

    def _column(self, chain: Backbone, earlier: int) -> Column:
        return Column(cast(nn.Sequential, chain.layers), adapter=self.adapter, earlier=earlier)


class PNN(TaskIncremental):
    """A network per task, with adapters from the layers of all earlier networks, which are frozen.

    Args:
        adapter: Connections from earlier columns: ``linear``, or ``mlp`` with one hidden layer.
        kwargs: Options of the base class. The backbone is a chain of layers: ``MLP`` or ``ConvNet``.
    """

    traits = Traits(
        family="exemplar-free",
        paper="Rusu et al., 2016, arXiv:1606.04671",
        task_ids="needed",
        scenarios=BY_TASK,
    )

    def __init__(self, *, adapter: AdapterKind = "mlp", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        one_of(self, get_args(AdapterKind), adapter=adapter)
        self.adapter: AdapterKind = adapter

    @property
    def backbone(self) -> ProgressiveBackbone:
        backbone = self.network.backbone
        assert isinstance(backbone, ProgressiveBackbone)
        return backbone

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        chain = cast(Backbone, self.network.backbone)
        self.network.backbone = ProgressiveBackbone(chain, self.build_backbone, adapter=self.adapter)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if not task.is_first:
            self.backbone.add_task()

    def frozen(self) -> list[nn.Module]:
        self.backbone.task = self.task.index
        return [*super().frozen(), *self.backbone.columns[: self.task.index]]

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": self.classification_loss(output, batch)}

    def predict_task(self, images: Tensor, task: int) -> Tensor:
        with routed(self.backbone, task):
            return self.network.classify(images)
