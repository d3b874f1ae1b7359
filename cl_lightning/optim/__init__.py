"""Optimizers that ``torch.optim`` does not have; any strategy takes them as its ``optimizer``."""

from cl_lightning.optim.alternating import AlternatingAdam
from cl_lightning.optim.default import default_optimizer
from cl_lightning.optim.sam import GSAM, SAM
from cl_lightning.optim.upgd import UPGD

__all__ = ["GSAM", "SAM", "UPGD", "AlternatingAdam", "default_optimizer"]
