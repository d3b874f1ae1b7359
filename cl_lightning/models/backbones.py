"""Backbones from samples to feature vectors: small networks of continual-learning papers, and any timm model by name.

A backbone class takes the shape of a sample as first argument and options by keyword: a config names the class and
its options, and the shape comes from the data. Initial weights are drawn from torch's global generator, as in torch's
own layers: seed it before building the network. Convolutions are initialised from He's normal distribution by fan-out
(He et al. 2015, arXiv:1502.01852), batch norms with scale 1 and shift 0.

An option that several classes share has the same default in all of them, None where necessary: if a config names
another class than the default class, jsonargparse passes the values of the default class to it.
"""

import copy
import difflib
import math
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from numbers import Integral
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_lightning.batch import ImageShape
from cl_lightning.checks import at_least, one_of, reason
from cl_lightning.models.residual import BasicBlock, PadShortcut, Stage
from cl_lightning.models.weights import CLASSIFIERS, load_weights, read_classifier

__all__ = [
    "MLP",
    "Backbone",
    "BasicBlock",
    "CifarResNet",
    "PadShortcut",
    "ResNet",
    "ResNet18",
    "ResNet20",
    "ResNet32",
    "ResNet56",
    "SlimResNet18",
    "Timm",
    "read_classifier",
]


_SHAPES = {1: "(features,)", 2: "(channels, length)", 3: "(channels, height, width)"}


