"""Requests to keep or to forget what was learnt, as tasks of the stream."""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from cl_lightning.hashing import IntArray, hash64
from cl_lightning.stream import draws
from cl_lightning.stream.core import DatasetInfo, Stream
from cl_lightning.stream.dealing import Scenario
from cl_lightning.stream.draws import rank_in_group, round_half_up
from cl_lightning.stream.modifiers import Modifier
from cl_lightning.stream.tasks import RequestKind, Segment, number_tasks


@dataclass(frozen=True)
class Request:
    """A request about training samples of the tasks so far: of classes, of tasks, or a share of all samples.

    Exactly one of ``classes``, ``tasks`` and ``fraction`` is given.

    Args:
        after: Task of the base scenario after which the request arrives; None for the last one.
        kind: ``forget``, or ``keep`` for whole tasks that are held.
        classes: Names or raw labels of classes, all of whose samples are asked for.
        tasks: Tasks of the base scenario, all of whose samples are asked for.
        fraction: Share of the samples of each class of each task, in (0, 1), drawn by seed and request; the number is
            rounded, and at least one sample stays.
    """

    after: int | None = None
    kind: Literal["forget", "keep"] = "forget"
    classes: list[int | str] | None = None
    tasks: list[int] | None = None
    fraction: float | None = None


