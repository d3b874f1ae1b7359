import copy
from functools import partial

import pytest
import torch
from support.fakes import normal
from support.pretrained import TinyViT, tiny_vit
from torch.nn import functional as F

from cl_lightning.models import (
    MLP,
    DecomposedPrompts,
    ExpertPrompts,
    PrefixSite,
    PromptedBackbone,
    PromptPool,
    PromptSite,
    component_weights,
    most_frequent,
    orthogonality,
    orthonormal_rows,
)

POOLS = {
    "pool": partial(PromptPool, size=6, length=2, top_k=3, low=-1.0, high=1.0),
    "pool, class token": partial(PromptPool, size=6, length=2, top_k=3, low=-1.0, high=1.0, readout="token"),
    "components": partial(DecomposedPrompts, length=4, blocks=[0, 1]),
    "experts": partial(
        ExpertPrompts, general_length=2, general_blocks=[0], expert_length=3, expert_blocks=[0, 1], low=-1.0
    ),
}


def prompted(name):
    torch.manual_seed(0)
    backbone = PromptedBackbone((3, 8, 8), backbone=TinyViT, prompts=POOLS[name]).double()
    if isinstance(backbone.prompts, DecomposedPrompts):
        for _ in range(2):
            backbone.prompts.grow(3)
        with torch.no_grad():
            for parameter in backbone.prompts.parameters():
                parameter.mul_(3.0)
        backbone.double()
    if isinstance(backbone.prompts, ExpertPrompts):
        for _ in range(3):
            backbone.prompts.grow()
        with torch.no_grad():  # experts are equal at first
            for number, expert in enumerate(backbone.prompts.experts):
                expert.copy_(normal(*expert.shape, seed=number))
    backbone.base.requires_grad_(False)
    return backbone.eval()


# ---------------------------------------------------------------------- rows of each sample


def test_each_sample_gets_its_own_rows():
    net, x = tiny_vit().double(), normal(3, 5, 24)
    first, second = net.blocks
    tokens, keys, values = (normal(3, 2, 24, seed=seed) for seed in (1, 2, 3))
    with torch.no_grad():
        site = PromptSite(first, second)
        site.tokens = tokens
        together = net.blocks(x)
        for row in range(3):
            site.tokens = tokens[row]
            torch.testing.assert_close(net.blocks(x[row : row + 1]), together[row : row + 1])
        site.enabled = False
        place = PrefixSite(first.attn)
        place.keys, place.values = keys, values
        together = net.blocks(x)
        for row in range(3):
            place.keys, place.values = keys[row], values[row]
            torch.testing.assert_close(net.blocks(x[row : row + 1]), together[row : row + 1])


# ---------------------------------------------------------------------- what all prompts have in common


@pytest.mark.parametrize("name", POOLS)
def test_outside_a_pass_the_model_is_as_it_was_and_the_query_is_its_output(name):
    images, backbone = normal(5, 3, 8, 8), prompted(name)
    plain = tiny_vit(in_chans=3).double()(images)
    assert torch.equal(backbone.base(images), plain)
    assert torch.equal(backbone.query(images), plain)
    assert not torch.allclose(backbone(images), plain)
    assert torch.equal(backbone.base(images), plain)
    with pytest.raises(RuntimeError, match="channels"), backbone.prompts.answering(backbone.query(images)):
        backbone.base(images[:, :2])
    assert torch.equal(backbone.base(images), plain)


@pytest.mark.parametrize("name", POOLS)
def test_features_of_an_image_do_not_depend_on_the_others(name):
    images, backbone = normal(6, 3, 8, 8), prompted(name)
    together = backbone(images)
    for row in range(6):
        torch.testing.assert_close(backbone(images[row : row + 1]), together[row : row + 1])


@pytest.mark.parametrize("name", POOLS)
def test_a_query_that_was_asked_ahead_is_used_for_the_same_images_alone(name):
    images, backbone = normal(4, 3, 8, 8), prompted(name)
    expected, calls = backbone(images), []
    backbone.base.register_forward_hook(lambda *_: calls.append(1))
    backbone.look_ahead(images)
    assert torch.equal(backbone(images), expected)
    assert len(calls) == 2
    backbone.look_ahead(images)
    assert torch.equal(backbone(images.flip(0)), backbone(images.flip(0)))
    assert len(calls) == 7


