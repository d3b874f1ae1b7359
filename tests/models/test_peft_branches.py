import copy
from functools import partial

import pytest
import torch
from support.pretrained import TinyViT
from support.runs import plain_net
from test_peft_sets import IMAGES, disturb

from cl_lightning.models import Adapter, PeftBranches


def adapter(model, blocks):
    return Adapter(model, blocks=blocks, dropout=0.0)


def branches(count=2, depth=3, **options):
    torch.manual_seed(1)
    backbone = partial(TinyViT, depth=depth)
    made = PeftBranches((1, 8, 8), backbone=backbone, shared=adapter, peft=adapter, **options)
    for peft in (made.shared, made.previous):
        disturb(peft)
    for _ in range(count):
        made.add()
        disturb(made.sets[-1])
    return made.eval()


@torch.no_grad()
def in_one(*states, depth=3):
    """Features of a transformer with adapters in blocks (blocks, state dict)."""
    backbone = TinyViT((1, 8, 8), depth=depth).eval()
    for blocks, state in states:
        adapter(backbone, blocks).load_state_dict(state)
    return backbone(IMAGES)


@torch.no_grad()
@pytest.mark.parametrize(("shared_blocks", "first", "last"), [(None, [0], [1, 2]), (2, [0, 1], [2])])
def test_each_branch_is_the_whole_transformer_with_the_shared_module_and_one_set(shared_blocks, first, last):
    made = branches(shared_blocks=shared_blocks)
    shared = first, made.shared.state_dict()
    expected = [in_one(shared, (last, one.state_dict())) for one in made.sets]
    found = made.features(IMAGES, [1, 0, None])
    torch.testing.assert_close(found, torch.stack([expected[1], expected[0], in_one(shared)]))
    torch.testing.assert_close(made(IMAGES), expected[1])
    assert not torch.allclose(expected[0], expected[1])


@torch.no_grad()
def test_early_features_are_of_the_first_blocks_the_last_norm_and_the_pooling():
    made = branches()
    model = made.base.model
    for previous, peft in ((False, made.shared), (True, made.previous)):
        backbone = TinyViT((1, 8, 8), depth=3).eval()
        adapter(backbone, [0]).load_state_dict(peft.state_dict())
        backbone.model.blocks = backbone.model.blocks[:1]
        torch.testing.assert_close(made.early_features(IMAGES, previous=previous), backbone(IMAGES))
    assert len(model.blocks) == 3
    before = made(IMAGES)
    made.store_shared()
    assert torch.equal(made.early_features(IMAGES), made.early_features(IMAGES, previous=True))
    assert torch.equal(made(IMAGES), before)


@torch.no_grad()
def test_the_blocks_come_back_after_an_error_and_a_copy_has_its_own():
    made = branches()
    before = made(IMAGES)
    with pytest.raises(AssertionError):
        made.early_features(IMAGES[:, :, :3])
    with pytest.raises(AssertionError):
        made.features(IMAGES[:, :, :3], [0])
    assert torch.equal(made(IMAGES), before)
    twin = copy.deepcopy(made)
    disturb(twin.shared)
    assert not torch.allclose(twin.features(IMAGES, [1])[0], before)
    assert torch.equal(made.features(IMAGES, [1])[0], before)
    loaded = branches(count=0)
    loaded.load_state_dict(made.state_dict())
    assert torch.equal(loaded.features(IMAGES, [0, 1]), made.features(IMAGES, [0, 1]))


def test_gradients_of_the_early_features_reach_the_shared_module_alone():
    made = branches()
    made.early_features(IMAGES).sum().backward()
    assert all(parameter.grad is not None for parameter in made.shared.parameters())
    assert all(parameter.grad is None for part in (made.previous, made.sets) for parameter in part.parameters())


@pytest.mark.parametrize("count", [0, 3])
def test_there_are_first_and_last_blocks(count):
    with pytest.raises(ValueError, match=f"shared_blocks is {count}; the model has 3 blocks, give 1 to 2"):
        branches(shared_blocks=count)
    with pytest.raises(ValueError, match="has no transformer blocks"):
        PeftBranches((1, 8, 8), backbone=plain_net, shared=adapter, peft=adapter)
