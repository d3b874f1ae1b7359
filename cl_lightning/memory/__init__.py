"""State that outlives a task: exemplars, prototypes, class statistics, teachers and importances of weights."""

from cl_lightning.memory.accounting import KeepsBytes, bytes_by_kind, exemplars_within
from cl_lightning.memory.budget import SharedBudget
from cl_lightning.memory.category_balanced import CategoryBalancedMemory, category_balanced
from cl_lightning.memory.class_statistics import (
    ClassStatistics,
    Metric,
    class_means,
    class_statistics,
    dense_columns,
    nearest_mean_scores,
    shrink,
    squared_distances,
)
from cl_lightning.memory.consolidation import Consolidation
from cl_lightning.memory.drift import calibrate_new, calibrated, kernel_drift
from cl_lightning.memory.dual_spaces import DualSpaces
from cl_lightning.memory.growing import GrowingBuffers, restore_shapes
from cl_lightning.memory.herding import herding_indices, herding_per_class, random_per_class
from cl_lightning.memory.hyper_domains import HyperDomains, bipolar
from cl_lightning.memory.importance import Importance, NamedBuffers
from cl_lightning.memory.input_spaces import InputSpaces, input_grams, linear_maps
from cl_lightning.memory.mean_covariance import MeanCovariance
from cl_lightning.memory.owners import FREE, Held, Owners, PastMasks
from cl_lightning.memory.paths import PathIntegral, RiemannianWalk
from cl_lightning.memory.policies import ClassBalanced, HerdingPolicy, Policy, Reservoir, Ring, group_ids, rank_in_group
from cl_lightning.memory.prototypes import GaussianPrototypes, PrototypeHead, Prototypes
from cl_lightning.memory.replay import Memory, valid_columns
from cl_lightning.memory.sample_importance import ImportanceMemory, credited, least_important, mean_decrease
from cl_lightning.memory.sensitivity import fisher_diagonal, output_norm
from cl_lightning.memory.slots import SlotMemory
from cl_lightning.memory.task_memories import TaskMemories
from cl_lightning.memory.teacher import Teacher, Teachers
from cl_lightning.memory.weight_space import (
    Average,
    Breadcrumbs,
    Dare,
    MaxMagnitude,
    MergeRule,
    Slerp,
    Ties,
    Weights,
    WeightSets,
    fisher_average,
    move_towards,
    network_tensors,
    shifted,
    task_vector,
    write_weights,
)

__all__ = [
    "FREE",
    "Average",
    "Breadcrumbs",
    "CategoryBalancedMemory",
    "ClassBalanced",
    "ClassStatistics",
    "Consolidation",
    "Dare",
    "DualSpaces",
    "GaussianPrototypes",
    "GrowingBuffers",
    "Held",
    "HerdingPolicy",
    "HyperDomains",
    "Importance",
    "ImportanceMemory",
    "InputSpaces",
    "KeepsBytes",
    "MaxMagnitude",
    "MeanCovariance",
    "Memory",
    "MergeRule",
    "Metric",
    "NamedBuffers",
    "Owners",
    "PastMasks",
    "PathIntegral",
    "Policy",
    "PrototypeHead",
    "Prototypes",
    "Reservoir",
    "RiemannianWalk",
    "Ring",
    "SharedBudget",
    "Slerp",
    "SlotMemory",
    "TaskMemories",
    "Teacher",
    "Teachers",
    "Ties",
    "WeightSets",
    "Weights",
    "bipolar",
    "bytes_by_kind",
    "calibrate_new",
    "calibrated",
    "category_balanced",
    "class_means",
    "class_statistics",
    "credited",
    "dense_columns",
    "exemplars_within",
    "fisher_average",
    "fisher_diagonal",
    "group_ids",
    "herding_indices",
    "herding_per_class",
    "input_grams",
    "kernel_drift",
    "least_important",
    "linear_maps",
    "mean_decrease",
    "move_towards",
    "nearest_mean_scores",
    "network_tensors",
    "output_norm",
    "random_per_class",
    "rank_in_group",
    "restore_shapes",
    "shifted",
    "shrink",
    "squared_distances",
    "task_vector",
    "valid_columns",
    "write_weights",
]
