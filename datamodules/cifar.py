"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), 50,000 + 10,000 images of 32 x 32 pixels."""

from typing import Any

from cl_lightning.datamodules.torchvision_data import TorchvisionData
from cl_lightning.stream import Catalogue, ClassIncremental, Scenario
from cl_lightning.transforms import RandomCrop, RandomHorizontalFlip, Transform


class SplitCIFAR10(TorchvisionData):
    """CIFAR-10, its 10 classes dealt out over tasks: five of two classes unless a scenario says otherwise.

    Args:
        root: Folder of the data.
        download: Fetch them if they are not there.
        kwargs: Of the base.
    """

    def __init__(self, *, root: str = "data", download: bool = False, **kwargs: Any) -> None:
        super().__init__(name="CIFAR10", root=root, download=download, **kwargs)

    def default_transforms(self) -> list[Transform]:
        return [RandomCrop(padding=4), RandomHorizontalFlip()]


class SplitCIFAR100(TorchvisionData):
    """CIFAR-100, its 100 classes dealt out over tasks: ten of ten classes unless a scenario says otherwise.

    Args:
        root: Folder of the data.
        download: Fetch them if they are not there.
        kwargs: Of the base.
    """

    def __init__(self, *, root: str = "data", download: bool = False, **kwargs: Any) -> None:
        super().__init__(name="CIFAR100", root=root, download=download, **kwargs)

    def default_transforms(self) -> list[Transform]:
        return [RandomCrop(padding=4), RandomHorizontalFlip()]

    def default_scenario(self, catalogue: Catalogue) -> Scenario:
        return ClassIncremental(tasks=10)
