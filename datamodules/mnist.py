"""MNIST (LeCun et al. 1998) and Fashion-MNIST (Xiao et al. 2017), 60,000 + 10,000 gray images of 28 x 28 pixels."""

from typing import Any

from cl_lightning.datamodules.torchvision_data import TorchvisionData


class SplitMNIST(TorchvisionData):
    """MNIST, its 10 digits dealt out over tasks: five of two unless a scenario says otherwise. Not augmented.

    Args:
        root: Folder of the data.
        download: Fetch them if they are not there.
        kwargs: Of the base.
    """

    def __init__(self, *, root: str = "data", download: bool = False, **kwargs: Any) -> None:
        super().__init__(name="MNIST", root=root, download=download, **kwargs)


class SplitFashionMNIST(TorchvisionData):
    """Fashion-MNIST, its 10 classes dealt out over tasks: five of two unless a scenario says otherwise. Not augmented.

    Args:
        root: Folder of the data.
        download: Fetch them if they are not there.
        kwargs: Of the base.
    """

    def __init__(self, *, root: str = "data", download: bool = False, **kwargs: Any) -> None:
        super().__init__(name="FashionMNIST", root=root, download=download, **kwargs)
