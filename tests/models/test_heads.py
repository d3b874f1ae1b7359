import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cl_lightning.memory import PrototypeHead
from cl_lightning.models import CosineHead, DistanceHead, LinearHead, align_head, align_rows


def test_a_head_grows_by_blocks_and_its_old_parameters_stay_the_same_objects():
    head = LinearHead(3)
    head.grow(2)
    before = list(head.parameters())
    values = [parameter.detach().clone() for parameter in before]
    head.grow(0)
    head.grow(4)
    after = list(head.parameters())
    assert [id(parameter) for parameter in after[:2]] == [id(parameter) for parameter in before]
    assert all(torch.equal(parameter, value) for parameter, value in zip(after, values, strict=False))
    assert head.num_columns == 6
    assert head.block_sizes() == [2, 4]


def test_single_classes_have_blocks_and_keep_their_parameters_when_they_load():
    head = LinearHead(3)
    for count in (1, 1, 0, 2):
        head.grow(count)
    assert head.block_sizes() == [1, 1, 2]
    state, before = {name: value + 1 for name, value in head.state_dict().items()}, list(head.parameters())
    head.load_state_dict(state)
    assert [id(parameter) for parameter in head.parameters()] == [id(parameter) for parameter in before]
    assert torch.equal(head.blocks[1].weight, state["blocks.1.weight"])


@pytest.mark.parametrize("bias", [True, False])
def test_weights_of_new_classes_are_normal_with_the_given_deviation(bias):
    torch.manual_seed(0)
    head = LinearHead(200, bias=bias, init_std=0.02)
    head.grow(100)
    weight = head.weight().detach()
    assert float(weight.std()) == pytest.approx(0.02, rel=0.03)
    assert float((weight.abs() < 0.02).double().mean()) == pytest.approx(0.6827, abs=0.02)
    assert (head.blocks[0].bias == 0).all() if bias else head.blocks[0].bias is None
    with pytest.raises(ValueError, match="LinearHead: init_std is -1"):
        LinearHead(4, init_std=-1)


def test_logits_match_the_blocks_side_by_side():
    head = LinearHead(5).double()
    head.grow(2)
    head.grow(3)
    head.double()
    features = torch.randn(7, 5, dtype=torch.float64)
    expected = torch.cat([block(features) for block in head.blocks], dim=1)
    torch.testing.assert_close(head(features), expected)


def test_without_classes_there_are_no_logits():
    for head in (LinearHead(4), CosineHead(4)):
        assert head(torch.randn(2, 4)).shape == (2, 0)


@pytest.mark.parametrize(
    "head_class", [LinearHead, CosineHead, partial(CosineHead, proxies=3), DistanceHead, PrototypeHead]
)
def test_a_head_takes_its_shape_from_the_state_that_it_loads(head_class):
    head = head_class(4)
    head.grow(3)
    head.grow(2)
    for other in (head_class(4), head_class(4)):
        other.grow(7)
        state = torch.random.get_rng_state()
        other.load_state_dict(head.state_dict())
        assert torch.equal(state, torch.random.get_rng_state())
        assert other.block_sizes() == [3, 2]
        features = torch.randn(2, 4)
        assert torch.equal(other(features), head(features))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_of_0_stay_0_and_rows_aligned_to_rows_of_0_stay_as_they_are(dtype):
    rows = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    zeros = torch.zeros_like(rows)
    assert torch.equal(align_rows(rows, zeros), zeros)
    assert torch.equal(align_rows(zeros, rows), rows)
    assert torch.equal(align_rows(zeros, zeros), zeros)
    some = rows * torch.tensor([[1], [0], [1], [0]])
    aligned = align_rows(rows, some)
    assert aligned.isfinite().all()
    assert torch.equal(aligned[1::2], zeros[1::2])
    torch.testing.assert_close(aligned.norm(dim=1).mean(), rows.norm(dim=1).mean())


@pytest.mark.parametrize("block", [0, 1])
def test_a_head_with_a_block_of_0_is_left_as_it_is(block):
    head = LinearHead(6)
    head.grow(3)
    head.grow(2)
    nn.init.zeros_(head.blocks[block].weight)
    before = head.weight().clone()
    align_head(head)
    assert torch.equal(head.weight(), before)


