"""Choice of hyper-parameters: scores on validation samples, samplers and pruners, and the frozen result."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.trial import FrozenTrial, Trial, TrialState

from cl_lightning.files import read_text, replaced
from cl_lightning.report.runs import Run
from cl_lightning.study.definition import Definition, DefinitionError, Part, Selection, Space
from cl_lightning.study.storage import FROZEN, HALF, SETTING, Trials

NEVER = 10**9  # steps between two evaluations: only those at the start and at the end of a task are left


def search_arguments(
    definition: Definition, data: Part, method: Part, seed: int, setting: Mapping[str, Any]
) -> list[str]:
    """Arguments of a run of a search: it holds validation samples out, and evaluates them after each task."""
    select = definition.select
    assert select is not None
    options = {**setting, "data.val_fraction": select.val_fraction}
    if select.tasks is not None:
        options["loop.stop_after_task"] = select.tasks - 1
    return [
        *definition.arguments(data, method, seed, options),
        "--trainer.callbacks+=ContinualEvaluation",
        "--trainer.callbacks.split=val",
        "--trainer.callbacks.samples=null",
        f"--trainer.callbacks.every_n_steps={NEVER}",
    ]


@dataclass(frozen=True)
class Validation:
    """Accuracies on the validation samples of each task, at the end of each finished task.

    Attributes:
        rows: Accuracy in [0, 1] on the tasks so far, after each task.
        samples: Number of validation samples of each task.
    """

    rows: tuple[tuple[float, ...], ...]
    samples: tuple[int, ...]

    @classmethod
    def of(cls, run: Run) -> "Validation":
        """Validation accuracies of a run of a search.

        Raises:
            DefinitionError: If it has evaluated test samples instead.
        """
        curves = run.curves
        if curves is None:
            return cls((), ())
        if curves.split != "val":
            raise DefinitionError(
                f"{run.name}: its ContinualEvaluation evaluates test samples, which select nothing; remove the callback"
            )
        last = dict(zip(curves.tasks, curves.accuracy, strict=True))  # the last evaluation of each
        rows = [
            tuple(value for value in last[t][: t + 1] if value is not None) for t in range(run.finished) if t in last
        ]
        return cls(tuple(row for t, row in enumerate(rows) if len(row) == t + 1), curves.samples)

    def averages(self) -> list[float]:
        """Accuracy on the validation samples of all tasks so far, after each task."""
        found = []
        for row in self.rows:
            counts = self.samples[: len(row)]
            found.append(math.fsum(a * n for a, n in zip(row, counts, strict=True)) / sum(counts))
        return found

    def score(self, name: str) -> float:
        """The score of a selection."""
        averages = self.averages()
        return averages[-1] if name == "last_accuracy" else math.fsum(averages) / len(averages)

    def plasticity(self) -> float:
        """Mean accuracy on each task at its own end, without the first task if there are others."""
        own = [row[-1] for row in self.rows]
        own = own[1:] or own
        return math.fsum(own) / len(own)


def suggest(trial: Trial, spaces: Sequence[Space]) -> dict[str, Any]:
    """The setting of a trial: enqueued values, and values of the sampler for the others."""
    setting: dict[str, Any] = {}
    for space in spaces:
        if space.values:
            setting[space.key] = trial.suggest_categorical(space.key, list(space.values))
        elif isinstance(space.low, int) and isinstance(space.high, int):
            setting[space.key] = trial.suggest_int(space.key, space.low, space.high, log=space.log)
        else:
            setting[space.key] = trial.suggest_float(space.key, space.low, space.high, log=space.log)
    return setting


def sampler_of(select: Selection, number: int) -> optuna.samplers.BaseSampler:
    """The sampler of a trial; its seed depends on the number of the trial alone, not on the worker."""
    if select.sampler == "tpe":
        return optuna.samplers.TPESampler(
            seed=1000 * select.seed + number, n_startup_trials=min(10, _half(select.trials))
        )
    return optuna.samplers.RandomSampler(seed=1000 * select.seed + number)


def _half(trials: int | None) -> int:
    return max((trials or 0) // 2, 1)


def pruner_of(select: Selection, steps: int) -> optuna.pruners.BasePruner:
    """The pruner; a step is a task of a seed.

    Args:
        select: The selection.
        steps: Number of steps of a trial.
    """
    if select.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=min(5, _half(select.trials)))
    if select.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=steps)
    return optuna.pruners.NopPruner()


def best(trials: Sequence[FrozenTrial], select: Selection, stability: str | None = None) -> FrozenTrial | None:
    """The chosen trial of a search; the earliest among equals, None if none has finished.

    With ``plasticity_first``, the largest stability whose plasticity is at least 1 - ``share`` of the largest one.
    """
    done = [trial for trial in trials if trial.state is TrialState.COMPLETE and trial.value is not None]
    if not done:
        return None
    if select.sampler != "plasticity_first":
        return max(done, key=lambda trial: (trial.value, -trial.number))
    first = best_of_first_half(done)
    if first is None or stability is None or first.value is None:
        return first
    least = (1 - select.share) * first.value
    kept = [trial for trial in done if trial.user_attrs[HALF] == 1 and trial.value is not None and trial.value >= least]
    return max([first, *kept], key=lambda trial: trial.user_attrs[SETTING][stability])


def best_of_first_half(trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """The trial with the largest plasticity in the first half of ``plasticity_first``."""
    done = [t for t in trials if t.state is TrialState.COMPLETE and t.user_attrs.get(HALF) == 0]
    return max(done, key=lambda trial: (trial.value, -trial.number), default=None)


# ---------------------------------------------------------------------- the frozen choice


@dataclass(frozen=True)
class Frozen:
    """The choice of a search.

    Attributes:
        options: Chosen options.
        hash: Hash of stream, method, options and selection.
        content: Content of the file.
    """

    options: Mapping[str, Any]
    hash: str
    content: Mapping[str, Any]


def frozen_file(folder: Path, stream: str, method: str) -> Path:
    return folder / "selected" / stream / f"{method}.yaml"


def freeze(folder: Path, trials: Trials, definition: Definition, stream: str, method: str) -> Frozen | None:
    """Write the choice of a finished search into a file with its hash, or read the file that is there.

    Returns:
        The choice; None if no setting has finished.

    Raises:
        DefinitionError: If the file was changed.
    """
    path, study = frozen_file(folder, stream, method), trials.study(stream, method)
    if path.exists():
        return read_frozen(path, study.user_attrs.get(FROZEN))
    select = definition.select
    assert select is not None
    known = trials.of(stream, method)
    chosen = best(known, select, select.stability.get(method))
    if chosen is None:
        return None
    states = [trial.state for trial in known]
    content: dict[str, Any] = {
        "stream": stream,
        "method": method,
        "options": dict(chosen.user_attrs[SETTING]),
        "selection": {key: value for key, value in select.to_dict().items() if key != "data"},
        "result": {
            "score": chosen.user_attrs.get("score", chosen.value),
            "scores": chosen.user_attrs.get("scores", []),
            "trial": chosen.number,
        },
        "cost": {
            "settings": states.count(TrialState.COMPLETE),
            "pruned": states.count(TrialState.PRUNED),
            "failed": states.count(TrialState.FAIL),
            "runs": sum(trial.user_attrs.get("runs", 0) for trial in known),
            "seconds": round(math.fsum(trial.user_attrs.get("seconds", 0.0) for trial in known), 3),
        },
    }
    content["hash"] = digest(content)
    with replaced(path) as file:
        file.write("# The choice of a search. The hash covers stream, method, options, selection and result.\n")
        yaml.safe_dump(content, file, sort_keys=False)
    study.set_user_attr(FROZEN, content["hash"])
    return read_frozen(path, content["hash"])


def read_frozen(path: Path, expected: str | None = None) -> Frozen:
    """The choice in a file.

    Args:
        path: The file.
        expected: Hash in the storage; None if it is not known.

    Raises:
        DefinitionError: If the file cannot be read or does not have its hash.
    """
    try:
        content = yaml.safe_load(read_text(path))
        hash_, options = content["hash"], content["options"]
        same = hash_ == digest(content) and expected in (None, hash_)
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise DefinitionError(f"{path}: not the choice of a search ({error!r}); start a new study") from None
    if not same:
        raise DefinitionError(
            f"{path}: it was changed after the search, its hash differs; restore it, or start a new study whose method "
            "has these options"
        )
    return Frozen(options, hash_, content)


def digest(content: Mapping[str, Any]) -> str:
    """Hash of a choice."""
    covered = {key: content[key] for key in ("stream", "method", "options", "selection", "result")}
    return "sha256:" + hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()
