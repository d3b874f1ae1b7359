"""MNIST (LeCun et al. 1998) and Fashion-MNIST (Xiao et al. 2017), 60,000 + 10,000 gray images of 28 x 28 pixels."""

from typing import Any

from cl_lightning.datamodules.torchvision_data import TorchvisionData


class SplitMNIST(TorchvisionData):
    """MNIST, its 10 digits dealt out over tasks; by default five tasks of two, without augmentation.

    Args:
        root: Folder of the data.
        download: Download the data if they are missing.
        kwargs: Options of :class:`ContinualDataModule`.
    """

    def __init__(self, *, root: str = "data", download: bool = False, **kwargs: Any) -> None:
        super().__init__(name="MNIST", root=root, download=download, **kwargs)


class SplitFashionMNIST(TorchvisionData):
    """Fashion-MNIST, its 10 classes dealt out over tasks; by default five tasks of two, without augmentation.

    Args:
        root: Folder of the data.
        download: Download the data if they are missing.
        kwargs: Options of :class:`ContinualDataModule`.
    """

    def __init__(self, *, root: str = "data", download: bool = False, **kwargs: Any) -> None:
        super().__init__(name="FashionMNIST", root=root, download=download, **kwargs)
