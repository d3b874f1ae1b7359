"""The storage of a study: Optuna studies whose trials are its cells and the settings of its searches.

The trials of the study ``NAME/cells`` are the cells; each names its cell in a user attribute. The trials of a study
``NAME/STREAM/METHOD`` are the settings of a search. All trials are enqueued before the first one begins, so that their
number does not depend on the number of workers.
"""

import json
import logging
import warnings
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState

from cl_lightning.study.definition import Definition, DefinitionError, Space, parse

DEFINITION = "definition"
"""User attribute of ``NAME/cells``: the study as JSON."""
FOLDER = "folder"
"""User attribute of ``NAME/cells``: the folder of its runs."""
PLANNED, CELL, HALF, SETTING, ERROR = "planned", "cell", "half", "setting", "error"
"""User attributes of a trial: that it was enqueued, its cell, its half of ``plasticity_first``, its options, and why it
failed."""
FROZEN = "frozen"
"""User attribute of the study of a search: hash of its choice."""
_SQLITE = "storage.sqlite3"
_MISSED = 3  # heartbeats that a worker misses before it counts as dead
_RETRIES = 20


def quiet_optuna() -> None:
    """Silence the messages of Optuna: the command shows the state of each trial itself."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.WARNING)


def url_of(folder: Path) -> str:
    """URL of the storage in the folder of a study."""
    return f"sqlite:///{folder / _SQLITE}"


def connect(url: str, heartbeat: int, *, checked: bool = False) -> RDBStorage:
    """Open a storage; trials of workers that have died are retried.

    Args:
        url: URL of a database, as SQLAlchemy writes it.
        heartbeat: Seconds between two signs of life of a worker.
        checked: Whether this process, or the one that forked it, has opened the storage before: its tables are there.

    Raises:
        DefinitionError: If it cannot be reached.
    """
    options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    shown = without_password(url)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return RDBStorage(
                url,
                engine_kwargs=options,
                skip_compatibility_check=checked,
                skip_table_creation=checked,
                heartbeat_interval=heartbeat,
                grace_period=_MISSED * heartbeat,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=_RETRIES),
            )
    except ImportError as error:
        raise DefinitionError(
            f"storage {shown}: its driver is not installed ({error.__cause__ or error}); for PostgreSQL: pip install "
            "'psycopg[binary]' and postgresql+psycopg://..."
        ) from None
    except Exception as error:  # of SQLAlchemy and of the driver of each database
        reason = str(getattr(error, "orig", None) or error).strip().splitlines() or [type(error).__name__]
        raise DefinitionError(f"storage {shown}: cannot be reached ({' '.join(reason)})") from None


def without_password(url: str) -> str:
    """The URL without a password."""
    start, mark, rest = url.partition("://")
    login, at, host = rest.rpartition("@")
    return f"{start}{mark}{login.partition(':')[0]}{at}{host}" if at else url


class Trials:
    """The Optuna studies of a study.

    Args:
        storage: The storage.
        name: Name of the study.
    """

    def __init__(self, storage: RDBStorage, name: str) -> None:
        self.storage, self.name = storage, name
        self._studies: dict[str, optuna.Study] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.again = RetryHeartbeatStaleTrialCallback()

    def study(self, *place: str) -> optuna.Study:
        """The Optuna study ``NAME/cells``, or that of a search by stream and method; created if it does not exist."""
        name = "/".join((self.name, *(place or ("cells",))))
        if name not in self._studies:
            self._studies[name] = optuna.create_study(
                study_name=name, storage=self.storage, direction="maximize", load_if_exists=True
            )
        return self._studies[name]

    def of(self, *place: str, states: Iterable[TrialState] | None = None) -> list[FrozenTrial]:
        """Enqueued trials of a study, also those of other workers, by number."""
        wanted = None if states is None else tuple(states)
        found = self.study(*place).get_trials(deepcopy=False, states=wanted)
        return [trial for trial in found if PLANNED in trial.user_attrs]

    def open_in(self, *place: str) -> tuple[int, int]:
        """Numbers of trials that wait and that run, after those of dead workers were put back."""
        study = self.study(*place)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(study)
        found = self.of(*place, states=(TrialState.WAITING, TrialState.RUNNING))
        waiting = sum(trial.state is TrialState.WAITING for trial in found)
        return waiting, len(found) - waiting


def begin(trials: Trials, definition: Definition, folder: Path) -> None:
    """Write a study into its storage: enqueue the cells and settings that it does not have yet.

    Raises:
        DefinitionError: If the storage has a study of this name with other options.
    """
    cells = trials.study()
    earlier = cells.user_attrs.get(DEFINITION)
    if earlier is not None:
        _check_same(parse(json.loads(earlier), trials.name), definition)
    if (before := cells.user_attrs.get(FOLDER, str(folder))) != str(folder):
        raise DefinitionError(f"the storage has a study {trials.name!r} of the folder {before}; give another name")
    cells.set_user_attr(DEFINITION, json.dumps(definition.to_dict()))
    cells.set_user_attr(FOLDER, str(folder))
    done = (TrialState.COMPLETE, TrialState.WAITING, TrialState.RUNNING)
    there = {trial.user_attrs.get(CELL) for trial in trials.of(states=done)}
    for cell in definition.cells:
        if cell.name not in there:
            attributes = {
                PLANNED: True,
                CELL: cell.name,
                "data": cell.data.name,
                "method": cell.method.name,
                "seed": cell.seed,
            }
            cells.enqueue_trial({}, user_attrs=attributes)
    for stream, method in definition.searches():
        _enqueue_settings(trials, definition, stream.name, method.name)


def _enqueue_settings(trials: Trials, definition: Definition, stream: str, method: str) -> None:
    select = definition.select
    assert select is not None
    study, spaces = trials.study(stream, method), definition.spaces[method]
    if FROZEN in study.user_attrs:
        return
    if known := trials.of(stream, method):  # those that failed are tried again
        retried = {number for trial in known for number in trial.system_attrs.get("retry_history", ())}
        for trial in known:
            if trial.state is TrialState.FAIL and trial.number not in retried:
                trials.again(study, trial)
        return
    if select.trials is not None:
        settings: list[dict[str, Any]] = [{} for _ in range(select.trials)]
    else:
        settings = list(grid(spaces))
    second: list[dict[str, Any]] = []
    if select.sampler == "plasticity_first":
        settings, second = plasticity_settings(spaces, select.stability.get(method))
    for half, members in enumerate((settings, second)):
        for setting in members:
            study.enqueue_trial(setting, user_attrs={PLANNED: True, HALF: half})


def grid(spaces: Iterable[Space]) -> Iterable[dict[str, Any]]:
    """All combinations of the values."""
    listed = tuple(spaces)
    for values in product(*(space.values for space in listed)):
        yield {space.key: value for space, value in zip(listed, values, strict=True)}


def plasticity_settings(
    spaces: Iterable[Space], stability: str | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The settings of the two halves of ``plasticity_first``.

    In the first half the stability has its smallest value. In the second it has each of its other values, largest
    first, and the other options have the values that the first half chose.
    """
    listed = tuple(spaces)
    weights = sorted((value for space in listed if space.key == stability for value in space.values), reverse=True)  # type: ignore[type-var]
    lowest = {str(stability): weights[-1]} if weights else {}
    first = [setting | lowest for setting in grid(space for space in listed if space.key != stability)]
    return first, [{str(stability): weight} for weight in weights[:-1]]


