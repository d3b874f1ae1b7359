"""Base class of all continual-learning methods: a LightningModule that is trained on one task after another."""

import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Self, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from cl_lightning.batch import Batch, ImageShape
from cl_lightning.checks import one_of, within
from cl_lightning.data import TARGETS
from cl_lightning.data.feature_cache import KEYS, STORED
from cl_lightning.lightning_private import HOOK_NAME
from cl_lightning.losses import cross_entropy, masked_logits, target_loss
from cl_lightning.memory import Memory, bytes_by_kind, restore_shapes
from cl_lightning.models import MLP, Backbone, Head, LinearHead, Network, Output, batch_norms, built, joined
from cl_lightning.optim import default_optimizer
from cl_lightning.recorded import options_of
from cl_lightning.strategies.base.evaluation import Evaluation
from cl_lightning.strategies.base.optimizers import apply_lr_factors, fuse, with_lr_factors, without_lr
from cl_lightning.strategies.base.passes import Passes, StrategyData
from cl_lightning.strategies.base.phases import Interval, Phase, PhaseOptions
from cl_lightning.strategies.base.schedules import scheduled
from cl_lightning.strategies.base.second_pass import SecondPass, seed_layers
from cl_lightning.strategies.base.terms import AddsLosses, LossTerms
from cl_lightning.strategies.base.traits import Traits
from cl_lightning.stream import Task

LossClasses = Literal["all", "current", "task", "new"]
FreezeNorm = Literal["never", "after_first", "always"]
BackboneFactory = Callable[[ImageShape], Backbone]
HeadFactory = Callable[[int], Head]