@pytest.mark.parametrize("name", POOLS)
def test_a_copy_is_on_its_own_and_the_state_makes_another_the_same(name):
    images, backbone = normal(4, 3, 8, 8), prompted(name)
    backbone(images)
    twin, expected = copy.deepcopy(backbone), backbone(images)
    assert torch.equal(twin(images), expected)
    with torch.no_grad():
        for parameter in backbone.prompts.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    assert torch.equal(twin(images), expected)
    other = PromptedBackbone((3, 8, 8), backbone=TinyViT, prompts=POOLS[name]).double().eval()
    other.load_state_dict(twin.state_dict())  # groups that it makes are float32
    torch.testing.assert_close(other.double()(images), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(backbone(images), expected)


@pytest.mark.parametrize("name", POOLS)
def test_it_runs_in_mixed_precision(name):
    backbone = prompted(name).float().train()
    with torch.autocast("cpu", torch.bfloat16):
        features = backbone(torch.randn(3, 3, 8, 8))
    features.float().sum().backward()
    assert all(p.grad.isfinite().all() for n, p in backbone.prompts.named_parameters() if p.grad is not None)


@pytest.mark.parametrize("name", POOLS)
def test_a_model_without_blocks_is_reported(name):
    with pytest.raises(ValueError, match="MLP has no transformer blocks"):
        POOLS[name](MLP((1, 8, 8)))


# ---------------------------------------------------------------------- the pool


def test_a_pool_adds_the_prompts_of_the_nearest_keys_to_the_tokens_of_the_image():
    images, backbone = normal(4, 3, 8, 8), prompted("pool")
    net, pool = backbone.base.model, backbone.prompts
    query = net(images)
    cosines = F.cosine_similarity(query[:, None], pool.keys, dim=2)
    ids = cosines.topk(3, dim=1).indices
    x = net._pos_embed(net.patch_embed(images))
    x = net.norm(net.blocks(torch.cat([pool.prompts[ids].flatten(1, 2), x], dim=1)))  # before the class token
    torch.testing.assert_close(backbone(images), x[:, :6].mean(1))
    torch.testing.assert_close(prompted("pool, class token")(images), x[:, 6])
    torch.testing.assert_close(pool.similarity(query), cosines)


def test_of_a_model_that_reads_out_a_mean_the_mean_of_the_prompts_is_read_out():
    torch.manual_seed(0)
    make = partial(TinyViT, global_pool="avg")
    images, backbone = normal(2, 3, 8, 8), PromptedBackbone((3, 8, 8), backbone=make, prompts=POOLS["pool"])
    net, pool = backbone.double().eval().base.model, backbone.prompts
    tokens = pool.prompts[pool.select(net(images))].flatten(1, 2)
    x = net.blocks(torch.cat([net._pos_embed(net.patch_embed(images)), tokens], dim=1))
    torch.testing.assert_close(backbone(images), net.fc_norm(x[:, -6:].mean(1)))


def test_the_order_of_the_pool_does_not_matter():
    images, backbone = normal(4, 3, 8, 8), prompted("pool")
    expected, order = backbone(images), torch.tensor([3, 0, 5, 1, 4, 2])
    with torch.no_grad():
        for parameter in (backbone.prompts.prompts, backbone.prompts.keys):
            parameter.copy_(parameter[order].clone())
    torch.testing.assert_close(backbone(images), expected)


def test_prompts_that_are_not_taken_have_no_gradient_and_keys_only_that_of_their_cosine():
    images, backbone = normal(1, 3, 8, 8), prompted("pool").train()
    pool = backbone.prompts
    taken = pool.select(backbone.query(images))[0].tolist()
    backbone(images).square().sum().backward()
    assert pool.keys.grad is None or not pool.keys.grad.any()
    for number, gradient in enumerate(pool.prompts.grad):
        assert bool(gradient.any()) == (number in taken)
    pool.zero_grad()
    backbone(images)
    matched = pool.take_matched()
    cosines = F.cosine_similarity(backbone.query(images), pool.keys[taken], dim=1)
    torch.testing.assert_close(matched, cosines.sum())
    matched.backward()
    assert pool.prompts.grad is None or not pool.prompts.grad.any()
    assert [bool(row.any()) for row in pool.keys.grad] == [number in taken for number in range(6)]
    assert all(parameter.grad is None for parameter in backbone.base.parameters())


def test_a_choice_is_for_one_pass_and_all_its_samples():
    images, backbone = normal(3, 3, 8, 8), prompted("pool").train()
    own, pool = backbone(images), backbone.prompts
    pool.choice = torch.tensor([5, 1, 2])
    chosen = backbone(images)
    expected = F.cosine_similarity(backbone.query(images)[:, None], pool.keys[[5, 1, 2]], dim=2).sum(1).mean()
    torch.testing.assert_close(pool.take_matched(), expected)
    assert not torch.allclose(chosen, own)
    torch.testing.assert_close(backbone(images), own)


def test_the_most_frequent_are_filled_up_from_the_first():
    assert most_frequent(torch.tensor([0, 3, 0, 5, 3]), 4).tolist() == [3, 1, 4, 0]
    assert most_frequent(torch.tensor([0, 0, 7]), 3).tolist() == [2, 0, 1]
    pool = POOLS["pool"](tiny_vit())
    with torch.no_grad():
        pool.keys.copy_(torch.eye(6, 24))
    query = torch.tensor([[3.0, 2, 1, 0, 0, 0], [0.0, 0, 9, 5, 4, 0]])
    assert pool.votes(F.pad(query, (0, 18))).tolist() == [1, 1, 2, 1, 1, 0]


# ---------------------------------------------------------------------- components


def test_new_rows_are_orthonormal_and_orthogonal_to_what_old_ones_span():
    torch.manual_seed(0)
    old = torch.randn(5, 12)
    new = orthonormal_rows(old, 4)
    torch.testing.assert_close(new @ new.T, torch.eye(4), rtol=0, atol=1e-6)
    torch.testing.assert_close(new @ old.T, torch.zeros(4, 5), rtol=0, atol=1e-5)
    assert float(orthogonality(new.double())) < 1e-12


def test_where_there_is_no_room_rows_have_norm_1():
    torch.manual_seed(0)
    rows = orthonormal_rows(torch.randn(3, 4), 5)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(5))
    assert orthonormal_rows(torch.randn(9, 4), 2).shape == (2, 4)


