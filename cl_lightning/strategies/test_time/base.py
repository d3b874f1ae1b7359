"""Test-time adaptation: a source network predicts a stream of unlabelled images, and adapts to it at the same time.

    task 0           the source domain: the network is trained on it, or loaded from files; copies of the network and
                     statistics of the source images are stored when the task ends
    tasks 1, 2, ...  one domain each (a corruption): for each batch predict, score, adapt; each image is seen once

Labels of the stream are used only for the score, the online error (``cl_lightning.measures.online_error``); ``adapt``
does not get them. A domain is a phase of one epoch in Lightning's automatic optimisation, so precision, clipping,
logging and resuming work as for all strategies. During the stream the network is in eval mode, and its normalisation
layers use the statistics that ``statistics`` names. Classes that are not in the source domain are never predicted.

A method overrides ``adapt``, which returns the scores of a batch and the terms to minimise. Other changes after a step
(a mean teacher) go into ``after_update``, source statistics into ``end_task``, and what is reset together with the
network into ``reset``. Parts work with every method: a ``SampleFilter`` chooses the samples that the terms count, a
``RestorationRule`` takes the parameters back to the source, an ``OutputHead`` corrects the scores of a batch.

Several processes split each batch, and sums over a batch are taken over all processes. After each task the current
network is evaluated on the test samples of the stream, without adaptation.
"""

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, Self

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from cl_lightning.batch import ImageShape
from cl_lightning.checks import at_least, one_of, within
from cl_lightning.memory import Teacher
from cl_lightning.models import (
    LinearHead,
    adapt_norms,
    early_norm_parameters,
    in_eval_mode,
    norm_parameters,
    set_statistics,
)
from cl_lightning.models.backbones import read_classifier
from cl_lightning.models.normalization import Statistics
from cl_lightning.strategies.base import default_optimizer
from cl_lightning.strategies.test_time.online import OnlineCounts, OnlineEvaluation
from cl_lightning.strategies.test_time.parts.filters import SampleFilter
from cl_lightning.strategies.test_time.parts.part import OutputHead, Part, PersistentTensors
from cl_lightning.strategies.test_time.parts.restoration import RestorationRule
from cl_lightning.strategies.test_time.parts.together import Parts
from cl_lightning.strategies.test_time.source_run import TIMM, RunHead, SourceRun, timm_backbone, timm_classifier
from cl_lightning.strategy import Batch, ContinualStrategy, Output, Phase, PhaseOptions, Task, Traits

SOURCE, ADAPT = "source", "adapt"
Trained = Literal["norm", "early_norm", "all"] | list[str] | None


def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Adam with learning rate 0.001: the optimizer of the papers for CIFAR-10-C in batches of 200."""
    return torch.optim.Adam(parameters, lr=1e-3)


class SourceState(PersistentTensors):
    """Values, after the source domain, of the tensors of a network that the stream can change.

    Args:
        teacher: Copy of the source network; if the method has it, no tensors are stored.
    """

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self._teacher = (teacher,)  # not a submodule: the method saves it

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors, by name in the network."""
        network = self._teacher[0].network
        return super().tensors if network is None else network.state_dict()

    @torch.no_grad()
    def restore(self, network: nn.Module) -> None:
        """Copy the source values into a network of the same architecture."""
        state = network.state_dict()
        for name, value in self.tensors.items():
            state[name].copy_(value)


class OptimizerState(PersistentTensors):
    """State of an optimizer, carried over to the next fit; a parameter is identified by its index in the optimizer."""

    def take_from(self, optimizer: torch.optim.Optimizer) -> None:
        """Store the state of an optimizer."""
        states = optimizer.state_dict()["state"].items()
        values = ((f"{place}.{name}", value) for place, entries in states for name, value in entries.items())
        self.take({name: value for name, value in values if isinstance(value, Tensor)})

    def give(self, optimizer: torch.optim.Optimizer) -> None:
        """Load the stored state into a new optimizer over the same parameters."""
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in self.tensors.items():
            place, _, name = key.partition(".")
            # Step counters are read by the host: on a GPU that would synchronise with the device.
            state.setdefault(int(place), {})[name] = value.cpu() if name == "step" else value.clone()
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


