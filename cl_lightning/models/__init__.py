"""Modules with parameters: backbones, heads, PEFT modules, prompts, expanding networks."""

from cl_lightning.models.backbones import (
    MLP,
    Backbone,
    BasicBlock,
    CifarResNet,
    PadShortcut,
    ResNet,
    ResNet18,
    ResNet20,
    ResNet32,
    ResNet56,
    SlimResNet18,
    Timm,
    built,
)
from cl_lightning.models.background_head import BackgroundHead
from cl_lightning.models.closed_form import (
    ClosedFormHead,
    LDAHead,
    RidgeHead,
    gaussian_classifier,
    recursive_ridge,
    solve_positive,
    validated_ridge,
)
from cl_lightning.models.clustering import (
    kernel,
    longest_edge,
    ncd_kmeans,
    plain_kmeans,
    silhouette,
    spectral_embedding,
)
from cl_lightning.models.consolidated_head import ConsolidatedHead, consolidate
from cl_lightning.models.convnet import ConvNet, InstanceNormConvNet
from cl_lightning.models.cut import Cut, joined_rows
from cl_lightning.models.dependence import gaussian_kernel, hsic, square_distances, two_sample_distance
from cl_lightning.models.domain_head import DomainHead
from cl_lightning.models.energy_head import EnergyHead
from cl_lightning.models.expansion import ExpandableBackbone, feature_map, map_stage, positions
from cl_lightning.models.expert_prompts import ExpertPrompts
from cl_lightning.models.growing import GrowingParameters
from cl_lightning.models.heads import (
    CosineHead,
    DistanceHead,
    Head,
    LinearHead,
    Pairs,
    align_head,
    align_rows,
    distances,
)
from cl_lightning.models.kmeans import kmeans, spread_points
from cl_lightning.models.masks import (
    GatedBackbone,
    clamp_embeddings,
    compensate_scale,
    newly_used,
    risen_scale,
)
from cl_lightning.models.max_margin import (
    Against,
    MaxMarginHead,
    forgetting,
    least_change,
    margins,
    recurring,
    shortfall,
    weakly_regularised,
)
from cl_lightning.models.mean_head import NearestMeanHead
from cl_lightning.models.mixture import Mixture
from cl_lightning.models.network import (
    Network,
    Output,
    Temporary,
    batch_norms,
    frozen_copy,
    head_as,
    in_eval_mode,
    joined,
    perceptron,
    uncompiled,
)
from cl_lightning.models.normalization import (
    AdaptiveBatchNorm,
    adapt_norms,
    early_norm_parameters,
    norm_parameters,
    refit_norms,
    set_statistics,
)
from cl_lightning.models.null_space import NullSpaceHead, SolutionSet
from cl_lightning.models.peft.adapter import Adapter
from cl_lightning.models.peft.backbone import AdaptedBackbone, PeftPair
from cl_lightning.models.peft.base import Peft, PeftFactory, Site, WholeModel, blocks_of, layers_of
from cl_lightning.models.peft.branches import PeftBranches
from cl_lightning.models.peft.directions import DirectionSets
from cl_lightning.models.peft.input import InputKind, InputTransform, check_input_options
from cl_lightning.models.peft.lora import LoRA
from cl_lightning.models.peft.parallel import ParallelAdapters
from cl_lightning.models.peft.scale_shift import SSF, FiLM
from cl_lightning.models.peft.sets import PeftSets, SideBySide
from cl_lightning.models.peft.tokens import VPT, Prefix, PrefixSite, PromptSite
from cl_lightning.models.peft.two_ranks import TwoRanks
from cl_lightning.models.pixels import ConvPixels, PixelHead, TorchvisionPixels
from cl_lightning.models.prompts import (
    DecomposedPrompts,
    KeyedPrompts,
    PromptedBackbone,
    PromptPool,
    Prompts,
    component_weights,
    most_frequent,
    orthogonality,
    orthonormal_rows,
)
from cl_lightning.models.random_layer import Nonlinearity, RandomLayer
from cl_lightning.models.simplex_head import (
    NeckFactory,
    ResidualNeck,
    SimplexHead,
    TargetHead,
    rotated_simplex,
    simplex,
)
from cl_lightning.models.svm import linear_svm
from cl_lightning.models.task_head import TaskHead
from cl_lightning.models.task_networks import MAIN, TaskNetworks, drawn
from cl_lightning.models.text_head import TextHead, save_text_embeddings, template_mean
from cl_lightning.models.transport import transport
from cl_lightning.models.vae import VAE, FeatureVAE, kl_to_standard_normal
from cl_lightning.models.vectors import ConvNet1d, TableResNet, example

