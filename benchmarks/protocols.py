"""The protocols on which methods are compared, with the rows of each: what benchmarks.comparison runs."""

from dataclasses import dataclass

from benchmarks.rows import (
    ADAPTED,
    ADAPTING,
    CLOSED,
    FEW_SHOT_METHODS,
    LEARNING,
    LONG_TAILED,
    METHODS,
    SHORT_TASKS,
    STEPLESS,
    TASK_INCREMENTAL,
    WITH_MLP,
    Method,
)
from cl_lightning.report import comparison as measures

COLUMNS = (
    measures.LAST,
    measures.INCREMENTAL,
    measures.FORGETTING,
    measures.KNOWN,
    measures.SECONDS,
    measures.BYTES,
)
FEW_SHOT = (
    measures.LAST,
    measures.INCREMENTAL,
    *(
        measures.Measure(name, title, "percent", True, lambda run, name=name: run.last.get(name))  # type: ignore[misc]
        for name, title in (
            ("base_accuracy", "base"),
            ("novel_accuracy", "novel"),
            ("harmonic_accuracy", "harmonic mean"),
            ("performance_drop", "performance drop"),
        )
    ),
    measures.SECONDS,
)


def of_curves(name: str, title: str) -> measures.Measure:
    """A measure of continual evaluation."""
    return measures.Measure(name, title, "percent", True, lambda run: run.curves and run.curves.measures.get(name))


GAP = (
    measures.LAST,
    of_curves("worst_case_accuracy", "WC-ACC"),
    of_curves("min_accuracy", "min-ACC"),
    measures.SECONDS,
)
ANYTIME = (measures.LAST, of_curves("area_under_accuracy", "A_AUC"), measures.SECONDS, measures.BYTES)
WITH_TASKS = (
    measures.KNOWN,
    *(
        measures.Measure(name, title, "percent", better, lambda run, name=name: run.last.get(f"task_aware/{name}"))  # type: ignore[misc]
        for name, title, better in (
            ("average_incremental_accuracy", "average incremental", True),
            ("learning_accuracy", "just learnt", True),
            ("forgetting", "forgetting", False),
        )
    ),
    measures.SECONDS,
    measures.BYTES,
)
TEST_TIME = (measures.ONLINE, measures.SECONDS, measures.BYTES)


@dataclass(frozen=True)
class Protocol:
    """What all methods have in common.

    Attributes:
        title: In the page.
        says: What a reader has to know.
        options: Of the command.
        online: Whether it is a single pass over small batches.
        methods: Rows; None for those that learn from scratch.
        memory: Images that a method may keep, where its row says ``{memory}``.
        epochs: Of a task, where its row says ``{epochs}``.
        columns: Measures.
        detail: Name of a matrix or a measure of the results, one number per task, that gets a table of its own.
    """

    title: str
    says: str
    options: str
    online: bool = False
    methods: "dict[str, Method] | None" = None
    memory: int = 500
    epochs: int = 3
    columns: tuple[measures.Measure, ...] = COLUMNS
    detail: str | None = None


FASHION = "--data NpzData --data.path {data}/fashion_mnist.npz --data.mean [0.286] --data.std [0.353]"
CNN = (
    '--model.backbone Timm --model.backbone.name mobilenetv2_100 --model.backbone.kwargs \'{{"pad_type":"same"}}\' '
    "--model.backbone.weights {data}/models/mobilenetv2_100_imagenet_fp16.pt"
)
CNN_PIXELS = "--data.resize 96 --data.mean [0.5] --data.std [0.5]"
CNN_STREAM = f"--config cifar100_10x10_npz_imagenet {CNN} --data.path {{data}}/cifar100.npz {CNN_PIXELS}"
SESSIONS = "--config cifar100_fscil_npz --data.path {data}/cifar100.npz"
VIT = "--config cifar100_10x10_npz_imagenet --data.path {data}/cifar100.npz"
RESNET56 = (
    "--model.backbone ResNet56 --model.backbone.weights {data}/models/cifar10_resnet56.pt "
    "--model.source_head {data}/models/cifar10_resnet56.pt"
)
STREAM = "--config cifar10c_npz --data.base.path {data}/cifar10_test.npz --data.samples 1000"
FIVE = "--data.scenario ClassIncremental --data.scenario.tasks 5"
BLURRY = "--data.scenario Blurry --data.scenario.tasks 5"
DOMAINS = "--data.scenario RotatedDomains --data.scenario.degrees [0.0,30.0,60.0,90.0]"
OFFLINE = f"{FASHION} {FIVE} --data.batch_size 128"