@dataclass(frozen=True)
class Requests(Modifier):
    """Continual unlearning: the stream has requests to forget samples, classes or tasks between its tasks.

    A request is a task of its own. Its training samples are the samples that it asks for, it has no new classes, and
    neither validation nor test samples: the accuracy matrix has a row for it and no column. Validation and test samples
    of the base stay as they are. The vocabulary of remembering permanently, remembering temporarily and forgetting is
    from Liu et al., CoLLAs 2022, arXiv:2203.12817.

    Args:
        base: Scenario with the tasks that are learnt; it has neither hidden nor wrong labels, and no shifted images.
        requests: The requests; of requests after the same task the first one comes first.
        held: Tasks of the base that are learnt temporarily, so that they may be kept or forgotten later.

    Raises:
        ValueError: If a request asks for nothing, for samples that are not learnt yet or are forgotten already, for all
            samples that are left, or to keep a task that is not held.
    """

    base: Scenario
    requests: list[Request]
    held: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.requests and not self.held:
            self.fail("there are no requests; give at least one, such as {classes: [3]}, or use the base scenario")
        for number, request in enumerate(self.requests):
            given = [name for name in ("classes", "tasks", "fraction") if getattr(request, name) is not None]
            if len(given) != 1:
                self.fail(f"request {number}: give one of classes, tasks and fraction, not {len(given)}")
            if request.kind not in ("forget", "keep"):
                self.fail(f"request {number}: kind is {request.kind!r}; use forget or keep")
            if request.kind == "keep" and request.tasks is None:
                self.fail(f"request {number}: whole tasks are kept; give tasks")
            if request.fraction is not None and not 0 < request.fraction < 1:
                self.fail(f"request {number}: fraction must be above 0 and below 1, got {request.fraction}")

    def change(self, stream: Stream, info: DatasetInfo) -> Stream:
        if any(part.size for part in (*stream.unlabelled, *stream.noisy)) or any(stream.shifts):
            self.fail("labels are hidden or wrong, or images are shifted; use a base without")
        count = len(stream)
        after = [count - 1 if request.after is None else request.after for request in self.requests]
        for place in (*after, *self.held, *(task for request in self.requests for task in request.tasks or ())):
            if not 0 <= place < count:
                self.fail(f"task {place} is none of the base, which has the tasks 0 to {count - 1}")
        if twice := [task for task, times in Counter(self.held).items() if times > 1]:
            self.fail(f"held has task {twice[0]} twice")
        kinds: list[RequestKind] = []
        train: list[IntArray] = []
        names: list[str] = []
        sources: list[int | None] = []  # task of the base, or None for a request
        gone, held = np.empty(0, np.int64), set[int]()
        for task in stream.tasks:
            kinds.append("hold" if task.index in self.held else "learn")
            train.append(stream.train[task.index])
            names.append(task.name)
            sources.append(task.index)
            held |= {task.index} & set(self.held)
            for number, (request, place) in enumerate(zip(self.requests, after, strict=True)):
                if place != task.index:
                    continue
                if request.kind == "keep" and (free := sorted(set(request.tasks or ()) - held)):
                    self.fail(f"request {number}: task {free[0]} is not held after task {place}; add it to held")
                chosen = self._chosen(number, place, stream, info, gone)
                held -= set(request.tasks or ())
                gone = np.union1d(gone, chosen) if request.kind == "forget" else gone
                kinds.append(request.kind)
                train.append(chosen)
                names.append(_name(request, stream))
                sources.append(None)
        return self._assembled(stream, info, kinds, train, names, sources)

    def _chosen(self, number: int, place: int, stream: Stream, info: DatasetInfo, gone: IntArray) -> IntArray:
        """Samples that a request asks for, ascending."""
        request, learnt = self.requests[number], [np.setdiff1d(part, gone) for part in stream.train[: place + 1]]
        left = np.unique(np.concatenate(learnt))
        if request.tasks is not None:
            if late := [task for task in request.tasks if task > place]:
                self.fail(f"request {number}: task {late[0]} is learnt after task {place}, when the request arrives")
            chosen = np.unique(np.concatenate([learnt[task] for task in request.tasks]))
        elif request.classes is not None:
            names = {name: label for label, name in enumerate(info.class_names)}
            labels = [names.get(item, -1) if isinstance(item, str) else item for item in request.classes]
            for item, label in zip(request.classes, labels, strict=True):
                if not (info.train_labels[left] == label).any():
                    self.fail(f"request {number}: no samples of class {item!r} are learnt, or left, after task {place}")
            chosen = left[np.isin(info.train_labels[left], labels)]
        else:
            seed = int(hash64(stream.task_parts[place].seed, draws.FORGETTING, number)[0])
            task = np.repeat(np.arange(len(learnt)), [len(part) for part in learnt])
            pool = np.concatenate(learnt)
            groups = task * info.num_classes + info.train_labels[pool]
            rank, size = rank_in_group(groups, info.keys(pool, seed, draws.FORGETTING))
            wanted = np.minimum(round_half_up(size * np.float64(request.fraction)), size - 1)
            chosen = np.unique(pool[rank < wanted])
        if not chosen.size:
            self.fail(f"request {number}: it asks for no sample that is left after task {place}")
        if request.kind == "forget" and len(chosen) == len(left):
            self.fail(f"request {number}: it asks to forget all samples that are left after task {place}")
        return chosen

    def _assembled(
        self,
        stream: Stream,
        info: DatasetInfo,
        kinds: list[RequestKind],
        train: list[IntArray],
        names: list[str],
        sources: list[int | None],
    ) -> Stream:
        column = {label: place for place, label in enumerate(stream.order)}
        present = [
            sorted({int(label) for label in np.unique(info.train_labels[part])}, key=column.__getitem__)
            for part in train
        ]
        tasks, order = number_tasks(present, names, [None] * len(names), kinds)
        nothing = np.empty(0, np.int64)
        sizes = Counter[int]()
        segment = -1
        for source in sources:  # a request belongs to the segment of the task before it
            segment = segment if source is None else stream.parts.index(stream.task_parts[source])
            sizes[segment] += 1
        return replace(
            stream,
            tasks=tasks,
            order=order,
            train=tuple(train),
            val=tuple(nothing if source is None else stream.val[source] for source in sources),
            test=tuple(nothing if source is None else stream.test[source] for source in sources),
            unlabelled=(),
            noisy=(),
            given=(),
            parts=tuple(Segment(sizes[at], part.seed, part.val_fraction) for at, part in enumerate(stream.parts)),
        )

    def stream(self, info: DatasetInfo, part: Segment, earlier: Stream | None) -> Stream:
        if earlier is not None:
            self.fail("a stream with requests cannot be extended; make a new one")
        return super().stream(info, part, earlier)


def _name(request: Request, stream: Stream) -> str:
    if request.tasks is not None:
        what = ", ".join(stream.tasks[task].name for task in request.tasks)
    elif request.classes is not None:
        what = "class " + ", ".join(map(str, request.classes))
    else:
        what = f"{request.fraction:g} of the samples"
    return f"{request.kind} {what}"