class TestTimeAdaptation(ContinualStrategy):
    """Base class of test-time adaptation methods: predicts each batch of a test stream, and adapts the network to it.

    Args:
        source: Network that is adapted: a :class:`~cl_lightning.strategies.test_time.source_run.SourceRun`, on the
            command line the path of a checkpoint of any run (.ckpt); or ``timm/NAME``, a model of timm with its
            pretrained classifier, whose rows are the raw labels. Nothing is trained on the source domain then. None to
            use the options of backbone and ``source_head``.
        source_head: File with the classifier of the source network: a state dict in which the classifier is called
            ``linear``, ``fc``, ``classifier`` or ``head``, with rows in the order of the raw labels. The weights of the
            backbone are an option of the backbone. Nothing is trained on the source domain then. None to train the
            network on the source domain, with ``first_optimizer`` and ``first_scheduler``.
        statistics: Statistics of batch normalisation in the stream: ``source``; ``batch``, the statistics of the test
            batch; ``mix``, a weighted mean of both (``alpha``, ``prior``); or ``moving``, running statistics that start
            from the source and are updated with each batch before it is predicted (``momentum``).
        alpha: Weight of the test batch with ``mix``, in [0, 1].
        prior: N, at least 0: with ``mix`` the weight of a batch of n images is n / (n + N). None to use ``alpha``.
        momentum: Weight of a batch with ``moving``, in (0, 1].
        params: Parameters that are trained in the stream: ``norm``, scales and shifts of all normalisation layers;
            ``early_norm``, the same before the last stage of the network; ``all``; a list of patterns of names
            (``backbone.layer1.*``); None for none.
        reset: When the network and the optimizer are reset to their state after the source domain: ``never``
            (continual), before each ``domain``, or before each ``batch`` (episodic).
        predict_when: Prediction that is scored: ``before`` or ``after`` the step on the batch.
        output: Corrects the scores of the method, such as ``LaplacianAdjustment``; None to use them unchanged.
        filters: Choose the samples that the loss counts, and weight them, such as ``EntropyFilter``; None for all
            samples. If no sample of a step is selected, no step is taken; this check synchronises with the device.
        mean_over: With filters, what the weighted sum of a term is divided by: the number of ``selected`` samples, or
            of all samples of the ``batch``.
        restoration: Take the parameters back to the source after each step, in this order, such as
            ``StochasticRestore``; None for none.
        optimizer: Optimizer in the stream; None for Adam with learning rate 0.001. With ``reset="never"`` its state is
            carried from one domain to the next.
        first_optimizer: Optimizer on the source domain; None for SGD with learning rate 0.05 and momentum 0.9.
        kwargs: Options of ``ContinualStrategy``.
    """

    __test__ = False  # pytest would collect a class of this name
    traits = Traits(needs_empty_batches=True)
    needs_source: ClassVar[bool] = False
    """Whether the method needs a copy of the source network."""

    def __init__(
        self,
        *,
        source: SourceRun | str | None = None,
        source_head: str | None = None,
        statistics: Literal["source", "batch", "mix", "moving"] = "batch",
        alpha: float = 0.1,
        prior: float | None = None,
        momentum: float = 0.1,
        params: Trained = "norm",
        reset: Literal["never", "domain", "batch"] = "never",
        predict_when: Literal["before", "after"] = "before",
        output: OutputHead | None = None,
        filters: list[SampleFilter] | None = None,
        mean_over: Literal["selected", "batch"] = "selected",
        restoration: list[RestorationRule] | None = None,
        optimizer: OptimizerCallable | None = None,
        first_optimizer: OptimizerCallable | None = None,
        **kwargs: Any,
    ) -> None:
        others = {"source_head": source_head, "backbone": kwargs.get("backbone"), "head": kwargs.get("head")}
        if source is not None and (given := [name for name, value in others.items() if value is not None]):
            raise ValueError(
                f"{type(self).__name__}: {given[0]} is given with source, which has a backbone and a head; leave one "
                "of them out"
            )
        self._source_run = source if isinstance(source, SourceRun) else None
        if self._source_run is not None:
            kwargs |= {"backbone": self._source_run.backbone, "head": self._source_run.head}
        elif isinstance(source, str):
            kwargs["backbone"], source_head = timm_backbone(source, self), source
        super().__init__(
            optimizer=optimizer or adam,
            first_optimizer=first_optimizer or default_optimizer,
            loss_classes="all",
            freeze_backbone=False,
            **kwargs,
        )
        one_of(self, ("source", "batch", "mix", "moving"), statistics=statistics)
        one_of(self, ("never", "domain", "batch"), reset=reset)
        one_of(self, ("before", "after"), predict_when=predict_when)
        one_of(self, ("selected", "batch"), mean_over=mean_over)
        within(self, "[0, 1]", alpha=alpha)
        at_least(self, 0, prior=prior, optional=True)
        within(self, "(0, 1]", momentum=momentum)
        if not (params in ("norm", "early_norm", "all", None) or isinstance(params, list)):
            raise ValueError(
                f"{type(self).__name__}: params is {params!r}; use 'norm', 'early_norm', 'all', a list of patterns of "
                "names, or null"
            )
        self.source_head, self.params, self.reset_at, self.predict_when = source_head, params, reset, predict_when
        self.statistics: Literal["source", "batch", "mix", "moving"] = statistics
        self._norm_options = {"share": alpha, "prior": prior, "rate": momentum}
        self.parts = Parts(filters, restoration, output, mean_over)
        transductive = statistics in ("batch", "mix") or any(part.transductive for part in self.parts)
        self.traits = self.traits.but(transductive=transductive)
        self.source = Teacher()  # the source network, if the method needs a copy
        self.start = SourceState(self.source)  # otherwise the tensors that a reset restores
        self.optimizer_state = OptimizerState()
        # A fit and DistributedDataParallel need a trained parameter, also if the method trains none.
        self.nothing = nn.Parameter(torch.zeros(()))
        self.online = OnlineCounts()
        self.evaluation = OnlineEvaluation(self, self.online)
        self._last_step, self._moves = 0, True  # whether a step changes parameters
        self._predicted = False  # whether the batch was predicted: a step can take several forward passes

    # ------------------------------------------------------------------ methods to override

    def adapt(self, batch: Batch, output: Output) -> tuple[Tensor, dict[str, Tensor]]:
        """Predict a batch, and return the terms of the loss.

        A term is one value per row, ``(B,)``: the base class takes the mean over the selected rows. Or it is a scalar,
        a mean over the rows of this process (``mean_over_rows``), which may have no rows, or independent of the rows.

        Args:
            batch: Batch of the stream, un-augmented; its labels are -1.
            output: Output of the network before the step; logits ``(B, classes of the source)``.

        Returns:
            Scores ``(B, classes of the source)``, and terms of the loss by name; without terms nothing is trained.
        """
        return output.logits, {}

    def after_update(self, batch: Batch) -> None:
        """Called after each step of the optimizer that changed parameters; applies the restoration rules."""
        for rule in self.parts.rules:
            rule(self, batch)

    def reset(self) -> None:
        """Reset network, parts and optimizer to their state after the source domain; extend it for further state."""
        self.start.restore(self.network)
        for part in self._all_parts():
            part.reset()
        for optimizer in self.trainer.optimizers:
            optimizer.state.clear()

    def forward_source_classes(self, images: Tensor) -> Output:
        """Features and scores ``(B, classes of the source)`` of images, without adaptation."""
        features = self.network.backbone(images)
        return Output(features, self.network.head.classify(features)[:, : self.num_source])

    # ------------------------------------------------------------------ helpers for methods

    @property
    def num_source(self) -> int:
        """Number of classes of the source."""
        return self.network.head.block_sizes()[0]

    @contextmanager
    def stream_statistics(self) -> Iterator[None]:
        """In this context the network normalises as in the stream, in eval mode; for measurements on the source."""
        try:
            with in_eval_mode(self.network):
                set_statistics(self.network, self._in_stream)
                yield
        finally:
            self._choose_statistics()

    @property
    def _in_stream(self) -> Statistics:
        """Statistics that normalisation layers use to predict images of the stream."""
        return self.statistics if self.statistics in ("batch", "mix") else "running"

    @property
    def adapting(self) -> bool:
        """Whether the stream has begun."""
        return len(self.task_columns) > 1

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that are trained in the stream, by name in the network."""
        if self.params is None:
            return {}
        if self.params == "norm":
            return norm_parameters(self.network)
        if self.params == "early_norm":
            return early_norm_parameters(self.network)
        unknown = {id(p) for block in self.network.head.blocks[1:] for p in block.parameters()}  # no loss reaches them
        return {
            name: parameter
            for name, parameter in self.network.named_parameters()
            if id(parameter) not in unknown
            and (self.params == "all" or any(fnmatch.fnmatchcase(name, pattern) for pattern in self.params))
        }

    def _all_parts(self) -> list[Part]:
        """The parts, and further ones of the method."""
        return [module for module in self.modules() if isinstance(module, Part)]

    # ------------------------------------------------------------------ the stream

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        adapt_norms(self.network)
        if self.params is not None and not self.trained_parameters():
            raise ValueError(
                f"{type(self).__name__}: params is {self.params!r}, of which {type(self.network.backbone).__name__} "
                "has no parameters; use a backbone with normalisation layers, or params 'all'"
            )
        for part in self._all_parts():
            part.check(self)
        if self.source_head is not None:
            if not isinstance(self.network.head, LinearHead):
                name = type(self.network.head).__name__
                raise ValueError(f"{type(self).__name__}: source_head goes into a LinearHead, not into a {name}")
            self._classifier(self.source_head)  # so that a wrong file raises here

    def mark_columns(self, task: Task) -> None:
        super().mark_columns(task)
        self._choose_statistics()

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.online.begin_task(has_unknown=self.network.head.num_columns > self.num_source)
        if task.is_first and isinstance(self.network.head, RunHead):
            self.network.head.choose([label for _, label in sorted(zip(task.columns, task.classes, strict=True))])
        elif task.is_first and self.source_head is not None:
            self._load_head(task, self.source_head)
        if self.reset_at == "domain" and not task.is_first:
            self.reset()

    @torch.no_grad()
    def _load_head(self, task: Task, path: str) -> None:
        weight, bias = self._classifier(path)
        if len(weight) <= max(task.classes):
            raise ValueError(
                f"{type(self).__name__}: source_head has {len(weight)} classes, the source domain has a class "
                f"{max(task.classes)}; give the classifier of these classes"
            )
        if unknown := [label for label in task.classes if weight[label].isnan().any()]:
            raise ValueError(
                f"{type(self).__name__}: source_head {path} is of a run that has not learnt class {unknown[0]} of the "
                "source domain; give a checkpoint of a run on these classes"
            )
        block, labels, columns = self.network.head.blocks[0], list(task.classes), list(task.columns)
        assert isinstance(block, nn.Linear)
        block.weight[columns] = weight[labels].to(block.weight)
        if block.bias is not None:
            block.bias[columns] = 0.0 if bias is None else bias[labels].to(block.bias)

    def _classifier(self, path: str) -> tuple[Tensor, Tensor | None]:
        read = timm_classifier if path.startswith(TIMM) else read_classifier
        return read(path, self.network.head.num_features)

    def phases(self, task: Task) -> list[Phase]:
        if task.is_first:
            return [Phase(SOURCE)] if self.source_head is None and self._source_run is None else []
        return [Phase(ADAPT, PhaseOptions(epochs=1), unaugmented=True)]

    def trainable(self) -> Iterable[nn.Parameter]:
        if self.phase.name != ADAPT:
            return super().trainable()
        return list(self.trained_parameters().values()) or [self.nothing]

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.is_built and hasattr(self, "phase") and self.phase.name == ADAPT:
            self.network.eval()
        return self

    def configure_optimizers(self) -> OptimizerLRScheduler:
        built = super().configure_optimizers()
        optimizer = built["optimizer"] if isinstance(built, dict) else built
        if self.phase.name == ADAPT and self.reset_at == "never" and self.optimizer_state.known:
            assert isinstance(optimizer, torch.optim.Optimizer)
            self.optimizer_state.give(optimizer)
        return built

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self._last_step, self._predicted = self.trainer.global_step, False
        if self.phase.name == ADAPT and self.reset_at == "batch":
            self.reset()

    def prepare_batch(self, batch: Batch) -> Batch:
        if self.phase.name != ADAPT:
            return batch
        if self.statistics == "moving":
            set_statistics(self.network, "collect")
            with torch.no_grad():
                self.network(batch.images)
            self._choose_statistics()
        return batch

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.phase.name != ADAPT:
            return {"ce": self.classification_loss(output, batch)}
        hidden = batch.replace(labels=torch.full_like(batch.labels, -1))
        output = Output(output.features, output.logits[:, : self.num_source])
        scores, terms = self.adapt(hidden, output)
        if self.predict_when == "before" and not self._predicted:
            self._predict_stream(output._replace(logits=scores), batch)
        terms = self.parts.averaged(self, terms, hidden, output)
        self._predicted = True
        return terms or {"nothing": 0.0 * self.nothing}

    def edit_gradients(self, batch: Batch) -> None:
        self._moves = self.parts.step_moves()
        if not self._moves:
            self._skip_step()

    def _skip_step(self) -> None:
        """Leave the parameters as they are in this step: momentum would change them even for a gradient of 0."""
        self._moves = False
        for parameter in self.trainable():
            parameter.grad = None

    def after_step(self, batch: Batch) -> None:
        if self.phase.name != ADAPT:
            return
        if self.trainer.global_step > self._last_step and self._moves:  # gradients may be accumulated
            self.after_update(batch)
        if self.predict_when == "after":
            self._predict_stream(self.forward_source_classes(batch.images), batch)

    def _predict_stream(self, output: Output, batch: Batch) -> None:
        """Score the prediction of a batch of the stream, corrected by ``output``, which learns from it."""
        self.parts.learn(output)
        self._score(self._final(output), batch)

    @torch.no_grad()
    def _final(self, output: Output) -> Tensor:
        """Scores after correction by ``output``; these scores are evaluated."""
        return self.parts.corrected(output) if self.adapting else output.logits

    def _score(self, scores: Tensor, batch: Batch) -> None:
        if batch.first_pass:
            self.online.add(scores, batch.labels, self.num_source)

    @torch.no_grad()
    def end_phase(self, phase: Phase) -> None:
        if phase.name == ADAPT and self.reset_at == "never" and self.params is not None:
            self.optimizer_state.take_from(self.trainer.optimizers[0])
        elif phase.name == ADAPT and self.reset_at == "batch":
            self.reset()

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        if task.is_first and (self.needs_source or any(part.needs_source for part in self._all_parts())):
            self.source.learn_from(self.network)
        elif task.is_first and (self.reset_at != "never" or self.parts.rules):
            statistics = dict(self.network.named_buffers()) if self.statistics == "moving" else {}
            self.start.take({**self.trained_parameters(), **statistics})
        if task.is_first:
            for part in self._all_parts():
                part.learn_source(self)

    def predict(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        scores = self._final(self.forward_source_classes(images))
        unknown = self.network.head.num_columns - scores.shape[1]
        return nn.functional.pad(scores, (0, unknown), value=-torch.inf) if unknown else scores

    def bytes_kept(self) -> dict[str, int]:
        kept = {"optimizer": self.optimizer_state, "source": self.start}
        state = sum(part.num_bytes() for part in self._all_parts())
        counts = self.online.num_bytes()
        return {
            **super().bytes_kept(),
            **{name: part.num_bytes() for name, part in kept.items() if part},
            **({"parts": state} if state else {}),
            **({"online counts": counts} if counts else {}),
        }

    def _choose_statistics(self) -> None:
        set_statistics(self, self._in_stream if self.adapting else "running", **self._norm_options)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if (counts := state_dict.pop(f"{prefix}online", None)) is not None:  # of a checkpoint of an earlier release
            state_dict |= {f"{prefix}online.counts": counts, f"{prefix}online.confidences": counts.new_zeros(2, 0)}
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._choose_statistics()
