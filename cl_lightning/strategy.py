"""The base of all continual-learning methods: a LightningModule that learns one task after another."""

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from cl_lightning.backbones import MLP, Backbone, ImageShape
from cl_lightning.batch import Batch, mix
from cl_lightning.closed_form import ClosedFormHead
from cl_lightning.distributed import all_gather_together, all_names, all_sum, rank, world_size
from cl_lightning.feature_cache import KEYS, STORED, FeatureCache, FeatureStore
from cl_lightning.features import FeaturePool
from cl_lightning.heads import Head, LinearHead
from cl_lightning.hooks import AddsLosses, ContinualCallback, Progress
from cl_lightning.importance import Importance
from cl_lightning.lean import fuse
from cl_lightning.losses import cross_entropy, masked_logits
from cl_lightning.measures import StreamAccuracy
from cl_lightning.memory import Memory
from cl_lightning.network import Network, Output, batch_norms
from cl_lightning.parameter_groups import apply_lr_factors, with_lr_factors
from cl_lightning.prototypes import Prototypes
from cl_lightning.schedules import PhaseSchedule
from cl_lightning.stream import Task
from cl_lightning.teacher import Teacher

if TYPE_CHECKING:
    from cl_lightning.measures import Row

Visible = Literal["all", "current", "task"]
FreezeNorm = Literal["never", "after_first", "always"]
BackboneFactory = Callable[[ImageShape], Backbone]
HeadFactory = Callable[[int], Head]


@dataclass(frozen=True)
class Phase:
    """One fit inside a task.

    Attributes:
        name: Names the phase in logs, in ``loop.phase_epochs`` and in checkpoints.
        epochs: Number of epochs; None for those of the Trainer.
        optimizer: Builds the optimizer of this phase; None for the strategy's.
        scheduler: Builds its schedule; None for the strategy's where ``optimizer`` is None too, else for none.
        on_features: Train the head alone, on rows of ``ContinualStrategy.feature_pool``, which take the place of images
            in its batches. Callbacks add no losses to such a phase: theirs are of images.
        batch_size: Rows per step of a phase on features, over all processes; None for that of the data.
    """

    name: str = "train"
    epochs: int | None = None
    optimizer: OptimizerCallable | None = None
    scheduler: LRSchedulerCallable | None = None
    on_features: bool = False
    batch_size: int | None = None


def default_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Of strategies that were given none."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


