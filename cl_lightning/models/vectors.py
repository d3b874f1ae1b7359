"""Backbones for vectors, such as rows of a table, and for sequences and tokens; trial inputs of any backbone."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_lightning.batch import ImageShape
from cl_lightning.checks import at_least
from cl_lightning.models.backbones import Backbone


class TableResNet(Backbone):
    """Residual network for rows of a table (Gorishniy et al., NeurIPS 2021, arXiv:2106.11959, section 3.2).

        x_0 = Linear(x),   x_{l+1} = x_l + Dropout(Linear(Dropout(ReLU(Linear(BN(x_l)))))),   features = ReLU(BN(x_L))

    Args:
        image_shape: Number of features of a row, ``(D,)``.
        width: Size of x_l, at least 1; the features have it too.
        blocks: Number L of residual blocks, at least 1.
        expansion: Size of the layer inside a block as a multiple of ``width``, at least 1.
        dropout: Probability of the first dropout of a block during training, in [0, 1); the second one of the paper is
            left out.

    Raises:
        ValueError: If an option is out of range, or samples are no vectors.
    """

    dimensions = (1,)

    def __init__(
        self, image_shape: ImageShape, *, width: int = 128, blocks: int = 2, expansion: int = 2, dropout: float = 0.0
    ) -> None:
        super().__init__(image_shape)
        at_least(self, 1, width=width, blocks=blocks, expansion=expansion)
        if not 0 <= dropout < 1:
            raise ValueError(f"TableResNet: dropout {dropout}; it must be in [0, 1)")
        self.first = nn.Linear(image_shape[0], width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm1d(width),
                nn.Linear(width, expansion * width),
                nn.ReLU(),
                nn.Dropout(dropout),
                nn.Linear(expansion * width, width),
            )
            for _ in range(blocks)
        )
        self.norm = nn.BatchNorm1d(width)
        self.num_features = width

    def forward(self, images: Tensor) -> Tensor:
        hidden: Tensor = self.first(images)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return F.relu(self.norm(hidden))


class ConvNet1d(Backbone):
    """Convolutions over time with batch normalisation, ReLU and pooling by 2, and the mean over time.

    For sequences ``(C, T)``, such as waveforms or series of sensors, and, with ``vocabulary``, for windows of tokens
    ``(T,)``, which a table of embeddings maps to ``channels[0]`` channels first.

    Args:
        image_shape: Channels and length of a sequence; length of a window of tokens.
        channels: Channels of each convolution, at least one.
        kernel: Kernel size, odd; the length is padded by half of it on both sides.
        vocabulary: Number of different tokens, which are 0 to ``vocabulary - 1``; None for sequences.

    Raises:
        ValueError: If an option is out of range or does not fit the samples, or they are too short for the poolings.
    """

    dimensions = (1, 2)

    def __init__(
        self,
        image_shape: ImageShape,
        *,
        channels: Sequence[int] = (64, 128, 128),
        kernel: int = 5,
        vocabulary: int | None = None,
    ) -> None:
        super().__init__(image_shape)
        at_least(self, 1, kernel=kernel, vocabulary=vocabulary, optional=True)
        if not channels or min(channels) < 1 or kernel % 2 == 0:
            raise ValueError(
                f"ConvNet1d: channels {tuple(channels)}, kernel {kernel}; give at least one number of channels, each "
                "at least 1, and an odd kernel"
            )
        if (vocabulary is None) != (len(image_shape) == 2):
            raise ValueError(
                f"ConvNet1d: vocabulary is {vocabulary}, samples have shape {tuple(image_shape)}; give vocabulary for "
                "tokens (T,), and none for sequences (C, T); vectors need another backbone, such as TableResNet"
            )
        if image_shape[-1] < 2 ** (len(channels) - 1):
            raise ValueError(
                f"ConvNet1d: sequences of length {image_shape[-1]} are too short to be halved {len(channels) - 1} "
                "times; give fewer channels"
            )
        self.vocabulary, self.takes_tokens = vocabulary, vocabulary is not None
        self.embedding = None if vocabulary is None else nn.Embedding(vocabulary, channels[0])
        sizes = (image_shape[0] if vocabulary is None else channels[0], *channels)
        self.layers = nn.Sequential()
        for place, (inputs, outputs) in enumerate(pairwise(sizes)):
            if place:
                self.layers.append(nn.MaxPool1d(2))
            convolution = nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
            self.layers.extend([convolution, nn.BatchNorm1d(outputs), nn.ReLU()])
        self.num_features = channels[-1]

    def forward(self, images: Tensor) -> Tensor:
        hidden = images if self.embedding is None else self.embedding(images).transpose(1, 2)
        features: Tensor = self.layers(hidden).mean(2)
        return features


def example(
    backbone: nn.Module, count: int, image_shape: ImageShape, generator: torch.Generator | None = None
) -> Tensor:
    """Inputs for a trial of a backbone, ``(count, *image_shape)`` on the CPU.

    Args:
        backbone: The backbone.
        count: Number of inputs.
        image_shape: Shape of one.
        generator: Source of standard normal numbers, of 0 and 1 for tokens; None for zeros.
    """
    shape = (count, *image_shape)
    if any(getattr(module, "takes_tokens", False) for module in backbone.modules()):
        zeros = torch.zeros(shape, dtype=torch.int64)
        return zeros if generator is None else torch.randint(2, shape, generator=generator)
    return torch.zeros(shape) if generator is None else torch.randn(shape, generator=generator)
