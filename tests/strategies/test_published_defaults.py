"""Defaults of methods are the numbers of their papers, or of the authors' code where a docstring says so."""

import importlib
import inspect

import pytest

from cl_lightning.strategies.exemplar_free.efc_pp import EFCpp
from cl_lightning.strategies.exemplar_free.fetril import FeTrIL
from cl_lightning.strategies.pretrained.slca import SLCA

DEFAULTS = {
    "exemplar_free.efc.EFC": {"feature_weight": 10, "identity_weight": 0.1, "drift_sigma": 0.2},
    "exemplar_free.fetril.FeTrIL": {"svm_cost": 1},
    "exemplar_free.lwf.LwF": {"distill_weight": 1, "temperature": 2},
    "exemplar_free.pass_.PASS": {"prototype_weight": 10, "distill_weight": 10, "temperature": 0.1},
    "exemplar_free.prd.PRD": {
        "prototype_weight": 2,
        "distill_weight": 4,
        "contrast_temperature": 0.1,
        "distill_temperature": 1,
        "projection_hidden": 512,
        "projection_size": 128,
    },
    "few_shot.proto_cosine.ProtoCosine": {"scale": 16},
    "few_shot.teen.TEEN": {"shift_weight": 0.5, "temperature": 16},
    "online.pcr.PCR": {"memory_size": 1000, "temperature": 0.09},
    "pretrained.coda_prompt.CODAPrompt": {"components": 10, "length": 8, "blocks": (0, 1, 2, 3, 4), "ortho_weight": 0},
    "pretrained.dkvb.DKVB": {
        "codebooks": 256,
        "keys": 4096,
        "key_dim": 14,
        "key_epochs": 10,
        "key_batch": 256,
        "key_decay": 0.95,
        "label_smoothing": 0.1,
    },
    "pretrained.dual_prompt.DualPrompt": {
        "general_length": 5,
        "general_blocks": (0, 1),
        "expert_length": 5,
        "expert_blocks": (2, 3, 4),
        "key_weight": 1,
        "low": 0,
        "high": 0.01,
    },
    "pretrained.fsa.FSA": {"session_dropout": 0.5},
    "pretrained.gacil.GACIL": {"ridge": 100, "projection": 5000},
    "pretrained.inflora.InfLoRA": {"rank": 10, "energy": 0.95},
    "pretrained.l2p.L2P": {"pool_size": 10, "length": 10, "top_k": 4, "key_weight": 1, "low": 0, "high": 0.01},
    "pretrained.lae.LAE": {"momentum": 0.9999, "freeze_epochs": 3},
    "pretrained.one_prompt.OnePrompt": {"lengths": (5, 5, 20, 20, 20), "blocks": (0, 1, 2, 3, 4), "low": 0, "high": 1},
    "pretrained.ovor.OVOR": {
        "outlier_weight": 0.1,
        "energy_in": -15,
        "energy_out": -3,
        "per_class": 40,
        "neighbours": 50,
        "boundary": 50,
        "draws": 600,
        "spread": 0.1,
    },
    "pretrained.ranpac.RanPAC": {"projection": 10_000},
    "pretrained.s_prompts.SPrompts": {"length": 10, "centres": 5},
    "pretrained.slca.SLCA": {"align_samples": 256, "align_temperature": 0.1, "mean_shrink": 0.1, "jitter": 1e-4},
    "rehearsal.bic.BiC": {"memory_size": 2000, "temperature": 2, "held_out": 0.1},
    "rehearsal.derpp.DER": {"logit_weight": 0.3},
    "rehearsal.derpp.DERpp": {"logit_weight": 0.1, "label_weight": 0.5},
    "rehearsal.eeil.EEIL": {"memory_size": 2000, "distill_weight": 1, "temperature": 2, "noise_decay": 0.55},
    "rehearsal.foster.FOSTER": {
        "memory_size": 2000,
        "distill_weight": 1,
        "temperature": 2,
        "boost_beta": 0.96,
        "compress_beta": 0.97,
    },
    "rehearsal.gdumb.GDumb": {"mix_probability": 0.5, "mix_alpha": 1},
    "rehearsal.gem.GEM": {"memory_strength": 0.5, "ridge": 1e-3},
    "rehearsal.icarl.ICaRL": {"memory_size": 2000, "temperature": 2},
    "rehearsal.lucir.LUCIR": {"less_forget_weight": 5, "margin": 0.5, "num_negatives": 2, "margin_weight": 1},
    "rehearsal.podnet.PODNet": {"spatial_weight": 3, "flat_weight": 1, "margin": 0.6, "proxies": 10},
    "rehearsal.wa.WA": {"memory_size": 2000, "temperature": 2},
    "test_time.cotta.CoTTA": {"restore": 0.01},
    "test_time.mean_teacher.MeanTeacherAdaptation": {"teacher_momentum": 0.999},
    "test_time.mean_teacher.ViewAveragedTeacher": {"threshold": 0.92, "views": 32},
    "test_time.eata.EATA": {"margin": 0.4, "diversity": 0.4, "fisher_weight": 1, "fisher_samples": 2000},
    "test_time.lame.LAME": {"neighbours": 5, "iterations": 100},
}


@pytest.mark.parametrize("path", DEFAULTS)
def test_defaults_are_the_published_numbers(path):
    module, name = path.rsplit(".", 1)
    method = getattr(importlib.import_module(f"cl_lightning.strategies.{module}"), name)
    defaults = {key: value.default for key, value in inspect.signature(method).parameters.items()}
    assert {key: defaults[key] for key in DEFAULTS[path]} == DEFAULTS[path]


@pytest.mark.parametrize(
    ("options", "epochs", "batch_size", "optimizer"),
    [
        (lambda: EFCpp().rebalance_options, 50, 256, {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}),
        (lambda: FeTrIL().head_options, 50, None, {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}),
        (lambda: SLCA().align_options, 5, 256, {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}),
    ],
)
def test_second_phases_have_the_published_options(options, epochs, batch_size, optimizer):
    found = options()
    assert (found.epochs, found.batch_size) == (epochs, batch_size)
    assert found.optimizer.keywords == optimizer
