"""The interface of a strategy that its components use."""

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from cl_lightning.batch import ImageShape
from cl_lightning.models import Network
from cl_lightning.strategies.base.terms import LossTerms
from cl_lightning.strategies.base.traits import Traits

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class Host(Protocol):
    """Attributes and methods of a strategy that its components (passes, evaluation) use."""

    network: Network
    task_columns: Tensor
    image_shape: ImageShape | None
    traits: Traits
    terms: LossTerms

    @property
    def trainer(self) -> "Trainer": ...

    @property
    def device(self) -> torch.device: ...

    @property
    def data(self) -> Any: ...

    @property
    def passes(self) -> Any: ...

    @property
    def backbone_is_final(self) -> bool: ...

    def predict(self, images: Tensor, tasks: Tensor | None = None) -> Tensor: ...
