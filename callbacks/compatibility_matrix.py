"""Comparability of the features of the networks after each task, for galleries that are not computed again."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from cl_lightning import measures
from cl_lightning.batch import Batch, Draw
from cl_lightning.callback import ContinualCallback
from cl_lightning.checks import at_least, one_of
from cl_lightning.data import SampleSource, TensorSource
from cl_lightning.stream import Task

if TYPE_CHECKING:
    from cl_lightning.strategy import ContinualStrategy

Protocol = Literal["retrieval", "verification"]


class CompatibilityMatrix(ContinualCallback):
    """Search and verification with queries of the present network in galleries of the networks after earlier tasks.

    After each task the features of a fixed set of images are computed and kept. With M[t, k] the accuracy of the
    queries of the network after task t in the gallery of the network after task k, ``results.json`` has M and

        AC  share of k < t with M[t, k] >= M[k, k]    ``average_compatibility``, ``strict_compatibility`` with >
        AM  mean of M[t, k] over k <= t               ``average_multi_model_accuracy``
        BC  mean over k < T of M[T, k] - M[k, k]      ``backward_compatibility``
        FC  mean over t > 0 of M[t, t-1] - M[t, t]    ``forward_compatibility``

    (AC, AM: CL2R, Biondi et al., ACM TOMM 2023, arXiv:2211.09032; BC, FC: HOC, Biondi et al., CVPR 2024,
    arXiv:2405.02581). Features are compared by their cosine. They are the features that the head compares with the rows
    of its classes (``Head.embed``): the projection of a ``SimplexHead``, for most heads the features of the backbone.
    By default the images are test images of all classes of the stream, also of classes of later tasks; with ``path``
    they are of another data set, the open-set protocol of the papers. Training is the same with and without this
    callback. Each process computes the features of all images.

    Args:
        protocol: ``retrieval``: whether the nearest other image has the same class; ``verification``: whether pairs are
            of the same class, by a threshold of the cosine, in 10 folds.
        samples: Number of images, or of pairs with ``verification``, drawn once, at least 20; None for all images, or
            for 6000 pairs.
        path: An ``.npz`` file with ``x_test``, uint8 images of the channels of the stream, and ``y_test``; None for the
            test images of the stream.
        seed: Seed of the choice of images, independent of the seed of the run.

    Raises:
        ValueError: If an option is out of range, before training if the file does not have the images, and at the end
            of a task if the number of features has changed.
    """

    paper: str = "Biondi et al., ACM TOMM 2023, arXiv:2211.09032"
    observer_only: bool = True
    test_data_use: str | None = "compatibility of features after each task"

    def __init__(
        self,
        *,
        protocol: Protocol = "retrieval",
        samples: int | None = 1000,
        path: str | None = None,
        seed: int = 0,
    ) -> None:
        one_of(self, get_args(Protocol), protocol=protocol)
        at_least(self, 20, samples=samples, optional=True)
        self.protocol: Protocol = protocol
        self.samples, self.path, self.seed = samples, path, seed
        self._source = None if path is None else read_test_images(path)
        self.galleries: list[Tensor] = []
        """Features of the images by the network after each task, float32 ``(images, d)`` each, on the CPU."""
        self.matrix = torch.zeros(0, 0, dtype=torch.float64)
        """M, float64 ``(tasks, tasks)``; nan above the diagonal."""

    def on_task_end(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        source, images, pairs = self._chosen(trainer)
        self.galleries = self.galleries[: task.index]
        self.galleries.append(self._features(trainer, strategy, source, images))
        count = len(self.galleries)
        matrix = torch.full((count, count), torch.nan, dtype=torch.float64)
        matrix[: count - 1, : count - 1] = self.matrix[: count - 1, : count - 1]
        labels = torch.as_tensor(np.array(source.labels))[images]
        for k, gallery in enumerate(self.galleries):
            matrix[-1, k] = self._accuracy(self.galleries[-1], gallery, labels, pairs)
        self.matrix = matrix
        for logger in trainer.loggers:
            values = {f"compatibility/{name}": value for name, value in self.measures().items()}
            logger.log_metrics(values, step=trainer.global_step)

    def measures(self) -> dict[str, float]:
        """Measures of the matrix so far by name; without those that need two networks, after the first task."""
        found = {
            "average_compatibility": measures.average_compatibility(self.matrix),
            "strict_compatibility": measures.average_compatibility(self.matrix, strict=True),
            "average_multi_model_accuracy": measures.average_multi_model_accuracy(self.matrix),
            "backward_compatibility": measures.backward_compatibility(self.matrix),
            "forward_compatibility": measures.forward_compatibility(self.matrix),
        }
        return {name: value for name, value in found.items() if value == value}

    def results(self) -> dict[str, Any]:
        if not self.galleries:
            return {}
        rows = [[None if value != value else value for value in row] for row in self.matrix.tolist()]
        return {"protocol": self.protocol, "seed": self.seed, "matrix": rows, "measures": self.measures()}

    def state_dict(self) -> dict[str, Any]:
        galleries = torch.stack(self.galleries) if self.galleries else torch.zeros(0, 0, 0)
        return {"galleries": galleries, "matrix": self.matrix}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.galleries, self.matrix = list(state_dict["galleries"].unbind()), state_dict["matrix"]

    def _chosen(self, trainer: Trainer) -> tuple[SampleSource, Tensor, Tensor]:
        """The source, the indices of the images, int64 ``(n,)``, and pairs of places among them, int64 ``(2, p)``."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        source: SampleSource = data.samples(train=False) if self._source is None else self._source
        usable = torch.arange(len(source.labels))
        if self._source is None:
            usable = torch.from_numpy(np.unique(np.concatenate(data.stream.test)))
        draw = Draw.of(len(usable), self.seed, 0xC0B)
        order = usable[draw.rand().argsort()]
        if self.protocol == "retrieval":
            return source, order[: self.samples], torch.zeros(2, 0, dtype=torch.int64)
        first, second = balanced_pairs(torch.as_tensor(np.array(source.labels))[order], self.samples or 6000, draw)
        used, places = torch.unique(torch.cat([first, second]), return_inverse=True)
        return source, order[used], places.view(2, -1)

    @torch.no_grad()
    def _features(
        self, trainer: Trainer, strategy: "ContinualStrategy", source: SampleSource, images: Tensor
    ) -> Tensor:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        network, parts = strategy.network, []
        for chunk in torch.split(images, data.eval_batch_size):
            raw = source.take(chunk).to(strategy.device)
            nothing = torch.zeros(len(chunk), dtype=torch.int64, device=strategy.device)
            batch = Batch(raw, nothing, nothing, nothing, raw, Draw.of(len(chunk), 0))
            with trainer.precision_plugin.forward_context():
                found = network.head.embed(network.backbone(data.finish(batch, augment=False).images))
            parts.append(found.float().cpu())
        features = torch.cat(parts)
        if self.galleries and features.shape != self.galleries[0].shape:
            raise ValueError(
                f"CompatibilityMatrix: the network has {features.shape[1]} features, and had "
                f"{self.galleries[0].shape[1]} after the first task; features of growing networks cannot be compared, "
                "remove the callback"
            )
        return features

    def _accuracy(self, queries: Tensor, gallery: Tensor, labels: Tensor, pairs: Tensor) -> float:
        if self.protocol == "retrieval":
            return measures.retrieval_accuracy(queries, gallery, labels)
        first, second = pairs
        return measures.verification_accuracy(queries[first], gallery[second], labels[first] == labels[second])


