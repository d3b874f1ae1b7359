"""A classifier by the nearest of given class means, without parameters."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.losses import full_precision
from cl_lightning.models.heads import FixedBlock, Head


class NearestMeanHead(Head):
    """Nearest class mean (NCM): scores are cosines between a feature and the mean of each class.

        mu_c = mean of phi(x) over the samples of class c,  phi = f / ||f||;    z_c = <phi(x), mu_c> / ||mu_c||

    Among vectors of norm 1 the nearest one has the largest cosine. The rows of the head are the normalised means, which
    a strategy sets by :meth:`fill`. The score of a class without a mean is minus infinity; while no class has a mean,
    all scores are 0.

    Args:
        num_features: Size of a feature vector, d.
    """

    def new_block(self, num_new: int) -> nn.Module:
        return FixedBlock(self.num_features, num_new)

    @torch.no_grad()
    def fill(self, means: Tensor) -> None:
        """Set the means of all classes.

        Args:
            means: ``(columns, d)``, of any norm; 0 for a class without samples.

        Raises:
            ValueError: If there is not one mean for each column.
        """
        if means.shape != (self.num_columns, self.num_features):
            raise ValueError(
                f"NearestMeanHead: means are {tuple(means.shape)}; give one for each column, "
                f"{(self.num_columns, self.num_features)}"
            )
        rows = torch.split(F.normalize(means, dim=1), self.block_sizes())
        for block, part in zip(self.blocks, rows, strict=True):
            cast(FixedBlock, block).weight.copy_(part)

    def forward(self, features: Tensor) -> Tensor:
        if not self.blocks:
            return features.new_zeros(len(features), 0)
        with torch.autocast(features.device.type, enabled=False):
            features = full_precision(features)
            rows = self.weight().to(features.dtype)
            cosines = F.normalize(features, dim=1) @ rows.T
        known = (rows != 0).any(dim=1)
        return torch.where(known | ~known.any(), cosines, -torch.inf)
