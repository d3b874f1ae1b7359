"""Passes over data outside of training steps (statistics, features), and access to the data module."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cl_lightning.batch import Batch, Draw
from cl_lightning.data import FeatureCache, FeatureStore
from cl_lightning.data.balance import class_weight_table
from cl_lightning.data.feature_cache import KEYS, STORED
from cl_lightning.data.labels import training_labels
from cl_lightning.data.levels import column_levels
from cl_lightning.distributed import all_gather_together
from cl_lightning.memory import Memory
from cl_lightning.models import Network, in_eval_mode, refit_norms
from cl_lightning.strategies.base.host import Host
from cl_lightning.stream import Stream


class StrategyData:
    """Access of a strategy to the data module: finished and augmented images, labels, class names, the previous batch.

    Attributes:
        stream: Tasks and classes of the run, also of later tasks; set by the task loop before a task begins.
    """

    stream: Stream

    def __init__(self, strategy: Host) -> None:
        self._strategy = strategy
        self._weights: tuple[Any, Tensor] | None = None  # the stream, and the weights of its classes
        self._levels: tuple[Any, Tensor | None] | None = None  # the stream, and the levels of its columns

    @property
    def module(self) -> Any:
        """The data module of the run."""
        return self._strategy.trainer.datamodule  # type: ignore[attr-defined]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class name of each column of the logits, including the columns of later tasks."""
        names: tuple[str, ...] = tuple(self.module.stream.class_names)
        return names

    @property
    def target_kind(self) -> str:
        """What the target of a sample is, of ``cl_lightning.data.TARGET_KINDS``."""
        try:
            kind: str = self.module.target_kind
        except RuntimeError:  # a strategy without a Trainer
            return "class"
        return kind

    def labels(self) -> Tensor:
        """Column of each labelled training sample of the task, int64 ``(n,)``, on the CPU, the same on every process.

        No image is read. The order is the order of ``Phase.samples``, without the samples of a memory.
        """
        stream, index = self.module.stream, self.module.task.index
        chosen = stream.train[index]
        if stream.unlabelled:
            chosen = chosen[~np.isin(chosen, stream.unlabelled[index])]
        return torch.from_numpy(stream.columns_of(np.asarray(training_labels(self.module))[chosen]))

    def augment(self, batch: Batch) -> Batch:
        """Make the images of a batch from its raw images as in training: augmented, scaled and normalised."""
        augmented: Batch = self.module.finish(batch, augment=True)
        return augmented

    def finish(self, batch: Batch) -> Batch:
        """Make the images of a batch from its raw images without augmentation: scaled and normalised."""
        finished: Batch = self.module.finish(batch, augment=False)
        return finished

    def pixel_range(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Finished images whose pixels all have the smallest and the largest value, ``(C, H, W)`` each.

        Samples that are no pixels of 8 bits have no such values: minus and plus infinity.

        Args:
            raw: Raw samples, such as uint8 ``(n, C, H, W)``; only their shape, type and device are used.
        """
        if raw.dtype != torch.uint8:
            endless = torch.full(raw.shape[1:], torch.inf, device=raw.device)
            return -endless, endless
        ends = torch.zeros(2, *raw.shape[1:], dtype=torch.uint8, device=raw.device)
        ends[1] = 255
        nothing = torch.zeros(2, dtype=torch.int64, device=raw.device)
        low, high = self.finish(Batch(ends, nothing, nothing, nothing, ends, Draw.of(2, 0))).images
        return low, high

    def levels(self) -> Tensor | None:
        """Level of each column of the stream, also of later tasks, int64 ``(columns,)`` on the device: 0 for
        superclasses, 1 for their classes; None for labels of one level."""
        try:
            module = self.module
        except RuntimeError:  # a strategy without a Trainer
            return None
        if self._levels is None or self._levels[0] is not module.stream:
            found = column_levels(module)
            self._levels = module.stream, None if found is None else found.to(self._strategy.device)
        return self._levels[1]

    def within_level(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Scores ``(B, columns)`` with -inf for the classes of other levels than the label's, for labels ``(B,)``.

        Unchanged for labels of one level.
        """
        levels = self.levels()
        if levels is None:
            return scores
        return scores.masked_fill(levels[labels][:, None] != levels[: scores.shape[1]], -torch.inf)

    def weights_of(self, batch: Batch) -> Tensor | None:
        """Weight of the loss of each sample by ``class_weights`` of the data module, float32 ``(B,)``; None without."""
        try:
            module = self.module
        except RuntimeError:  # a strategy without a Trainer
            return None
        if getattr(module, "class_weights", None) is None:
            return None
        if self._weights is None or self._weights[0] is not module.stream:
            names, owner = module.samples(train=True).class_names, type(module).__name__
            table = class_weight_table(owner, module.class_weights, module.stream, training_labels(module), names)
            self._weights = module.stream, table.to(self._strategy.device)
        return self._weights[1][batch.tasks, batch.labels.clamp(min=0)]

    def check_weights_used(self) -> None:
        """Check after the losses of the first step of a run that they have used the class weights, if there are any.

        Raises:
            ValueError: If the method has a classification loss of its own, in which the weights have no effect.
        """
        if self._weights is None and getattr(self.module, "class_weights", None) is not None:
            raise ValueError(
                f"{type(self._strategy).__name__} does not use class_weights: its losses are not the shared "
                "classification loss; remove data.class_weights, or use data.sampler balanced"
            )

    def batch_before(self) -> Batch | None:
        """This process's batch of the step before a fit was interrupted, if the fit is being resumed; else None.

        For methods that use the batch of the previous step; call it in ``on_train_start``. The batch has the same
        augmentation as in the interrupted run.
        """
        found: Batch | None = self.module.batch_before()
        return found


class Passes:
    """Passes over the data of the current task, or over a memory, with the network in eval mode.

    Attributes:
        cache: Cache of features for a backbone that does not change any more, or None; set by the task loop.
        on_batch: Functions that are called before each batch with the number of finished batches and of all batches; a
            progress bar adds its own.
        watch: Set by the task loop, which stops a run inside a pass: called with the number of batches of this process
            when a pass begins, on all processes; its result is called before each batch with the batch's number.
        brief: Whether :meth:`steps` has a single step; set by the dry run.
    """

    def __init__(self, strategy: Host) -> None:
        self._strategy = strategy
        self.cache: FeatureCache | None = None
        self.on_batch: list[Callable[[int, int], None]] = []
        self.watch: Callable[[int], Callable[[int], None]] | None = None
        self.brief = False

    def steps(self, count: int) -> Iterator[int]:
        """Numbers of the steps of a long computation at the end of a task, with progress and requests to stop.

        Every process must take the same steps. In a dry run there is one step.

        Args:
            count: Number of steps.

        Yields:
            0, 1, ..., ``count - 1``.
        """
        yield from self._watched(min(count, 1) if self.brief else count)

    def _watched(self, count: int) -> Iterator[int]:
        watched = self.watch(count) if self.watch is not None else None
        for number in range(count):
            if watched is not None:
                watched(number)
            for called in self.on_batch:
                called(number, count)
            yield number

    def batches(
        self,
        *,
        memory: Memory | None = None,
        indices: Tensor | None = None,
        samples: int | None = None,
        where: Callable[[Tensor, Tensor], Tensor | None] | None = None,
        batch_size: int | None = None,
        store: FeatureStore | None = None,
    ) -> Iterator[Batch]:
        """One pass over the un-augmented training data of the task, in the order of the data set, on the device.

        Each process gets its share of each batch. Processes exchange requests to stop inside a pass: all of them begin
        it, and end it at the same batch if they end it early.

        Args:
            memory: Pass over the samples of this memory instead.
            indices: Pass over these samples of the task only, in this order: indices into the data set, int64.
            samples: Pass over this number of samples of the task, drawn by seed and task; None for all samples.
            where: Choose among the samples of the task, followed by the samples of ``memory``, as ``Phase.samples``.
            batch_size: Number of samples per batch, over all processes; None for the batch size of evaluations.
            store: Store whose features, where present, replace the images.
        """
        strategy, datamodule = self._strategy, self._strategy.data.module
        loader = datamodule.statistics_dataloader(
            memory=memory, indices=indices, samples=samples, where=where, batch_size=batch_size, store=store
        )
        device = strategy.trainer.strategy.root_device
        for _, batch in zip(self._watched(len(loader)), loader, strict=True):
            moved = datamodule.transfer_batch_to_device(batch, device, 0)  # finished below
            yield datamodule.finish(moved, augment=False)

    def features(self, network: Network | None = None, *, memory: Memory | None = None) -> tuple[Tensor, Tensor]:
        """Features of this process's share of the current task's un-augmented training data.

        Args:
            network: Network that computes the features; None for the network of the strategy.
            memory: Use the samples of this memory instead.

        Returns:
            Features ``(n, d)``, float32, and columns, int64 ``(n,)``, on the device.
        """
        features, labels, _ = self.indexed_features(network, memory=memory)
        return features, labels

    def all_features(self, network: Network | None = None) -> tuple[Tensor, Tensor]:
        """Features and columns as :meth:`features`, of all processes, in the order of the data set.

        The result is the same on every process.

        Args:
            network: Network that computes the features; None for the network of the strategy.
        """
        features, labels, _ = self.all_indexed_features(network)
        return features, labels

    def all_indexed_features(self, network: Network | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Features and columns as :meth:`all_features`, and indices into the data set, int64 ``(n,)``."""
        features, labels, indices = all_gather_together(self.indexed_features(network))
        order = indices.argsort()
        return features[order], labels[order], indices[order]

    @torch.no_grad()
    def indexed_features(
        self, network: Network | None = None, *, memory: Memory | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features and columns as :meth:`features`, and indices into the data set, int64 ``(n,)``; -1 for a memory."""
        strategy = self._strategy
        plain = memory is None and network in (None, strategy.network)
        store = self.store() if plain else None
        network = strategy.network if network is None else network
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for batch in self.batches(memory=memory, store=store):
            if len(batch) == 0:
                continue
            with strategy.trainer.precision_plugin.forward_context():
                features = self.features_of(batch, network, store)
            parts.append((features.float(), batch.labels, batch.indices))
        if not parts:
            nothing = torch.zeros(0, dtype=torch.int64, device=strategy.device)
            width = getattr(network.backbone, "num_features", network.head.num_features)
            return torch.zeros(0, width, device=strategy.device), nothing, nothing
        features, labels, indices = (torch.cat(column) for column in zip(*parts, strict=True))
        return features, labels, indices

    def refit_norms(self, frozen: Iterable[nn.Module] = ()) -> None:
        """Compute the running statistics of batch normalisation again from the task, for weights that were merged.

        Args:
            frozen: Layers that keep theirs; see :func:`cl_lightning.models.refit_norms`.
        """
        strategy = self._strategy
        with strategy.trainer.precision_plugin.forward_context():
            refit_norms(strategy.network, self.batches(), frozen)

    def features_of(self, batch: Batch, network: Network, store: FeatureStore | None) -> Tensor:
        """Features of a finished batch: the stored features if the batch holds them, else computed and stored.

        Args:
            batch: Batch of any loader; it holds stored features if its loader was given ``store``.
            network: Network whose backbone computes the features.
            store: Result of :meth:`store`; None to store nothing.
        """
        if (stored := batch.extra.get(STORED)) is not None:
            return stored
        features: Tensor = network.backbone(batch.images)
        if store is not None and KEYS in batch.extra:
            store.add(batch.extra[KEYS], features)
        return features

    def store(self, *, training: bool = False, evaluation: bool = False) -> FeatureStore | None:
        """Store for the features of the backbone; None where features cannot replace images.

        Features are stored only for a backbone that does not change any more.

        Args:
            training: For training steps: None also if the losses of the strategy or of a callback use images.
            evaluation: For evaluation: None also if the strategy overrides ``predict``.
        """
        strategy = self._strategy
        if self.cache is None or not strategy.backbone_is_final or strategy.data.target_kind != "class":
            return None
        if training and (_trains_on_images(strategy) or strategy.terms.sources):
            return None
        if evaluation and _overridden(strategy, "predict"):
            return None
        backbone, context = strategy.network.backbone, strategy.trainer.precision_plugin.forward_context

        def forward(images: Tensor) -> Tensor:
            with context():
                features: Tensor = backbone(images)
            return features

        with in_eval_mode(backbone):
            setting = f"{strategy.data.module.scaling}, {strategy.trainer.precision}"
            return self.cache.store(backbone, forward, strategy.image_shape or (), setting)


def _overridden(strategy: Host, method: str) -> bool:
    """Whether the class of a strategy overrides a method of the base class."""
    defined: str = getattr(type(strategy), method).__module__
    return defined != "cl_lightning.strategies.base.strategy"


def _trains_on_images(strategy: Host) -> bool:
    """Whether a training step uses the images, not only the output of the network and the labels.

    ``traits.losses_use_images=False`` holds for the ``losses`` of the class that states it. A subclass that overrides
    ``losses`` must state it again.
    """
    classes = type(strategy).__mro__
    states = next(place for place, cls in enumerate(classes) if "traits" in vars(cls))
    defines = next(place for place, cls in enumerate(classes) if "losses" in vars(cls))
    stated = not strategy.traits.losses_use_images and states <= defines
    return not stated or _overridden(strategy, "prepare_batch") or _overridden(strategy, "after_step")
