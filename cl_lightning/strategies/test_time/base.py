"""Test-time adaptation: a source network meets a stream of unlabelled images, and adapts while it predicts them.

    task 0           the source domain: the network is trained on it, or comes from files; what a method keeps of it
                     (a copy of the network, statistics of its images) is taken when the task ends
    tasks 1, 2, ...  a domain each (a corruption): per batch, predict, score, learn; each image comes once

Labels of the stream are used for the score alone, the online error (``cl_lightning.measures.online_error``); ``adapt``
never sees them. A domain is a phase of one epoch in Lightning's automatic optimisation, so that precision, clipping,
logging and resuming are as everywhere; the network is in eval mode meanwhile, its normalisation as ``statistics`` says.
Columns of classes that the source did not have are never predicted.

A method writes ``adapt``: the scores of a batch and the terms to be minimised; what else it changes after a step (a
mean teacher, weights that are restored) goes into ``observe``, what it keeps of the source into ``end_task``, what has
to begin anew with the network into ``reset``. What is made of the scores of a batch afterwards is an
``OutputHead``, which goes with every method.

Several processes share each batch, and sums over it are taken over all of them. After each task the network as it is
then is evaluated on the test samples of the stream, and learns nothing from them.
"""

import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from cl_lightning.backbones import Backbone, CifarResNet, ImageShape, read_classifier
from cl_lightning.batch import Batch
from cl_lightning.distributed import all_sum
from cl_lightning.heads import LinearHead
from cl_lightning.importance import TensorsByName
from cl_lightning.measures import online_error
from cl_lightning.network import Output
from cl_lightning.normalization import Statistics, adapt_norms, norm_parameters, set_statistics
from cl_lightning.strategy import ContinualStrategy, Phase, default_optimizer
from cl_lightning.stream import Task
from cl_lightning.teacher import Teacher

SOURCE, ADAPT = "source", "adapt"
Trained = Literal["norm", "all"] | list[str] | None


def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Of the papers, for CIFAR-10-C in batches of 200."""
    return torch.optim.Adam(parameters, lr=1e-3)


def tiny_resnet(image_shape: ImageShape) -> Backbone:
    """A network with batch normalisation, for tests in seconds."""
    return CifarResNet(image_shape, depth=8, width=4)


class Kept(TensorsByName):
    """Tensors that are kept from one fit to the next."""

    known: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("known", torch.zeros((), dtype=torch.bool))

    def __bool__(self) -> bool:
        return bool(self._get("state"))

    def clear(self) -> None:
        self._clear()
        self.known = torch.zeros_like(self.known)


class SourceState(Kept):
    """What the stream can change of a network, as it was after the source domain."""

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        self.clear()
        self.known = torch.ones_like(self.known)
        for name, value in tensors.items():
            self._set("state", name, value)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By name in the network."""
        return self._get("state")


