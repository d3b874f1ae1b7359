import copy
from functools import partial

import pytest
import torch
from support.fakes import normal
from support.pretrained import TinyViT, tiny_vit
from torch.nn import functional as F

from cl_lightning.models import ExpertPrompts, PrefixSite, PromptedBackbone

IMAGES = normal(6, 3, 8, 8)
EXPERTS = partial(
    ExpertPrompts, general_length=2, general_blocks=[1], expert_length=3, expert_blocks=[0, 1], low=-1.0, high=1.0
)


def made(tasks=3, **options):
    """Experts with values of their own, and the query of image i in the direction of key i."""
    torch.manual_seed(0)
    backbone = PromptedBackbone((3, 8, 8), backbone=TinyViT, prompts=partial(EXPERTS, **options)).double().eval()
    query = backbone.query(IMAGES)
    for number in range(tasks):
        backbone.prompts.grow()
        with torch.no_grad():
            backbone.prompts.experts[number].copy_(normal(*backbone.prompts.experts[number].shape, seed=number))
            backbone.prompts.keys[number].copy_(0.1 * query[number])
    backbone.base.requires_grad_(False)
    return backbone


def by_hand(backbone, images, expert):
    """Features with the prefixes of one expert, inserted block by block."""
    net, prompts = copy.deepcopy(backbone.base.model), backbone.prompts
    for place, block in enumerate(net.blocks):
        keys, values = prompts.experts[expert][place]
        if place == 1 and prompts.general is not None:
            keys, values = torch.cat([keys, prompts.general[0, 0]]), torch.cat([values, prompts.general[0, 1]])
        site = PrefixSite(block.attn)
        site.keys, site.values = keys, values
    return net(images)


def test_each_image_has_the_general_prefix_and_the_expert_of_its_nearest_key():
    backbone = made()
    cosines = F.cosine_similarity(backbone.query(IMAGES)[:, None], torch.stack(list(backbone.prompts.keys)), dim=2)
    chosen = cosines.argmax(dim=1)
    assert chosen[:3].tolist() == [0, 1, 2]
    expected = torch.cat([by_hand(backbone, IMAGES[i : i + 1], int(t)) for i, t in enumerate(chosen)])
    torch.testing.assert_close(backbone(IMAGES), expected)


def test_a_choice_is_for_one_pass():
    backbone = made()
    own = backbone(IMAGES)
    backbone.prompts.choice = torch.tensor([2, 2, 0, 1, 0, 1])
    expected = [by_hand(backbone, IMAGES[i : i + 1], t) for i, t in enumerate([2, 2, 0, 1, 0, 1])]
    torch.testing.assert_close(backbone(IMAGES), torch.cat(expected))
    backbone.prompts.choice = torch.tensor(1)
    torch.testing.assert_close(backbone(IMAGES), by_hand(backbone, IMAGES, 1))
    torch.testing.assert_close(backbone(IMAGES), own)


def test_in_training_all_images_use_the_newest_expert_and_match_its_key():
    backbone = made().train()
    features, prompts = backbone(IMAGES), backbone.prompts
    torch.testing.assert_close(features, by_hand(backbone, IMAGES, 2))
    matched = prompts.take_matched()
    torch.testing.assert_close(matched, F.cosine_similarity(backbone.query(IMAGES), prompts.keys[2], dim=1).mean())
    (features.square().sum() + matched).backward()
    newest = {id(parameter) for parameter in (prompts.general, prompts.experts[2], prompts.keys[2])}
    for parameter in prompts.parameters():
        moved = parameter.grad is not None and bool(parameter.grad.any())
        assert moved == (id(parameter) in newest)
    assert {id(p) for p in prompts.parameters()} - {id(p) for p in prompts.settled()} == newest


def test_without_a_gradient_images_choose_in_training_mode_too():
    backbone = made()
    expected = backbone(IMAGES)
    with torch.no_grad():
        torch.testing.assert_close(backbone.train()(IMAGES), expected)


def test_without_general_prefixes_experts_alone_are_inserted():
    backbone = made(general_length=0, general_blocks=[7])
    assert backbone.prompts.general is None
    backbone.prompts.choice = torch.tensor(1)
    torch.testing.assert_close(backbone(IMAGES), by_hand(backbone, IMAGES, 1))


def test_an_expert_begins_as_a_copy_of_the_last_one_and_a_key_is_drawn():
    torch.manual_seed(0)
    prompts = ExpertPrompts(tiny_vit(depth=5), low=-0.5, high=1.0, expert_length=30, general_length=30)
    prompts.grow()
    prompts.grow()
    assert torch.equal(prompts.experts[1], prompts.experts[0])
    assert not torch.equal(prompts.keys[1], prompts.keys[0])
    assert prompts.general.shape == (2, 2, 30, 24)
    assert prompts.experts[0].shape == (3, 2, 30, 24)
    for values in (prompts.general.detach(), prompts.experts[0].detach()):
        assert -0.5 <= values.min() < -0.49
        assert 0.99 < values.max() < 1.0
        assert float(values.mean()) == pytest.approx(0.25, abs=0.06)
    keys = torch.stack(list(prompts.keys)).detach()
    assert -0.5 <= keys.min() < -0.3
    assert 0.8 < keys.max() < 1.0


def test_by_default_values_are_small():
    prompts = ExpertPrompts(tiny_vit(depth=5))
    prompts.grow()
    values = torch.cat([parameter.detach().flatten() for parameter in prompts.parameters()])
    assert len(values) == (2 + 3) * 2 * 5 * 24 + 24
    assert 0 <= values.min() < 1e-4
    assert 0.0099 < values.max() <= 0.01


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"general_length": -1}, "general_length is -1"),
        ({"expert_length": 0}, "expert_length is 0"),
        ({"low": 2.0}, "low is 2.0"),
        ({"general_blocks": [2]}, r"blocks \[2\]"),
        ({"expert_blocks": []}, r"blocks \[\]"),
    ],
)
def test_options_out_of_range_are_errors(options, words):
    with pytest.raises(ValueError, match=words):
        EXPERTS(tiny_vit(), **options)
