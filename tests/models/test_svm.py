import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.svm import LinearSVC
from torch import Tensor

from cl_lightning.models import linear_svm


def solve(features: Tensor, labels: Tensor, *, block: int = 100, **options) -> tuple[Tensor, Tensor]:
    classes = int(labels.max()) + 1
    return linear_svm(
        lambda: zip(features.split(block), labels.split(block), strict=True), classes, features.shape[1], **options
    )


def digits(count: int = 400) -> tuple[Tensor, Tensor]:
    data = load_digits()
    features = torch.nn.functional.normalize(torch.tensor(data.data[:count]))
    return features, torch.tensor(data.target[:count])


def test_two_points_have_the_solution_of_one_equation():
    # Both have s x = 1 (without a bias): w^2 / 2 + 2 C (1 - w)^2 is least at 4 C / (1 + 4 C).
    features, labels = torch.tensor([[1.0], [-1.0]]), torch.tensor([1, 0])
    weight, bias = solve(features, labels, cost=3.0, bias=False)
    torch.testing.assert_close(weight, torch.tensor([[-12 / 13], [12 / 13]], dtype=torch.float64))
    assert torch.equal(bias, torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize(("cost", "bias"), [(1.0, True), (20.0, True), (1.0, False)])
def test_the_solution_is_that_of_liblinear(cost: float, bias: bool):
    features, labels = digits()
    weight, offset = solve(features, labels, cost=cost, bias=bias)
    peer = LinearSVC(C=cost, dual=False, tol=1e-9, max_iter=10_000, fit_intercept=bias).fit(features, labels)
    torch.testing.assert_close(weight, torch.tensor(peer.coef_), rtol=1e-5, atol=2e-6)
    if bias:
        torch.testing.assert_close(offset, torch.tensor(peer.intercept_), rtol=1e-5, atol=2e-6)


def test_blocks_change_nothing_and_a_class_without_samples_is_never_the_largest():
    features, labels = digits(200)
    labels[labels == 4] = 5
    weight, bias = solve(features, labels)
    again, _ = solve(features, labels, block=7)
    torch.testing.assert_close(weight, again, rtol=1e-7, atol=1e-8)
    assert torch.equal(solve(features, labels, keep=True)[0], weight)
    assert (features @ weight.T + bias).argmax(1).ne(4).all()