def test_a_head_of_one_block_has_nothing_to_align():
    for count in (0, 3):
        head = LinearHead(6)
        head.grow(count)
        before = [parameter.detach().clone() for parameter in head.parameters()]
        align_head(head)
        assert all(torch.equal(one, other) for one, other in zip(head.parameters(), before, strict=True))


def test_weights_of_a_new_cosine_class_are_uniform_as_in_a_linear_layer():
    torch.manual_seed(0)
    head = CosineHead(64)
    head.grow(500)
    weight = head.weight().detach()
    assert 0.124 < float(weight.abs().max()) <= 1 / 8
    assert float(weight.var()) == pytest.approx(1 / (3 * 64), rel=0.02)
    torch.testing.assert_close(head(8 * weight[:1])[0, 0], torch.tensor(16.0))  # the scale


def test_cosine_logits_do_not_depend_on_lengths():
    head = CosineHead(4, scale=10.0).double()
    head.grow(3)
    head.double()
    features = torch.randn(6, 4, dtype=torch.float64)
    torch.testing.assert_close(head(features), head(features * 7))
    cosines = F.cosine_similarity(features[:, None], head.weight()[None], dim=2)
    torch.testing.assert_close(head(features), 10 * cosines)


def test_the_scale_of_a_cosine_head_is_learnt_if_asked_to():
    assert isinstance(CosineHead(4, learn_scale=True).scale, nn.Parameter)
    assert "scale" in dict(CosineHead(4).named_buffers())
    with pytest.raises(ValueError, match="scale is -1"):
        CosineHead(4, scale=-1)


def test_several_proxies_of_a_class_give_the_mean_of_their_cosines_weighted_by_a_softmax():
    head = CosineHead(4, scale=3.0, proxies=2).double()
    head.grow(2)
    head.grow(1)
    head.double()
    assert head.weight().shape == (3, 2, 4)
    assert head.block_sizes() == [2, 1]
    features = torch.randn(5, 4, dtype=torch.float64)
    cosines = F.cosine_similarity(features[:, None, None], head.weight()[None], dim=3)
    weights = cosines.exp() / cosines.exp().sum(2, keepdim=True)
    torch.testing.assert_close(head(features), 3 * (weights * cosines).sum(2))


def test_equal_proxies_are_a_plain_cosine_and_no_proxy_is_an_error():
    single, several = CosineHead(4, scale=2.0), CosineHead(4, scale=2.0, proxies=5)
    single.grow(3)
    several.grow(3)
    with torch.no_grad():
        several.blocks[0].weight.copy_(single.weight()[:, None].expand(3, 5, 4))
    features = torch.randn(6, 4)
    torch.testing.assert_close(several(features), single(features))
    with pytest.raises(ValueError, match="CosineHead: proxies is 0"):
        CosineHead(4, proxies=0)


def test_proxies_start_as_rows_of_a_linear_layer_whatever_their_number():
    head = CosineHead(64, proxies=10)
    head.grow(50)
    weight = head.weight().detach()
    assert 0.124 < float(weight.abs().max()) <= 1 / 8
    assert float(weight.var()) == pytest.approx(1 / (3 * 64), rel=0.03)


@pytest.mark.parametrize("proxies", [1, 2])
def test_imprinted_rows_have_the_directions_of_their_features_and_the_norm_of_old_rows(proxies):
    head = CosineHead(3, proxies=proxies)
    head.grow(2)
    head.grow(3)
    head.double()
    old, random = head.blocks[0].weight.detach().clone(), head.blocks[1].weight.detach().clone()
    # Class 2 has two directions, of unequal lengths and numbers; class 3 has one; class 4 has no features.
    features = torch.tensor([[9.0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3], [1, 1, 1]], dtype=torch.float64)
    head.imprint(features, torch.tensor([2, 2, 2, 3, 0]))
    new, norm = head.blocks[1].weight.detach(), old.norm(dim=-1).mean()
    assert torch.equal(head.blocks[0].weight, old)
    assert torch.equal(new[2], random[2])
    torch.testing.assert_close(new[:2].norm(dim=-1), norm.expand(new[:2].shape[:-1]))
    if proxies == 1:  # the mean of normalised features, not of features
        torch.testing.assert_close(new[0], norm * torch.tensor([2.0, 1, 0]).double() / math.sqrt(5))
        torch.testing.assert_close(new[1], norm * torch.tensor([0.0, 0, 1]).double())
    else:
        order = new[0].argsort(dim=0, descending=True)[:, 0]
        torch.testing.assert_close(new[0][order], norm * torch.eye(3, dtype=torch.float64)[:2])
        torch.testing.assert_close(new[1], norm * torch.tensor([[0.0, 0, 1]] * 2).double())