class ContinualStrategy(LightningModule):
    """Base class of all methods: it owns the network and the training loop, and a subclass defines the losses.

    A training step is ``batch = prepare_batch(batch)``, a forward pass (several with ``batch.passes``), and
    ``losses(batch, output)``. The base class adds the losses of callbacks, sums all terms, logs them and takes the
    optimizer step. A subclass implements ``losses`` and, where the method needs them, ``prepare_batch``,
    ``edit_gradients``, ``after_step``, ``begin_task``, ``end_task``, ``phases``, ``trainable`` and ``predict``. State
    that must outlive a task is a parameter, a buffer or a module that holds tensors: ``state_dict`` then contains it,
    and a resumed run restores it.

    Args:
        backbone: Builds the feature extractor for an image shape ``(channels, height, width)``; None for ``MLP``.
        head: Builds the classifier for a number of features; None for ``LinearHead``.
        optimizer: Builds an optimizer over the parameters that a phase trains; called for each phase. None for SGD with
            learning rate 0.05 and momentum 0.9.
        scheduler: Builds the learning-rate schedule of an optimizer; None for a constant learning rate.
        scheduler_interval: Whether schedules are stepped after each ``epoch`` or after each optimizer ``step``; the
            schedules over a phase (``CosineOverPhase``) then span its steps, and their ``warmup`` counts steps. None
            for ``step`` with torch's OneCycleLR and CyclicLR, which count batches, and for ``epoch`` with all others.
        first_optimizer: As ``optimizer``, for the first task; None for ``optimizer``.
        first_scheduler: As ``scheduler``, for the first task; None for ``scheduler``, or for a constant learning rate
            if ``first_optimizer`` is given.
        loss_classes: Logits over which the classification loss is computed: ``all`` classes seen so far, only the
            classes of the ``current`` task, for each sample the classes of its own ``task`` (training with task ids),
            or the classes of the current task for its ``new`` samples and all classes for replayed samples (as ER-ACE).
        masked_logit: Constant in place of the logits of all other classes, without gradient, or ``adaptive`` for their
            own level (softmax masking, see ``masked_logits``); None to exclude these classes from the softmax.
        freeze_backbone: Freeze the backbone as it is built, in eval mode, and train the head alone.
        freeze_norm: When the statistics and weights of the backbone's batch normalisation are frozen: ``never``,
            ``after_first`` task, or ``always`` (for pretrained backbones).
        lr_factors: Learning-rate factors, at least 0, by patterns of parameter names, such as ``{backbone.*: 0.1}``;
            None for 1 everywhere. Parameters with factor 0 are frozen: no gradient is computed for them. The first
            pattern that matches decides: ``{backbone.*.attn.qkv.*: 1, backbone.*: 0}`` trains the projections of
            queries, keys and values, and the head.

    Attributes:
        traits: Facts about the method.
        network: Backbone and head; always the network that predicts.
        task, phase: Current task and phase, with the resolved number of epochs; set by the task loop.
        seed: Seed of the run; set by the task loop.
        task_columns: Row t marks the columns of task t, bool ``(tasks so far, classes so far)``.
        data: Finished and augmented images, class names.
        passes: Passes over the data of the task: statistics, features.
        terms: Sums of the loss terms, and their logging.
        evaluation: Counts of the last evaluation.
    """

    traits = Traits()
    network: Network
    task: Task
    phase: Phase
    seed: int = 0
    task_columns: Tensor

    def __init__(
        self,
        *,
        backbone: BackboneFactory | None = None,
        head: HeadFactory | None = None,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        scheduler_interval: Interval | None = None,
        first_optimizer: OptimizerCallable | None = None,
        first_scheduler: LRSchedulerCallable | None = None,
        loss_classes: LossClasses = "all",
        masked_logit: float | Literal["adaptive"] | None = None,
        freeze_backbone: bool = False,
        freeze_norm: FreezeNorm = "never",
        lr_factors: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        self._recorded = options_of(self)
        one_of(self, get_args(LossClasses), loss_classes=loss_classes)
        one_of(self, get_args(FreezeNorm), freeze_norm=freeze_norm)
        if masked_logit != "adaptive":
            within(self, "(-inf, inf)", masked_logit=masked_logit, optional=True)
        if masked_logit is not None and loss_classes == "all":
            raise ValueError(
                f"{type(self).__name__}: masked_logit is {masked_logit}, but loss_classes is 'all', which masks no "
                "class; use 'current', 'new' or 'task'"
            )
        # Not defaults of the signature: the command line would pass their options on to a class that replaces them.
        self.build_backbone: BackboneFactory = functools.partial(built, backbone or MLP)
        self.build_head: HeadFactory = head or LinearHead
        one_of(self, get_args(Interval), scheduler_interval=scheduler_interval, optional=True)
        self._options = PhaseOptions(
            optimizer=optimizer or default_optimizer, scheduler=scheduler, interval=scheduler_interval
        )
        self._first_options = PhaseOptions(optimizer=first_optimizer, scheduler=first_scheduler)
        self.loss_classes: LossClasses = loss_classes
        self._masked_logit: float | Literal["adaptive"] = -math.inf if masked_logit is None else masked_logit
        self.freeze_backbone: bool = freeze_backbone
        self.freeze_norm: FreezeNorm = freeze_norm
        self._lr_factors = lr_factors
        self.image_shape: ImageShape | None = None
        self.register_buffer("task_columns", torch.zeros(0, 0, dtype=torch.bool))
        self.data, self.passes = StrategyData(self), Passes(self)
        self.terms, self.evaluation = LossTerms(), Evaluation(self)
        self._second_pass = SecondPass(self)
        self._arrived: Batch | None = None
        self._phase_origin = 0

    # ------------------------------------------------------------------ what a method may override

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        """Terms of the loss by name; their sum is minimised.

        Each term is a scalar, either the mean over the batch or independent of the batch. With several processes the
        sum is weighted by this process's share of the batch. A term that is a mean over a part of a joint batch must be
        multiplied by the share of this part (the third value of ``batch.part(name, output)``).

        A process without rows in a step does not call this method, unless ``traits.needs_empty_batches``. A term that
        exchanges rows between processes must therefore skip the exchange in batches with fewer samples than processes.

        Args:
            batch: Result of :meth:`prepare_batch`.
            output: Output of the network for the images of ``batch``.
        """
        raise NotImplementedError

    def prepare_batch(self, batch: Batch) -> Batch:
        """Make the batch that the network sees, for example by adding samples from a memory or rotated copies."""
        return batch

    def edit_gradients(self, batch: Batch) -> None:
        """Change the gradients of a step in place. Called once per optimizer step, on every process.

        The gradients are the same on all processes: gradients of the mean over the global batch, accumulated over
        batches if the Trainer accumulates, unscaled, and not yet clipped. Compute additional gradients by
        ``torch.autograd.grad``, which neither changes these gradients nor triggers the exchange of distributed
        training, and sum them over processes by ``all_sum``.

        Args:
            batch: Batch that arrived for this step; the last one with accumulated gradients.
        """

    def after_step(self, batch: Batch) -> None:
        """Called after each step with the batch as it arrived, without gradient, for example to feed a memory."""

    def begin_task(self, task: Task) -> None:
        """Prepare for a task, before its first step. The base class grows the head."""
        self.network.head.grow(task.num_new)

    def end_task(self, task: Task) -> None:
        """Store what later tasks need. In eval mode, on the device. The base class fits heads from statistics."""
        head = self.network.head
        if head.needs_statistics:
            head.fit_features(*(self.passes.all_features() if head.needs_all_rows else self.passes.features()))

    def phases(self, task: Task) -> list[Phase]:
        """The phases of a task, in order; an empty list for a method that only computes statistics.

        Called for every task before the run, and again when the task begins. A condition that depends on earlier
        training, such as the content of a memory, belongs in ``Phase.needed``.
        """
        return [Phase()]

    def end_phase(self, phase: Phase) -> None:
        """Called after the last step of a phase, on the device."""

    def frozen(self) -> Iterable[nn.Module]:
        """Modules that are frozen, in eval mode and without gradient, in phases without ``freezes``."""
        if self.freeze_backbone or self.phase.features is not None:
            return [self.network.backbone]
        return self._frozen_norms()

    def trainable(self) -> Iterable[nn.Parameter]:
        """Parameters that are trained in phases without ``trains``; parameters of frozen modules are excluded later."""
        yield from self.network.backbone.parameters()
        head, frozen = self.network.head, set[int]()
        if self.loss_classes == "current" and not self._uses_old_logits():
            # Weight decay and momentum would change rows without a gradient too, so they are excluded.
            of_task = torch.split(self.task_columns[-1].cpu(), head.block_sizes())
            unseen = [block for block, columns in zip(head.blocks, of_task, strict=True) if not columns.any()]
            frozen = {id(parameter) for block in unseen for parameter in block.parameters()}
        yield from (parameter for parameter in head.parameters() if id(parameter) not in frozen)

    def loss_columns(self) -> Tensor | None:
        """Columns of the classification loss for samples of the current task, bool ``(C,)``; None for all."""
        return None if self.loss_classes == "all" else self.task_columns[-1]

    @property
    def backbone_is_final(self) -> bool:
        """Whether the backbone does not change any more, so that features can be stored (``loop.feature_cache``)."""
        return self.freeze_backbone

    def parameter_groups(self, parameters: list[nn.Parameter]) -> list[nn.Parameter] | list[dict[str, Any]]:
        """Argument of the optimizer: the parameters that the phase trains, or parameter groups with options, such as
        ``{"params": [...], "weight_decay": 0.0}``."""
        return parameters

    def predict(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        """Scores ``(B, classes seen)`` of images ``(B, C, H, W)``; the largest one is the prediction.

        Args:
            images: Finished images.
            tasks: Task index of each image, int64 ``(B,)``; None if unknown. A method that uses task ids states this in
                ``traits.task_ids``; a method that needs them raises a ValueError without them.
        """
        return self.network.classify(images)

    def predict_within_task(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        """Scores as in :meth:`predict`, by a classifier that exists at each step of a task, for curves during training.

        Override it if :meth:`predict` needs a classifier that is computed only when a task ends.
        """
        return self.predict(images) if tasks is None else self.predict(images, tasks)

    def replay_memory(self) -> Memory | None:
        """Memory whose samples the loader mixes with the samples of the task, or None."""
        return None

    # ------------------------------------------------------------------ what a method may use

    def classification_loss(self, output: Output, batch: Batch) -> Tensor:
        """Mean cross-entropy over the logits of ``loss_classes``, in nats; samples with a hidden label are ignored.

        Samples are weighted by the ``class_weights`` of the data module. Where the target is not one class, it is
        :func:`~cl_lightning.losses.target_loss`, over the classes of the task of each sample.
        """
        if (targets := batch.extra.get(TARGETS)) is not None:
            return target_loss(output.logits, targets)
        weights = self.data.weights_of(batch)
        if self.loss_classes == "all":
            return cross_entropy(output.logits, batch.labels, weights=weights)
        mask = self.task_columns[batch.tasks] if self.loss_classes == "task" else self.task_columns[-1]
        if self.loss_classes == "new":
            mask = mask | (batch.tasks != self.task.index)[:, None]
        return cross_entropy(masked_logits(output.logits, mask, self._masked_logit), batch.labels, weights=weights)

    @property
    def epoch(self) -> int:
        """Epoch within the phase, counted from 0."""
        return self.trainer.current_epoch - self._phase_origin

    @property
    def prototypes(self) -> Any:
        """Class means of the head (``PrototypeHead``); raises a ValueError for other heads."""
        prototypes = getattr(self.network.head, "prototypes", None)
        if prototypes is None:
            name = type(self.network.head).__name__
            raise ValueError(f"{type(self).__name__}: its head, {name}, keeps no class means; use PrototypeHead")
        return prototypes

    def bytes_kept(self) -> dict[str, int]:
        """Size of the state that is kept between tasks in addition to the network, in bytes by kind."""
        return bytes_by_kind(self)

    # ------------------------------------------------------------------ called by the task loop

    def build(self, image_shape: ImageShape) -> None:
        """Build the network for an image shape; the head has no columns yet."""
        self.image_shape = image_shape
        backbone = self.build_backbone(image_shape)
        head = self.build_head(backbone.num_features)
        self.network = Network(backbone, head, backbone_is_frozen=self.freeze_backbone)
        if self.freeze_norm != "never" and not any(batch_norms(backbone)):
            raise ValueError(
                f"{type(self).__name__}: freeze_norm is {self.freeze_norm!r}, but {type(backbone).__name__} has no "
                "batch normalisation; use 'never'"
            )

    @property
    def is_built(self) -> bool:
        return "network" in self._modules

    def mark_columns(self, task: Task) -> None:
        """Add the row of a new task to ``task_columns``."""
        marks = torch.zeros(task.index + 1, task.num_seen, dtype=torch.bool, device=self.task_columns.device)
        rows, columns = self.task_columns.shape
        marks[:rows, :columns] = self.task_columns
        marks[task.index, list(task.columns)] = True
        self.task_columns = marks

    def begin_phase(self, phase: Phase, origin: int, sources: Sequence[AddsLosses] = ()) -> None:
        """Select the parameters that a phase trains. Called before the module is wrapped by DDP.

        Args:
            phase: The phase, with its resolved number of epochs.
            origin: Epoch of the Trainer at which the phase begins.
            sources: Callbacks that add losses.
        """
        self.phase, self._phase_origin, self.terms.sources = phase, origin, sources
        chosen = {id(parameter) for parameter in (phase.trains or self.trainable)()}
        chosen -= {id(parameter) for module in self._frozen_modules() for parameter in module.parameters()}
        chosen -= {id(parameter) for parameter in without_lr(self.named_parameters(), self._lr_factors or {})}
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in chosen)
        self.train()  # Lightning keeps the present modes; `train` puts frozen modules in eval mode

    # ------------------------------------------------------------------ Lightning

    def forward(self, images: Tensor) -> Tensor:
        return self.predict(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self._arrived = arrived = batch
        batch = self.prepare_batch(batch)
        self._second_pass.keep(arrived, batch)
        self.terms.samples = len(batch)
        if len(batch) == 0 and not self.traits.needs_empty_batches:
            # Other processes have the rows of this batch; this process takes part with gradients of zero.
            self.terms.add({}, batch.weight)
            return sum_of_zeros(parameter for parameter in self.parameters() if parameter.requires_grad)
        try:
            terms = self._loss_terms(batch)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ValueError(
                f"task {self.task.name!r}: a step has one image on this process, too few for batch normalisation; give "
                "--data.drop_last true or another --data.batch_size"
            ) from error
        if batch_idx == 0 and self.task.is_first and self.epoch == 0 and self.data.module.phase_index == 0:
            self.data.check_weights_used()
        self.terms.add(terms, batch.weight)
        loss = functools.reduce(operator.add, terms.values())
        return loss if batch.weight == 1.0 else loss * batch.weight

    def _loss_terms(self, batch: Batch) -> dict[str, Tensor]:
        """Terms of the loss of a prepared batch, by name."""
        on_features = self.phase.features is not None
        if on_features or STORED in batch.extra:
            output = Output(batch.images, self.network.head(batch.images))
        else:
            outputs = [self.network(batch.images[rows]) for rows in batch.passes if rows.start < rows.stop]
            output = joined(outputs) if outputs else self.network(batch.images)
            if KEYS in batch.extra and (store := self.passes.store(training=True)) is not None:
                store.add(batch.extra[KEYS], output.features)
        terms = self.losses(batch, output)
        for source in () if on_features else self.terms.sources:
            more = source.losses(self, batch, output)
            if doubled := terms.keys() & more.keys():
                name = type(source).__name__
                raise ValueError(f"{name}: the loss term {min(doubled)!r} exists already; remove the callback")
            terms.update(more)
        return terms

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # The global generators are seeded at each step, so that a resumed run draws the same numbers as an
        # uninterrupted run.
        seed_layers(batch, self.device)
        passes: int = self.data.module.stream.passes
        batch.first_pass = self.epoch == 0 and batch_idx % passes == 0
        batch.last_pass = self.epoch + 1 == self.phase.options.epochs and batch_idx % passes == passes - 1

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.terms.rate = optimizer.param_groups[0]["lr"]
        self._second_pass.run(optimizer)
        if self._arrived is not None:
            self.edit_gradients(self._arrived)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self._arrived = None
        with torch.no_grad():
            self.after_step(batch)
        self.terms.log_if_due(self, {"task": float(self.task.index), "epoch": float(self.trainer.current_epoch)})

    def on_train_end(self) -> None:
        # Terms of the last steps of a phase are logged with it, after the callbacks have logged earlier steps.
        self.terms.log(self, {"task": float(self.task.index), "epoch": float(self.trainer.current_epoch)})

    def configure_optimizers(self) -> OptimizerLRScheduler:
        if not hasattr(self, "phase"):
            raise ValueError(
                f"{type(self).__name__} learns a stream: use cl_lightning.fit(strategy, data), or "
                "TaskLoop(trainer, strategy, data).fit(), in place of Trainer.fit"
            )
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not parameters:
            raise ValueError(
                f"{type(self).__name__}: phase {self.phase.name!r} of task {self.task.index} has no parameters to "
                "train; a method that takes no gradient step returns [] from phases()"
            )
        build, build_scheduler = self.phase.options.optimizer, self.phase.options.scheduler
        first, usual = self._first_options, self._options
        if build is None and self.task.is_first and first.optimizer is not None:
            build, build_scheduler = first.optimizer, build_scheduler or first.scheduler
        elif build is None:
            of_first = first.scheduler if self.task.is_first else None
            build, build_scheduler = usual.optimizer, build_scheduler or of_first or usual.scheduler
        assert build is not None
        groups = self.parameter_groups(parameters)
        if self._lr_factors:
            owner = type(self).__name__
            groups = with_lr_factors(groups, self.named_parameters(), self._lr_factors, owner=owner)
        optimizer = build(groups)
        apply_lr_factors(optimizer)
        fuse(optimizer)
        self._second_pass.begin(optimizer)
        if build_scheduler is None:
            return optimizer
        interval = self.phase.options.interval or self._options.interval
        return scheduled(optimizer, build_scheduler, interval, self.phase.options.epochs or 1, self.trainer)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluation.update(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluation.update(batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        tasks = () if self.traits.task_ids == "unused" else (batch.tasks,)
        return self.predict(batch.images, *tasks).float().softmax(dim=1)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == HOOK_NAME:  # set by Lightning about 40 times per step; no parameter, buffer or module
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if mode and self.is_built and hasattr(self, "phase"):
            for module in self._frozen_modules():
                module.eval()
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        part = checkpoint.setdefault("cl_lightning", {})
        part["image_shape"] = list(self.image_shape or ())
        part["terms"] = self.terms.state_dict(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not self.is_built:
            self.build(tuple(checkpoint["cl_lightning"]["image_shape"]))
        if (terms := checkpoint["cl_lightning"].get("terms")) is not None:
            self.terms.load_state_dict(terms, self.device)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # The shape is taken from the state dict; submodules do this in their own `_load_from_state_dict`.
        restore_shapes(self, state_dict, prefix, ("task_columns",))
        for name, module in self.named_modules():
            if (restore := getattr(module, "restore_network", None)) is not None:
                restore(self.network, state_dict, f"{prefix}{name}.")
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]

    # ------------------------------------------------------------------ internal

    def _frozen_modules(self) -> Iterable[nn.Module]:
        return (self.phase.freezes or self.frozen)()

    def _frozen_norms(self) -> list[nn.Module]:
        """Batch-normalisation layers of the backbone that ``freeze_norm`` freezes in the current task."""
        first = self.task.is_first
        frozen = self.freeze_norm == "always" or (self.freeze_norm == "after_first" and not first)
        return list(batch_norms(self.network.backbone)) if frozen else []

    def _uses_old_logits(self) -> bool:
        """Whether a loss of the method or of a callback depends on the logits of earlier classes."""
        sources = self.terms.sources
        return self.traits.uses_old_logits or any(getattr(source, "uses_old_logits", False) for source in sources)


def sum_of_zeros(parameters: Iterable[Tensor]) -> Tensor:
    """A scalar 0 whose gradient with respect to each parameter is zero."""
    return functools.reduce(operator.add, (parameter.sum() * 0.0 for parameter in parameters))
