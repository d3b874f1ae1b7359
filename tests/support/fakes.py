"""Random tensors, and batches and tasks without a data set, for tests of formulas."""

import torch
from torch import Tensor

from cl_lightning.batch import Batch, Draw
from cl_lightning.stream import Task


def normal(*shape: int, seed: int = 0, requires_grad: bool = False) -> Tensor:
    """Standard normal numbers in float64, the same at each call."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(requires_grad)


def batch_of(
    labels: Tensor, *, images: Tensor | None = None, tasks: Tensor | None = None, indices: Tensor | None = None
) -> Batch:
    """A batch of these samples; by default of blank images, of task 0, in the order of the data set."""
    images = torch.zeros(len(labels), 1, 8, 8) if images is None else images
    tasks = torch.zeros_like(labels) if tasks is None else tasks
    indices = torch.arange(len(labels)) if indices is None else indices
    return Batch(images, labels, tasks, indices, images, Draw.of(len(labels), 0))


def task_of(index: int = 0, *, size: int = 2) -> Task:
    """Task of a stream whose tasks have as many new classes each."""
    classes = tuple(range(index * size, (index + 1) * size))
    return Task(index, f"task {index}", classes, classes, classes, num_new=size, num_seen=(index + 1) * size)
