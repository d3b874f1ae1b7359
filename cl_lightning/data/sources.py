"""Sources of samples: tensors in memory, files that are decoded on access, and Datasets of the user."""

from cl_lightning.data.arrays import SampleSource, TensorSource
from cl_lightning.data.datasets import DatasetSource
from cl_lightning.data.decoding import DecodedSource, checked, decoded
from cl_lightning.data.files import FileSource
from cl_lightning.data.labels import check_labels, names_in

__all__ = [
    "DatasetSource",
    "DecodedSource",
    "FileSource",
    "SampleSource",
    "TensorSource",
    "check_labels",
    "checked",
    "decoded",
    "names_in",
]