class ContinualStrategy(LightningModule):
    """Owns the network and all that a method remembers; a subclass says what it learns from.

    A step is ``batch = prepare(batch)``, one forward pass, then ``losses(batch, output)``; the base sums the terms,
    adds those of callbacks, logs them and steps. A subclass writes ``losses`` and, where the method needs them,
    ``prepare``, ``edit_gradients``, ``observe``, ``begin_task``, ``end_task``, ``phases``, ``trainable`` and
    ``predict``. Whatever must outlive a task is a parameter, a buffer or a module of tensors, so that it is in
    ``state_dict`` and a restart finds it again.

    Args:
        backbone: Builds the feature extractor for a shape of image ``(channels, height, width)``; None for ``MLP``.
        head: Builds the classifier for a number of features; None for ``LinearHead``.
        optimizer: Builds the optimizer over the parameters that a phase trains, anew for each phase; None for SGD with
            learning rate 0.05 and momentum 0.9.
        scheduler: Builds its schedule, stepped once per epoch; None for a constant learning rate.
        first_optimizer: Optimizer of the first task where it differs; None for ``optimizer``.
        first_scheduler: Schedule of the first task where it differs; None for ``scheduler``, unless ``first_optimizer``
            is given.
        visible: Logits over which the classification loss is taken: ``all`` classes seen so far, only those of the
            ``current`` task, or for each sample those of its own ``task`` (training with task ids).
        freeze_backbone: Keep the backbone as it is built, in eval mode, and train the head alone.
        freeze_norm: When statistics and weights of the backbone's batch normalisation stay as they are: ``never``,
            ``after_first`` task, or ``always`` (for pretrained ones).
        lr_factors: Factors of the learning rate by patterns of names of parameters, such as ``{backbone.*: 0.1}``; None
            for 1 everywhere.
    """

    family: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    keeps_exemplars: ClassVar[bool] = False
    needs_task_ids: ClassVar[bool] = False
    needs_pretrained: ClassVar[bool] = False
    needs_all_data: ClassVar[bool] = False
    """Whether every task trains on the data of all tasks so far."""
    uses_unlabelled: ClassVar[bool] = False
    """Whether the strategy also wants training samples without a label (their ``labels`` are -1)."""
    uses_old_logits: bool = False
    """Whether its losses depend on logits of earlier classes even where ``visible`` is ``current``."""
    uses_test_batch: bool = False
    """Whether a prediction (``predict``) depends on the other samples of its test batch (its statistics, say)."""
    teacher_measures: ClassVar[bool] = False
    """Whether ``teacher`` is also what features were before the task, and must not be adapted to it."""
    asks_all_processes: bool = False
    """Whether a step exchanges rows between processes, so that one that has none of its batch is asked too, with an
    empty one."""
    ranks_agree: bool = True
    """Whether two processes with the same global batch give what one gives, within rounding; a method or an option that
    does not says why where it sets this to False."""
    plain_first_task: bool = True
    """Whether the first task is fine-tuning, bit by bit; an option that changes this sets it on the instance."""

    losses_of_output: ClassVar[bool] = False
    """Whether the ``losses`` that this class defines look at the output of the network and at labels alone, so that a
    frozen backbone need not see images whose features are stored."""

    on_pass: Callable[[int, int], None] | None = None
    """Told, during passes outside of training, how many batches are done, of how many; for progress bars."""

    # Set by the task loop.
    feature_cache: FeatureCache | None = None
    task: Task
    phase: Phase
    phase_epochs: int = 1
    phase_origin: int = 0
    progress: Progress | None = None
    seed: int = 0

    def __init__(
        self,
        *,
        backbone: BackboneFactory | None = None,
        head: HeadFactory | None = None,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        first_optimizer: OptimizerCallable | None = None,
        first_scheduler: LRSchedulerCallable | None = None,
        visible: Visible = "all",
        freeze_backbone: bool = False,
        freeze_norm: FreezeNorm = "never",
        lr_factors: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        if visible not in ("all", "current", "task"):
            raise ValueError(f"{type(self).__name__}: visible is {visible!r}; use 'all', 'current' or 'task'")
        if freeze_norm not in (allowed := get_args(FreezeNorm)):
            raise ValueError(f"{type(self).__name__}: freeze_norm is {freeze_norm!r}; use {', '.join(allowed)}")
        # Defaults are resolved here: given in the signature, their options would leak into a class that replaces them.
        self.build_backbone: BackboneFactory = backbone or MLP
        self.build_head: HeadFactory = head or LinearHead
        self.optimizer: OptimizerCallable = optimizer or default_optimizer
        self.scheduler = scheduler
        self.first_optimizer, self.first_scheduler = first_optimizer, first_scheduler
        self.visible: Visible = visible
        self.freeze_backbone, self.lr_factors = freeze_backbone, lr_factors
        self.freeze_norm: FreezeNorm = freeze_norm
        self.image_shape: ImageShape | None = None
        self.augment: Callable[[Batch], Batch] | None = None
        self.network: Network
        # Row t marks the columns of task t, (tasks so far, classes so far).
        self.register_buffer("task_columns", torch.zeros(0, 0, dtype=torch.bool))
        self.task_columns: Tensor
        self._terms: dict[str, Tensor] = {}
        self._num_recorded, self._logged_step = 0, 0
        self._arrived: Batch | None = None
        self.samples_in_step: int | None = None
        self._loss_callbacks: list[AddsLosses] = []
        self._accuracy: StreamAccuracy | None = None
        self._store: FeatureStore | None = None
        self.row: Row | None = None

    @classmethod
    def conformance_options(cls) -> dict[str, Any]:
        """Options with which the conformance tests run the method in seconds, where its defaults do not do."""
        return {}

    # ------------------------------------------------------------------ what a method may write

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        """Terms of the loss by name: scalars, means over the batch or independent of it. Their sum is minimised.

        On several processes the sum is weighed by this one's share of the batch. A term that is a mean over other rows
        needs the factor ``part.weight / batch.weight``, and a term that exchanges rows between processes must not be
        relied on in a batch smaller than their number, where some of them are not asked.
        """
        raise NotImplementedError

    def prepare(self, batch: Batch) -> Batch:
        """The batch that the network sees, made of the one that arrives: add samples from a memory, rotate, ..."""
        return batch

    def edit_gradients(self, batch: Batch) -> None:
        """Change the gradients of a step: called once per optimizer step, on every process.

        They are the same on all processes: those of the mean over the global batch, accumulated where that is asked
        for, unscaled, and not yet clipped. Further gradients come from ``torch.autograd.grad``, which leaves them and
        the exchange of distributed training alone, and are summed over the processes by ``all_sum``.

        Args:
            batch: The (last) one that arrived for this step.
        """

    def observe(self, batch: Batch) -> None:
        """Take notice of the batch that arrived, after the step that it led to."""

    def begin_task(self, task: Task) -> None:
        """Prepare for a task, before any of its steps; the base grows the head."""
        self.network.head.grow(task.num_new)

    def end_task(self, task: Task) -> None:
        """Remember what the next tasks need; in eval mode, on the device. The base fits heads that are not trained."""
        head = self.network.head
        if head.needs_statistics:
            head.fit_features(*(self.all_features() if head.needs_all_rows else self.features()))

    def phases(self, task: Task) -> list[Phase]:
        """The fits of a task, in order; none for a method that only takes statistics."""
        return [Phase()]

    def phase_names(self, task: Task) -> list[str]:
        """Names of the phases that a task can have, where ``phases`` depends on what was learnt before."""
        return [phase.name for phase in self.phases(task)]

    def end_phase(self, phase: Phase) -> None:
        """Called after the last step of a phase, on the device."""

    def frozen(self) -> Iterable[nn.Module]:
        """Modules that the current phase leaves as they are: in eval mode, and their parameters take no gradient."""
        if self.freeze_backbone or self.phase.on_features:
            return [self.network.backbone]
        return self.frozen_norms()

    def frozen_norms(self) -> list[nn.Module]:
        """Batch normalisation of the backbone, where ``freeze_norm`` asks for it."""
        first = self.task.is_first
        frozen = self.freeze_norm == "always" or (self.freeze_norm == "after_first" and not first)
        return list(batch_norms(self.network.backbone)) if frozen else []

    def trainable(self) -> Iterable[nn.Parameter]:
        """Parameters that the current phase trains, less those of ``frozen``; all others take no gradient."""
        yield from self.network.backbone.parameters()
        head, frozen = self.network.head, set[int]()
        if self.visible == "current" and not self._old_logits_used():
            # Rows that no loss reaches would still move by weight decay and momentum: they are left out.
            of_task = torch.split(self.task_columns[-1].cpu(), head.block_sizes())
            unseen = [block for block, columns in zip(head.blocks, of_task, strict=True) if not columns.any()]
            frozen = {id(parameter) for block in unseen for parameter in block.parameters()}
        yield from (parameter for parameter in head.parameters() if id(parameter) not in frozen)

    def visible_columns(self) -> Tensor | None:
        """Columns that the classification loss of the task's own samples is over, bool ``(C,)``; None for all."""
        return None if self.visible == "all" else self.task_columns[-1]

    @property
    def backbone_is_fixed(self) -> bool:
        """Whether the backbone will not change any more, so that features may be stored (``loop.feature_cache``)."""
        return self.freeze_backbone

    def parameter_groups(self, parameters: list[nn.Parameter]) -> list[nn.Parameter] | list[dict[str, Any]]:
        """What the optimizer is built over: the parameters that the phase trains, or groups of them as torch's
        optimizers take them, with options of their own (``{"params": [...], "weight_decay": 0.0}``)."""
        return parameters

    def predict(self, images: Tensor) -> Tensor:
        """Scores ``(B, classes seen)`` of images ``(B, C, H, W)``; the largest one is the prediction."""
        return self.network.classify(images)

    def predict_within_task(self, images: Tensor) -> Tensor:
        """Scores as those of ``predict``, by a classifier that is there at each step of a task; for curves along it.

        A method overrides it whose predictions are of another kind while a task is being learnt.
        """
        return self.predict(images)

    def rehearsal(self) -> Memory | None:
        """Memory whose samples the loader mixes with those of the task; None for none."""
        return None

    def select(self, labels: Tensor, replayed: Tensor) -> Tensor | None:
        """Which of the samples at hand the current phase trains on; None for all of them.

        At hand are the samples of the task, then those of the memory that ``rehearsal`` gives. It is asked when a phase
        begins and when one is resumed, on every process, and must give the same answer: draw by seed and task.

        Args:
            labels: Their columns, int64 ``(n,)``, on the CPU.
            replayed: Which of them the memory holds, bool ``(n,)``.

        Returns:
            bool ``(n,)``.
        """
        return None

    def feature_pool(self) -> FeaturePool:
        """What a phase with ``on_features`` trains on.

        It is asked for when the fit of the phase begins and when it is gone on with, on every process, with the network
        on the device, and must give the same rows each time.
        """
        raise NotImplementedError

    # ------------------------------------------------------------------ what a method may use

    def classification_loss(self, output: Output, batch: Batch) -> Tensor:
        """Mean cross-entropy over the visible logits; samples whose label is hidden do not count."""
        if self.visible == "all":
            return cross_entropy(output.logits, batch.labels)
        mask = self.task_columns[batch.tasks] if self.visible == "task" else self.task_columns[-1]
        return cross_entropy(masked_logits(output.logits, mask), batch.labels)

    def statistics_batches(
        self,
        *,
        memory: Memory | None = None,
        indices: Tensor | None = None,
        samples: int | None = None,
        augment: int | None = None,
        batch_size: int | None = None,
        store: FeatureStore | None = None,
    ) -> Iterator[Batch]:
        """The training data of the current task once, in order, each process its share, on the device.

        Args:
            memory: Go through its samples instead.
            indices: Go through these samples of the task only, by their places in the data set, in this order.
            samples: Go through so many samples of the task only, drawn by seed and task; None for all.
            augment: Key of the random numbers to augment with; None to augment nothing.
            batch_size: Samples at a time, over all processes; None for that of evaluations.
            store: Where features may be found that take the place of images.
        """
        datamodule, trainer = self._datamodule, self.trainer
        options = {"memory": memory, "indices": indices, "samples": samples, "batch_size": batch_size, "store": store}
        loader = datamodule.statistics_dataloader(**options)
        for number, batch in enumerate(loader):
            if self.on_pass is not None:
                self.on_pass(number, len(loader))
            moved = datamodule.transfer_batch_to_device(batch, trainer.strategy.root_device, 0)  # finished below
            if augment is not None:
                moved = moved.replace(draw=moved.draw.fork(augment))
            yield datamodule.finish(moved, augment=augment is not None)

    def features(self, network: Network | None = None, *, memory: Memory | None = None) -> tuple[Tensor, Tensor]:
        """Features of this process's share of the current task's un-augmented training data.

        Args:
            network: Network to take them from; None for the strategy's own.
            memory: Take the samples that it holds instead.

        Returns:
            Features ``(n, d)``, float32, and columns ``(n,)``, on the device.
        """
        features, labels, _ = self.indexed_features(network, memory=memory)
        return features, labels

    def all_features(self, network: Network | None = None, *, augment: int | None = None) -> tuple[Tensor, Tensor]:
        """As ``features``, of all processes, in the order of the data set: the same on each of them.

        Args:
            network: Network to take them from; None for the strategy's own.
            augment: Key of the random numbers to augment with; None to augment nothing.
        """
        features, labels, indices = all_gather_together(self.indexed_features(network, augment=augment))
        order = indices.argsort()
        return features[order], labels[order]

    @torch.no_grad()
    def indexed_features(
        self, network: Network | None = None, *, memory: Memory | None = None, augment: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``features``, and the place of each sample in the data set, int64 ``(n,)``; -1 for those of a memory."""
        plain = memory is None and augment is None and network in (None, self.network)
        store = self.feature_store() if plain else None
        network = self.network if network is None else network
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for batch in self.statistics_batches(memory=memory, augment=augment, store=store):
            if len(batch) == 0:
                continue
            with self.trainer.precision_plugin.forward_context():
                features = self.features_of(batch, network, store)
            parts.append((features.float(), batch.labels, batch.indices))
        if not parts:
            nothing = torch.zeros(0, dtype=torch.int64, device=self.device)
            return torch.zeros(0, network.head.num_features, device=self.device), nothing, nothing
        features, labels, indices = (torch.cat(column) for column in zip(*parts, strict=True))
        return features, labels, indices

    def feature_store(self, *, training: bool = False, evaluation: bool = False) -> FeatureStore | None:
        """Where features of the backbone are kept; None where they are not.

        Args:
            training: Whether it is for training, where other things may look at images.
            evaluation: Whether it is for evaluation.
        """
        if self.feature_cache is None or not self.backbone_is_fixed:
            return None
        mine = type(self)
        if training and (
            not next(vars(cls).get("losses_of_output", False) for cls in mine.__mro__ if "losses" in vars(cls))
            or mine.prepare is not ContinualStrategy.prepare
            or mine.observe is not ContinualStrategy.observe
            or self._loss_callbacks
        ):
            return None
        if evaluation and mine.predict is not ContinualStrategy.predict:
            return None
        backbone, context = self.network.backbone, self.trainer.precision_plugin.forward_context
        modes = [(module, module.training) for module in backbone.modules()]
        backbone.eval()

        def forward(images: Tensor) -> Tensor:
            with context():
                features: Tensor = backbone(images)
            return features

        try:
            setting = f"{self._datamodule.scaling}, {self.trainer.precision}"
            return self.feature_cache.store(backbone, forward, self.image_shape or (), setting)
        finally:
            for module, mode in modes:
                module.training = mode

    def features_of(self, batch: Batch, network: Network, store: FeatureStore | None) -> Tensor:
        """Features of a finished batch: those that came with it, or those of the backbone, which are then stored.

        Args:
            batch: Of a loader that was given the store, or of any other.
            network: Whose backbone it is.
            store: See ``feature_store``; None to store nothing.
        """
        if (stored := batch.extra.get(STORED)) is not None:
            return stored
        features: Tensor = network.backbone(batch.images)
        if store is not None and KEYS in batch.extra:
            store.add(batch.extra[KEYS], features)
        return features

    def finish(self, batch: Batch) -> Batch:
        """The batch with images made from its raw ones without augmentation: scaled and normalised.

        For a method that augments raw images in a way of its own; ``augment`` does it as the data module says.
        """
        finished: Batch = self._datamodule.finish(batch, augment=False)
        return finished

    @property
    def images_are_augmented(self) -> bool:
        """Whether the data module augments training images at all, so that an image differs from epoch to epoch."""
        return bool(self._datamodule.augmentation.transforms)

    @property
    def plain_batches(self) -> bool:
        """Whether batches of the phase come with un-augmented images, for a method that augments in its own way."""
        return False

    def batch_before(self) -> Batch | None:
        """This process's batch of the step before the first of this fit, where a fit goes on half-way; else None.

        For a method that looks back a step, to be called in ``on_train_start``: the batch is augmented as it was then.
        """
        found: Batch | None = self._datamodule.batch_before()
        return found

    @property
    def epoch(self) -> int:
        """Epoch within the phase, from 0."""
        return self.trainer.current_epoch - self.phase_origin

    @property
    def last_sight(self) -> bool:
        """Whether the samples of this step will not come again in the phase: in its last epoch, and of an online stream
        that takes several steps on each batch, in the last of them."""
        passes: int = self._datamodule.stream.passes
        return self.epoch == self.phase_epochs - 1 and self.trainer.fit_loop.epoch_loop.batch_idx % passes == passes - 1

    @property
    def first_sight(self) -> bool:
        """Whether the samples of this step are new: in the first epoch of a phase, and of an online stream that takes
        several steps on each batch, in the first of them."""
        passes: int = self._datamodule.stream.passes
        return self.epoch == 0 and self.trainer.fit_loop.epoch_loop.batch_idx % passes == 0

    @property
    def prototypes(self) -> Any:
        """Class means of a head that keeps them (``PrototypeHead``)."""
        prototypes = getattr(self.network.head, "prototypes", None)
        if prototypes is None:
            name = type(self.network.head).__name__
            raise ValueError(f"{type(self).__name__}: its head, {name}, keeps no class means; use PrototypeHead")
        return prototypes

    def bytes_kept(self) -> dict[str, int]:
        """What is kept from task to task beside the network, in bytes by kind."""
        kept: dict[str, int] = {}
        kinds: dict[type[nn.Module], str] = {Memory: "exemplars", Teacher: "teachers", Importance: "importance"}
        kinds |= {Prototypes: "prototypes", ClosedFormHead: "statistics"}
        for module in self.modules():
            if (kind := next((kind for cls, kind in kinds.items() if isinstance(module, cls)), None)) is not None:
                kept[kind] = kept.get(kind, 0) + module.num_bytes()  # type: ignore[operator]
        return kept

    # ------------------------------------------------------------------ called by the task loop

    def build(self, image_shape: ImageShape) -> None:
        """Make the network for a shape of image; the head has no columns yet."""
        self.image_shape = image_shape
        backbone = self.build_backbone(image_shape)
        head = self.build_head(backbone.num_features)
        self.network = Network(backbone, head, backbone_is_frozen=self.freeze_backbone)
        if self.freeze_norm != "never" and not any(batch_norms(backbone)):
            raise ValueError(
                f"{type(self).__name__}: freeze_norm is {self.freeze_norm!r}, {type(backbone).__name__} has no batch "
                "normalisation; leave it at 'never'"
            )

    @property
    def is_built(self) -> bool:
        return "network" in self._modules

    def mark_columns(self, task: Task) -> None:
        """Note the columns of a task that begins."""
        marks = torch.zeros(task.index + 1, task.num_seen, dtype=torch.bool, device=self.task_columns.device)
        rows, columns = self.task_columns.shape
        marks[:rows, :columns] = self.task_columns
        marks[task.index, list(task.columns)] = True
        self.task_columns = marks

    def begin_phase(self, phase: Phase, epochs: int, origin: int) -> None:
        """Choose what a phase trains, before it is wrapped for distribution.

        Args:
            phase: The phase.
            epochs: Its number of epochs.
            origin: Epoch of the Trainer at which it begins.
        """
        self.phase, self.phase_epochs, self.phase_origin = phase, epochs, origin
        adds_losses = [c for c in self._trainer_callbacks() if isinstance(c, AddsLosses)]
        self._loss_callbacks = [] if phase.on_features else adds_losses
        chosen = {id(parameter) for parameter in self.trainable()}
        chosen -= {id(parameter) for module in self.frozen() for parameter in module.parameters()}
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in chosen)
        self.train()  # Lightning keeps the modes that it finds, and what is frozen is in eval mode

    # ------------------------------------------------------------------ Lightning

    def forward(self, images: Tensor) -> Tensor:
        return self.predict(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self._arrived = batch
        batch = self.prepare(batch)
        self.samples_in_step = len(batch)
        if len(batch) == 0 and not self.asks_all_processes:
            # Another process has what there is; this one takes part with gradients of zero.
            self._num_recorded += 1
            return sum_of_zeros(parameter for parameter in self.parameters() if parameter.requires_grad)
        try:
            terms = self._loss_terms(batch)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ValueError(
                f"task {self.task.name!r}: a step has one image on this process, of which batch normalisation has no "
                "statistics; give --data.drop_last true, or another --data.batch_size"
            ) from error
        self._record(terms, batch.weight)
        loss = functools.reduce(operator.add, terms.values())
        return loss if batch.weight == 1.0 else loss * batch.weight

    def _loss_terms(self, batch: Batch) -> dict[str, Tensor]:
        """Terms of the loss of a prepared batch, by name."""
        if self.phase.on_features or STORED in batch.extra:
            output = Output(batch.images, self.network.head(batch.images))
        else:
            output = self.network(batch.images)
            if KEYS in batch.extra and (store := self.feature_store(training=True)) is not None:
                store.add(batch.extra[KEYS], output.features)
        terms = self.losses(batch, output)
        for callback in self._loss_callbacks:
            more = callback.losses(self, batch, output)
            if doubled := terms.keys() & more.keys():
                raise ValueError(f"{type(callback).__name__}: the loss term {min(doubled)!r} exists already")
            terms.update(more)
        return terms

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Dropout and the like draw from the global generators: they start each step from a known place, so that a
        # resumed run draws what the uninterrupted one draws.
        key = mix(batch.draw.key, 0xD80, rank())
        torch.default_generator.manual_seed(key)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(key)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._arrived is not None:
            self.edit_gradients(self._arrived)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self._arrived = None
        with torch.no_grad():
            self.observe(batch)
        step = self.trainer.global_step
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self._num_recorded and step % every == 0 and step > self._logged_step:  # else gradients are accumulated
            self._log_terms(step)

    def on_train_end(self) -> None:
        if self._num_recorded:  # what is left of a phase is not part of the next one
            self._log_terms(self.trainer.global_step)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not parameters:
            raise ValueError(
                f"{type(self).__name__}: phase {self.phase.name!r} of task {self.task.index} has no parameters to "
                "train; a method that takes no gradient step returns [] from phases()"
            )
        build, build_scheduler = self.phase.optimizer, self.phase.scheduler
        if build is None and self.task.is_first and self.first_optimizer is not None:
            build, build_scheduler = self.first_optimizer, build_scheduler or self.first_scheduler
        elif build is None:
            first = self.first_scheduler if self.task.is_first else None
            build, build_scheduler = self.optimizer, build_scheduler or first or self.scheduler
        groups = self.parameter_groups(parameters)
        if self.lr_factors:
            owner = type(self).__name__
            groups = with_lr_factors(groups, self.named_parameters(), self.lr_factors, owner=owner)
        optimizer = build(groups)
        apply_lr_factors(optimizer)
        fuse(optimizer)
        if build_scheduler is None:
            return optimizer
        scheduler = build_scheduler(optimizer)
        if isinstance(scheduler, PhaseSchedule):
            scheduler.begin(self.phase_epochs)
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            monitor = getattr(scheduler, "monitor", "val/loss")
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": monitor}}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler}}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.predict(batch.images).float().softmax(dim=1)

    def on_validation_epoch_start(self) -> None:
        self._begin_evaluation(confusion=False)

    def on_test_epoch_start(self) -> None:
        self._begin_evaluation(confusion=True)

    def on_validation_epoch_end(self) -> None:
        row = self._end_evaluation()
        total = row.totals.sum().clamp(min=1)
        values = {"val/accuracy": row.correct.sum() / total, "val/loss": self._loss_sum / total}
        for name, value in values.items():  # for callbacks that watch it; its step would be one behind that of training
            self.log(name, value.to(torch.float32), logger=False)
        metrics = {name: float(value) for name, value in values.items()}
        for logger in [] if self.trainer.sanity_checking else self.loggers:
            logger.log_metrics(metrics, step=self.trainer.global_step)

    def on_test_epoch_end(self) -> None:
        self.row = self._end_evaluation()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_current_fx_name":  # some forty times a step, by Lightning: no parameter, buffer or module
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if mode and self.is_built and hasattr(self, "phase"):
            for module in self.frozen():
                module.eval()
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        part = checkpoint.setdefault("cl_lightning", {})
        part["image_shape"] = list(self.image_shape or ())
        names, sums = self._summed_terms()
        part["terms"] = {
            "sums": dict(zip(names, sums, strict=True)),
            "recorded": self._num_recorded,
            "logged_step": self._logged_step,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not self.is_built:
            channels, height, width = checkpoint["cl_lightning"]["image_shape"]
            self.build((channels, height, width))
        if (terms := checkpoint["cl_lightning"].get("terms")) is not None:
            self._terms = {name: torch.tensor(value, device=self.device) for name, value in terms["sums"].items()}
            self._num_recorded, self._logged_step = terms["recorded"], terms["logged_step"]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # Shapes come from what is loaded; the modules below do the same for themselves.
        if (marks := state_dict.get(f"{prefix}task_columns")) is not None:
            self.task_columns = torch.zeros_like(marks, device=self.task_columns.device)
        for name, module in self.named_modules():
            if isinstance(module, Teacher):
                module.restore_shape(self.network, state_dict, f"{prefix}{name}.")
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]

    # ------------------------------------------------------------------ inside

    @property
    def _datamodule(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def _trainer_callbacks(self) -> list[Any]:
        return list(self.trainer.callbacks) if self._trainer is not None else []  # type: ignore[attr-defined]

    def _old_logits_used(self) -> bool:
        callbacks = (c for c in self._trainer_callbacks() if isinstance(c, ContinualCallback))
        return self.uses_old_logits or any(callback.uses_old_logits for callback in callbacks)

    def _record(self, terms: dict[str, Tensor], weight: float) -> None:
        for name, term in terms.items():
            value = term.detach() if weight == 1.0 else term.detach() * weight
            previous = self._terms.get(name)
            self._terms[name] = value.float() if previous is None else previous + value
        self._num_recorded += 1

    def mean_terms(self) -> dict[str, float]:
        """Means of the loss terms since they were last logged, over this process's steps; waits for the device."""
        return {name: float(value) / max(self._num_recorded, 1) for name, value in self._terms.items()}

    def _summed_terms(self) -> tuple[list[str], list[float]]:
        """Loss terms since they were last logged, summed over steps, means over processes; waits for the device."""
        names, nothing = all_names(self._terms), torch.zeros((), device=self.device)
        terms = [self._terms.get(name, nothing) for name in names]  # some are unknown where all batches were empty
        return names, all_sum(torch.stack(terms) / world_size()).tolist() if terms else []

    def _log_terms(self, step: int) -> None:
        names, sums = self._summed_terms()
        values = [value / self._num_recorded for value in sums]
        self._terms, self._num_recorded, self._logged_step = {}, 0, step
        metrics = {f"train/{name}": value for name, value in zip(names, values, strict=True)}
        metrics["train/loss"] = sum(values)
        optimizer = self.optimizers()
        if isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "param_groups"):
            metrics["train/lr"] = optimizer.param_groups[0]["lr"]  # type: ignore[union-attr]
        metrics |= {"task": float(self.task.index), "epoch": float(self.trainer.current_epoch)}
        self.shown_terms = metrics
        for logger in self.loggers:
            logger.log_metrics(metrics, step=step)

    shown_terms: Mapping[str, float] = {}
    """What was logged last, for progress bars."""

    def _begin_evaluation(self, *, confusion: bool) -> None:
        self._store = self.feature_store(evaluation=True)
        tasks, columns = self.task_columns.shape
        counts = [int(marks.nonzero().max()) + 1 for marks in self.task_columns.cpu()]
        prefixes = [max(counts[: t + 1]) for t in range(tasks)] if confusion else None
        self._accuracy = StreamAccuracy(
            tasks, columns, confusion=confusion, calibration=confusion, prefixes=prefixes
        ).to(self.device)
        self._loss_sum = torch.zeros((), device=self.device, dtype=torch.float64)

    def _evaluate(self, batch: Batch) -> None:
        if KEYS in batch.extra or STORED in batch.extra:
            scores = self.network.head.classify(self.features_of(batch, self.network, self._store)).float()
        else:
            scores = self.predict(batch.images).float()
        assert self._accuracy is not None
        self._accuracy.update(scores, batch.labels, batch.tasks, self.task_columns)
        self._loss_sum += nn.functional.cross_entropy(scores, batch.labels, reduction="sum")

    def _end_evaluation(self) -> "Row":
        assert self._accuracy is not None
        row = self._accuracy.compute()
        all_sum(self._loss_sum)
        self._loss_sum = self._loss_sum.cpu()
        self._accuracy = None
        return row


def sum_of_zeros(parameters: Iterable[Tensor]) -> Tensor:
    """A scalar 0 whose gradient is zero for each of the parameters."""
    return functools.reduce(operator.add, (parameter.sum() * 0.0 for parameter in parameters))
