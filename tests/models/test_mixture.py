"""Several networks of which one is current."""

import copy
from functools import partial

import torch
from support.fakes import normal

from cl_lightning.models import MLP, LinearHead, Mixture, Network

SHAPE = (1, 2, 2)


def mixture(count=3, columns=(2, 1)):
    torch.manual_seed(0)
    build = partial(MLP, hidden=(5,))
    made = Mixture([Network(build(SHAPE), LinearHead(5)) for _ in range(count)])
    for number in columns:
        made.grow(number)
    return made.double()


def test_the_current_network_answers():
    made, images = mixture(), normal(4, *SHAPE)
    assert (made.current, made.used) == (0, 1)
    for number in (0, 2, 1):
        made.choose(number)
        member = made.members[number]
        assert made.backbone is member.backbone
        assert made.head is member.head
        assert torch.equal(made(images).logits, member(images).logits)
        assert torch.equal(made.classify(images), member.classify(images))
        assert made.place.tolist() == [made.current, made.used]
    assert (made.current, made.used) == (1, 3)


def test_scores_are_of_the_networks_in_use():
    made, images = mixture(), normal(4, *SHAPE)
    assert torch.equal(made.scores_of(images), made.members[0].classify(images)[None])
    made.choose(1)
    expected = torch.stack([made.members[number].classify(images) for number in range(2)])
    assert torch.equal(made.scores_of(images), expected)
    assert expected.shape == (2, 4, 3)
    assert not torch.equal(expected[0], expected[1])


def test_heads_grow_together_and_a_loaded_mixture_has_the_same_place_and_shape():
    made, images = mixture(), normal(4, *SHAPE)
    made.choose(2)
    made.choose(1)
    assert [member.head.num_columns for member in made.members] == [3, 3, 3]
    fresh = mixture(columns=())
    fresh.choose(2)
    fresh.load_state_dict(copy.deepcopy(made.state_dict()))
    fresh.double()
    assert (fresh.current, fresh.used) == (1, 3)
    assert torch.allclose(fresh(images).logits, made(images).logits, rtol=1e-6)
    assert len(list(made.parameters())) == 3 * (2 + 4)  # each weight once