class OptimizerState(Kept):
    """State of an optimizer, to go on with in the next fit; parameters are known by their place."""

    def take(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep what an optimizer has gathered."""
        self.clear()
        self.known = torch.ones_like(self.known)
        for place, entries in optimizer.state_dict()["state"].items():
            for name, value in entries.items():
                if isinstance(value, Tensor):
                    self._set("state", f"{place}.{name}", value)

    def give(self, optimizer: torch.optim.Optimizer) -> None:
        """Let a new optimizer over the same parameters go on from there."""
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in self._get("state").items():
            place, _, name = key.partition(".")
            # Counters of steps are looked at by the host, which would wait for a GPU.
            state.setdefault(int(place), {})[name] = value.cpu() if name == "step" else value.clone()
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


class OutputHead(ABC):
    """Makes scores of a batch from the features and scores that a method has for it; trains nothing."""

    @abstractmethod
    def __call__(self, output: Output) -> Tensor:
        """Scores ``(B, classes)`` of this process's rows, of features ``(B, d)`` and scores ``(B, classes)``."""


class TestTimeAdaptation(ContinualStrategy):
    """Predicts each batch of a test stream, then learns from it; the base of such methods.

    Args:
        source_head: File with the classifier of the source network (a state dict, in which it is called ``linear``,
            ``fc``, ``classifier`` or ``head``), its rows in the order of the raw labels; the backbone's own option
            gives its weights. Nothing is trained on the source domain then. None to train the network on it, with
            ``first_optimizer`` and ``first_scheduler``.
        statistics: What batch normalisation goes by in the stream: ``source``; ``batch``, the test batch; ``mix``,
            both (``alpha``, ``prior``); or ``moving``, source statistics that move with each batch (``momentum``),
            before it is predicted.
        alpha: Share of the test batch with ``mix``, in [0, 1].
        prior: Instead, N in n / (n + N), the share of a batch of n images.
        momentum: Share of a batch with ``moving``, in (0, 1].
        trained: Parameters that are trained in the stream: ``norm``, scales and shifts of all normalisation layers;
            ``all``; a list of patterns of names (``backbone.layer1.*``); None for none.
        reset: When the network, and the optimizer, begin anew as after the source domain: ``never`` (continual), with
            each ``domain``, or before each ``batch`` (episodic).
        scored: The prediction that counts, ``before`` the network learns from a batch, or one made ``after`` it.
        output: Makes the scores that count of those of the method, such as ``LaplacianAdjustment``; None to leave them.
        optimizer: Of the stream; None for Adam with learning rate 0.001. Its state goes from one domain to the next.
        first_optimizer: Of the training on the source domain; None for SGD with learning rate 0.05 and momentum 0.9.
        kwargs: Of ``ContinualStrategy``.
    """

    __test__ = False  # no test of pytest
    asks_all_processes = True
    needs_source: ClassVar[bool] = False
    """Whether a copy of the source network is kept."""

    def __init__(
        self,
        *,
        source_head: str | None = None,
        statistics: Literal["source", "batch", "mix", "moving"] = "batch",
        alpha: float = 0.1,
        prior: float | None = None,
        momentum: float = 0.1,
        trained: Trained = "norm",
        reset: Literal["never", "domain", "batch"] = "never",
        scored: Literal["before", "after"] = "before",
        output: OutputHead | None = None,
        optimizer: OptimizerCallable | None = None,
        first_optimizer: OptimizerCallable | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            optimizer=optimizer or adam,
            first_optimizer=first_optimizer or default_optimizer,
            visible="all",
            freeze_backbone=False,
            **kwargs,
        )
        name = type(self).__name__
        for option, value, allowed in (
            ("statistics", statistics, ("source", "batch", "mix", "moving")),
            ("reset", reset, ("never", "domain", "batch")),
            ("scored", scored, ("before", "after")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}: {option} is {value!r}; use one of {', '.join(allowed)}")
        if not 0 <= alpha <= 1 or not (prior is None or prior >= 0) or not 0 < momentum <= 1:
            raise ValueError(
                f"{name}: alpha={alpha}, prior={prior}, momentum={momentum}; in [0, 1], at least 0 or null, in (0, 1]"
            )
        if not (trained in ("norm", "all", None) or isinstance(trained, list)):
            raise ValueError(f"{name}: trained is {trained!r}; use norm, all, a list of patterns of names, or null")
        self.source_head, self.trained, self.reset_at, self.scored = source_head, trained, reset, scored
        self.statistics: Literal["source", "batch", "mix", "moving"] = statistics
        self.norm_options = {"share": alpha, "prior": prior, "rate": momentum}
        self.output = output
        self.uses_test_batch = statistics in ("batch", "mix") or output is not None
        self.plain_first_task = source_head is None
        self.source = Teacher()  # the source network, where it is needed again
        self.start = SourceState()  # else what a reset has to set back
        self.optimizer_state = OptimizerState()
        # What is trained where a method trains nothing: a fit needs something, and DistributedDataParallel too.
        self.nothing = nn.Parameter(torch.zeros(()))
        self.register_buffer("online", torch.zeros(0, 2, dtype=torch.int64))  # (tasks, samples and right ones)
        self.online: Tensor

    # ------------------------------------------------------------------ what a method writes

    def adapt(self, batch: Batch, output: Output) -> tuple[Tensor, dict[str, Tensor]]:
        """Predict a batch, and say what is to be minimised with it.

        Terms are means over the rows of this process (``mean_over_rows``), which may have none, or independent of them.

        Args:
            batch: Of the stream, un-augmented, without its labels.
            output: Of the network before the step; logits ``(B, classes of the source)``.

        Returns:
            Scores ``(B, classes of the source)``, and terms of the loss by name; no terms to learn nothing.
        """
        return output.logits, {}

    def reset(self) -> None:
        """Begin anew as after the source domain; what a method adds to the network it has to set back, too."""
        self._put_back(self.network)

    def respond(self, images: Tensor) -> Output:
        """Features and scores ``(B, classes of the source)`` of images, without learning from them."""
        features = self.network.backbone(images)
        return Output(features, self.network.head.classify(features)[:, : self.num_source])

    # ------------------------------------------------------------------ what a method may use

    @property
    def num_source(self) -> int:
        """Number of classes of the source."""
        return self.network.head.block_sizes()[0]

    @property
    def norm_statistics(self) -> Statistics:
        """What normalisation layers go by when an image of the stream is predicted."""
        return self.statistics if self.statistics in ("batch", "mix") else "running"

    @property
    def adapting(self) -> bool:
        """Whether the stream has begun."""
        return len(self.task_columns) > 1

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained in the stream, by name in the network."""
        if self.trained is None:
            return {}
        if self.trained == "norm":
            return norm_parameters(self.network)
        unknown = {id(p) for block in self.network.head.blocks[1:] for p in block.parameters()}  # no loss reaches them
        return {
            name: parameter
            for name, parameter in self.network.named_parameters()
            if id(parameter) not in unknown
            and (self.trained == "all" or any(fnmatch.fnmatchcase(name, pattern) for pattern in self.trained))
        }

    @torch.no_grad()
    def _put_back(self, network: nn.Module) -> None:
        """Give a network of the same make the state of the source."""
        state = network.state_dict()
        start = self.start.tensors if self.source.network is None else self.source.network.state_dict()
        for name, value in start.items():
            state[name].copy_(value)

    # ------------------------------------------------------------------ the stream

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        adapt_norms(self.network)
        if self.trained is not None and not self.trained_parameters():
            raise ValueError(
                f"{type(self).__name__}: trained is {self.trained!r}, of which {type(self.network.backbone).__name__} "
                "has no parameters; take a backbone with normalisation layers, or trained all"
            )
        if self.source_head is not None:
            if not isinstance(self.network.head, LinearHead):
                name = type(self.network.head).__name__
                raise ValueError(f"{type(self).__name__}: source_head goes into a LinearHead, not into a {name}")
            read_classifier(self.source_head, self.network.head.num_features)  # so that a mistake is told now

    def mark_columns(self, task: Task) -> None:
        super().mark_columns(task)
        self._choose_statistics()

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.online = torch.cat([self.online, self.online.new_zeros(1, 2)])
        if task.is_first and self.source_head is not None:
            self._load_head(task, self.source_head)
        if self.reset_at == "domain" and not task.is_first:
            self.reset()

    @torch.no_grad()
    def _load_head(self, task: Task, path: str) -> None:
        weight, bias = read_classifier(path, self.network.head.num_features)
        if len(weight) <= max(task.classes):
            raise ValueError(
                f"{type(self).__name__}: source_head has {len(weight)} classes, the source domain has a class "
                f"{max(task.classes)}; give the classifier of these classes"
            )
        block, labels, columns = self.network.head.blocks[0], list(task.classes), list(task.columns)
        assert isinstance(block, nn.Linear)
        block.weight[columns] = weight[labels].to(block.weight)
        if block.bias is not None:
            block.bias[columns] = 0.0 if bias is None else bias[labels].to(block.bias)

    def phases(self, task: Task) -> list[Phase]:
        if task.is_first:
            return [Phase(SOURCE)] if self.source_head is None else []
        return [Phase(ADAPT, epochs=1)]

    def trainable(self) -> Iterable[nn.Parameter]:
        if self.phase.name == SOURCE:
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
        if self.phase.name == ADAPT and self.reset_at == "batch":
            self.reset()
            for optimizer in self.trainer.optimizers:
                optimizer.state.clear()

    @property
    def plain_batches(self) -> bool:
        return self.phase.name == ADAPT

    def prepare(self, batch: Batch) -> Batch:
        if self.phase.name == SOURCE:
            return batch
        if self.statistics == "moving":
            set_statistics(self.network, "collect")
            with torch.no_grad():
                self.network(batch.images)
            self._choose_statistics()
        return batch

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.phase.name == SOURCE:
            return {"ce": self.classification_loss(output, batch)}
        hidden = batch.replace(labels=torch.full_like(batch.labels, -1))
        scores, terms = self.adapt(hidden, Output(output.features, output.logits[:, : self.num_source]))
        if self.scored == "before":
            self._score(self._final(output._replace(logits=scores)), batch)
        return terms or {"nothing": 0.0 * self.nothing}

    def observe(self, batch: Batch) -> None:
        if self.phase.name == ADAPT and self.scored == "after":
            self._score(self._final(self.respond(batch.images)), batch)

    @torch.no_grad()
    def _final(self, output: Output) -> Tensor:
        """The scores that count."""
        return output.logits if self.output is None or not self.adapting else self.output(output)

    @torch.no_grad()
    def _score(self, scores: Tensor, batch: Batch) -> None:
        known = batch.labels >= 0
        counts = torch.stack([known.sum(), (known & (scores.argmax(dim=1) == batch.labels)).sum()])
        if self.first_sight:
            self.online[self.task.index] += all_sum(counts)

    @torch.no_grad()
    def end_phase(self, phase: Phase) -> None:
        if phase.name == ADAPT and self.reset_at == "never" and self.trained is not None:
            self.optimizer_state.take(self.trainer.optimizers[0])
        elif phase.name == ADAPT and self.reset_at == "batch":
            self.reset()

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        if task.is_first and self.needs_source:
            self.source.learn_from(self.network)
        elif task.is_first and self.reset_at != "never":
            statistics = dict(self.network.named_buffers()) if self.statistics == "moving" else {}
            self.start.take({**self.trained_parameters(), **statistics})

    def predict(self, images: Tensor) -> Tensor:
        scores = self._final(self.respond(images))
        unknown = self.network.head.num_columns - scores.shape[1]
        return nn.functional.pad(scores, (0, unknown), value=-torch.inf) if unknown else scores

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        if self.adapting and self.row is not None:
            self.row.online_error = float(online_error(self.online[-1]))

    def bytes_kept(self) -> dict[str, int]:
        parts = {"optimizer": self.optimizer_state, "source": self.start}
        return {**super().bytes_kept(), **{name: part.num_bytes() for name, part in parts.items() if part}}

    def _choose_statistics(self) -> None:
        set_statistics(self, self.norm_statistics if self.adapting else "running", **self.norm_options)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if (saved := state_dict.get(f"{prefix}online")) is not None:
            self.online = torch.zeros_like(saved, device=self.online.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._choose_statistics()
