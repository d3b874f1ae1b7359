"""From files to tensors: sources, loaders, transforms, corruptions, stored features."""

from cl_lightning.data.aug_mix import AugMix
from cl_lightning.data.auto_augment import AutoAugment
from cl_lightning.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from cl_lightning.data.cut_mix import cut_box, cutmix, mixed_loss, mixup, row_places
from cl_lightning.data.feature_cache import FeatureCache, FeatureStore, Table
from cl_lightning.data.feature_pool import FeaturePool, GaussianFeatures
from cl_lightning.data.labelled import LabelledPlan, LabelledRows, apart, interleaved
from cl_lightning.data.loaders import MEMORY_ROWS, FeatureLoader, Plan, PlannedLoader, Rows, StreamLoader
from cl_lightning.data.pixels import permute_pixels, resized_crop, rotate_images, shift_images
from cl_lightning.data.rotations import rotate_batch, rotated, rotation_labels
from cl_lightning.data.samples import KINDS, ArraySource, Kind
from cl_lightning.data.sources import DatasetSource, DecodedSource, FileSource, SampleSource, TensorSource
from cl_lightning.data.targets import TARGET_KINDS, TARGETS, TargetKind, Targets, targets_of
from cl_lightning.data.transforms import (
    AlternatingFlip,
    ColorJitter,
    Compose,
    Context,
    Cutout,
    Normalize,
    RandAugment,
    RandomCrop,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomRotation,
    RandomVerticalFlip,
    ToFloat,
    Transform,
)

__all__ = [
    "CORRUPTIONS",
    "KINDS",
    "MEMORY_ROWS",
    "SEVERITIES",
    "TARGETS",
    "TARGET_KINDS",
    "AlternatingFlip",
    "ArraySource",
    "AugMix",
    "AutoAugment",
    "ColorJitter",
    "Compose",
    "Context",
    "Cutout",
    "DatasetSource",
    "DecodedSource",
    "FeatureCache",
    "FeatureLoader",
    "FeaturePool",
    "FeatureStore",
    "FileSource",
    "GaussianFeatures",
    "Kind",
    "LabelledPlan",
    "LabelledRows",
    "Normalize",
    "Plan",
    "PlannedLoader",
    "RandAugment",
    "RandomCrop",
    "RandomGrayscale",
    "RandomHorizontalFlip",
    "RandomResizedCrop",
    "RandomRotation",
    "RandomVerticalFlip",
    "Rows",
    "SampleSource",
    "StreamLoader",
    "Table",
    "TargetKind",
    "Targets",
    "TensorSource",
    "ToFloat",
    "Transform",
    "apart",
    "corrupt",
    "cut_box",
    "cutmix",
    "interleaved",
    "mixed_loss",
    "mixup",
    "permute_pixels",
    "resized_crop",
    "rotate_batch",
    "rotate_images",
    "rotated",
    "rotation_labels",
    "row_places",
    "shift_images",
    "targets_of",
]
