"""A worker: takes the trials of a study one by one, and carries each out as runs in forked processes."""

import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from cl_lightning.files import read_text
from cl_lightning.measures import headline_accuracy
from cl_lightning.report.fields import FILE, UnusableRunError
from cl_lightning.report.runs import Run, read
from cl_lightning.study import selection
from cl_lightning.study.definition import Cell, Definition, DefinitionError
from cl_lightning.study.program import Program
from cl_lightning.study.storage import CELL, ERROR, HALF, PLANNED, SETTING, Trials, connect, quiet_optuna
from cl_lightning.study.warm import Order, WarmProcess

_LOOK = 0.2  # seconds between two looks at the results of a run
_WAIT = 1.0  # seconds between two looks at the trials of other workers


class RunFailedError(Exception):
    """A run that ended with an error."""


class PutBackError(Exception):
    """A trial that is put back into the queue: the worker was stopped, or other trials come first."""


class SurplusError(Exception):
    """A trial that nobody has enqueued: another worker took the last one."""


@dataclass(frozen=True)
class Place:
    """Where a worker works.

    Attributes:
        folder: Folder of the study.
        url: URL of its storage.
        heartbeat: Seconds between two signs of life.
        cores: Cores of this worker; empty for all.
        gpu: Index of its GPU; None for all, or without one.
    """

    folder: Path
    url: str
    heartbeat: int
    cores: tuple[int, ...] = ()
    gpu: int | None = None

    def pin(self) -> None:
        """Restrict this process, and those that it forks, to its cores and its GPU."""
        if self.cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, self.cores)
        if self.gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = str(self.gpu)

    def set_threads(self) -> None:
        """Set the number of threads of a run; the process that imported everything had one."""
        import torch

        given = os.environ.get("OMP_NUM_THREADS", "")
        torch.set_num_threads(int(given) if given.isdigit() and int(given) else len(self.cores) or _usable_cores())


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_worker(definition: Definition, place: Place, program: Program) -> None:
    """Carry out trials until none is left, or until SIGTERM. Called in a process of its own, without other threads."""
    place.pin()
    warm = WarmProcess(program.run, place.set_threads)  # before the first thread
    try:
        worker = Worker(definition, place, warm)
        signal.signal(signal.SIGTERM, worker.stop)
        worker.work()
    finally:
        warm.close()