class Backbone(nn.Module):
    """Base class of backbones: samples, such as images, to feature vectors.

    Attributes:
        image_shape: Shape of the samples that the network was built for: channels, height and width of images.
        num_features: Size of the feature vector of a sample, d.
        dimensions: Numbers of dimensions of a sample that the class takes: 3 for images, 2 for sequences, 1 for vectors
            and tokens. A network for images sets ``(3,)``.
        takes_tokens: Whether samples are tokens, int64, instead of floating-point numbers.
        for_pixels: Whether the features are a map, ``(B, num_features, h, w)``, for classes of pixels.
        has_maps: Whether ``forward`` takes a list as second argument, to which it appends the feature map at the end of
            each stage, before its ReLU, ``(B, C, H, W)``.

    Raises:
        ValueError: If the shape has another number of dimensions, or a number that is not positive.
    """

    num_features: int
    dimensions: ClassVar[tuple[int, ...]] = (1, 2, 3)
    takes_tokens: bool = False
    for_pixels: ClassVar[bool] = False
    has_maps: bool = False

    def __init__(self, image_shape: ImageShape) -> None:
        super().__init__()
        if len(image_shape) not in self.dimensions or min(image_shape) < 1:
            taken = " or ".join(_SHAPES[count] for count in self.dimensions)
            raise ValueError(
                f"{type(self).__name__}: image_shape {tuple(image_shape)}; it takes samples {taken}, each number at "
                "least 1; MLP takes any shape, TableResNet vectors, ConvNet1d sequences and tokens, the others images"
            )
        self.image_shape: ImageShape = tuple(image_shape)

    def forward(self, images: Tensor) -> Tensor:
        """Features ``(B, num_features)`` of normalised images ``(B, C, H, W)``."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def divide(self) -> tuple[nn.Module, nn.Module]:
        """The backbone in two parts that share its layers: all stages except the last one, and the last stage.

        The second part maps the output of the first one to features ``(B, num_features)``.

        Raises:
            ValueError: If the backbone does not say where its last stage begins.
        """
        raise ValueError(
            f"{type(self).__name__} is not divided into stages; use MLP, ConvNet or ResNet, or write a method divide"
        )


def divided_chain(layers: nn.Sequential, owner: str) -> tuple[nn.Module, nn.Module]:
    """A chain of layers in two parts, of which the second begins with the last layer that has weights.

    Raises:
        ValueError: If fewer than two layers have weights.
    """
    places = [place for place, layer in enumerate(layers) if next(layer.parameters(), None) is not None]
    if len(places) < 2:
        raise ValueError(f"{owner}: layers with weights: {len(places)}; to divide it, use at least 2")
    return layers[: places[-1]], layers[places[-1] :]


def built(factory: Callable[[ImageShape], Backbone], image_shape: ImageShape) -> Backbone:
    """The backbone of a factory, for images of a given shape.

    Args:
        factory: Class of backbones, or a function that builds one.
        image_shape: Channels, height, width.

    Raises:
        ValueError: If the factory is a network and builds none, does not take the shape, or the network does not state
            its number of features.
    """
    if isinstance(factory, nn.Module):
        raise ValueError(
            f"{type(factory).__name__}: give the class as backbone, not an object of it; it is built for the shape of "
            "the images"
        )
    try:
        backbone = factory(image_shape)
    except TypeError as error:
        if error.__traceback__ is None or error.__traceback__.tb_next is not None:
            raise
        name = getattr(factory, "__name__", type(factory).__name__)
        raise ValueError(
            f"{name}: take image_shape, which is {tuple(image_shape)} here, as the first argument, and give all others "
            f"a default ({error})"
        ) from error
    width = getattr(backbone, "num_features", None)
    if not isinstance(backbone, nn.Module) or not isinstance(width, Integral) or width < 1:
        raise ValueError(
            f"{type(backbone).__name__}: set num_features, the size of a feature vector, in the constructor; a "
            f"backbone is a module that returns features (images, num_features), and here num_features is {width}"
        )
    return backbone


class ResNet(Backbone):
    """Residual network of basic blocks; each stage after the first halves the resolution and doubles the channels.

    Modules have torchvision's names (``conv1``, ``layer1.0.conv1``, ``layer2.0.downsample.0``, ...). A weight file is
    read by :func:`~cl_lightning.models.weights.load_weights`: any common prefix of the keys is found, also in a
    checkpoint of a run. ``shortcut`` is read as ``downsample``, keys of ``linear``, ``fc``, ``classifier`` and
    ``head`` are ignored, and ``num_batches_tracked`` may be missing; all other keys must match in name and shape.

    Args:
        image_shape: Channels, height, width; any size, since the last feature map is averaged.
        blocks: Number of blocks in each stage.
        width: Channels of the first stage.
        stem: ``"small"``: 3x3 convolution; ``"imagenet"``: 7x7 with stride 2, then max-pooling with stride 2.
        shortcut: Where the shape of the feature map changes: ``"pad"`` is `PadShortcut`, ``"conv"`` a 1x1 convolution
            and batch norm.
        last_relu: Whether the last block ends with a ReLU. Without it, features have both signs, as cosine classifiers
            require (LUCIR, Hou et al. CVPR 2019).
        weights: Weight file (.pt, .pth, .safetensors) to load.

    Raises:
        ValueError: If an option is out of range or the file does not match the network.
    """

    dimensions = (3,)
    has_maps = True

    def __init__(
        self,
        image_shape: ImageShape,
        *,
        blocks: Sequence[int],
        width: int,
        stem: Literal["small", "imagenet"] = "small",
        shortcut: Literal["pad", "conv"],
        last_relu: bool = True,
        weights: str | None = None,
    ) -> None:
        super().__init__(image_shape)
        name = type(self).__name__
        at_least(self, 1, width=width)
        if not blocks or min(blocks) < 1:
            raise ValueError(f"{name}: blocks is {tuple(blocks)}; give numbers of at least 1")
        one_of(self, ("small", "imagenet"), stem=stem)
        one_of(self, ("pad", "conv"), shortcut=shortcut)
        kernel, stride = (3, 1) if stem == "small" else (7, 2)
        self.conv1 = nn.Conv2d(image_shape[0], width, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.Identity() if stem == "small" else nn.MaxPool2d(3, 2, 1)
        self.stages = tuple(f"layer{stage + 1}" for stage in range(len(blocks)))
        channels = width
        for stage, count in enumerate(blocks):
            layer = Stage()
            for block in range(count):
                step = 2 if stage > 0 and block == 0 else 1
                relu = last_relu or (stage + 1, block + 1) != (len(blocks), count)
                layer.append(BasicBlock(channels, width << stage, stride=step, shortcut=shortcut, last_relu=relu))
                channels = width << stage
            self.add_module(self.stages[stage], layer)
        self.num_features = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if weights is not None:
            load_weights(
                self,
                weights,
                owner=name,
                left_out=CLASSIFIERS,
                renamed={"shortcut": "downsample"},
                first_convs=("conv1",),
            )

    def feature_map(self, images: Tensor, kept: list[Tensor] | None = None) -> Tensor:
        """Feature map before average pooling, ``(B, num_features, h, w)``, of images ``(B, C, H, W)``.

        Args:
            images: Normalised images.
            kept: List to which the map of each stage is appended, before the ReLU of its last block.
        """
        maps: Tensor = self.maxpool(F.relu(self.bn1(self.conv1(images))))
        for stage in self.stages:
            maps = getattr(self, stage)(maps, kept)
        return maps

    def forward(self, images: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        return self.feature_map(images, maps).mean((2, 3))

    def divide(self) -> tuple[nn.Module, nn.Module]:
        if len(self.stages) < 2:
            raise ValueError(f"{type(self).__name__}: it has one stage; to divide it, use at least 2")
        *earlier, last = (getattr(self, stage) for stage in self.stages)
        return nn.Sequential(self.conv1, self.bn1, nn.ReLU(), self.maxpool, *earlier), nn.Sequential(last, _Mean())


class _Mean(nn.Module):
    """Global average pooling, ``(B, d, h, w)`` to ``(B, d)``."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.mean((2, 3))