def test_orthogonality_is_the_mean_over_the_entries():
    rows = torch.tensor([[1.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    torch.testing.assert_close(orthogonality(rows), torch.tensor((1 + 4 + 4 + 9) / 4, dtype=torch.float64))


def test_weights_are_cosines_of_attended_queries_and_keys():
    query, attention, keys = normal(3, 7), normal(4, 7, seed=1), normal(4, 7, seed=2)
    expected = F.cosine_similarity(query[:, None] * attention, keys.expand(3, 4, 7), dim=2)
    torch.testing.assert_close(component_weights(query, attention, keys), expected)


def test_components_are_summed_into_keys_and_values_of_their_blocks():
    images, backbone = normal(2, 3, 8, 8), prompted("components")
    net, prompts = backbone.base.model, backbone.prompts
    query, expected = net(images), backbone(images)
    by_hand = copy.deepcopy(net)
    for place, block in enumerate(by_hand.blocks):
        parts = (prompts.prompts, prompts.keys, prompts.attention)
        p, k, a = (torch.cat([group[place] for group in part]) for part in parts)
        assert len(p) == 6
        prefix = torch.einsum("bm,mld->bld", component_weights(query, a, k), p)
        site = PrefixSite(block.attn)
        site.keys, site.values = prefix[:, :2], prefix[:, 2:]
    torch.testing.assert_close(by_hand(images), expected)


def test_components_of_each_task_begin_orthogonal_to_earlier_ones():
    torch.manual_seed(0)
    prompts = POOLS["components"](tiny_vit())
    for _ in range(3):
        prompts.grow(4)
    for group in (prompts.prompts, prompts.keys, prompts.attention):
        for block in range(2):
            rows = torch.cat([part[block] for part in group]).flatten(1)
            torch.testing.assert_close(rows @ rows.T, torch.eye(12), rtol=0, atol=1e-5)
    assert float(prompts.penalty().detach()) < 1e-9
    newest = {id(group[-1]) for group in (prompts.prompts, prompts.keys, prompts.attention)}
    assert {id(p) for p in prompts.parameters()} - {id(p) for p in prompts.settled()} == newest


def test_a_state_with_fewer_groups_drops_the_others():
    one, two = POOLS["components"](tiny_vit()), POOLS["components"](tiny_vit())
    one.grow(2)
    for _ in range(3):
        two.grow(3)
    two.load_state_dict(one.state_dict())
    assert [tuple(part.shape) for part in two.keys] == [(2, 2, 24)]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (partial(PromptPool, size=0), "size is 0"),
        (partial(PromptPool, top_k=11), "top_k is 11"),
        (partial(PromptPool, readout="both"), "readout is 'both'"),
        (partial(PromptPool, low=1.0), "low is 1.0"),
        (partial(DecomposedPrompts, length=3), "length is 3"),
        (DecomposedPrompts, r"blocks \[0, 1, 2, 3, 4\]; the model has blocks 0 to 1"),
    ],
)
def test_options_out_of_range_are_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make(tiny_vit())


def test_prompts_and_keys_of_a_pool_are_uniform_and_its_defaults_are_small():
    torch.manual_seed(0)
    pool = PromptPool(tiny_vit(), size=50, length=20, low=-0.5, high=1.0)
    for values in (pool.prompts.detach(), pool.keys.detach()):
        assert -0.5 <= values.min() < -0.49
        assert 0.99 < values.max() < 1.0
        assert float(values.mean()) == pytest.approx(0.25, abs=0.06)
        assert float(values.var()) == pytest.approx(1.5**2 / 12, rel=0.1)
    plain = PromptPool(tiny_vit())  # U(0, 0.01)
    assert plain.prompts.shape == (10, 10, 24)
    assert 0 <= plain.prompts.min() < 1e-4
    assert 0.0099 < plain.prompts.max() <= 0.01
    assert plain.select(normal(3, 24).float()).shape == (3, 4)


def test_selections_are_counted_in_training_passes_only():
    pool = PromptPool(tiny_vit(), size=6, top_k=2, low=-1.0, high=1.0)
    query = normal(30, 24).float()
    votes = pool.votes(query)
    assert int(votes.sum()) == 60
    pool.train()
    for _ in range(2):
        pool.answer(query)
    assert torch.equal(pool.selections, 2 * votes)
    pool.eval().answer(query)
    with torch.no_grad():
        pool.train().answer(query)
    assert torch.equal(pool.selections, 2 * votes)
    pool.choice = torch.tensor([4, 1])
    pool.answer(query)
    assert torch.equal(pool.selections - 2 * votes, torch.tensor([0, 30, 0, 0, 30, 0]))


def test_directions_of_new_rows_are_random_also_where_the_space_is_full():
    torch.manual_seed(0)
    row = orthonormal_rows(torch.zeros(0, 400), 1)[0]
    assert abs(float(row.mean())) < 4 / 400  # 20 standard deviations would be all of one sign
    for old in (torch.eye(5), torch.ones(7, 5)):
        torch.manual_seed(1)
        found = orthonormal_rows(old, 3)
        torch.manual_seed(1)
        torch.testing.assert_close(found, F.normalize(torch.randn(3, 5, dtype=torch.float64)).float())


def test_weights_of_a_query_of_0_are_0():
    weights = component_weights(torch.zeros(2, 4), torch.ones(3, 4), torch.ones(3, 4))
    assert torch.equal(weights, torch.zeros(2, 3))
