"""Labels of a memory after a run on a stream with noisy labels."""

import torch

from cl_lightning.loop import TaskLoop


def wrong_labels_held(made: TaskLoop) -> float:
    """Share of the samples in the memory of the strategy whose label is not the label of the data.

    Args:
        made: Loop after its run, whose images are all different.
    """
    source = made.datamodule.samples(train=True)
    images = source.take(torch.arange(len(source.labels))).flatten(1)
    columns = made.stream.columns_of(source.labels).tolist()
    label_of = {row.numpy().tobytes(): column for row, column in zip(images, columns, strict=True)}
    memory = made.strategy.memory
    true = torch.tensor([label_of[row.numpy().tobytes()] for row in memory.images.flatten(1)])
    return float((true != memory.labels).double().mean())