def test_rows_of_a_first_block_are_imprinted_at_its_own_mean_norm():
    head = CosineHead(3)
    head.grow(2)
    norm = head.weight().norm(dim=1).mean().detach()
    head.imprint(torch.randn(8, 3), torch.arange(8) % 2)
    torch.testing.assert_close(head.weight().norm(dim=1).detach(), norm.expand(2))


def test_the_nearest_mean_is_predicted_and_unknown_classes_never():
    head = PrototypeHead(2, metric="euclidean")
    head.grow(3)
    head.fit_features(torch.tensor([[0.0, 0], [0, 2], [9, 9], [11, 9]]), torch.tensor([0, 0, 2, 2]))
    scores = head.classify(torch.tensor([[0.0, 1], [10, 9], [4, 4]]))
    assert scores.argmax(1).tolist() == [0, 2, 0]
    assert torch.isinf(scores[:, 1]).all()
    torch.testing.assert_close(scores[0, [0, 2]], -torch.tensor([0.0, 164.0]))


def test_the_logits_of_a_prototype_head_are_linear_ones():
    head = PrototypeHead(2)
    head.grow(2)
    features = torch.randn(3, 2)
    torch.testing.assert_close(head(features), head.blocks[0](features))


@pytest.mark.parametrize("head", [LinearHead, CosineHead, partial(CosineHead, learn_scale=True)])
def test_scores_of_predictions_are_computed_in_float32_under_mixed_precision(head):
    """In bf16 some 15 % of the rows have two equal largest cosines."""
    generator = torch.Generator().manual_seed(0)
    made = head(64)
    made.grow(60)
    made.grow(40)
    with torch.no_grad():
        for block in made.blocks:
            block.weight.copy_(torch.randn(block.weight.shape, generator=generator))
    features = torch.randn(500, 64, generator=generator).bfloat16()
    expected = made.classify(features.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = made.classify(features)
        logits = made(features)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    if not isinstance(made, LinearHead):  # cosines are those of float32 in training too
        assert torch.equal(logits, expected)


def test_a_distance_head_compares_distances_in_training_and_directions_in_predictions():
    head = DistanceHead(2).double()
    assert head(torch.ones(3, 2)).shape == head.classify(torch.ones(3, 2)).shape == (3, 0)
    head.grow(1)
    head.grow(1)
    with torch.no_grad():
        head.blocks[0].weight.copy_(torch.tensor([[3.0, 0.0]]))
        head.blocks[1].weight.copy_(torch.tensor([[0.0, 0.5]]))
    features = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(head(features), -torch.tensor([[4.0, math.sqrt(9 + 3.5**2)]]).double())
    expected = -torch.tensor([[math.sqrt(2 - 2 * 0.6), math.sqrt(2 - 2 * 0.8)]]).double()
    torch.testing.assert_close(head.classify(features), expected)  # the other class


def test_parameters_outside_the_blocks_are_reset_to_initial_values():
    build = partial(CosineHead, scale=3.0, learn_scale=True)
    head = build(4)
    head.grow(2)
    rows, scale = head.weight().detach().clone(), head.scale
    with torch.no_grad():
        head.scale.fill_(7.0)
    head.reset_shared(build)
    assert head.scale is scale
    assert float(scale.detach()) == 3.0
    assert torch.equal(head.weight(), rows)
    linear = LinearHead(4)
    linear.grow(2)
    linear.reset_shared(LinearHead)
    assert linear.num_columns == 2
