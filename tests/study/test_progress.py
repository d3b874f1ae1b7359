"""The table of cells in the terminal, and the lines in a pipe."""

import pytest
from rich.console import Console
from support.studies import write

from cl_lightning.study import storage
from cl_lightning.study.progress import Progress

pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed to be used with Study.optimize")


def test_the_table_shows_the_state_and_the_accuracy_so_far(tmp_path, capsys):
    made = write(tmp_path, spaces={"er": {"model.level": [0.3, 0.6]}}, select={"data": "a", "trials": 3})
    trials = storage.Trials(storage.connect(storage.url_of(tmp_path), 20), made.name)
    storage.begin(trials, made, tmp_path)
    cells = trials.study()
    first, second, third = (cells.ask() for _ in range(3))
    cells.tell(first, 0.25)
    second.report(0.9, 0)
    second.report(0.75, 1)
    third.set_user_attr("error", "the loss is nan")
    cells.tell(third, state=storage.TrialState.FAIL)
    progress = Progress(trials, made)
    progress.note("stopping")
    progress.show()  # lines, since this is no terminal
    progress.show()
    said = capsys.readouterr().err
    assert said.count("done: b/finetune/seed_0: 25.0 %\n") == 1
    assert said.count("search a/er: 0 of 3 settings\n") == 1
    assert progress.done() == 1
    assert progress.failed() == [("b/finetune/seed_1", "the loss is nan")]

    console = Console(width=100)
    with console.capture() as shown:
        console.print(progress._table(progress._latest(), progress._searches()))
    rows = [line.split() for line in shown.get().splitlines() if line.strip().startswith("b/")]
    assert rows == [
        ["b/er/seed_0", "running", "2", "75.0"],
        ["b/finetune/seed_1", "failed"],
        ["b/er/seed_1", "waits"],
        ["b/finetune/seed_0", "done"],
    ]
    assert "1 of 4 cells are done" in shown.get()
