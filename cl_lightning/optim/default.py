"""The optimizer that is used where none is given."""

from collections.abc import Iterable

import torch
from torch import nn


def default_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD with learning rate 0.05 and momentum 0.9, the optimizer of strategies without the option ``optimizer``."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
