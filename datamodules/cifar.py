"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), 50,000 + 10,000 images of 32 x 32 pixels."""

from typing import Any

from cl_lightning.data import RandomCrop, RandomHorizontalFlip, Transform
from cl_lightning.datamodules.torchvision_data import TorchvisionData
from cl_lightning.stream import ClassIncremental, DatasetInfo, Scenario


class SplitCIFAR10(TorchvisionData):
    """CIFAR-10, its 10 classes dealt out over tasks; by default five tasks of two classes.

    Args:
        root: Folder of the data.
        download: Download the data if they are missing.
        kwargs: Options of :class:`ContinualDataModule`.
    """

    def __init__(self, *, root: str = "data", download: bool = False, **kwargs: Any) -> None:
        super().__init__(name="CIFAR10", root=root, download=download, **kwargs)

    def default_transforms(self) -> list[Transform]:
        return [RandomCrop(padding=4), RandomHorizontalFlip()]


class SplitCIFAR100(TorchvisionData):
    """CIFAR-100, its 100 classes dealt out over tasks; by default ten tasks of ten classes.

    Args:
        root: Folder of the data.
        download: Download the data if they are missing.
        kwargs: Options of :class:`ContinualDataModule`.
    """

    def __init__(self, *, root: str = "data", download: bool = False, **kwargs: Any) -> None:
        super().__init__(name="CIFAR100", root=root, download=download, **kwargs)

    def default_transforms(self) -> list[Transform]:
        return [RandomCrop(padding=4), RandomHorizontalFlip()]

    def default_scenario(self, info: DatasetInfo) -> Scenario:
        return ClassIncremental(tasks=10)
