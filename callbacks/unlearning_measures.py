"""Measures of unlearning after each request: what is kept, what is forgotten, and membership inference."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import Batch, mix
from cl_lightning.callback import ContinualCallback
from cl_lightning.checks import at_least
from cl_lightning.data.labels import training_labels
from cl_lightning.distributed import all_gather_together
from cl_lightning.measures import UNLEARNING, membership
from cl_lightning.stream import Task

if TYPE_CHECKING:
    from cl_lightning.strategy import ContinualStrategy

_NAME = "unlearning_measures"


class UnlearningMeasures(ContinualCallback):
    """Records after each task how well the network knows what it keeps, and what it was asked to forget.

    From the first request to forget on, after each task, with all requests so far:

        kept_accuracy            training samples so far that are not forgotten
        forgotten_accuracy       forgotten training samples
        kept_test_accuracy       test samples so far of classes with training samples that are not forgotten
        forgotten_test_accuracy  test samples so far of the other classes; nan if no class is forgotten as a whole
        membership               share of the forgotten samples that are taken for training samples: their cross-entropy
                                 is at most the loss that best separates kept training samples from kept test samples
                                 (Yeom et al., CSF 2018, arXiv:1709.01604)

    The aim is the value of a network that was retrained without the forgotten samples (``Retrain``), not the lowest
    value. With ``reference``, the results of such a run, the results have the differences too. A method that needs task
    ids is measured with them, within the columns of the task. The cost of a request is the cost of its task in the
    results.

    Args:
        samples: Largest number of samples of each task and kind, drawn by seed and task, at least 1; None for all.
        reference: ``results.json`` of a run of ``Retrain`` on the same stream, with this callback; None for none.

    Raises:
        ValueError: If an option is out of range, or the reference has no such measures.
    """

    paper: str = "membership inference: Yeom et al., CSF 2018, arXiv:1709.01604"
    observer_only: bool = True
    test_data_use: str | None = "accuracy and membership inference after requests to forget"

    def __init__(self, *, samples: int | None = 1000, reference: str | None = None) -> None:
        at_least(self, 1, samples=samples, optional=True)
        self.samples, self.reference = samples, reference
        self._reference = None if reference is None else _read(reference)
        self.table = torch.zeros(0, len(UNLEARNING), dtype=torch.float64)
        """Measures in the order of ``UNLEARNING``, float64 ``(tasks, measures)``; nan where undefined."""

    def on_task_end(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        row = [torch.nan] * len(UNLEARNING)
        if len(data.stream.forgotten(task.index)):
            row = self._measured(strategy, data, task)
        self.table = torch.cat([self.table[: task.index], torch.tensor([row], dtype=torch.float64)])
        for logger in trainer.loggers:
            found = {f"unlearning/{name}": value for name, value in zip(UNLEARNING, row, strict=True) if value == value}
            logger.log_metrics(found, step=trainer.global_step)

    @torch.no_grad()
    def _measured(self, strategy: "ContinualStrategy", data: Any, task: Task) -> list[float]:
        stream, labels = data.stream, training_labels(data)
        gone = stream.forgotten(task.index)
        learnt = [index for index in range(task.index + 1) if stream.tasks[index].learns]
        left = np.unique(labels[np.setdiff1d(np.concatenate([stream.train[index] for index in learnt]), gone)])
        lost = torch.as_tensor(np.setdiff1d(np.arange(task.num_seen), stream.columns_of(left)))
        kept_parts: list[Tensor] = []
        gone_parts: list[Tensor] = []
        test_parts: list[Tensor] = []
        for index in learnt:
            for parts, chosen in (
                (kept_parts, np.setdiff1d(stream.train[index], gone)),
                (gone_parts, np.intersect1d(stream.train[index], gone)),
            ):
                indices = self._drawn(torch.as_tensor(chosen), strategy.seed, index)
                if len(indices):
                    parts.append(self._scored(strategy, strategy.passes.batches(indices=indices), index))
            loader = data.evaluation_loader("test", [index], samples=self.samples, key=mix(strategy.seed, 0xF06))
            if len(stream.test[index]):
                test_parts.append(self._scored(strategy, _finished(strategy, data, loader), index))
        kept, forgotten, test = (torch.cat(parts) for parts in (kept_parts, gone_parts, test_parts))
        of_lost = torch.isin(test[:, 2].long(), lost.to(test.device))
        test_kept, test_lost = test[~of_lost], test[of_lost]
        accuracies = [float(part[:, 1].mean()) for part in (kept, forgotten, test_kept, test_lost)]  # nan of no rows
        return [*accuracies, membership(forgotten[:, 0], kept[:, 0], test_kept[:, 0])]

    def _drawn(self, indices: Tensor, seed: int, task: int) -> Tensor:
        if self.samples is None or len(indices) <= self.samples:
            return indices
        order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(mix(seed, 0xF06, task)))
        return indices[order[: self.samples].sort().values]

    def _scored(self, strategy: "ContinualStrategy", batches: Iterator[Batch], task: int) -> Tensor:
        """Loss, whether it is predicted correctly, and column of each sample of all processes, float64 ``(n, 3)``."""
        rows = [torch.zeros(0, 3, dtype=torch.float64, device=strategy.device)]
        for batch in batches:
            if len(batch):
                with strategy.trainer.precision_plugin.forward_context():
                    scores = self._scores(strategy, batch, task).double()
                right = scores.argmax(dim=1) == batch.labels
                loss = F.cross_entropy(scores, batch.labels, reduction="none")
                rows.append(torch.stack([loss, right.double(), batch.labels.double()], dim=1))
        (gathered,) = all_gather_together([torch.cat(rows)])
        return gathered

    def _scores(self, strategy: "ContinualStrategy", batch: Batch, task: int) -> Tensor:
        if strategy.traits.task_ids != "needed":
            return strategy.predict(batch.images)
        scores = strategy.predict(batch.images, torch.full_like(batch.labels, task))
        return scores.masked_fill(~strategy.task_columns[task], -torch.inf)

    def results(self) -> dict[str, Any]:
        if self.table.isnan().all():
            return {}
        found: dict[str, Any] = {"samples": self.samples, **_named(self.table)}
        if self._reference is not None:
            rows = min(len(self._reference), len(self.table))
            found["difference"] = _named(self.table[:rows] - self._reference[:rows])
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"table": self.table}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.table = state_dict["table"]


def _finished(strategy: "ContinualStrategy", data: Any, loader: Any) -> Iterator[Batch]:
    for batch in loader:
        yield data.finish(data.transfer_batch_to_device(batch, strategy.device, 0), augment=False)


def _named(table: Tensor) -> dict[str, list[float | None]]:
    columns = table.T.tolist()
    return {name: [None if v != v else v for v in values] for name, values in zip(UNLEARNING, columns, strict=True)}


def _read(path: str) -> Tensor:
    """The table of another run, float64 ``(tasks, measures)``."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))[_NAME]
        columns = [[torch.nan if v is None else float(v) for v in found[name]] for name in UNLEARNING]
        return torch.tensor(columns, dtype=torch.float64).T
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"UnlearningMeasures: reference {path} has no measures of unlearning; give results.json of a run with this "
            "callback"
        ) from error
