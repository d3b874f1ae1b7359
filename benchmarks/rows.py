"""The rows of the tables: methods with their configs and options, by the kind of protocol that they are for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """A row of the tables.

    Attributes:
        config: In ``experiments/methods``.
        options: In addition to the options of the config.
        online: Whether it is made for a single pass over small batches too; False for methods with phases of many
            epochs.
    """

    config: str
    options: str = ""
    online: bool = True


MEMORY = "--model.memory_size {memory}"
METHODS = {
    "Finetune": Method("finetune"),
    "Joint": Method("joint", online=False),
    "Softmax masking": Method("softmax_masking"),
    "LwF": Method("lwf"),
    "LwF.MC": Method("lwf_mc"),
    "EWC": Method("ewc", "--model.fisher_samples 2000"),
    "SI": Method("finetune_si"),
    "SDC": Method("sdc"),
    "PLwF": Method("plwf"),
    "PASS": Method("pass", online=False),
    "SSRE": Method("ssre", online=False),
    "IL2A": Method("il2a", online=False),
    "NAPA-VQ": Method("napa_vq", online=False),
    "EFC": Method("efc", online=False),
    "EFC++": Method("efc_pp", online=False),
    "FeTrIL": Method("fetril", online=False),
    "PRD": Method("prd", online=False),
    "AQC": Method("aqc", "--model.num_classes null", online=False),
    "ICL": Method("icl", "--model.tolerance 0.05", online=False),
    "IF2Net (ridge)": Method("if2net_ridge", "--model.units 1000", online=False),
    "Sequential max-margin": Method("sequential_max_margin", "--model.regularisation 1", online=False),
    "ER": Method("er", MEMORY),
    "ER + softmax masking": Method("er_softmax_masking", MEMORY),
    "ER + EMA": Method("er_ema", f"{MEMORY} --trainer.callbacks.momentum 0.99"),
    "DER++": Method("derpp", MEMORY),
    "LODE": Method("lode", MEMORY),
    "FDR": Method("fdr", MEMORY),
    "X-DER": Method("xder", MEMORY),
    "HAL": Method("hal", MEMORY),
    "MER": Method("mer", f"{MEMORY} --model.per_sample false"),
    "ER + STAR": Method("er_star", MEMORY),
    "DER++ + Refresh": Method("derpp_refresh", MEMORY),
    "ER + FPF": Method("er_fpf", MEMORY),
    "k-FPF": Method("kfpf", MEMORY),
    "A-GEM": Method("agem", MEMORY),
    "GEM": Method("gem", f"{MEMORY} --model.replay_size 100"),
    "PCR": Method("pcr", MEMORY),
    "HPCR": Method("hpcr", MEMORY),
    "UER": Method("uer", MEMORY),
    "ER-ACE": Method("er_ace", MEMORY),
    "MIR": Method("mir", MEMORY),
    "SCR": Method("scr", MEMORY),
    "GSS": Method("gss", MEMORY),
    "ER-AML": Method("er_aml", MEMORY),
    "CLIB": Method("clib", MEMORY),
    "CBA": Method("cba", MEMORY),
    "RAR": Method("rar", MEMORY),
    "La-MAML": Method("la_maml", f"{MEMORY} --model.optimizer torch.optim.SGD --model.optimizer.lr 0.1"),
    "CoPE": Method(  # its loss is a sum over pairs, which needs a small learning rate
        "cope", f"{MEMORY} --model.optimizer torch.optim.SGD --model.optimizer.lr 0.01"
    ),
    "Evolved mixture": Method("evolved_mixture", MEMORY),
    "TAME": Method(  # with the momentum of its config the learning rate of the online tables, 0.1, is too large
        "tame", f"{MEMORY} --model.max_experts 5 --model.optimizer.momentum 0 --model.optimizer.nesterov false"
    ),
    "OnPro": Method("onpro", MEMORY),
    "iCaRL": Method("icarl", MEMORY, online=False),
    "BiC": Method("bic", MEMORY, online=False),
    "ER by the loader": Method("er_loader", MEMORY, online=False),
    "WA": Method("wa", MEMORY, online=False),
    "FOSTER": Method("foster", MEMORY, online=False),
    "DERExpand": Method("der_expand", MEMORY, online=False),
    "DRC": Method("drc", f"{MEMORY} --data.drop_last true", online=False),
    "BEEF": Method("beef", MEMORY, online=False),
    "TagFex": Method("tagfex", MEMORY, online=False),
    "MEMO": Method("memo", f"--model.budget_mb null {MEMORY}", online=False),
    "EEIL": Method("eeil", MEMORY, online=False),
    "iCaRL + RMM": Method("rmm_icarl", MEMORY, online=False),
    "GDumb": Method("gdumb", MEMORY),
    "Rainbow Memory": Method("rainbow_memory", MEMORY, online=False),
    "IL2M": Method(  # diverges with the learning rate of the others, 0.05
        "il2m",
        f"{MEMORY} --model.optimizer torch.optim.SGD --model.optimizer.lr 0.02 --model.optimizer.momentum 0.9",
        online=False,
    ),
    "LUCIR": Method("lucir", MEMORY, online=False),
    "COIL": Method("coil", MEMORY, online=False),
    "AER-ABS": Method("aer_abs", MEMORY, online=False),
    "PuriDivER": Method("puridiver", MEMORY, online=False),
    "RER": Method("rer", MEMORY, online=False),
    "mix-cd": Method("mixcd", MEMORY),
    "DGR": Method("dgr", MEMORY, online=False),
}
WITH_MLP = {  # with methods whose config names layers or sizes of this network
    **METHODS,
    "CWR*": Method("cwr_star"),
    "AR1": Method("ar1", MEMORY, online=False),
    "EBM": Method("ebm", "--model.backbone.hidden []"),
    "CL2R": Method("cl2r", "--model.memory_per_class 50", online=False),
    "HOC": Method("hoc", "--model.memory_per_class 50", online=False),
    "Generative replay": Method("generative_replay", online=False),
    "DCC": Method("dataset_condensation", "--model.images_per_class 12", online=False),  # 4 bytes per pixel
}
SHORT_TASKS: dict[str, Method] = {}  # with an average of the weights that suits tasks of a few steps
for _name, _row in METHODS.items():
    SHORT_TASKS[_name] = _row
    if _name == "ER + EMA":
        SHORT_TASKS["ER + EMA of 10 steps"] = Method("er_ema", f"{MEMORY} --trainer.callbacks.momentum 0.9")
SHORT_TASKS["PODNet"] = Method("podnet", MEMORY, online=False)  # needs a backbone with stages

LOCAL = "--model.loss_classes current"
TASK_INCREMENTAL = {
    "Finetune": Method("finetune", LOCAL),
    "Joint": Method("joint"),
    "L2": Method("l2", LOCAL),
    "EWC": Method("ewc", f"{LOCAL} --model.fisher_samples 2000"),
    "SI": Method("si", LOCAL),
    "MAS": Method("mas", LOCAL),
    "RWalk": Method("rwalk", LOCAL),
    "LwF": Method("lwf"),
    "GPM": Method("gpm"),
    "PackNet": Method("packnet"),
    "HAT": Method("hat"),
    "DST": Method("dst"),
    "RankUpdate": Method("rank_update"),
    "PNN": Method("pnn"),
    "HyperInterval": Method("hyper_interval"),
    "TRGP": Method("trgp"),
    "LAFTR": Method("laftr", "--model.estimator lin_act --model.distance softmax --model.distance_weight 1.0"),
}

NAMES = "--model.head.embeddings {data}/cifar100_class_embeddings.npz"
FECAM = "--model.power 0.5 --model.shrinkage [1.0,1.0] --model.shrinks 2 --model.unit_norm false"
CLOSED = {
    "SimpleCIL": Method("simplecil_vit32"),
    "NMC": Method("simplecil_vit32", "--model.metric euclidean"),
    "LDA": Method(
        "fsa_vit32", "--model.adapt false --model.head LDAHead --model.head.covariance within --model.head.ridge 0.01"
    ),
    "RanPAC without phase 1": Method("ranpac_vit32", "--model.adapt false --model.projection 2000"),
    "G-ACIL": Method("gacil_vit32", "--model.projection 2000"),
    "SLDA": Method("slda"),
    "Kalman filter, no drift": Method("kalman"),
    "Mahalanobis": Method("mahalanobis_vit32"),
    "FeCAM": Method("fecam_vit32", FECAM),
    "FeCAM, common covariance": Method("fecam_vit32", f"{FECAM} --model.covariance common"),
    "DS-AL": Method(
        "dsal",
        "--model.adapt false --model.projection 2000 --model.ridge 100 --model.compensation_ridge 100 "
        "--model.backend accumulate",
    ),
}
LONG_TAILED = {
    **{name: CLOSED[name] for name in ("NMC", "LDA", "SLDA", "G-ACIL")},
    "AEF-OCL": Method("aef_ocl"),
}
ADAPTED = {
    "DE&E": Method("dee", "--trainer.max_epochs 1"),
    "linear head": Method("linear_probe_vit32", "--trainer.max_epochs {epochs}"),
    "linear head, all classes": Method("linear_probe_vit32", "--model.loss_classes all --trainer.max_epochs {epochs}"),
    "DKVB": Method("dkvb_vit32", "--model.key_images {data}/cifar10_test.npz --trainer.max_epochs {epochs}"),
    "DKVB, keys of the first task": Method("dkvb_vit32", "--trainer.max_epochs {epochs}"),
    "InputTuning": Method("input_tuning_vit32", "--trainer.max_epochs {epochs}"),
    "PromptSRC": Method("promptsrc_vit32", "--trainer.max_epochs {epochs}"),
    "FSA": Method("fsa_vit32"),
    "APER": Method("aper_vit32"),
    "APER, shallow prompts": Method("aper_vpt_shallow_vit32"),
    "RanPAC": Method("ranpac_vit32", "--model.projection 2000"),
    "SLCA": Method("slca_vit32", "--trainer.max_epochs {epochs}"),
    "LAE": Method("lae_vit32", "--trainer.max_epochs {epochs}"),
    "EASE": Method("ease_vit32", "--trainer.max_epochs {epochs}"),
    "MomentumInterpolation": Method("mom_interp_vit32", "--trainer.max_epochs {epochs}"),
    "CoFiMA": Method("cofima_vit32", "--trainer.max_epochs {epochs}"),
    "CoMA": Method("cofima_vit32", "--trainer.max_epochs {epochs} --model.importance equal"),
    "MagMax": Method("magmax_vit32", "--trainer.max_epochs {epochs}"),
    "ITA": Method("ita_vit32", "--trainer.max_epochs {epochs}"),
    "ITA, LoRA": Method("ita_lora_vit32", "--trainer.max_epochs {epochs}"),
    "IEL": Method("iel_vit32", "--trainer.max_epochs {epochs}"),
    "SD-LoRA": Method("sd_lora_vit32", "--trainer.max_epochs {epochs}"),
    "CL-LoRA": Method("cl_lora_vit32", "--trainer.max_epochs {epochs}"),
    "MOS": Method("mos_vit32", "--trainer.max_epochs {epochs}"),
    "TUNA": Method("tuna_vit32", "--trainer.max_epochs {epochs}"),
    "L2P": Method("l2p_vit32", "--trainer.max_epochs {epochs}"),
    "DualPrompt": Method("dual_prompt_vit32", "--trainer.max_epochs {epochs}"),
    "CODA-Prompt": Method("coda_prompt_vit32", "--trainer.max_epochs {epochs}"),
    "S-Prompts": Method("s_prompts_vit32", "--trainer.max_epochs {epochs}"),
    "S-liPrompts": Method("s_liprompts_vit32", f"{NAMES} --trainer.max_epochs {{epochs}}"),
    "EAR": Method("ear_vit32", "--trainer.max_epochs {epochs}"),
    "OnePrompt": Method("one_prompt_vit32", "--trainer.max_epochs {epochs}"),
    "OVOR": Method("ovor_vit32", "--trainer.max_epochs {epochs}"),
    "InfLoRA": Method("inflora_vit32", "--trainer.max_epochs {epochs}"),
    "RAPF": Method("rapf_vit32", f"{NAMES} --trainer.max_epochs {{epochs}}"),
    "MG-CLIP": Method("mg_clip_vit32", NAMES),
    "PROOF": Method("proof_vit32", f"{NAMES} {MEMORY} --trainer.max_epochs {{epochs}}"),
}
STEPLESS = {"prototypes (ProtoCosine)": Method("proto_cosine"), "TEEN": Method("teen")}
FEW_SHOT_METHODS = {
    **STEPLESS,
    "NC-FSCIL": Method("nc_fscil"),
    "SoftNet": Method("softnet"),
    "WaRP": Method("warp"),
}
ADAPTING = {
    "source": Method("source_cifar10"),
    "batch statistics": Method("source_cifar10", "--model BNAdapt"),
    "mixed statistics (alpha-BN)": Method("source_cifar10", "--model BNAdapt --model.statistics mix --model.alpha 0.5"),
    "Core": Method("source_cifar10", "--model Core"),
    "Tent": Method("source_cifar10", "--model Tent"),
    "RPL": Method("source_cifar10", "--model RPL"),
    "EATA": Method("source_cifar10", "--model EATA"),
    "RDumb": Method("source_cifar10", "--model RDumb"),
    "SAR": Method("source_cifar10", "--model SAR"),
    "DeYO": Method("source_cifar10", "--model DeYO"),
    "WisdomOfCrowds": Method("source_cifar10", "--model WisdomOfCrowds"),
    "ROID": Method("source_cifar10", "--model ROID"),
    "CMF": Method("source_cifar10", "--model CMF"),
    "CoTTA": Method("source_cifar10", "--model CoTTA"),
    "PETAL": Method("source_cifar10", "--model PETAL --model.posterior_options.epochs 0"),
    "ViDA": Method("source_cifar10", "--model ViDA --model.adapter_options.epochs 0 --model.targets '[\"*conv*\"]'"),
    "VisualDomainPrompt": Method("source_cifar10", "--model VisualDomainPrompt"),
    "RoTTA": Method("source_cifar10", "--model RoTTA"),
    "T3A": Method("source_cifar10", "--model T3A"),
    "LAME": Method("source_cifar10", "--model LAME"),
    "LAME (rbf)": Method("source_cifar10", "--model LAME --model.affinity rbf"),
}
# Methods with something to reset.
LEARNING = (
    *("Core", "Tent", "RPL", "EATA", "SAR", "DeYO", "WisdomOfCrowds", "ROID", "CMF", "CoTTA", "PETAL", "ViDA"),
    *("VisualDomainPrompt", "RoTTA", "T3A"),
)
