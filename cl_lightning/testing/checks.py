"""Checks that every strategy must pass."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from cl_lightning.memory import Memory
from cl_lightning.models import MLP, ConvPixels
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategy import ContinualStrategy
from cl_lightning.testing.bench import Factory, Outcome, SavePoint, Subject, places, run
from cl_lightning.testing.compare import difference, first_other_step, trial
from cl_lightning.testing.pair import Pair, scratch_folder
from cl_lightning.testing.task_free import check_task_free

RTOL, ATOL = 1e-4, 1e-5
"""Tolerances between two processes and one process, in float32. Each process sums its half of a batch and the halves
are averaged, which rounds in another order (about 1e-7 of a gradient); some tens of steps with momentum amplify it."""
_OVERHEAD = 64  # bytes of counters in a state that are nobody's memory


class Case:
    """A strategy under test, with the runs that several checks share.

    Args:
        subject: What is tested.
        every_place: Kill and resume the run at every checkpoint, not at some of each kind.
        pair: Two processes that run this strategy among others; None to start them for it alone.
    """

    def __init__(self, subject: Subject, *, every_place: bool = False, pair: Pair | None = None) -> None:
        self.subject, self.every_place, self.pair = subject, every_place, pair
        self._folder = scratch_folder(self)

    @cached_property
    def reference(self) -> Outcome:
        """The uninterrupted run."""
        return run(self.subject)

    @cached_property
    def again(self) -> tuple[Outcome, Path]:
        """The same run once more, with checkpoints, and its folder; the resumed run, where there is one that passed."""
        folder = self.folder("again")
        return run(self.subject, folder=folder), folder

    def folder(self, name: str) -> Path:
        return self._folder / name

    def fail(self, check: str, message: str) -> None:
        raise AssertionError(f"{self.subject.name}: {check}: {message}")

    def same(self, check: str, what: str, expected: Any, actual: Any, *, rtol: float = 0.0, atol: float = 0.0) -> None:
        """Fail at the first tensor or value that differs."""
        if (found := difference(expected, actual, rtol=rtol, atol=atol)) is not None:
            self.fail(check, f"{what}: {found}")

    def check(self, name: str) -> None:
        """Run one check.

        Raises:
            AssertionError: If the check fails; the message names strategy, check and difference.
        """
        if name not in CHECKS:
            raise ValueError(f"check {name!r} is unknown; there are {', '.join(CHECKS)}")
        try:
            CHECKS[name](self)
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(f"{self.subject.name}: {name}: {type(error).__name__}: {error}") from error


def check_trains(case: Case) -> None:
    """After a stream of three tasks the head has a column per class, and all state is finite."""
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
    needs_tasks = strategy.traits.task_ids == "needed"
    for kind in ("R_ci", "R_ti") if outcome.target_kind == "class" else ("R_ci",):
        filled = ~outcome.matrix[kind].isnan()
        if kind == "R_ci" and needs_tasks:
            if filled.any():
                case.fail(name, "the class-incremental matrix is filled, although predictions need the task")
        elif filled.shape != expected.shape or not filled.equal(expected):
            case.fail(name, f"the accuracy matrix {kind} is filled at {filled.int().tolist()}, not below the diagonal")
    strategy.eval()
    images = _images(strategy)
    with torch.no_grad():
        scores, alone = _predict(strategy, images), _predict(strategy, images[:1])
    if scores.shape[:2] != (5, columns) or scores.isnan().any():
        case.fail(name, f"predict gives {tuple(scores.shape)} scores, or nan, for 5 images and {columns} classes")
    if not strategy.traits.transductive:
        case.same(name, "predict of an image alone and among others", scores[:1], alone, rtol=RTOL, atol=ATOL)


def check_task_ids(case: Case) -> None:
    """Predictions depend on the task of an image as ``traits.task_ids`` states."""
    name, strategy = "task_ids", case.reference.strategy
    assert strategy is not None
    stated, images = strategy.traits.task_ids, _images(strategy)
    takes_tasks = "tasks" in signature(strategy.predict).parameters
    if stated == "unused" and not takes_tasks:
        return
    if not takes_tasks:
        case.fail(name, f"task_ids is {stated!r}, but predict takes no tasks; write predict(self, images, tasks=None)")
    strategy.eval()
    ends = (torch.full((len(images),), task, device=strategy.device) for task in (0, len(strategy.task_columns) - 1))
    with torch.no_grad():
        first, last = (strategy.predict(images, tasks) for tasks in ends)
        try:
            without: torch.Tensor | None = strategy.predict(images)
        except ValueError:
            without = None
    if stated == "unused":
        if without is None or not (torch.equal(first, without) and torch.equal(last, without)):
            case.fail(name, "task_ids is 'unused', but scores depend on the task; state 'inferred' or 'needed'")
        return
    if torch.equal(first, last):
        case.fail(name, f"task_ids is {stated!r}, but scores are the same for every task; state 'unused'")
    if (without is None) != (stated == "needed"):
        what = "raises a ValueError" if without is None else "gives scores"
        other = "needed" if without is None else "inferred"
        case.fail(name, f"task_ids is {stated!r}, but predict without tasks {what}; state {other!r}")


def check_seed(case: Case) -> None:
    """The same seed gives the same weights bit by bit, wherever the global generators stood before."""
    outcome, _ = case.again
    _same_steps(case, "seed", "the same seed again", outcome)
    case.same("seed", "the same seed again", case.reference.plain(), outcome.plain())


def check_resume(case: Case) -> None:
    """A run that is killed right after a checkpoint, and resumed in new objects, ends where an unbroken one ends."""
    try:
        chosen = places(case.reference.snapshots, every=case.every_place)
        last = _kill_and_resume(case, "resume", case.reference, chosen)
    except AssertionError:
        check_seed(case)  # is it the second run that differs, not the resumed one?
        raise
    vars(case).setdefault("again", last)  # each part of it was equal to the reference, from another global seed on


def check_restores(case: Case) -> None:
    """A checkpoint holds tensors and plain values only, and a new strategy takes its shapes from it."""
    name, (outcome, folder) = "restores", case.again
    assert outcome.strategy is not None
    saved = torch.load(folder / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)
    fresh = case.subject.factory()
    fresh.on_load_checkpoint(saved)
    fresh.load_state_dict(saved["state_dict"])
    state = {key: value.detach() for key, value in fresh.state_dict().items()}
    case.same(name, "a new strategy with the checkpoint's state", outcome.state, state)
    assert fresh.image_shape is not None
    images = trial(fresh, 1)
    with torch.no_grad():
        scores = [_predict(strategy.cpu().eval(), images) for strategy in (outcome.strategy, fresh)]
    case.same(name, "predictions of a new strategy with the checkpoint's state", *scores)


def check_options(case: Case) -> None:
    """A run with ``bf16-mixed``, gradient accumulation and clipping stays finite, and can be killed and resumed."""
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
    """With ``first_task_is_finetuning`` the first task gives the network of fine-tuning, bit by bit."""
    if not case.subject.first_task_is_finetuning or case.subject.callbacks():
        return
    plain = run(replace(case.subject, factory=partial(_plain_twin, case.subject.factory)), last_task=0)
    try:
        _same_networks(
            case, "against fine-tuning on the first task", _after_first_task(plain), _after_first_task(case.reference)
        )
    except AssertionError as error:
        raise AssertionError(
            f"{error}; a method whose first task is another says first_task_is_finetuning=False, "
            "as an argument of check_strategy or in its Subject"
        ) from None


def check_data(case: Case) -> None:
    """No step has labels of later tasks, and each sample is read only in tasks and stages in which it is allowed."""
    name, outcome = "data", case.reference
    strategy, stream = outcome.strategy, outcome.stream
    assert strategy is not None
    assert stream is not None
    columns = [torch.tensor(task.columns) for task in stream.tasks]
    for step in outcome.steps if outcome.target_kind == "class" else ():  # others may have classes that are hidden
        known = step.labels >= 0
        if (step.labels >= stream.tasks[step.task].num_seen).any() or (step.tasks > step.task).any():
            case.fail(name, f"a class or task of the future at {step}: labels {sorted(set(step.labels.tolist()))}")
        for task in set(step.tasks[known].tolist()):
            if not torch.isin(step.labels[known & (step.tasks == task)], columns[task]).all():
                case.fail(name, f"labels that are not columns of task {task} at {step}")
    uses_test_data = any(getattr(callback, "test_data_use", None) is not None for callback in case.subject.callbacks())
    for touch in outcome.touches:
        stage, task = touch.stage, touch.task
        if not touch.train:
            allowed = stream.test[: task + 1] if stage == "evaluate" or uses_test_data else ()
        elif stage == "validate":
            allowed = stream.val[: task + 1]
        elif stage == "train":
            allowed = (
                *(stream.train[: task + 1] if strategy.traits.needs_all_data else stream.train[task : task + 1]),
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
    """``bytes_kept`` counts the memory kept from task to task, and has exemplars if and only if a trait says so."""
    name, outcome = "bytes", case.reference
    assert outcome.strategy is not None
    kept = outcome.kept
    exemplars, declared = kept.get("exemplars", 0), outcome.strategy.traits.keeps_exemplars
    if declared != (exemplars > 0):
        case.fail(name, f"keeps_exemplars is {declared}, but bytes_kept counts {exemplars} bytes of exemplars")
    extra = {
        key: value.nbytes
        for key, value in outcome.state.items()
        if not key.startswith("network.") and key != "task_columns"
    }
    if sum(extra.values()) > sum(kept.values()) + _OVERHEAD:
        largest = max(extra, key=lambda key: extra[key])
        found = f"{sum(extra.values())} bytes besides the network, {extra[largest]} of them in {largest}"
        case.fail(name, f"the state holds {found}; bytes_kept counts {kept}")


def check_processes(case: Case) -> None:
    """Two processes give the result of one process with the same global batch, and can be killed and resumed too.

    The options that are checked avoid three parts for which this cannot hold: batch normalisation computes statistics
    per process (unless synchronised), dropout draws per process, and optimizers that divide by the magnitude of the
    gradient (Adam) amplify the rounding error of a gradient that should be 0 to a full step.
    """
    name, subject = "processes", replace(case.subject, accelerator="cpu")
    first = case.reference if subject == case.subject else run(subject)
    case.pair = case.pair or Pair()
    middle = [point for point in places(first.snapshots) if point.kind in ("step", "phase")][-2:]
    report = case.pair.report(subject, middle)
    ranks, resumed = report["whole"], report["resumed"]
    case.same(name, "the second process and the first", ranks[0], ranks[1])
    case.same(name, "two processes, killed and resumed, against two that were not", ranks[0], resumed[0])
    case.same(name, "of two killed and resumed processes, the second and the first", resumed[0], resumed[1])
    if not subject.matches_single_process:
        return
    try:
        _two_against_one(case, name, first.plain(), ranks[0])
    except AssertionError as error:
        raise AssertionError(
            f"{error}; a method whose processes compute something else says matches_single_process=False, "
            "as an argument of check_strategy or in its Subject"
        ) from None


def _two_against_one(case: Case, name: str, alone: dict[str, Any], both: dict[str, Any]) -> None:
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
    "task_ids": check_task_ids,
    "task_free": check_task_free,
    "resume": check_resume,
    "seed": check_seed,
    "restores": check_restores,
    "options": check_options,
    "limits": check_limits,
    "data": check_data,
    "bytes": check_bytes,
    "processes": check_processes,
}
"""The checks by name."""


def check_strategy(
    factory: Factory | Subject,
    *,
    checks: Iterable[str] = tuple(CHECKS),
    limits: Mapping[str, tuple[Factory, Factory]] | None = None,
    every_place: bool = False,
    pair: Pair | None = None,
    first_task_is_finetuning: bool = True,
    matches_single_process: bool = True,
    **options: Any,
) -> None:
    """Run the checks on a strategy; this call is a complete test of a new method.

    Args:
        factory: Returns a new strategy at each call; or a ``Subject``. For the check of two processes it is pickled, so
            it must be a class, a function of a module, or a ``functools.partial`` of one.
        checks: Names in ``CHECKS`` of the checks to run.
        limits: Pairs of strategies that must end with the same network, bit by bit, by a name for the limit case.
        every_place: Whether to kill and resume the run at every checkpoint, instead of some of each kind.
        pair: Two processes that run several strategies, this one among them.
        first_task_is_finetuning: False for a method whose first task is not plain fine-tuning, bit by bit.
        matches_single_process: False for a method that gives another result on two processes than on one with the same
            global batch, beyond rounding.
        options: Further fields of :class:`Subject`: ``name``, ``callbacks``, ``data``, ``epochs``, ``seed``,
            ``accelerator``.

    Raises:
        AssertionError: At the first check that fails; the message names strategy, check and difference.
    """
    facts: dict[str, Any] = {
        "first_task_is_finetuning": first_task_is_finetuning,
        "matches_single_process": matches_single_process,
    }
    if isinstance(factory, Subject):
        subject = replace(factory, **options, **{key: getattr(factory, key) and holds for key, holds in facts.items()})
    else:
        subject = Subject(factory, **{"name": _name(factory), **facts, **options})
    case = Case(subject, every_place=every_place, pair=pair)
    for check in checks:
        case.check(check)
    for limit, (first, second) in (limits or {}).items():
        check_limit(*(replace(subject, factory=side, name=f"{subject.name} ({limit})") for side in (first, second)))


def check_limit(first: Factory | Subject, second: Factory | Subject, *, last_task: int | None = None) -> None:
    """Check that two strategies end with the same network and the same accuracies, bit by bit.

    Args:
        first: The limit case, such as a method whose weight is 0.
        second: The strategy that it must equal.
        last_task: Compare after this task; None for the whole stream.
    """
    sides = [side if isinstance(side, Subject) else Subject(side, name=_name(side)) for side in (first, second)]
    mine, other = (run(side, last_task=last_task) for side in sides)
    _same_networks(Case(sides[0]), f"against {_name(sides[1].factory)}", other, mine)


def small(cls: type[ContinualStrategy], **options: Any) -> Factory:
    """A factory of strategies with a small network and options for runs of seconds; it can be pickled.

    Args:
        cls: Class of the strategy.
        options: Further arguments of the constructor; they override the network, optimizer and memory size set here.
    """
    chosen: dict[str, Any] = {
        "backbone": partial(MLP, hidden=(16,)),
        "optimizer": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    }
    if cls.traits.targets == ("pixels",):
        chosen["backbone"] = partial(ConvPixels, channels=(6, 8), norm="group")
    if any(
        "memory_size" in signature(vars(base)["__init__"]).parameters
        for base in cls.__mro__
        if "__init__" in vars(base)
    ):
        chosen["memory_size"] = 30  # less than a task has, so that samples leave it
    return partial(cls, **{**chosen, **options})


def _not_finite(outcome: Outcome) -> str | None:
    """Name of the first tensor with an infinite value or NaN; NaN is allowed as padding in the fields of a memory."""
    assert outcome.strategy is not None
    memories = tuple(f"{name}." for name, module in outcome.strategy.named_modules() if isinstance(module, Memory))
    for key, value in outcome.state.items():
        if value.is_floating_point():
            wrong = value.isinf() if key.startswith(memories) else ~value.isfinite()
            if wrong.any():
                return key
    return None


def _predict(strategy: ContinualStrategy, images: torch.Tensor) -> torch.Tensor:
    """Scores of images, as images of the first task where the strategy needs the task."""
    if strategy.traits.task_ids != "needed":
        return strategy.predict(images)
    return strategy.predict(images, torch.zeros(len(images), dtype=torch.int64, device=images.device))


def _images(strategy: ContinualStrategy) -> torch.Tensor:
    """Five images of different brightness, ``(5, C, H, W)``, or other samples, on the device."""
    shape = strategy.image_shape or ()
    if len(shape) != 3:
        return trial(strategy, 0).to(strategy.device)
    images = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, *shape)
    return (images * torch.rand(images.shape, generator=torch.Generator().manual_seed(0))).to(strategy.device)


def _after_first_task(outcome: Outcome) -> Outcome:
    """What a run had left when it had evaluated its first task."""
    state = next(state for place, state in outcome.snapshots.items() if (place.task, place.kind) == (0, "task"))
    matrix = {key: outcome.matrix[key][:1, :1] for key in ("R_ci", "R_ti", "R_prefix")}
    return replace(outcome, state=state, matrix=matrix, steps=[step for step in outcome.steps if step.task == 0])


def _same_networks(case: Case, what: str, expected: Outcome, actual: Outcome) -> None:
    """The same network and the same accuracies, bit by bit."""
    networks = [{k: v for k, v in side.state.items() if k.startswith("network.")} for side in (expected, actual)]
    if (step := first_other_step(expected, actual)) is not None:
        what += f" (steps differ from {step} on)"
    case.same("limits", what, *networks)
    case.same("limits", what, expected.matrix, actual.matrix)


def _kill_and_resume(
    case: Case, name: str, reference: Outcome, chosen: list[SavePoint], **options: Any
) -> tuple[Outcome, Path]:
    """Kill a run at one place, resume it, kill it at the next one, ...: each time all objects are new.

    Returns:
        What the last run left, and the folder of all of them.
    """
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
    return outcome, folder


def _same_steps(case: Case, name: str, what: str, outcome: Outcome, reference: Outcome | None = None) -> None:
    if (step := first_other_step(reference or case.reference, outcome)) is not None:
        case.fail(name, f"{what}, steps differ from {step} on")


def _plain_twin(factory: Factory) -> Finetune:
    """Fine-tuning with the network, optimizer and ``loss_classes`` of a strategy."""
    strategy = factory()
    usual, first = strategy._options, strategy._first_options
    return Finetune(
        backbone=strategy.build_backbone,
        head=strategy.build_head,
        optimizer=usual.optimizer,
        scheduler=usual.scheduler,
        first_optimizer=first.optimizer,
        first_scheduler=first.scheduler,
        loss_classes=strategy.loss_classes,
        freeze_backbone=strategy.freeze_backbone,
        lr_factors=strategy._lr_factors,
    )


def _name(factory: Any) -> str:
    if not isinstance(factory, partial):
        return str(getattr(factory, "__name__", factory))
    plain = {key: value for key, value in factory.keywords.items() if isinstance(value, (str, bool, int, float))}
    return f"{_name(factory.func)}({', '.join(f'{key}={value!r}' for key, value in plain.items())})"
