import torch

from cl_lightning.strategies.pretrained.alignment import last_tasks


def test_the_last_task_of_a_class():
    tasks = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0], [0, 1, 0, 1]], dtype=torch.bool)
    assert last_tasks(tasks).tolist() == [0, 2, 1, 2]