def balanced_pairs(labels: Tensor, count: int, draw: Draw) -> tuple[Tensor, Tensor]:
    """Random pairs of different images, in turn of the same class and of two classes.

    Args:
        labels: int64 ``(n,)``; at least two classes, and one with two images.
        count: Number of pairs, rounded down to an even number.
        draw: Random numbers.

    Returns:
        Rows of the first and of the second image of each pair, int64 ``(count,)`` each.

    Raises:
        ValueError: If there is no pair of one class, or of two.
    """
    counts = labels.bincount()[labels]
    if not (counts > 1).any() or (counts == len(labels)).all():
        raise ValueError("CompatibilityMatrix: verification needs two images of a class, and two classes")
    half = count // 2
    numbers = Draw.of(half, draw.key, 1).rand(4).double()
    order = labels.argsort(stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    start = (labels.bincount().cumsum(0) - labels.bincount())[labels]  # place of the first image of the class
    pairs = []
    for same in (True, False):
        usable = (counts > 1 if same else counts < len(labels)).nonzero().flatten()
        u, v = numbers[:, :2].unbind(1) if same else numbers[:, 2:].unbind(1)
        first = usable[(u * len(usable)).long()]
        size = counts[first]
        if same:  # another image of the class, whose images follow one another in `order`
            step = 1 + (v * (size - 1)).long()
            place = start[first] + (rank[first] - start[first] + step) % size
        else:  # an image outside the class
            step = (v * (len(labels) - size)).long()
            place = (start[first] + size + step) % len(labels)
        pairs.append(torch.stack([first, order[place]]))
    first, second = torch.stack(pairs, dim=2).flatten(1)
    return first, second


def read_test_images(path: str) -> TensorSource:
    """Test images and labels of an ``.npz`` file; pickled objects in the file are refused.

    Args:
        path: File with ``x_test`` and ``y_test``, as ``NpzData`` reads them.

    Raises:
        ValueError: If the file is missing or damaged, or has no such images.
    """
    try:
        with np.load(Path(path), allow_pickle=False) as file:
            found = {name: file[name] for name in ("x_test", "y_test") if name in file.files}
    except Exception as error:  # of numpy and zipfile, for a file that is missing or damaged
        raise ValueError(f"CompatibilityMatrix: path {path}: {error}; give an .npz file of numpy.savez") from error
    if len(found) < 2:
        there = ", ".join(found) or "neither"
        raise ValueError(f"CompatibilityMatrix: path {path}: give a file with x_test and y_test; it has {there}")
    return TensorSource(found["x_test"], found["y_test"].astype(np.int64), name=f"CompatibilityMatrix: path {path}")
