"""What must hold for every strategy."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from cl_lightning.backbones import MLP
from cl_lightning.memory import Memory
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategy import ContinualStrategy
from cl_lightning.testing.bench import Factory, Outcome, SavePoint, Subject, run
from cl_lightning.testing.compare import difference, first_other_step
from cl_lightning.testing.pair import Pair

RTOL, ATOL = 1e-4, 1e-5
"""How far two processes may be from one, in float32: each sums its half of a batch and the halves are averaged, which
rounds in another order (about 1e-7 of a gradient), and some tens of steps with momentum carry that along."""

_OVERHEAD = 64  # bytes of counters in a state that are nobody's memory


class Case:
    """A strategy under test; runs that several checks need are made once.

    Args:
        subject: What is tested.
        every_place: Kill and resume the run at every checkpoint, not at some of each kind.
        pair: Two processes that run this strategy among others, under the name of the subject; None to start them for
            it alone.
    """

    def __init__(self, subject: Subject, *, every_place: bool = False, pair: Pair | None = None) -> None:
        self.subject, self.every_place, self.pair = subject, every_place, pair
        self._folder = TemporaryDirectory(prefix="conformance_")

    @cached_property
    def reference(self) -> Outcome:
        """The run that nothing interrupts."""
        return run(self.subject)

    @cached_property
    def again(self) -> Outcome:
        """The same run once more, now with checkpoints in ``folder("again")``."""
        return run(self.subject, folder=self.folder("again"))

    def folder(self, name: str) -> Path:
        return Path(self._folder.name) / name

    def fail(self, check: str, message: str) -> None:
        raise AssertionError(f"{self.subject.name}: {check}: {message}")

    def same(self, check: str, what: str, expected: Any, actual: Any, *, rtol: float = 0.0, atol: float = 0.0) -> None:
        """Fail at the first tensor or value that differs."""
        if (found := difference(expected, actual, rtol=rtol, atol=atol)) is not None:
            self.fail(check, f"{what}: {found}")

    def check(self, name: str) -> None:
        """Run one check.

        Raises:
            AssertionError: If it does not hold; the message names strategy, check and what differs.
        """
        if name not in CHECKS:
            raise ValueError(f"check {name!r} is unknown; there are {', '.join(CHECKS)}")
        try:
            CHECKS[name](self)
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(f"{self.subject.name}: {name}: {type(error).__name__}: {error}") from error


# ---------------------------------------------------------------------- the checks


def check_trains(case: Case) -> None:
    """A stream of three tasks is learnt: the head has a column per class, all that is left is finite."""
    outcome, name = case.reference, "trains"
    strategy, stream = outcome.strategy, outcome.stream
    assert strategy is not None
    assert stream is not None
    if (key := _not_finite(outcome)) is not None:
        case.fail(name, f"{key} is not finite")
    if wrong := next((step for step in outcome.steps if not math.isfinite(step.loss)), None):
        case.fail(name, f"the loss is {wrong.loss} at {wrong}")
    columns, tasks = stream.tasks[-1].num_seen, len(stream)
    if strategy.network.head.num_columns != columns:
        case.fail(name, f"the head has {strategy.network.head.num_columns} columns after {columns} classes")
    expected = torch.ones(tasks, tasks, dtype=torch.bool).tril()
    for kind in ("R_ci", "R_ti"):
        filled = ~outcome.matrix[kind].isnan()
        if filled.shape != expected.shape or not filled.equal(expected):
            case.fail(name, f"the accuracy matrix {kind} is filled at {filled.int().tolist()}, not below the diagonal")
    strategy.eval()
    images = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, *(strategy.image_shape or ())).to(strategy.device)
    images = images * torch.rand(images.shape, generator=torch.Generator().manual_seed(0)).to(images)
    with torch.no_grad():
        scores, alone = strategy.predict(images), strategy.predict(images[:1])
    if scores.shape != (5, columns) or scores.isnan().any():
        case.fail(name, f"predict gives {tuple(scores.shape)} scores, or nan, for 5 images and {columns} classes")
    if not strategy.uses_test_batch:
        case.same(name, "predict of an image alone and among others", scores[:1], alone, rtol=RTOL, atol=ATOL)


def check_seed(case: Case) -> None:
    """The same seed gives the same weights bit by bit, wherever the global generators stood before."""
    _same_steps(case, "seed", "the same seed again", case.again)
    case.same("seed", "the same seed again", case.reference.plain(), case.again.plain())


def check_resume(case: Case) -> None:
    """A run that is killed right after a checkpoint, and resumed in new objects, ends where an unbroken one ends."""
    _kill_and_resume(case, "resume", case.reference, places(case.reference.snapshots, every=case.every_place))


def check_restores(case: Case) -> None:
    """A checkpoint holds tensors and plain values only, and a new strategy takes its shapes from it."""
    name, outcome = "restores", case.again
    assert outcome.strategy is not None
    path = case.folder("again") / "checkpoints" / "last.ckpt"
    saved = torch.load(path, map_location="cpu", weights_only=True)
    fresh = case.subject.factory()
    fresh.on_load_checkpoint(saved)
    fresh.load_state_dict(saved["state_dict"])
    state = {key: value.detach() for key, value in fresh.state_dict().items()}
    case.same(name, "a new strategy with the checkpoint's state", outcome.state, state)
    assert fresh.image_shape is not None
    images = torch.rand(5, *fresh.image_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        scores = [strategy.cpu().eval().predict(images) for strategy in (outcome.strategy, fresh)]
    case.same(name, "predictions of a new strategy with the checkpoint's state", *scores)


def check_options(case: Case) -> None:
    """``bf16-mixed`` with gradient accumulation and clipping stays finite, and can be killed and resumed too."""
    name = "options"
    options: dict[str, Any] = {
        "precision": "bf16-mixed",
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.5,
        "last_task": min(1, len(case.reference.stream or ()) - 1),
    }
    reference = run(case.subject, **options)
    if (key := _not_finite(reference)) is not None:
        case.fail(name, f"{key} is not finite")
    chosen = places(reference.snapshots)[:1]  # in the middle of an epoch, where there is one
    _kill_and_resume(case, name, reference, chosen, **options)


def check_limits(case: Case) -> None:
    """A first task that is plain training (``plain_first_task``) ends, bit by bit, where fine-tuning ends."""
    strategy = case.subject.factory()
    if not strategy.plain_first_task or case.subject.callbacks():
        return
    try:
        check_limit(
            case.subject, replace(case.subject, factory=partial(_plain_twin, case.subject.factory)), last_task=0
        )
    except AssertionError as error:
        raise AssertionError(f"{error}; a method whose first task is another says plain_first_task = False") from None


def check_data(case: Case) -> None:
    """Labels arrive in order, and no sample is touched before or after its time."""
    name, outcome = "data", case.reference
    strategy, stream = outcome.strategy, outcome.stream
    assert strategy is not None
    assert stream is not None
    columns = [torch.tensor(task.columns) for task in stream.tasks]
    for step in outcome.steps:
        known = step.labels >= 0
        if (step.labels >= stream.tasks[step.task].num_seen).any() or (step.tasks > step.task).any():
            case.fail(name, f"a class or task of the future at {step}: labels {sorted(set(step.labels.tolist()))}")
        for task in set(step.tasks[known].tolist()):
            if not torch.isin(step.labels[known & (step.tasks == task)], columns[task]).all():
                case.fail(name, f"labels that are not columns of task {task} at {step}")
    told = any(getattr(callback, "test_data_use", None) is not None for callback in case.subject.callbacks())
    for touch in outcome.touches:
        stage, task = touch.stage, touch.task
        if not touch.train:
            allowed = stream.test[: task + 1] if stage == "evaluate" or told else ()
        elif stage == "validate":
            allowed = stream.val[: task + 1]
        elif stage == "train":
            allowed = (
                *(stream.train[: task + 1] if strategy.needs_all_data else stream.train[task : task + 1]),
                stream.val[task],
            )
        else:
            allowed = ()
        pool = torch.cat([torch.zeros(0, dtype=torch.int64), *(torch.as_tensor(part.copy()) for part in allowed)])
        if not torch.isin(touch.indices, pool).all():
            kind = "training" if touch.train else "test"
            own = [
                t
                for t, part in enumerate(stream.train if touch.train else stream.test)
                if set(touch.indices.tolist()) & set(part.tolist())
            ]
            remedy = (
                "; a strategy that trains on all data says needs_all_data" if touch.train and stage == "train" else ""
            )
            case.fail(name, f"{kind} samples of tasks {own} are taken in task {task} while it is to {stage}{remedy}")


def check_bytes(case: Case) -> None:
    """What is kept from task to task is told by ``bytes_kept``, and raw samples only by who keeps exemplars."""
    name, outcome = "bytes", case.reference
    assert outcome.strategy is not None
    kept = outcome.kept
    exemplars, declared = kept.get("exemplars", 0), outcome.strategy.keeps_exemplars
    if declared != (exemplars > 0):
        case.fail(name, f"keeps_exemplars is {declared}, but bytes_kept tells of {exemplars} bytes of exemplars")
    extra = {
        key: value.nbytes
        for key, value in outcome.state.items()
        if not key.startswith("network.") and key != "task_columns"
    }
    if sum(extra.values()) > sum(kept.values()) + _OVERHEAD:
        largest = max(extra, key=lambda key: extra[key])
        case.fail(
            name,
            f"the state holds {sum(extra.values())} bytes beside the network, {extra[largest]} of them in {largest}; "
            f"bytes_kept tells of {kept}",
        )


def check_processes(case: Case) -> None:
    """Two processes give what one gives with the same global batch, and resume as well as one does.

    Three things differ by their nature, and are kept out of the options that are checked: batch normalisation takes its
    statistics per process (unless synchronised), dropout draws per process, and optimizers that divide by the size of
    the gradient (Adam) turn the rounding of a gradient that should be 0 into a step.
    """
    name, subject = "processes", replace(case.subject, accelerator="cpu")
    first = case.reference if subject == case.subject else run(subject)
    case.pair = case.pair or Pair([subject])
    report = case.pair.report(subject.name)
    ranks, resumed = report["whole"], report["resumed"]
    case.same(name, "the second process and the first", ranks[0], ranks[1])
    # The statistics of batch normalisation, one per process, are averaged for each checkpoint, and so rounded.
    rounded = RTOL if any(key.endswith("running_mean") for key in ranks[0]["state"]) else 0.0
    what = "two processes, killed and resumed, against two that were not"
    case.same(name, what, ranks[0], resumed[0], rtol=rounded, atol=rounded / 10)
    case.same(name, "of two killed and resumed processes, the second and the first", resumed[0], resumed[1])
    assert first.strategy is not None
    if not first.strategy.ranks_agree:
        return
    alone, both = first.plain(), ranks[0]
    case.same(name, "two processes against one", alone["state"], both["state"], rtol=RTOL, atol=ATOL)
    case.same(
        name, "callbacks of two processes against one", alone["callbacks"], both["callbacks"], rtol=RTOL, atol=ATOL
    )
    case.same(name, "bytes kept and steps", (alone["kept"], alone["global_step"]), (both["kept"], both["global_step"]))
    totals = alone["matrix"]["totals"]
    for kind in ("R_ci", "R_ti"):
        counts = [(matrix[kind] * totals).nan_to_num(-1.0) for matrix in (alone["matrix"], both["matrix"])]
        # A sample whose two best scores are equal but for rounding may fall on either side.
        case.same(name, f"samples right by {kind}, two processes against one", *counts, rtol=1e-12, atol=1.01)


CHECKS: dict[str, Callable[[Case], None]] = {
    "trains": check_trains,
    "seed": check_seed,
    "resume": check_resume,
    "restores": check_restores,
    "options": check_options,
    "limits": check_limits,
    "data": check_data,
    "bytes": check_bytes,
    "processes": check_processes,
}
"""The checks by name."""


# ---------------------------------------------------------------------- what users call


def check_strategy(
    factory: Factory | Subject,
    *,
    checks: Iterable[str] = tuple(CHECKS),
    limits: Mapping[str, tuple[Factory, Factory]] | None = None,
    every_place: bool = False,
    pair: Pair | None = None,
    **options: Any,
) -> None:
    """Check a strategy; a test of a new method is this call.

    Args:
        factory: Makes a new strategy at each call. For the check of two processes it is pickled: a class, a function of
            a module, or a ``functools.partial`` of one.
        checks: Those to run, by their names in ``CHECKS``.
        limits: Pairs of strategies that must end with the same network, bit by bit, by a name for the limit.
        every_place: Kill and resume the run at every checkpoint, not at some of each kind.
        pair: Two processes that run this strategy among others.
        options: Further fields of :class:`Subject`: ``name``, ``callbacks``, ``data``, ``epochs``, ``seed``,
            ``accelerator``.

    Raises:
        AssertionError: At the first check that does not hold, with the names of strategy and check and what differs.
    """
    subject = factory if isinstance(factory, Subject) else Subject(factory, **{"name": _name(factory), **options})
    case = Case(subject, every_place=every_place, pair=pair)
    for check in checks:
        case.check(check)
    for limit, (first, second) in (limits or {}).items():
        check_limit(*(replace(subject, factory=side, name=f"{subject.name} ({limit})") for side in (first, second)))


def check_limit(first: Factory | Subject, second: Factory | Subject, *, last_task: int | None = None) -> None:
    """Check that two strategies end with the same network and the same accuracies, bit by bit.

    Args:
        first: The limit case, such as a method whose weight is 0.
        second: What it must be equal to.
        last_task: Compare after this task; None for the whole stream.
    """
    sides = [side if isinstance(side, Subject) else Subject(side, name=_name(side)) for side in (first, second)]
    case, outcomes = Case(sides[0]), [run(side, last_task=last_task) for side in sides]
    networks = [{key: value for key, value in o.state.items() if key.startswith("network.")} for o in outcomes]
    what = f"against {_name(sides[1].factory)}"
    if (step := first_other_step(outcomes[1], outcomes[0])) is not None:
        what += f" (steps differ from {step} on)"
    case.same("limits", what, networks[1], networks[0])
    case.same("limits", what, outcomes[1].matrix, outcomes[0].matrix)


def small(cls: type[ContinualStrategy], **options: Any) -> Factory:
    """A strategy of the class with a net and options that take seconds; can be pickled.

    Args:
        cls: The class; its ``conformance_options`` go over the small net, optimizer and memory that are chosen here.
        options: Further arguments of the constructor.
    """
    chosen: dict[str, Any] = {
        "backbone": partial(MLP, hidden=(16,)),
        "optimizer": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    }
    if "memory_size" in signature(cls.__init__).parameters:
        chosen["memory_size"] = 30  # less than a task has, so that samples leave it
    return partial(cls, **{**chosen, **cls.conformance_options(), **options})


def places(snapshots: Iterable[SavePoint], *, every: bool = False) -> list[SavePoint]:
    """Checkpoints at which to kill a run, in order.

    Args:
        snapshots: All of them.
        every: Take all; else two in the middle of epochs and one of each further kind, spread over the tasks.
    """
    points = list(snapshots)
    if every:
        return [point for point in points if point.kind != "task" or point.task < points[-1].task]
    chosen: set[SavePoint] = set()
    tasks = sorted({point.task for point in points})
    for kind, task, which in (
        ("step", tasks[0], 0),
        ("task", tasks[0], 0),
        ("step", tasks[min(1, len(tasks) - 1)], -1),
        ("epoch", tasks[min(1, len(tasks) - 1)], 0),
        ("phase", tasks[min(1, len(tasks) - 1)], -1),
        ("step", tasks[-1], -1),
    ):
        found = [point for point in points if (point.kind, point.task) == (kind, task)]
        chosen |= {found[which]} if found else set()
    return [point for point in points if point in chosen]


# ---------------------------------------------------------------------- inside


def _not_finite(outcome: Outcome) -> str | None:
    """The first tensor of the state with an infinite value or nan, but for the nan that pad the fields of a memory."""
    assert outcome.strategy is not None
    memories = tuple(f"{name}." for name, module in outcome.strategy.named_modules() if isinstance(module, Memory))
    for key, value in outcome.state.items():
        if value.is_floating_point():
            wrong = value.isinf() if key.startswith(memories) else ~value.isfinite()
            if wrong.any():
                return key
    return None


def _kill_and_resume(case: Case, name: str, reference: Outcome, chosen: list[SavePoint], **options: Any) -> None:
    """Kill a run at one place, resume it, kill it at the next one, ...: each time all objects are new."""
    folder = case.folder(f"{name}_killed")
    before = "the start"
    for number, point in enumerate([*chosen, None]):
        outcome = run(case.subject, folder=folder, resume="last" if number else None, kill_at=point, **options)
        what = f"killed and resumed {before}" if number else "with checkpoints written"
        _same_steps(case, name, what, outcome, reference)
        for place, state in outcome.snapshots.items():
            if place not in reference.snapshots:
                case.fail(name, f"{what}, the run comes by a place that the uninterrupted one does not know: {place}")
            case.same(name, f"{what}, the state differs {place}", reference.snapshots[place], state)
        before = str(point)
    expected, actual = reference.plain(), outcome.plain()
    case.same(name, f"killed and resumed at {len(chosen)} places, at the end", expected, actual)


def _same_steps(case: Case, name: str, what: str, outcome: Outcome, reference: Outcome | None = None) -> None:
    if (step := first_other_step(reference or case.reference, outcome)) is not None:
        case.fail(name, f"{what}, steps differ from {step} on")


def _plain_twin(factory: Factory) -> Finetune:
    """Fine-tuning with the network, optimizer and visible logits of a strategy."""
    strategy = factory()
    names = ("optimizer", "scheduler", "first_optimizer", "first_scheduler", "visible", "freeze_backbone", "lr_factors")
    options = {name: getattr(strategy, name) for name in names}
    return Finetune(backbone=strategy.build_backbone, head=strategy.build_head, **options)


def _name(factory: Any) -> str:
    if not isinstance(factory, partial):
        return str(getattr(factory, "__name__", factory))
    plain = {key: value for key, value in factory.keywords.items() if isinstance(value, (str, bool, int, float))}
    return f"{_name(factory.func)}({', '.join(f'{key}={value!r}' for key, value in plain.items())})"