class CifarResNet(ResNet):
    """ResNet for small images with stages of 16, 32 and 64 channels (He et al., CVPR 2016, arXiv:1512.03385, sec. 4.2).

    64 features. Parameters for colour images: 269,072 at depth 20, 463,504 at 32, 852,368 at 56; convolutional
    shortcuts (option B of the paper) add 2,752.

    Args:
        image_shape: Channels, height, width.
        depth: Number of layers with weights, including a classifier: 6n + 2.
        width: Channels of the first stage; None for 16, as in the paper. The number of features is 4 times the width.
        shortcut: As in `ResNet`; likewise ``last_relu`` and ``weights``.

    Raises:
        ValueError: If the depth is not 6n + 2, or as in `ResNet`.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        *,
        depth: int = 32,
        width: int | None = None,
        shortcut: Literal["pad", "conv"] = "pad",
        **options: Any,
    ) -> None:
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"{type(self).__name__}: depth {depth}; it must be 6n + 2, for example 20, 32, 56 or 110")
        blocks = [(depth - 2) // 6] * 3
        super().__init__(image_shape, blocks=blocks, width=16 if width is None else width, shortcut=shortcut, **options)


class ResNet20(CifarResNet):
    """`CifarResNet` of depth 20: 269,072 parameters, 64 features."""

    def __init__(self, image_shape: ImageShape, **options: Any) -> None:
        super().__init__(image_shape, depth=20, **options)


class ResNet32(CifarResNet):
    """`CifarResNet` of depth 32, the standard network for CIFAR-100: 463,504 parameters, 64 features."""

    def __init__(self, image_shape: ImageShape, **options: Any) -> None:
        super().__init__(image_shape, depth=32, **options)


class ResNet56(CifarResNet):
    """`CifarResNet` of depth 56: 852,368 parameters, 64 features."""

    def __init__(self, image_shape: ImageShape, **options: Any) -> None:
        super().__init__(image_shape, depth=56, **options)


class ResNet18(ResNet):
    """ResNet-18 (He et al., CVPR 2016, arXiv:1512.03385, table 1), by default with a stem for small images.

    512 features. Parameters for colour images: 11,168,832 with the small stem, 11,176,512 with the ImageNet stem. With
    the ImageNet stem it equals ``resnet18`` of torchvision and timm and loads their weight files.

    Args:
        image_shape: Channels, height, width.
        width: Channels of the first stage; None for 64.
        options: Further options of `ResNet`.
    """

    def __init__(self, image_shape: ImageShape, *, width: int | None = None, **options: Any) -> None:
        width = 64 if width is None else width
        super().__init__(image_shape, blocks=(2, 2, 2, 2), width=width, shortcut="conv", **options)


class SlimResNet18(ResNet18):
    """Reduced ResNet-18 of online continual learning (GEM, Lopez-Paz & Ranzato, NeurIPS 2017, arXiv:1706.08840).

    160 features, 1,093,140 parameters for colour images. Departs from the code of GEM in the pooling: the average is
    global instead of over 4x4 pixels. Both are equal for 32x32 images; for larger images, GEM has a multiple of 160
    features.
    """

    def __init__(self, image_shape: ImageShape, *, width: int | None = None, **options: Any) -> None:
        super().__init__(image_shape, width=20 if width is None else width, **options)


class MLP(Backbone):
    """Fully connected network on all numbers of a sample; 474,400 parameters for 28x28 grey images.

    Layers are initialised as `nn.Linear`.

    Two layers of 400 units are the network for Split-MNIST of van de Ven & Tolias (2019, arXiv:1904.07734), who use
    1,000 units for Permuted-MNIST.

    Args:
        image_shape: Shape of a sample, of any number of dimensions up to 3.
        hidden: Units of each layer; the features are the output of the last layer. Empty: the features are the pixels.
        dropout: Probability with which a unit is set to zero after each layer during training, in [0, 1).

    Raises:
        ValueError: If a layer has no unit or the dropout is out of range.
    """

    def __init__(self, image_shape: ImageShape, *, hidden: Sequence[int] = (400, 400), dropout: float = 0.0) -> None:
        super().__init__(image_shape)
        if any(units < 1 for units in hidden):
            raise ValueError(f"MLP: hidden {tuple(hidden)}; each layer needs at least 1 unit")
        if not 0 <= dropout < 1:
            raise ValueError(f"MLP: dropout {dropout}; it must be in [0, 1)")
        sizes = (math.prod(image_shape), *hidden)
        self.layers = nn.Sequential(nn.Flatten())
        for inputs, units in pairwise(sizes):
            self.layers.extend([nn.Linear(inputs, units), nn.ReLU()])
            if dropout:
                self.layers.append(nn.Dropout(dropout))
        self.num_features = sizes[-1]

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layers(images)
        return features

    def divide(self) -> tuple[nn.Module, nn.Module]:
        return divided_chain(self.layers, type(self).__name__)


class Timm(Backbone):
    """Any model of timm (Wightman 2019, doi:10.5281/zenodo.4414861) without its last layer, as attribute ``model``.

    Args:
        image_shape: Channels, height, width.
        name: timm's name with the tag of the weights (``vit_base_patch16_224.augreg_in21k``); the default tag of a name
            without tag changes with timm's version. Names of earlier versions (``vit_base_patch16_224_in21k``) are
            replaced by the present ones. ``hf-hub:`` and ``local-dir:`` names are supported.
        pretrained: Whether to load the weights of the tag, from the network or timm's cache.
        weights: Weight file (.pt, .pth, .safetensors) to load: a state dict of any float type, also within a checkpoint
            or under a prefix. Keys of the model's classifier are ignored, and weights for RGB images are adapted to
            other channels as by timm; all other keys must match in name and shape.
        img_size: Side of the images in pixels, to build a model with a fixed input size (most ViTs) for another size.
        drop_path_rate: Probability with which a residual branch is skipped during training; None for the model's
            default.
        drop_rate: Dropout probability during training; None for the model's default.
        projection: Whether to keep the last linear layer of the model. In the image towers of CLIP it is the projection
            to the space of text embeddings (``vit_base_patch16_clip_224.openai``: 512 features with it, 768 without);
            in other models it is the classifier.
        kwargs: Further arguments of the model, for example ``{global_pool: avg}`` or ``{pad_type: same}``.

    Raises:
        ValueError: If timm has no such model, the model does not accept an option or the images, it has no last linear
            layer to keep, or the file does not match.
        ConnectionError: If the pretrained weights cannot be downloaded.
    """

    dimensions = (3,)

    def __init__(
        self,
        image_shape: ImageShape,
        *,
        name: str,
        pretrained: bool = False,
        weights: str | None = None,
        img_size: int | None = None,
        drop_path_rate: float | None = None,
        drop_rate: float | None = None,
        projection: bool = False,
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(image_shape)
        if pretrained and weights is not None:
            raise ValueError(f"Timm: {name} has pretrained=True and weights={weights!r}; give one of them")
        import timm  # the import takes about 1 s, and most runs do not need it

        name = _present_name(name, pretrained)
        # timm drops arguments that are None
        options: dict[str, Any] = {"img_size": img_size, "drop_path_rate": drop_path_rate, "drop_rate": drop_rate}
        options |= kwargs or {}
        layers: dict[str, Any] = {} if projection else {"num_classes": 0}
        try:
            self.model: nn.Module = timm.create_model(
                name, pretrained=pretrained, in_chans=image_shape[0], **layers, **options
            )
        except TypeError as error:
            raise ValueError(f"Timm: {name} does not accept an option ({error}); remove the option") from error
        except OSError as error:
            raise ConnectionError(
                f"Timm: give the path of a state dict as weights=, with pretrained=False: the files of {name} cannot "
                f"be downloaded ({reason(error)}); a machine with network access can download them"
            ) from error
        if projection and not isinstance(self.model.get_classifier(), nn.Linear):  # type: ignore[operator]
            raise ValueError(f"Timm: remove projection: {name} has no last linear layer to keep")
        if weights is not None:
            facts = getattr(self.model, "pretrained_cfg", {})
            last, first = (_names(facts.get(key)) for key in ("classifier", "first_conv"))
            left_out = () if projection else last or ("head",)
            load_weights(self.model, weights, owner=f"Timm: {name}", left_out=left_out, first_convs=first)
        self.num_features = self._measure(name)

    def _measure(self, name: str) -> int:
        """Size of the model's output, from a copy on the meta device: no memory, no computation, no random numbers."""
        with torch.no_grad():
            ghosts = {id(tensor): tensor.to("meta") for tensor in (*self.model.parameters(), *self.model.buffers())}
            ghost = copy.deepcopy(self.model, ghosts).eval()
        try:
            with torch.no_grad():
                features = ghost(torch.empty(1, *self.image_shape, device="meta"))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"Timm: {name} does not accept images of shape {self.image_shape} ({error}); resize the images or, if "
                f"the model has this option, give img_size={self.image_shape[1]}"
            ) from error
        if not isinstance(features, Tensor) or features.ndim != 2:
            raise ValueError(f"Timm: {name} does not return one vector per image; do not disable the model's pooling")
        return features.shape[1]

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.model(images)
        return features


def _names(value: Any) -> tuple[str, ...]:
    return () if not value else (value,) if isinstance(value, str) else tuple(value)


def _present_name(name: str, pretrained: bool) -> str:
    """The name of a model in the installed timm, after checks that it exists and, if needed, has weights."""
    if ":" in name:  # hf-hub: or local-dir:, which timm resolves itself
        return name
    import timm

    name = name.removeprefix("timm/")  # as on the Hugging Face hub
    earlier = timm.models.get_deprecated_models()
    if name in earlier and (present := earlier[name]) is not None:
        warnings.warn(f"Timm: {name} is called {present} in timm {timm.__version__}", stacklevel=3)
        name = present
    elif name in earlier:
        raise ValueError(f"Timm: {name} was removed from timm before {timm.__version__}; use another model")
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=4, cutoff=0.4)
        raise ValueError(f"Timm: timm {timm.__version__} has no model {architecture!r}; the closest are {close}")
    if (tag or pretrained) and not timm.is_model_pretrained(name):
        tags = timm.list_pretrained(f"{architecture}.*")
        raise ValueError(
            f"Timm: timm {timm.__version__} has no weights {name!r}; for this model it has {', '.join(tags) or 'none'}"
        )
    return name
