"""Classification data sets of torchvision by name."""

import difflib
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from cl_lightning.batch import mix
from cl_lightning.data import DatasetSource, SampleSource, TensorSource
from cl_lightning.data.sources import check_labels
from cl_lightning.datamodules.base import ContinualDataModule

_Arguments = dict[str, Any]
_BY_FLAG: tuple[list[_Arguments], list[_Arguments]] = ([{"train": True}], [{"train": False}])


def _by_split(train: str, test: str, key: str = "split") -> tuple[list[_Arguments], list[_Arguments]]:
    return [{key: split} for split in train.split("+")], [{key: test}]


# Constructor arguments of the training samples (several parts are concatenated: all labelled samples except test data)
# and of the test samples. An empty list: torchvision has no test samples, and a share of each class is held out.
_SETS: dict[str, tuple[list[_Arguments], list[_Arguments]]] = {
    "CIFAR10": _BY_FLAG,
    "CIFAR100": _BY_FLAG,
    "Caltech101": ([{}], []),
    "Caltech256": ([{}], []),
    "CLEVRClassification": _by_split("train", "val"),
    "Country211": _by_split("train+valid", "test"),
    "DTD": _by_split("train+val", "test"),
    "EMNIST": _BY_FLAG,
    "EuroSAT": ([{}], []),
    "FER2013": _by_split("train", "test"),
    "FGVCAircraft": _by_split("trainval", "test"),
    "FashionMNIST": _BY_FLAG,
    "Flowers102": _by_split("train+val", "test"),
    "Food101": _by_split("train", "test"),
    "GTSRB": _by_split("train", "test"),
    "INaturalist": _by_split("2021_train", "2021_valid", "version"),
    "ImageNet": _by_split("train", "val"),
    "Imagenette": _by_split("train", "val"),
    "KMNIST": _BY_FLAG,
    "MNIST": _BY_FLAG,
    "OxfordIIITPet": _by_split("trainval", "test"),
    "PCAM": _by_split("train+val", "test"),
    "Places365": _by_split("train-standard", "val"),
    "QMNIST": _BY_FLAG,
    "RenderedSST2": _by_split("train+val", "test"),
    "SEMEION": ([{}], []),
    "STL10": _by_split("train", "test"),
    "SUN397": ([{}], []),
    "SVHN": _by_split("train", "test"),
    "StanfordCars": _by_split("train", "test"),
    "USPS": _BY_FLAG,
}
_UNSORTED = {"INaturalist": "index", "SUN397": "_image_files"}
"""Sets whose order of files depends on the file system, and their attribute with the list of files."""
# Mean and standard deviation of the training images.
_STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "CIFAR10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "CIFAR100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "FashionMNIST": ((0.2860,), (0.3530,)),
    "KMNIST": ((0.1918,), (0.3483,)),
    "MNIST": ((0.1307,), (0.3081,)),
    "SVHN": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
}


