"""What a strategy that can forget states, and how it starts again.

A request of the stream (``cl_lightning.stream.Requests``) is a task whose ``request`` is ``forget`` or ``keep``; a task
that is held is learnt as others are, and may be asked for later. The task loop calls the same hooks for every task:

    begin_task(task)    drop what belongs to the forgotten samples; the head does not grow
    phases(task)        the fits by which the request is served; an empty list where none is needed
    end_task(task)      as after every task

The training loader serves the samples of the request, or, to strategies that train on all data (``needs_all_data``),
the samples of all tasks so far without everything that was asked to be forgotten, this request included.
``strategy.passes`` iterates over the samples of the request. ``stream.forgotten(t)`` and ``stream.emptied(t)`` have the
samples and the whole tasks that are forgotten.
"""

from typing import ClassVar, Literal

from cl_lightning.strategies.base.strategy import ContinualStrategy
from cl_lightning.stream import Stream

Unit = Literal["samples", "tasks"]


class Unlearns:
    """Mixin of strategies that can forget; a stream with requests is refused by all others before training.

    Attributes:
        forgets: Smallest unit that the strategy can forget: ``samples``, and then classes and tasks too, or whole
            ``tasks``.
        forgets_held: Whether the strategy can only forget tasks that are held and were not asked to be kept.
        is_exact: Whether, after a request, nothing that the strategy holds depends on the forgotten samples.
    """

    forgets: ClassVar[Unit] = "samples"
    forgets_held: ClassVar[bool] = False
    is_exact: ClassVar[bool] = False


def start_again(strategy: ContinualStrategy) -> None:
    """Replace the network of a strategy by a new one with as many columns; its weights are drawn by seed and task."""
    assert strategy.image_shape is not None
    sizes = strategy.network.head.block_sizes()
    strategy.build(strategy.image_shape)
    for size in sizes:
        strategy.network.head.grow(size)


def request_problem(strategy: ContinualStrategy, stream: Stream) -> str | None:
    """Why a strategy cannot serve the requests of a stream, in one line; None if it can."""
    name, kept = type(strategy).__name__, set[int]()
    for task in stream.tasks:
        where = f"task {task.index} ({task.name})"
        if task.request == "learn":
            continue
        if not isinstance(strategy, Unlearns):
            return (
                f"{name} cannot forget, and {where} asks to {task.request} samples; use a strategy that unlearns, such "
                "as Retrain, or a scenario without requests"
            )
        if task.request == "keep":
            kept |= set(stream.train[task.index].tolist())
        if task.request != "forget":
            continue
        asked, emptied = set(stream.train[task.index].tolist()), stream.emptied(task.index)
        if strategy.forgets == "tasks" and asked - {i for t in emptied for i in stream.train[t].tolist()}:
            return f"{name} forgets whole tasks, and {where} asks for a part of a task; ask for tasks"
        if strategy.forgets_held and (free := [t for t in emptied if stream.tasks[t].request != "hold"]):
            return f"{name} forgets tasks that are held, and {where} asks for task {free[0]}; add it to held"
        if strategy.forgets_held and asked & kept:
            return f"{name} forgets tasks that are held, and {where} asks for samples that were kept before"
    return None
