import pytest
import torch
from support.fakes import normal

from cl_lightning.strategies.base import TaskIncremental
from cl_lightning.strategies.base.task_incremental import by_task


def test_scores_keep_the_order_of_the_images():
    images, tasks, calls = normal(7, 2), torch.tensor([2, 0, 2, 1, 0, 2, 2]), []

    def predict(rows, task):
        calls.append((task, len(rows)))
        return rows * (10.0**task)

    scores = by_task(images, tasks, predict)
    torch.testing.assert_close(scores, images * 10.0 ** tasks[:, None])
    assert calls == [(0, 2), (1, 1), (2, 4)]


def test_a_prediction_without_tasks_is_refused():
    with pytest.raises(ValueError, match="TaskIncremental: predictions need the task of each image; give tasks"):
        TaskIncremental().predict(torch.zeros(1, 1, 2, 2))
