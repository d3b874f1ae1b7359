"""Progress of a study in the terminal: a table of cells, or one line per cell in a pipe."""

import time
from types import TracebackType

from optuna.trial import FrozenTrial, TrialState
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cl_lightning.study.definition import Definition
from cl_lightning.study.storage import CELL, ERROR, Trials

_ROWS = 30  # of the table; finished cells leave it first
_ORDER = {TrialState.RUNNING: 0, TrialState.FAIL: 1, TrialState.WAITING: 2, TrialState.COMPLETE: 3}
_NAMES = {
    TrialState.RUNNING: "running",
    TrialState.FAIL: "failed",
    TrialState.WAITING: "waits",
    TrialState.COMPLETE: "done",
    TrialState.PRUNED: "pruned",
}


class Progress:
    """Shows the state of a study until it is closed.

    Args:
        trials: Trials of the study.
        definition: The study.
    """

    def __init__(self, trials: Trials, definition: Definition) -> None:
        self._trials, self._definition = trials, definition
        self._console = Console(stderr=True)
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._told: set[str] = set()
        self._note = ""
        self._began = time.monotonic()
        self._before: int | None = None  # runs that were finished when this command began

    def __enter__(self) -> "Progress":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def note(self, text: str) -> None:
        """Show a line below the table."""
        self._note = text
        if self._live is None:
            self._console.print(text, markup=False)

    def show(self) -> None:
        """Read the storage, and show what has changed."""
        cells, searches = self._latest(), self._searches()
        if self._live is not None:
            self._live.update(self._table(cells, searches), refresh=True)
            return
        for search, counts in searches.items():
            self._tell(f"search {search}: {counts}")
        for name, trial in cells.items():
            if trial.state is TrialState.COMPLETE:
                self._tell(f"done: {name}: {100 * (trial.value or 0):.1f} %")

    def done(self) -> int:
        """Number of finished cells."""
        return sum(trial.state is TrialState.COMPLETE for trial in self._latest().values())

    def failed(self) -> list[tuple[str, str]]:
        """Cells that have failed, with the reasons."""
        return [
            (name, str(trial.user_attrs[ERROR]))
            for name, trial in self._latest().items()
            if trial.state is TrialState.FAIL and trial.user_attrs.get(ERROR)
        ]

    def _tell(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            self._console.print(line, markup=False, highlight=False)

    def _latest(self) -> dict[str, FrozenTrial]:
        """The trial of each cell that says most about it."""
        names = [cell.name for cell in self._definition.cells]
        found: dict[str, FrozenTrial] = {}
        for trial in self._trials.of():
            name = trial.user_attrs[CELL]
            if name in names and (name not in found or found[name].state is not TrialState.COMPLETE):
                found[name] = trial
        return found

    def _searches(self) -> dict[str, str]:
        found = {}
        for stream, method in self._definition.searches():
            states = [trial.state for trial in self._trials.of(stream.name, method.name)]
            ended = sum(state in (TrialState.COMPLETE, TrialState.PRUNED) for state in states)
            retried = states.count(TrialState.FAIL)
            found[f"{stream.name}/{method.name}"] = f"{ended} of {len(states) - retried} settings"
        return found

    def _table(self, cells: dict[str, FrozenTrial], searches: dict[str, str]) -> Group:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for head in ("cell", "state", "tasks", "accuracy (%)"):
            table.add_column(head, justify="right" if head[0] in "ta" else "left")
        rows = sorted(cells.items(), key=lambda item: _ORDER.get(item[1].state, 9))
        for name, trial in rows[:_ROWS]:
            steps = trial.intermediate_values
            accuracy = f"{100 * steps[max(steps)]:.1f}" if steps else ""
            table.add_row(Text(name), _NAMES[trial.state], str(len(steps) or ""), accuracy)
        lines = [Text(f"search {name}: {text}") for name, text in searches.items()]
        return Group(*lines, table, Text(self._summary(cells)), Text(self._note))

    def _summary(self, cells: dict[str, FrozenTrial]) -> str:
        done = sum(trial.state is TrialState.COMPLETE for trial in cells.values())
        if self._before is None:
            self._before = done
        text = f"{done} of {len(cells)} cells are done"
        if (new := done - self._before) > 0:
            left = (time.monotonic() - self._began) / new * (len(cells) - done)
            text += f", about {left / 60:.0f} min left" if left > 90 else f", about {left:.0f} s left"
        return text
