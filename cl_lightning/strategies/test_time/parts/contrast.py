"""Contrast of test images with source prototypes (Döbler, Marsden, Yang, CVPR 2023, arXiv:2211.13081).

Each test image x_i has three vectors: its nearest source prototype p_i (mean feature of a class of the source, by
cosine), its features h_i, and the features h~_i of an augmented view. A projector g maps them to v = g(.) / |g(.)|.
Over the 3 B vectors of a batch,

    L = mean_a 1/2 sum_{b != a, of the same image} -log( exp(v_a v_b / T) / sum_{k != a} exp(v_a v_k / T) )

Images with the same nearest prototype are negatives of each other, as in the authors' code. Prototypes need labels of
source images: in a stream whose source images are clean test images (``source_part="test"``) these are labels of test
images, and results are not to be compared with methods that use none.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import Batch
from cl_lightning.checks import above, at_least
from cl_lightning.losses import rows_of_all, supervised_contrastive
from cl_lightning.memory import class_means
from cl_lightning.strategies.test_time.parts.part import Adapting, Part, source_features


class PrototypeContrast(Part):
    """Source prototypes, and a projector that is trained in the stream.

    Args:
        samples: Number of source images for the prototypes, at least 1.
        temperature: T, above 0.
        width: Number of outputs of both layers of the projector, at least 1.
    """

    prototypes: Tensor

    def __init__(self, samples: int = 100_000, temperature: float = 0.1, width: int = 128) -> None:
        super().__init__()
        at_least(self, 1, samples=samples, width=width)
        above(self, 0, temperature=temperature)
        self.samples, self.temperature, self.width = samples, temperature, width
        self.projector = nn.Sequential()
        self.register_buffer("prototypes", torch.zeros(0, 0))  # (C, d)
        self.register_buffer("start", torch.zeros(0))  # numbers of the projector at the beginning of the stream
        self.start: Tensor

    def check(self, strategy: Adapting) -> None:
        d, width = strategy.network.head.num_features, self.width
        self.projector = nn.Sequential(nn.Linear(d, width), nn.ReLU(), nn.Linear(width, width))

    def learn_source(self, strategy: Adapting) -> None:
        self.start = nn.utils.parameters_to_vector(self.projector.parameters()).detach().clone()
        self.prototypes = class_means(*source_features(strategy, self.samples), strategy.num_source)

    @torch.no_grad()
    def reset(self) -> None:
        nn.utils.vector_to_parameters(self.start.clone(), self.projector.parameters())

    def forward(self, batch: Batch, features: Tensor, views: Tensor) -> Tensor:
        """The loss, a scalar, as this process's share.

        Args:
            batch: Batch of the stream.
            features: h, ``(B, d)``.
            views: h~, ``(B, d)``, of views of the same images.
        """
        with torch.no_grad():
            cosines = F.normalize(features.to(self.prototypes.dtype), dim=1) @ F.normalize(self.prototypes, dim=1).T
            nearest = self.prototypes[cosines.argmax(dim=1)].to(features.dtype)
        rows, factor = rows_of_all(batch)
        triples = torch.stack([self.projector(part) for part in (nearest, features, views)], dim=1)  # (B, 3, width)
        places = torch.arange(batch.draw.start, batch.draw.start + len(features), device=features.device)
        vectors, images = rows(triples).flatten(0, 1), rows(places).repeat_interleave(3)
        if not len(vectors):
            return 0.0 * triples.sum()
        return factor * supervised_contrastive(vectors, images, self.temperature, base_temperature=self.temperature)
