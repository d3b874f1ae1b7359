"""Dependence by kernels, and the distance of two samples."""

import numpy as np
import pytest
import torch
from support.fakes import normal

from cl_lightning.models import gaussian_kernel, hsic, square_distances, two_sample_distance


def close(found, expected):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-14)


def kernel_of(rows):
    return gaussian_kernel(square_distances(rows))


def test_the_kernel_has_half_of_the_median_square_as_squared_width():
    rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    squares = [[0, 1, 4, 0], [1, 0, 5, 1], [4, 5, 0, 4], [0, 1, 4, 0]]
    close(square_distances(rows), squares)
    close(kernel_of(rows), np.exp(-np.array(squares) / 4))  # of 1 1 1 1 4 4 4 4 5 5 the lower median is 4
    close(kernel_of(torch.zeros(3, 2)), np.ones((3, 3)))
    odd = torch.tensor([[0.0], [1.0], [3.0]])
    close(kernel_of(odd), np.exp(-np.array([[0, 1, 9], [1, 0, 4], [9, 4, 0]]) / 4))


def test_hsic_is_the_trace_and_0_for_a_constant():
    first, second = kernel_of(normal(6, 3)), kernel_of(normal(6, 2, seed=1))
    centre = np.eye(6) - 1 / 6
    close(hsic(first, second), np.trace(first.numpy() @ centre @ second.numpy() @ centre) / 36)
    close(hsic(first, second), hsic(second, first))
    close(hsic(first, torch.ones(6, 6).double()), 0.0)
    same, other = normal(200, 2), normal(200, 2, seed=5)
    assert hsic(kernel_of(same), kernel_of(same)) > 5 * hsic(kernel_of(same), kernel_of(other))


@pytest.mark.parametrize("sizes", [(4, 4), (7, 3), (1, 5)])
def test_the_distance_is_the_discrepancy_of_the_means_of_the_features(sizes):
    one, two = normal(sizes[0], 3), 0.5 + normal(sizes[1], 3, seed=2)
    kernel = kernel_of(torch.cat([one, two]))
    n, parts = sizes[0], kernel.numpy()
    expected = parts[:n, :n].mean() + parts[n:, n:].mean() - 2 * parts[:n, n:].mean()
    labels = (torch.arange(sum(sizes)) < n).double()
    close(two_sample_distance(kernel, labels[None]), [expected])
    by_hsic = hsic(kernel, labels[:, None] * labels) * (sum(sizes) ** 2 / (sizes[0] * sizes[1])) ** 2
    close(by_hsic, expected)
    close(two_sample_distance(kernel, torch.stack([labels, 1 - labels])), [expected, expected])  # symmetric
    assert expected > 0


def test_the_distance_of_a_sample_to_itself_is_0():
    rows = normal(5, 3)
    labels = (torch.arange(10) < 5).double()
    close(two_sample_distance(kernel_of(torch.cat([rows, rows])), labels[None]), [0.0])
