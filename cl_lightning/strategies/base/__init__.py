"""The base class of all continual-learning methods, and its components."""

from cl_lightning.optim import default_optimizer
from cl_lightning.strategies.base.alternating_rate import AlternatingRate
from cl_lightning.strategies.base.exemplars import (
    BALANCED,
    BalancedSet,
    Classifier,
    CosineExemplars,
    NearestExemplars,
    balanced_phase,
    end_balanced,
)
from cl_lightning.strategies.base.expanding import ExpandingReplay
from cl_lightning.strategies.base.gradients import flat_gradient, set_gradient, without_conflict
from cl_lightning.strategies.base.inner_adam import adam_step
from cl_lightning.strategies.base.optimizers import refuse_weight_decay, require_plain_sgd, separate_group
from cl_lightning.strategies.base.phases import Phase, PhaseOptions, sigmoid_optimizer
from cl_lightning.strategies.base.rehearse import (
    finetune_on_memory,
    module_of,
    norms_and_head,
    of_memory,
    sensitivities,
)
from cl_lightning.strategies.base.replay import ExemplarReplay, MemoryReplay, Replay, TaskEndReplay, check_loss_classes
from cl_lightning.strategies.base.strategy import (
    BackboneFactory,
    ContinualStrategy,
    FreezeNorm,
    HeadFactory,
    LossClasses,
    sum_of_zeros,
)
from cl_lightning.strategies.base.stream_schedules import CosineOverStream, InfiniteOverStream, RsqrtOverStream
from cl_lightning.strategies.base.task_incremental import BY_TASK, SharesWeights, TaskIncremental, routed
from cl_lightning.strategies.base.terms import AddsLosses
from cl_lightning.strategies.base.traits import Traits
from cl_lightning.strategies.base.unlearning import Unlearns, request_problem, start_again
from cl_lightning.strategies.base.virtual import (
    mean_gradient,
    output_at,
    relative_step,
    step_on,
    trained_weights,
    virtual_step,
)

__all__ = [
    "BALANCED",
    "BY_TASK",
    "AddsLosses",
    "AlternatingRate",
    "BackboneFactory",
    "BalancedSet",
    "Classifier",
    "ContinualStrategy",
    "CosineExemplars",
    "CosineOverStream",
    "ExemplarReplay",
    "ExpandingReplay",
    "FreezeNorm",
    "HeadFactory",
    "InfiniteOverStream",
    "LossClasses",
    "MemoryReplay",
    "NearestExemplars",
    "Phase",
    "PhaseOptions",
    "Replay",
    "RsqrtOverStream",
    "SharesWeights",
    "TaskEndReplay",
    "TaskIncremental",
    "Traits",
    "Unlearns",
    "adam_step",
    "balanced_phase",
    "check_loss_classes",
    "default_optimizer",
    "end_balanced",
    "finetune_on_memory",
    "flat_gradient",
    "mean_gradient",
    "module_of",
    "norms_and_head",
    "of_memory",
    "output_at",
    "refuse_weight_decay",
    "relative_step",
    "request_problem",
    "require_plain_sgd",
    "routed",
    "sensitivities",
    "separate_group",
    "set_gradient",
    "sigmoid_optimizer",
    "start_again",
    "step_on",
    "sum_of_zeros",
    "trained_weights",
    "virtual_step",
    "without_conflict",
]
