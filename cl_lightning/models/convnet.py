"""Plain convolutional networks, chains of layers without shortcuts: of task-incremental papers, and of condensation."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from cl_lightning.batch import ImageShape
from cl_lightning.checks import at_least
from cl_lightning.models.backbones import Backbone, divided_chain


class ConvNet(Backbone):
    """Convolutions with ReLU and 2x2 maximum pooling, followed by fully connected layers with ReLU.

    With the default options it is the variant of AlexNet for 32x32 pixels of HAT (Serra et al., ICML 2018,
    arXiv:1801.01423) and GPM; 64 channels of 32 x 32 pixels become 14 x 14, 128 channels 6 x 6, 256 channels 2 x 2.

    Args:
        image_shape: Channels, height, width.
        channels: Channels of each convolution, at least one.
        kernels: Kernel size of each convolution, without padding.
        hidden: Units of the fully connected layers; the features are the output of the last one. Empty: the features
            are the pixels of the last feature map.
        conv_dropout: Probability of dropout after each convolution, the last one excepted, in [0, 1).
        dropout: Probability of dropout after the last convolution and each fully connected layer, in [0, 1).

    Raises:
        ValueError: If an option is out of range, or the images are too small for the convolutions.
    """

    dimensions = (3,)

    def __init__(
        self,
        image_shape: ImageShape,
        *,
        channels: Sequence[int] = (64, 128, 256),
        kernels: Sequence[int] = (4, 3, 2),
        hidden: Sequence[int] = (2048, 2048),
        conv_dropout: float = 0.2,
        dropout: float | None = None,
    ) -> None:
        super().__init__(image_shape)
        for option, values in (("channels", channels), ("kernels", kernels), ("hidden", hidden)):
            for value in values:
                at_least(self, 1, optional=False, **{option: value})
        dropout = 0.5 if dropout is None else dropout
        if not (0 <= conv_dropout < 1 and 0 <= dropout < 1):
            raise ValueError(f"ConvNet: conv_dropout {conv_dropout}, dropout {dropout}; both must be in [0, 1)")
        if len(channels) != len(kernels) or not channels:
            raise ValueError(
                f"ConvNet: {len(channels)} channels and {len(kernels)} kernels; give as many of both, at least 1"
            )
        _, height, width = image_shape
        layers: list[nn.Module] = []
        for place, ((inputs, outputs), kernel) in enumerate(
            zip(pairwise((image_shape[0], *channels)), kernels, strict=True)
        ):
            height, width = (height - kernel + 1) // 2, (width - kernel + 1) // 2
            if min(height, width) < 1:
                raise ValueError(
                    f"ConvNet: images of {image_shape[1]} x {image_shape[2]} pixels are too small for kernels "
                    f"{tuple(kernels)}, each followed by pooling; give smaller or fewer kernels"
                )
            rate = dropout if place == len(channels) - 1 else conv_dropout
            layers += [nn.Conv2d(inputs, outputs, kernel), nn.ReLU(), nn.Dropout(rate), nn.MaxPool2d(2)]
        sizes = (channels[-1] * height * width, *hidden)
        layers.append(nn.Flatten())
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers)
        self.num_features = sizes[-1]

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layers(images)
        return features

    def divide(self) -> tuple[nn.Module, nn.Module]:
        return divided_chain(self.layers, type(self).__name__)


class InstanceNormConvNet(Backbone):
    """Blocks of a 3 x 3 convolution, instance normalisation with scale and shift, ReLU and 2 x 2 average pooling.

    With the default options it is the ConvNet of dataset condensation (Zhao, Mopuri & Bilen, ICLR 2021,
    arXiv:2006.05929). The features are the pixels of the last feature map; 32 x 32 pixels become 4 x 4.

    Args:
        image_shape: Channels, height, width.
        width: Channels of each convolution, at least 1; None for 128.
        depth: Number of blocks, at least 1.

    Raises:
        ValueError: If an option is out of range, or the images are too small for the blocks.
    """

    dimensions = (3,)

    def __init__(self, image_shape: ImageShape, *, width: int | None = None, depth: int = 3) -> None:
        super().__init__(image_shape)
        width = 128 if width is None else width
        at_least(self, 1, width=width, depth=depth)
        channels, height, rows = image_shape
        if min(height, rows) >> depth < 1:
            raise ValueError(
                f"InstanceNormConvNet: images of {height} x {rows} pixels are too small for depth {depth}, since each "
                "block halves them; use a smaller depth"
            )
        layers: list[nn.Module] = []
        for inputs in (channels, *(width,) * (depth - 1)):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.GroupNorm(width, width), nn.ReLU(), nn.AvgPool2d(2)]
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.num_features = width * (height >> depth) * (rows >> depth)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layers(images)
        return features

    def divide(self) -> tuple[nn.Module, nn.Module]:
        return divided_chain(self.layers, type(self).__name__)