def orders(tasks: int) -> str:
    """Options for equal tasks in an order that the seed draws."""
    return f"--data.scenario ClassIncremental --data.scenario.tasks {tasks} --data.scenario.class_order random"


def subset(scenario: str, per_class: int, test_per_class: int) -> str:
    """Options for some samples of each class, of a scenario's options."""
    inner = scenario.replace("--data.scenario", "--data.scenario.base")
    return (
        f"--data.scenario Subset {inner} --data.scenario.per_class {per_class} "
        f"--data.scenario.test_per_class {test_per_class}"
    )


def noisy(scenario: str, rate: float) -> str:
    """Options for wrong labels of a share of the training samples, of a scenario's options."""
    inner = scenario.replace("--data.scenario", "--data.scenario.base")
    return f"--data.scenario NoisyLabels {inner} --data.scenario.rate {rate}"


def online(scenario: str) -> str:
    """Options for one pass in batches of 10, of a scenario's options, with the learning rate of online papers."""
    return (
        f"--data.batch_size 10 --data.scenario Online {scenario.replace('--data.scenario', '--data.scenario.base')} "
        "--model.optimizer torch.optim.SGD --model.optimizer.lr 0.1"
    )


MLP = "--model.backbone MLP"
SLIM = "--model.backbone SlimResNet18 --trainer.precision bf16-mixed"

NOISES = (0.0, 0.2, 0.4)
UNDER_NOISE = {  # the rate is an option of a row, so that one table has all rates
    f"{name}, {100 * rate:.0f} %": Method(
        METHODS[name].config, f"{METHODS[name].options} {FASHION} {noisy(subset(FIVE, 500, 200), rate)}".strip()
    )
    for name in ("Finetune", "ER", "ER-ACE", "AER-ABS", "PuriDivER")
    for rate in NOISES
}

