"""Fixed rows at the corners of a simplex."""

from functools import partial

import pytest
import torch
from support.fakes import normal
from support.runs import plain_net, run, sgd

from cl_lightning.models import LinearHead, ResidualNeck, SimplexHead, rotated_simplex, simplex
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.stream import ClassIncremental


@pytest.mark.parametrize("size", [2, 3, 10, 100])
def test_the_gram_matrix_of_the_corners(size):
    corners = simplex(size)
    assert corners.shape == (size, size - 1)
    expected = torch.full((size, size), -1 / (size - 1), dtype=torch.float64).fill_diagonal_(1.0)
    torch.testing.assert_close(corners @ corners.T, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(corners.sum(0), torch.zeros(size - 1, dtype=torch.float64), rtol=0, atol=1e-13)


def test_classes_take_the_corners_in_turn_and_logits_are_inner_products():
    head = SimplexHead(6, size=5)
    head.grow(2)
    head.grow(1)
    head.grow(0)
    torch.testing.assert_close(head.weight(), simplex(5)[:3].float())
    features = normal(4, 6).float()
    embedded = features @ head.projection.weight.T
    torch.testing.assert_close(head.embed(features), embedded)
    torch.testing.assert_close(head(features), embedded @ simplex(5)[:3].float().T)
    torch.testing.assert_close(head.all_logits(embedded), embedded @ simplex(5).float().T)
    assert [name for name, _ in head.named_parameters()] == ["projection.weight"]


def test_features_of_the_size_of_the_corners_need_no_projection():
    head = SimplexHead(4, size=5)
    assert not list(head.parameters())
    features = normal(3, 4)
    assert torch.equal(head.embed(features), features)
    assert torch.equal(LinearHead(4).embed(features), features)


def test_a_state_restores_the_rows():
    head, fresh = SimplexHead(6, size=5), SimplexHead(6, size=5)
    for part in (2, 2):
        head.grow(part)
    fresh.grow(3)
    fresh.load_state_dict(head.state_dict())
    assert fresh.block_sizes() == [2, 2]
    features = normal(3, 6).float()
    assert torch.equal(fresh(features), head(features))
    fresh.grow(1)
    torch.testing.assert_close(fresh.weight()[-1], simplex(5)[4].float())


def test_too_few_corners_are_an_error_before_the_first_step():
    head = SimplexHead(6, size=3)
    head.grow(2)
    with pytest.raises(ValueError, match="SimplexHead: size is 3; it must be at least 4"):
        head.grow(2)
    steps = []

    class Noted(Finetune):
        def losses(self, batch, output):
            steps.append(1)
            return super().losses(batch, output)

    for options in ({}, {"options": {"dry_run": True}}):
        with pytest.raises(ValueError, match="SimplexHead: size is 9; it must be at least 10"):
            run(Noted(backbone=plain_net, optimizer=sgd, head=partial(SimplexHead, size=9)), **options)
    assert not steps


def test_any_method_learns_with_it():
    fixed = partial(SimplexHead, size=10)
    options = {"data": {"scenario": ClassIncremental(tasks=1)}, "max_epochs": 8}
    made = run(Finetune(backbone=plain_net, optimizer=partial(torch.optim.SGD, lr=0.3), head=fixed), **options)
    assert made.matrix.R_ci[0, 0] > 0.85, made.matrix.R_ci  # measured: .93
    torch.testing.assert_close(made.strategy.network.head.weight(), simplex(10).float())


@pytest.mark.parametrize(("size", "dimensions"), [(2, 1), (4, 3), (5, 9)])
def test_a_simplex_in_a_larger_space_has_the_gram_matrix_of_the_corners(size, dimensions):
    corners = rotated_simplex(size, dimensions)
    assert corners.shape == (size, dimensions)
    expected = size / (size - 1) * (torch.eye(size, dtype=torch.float64) - 1 / size)
    torch.testing.assert_close(corners @ corners.T, expected, rtol=0, atol=1e-14)
    assert torch.equal(corners, rotated_simplex(size, dimensions))
    if size > 2:
        assert (corners - rotated_simplex(size, dimensions, key=1)).abs().max() > 0.1


def test_logits_with_cosine_are_cosines_of_the_embedding_of_a_neck():
    head = SimplexHead(6, size=5, dimensions=8, neck=ResidualNeck, cosine=True).double()
    head.grow(3)
    features, neck = normal(4, 6), head.projection
    hidden = features
    for number in (0, 3):
        linear, norm = neck.layers[number], neck.layers[number + 1]
        hidden = hidden @ linear.weight.T + linear.bias
        hidden = (hidden - hidden.mean(1, keepdim=True)) / (hidden.var(1, correction=0, keepdim=True) + norm.eps).sqrt()
        hidden = torch.where(hidden > 0, hidden, 0.1 * hidden)  # weight 1 and bias 0 of the normalisation
    assert hidden.shape == (4, 12)
    embedded = hidden @ neck.layers[6].weight.T + features @ neck.skip.weight.T
    torch.testing.assert_close(head.embed(features), embedded)
    targets = head.targets
    torch.testing.assert_close(targets, rotated_simplex(5, 8), rtol=0, atol=1e-7)
    expected = torch.nn.functional.cosine_similarity(embedded[:, None], targets[None], dim=2)
    torch.testing.assert_close(head.all_logits(embedded), expected)
    torch.testing.assert_close(head(features), expected[:, :3])
    torch.testing.assert_close(head.classify(features), expected[:, :3])


def test_too_few_dimensions_are_an_error():
    with pytest.raises(ValueError, match="SimplexHead: dimensions is 3; it must be at least 4"):
        SimplexHead(6, size=5, dimensions=3)