def _check_same(earlier: Definition, now: Definition) -> None:
    """Refuse changes of a study that has begun, apart from further streams, methods and seeds."""
    for key in ("options", "select"):
        if _plain(earlier, key) != _plain(now, key):
            raise DefinitionError(
                f"study {now.name!r} has begun with other {key}; give the study another name, or another --output"
            )
    for what, before, after in (("data", earlier.data, now.data), ("methods", earlier.methods, now.methods)):
        known = {part.name: part for part in before}
        for part in after:
            if part.name in known and known[part.name].to_dict() != part.to_dict():
                raise DefinitionError(
                    f"study {now.name!r} has begun with another config or other options of {part.name} in {what}; give "
                    "it another name"
                )
    for name, spaces in now.spaces.items():
        if name in earlier.spaces and earlier.spaces[name] != spaces:
            raise DefinitionError(
                f"study {now.name!r} has begun with other spaces of {name}; give the method another name"
            )


def _plain(definition: Definition, key: str) -> Any:
    return definition.to_dict()[key]


def joined(url: str, heartbeat: int, name: str | None = None) -> tuple[Trials, Definition, Path]:
    """The study in a storage.

    Args:
        url: URL of the storage.
        heartbeat: Seconds between two signs of life of a worker.
        name: Name of the study; None for the only one.

    Raises:
        DefinitionError: If the storage cannot be reached, or has no such study, or several.
    """
    storage = connect(url, heartbeat)
    found = {
        study.study_name.removesuffix("/cells"): study.user_attrs
        for study in optuna.get_all_study_summaries(storage=storage)
        if study.study_name.endswith("/cells") and DEFINITION in study.user_attrs
    }
    if name is None and len(found) == 1:
        (name,) = found
    if name is None or name not in found:
        listed = (
            f"; give --name with one of {', '.join(sorted(found))}" if found else "; start one with: study FILE.yaml"
        )
        raise DefinitionError(
            f"storage {without_password(url)} has no study{f' {name!r}' if name else ' alone'}{listed}"
        )
    attributes: Mapping[str, Any] = found[name]
    definition = parse(json.loads(attributes[DEFINITION]), name)
    return Trials(storage, name), definition, Path(attributes[FOLDER])
