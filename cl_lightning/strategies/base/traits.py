"""Facts about a method, for the task loop, the table of methods, the documentation and the checks."""

from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_args

from cl_lightning.checks import one_of

TaskIds = Literal["unused", "inferred", "needed"]
SCENARIOS = ("class-incremental", "domain-incremental", "online")
"""Kinds of streams: a later task has new classes; a later task has none; each sample is seen once."""


INPUTS = ("image", "vector", "sequence", "tokens")
"""Kinds of samples: ``(C, H, W)``, ``(D,)``, ``(C, T)``, integers ``(T,)``; see ``cl_lightning.data.samples``."""


@dataclass(frozen=True)
class Traits:
    """Facts about a method: its family and paper, what it keeps, and what it needs.

    A class states them: ``traits = Traits(family="rehearsal", paper="...", keeps_exemplars=True)``. Where an option
    changes a fact, the constructor replaces it on the instance: ``self.traits = self.traits.but(transductive=True)``.

    Attributes:
        family: Family of the method, such as ``rehearsal``; a class without a family is a base class and is not listed.
        paper: Authors, venue, year, arXiv id.
        keeps_exemplars: Raw samples of earlier tasks are kept.
        needs_all_data: Each task is trained on the data of all tasks so far.
        needs_pretrained: The backbone must be pretrained.
        needs_empty_batches: A step exchanges rows between processes, so a process without rows takes part in the step
            with an empty batch.
        task_ids: How ``predict`` uses the task id of a test sample. ``unused``: scores do not depend on it; task-aware
            accuracy uses the scores of the task's own columns. ``inferred``: the method infers the task if it is not
            given, and the scores with a given task differ from the scores without. ``needed``: there are no scores
            without it, and no class-incremental accuracy.
        transductive: A prediction depends on the other samples of its test batch (for example on their statistics).
        uses_unlabelled: The method also trains on samples without a label (their ``labels`` are -1).
        uses_old_logits: Losses depend on logits of earlier classes even where ``loss_classes`` is ``current``.
        inputs: Kinds of inputs that the method takes, a subset of ``INPUTS``: what a sample is. Its backbone must take
            them too.
        targets: Kinds of targets that the method takes.
        scenarios: Kinds of streams that the method takes, a subset of ``SCENARIOS``. A stream may be of several kinds;
            the method must take all of them.
        remedy: What to do where a stream is refused, for the error; empty for another scenario or strategy.
        task_free: Training depends on the samples alone: neither on their task ids nor on the end of a task, so that
            the method also learns a stream without boundaries. The conformance suite checks it.
        left_out: Share of the training samples of each class that a task leaves out, in [0, 1), for the first task, the
            second, ...; the last one holds for further tasks; empty for 0.
        losses_use_images: The ``losses`` of the class that states this use the images. False if they use only the
            output of the network and the labels: stored features then replace the forward pass of a frozen backbone.
    """

    family: str = ""
    paper: str = ""
    keeps_exemplars: bool = False
    needs_all_data: bool = False
    needs_pretrained: bool = False
    needs_empty_batches: bool = False
    task_ids: TaskIds = "unused"
    transductive: bool = False
    uses_unlabelled: bool = False
    uses_old_logits: bool = False
    inputs: tuple[str, ...] = INPUTS
    targets: tuple[str, ...] = ("class",)
    scenarios: tuple[str, ...] = SCENARIOS
    remedy: str = ""
    task_free: bool = False
    left_out: tuple[float, ...] = ()
    losses_use_images: bool = True

    def __post_init__(self) -> None:
        one_of(self, get_args(TaskIds), task_ids=self.task_ids)
        if unknown := set(self.inputs) - set(INPUTS):
            raise ValueError(f"Traits: inputs has {min(unknown)!r}; use {', '.join(INPUTS)}")
        if unknown := set(self.scenarios) - set(SCENARIOS):
            raise ValueError(f"Traits: scenarios has {min(unknown)!r}; use {', '.join(SCENARIOS)}")

    def data_options(self, task: int) -> dict[str, Any]:
        """Options of ``ContinualDataModule.begin`` for a task, numbered from 0."""
        left_out = self.left_out[min(task, len(self.left_out) - 1)] if self.left_out else 0.0
        return {"cumulative": self.needs_all_data, "with_unlabelled": self.uses_unlabelled, "left_out": left_out}

    def but(self, **changes: Any) -> Self:
        """A copy with some facts replaced."""
        return type(self)(**{**{field.name: getattr(self, field.name) for field in fields(self)}, **changes})
