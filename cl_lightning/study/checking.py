"""Checks of a study before anything runs: every stream, method and value of a search is tried without training."""

from collections.abc import Iterable

import torch

from cl_lightning.study.definition import Definition, DefinitionError, Part
from cl_lightning.study.program import Description, Program
from cl_lightning.study.selection import search_arguments


def check(definition: Definition, program: Program) -> None:
    """Describe each stream with the first method, and each method with the first stream.

    Data sets are read here, once for all runs of the processes that are forked later.

    Raises:
        DefinitionError: For the first part that cannot be run, for equal cells, for options of a search that the method
            does not have, and for streams that a search must not use.
    """
    first = definition.methods[0]
    streams = check_streams(definition, program)
    methods = {first.name: streams[definition.data[0].name]}
    for method in definition.methods[1:]:
        methods[method.name] = _describe(definition, program, definition.data[0], method)
    for what, parts, found in (("data", definition.data, streams), ("methods", definition.methods, methods)):
        seen: dict[str, str] = {}
        for part in parts:
            other = seen.setdefault(found[part.name].config, part.name)
            if other != part.name:
                raise DefinitionError(f"{what}: {other} and {part.name} have the same configuration; remove one")
    _check_searches(definition, program, streams)


def check_streams(definition: Definition, program: Program) -> dict[str, Description]:
    """Describe each stream with the first method, which reads its data."""
    torch.set_num_threads(1)  # a pool of threads would not survive a fork; each run sets its own number
    first = definition.methods[0]
    return {data.name: _describe(definition, program, data, first) for data in definition.data}


def _describe(definition: Definition, program: Program, data: Part, method: Part) -> Description:
    try:
        return program.describe(definition.arguments(data, method, definition.seeds[0]))
    except ValueError as error:
        raise DefinitionError(f"{method.name} on {data.name}: {error}") from None


def _check_searches(definition: Definition, program: Program, streams: dict[str, Description]) -> None:
    select = definition.select
    if select is None:
        return
    for data, method in definition.searches():
        found = None
        for values in zip(*(_ends(space.extremes) for space in definition.spaces[method.name]), strict=True):
            setting = {space.key: value for space, value in zip(definition.spaces[method.name], values, strict=True)}
            arguments = search_arguments(definition, data, method, select.seeds[0], setting)
            try:
                found = program.describe(arguments)
            except ValueError as error:
                raise DefinitionError(f"spaces.{method.name}, on {data.name}: {error}") from None
        assert found is not None
        tasks = select.tasks or found.tasks
        if tasks > found.tasks:
            raise DefinitionError(f"select: tasks is {tasks}; {data.name} has {found.tasks}")
        if not all(found.validation[:tasks]):
            raise DefinitionError(
                f"select: {data.name} has tasks without validation samples; give a larger val_fraction"
            )
        if select.protocol == "two_phase":
            check_disjoint(data.name, found.classes, {name: each.classes for name, each in streams.items()})
        elif tasks == found.tasks:
            raise DefinitionError(
                f"select: tasks is {tasks}, all of {data.name}; give fewer, since a search must not see all"
            )


def _ends(values: tuple[object, ...]) -> tuple[object, object]:
    return values[0], values[-1]


def check_disjoint(stream: str, classes: Iterable[str], others: dict[str, tuple[str, ...]]) -> None:
    """Check that no other stream has a class of the stream of the first phase.

    Raises:
        DefinitionError: If one has.
    """
    known = set(classes)
    for name, theirs in others.items():
        if common := [each for each in theirs if each in known]:
            listed = ", ".join(map(repr, common[:3])) + (", ..." if len(common) > 3 else "")
            raise DefinitionError(
                f"select: {stream} and {name} share the classes {listed}; choose on a stream whose classes the "
                "others do not have"
            )