PROTOCOLS = {
    "fashion_mlp": Protocol(
        "Split-Fashion-MNIST, 5 tasks of 2 classes, MLP, offline",
        "MLP 784-400-400, 3 epochs per task, batches of 128, no augmentation, a memory of 500 for methods with a "
        "memory. 3 epochs are too few for the second phase of FOSTER: with 1,500 images of each class the boosted "
        "network reaches 73.9, the compressed network 67.3 after 3 epochs and 77.3 after 12 (seed 0). A-GEM only keeps "
        "the mean loss of the memory from rising: it knows old classes where the task is known (98.5, fine-tuning "
        "58.8), but predicts new classes otherwise. WA mixes its 500 exemplars with the 12,000 images of a task by the "
        "loader, as ER by the loader, while ER replays as many samples in each step as the batch has: WA is to be "
        "compared with ER by the loader, which it exceeds by its distillation and the alignment. DERExpand, MEMO and "
        "TagFex mix by the loader too, and stay below it: without the alignment of the head DERExpand reaches 67.0 and "
        "MEMO 65.6 (seed 0); the rest of the difference is not explained. AR1 keeps "
        "the first layer of two classes, and its penalty is not the cause of its distance to ER (without it: 67.9).",
        f"{OFFLINE} {MLP} --trainer.max_epochs 3",
        methods=WITH_MLP,
    ),
    "fashion_mlp_online": Protocol(
        "Split-Fashion-MNIST, 5 tasks of 2 classes, MLP, online",
        "MLP 784-400-400, one pass in batches of 10 by SGD with learning rate 0.1, no augmentation except in PCR, "
        "HPCR, SCR and OnPro, a memory of 500 for methods with a memory.",
        f"{FASHION} {online(FIVE)} {MLP} --trainer.max_epochs 1",
        online=True,
    ),
    "fashion_mlp_gap": Protocol(
        "Split-Fashion-MNIST, 5 tasks of 2 classes, MLP, online: the stability gap",
        "As above, evaluated every 25 steps on 100 test images of each task: the drop of the accuracy on old tasks "
        "at the start of a new task, without and with an exponential moving average of the weights. min-ACC: mean "
        "over old tasks of the lowest accuracy after they ended; WC-ACC: worst-case accuracy (De Lange et al., "
        "arXiv:2205.13452).",
        f"{FASHION} {online(FIVE)} {MLP} --trainer.max_epochs 1 --trainer.callbacks+=ContinualEvaluation "
        "--trainer.callbacks.every_n_steps 25 --trainer.callbacks.samples 100",
        methods={name: METHODS[name] for name in ("Finetune", "ER", "ER + EMA")},
        columns=GAP,
    ),
    "fashion_mlp_blurry": Protocol(
        "i-Blurry-50-10 of Fashion-MNIST, 5 tasks, MLP, online",
        "As the online table, on the stream of Koh et al. (arXiv:2110.10031): half of the classes occur in one task "
        "alone, and a tenth of the samples of each other class in other tasks than its own. A_AUC: accuracy on the "
        "classes that have arrived, mean of evaluations every 1,000 samples on 200 test images of each task.",
        f"{FASHION} {online(BLURRY)} {MLP} --trainer.max_epochs 1 --trainer.callbacks+=ContinualEvaluation "
        "--trainer.callbacks.every_n_samples 1000 --trainer.callbacks.samples 200",
        methods={name: METHODS[name] for name in ("Finetune", "ER", "ER-ACE", "MIR", "PCR", "CLIB", "CoPE")},
        columns=ANYTIME,
    ),
    "fashion_mlp_tasks": Protocol(
        "Split-Fashion-MNIST, 5 tasks of 2 classes, MLP, offline, with the task known",
        "As the first table, for methods of task-incremental learning: the task of each test image is known, and its "
        "class is one of the two of this task. Methods for all classes have the cross-entropy over the classes of the "
        "task. LAFTR draws 40 inputs per earlier task and step; its closed form takes minutes with 784 "
        "pixels. Do not compare these accuracies with other tables.",
        f"{OFFLINE} {MLP} --trainer.max_epochs 3",
        methods=TASK_INCREMENTAL,
        columns=WITH_TASKS,
    ),
    "fashion_mlp_noise": Protocol(
        "Split-Fashion-MNIST with noisy labels, 5 tasks of 2 classes, MLP, offline",
        "500 training images of each class, of which 0, 20 or 40 % have the label of the other class of their task, "
        "and 200 test images with correct labels; MLP 784-400-400, 6 epochs per task, batches of 32, no augmentation, "
        "a memory of 500 for methods with a memory. AER-ABS replays in half of the epochs; PuriDivER has 8 further "
        "epochs on the memory at the end of each task.",
        f"{MLP} --data.batch_size 32 --trainer.max_epochs 6",
        methods=UNDER_NOISE,
    ),
    "fashion_slim": Protocol(
        "Split-Fashion-MNIST, 5 tasks of 2 classes, slim ResNet-18, offline",
        "500 training images of each class and 200 test images, slim ResNet-18, 3 epochs per task in bf16-mixed, "
        "batches of 128, a memory of 500 for methods with a memory. A task has 24 steps, 36 where the loader mixes the "
        "memory with the data. An average of the weights with momentum 0.99 covers about 100 steps, four tasks: "
        "it hardly contains the new classes (forgetting 1.6). The first task of PASS, 2 classes in four rotations, "
        "has 24 steps too, and its later tasks hold the features of this network with weight 10: they forget little "
        "(20.4) and learn little; the published first task has 50 classes and 101 epochs. WA mixes the memory with the "
        "data by the loader, and has 3 of the 20 epochs of its config. A-GEM knows old classes where the task is known "
        "(96.3, fine-tuning 49.3), but predicts new classes otherwise.",
        f"{FASHION} {subset(FIVE, 500, 200)} --data.batch_size 128 {SLIM} --trainer.max_epochs 3",
        methods=SHORT_TASKS,
    ),
    "fashion_slim_online": Protocol(
        "Split-Fashion-MNIST, 5 tasks of 2 classes, slim ResNet-18, online",
        "500 training images of each class and 200 test images, slim ResNet-18, one pass in batches of 10 by SGD "
        "with learning rate 0.1 in bf16-mixed, a memory of 500 for methods with a memory.",
        f"{FASHION} {online(subset(FIVE, 500, 200))} {SLIM} --trainer.max_epochs 1",
        online=True,
    ),
    "cifar100_b50": Protocol(
        "CIFAR-100, 50 classes and 5 tasks of 10, ResNet-32",
        "100 training images of each class and 50 test images, ResNet-32, 3 epochs per task in bf16-mixed, batches "
        "of 32, random crops and flips, the class order of numpy's seed 1993, a memory of 2000 for methods with a "
        "memory. Published runs use all 500 images of a class and 70 to 200 epochs: these rows show that all "
        "methods run on the protocol, not the accuracies that they can reach. A later task has 93 steps, about as "
        "many as the average of ER + EMA covers. PASS, EFC and FeTrIL build on the features of the first task, here of "
        "469 steps.",
        "--config cifar100_b50_inc10_npz --data.path {data}/cifar100.npz "
        + subset(
            "--data.scenario ClassIncremental --data.scenario.first 50 --data.scenario.increment 10 "
            "--data.scenario.class_order 1993",
            100,
            50,
        )
        + " --data.batch_size 32 --model.backbone ResNet32 --trainer.precision bf16-mixed --loop.channels_last true "
        "--trainer.max_epochs 3",
        memory=2000,
    ),
    **{
        f"cifar100_cnn{suffix}": Protocol(
            f"CIFAR-100, {tasks} tasks, frozen MobileNetV2 at 96 x 96 pixels",
            "Weights of ImageNet-1k, class orders drawn by the seed, cached features (`loop.feature_cache`). The "
            "time of a first row includes the pass over all images if the cache was empty.",
            f"{CNN_STREAM} {orders(tasks)} --loop.feature_cache {{runs}}/features",
            methods=CLOSED,
        )
        for suffix, tasks in (("", 10), ("_5", 5), ("_20", 20))
    },
    "cifar100_cnn_long_tailed": Protocol(
        "Long-tailed CIFAR-100, 10 tasks, frozen MobileNetV2 at 96 x 96 pixels",
        "As above with 500 to 5 training images of a class, sizes mixed over the tasks; all test images.",
        f"{CNN_STREAM} --data.scenario LongTailed {orders(10).replace('--data.scenario', '--data.scenario.base')} "
        "--data.scenario.imbalance 100 --data.scenario.arrangement shuffled --loop.feature_cache {runs}/features",
        methods=LONG_TAILED,
    ),
    "cifar100_cnn_trained": Protocol(
        "CIFAR-100, 10 tasks, trained MobileNetV2 at 96 x 96 pixels",
        "As above with 100 training images of each class and 20 test images, batches of 32 in bf16-mixed: 5 epochs "
        "in the first task (FSA), 2 epochs in each task (SLCA). The batch normalisation of SLCA keeps the "
        "pretrained statistics: with 50 images of a class and seed 0 its last accuracy is 37.3, but 28.6 if the "
        "statistics are updated with the images of the tasks. FSA, adapted to 1,000 images of ten classes, is "
        "better than LDA without adaptation on early tasks, but not on all classes.",
        f"{CNN_STREAM} {subset(orders(10), 100, 20)} --data.batch_size 32 --trainer.precision bf16-mixed",
        methods={
            **{name: CLOSED[name] for name in ("SimpleCIL", "LDA")},
            "FSA": Method("fsa_vit32", "--model.session_epochs 5"),
            "SLCA": Method("slca_vit32", "--trainer.max_epochs {epochs} --model.freeze_norm always"),
        },
        epochs=2,
    ),
    "cifar100_vit": Protocol(
        "CIFAR-100, 10 tasks, a small ViT for 32 x 32 pixels",
        "200 training images of each class and 50 test images; 2.75 M parameters, pretrained on Tiny-ImageNet, "
        "class orders drawn by the seed, bf16-mixed, batches of 32. Methods that train in each task have 3 epochs "
        "per task (LAE and OVOR one more, for the head only), methods that train only in the first task have 20 epochs "
        "there. The linear head on frozen features has the loss of L2P, CODA-Prompt and LAE, cross-entropy over the "
        "classes of the task, and nothing in the backbone. In L2P the same 4 of 10 prompts are selected for all images "
        "from the first epoch on (`prompts/used` is 4.0). RAPF and PROOF compare the features with text embeddings of "
        "the class names by another network (CLIP ViT-B/32), which a linear map has to learn; PROOF keeps 500 images.",
        f"{VIT} {subset(orders(10), 200, 50)} --data.batch_size 32 --trainer.precision bf16-mixed",
        methods={
            **{name: CLOSED[name] for name in ("SimpleCIL", "LDA", "G-ACIL")},
            **ADAPTED,
        },
    ),
    "cifar100_vit_domains": Protocol(
        "CIFAR-100 in four rotations as domains, a small ViT for 32 x 32 pixels",
        "Images rotated by 0, 30, 60 and 90 degrees, one domain after the other with all classes: 50 training images "
        "of each class and 10 test images, 3 epochs per domain (DUCT 5 more for the rows) in bf16-mixed, batches of 32."
        " Fine-tuning has the config of MomentumInterpolation, without the callback.",
        f"{VIT} {subset(DOMAINS, 50, 10)} --data.batch_size 32 --trainer.precision bf16-mixed",
        methods={
            **{name: ADAPTED[name] for name in ("linear head", "L2P", "DualPrompt", "S-Prompts", "OnePrompt", "EAR")},
            **{
                name: ADAPTED[name]
                for name in ("linear head", "InputTuning", "L2P", "DualPrompt", "S-Prompts", "OnePrompt", "PromptSRC")
            },
            "Finetune": Method("mom_interp_vit32", "--trainer.callbacks null --trainer.max_epochs {epochs}"),
            "MomentumInterpolation": Method("mom_interp_vit32", "--trainer.max_epochs {epochs}"),
            "MagMax": Method("magmax_vit32", "--trainer.max_epochs {epochs}"),
            "CoFiMA": Method("cofima_vit32", "--trainer.max_epochs {epochs}"),
            "DUCT": Method("duct_vit32", "--trainer.max_epochs {epochs}"),
        },
    ),
    "cifar100_few_shot": Protocol(
        "CIFAR-100, 60 classes and 8 sessions of 5 classes with 5 images, ResNet-20",
        "4 epochs of the base session in bf16-mixed (published: 100 to 600), the images of the sessions drawn by "
        "the seed. Base and novel are mean accuracies per class after the last session. After such a short base "
        "session the features of all classes have nearly the same direction (the mean cosine of two base prototypes "
        "is 0.81): the weights of TEEN spread over 25 of the 60 base classes, so that new prototypes are shifted "
        "towards the mean of all base prototypes, which improves none of them. The paper's gain is with 600 epochs; "
        "the next section has a gain with better features.",
        f"{SESSIONS} --model.backbone ResNet20 --trainer.max_epochs 4 --trainer.precision bf16-mixed",
        methods=FEW_SHOT_METHODS | {"FACT": Method("fact")},
        columns=FEW_SHOT,
        detail="average_accuracy",
    ),
    "cifar100_few_shot_cnn": Protocol(
        "CIFAR-100, 60 classes and 8 sessions of 5 classes with 5 images, frozen MobileNetV2",
        "As above on cached features of ImageNet-1k at 96 x 96 pixels, without training on the base session, so "
        "that the two methods differ only in the prototypes of new classes.",
        f"{SESSIONS} --model.adapt false {CNN} {CNN_PIXELS} --loop.feature_cache {{runs}}/features",
        methods=STEPLESS,
        columns=FEW_SHOT,
        detail="average_accuracy",
    ),
    **{
        name: Protocol(
            f"CIFAR-10-C from the first 1,000 test images, severity 5, {title}, ResNet-56",
            f"15 corruptions, with a synthetic frost, {says}. Online error: error of the predictions before the step "
            f"on the batch, mean over corruptions.{why}",
            f"{STREAM} {RESNET56} --trainer.precision bf16-mixed {options}",
            methods={name: row for name, row in ADAPTING.items() if "reset" not in options or name in LEARNING},
            columns=TEST_TIME,
            detail="online_error",
        )
        for name, title, says, options, why in (
            (
                "cifar10c",
                "continual",
                "one after another without reset, batches of 200",
                "",
                " LAME makes the predictions of neighbours in a batch agree, which increases the error when classes "
                "are mixed: a little with 5 nearest neighbours, more with the rbf kernel, which connects the whole "
                "batch (published, with another network: 64.3).",
            ),
            (
                "cifar10c_reset",
                "reset",
                "each from the source network, batches of 200; only methods with something to reset are listed",
                "--model.reset domain",
                "",
            ),
            (
                "cifar10c_sorted",
                "sorted by class",
                "without reset, batches of 200",
                "--data.order sorted",
                " The statistics of a batch with few classes differ from the statistics of the domain, so methods "
                "that normalise by the batch fail. Neighbours have the same class here, the case for which LAME is "
                "made.",
            ),
            (
                "cifar10c_one",
                "batches of 1",
                "without reset, 200 images each",
                "--data.samples 200 --data.batch_size 1",
                " With the statistics of a single image predictions are poor, and entropy minimisation (Tent) "
                "collapses to one class. Their entropy is so high that EATA finds no reliable sample and never "
                "takes a step. LAME has no neighbours.",
            ),
        )
    },
}


def rows_of(protocol: str) -> dict[str, Method]:
    """The methods that a protocol is for."""
    return PROTOCOLS[protocol].methods or METHODS
