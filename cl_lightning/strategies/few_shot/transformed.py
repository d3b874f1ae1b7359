"""Transformed copies of an image as classes of their own, shared by SAVC and S3C.

M fixed transforms t_0 .. t_{M-1}, of which t_0 is the identity, make M virtual classes of each class: the copy t_m(x)
of an image of class y has the virtual class ``y M + m``. A classifier has M rows for each class. A prediction compares
each copy with the rows of its own transform and averages:

    score_c(x) = 1/M sum_m score_{c M + m}(t_m(x))
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import Batch, ImageShape
from cl_lightning.data import rotated
from cl_lightning.losses import full_precision
from cl_lightning.memory import PrototypeHead, Prototypes
from cl_lightning.models import CosineHead, in_eval_mode
from cl_lightning.strategy import ContinualStrategy

Copies = Literal["none", "rotation2", "rotation4", "rotation_color12"]
NUMBER: dict[Copies, int] = {"none": 1, "rotation2": 2, "rotation4": 4, "rotation_color12": 12}
"""M of each set of transforms."""


def check_copies(owner: object, copies: Copies, image_shape: ImageShape) -> None:
    """Check that images of a shape have such copies.

    Raises:
        ValueError: For samples that are not square images, or images without three channels where channels permute.
    """
    name, shape = type(owner).__name__, tuple(image_shape)
    if copies != "none" and (len(shape) != 3 or shape[1] != shape[2]):
        raise ValueError(f"{name}: copies is {copies!r}, but samples of shape {shape} are no square images; use 'none'")
    if copies == "rotation_color12" and shape[0] != 3:
        raise ValueError(f"{name}: copies is {copies!r}, but images have {shape[0]} channels, not 3; use 'rotation4'")


def transformed(images: Tensor, copies: Copies) -> Tensor:
    """Images, followed by their copies by the transforms 1 .. M - 1.

    Args:
        images: ``(B, C, S, S)``.
        copies: ``rotation2``: rotations by 0 and 180 degrees; ``rotation4``: by 0, 90, 180 and 270 degrees;
            ``rotation_color12``: these four of the channels in the orders RGB, GBR and BRG.

    Returns:
        ``(M B, C, S, S)``; copy m of image i is row ``m B + i``.
    """
    if copies == "none":
        return images
    if copies == "rotation2":
        return torch.cat([images, torch.rot90(images, 2, (-2, -1))])
    orders = range(3) if copies == "rotation_color12" else range(1)
    return torch.cat([rotated(images.roll(-order, dims=1)) for order in orders])


def transformed_batch(batch: Batch, copies: Copies) -> Batch:
    """Batch of B images, followed by their copies: M B rows. Copies have label -1, since they belong to no class."""
    count = NUMBER[copies]
    if count == 1:
        return batch
    hidden = torch.full_like(batch.labels, -1)
    return batch.replace(
        images=transformed(batch.images, copies),
        raw=transformed(batch.raw, copies),
        labels=torch.cat([batch.labels, hidden.repeat(count - 1)]),
        tasks=batch.tasks.repeat(count),
        indices=batch.indices.repeat(count),
        extra={name: torch.cat([value] * count) for name, value in batch.extra.items()},
    )


def virtual_labels(labels: Tensor, count: int) -> Tensor:
    """``y M + m`` for the rows of :func:`transformed`, int64 ``(M B,)``, of labels y ``(B,)``; -1 for -1."""
    made = labels * count + torch.arange(count, device=labels.device)[:, None]
    return made.masked_fill(labels < 0, -1).flatten()


def over_copies(scores: Tensor, count: int) -> Tensor:
    """Mean over the copies of an image of its scores for the rows of their transforms.

    Args:
        scores: Of the rows of :func:`transformed`, ``(M B, C M)``.
        count: M.

    Returns:
        ``(B, C)``.
    """
    rows, columns = scores.shape
    split = scores.view(count, rows // count, columns // count, count)  # (M, B, C, M)
    return split.diagonal(dim1=0, dim2=3).mean(dim=2)


@torch.no_grad()
def features_of_copies(strategy: ContinualStrategy, copies: Copies) -> tuple[Tensor, Tensor]:
    """Features of the copies of this process's share of the images of the task, without augmentation, in eval mode.

    Returns:
        Features ``(M, n, d)``, float32, and columns, int64 ``(n,)``.
    """
    network, count = strategy.network, NUMBER[copies]
    found = [torch.zeros(count, 0, network.head.num_features, device=strategy.device)]
    labels = [torch.zeros(0, dtype=torch.int64, device=strategy.device)]
    with in_eval_mode(network):
        for batch in strategy.passes.batches():
            if len(batch):
                with strategy.trainer.precision_plugin.forward_context():
                    features = network.backbone(transformed(batch.images, copies))
                found.append(features.float().view(count, len(batch), -1))
                labels.append(batch.labels)
    return torch.cat(found, dim=1), torch.cat(labels)


class JointCosineHead(CosineHead):
    """Cosine classifier with M rows for each class; its logits are for images that are not transformed, m = 0.

    Args:
        num_features: Size of a feature vector, d.
        scale: Factor of the cosines, above 0.
        copies: M, at least 1.
    """

    def __init__(self, num_features: int, *, scale: float = 16.0, copies: int = 1) -> None:
        super().__init__(num_features, scale=scale, proxies=copies)

    def rows(self) -> Tensor:
        """Row of each virtual class, ``(C M, d)``."""
        return self.weight().view(-1, self.num_features)

    def joint_scores(self, features: Tensor) -> Tensor:
        """Scaled cosines of all virtual classes, ``(B, C M)``, of features ``(B, d)``."""
        return self.compared(self.embed(features), self.rows())

    def compared(self, embedded: Tensor, rows: Tensor) -> Tensor:
        """Scaled cosines of vectors ``(B, d)`` and rows ``(n, d)``, ``(B, n)``."""
        with torch.autocast(embedded.device.type, enabled=False):  # cosines near 1 differ by less than bf16 resolves
            directions = F.normalize(full_precision(embedded), dim=1)
            return self.scale * F.linear(directions, F.normalize(rows.to(directions.dtype), dim=1))

    def forward(self, features: Tensor) -> Tensor:
        if not self.blocks:
            return features.new_zeros(len(features), 0)
        return self.joint_scores(features)[:, :: self.proxies]


class JointMeansHead(PrototypeHead):
    """Cosines with the means of each class for each of M transforms; predictions of a feature are for m = 0.

    Args:
        num_features: Size of a feature vector, d.
        copies: M, at least 1.
    """

    def __init__(self, num_features: int, *, copies: int = 1) -> None:
        super().__init__(num_features, metric="cosine")
        self.others = nn.ModuleList(Prototypes(num_features) for _ in range(copies - 1))

    def fit_copies(self, features: Tensor, labels: Tensor) -> None:
        """Compute the means of classes.

        Args:
            features: Of the M copies of each image of this process, ``(M, n, d)``.
            labels: Columns, int64 ``(n,)``.
        """
        for store, rows in zip((self.prototypes, *self.others), features, strict=True):
            store.update(rows, labels, num_classes=self.num_columns)

    def joint_scores(self, features: Tensor) -> Tensor:
        """Cosines with all means, ``(B, C M)``, of features ``(B, d)``; -inf for classes without a mean."""
        with torch.autocast(features.device.type, enabled=False):
            stores = (self.prototypes, *self.others)
            found = [store.scores(features, self.num_columns, self.metric) for store in stores]
            return torch.stack(found, dim=2).flatten(1)