__all__ = [
    "MAIN",
    "MLP",
    "SSF",
    "VAE",
    "VPT",
    "AdaptedBackbone",
    "Adapter",
    "AdaptiveBatchNorm",
    "Against",
    "Backbone",
    "BackgroundHead",
    "BasicBlock",
    "CifarResNet",
    "ClosedFormHead",
    "ConsolidatedHead",
    "ConvNet",
    "ConvNet1d",
    "ConvPixels",
    "CosineHead",
    "Cut",
    "DecomposedPrompts",
    "DirectionSets",
    "DistanceHead",
    "DomainHead",
    "EnergyHead",
    "ExpandableBackbone",
    "ExpertPrompts",
    "FeatureVAE",
    "FiLM",
    "GatedBackbone",
    "GrowingParameters",
    "Head",
    "InputKind",
    "InputTransform",
    "InstanceNormConvNet",
    "KeyedPrompts",
    "LDAHead",
    "LinearHead",
    "LoRA",
    "MaxMarginHead",
    "Mixture",
    "NearestMeanHead",
    "NeckFactory",
    "Network",
    "Nonlinearity",
    "NullSpaceHead",
    "Output",
    "PadShortcut",
    "Pairs",
    "ParallelAdapters",
    "Peft",
    "PeftBranches",
    "PeftFactory",
    "PeftPair",
    "PeftSets",
    "PixelHead",
    "Prefix",
    "PrefixSite",
    "PromptPool",
    "PromptSite",
    "PromptedBackbone",
    "Prompts",
    "RandomLayer",
    "ResNet",
    "ResNet18",
    "ResNet20",
    "ResNet32",
    "ResNet56",
    "ResidualNeck",
    "RidgeHead",
    "SideBySide",
    "SimplexHead",
    "Site",
    "SlimResNet18",
    "SolutionSet",
    "TableResNet",
    "TargetHead",
    "TaskHead",
    "TaskNetworks",
    "Temporary",
    "TextHead",
    "Timm",
    "TorchvisionPixels",
    "TwoRanks",
    "WholeModel",
    "adapt_norms",
    "align_head",
    "align_rows",
    "batch_norms",
    "blocks_of",
    "built",
    "check_input_options",
    "clamp_embeddings",
    "compensate_scale",
    "component_weights",
    "consolidate",
    "distances",
    "drawn",
    "early_norm_parameters",
    "example",
    "feature_map",
    "forgetting",
    "frozen_copy",
    "gaussian_classifier",
    "gaussian_kernel",
    "head_as",
    "hsic",
    "in_eval_mode",
    "joined",
    "joined_rows",
    "kernel",
    "kl_to_standard_normal",
    "kmeans",
    "layers_of",
    "least_change",
    "linear_svm",
    "longest_edge",
    "map_stage",
    "margins",
    "most_frequent",
    "ncd_kmeans",
    "newly_used",
    "norm_parameters",
    "orthogonality",
    "orthonormal_rows",
    "perceptron",
    "plain_kmeans",
    "positions",
    "recurring",
    "recursive_ridge",
    "refit_norms",
    "risen_scale",
    "rotated_simplex",
    "save_text_embeddings",
    "set_statistics",
    "shortfall",
    "silhouette",
    "simplex",
    "solve_positive",
    "spectral_embedding",
    "spread_points",
    "square_distances",
    "template_mean",
    "transport",
    "two_sample_distance",
    "uncompiled",
    "validated_ridge",
    "weakly_regularised",
]