class TorchvisionData(ContinualDataModule):
    """A classification data set of ``torchvision.datasets``, with its official training and test samples.

    Official validation samples with labels are part of the training samples, of which ``val_fraction`` holds out a
    share. For sets without official test samples (Caltech101, Caltech256, EuroSAT, SEMEION, SUN397) a share of each
    class is held out by ``test_seed``; published numbers use other splits. Arrays of images keep their size. Image
    files are scaled and cropped to ``size``, and decoded by ``workers`` unless they are kept in memory. Raw labels are
    the labels of torchvision, renumbered without gaps.

    Args:
        name: Name of the class in ``torchvision.datasets``.
        root: Folder of the data, as ``root`` of torchvision.
        download: Download missing data; needs a network connection.
        size: Height and width of images from files, in pixels, at least 1; None for 224. It must be None for sets of
            arrays; use ``resize`` for those.
        options: Further arguments of the class, such as ``{split: balanced}`` for EMNIST.
        test_fraction: Share of each class that is held out without official test samples, in (0, 1).
        test_seed: Seed of the held-out samples.
        kwargs: Options of :class:`ContinualDataModule`.

    Raises:
        ValueError: If the name is unknown or an option is outside its range; before training, if the data are missing
            in ``root``.
    """

    def __init__(
        self,
        name: str,
        *,
        root: str = "data",
        download: bool = False,
        size: int | None = None,
        options: dict[str, Any] | None = None,
        test_fraction: float = 0.2,
        test_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        self.dataset = name
        super().__init__(**kwargs)
        if name not in _SETS:
            nearest = difflib.get_close_matches(name.lower(), [known.lower() for known in _SETS], n=3)
            meant = [known for known in _SETS if known.lower() in nearest]
            hint = f"did you mean {' or '.join(meant)}?" if meant else f"known are {', '.join(_SETS)}"
            raise ValueError(f"TorchvisionData: name is {name!r}, not a classification data set of torchvision; {hint}")
        if size is not None and size < 1:
            raise ValueError(f"{self._title}: size is {size}; it must be at least 1, in pixels, or null")
        if not 0 < test_fraction < 1:
            raise ValueError(f"{self._title}: test_fraction is {test_fraction}; it must be in (0, 1)")
        self.root, self.download, self.size = root, download, size
        self.options = dict(options or {})
        self.test_fraction, self.test_seed = test_fraction, test_seed

    def statistics(self) -> tuple[Sequence[float] | None, Sequence[float] | None]:
        mean, std = super().statistics()
        if (known := _STATISTICS.get(self.dataset)) is not None:
            return mean or known[0], std or known[1]
        return mean, std

    def prepare_data(self) -> None:
        if self.download:
            for arguments in (*_SETS[self.dataset][0], *_SETS[self.dataset][1]):
                self._open(arguments, download=True)

    def source(self, *, train: bool) -> SampleSource:
        if not train:
            self.samples(train=True)  # defines the classes
        training, testing = _SETS[self.dataset]
        datasets = [self._open(arguments) for arguments in (training if train or not testing else testing)]
        labels = np.concatenate([_labels(dataset) for dataset in datasets])
        rows = np.arange(len(labels))
        if self.dataset in _UNSORTED:  # listed in the order of the file system
            files = [str(file) for dataset in datasets for file in getattr(dataset, _UNSORTED[self.dataset])]
            rows = np.array(sorted(range(len(files)), key=files.__getitem__), dtype=np.int64)
        if not testing:
            held = held_out(labels[rows], self.test_fraction, self.test_seed)
            rows = rows[~held if train else held]
        labels = labels[rows]
        if train:
            # Labels without samples are left out: EMNIST's letters begin with 1.
            present = np.unique(labels)
            names = _class_names(datasets[0], int(present[-1]) + 1)
            self._class_names = [names[label] for label in present.tolist()]
            self._numbers = np.full(int(present[-1]) + 1, -1, dtype=np.int64)
            self._numbers[present] = np.arange(len(present))
        if (beyond := labels.max(initial=0)) >= len(self._numbers):
            raise ValueError(
                f"{self._title}: label {beyond} occurs in the test samples only; training samples must have it"
            )
        labels, names = self._numbers[labels], self._class_names
        array = _array(datasets[0])
        if array is not None:
            if self.size is not None:
                shape = " x ".join(str(side) for side in array.shape[1:])
                raise ValueError(f"{self._title}: leave size out, or use resize; its images are arrays of {shape}")
            return TensorSource(array[rows], labels, class_names=names, name=self._title)
        everything = datasets[0] if len(datasets) == 1 else ConcatDataset(datasets)
        return DatasetSource(
            Subset(everything, rows.tolist()),
            class_names=names,
            labels=labels,
            size=self.size or 224,
            mode="RGB",
            threads=True,
            name=self._title,
        )

    @property
    def _title(self) -> str:
        own = type(self).__name__
        return f"{own} {self.dataset}" if type(self) is TorchvisionData else own

    def _open(self, arguments: _Arguments, *, download: bool = False) -> Dataset[Any]:
        from torchvision import datasets  # this import takes a second

        kind = getattr(datasets, self.dataset)
        makers = [base.__init__ for base in kind.__mro__ if "__init__" in vars(base)]
        can_download = any("download" in inspect.signature(maker).parameters for maker in makers)
        if download and not can_download:
            raise ValueError(
                f"{self._title}: download it by hand into {self.root} and leave download out; torchvision cannot "
                "download it"
            )
        extra = {"download": download} if can_download else {}
        try:
            dataset: Dataset[Any] = kind(self.root, **arguments, **{**self.options, **extra})
        except TypeError as error:
            raise ValueError(
                f"{self._title}: options are {self.options}, which the class does not take: {error}"
            ) from error
        except ValueError as error:
            raise ValueError(f"{self._title}: {' '.join(str(error).split())}") from error
        except ImportError as error:
            raise ValueError(f"{self._title}: it needs a package that is not installed: {error}") from error
        except (RuntimeError, OSError) as error:
            remedy = "check the network" if download else "give the root of the data, or set download: true"
            raise ValueError(
                f"{self._title}: no data under {self.root} ({' '.join(str(error).split())}); {remedy}"
            ) from error
        return dataset


def held_out(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Choose held-out samples: a share of each class, at least one sample and never all.

    Args:
        labels: Raw labels, int64 ``(N,)``.
        fraction: Share of each class, in (0, 1), rounded to whole samples.
        seed: Seed of the draw.

    Returns:
        Whether a sample is held out, bool ``(N,)``.
    """
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels).tolist():
        rows = np.flatnonzero(labels == label)
        count = min(max(round(fraction * len(rows)), 1), len(rows) - 1)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(mix(seed, label)))
        held[rows[order[:count].numpy()]] = True
    return held


def _labels(dataset: Any) -> np.ndarray:
    """Labels of all samples, int64 ``(N,)``, from whichever attribute the class has."""
    for attribute in ("targets", "labels", "_labels", "y"):
        if (found := getattr(dataset, attribute, None)) is not None:
            labels = np.asarray(found)
            labels = labels[:, 0] if labels.ndim == 2 else labels
            return check_labels(labels, len(dataset), None, type(dataset).__name__)
    for attribute, place in (("_samples", 1), ("index", 0)):
        if (found := getattr(dataset, attribute, None)) is not None:
            labels = np.array([item[place] for item in found])
            return check_labels(labels, len(dataset), None, type(dataset).__name__)
    return np.array([int(dataset[index][1]) for index in range(len(dataset))], dtype=np.int64)


def _class_names(dataset: Any, count: int) -> list[str]:
    """One name per label, all different; numbers if the class has no names."""
    for attribute in ("classes", "categories", "all_categories"):
        found = getattr(dataset, attribute, None)
        if found is not None and len(found) >= count:
            names = [name if isinstance(name, str) else str(name[0]) for name in found]  # ImageNet has lists of names
            return [f"{name} ({label})" if names.count(name) > 1 else name for label, name in enumerate(names)]
    return [str(label) for label in range(count)]


def _array(dataset: Any) -> np.ndarray | Tensor | None:
    """All images as one uint8 array; None if the class does not hold them in memory."""
    data = getattr(dataset, "data", None)
    if data is None and (samples := getattr(dataset, "_samples", None)) and isinstance(samples[0][0], Tensor):
        data = torch.stack([image for image, _ in samples])
    return data if isinstance(data, np.ndarray | Tensor) and data.ndim in (3, 4) else None