class Worker:
    """Takes and carries out the trials of a study.

    Args:
        definition: The study.
        place: Where the worker works.
        warm: Process that forks the runs.
    """

    def __init__(self, definition: Definition, place: Place, warm: WarmProcess) -> None:
        quiet_optuna()
        self.definition, self.folder, self._warm = definition, place.folder, warm
        self.trials = Trials(connect(place.url, place.heartbeat, checked=True), definition.name)
        self.stopped = False
        self._cells = {cell.name: cell for cell in definition.cells}
        self._parts = {(data.name, method.name): (data, method) for data, method in definition.searches()}

    def stop(self, signum: int, frame: FrameType | None) -> None:
        """Handler of SIGTERM: the run writes a checkpoint and ends; a second signal ends it at once."""
        self.stopped = True
        self._warm.stop()

    def work(self) -> None:
        """Carry out the searches, then the cells."""
        while not self.stopped and self._step():
            pass

    def _step(self) -> bool:
        """Carry out a trial, or wait for those of others; False if the study is finished."""
        searching = False
        for search in self._parts:
            waiting, running = self.trials.open_in(*search)
            if waiting:
                self._take(lambda trial, of=search: self._search(trial, *of), *search)  # type: ignore[misc]
                return True
            searching |= running > 0
        waiting, running = self.trials.open_in()
        if waiting and not searching:
            self._take(self._cell)
            return True
        if searching or running:
            time.sleep(_WAIT)
        return searching or running > 0

    def _take(self, objective: Callable[[Trial], float], *place: str) -> None:
        study = self.trials.study(*place)
        if place:
            select = self.definition.select
            assert select is not None
            study.sampler = optuna.samplers.RandomSampler(seed=0)  # replaced by that of the trial
            study.pruner = selection.pruner_of(select, len(select.seeds) * (select.tasks or 10))
        try:
            study.optimize(
                objective, n_trials=1, catch=(RunFailedError, PutBackError, SurplusError), callbacks=[self._put_back]
            )
        except (ValueError, optuna.exceptions.UpdateFinishedTrialError) as error:
            # Another worker took this one for dead, and has put the trial back.
            if "finished" not in str(error) and not isinstance(error, optuna.exceptions.UpdateFinishedTrialError):
                raise

    def _put_back(self, study: optuna.Study, trial: FrozenTrial) -> None:
        if trial.state is TrialState.FAIL and PLANNED in trial.user_attrs and not trial.user_attrs.get(ERROR):
            self.trials.again(study, trial)

    # ------------------------------------------------------------------ trials

    def _cell(self, trial: Trial) -> float:
        """Carry out a cell; its value is the accuracy after the last task."""
        self._open(trial)
        cell = self._cells.get(trial.user_attrs[CELL])
        if cell is None:
            self._fail(trial, "it is not in the study file of this worker; join again")
        chosen = self._chosen(trial, cell)
        arguments = self.definition.arguments(cell.data, cell.method, cell.seed, chosen)
        trial.set_user_attr("arguments", arguments)
        known = self._known(trial).user_attrs
        note = f"hyper-parameters of {known['hash']}" if "hash" in known else ""
        run = self._run(trial, arguments, Path("runs") / cell.name, lambda run: self._report(trial, run), note)
        value = headline_accuracy(run.last)
        return value if value == value else 0.0

    def _open(self, trial: Trial) -> None:
        if PLANNED not in trial.user_attrs:
            raise SurplusError
        if trial.user_attrs.get(ERROR):  # of an earlier start of the study
            trial.set_user_attr(ERROR, "")

    def _chosen(self, trial: Trial, cell: Cell) -> dict[str, Any]:
        search = self.definition.search_of(cell)
        if search is None:
            return {}
        try:
            frozen = selection.freeze(self.folder, self.trials, self.definition, *search)
        except DefinitionError as error:
            self._fail(trial, str(error))
        if frozen is None:
            self._fail(trial, f"no setting of {search[1]} on {search[0]} has finished")
        trial.set_user_attr("hash", frozen.hash)
        return dict(frozen.options)

    def _search(self, trial: Trial, stream: str, method: str) -> float:
        """Carry out a setting of a search over all seeds; its value is its mean score on validation samples."""
        self._open(trial)
        select = self.definition.select
        assert select is not None
        second = trial.user_attrs.get(HALF) == 1
        if second:
            setting = self._second_half(trial, stream, method)
        else:
            trial.study.sampler = selection.sampler_of(select, trial.number)
            setting = selection.suggest(trial, self.definition.spaces[method])
        trial.set_user_attr(SETTING, setting)
        known = self._known(trial)
        number = min([trial.number, *known.system_attrs.get("retry_history", ())])  # of the folder with its checkpoints
        scores, plasticities, seconds = [], [], 0.0
        for index, seed in enumerate(select.seeds):
            data, learner = self._parts[stream, method]
            arguments = selection.search_arguments(self.definition, data, learner, seed, setting)
            trial.set_user_attr("arguments", arguments)
            folder = Path("search") / stream / method / f"{number:04d}" / f"seed_{seed}"
            run = self._run(trial, arguments, folder, lambda run, at=index: self._judge(trial, run, at))  # type: ignore[misc]
            try:
                validation = selection.Validation.of(run)
            except DefinitionError as error:
                self._fail(trial, str(error))
            if not validation.rows:
                self._fail(trial, f"{run.name} has no accuracies on validation samples")
            scores.append(validation.score(select.score))
            plasticities.append(validation.plasticity())
            seconds += run.total_seconds or 0.0
            trial.set_user_attr("seconds", seconds)
            trial.set_user_attr("runs", index + 1)
        trial.set_user_attr("scores", scores)
        trial.set_user_attr("score", sum(scores) / len(scores))
        judged = plasticities if select.sampler == "plasticity_first" else scores
        return sum(judged) / len(judged)

    def _judge(self, trial: Trial, run: Run, index: int) -> None:
        """Report the accuracy after each task to the pruner, and end the trial if it asks for it."""
        select = self.definition.select
        assert select is not None
        tasks = select.tasks or len(run.tasks)
        known = selection.Validation.of(run).averages() if run.curves is not None and run.curves.split == "val" else []
        for task, accuracy in enumerate(known):
            if (step := index * tasks + task) not in self._known(trial).intermediate_values:
                trial.report(accuracy, step)
                if select.pruner is not None and trial.should_prune():
                    raise optuna.TrialPruned

    def _report(self, trial: Trial, run: Run) -> None:
        """Report the accuracy after each task, for the table of the command and for optuna-dashboard."""
        known = self._known(trial).intermediate_values
        for task in range(run.finished):
            value = headline_accuracy(run.measures[task])
            if value == value and task not in known:
                trial.report(value, task)

    def _known(self, trial: Trial) -> FrozenTrial:
        return trial.study.get_trials(deepcopy=False)[trial.number]

    def _second_half(self, trial: Trial, stream: str, method: str) -> dict[str, Any]:
        """The setting of a trial of the second half of ``plasticity_first``, after the first half has finished."""
        while True:
            self.trials.open_in(stream, method)  # puts trials of dead workers back
            first = [other for other in self.trials.of(stream, method) if other.user_attrs.get(HALF) == 0]
            if self.stopped or any(other.state is TrialState.WAITING for other in first):
                raise PutBackError
            if not any(other.state is TrialState.RUNNING for other in first):
                break
            time.sleep(_WAIT)
        chosen = selection.best_of_first_half(first)
        if chosen is None:
            self._fail(trial, "no setting of the first half has finished")
        select = self.definition.select
        assert select is not None
        space = next(one for one in self.definition.spaces[method] if one.key == select.stability[method])
        return {**chosen.user_attrs[SETTING], **selection.suggest(trial, [space])}

    # ------------------------------------------------------------------ runs

    def _run(
        self, trial: Trial, arguments: Sequence[str], place: Path, finished_task: Callable[[Run], None], note: str = ""
    ) -> Run:
        """Carry out a run from its last checkpoint, or from the start.

        Args:
            trial: Trial of the run.
            arguments: Arguments of the command line.
            place: Folder of the run in the folder of the study.
            finished_task: Called with the run when tasks have finished; it may raise ``TrialPruned``.
            note: Line for the log.

        Raises:
            RunFailedError: If it ended with an error.
            PutBackError: If the worker was stopped.
        """
        if self.stopped:
            raise PutBackError
        folder, log = self.folder / place, self.folder / "logs" / f"{place}.log"
        environment = {"WANDB_RUN_GROUP": self.definition.name}
        self._warm.start(Order([*arguments, f"--run_dir={folder}", "--ckpt_path=auto"], log, environment, note))
        pruned, code, seen = False, None, (0, 0)
        while code is None:
            code = self._warm.poll(_LOOK)
            if not pruned and (now := _state_of(folder / FILE)) != seen:
                seen = now
                try:
                    finished_task(read(folder))
                except optuna.TrialPruned:
                    pruned = True
                    self._warm.stop()
                except UnusableRunError:  # of an earlier start, or not complete
                    pass
        if pruned:
            raise optuna.TrialPruned
        if self.stopped and code != 0:
            raise PutBackError
        if code != 0:
            self._fail(trial, f"{_reason(log, code)} (log: {log})")
        try:
            return read(folder)
        except UnusableRunError as error:
            self._fail(trial, f"{folder}: {error}")

    def _fail(self, trial: Trial, reason: str) -> NoReturn:
        trial.set_user_attr(ERROR, reason)
        raise RunFailedError(reason)


def _state_of(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return found.st_mtime_ns, found.st_size


def _reason(log: Path, code: int) -> str:
    """Why a run has failed: the last error in its log, or its exit code."""
    try:
        lines = re.findall(r"^(?:error: |\w*Error: )(.+)$", read_text(log, errors="replace"), re.MULTILINE)
    except OSError:
        lines = []
    if code < 0:
        return f"the run was killed by signal {-code}"
    return str(lines[-1]) if lines else f"the run ended with exit code {code}"
