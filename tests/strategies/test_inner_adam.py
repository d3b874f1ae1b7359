import pytest
import torch
from support.fakes import normal

from cl_lightning.strategies.base import adam_step


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_steps_are_the_steps_of_torch(weight_decay):
    values = [normal(3, 2), normal(4, seed=1)]
    twins = [torch.nn.Parameter(value.clone()) for value in values]
    optimizer = torch.optim.Adam(twins, lr=0.1, weight_decay=weight_decay)
    moments = [torch.zeros_like(value) for value in values], [torch.zeros_like(value) for value in values]
    steps = torch.zeros((), dtype=torch.int64)
    for number in range(6):
        gradients = [normal(*value.shape, seed=10 + number) * 10.0**number for value in values]
        for twin, gradient in zip(twins, gradients, strict=True):
            twin.grad = gradient.clone()
        optimizer.step()
        adam_step(values, gradients, moments, steps, 0.1, weight_decay)
        for twin, value in zip(twins, values, strict=True):
            torch.testing.assert_close(value, twin.detach(), rtol=1e-6, atol=1e-7)
    assert steps == 6
