"""Loss functions of logits, features and labels."""

from cl_lightning.losses.classification import (
    binary_cross_entropy,
    classes_present,
    cross_entropy,
    dot_regression,
    entropy,
    full_precision,
    masked_logits,
    mean_over_rows,
    mean_over_selected,
    row_factor,
)
from cl_lightning.losses.contrastive import rows_of_all, supervised_contrastive
from cl_lightning.losses.distillation import (
    NewClassTargets,
    balanced_distillation,
    cosine_feature_distillation,
    feature_distillation,
    feature_norm_distillation,
    logit_errors,
    logit_matching,
    lwf_mc_targets,
    pod_spatial,
    sigmoid_distillation,
    softmax_distillation,
)

__all__ = [
    "NewClassTargets",
    "balanced_distillation",
    "binary_cross_entropy",
    "classes_present",
    "cosine_feature_distillation",
    "cross_entropy",
    "dot_regression",
    "entropy",
    "feature_distillation",
    "feature_norm_distillation",
    "full_precision",
    "logit_errors",
    "logit_matching",
    "lwf_mc_targets",
    "masked_logits",
    "mean_over_rows",
    "mean_over_selected",
    "pod_spatial",
    "row_factor",
    "rows_of_all",
    "sigmoid_distillation",
    "softmax_distillation",
    "supervised_contrastive",
]
