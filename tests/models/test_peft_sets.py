import copy
from functools import partial

import pytest
import torch
from support.pretrained import TinyViT

from cl_lightning.models import SSF, Adapter, LoRA, PeftSets, Prefix, SideBySide, WholeModel

IMAGES = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
KINDS = [partial(Adapter, dropout=0.0), LoRA, SSF, Prefix]


def with_sets(count, peft=KINDS[0]):
    torch.manual_seed(1)
    made = PeftSets((1, 8, 8), backbone=TinyViT, peft=peft)
    for _ in range(count):
        made.add()
        disturb(made.sets[-1])
    return made.eval()


def disturb(peft):
    with torch.no_grad():
        for parameter in peft.parameters():
            parameter += 0.3 * torch.randn_like(parameter)


@torch.no_grad()
def alone(made, number, peft=KINDS[0]):
    """Features with one set only, in a backbone of its own."""
    backbone = TinyViT((1, 8, 8)).eval()
    own = peft(backbone).eval()
    own.load_state_dict(made.sets[number].state_dict())
    return backbone(IMAGES)


@torch.no_grad()
@pytest.mark.parametrize("peft", KINDS)
def test_features_are_those_of_each_set_alone_and_the_newest_is_active(peft):
    made = with_sets(3, peft)
    expected = [alone(made, 0, peft), alone(made, 2, peft), TinyViT((1, 8, 8)).eval()(IMAGES), alone(made, 0, peft)]
    for own, other in zip(made.features(IMAGES, [0, -1, None, 0]), expected, strict=True):
        assert torch.equal(own, other)
    assert torch.equal(made(IMAGES), expected[1])
    assert not torch.allclose(expected[0], expected[1])
    side = SideBySide(made, [0, None])
    assert side.num_features == 48
    assert torch.equal(side(IMAGES), torch.cat([expected[0], expected[2]], dim=1))


@torch.no_grad()
def test_a_context_that_fails_activates_the_newest_again():
    made = with_sets(2)
    before = made(IMAGES)
    with pytest.raises(KeyError), made.active(0):
        raise KeyError
    assert torch.equal(made(IMAGES), before)


def test_a_set_starts_from_initial_values_or_from_the_set_before_it():
    made = with_sets(2)
    made.add(copied=True)
    for own, other in zip(made.sets[2].parameters(), made.sets[1].parameters(), strict=True):
        assert torch.equal(own, other)
        assert own is not other
    made.add()
    with torch.no_grad():
        assert torch.equal(made.eval()(IMAGES), TinyViT((1, 8, 8)).eval()(IMAGES))
    first = PeftSets((1, 8, 8), backbone=TinyViT, peft=Adapter)
    first.add(copied=True)
    assert len(first.sets) == 1


@torch.no_grad()
@pytest.mark.parametrize("other", [0, 1, 4])
def test_a_state_dict_sets_the_number_of_sets(other):
    made, loaded = with_sets(2), with_sets(other)
    loaded.load_state_dict(made.state_dict())
    assert len(loaded.sets) == 2
    assert torch.equal(loaded.eval()(IMAGES), made(IMAGES))
    assert torch.equal(loaded.features(IMAGES, [0, None]), made.features(IMAGES, [0, None]))
    empty = with_sets(0)
    torch.manual_seed(3)
    drawn = torch.rand(3)
    torch.manual_seed(3)
    empty.load_state_dict(made.state_dict())
    assert torch.equal(torch.rand(3), drawn)


@torch.no_grad()
def test_a_copy_has_sets_of_its_own():
    made = with_sets(2)
    before = made.features(IMAGES, [0, 1])
    twin = copy.deepcopy(made)
    for one in twin.sets:
        disturb(one)
    with twin.active(0):
        assert torch.equal(made.features(IMAGES, [0, 1]), before)
        assert torch.equal(made(IMAGES), before[1])
    assert not torch.allclose(twin.features(IMAGES, [0])[0], before[0])


def test_the_whole_model_exists_only_once():
    made = PeftSets((1, 8, 8), backbone=TinyViT, peft=WholeModel)
    with pytest.raises(ValueError, match="PeftSets: WholeModel trains the model itself"):
        made.add()


def test_the_mean_of_earlier_sets_leaves_out_the_newest():
    made = with_sets(3)
    found = made.mean_of_earlier()
    first, second = (list(one.parameters()) for one in list(made.sets)[:2])
    for own, one, other in zip(found, first, second, strict=True):
        torch.testing.assert_close(own, (one + other).detach() / 2)
        assert not own.requires_grad
    single = with_sets(2)
    for own, one in zip(single.mean_of_earlier(), single.sets[0].parameters(), strict=True):
        assert torch.equal(own, one)
        assert own.data_ptr() != one.data_ptr()


@torch.no_grad()
def test_a_merged_module_is_none_of_the_sets():
    torch.manual_seed(1)
    made = PeftSets((1, 8, 8), backbone=TinyViT, peft=KINDS[0], merged=True).eval()
    assert torch.equal(made(IMAGES), TinyViT((1, 8, 8)).eval()(IMAGES))
    disturb(made.merged)
    assert torch.equal(made(IMAGES), TinyViT((1, 8, 8)).eval()(IMAGES))
    made.add()
    disturb(made.sets[0])
    made.eval()
    backbone = TinyViT((1, 8, 8)).eval()
    own = KINDS[0](backbone).eval()
    own.load_state_dict(made.merged.state_dict())
    assert torch.equal(made.features(IMAGES, [0, "merged"]), torch.stack([alone(made, 0), backbone(IMAGES)]))
    assert torch.equal(made(IMAGES), alone(made, 0))
    twin = PeftSets((1, 8, 8), backbone=TinyViT, peft=KINDS[0], merged=True).eval()
    twin.load_state_dict(made.state_dict())
    assert torch.equal(twin.eval().features(IMAGES, ["merged", None]), made.features(IMAGES, ["merged", None]))
    with pytest.raises(ValueError, match="PeftSets: WholeModel trains the model itself"):
        PeftSets((1, 8, 8), backbone=TinyViT, peft=WholeModel, merged=True)
