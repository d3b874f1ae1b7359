from functools import partial

import pytest
import torch
from support.fakes import normal
from support.pretrained import PretrainedViT, TinyViT, finetuning_in_tasks, in_tasks, tiny_transformer

from cl_lightning.measures import last_accuracy
from cl_lightning.models import MLP, DirectionSets
from cl_lightning.strategies.pretrained.sd_lora import SDLoRA
from cl_lightning.testing import Subject, small

REASON = "low-rank factors are trained, in a frozen backbone"
SUBJECTS = {
    "SDLoRA": Subject(
        small(SDLoRA, backbone=tiny_transformer, rank=3, reduced_ranks={1: 2}, merge_below=0.5),
        first_task_is_finetuning=False,
        reason=REASON,
    ),
}
SLOW = "a transformer, whose directions add up from task to task"

PUBLISHED = {
    "sd_lora": {
        "source": "arXiv:2501.13198, CIFAR-100",
        "backbone": "Timm(name=vit_base_patch16_224.augreg_in21k_ft_in1k, pretrained=True)",
        "rank": 10,
        "magnitude": 0.8,
        "optimizer": "SGD(lr=0.008, momentum=0.9)",
        "data.resize": 256,
        "data.center_crop": 224,
        "data.interpolation": "bicubic",
        "data.mean": [0.5],
        "data.std": [0.5],
        "data.transforms": ["RandomResizedCrop(scale=[0.05, 1.0], size=224)", "RandomHorizontalFlip()"],
        "data.batch_size": 128,
        "data.scenario": "ClassIncremental(class_order=1993, tasks=10)",
        "trainer.max_epochs": 20,
    },
}

sgd = partial(torch.optim.SGD, lr=0.02, momentum=0.9)
IMAGES = normal(3, 1, 8, 8).float()


def drawn(ranks, *, settled=True):
    """A model with directions whose factors are drawn; all but the last are settled, or all."""
    model = TinyViT((1, 8, 8)).double()
    sets = DirectionSets(model).double()
    for number, rank in enumerate(ranks):
        sets.grow(rank, 0.8)
        sets.double()
        for place, site in enumerate(sets.layers):
            site.ups[-1].data = normal(2, 24, rank, seed=10 * number + place)
            site.downs[-1].data = normal(2, rank, 24, seed=100 + 10 * number + place)
        if settled or number < len(ranks) - 1:
            sets.settle()
    return model, sets


def change_of(site, magnitudes):
    """Delta W of queries and of values of a layer, ``(2, 24, 24)``, term by term."""
    return sum(
        alpha.detach() * site.sizes[i].detach()[:, None, None] * site.ups[i].detach() @ site.downs[i].detach()
        for i, alpha in enumerate(magnitudes)
    )


def adapted(model, sets):
    """Output of the model with the changes in its weights."""
    other = TinyViT((1, 8, 8)).double()
    other.load_state_dict(model.state_dict())
    for block, site in zip(other.model.blocks, sets.layers, strict=True):
        query, value = change_of(site, sets.magnitudes)
        block.attn.qkv.weight.data[:24] += query
        block.attn.qkv.weight.data[48:] += value
    return other(IMAGES.double())


def test_queries_and_values_change_by_the_sum_over_the_directions():
    model, sets = drawn([3, 2, 1], settled=False)
    torch.testing.assert_close(model(IMAGES.double()), adapted(model, sets), rtol=1e-10, atol=1e-12)
    for alpha in sets.magnitudes:
        alpha.data.zero_()
    with sets.disabled():
        expected = model(IMAGES.double())
    torch.testing.assert_close(model(IMAGES.double()), expected, rtol=0, atol=1e-12)


def test_a_task_ends_without_a_change_of_the_outputs_and_directions_have_norm_1():
    model, sets = drawn([3, 2], settled=False)
    before, magnitude = model(IMAGES.double()), float(sets.magnitudes[1])
    norms = torch.stack([site.norms() for site in sets.layers])
    sets.settle()
    torch.testing.assert_close(model(IMAGES.double()), before, rtol=1e-10, atol=1e-12)
    assert float(sets.magnitudes[1]) == pytest.approx(magnitude * float(norms.mean()))
    torch.testing.assert_close(torch.stack([site.sizes[1].detach() for site in sets.layers]), norms / norms.mean())
    for site in sets.layers:
        for factors in (site.ups[1], site.downs[1]):
            torch.testing.assert_close(factors.detach().flatten(1).norm(dim=1), torch.ones(2).double())


def test_the_released_form_loses_the_size_of_the_branch():
    model, sets = drawn([3], settled=False)
    before = model(IMAGES.double())
    sets.settle(released=True)
    assert float(sets.magnitudes[0]) == pytest.approx(0.8)
    assert all(site.sizes[0].eq(1).all() for site in sets.layers)
    assert (model(IMAGES.double()) - before).abs().max() > 1e-3


def test_products_are_those_of_the_changes_of_all_layers():
    _, sets = drawn([3, 2, 1])
    sizes = [torch.eye(3).double()[number] for number in range(3)]
    for site in sets.layers:
        vectors = torch.stack([change_of(site, size).flatten() for size in sizes])
        torch.testing.assert_close(site.products(), vectors @ vectors.T, rtol=1e-10, atol=1e-12)


def test_a_direction_that_earlier_ones_express_is_left_out_without_a_change():
    model, sets = drawn([3, 2, 3])
    for site in sets.layers:  # the third is twice the first, with other factors
        turn = torch.linalg.qr(normal(3, 3))[0]
        site.ups[2].data = site.ups[0].data @ turn
        site.downs[2].data = turn.T @ site.downs[0].data
        site.sizes[2].data = 2 * site.sizes[0].data
    before, magnitudes = model(IMAGES.double()), [float(alpha) for alpha in sets.magnitudes]
    assert sets.merge_newest(1e-9)
    assert len(sets) == 2
    assert [len(group) for site in sets.layers for group in (site.ups, site.downs, site.sizes)] == [2] * 6
    torch.testing.assert_close(model(IMAGES.double()), before, rtol=1e-9, atol=1e-10)
    found = [float(alpha) for alpha in sets.magnitudes]
    assert found == pytest.approx([magnitudes[0] + 2 * magnitudes[2], magnitudes[1]])


def test_the_residual_is_relative_to_the_direction():
    _, sets = drawn([3, 2])
    gram = torch.stack([site.products() for site in sets.layers]).sum(dim=0)
    residual = float(1 - gram[0, 1] ** 2 / gram[0, 0] / gram[1, 1])
    assert not sets.merge_newest(residual - 1e-6)
    assert sets.merge_newest(residual + 1e-6)
    assert not drawn([3])[1].merge_newest(1.0)  # nothing to express it by


def test_a_task_trains_its_factors_and_all_magnitudes():
    strategy = in_tasks(partial(SDLoRA, backbone=TinyViT, rank=3, reduced_ranks={2: 2, 4: 1}), 5).strategy
    names = {name for name, parameter in strategy.network.backbone.named_parameters() if parameter.requires_grad}
    prefix = "peft."
    own = {f"{prefix}sites.{site}.{kind}.4" for site in (0, 1) for kind in ("ups", "downs")}
    assert names == own | {f"{prefix}magnitudes.{number}" for number in range(5)}
    assert [up.shape[-1] for up in strategy.directions.layers[0].ups] == [3, 3, 2, 2, 1]
    assert len({float(alpha) for alpha in strategy.directions.magnitudes}) == 5


def test_directions_below_the_bound_are_left_out():
    made = in_tasks(partial(SDLoRA, backbone=TinyViT, rank=3, merge_below=1.0), 5)
    assert len(made.strategy.directions) == 1
    assert len(in_tasks(partial(SDLoRA, backbone=TinyViT, rank=3, merge_below=0.0), 5).strategy.directions) == 5


def test_it_forgets_less_than_finetuning():
    common = {"backbone": PretrainedViT, "optimizer": sgd}
    made = in_tasks(partial(SDLoRA, **common, rank=4), 5, max_epochs=2)
    finetune = finetuning_in_tasks(common, 5, max_epochs=2)
    # Measured: .39 against .15; with the cross-entropy of the task alone fine-tuning has .30.
    assert last_accuracy(made.matrix.R_ci) > last_accuracy(finetune.R_ci) + 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "SDLoRA: rank is 0; it must be at least 1"),
        ({"magnitude": 0.0}, "magnitude is 0.0"),
        ({"merge_below": 1.5}, "merge_below is 1.5"),
        ({"reduced_ranks": {0: 3}}, "rank 3 from task 0 on; give tasks and ranks of at least 1"),
        ({"reduced_ranks": {3: 0}}, "rank 0 from task 3 on"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SDLoRA(**options)


def test_a_backbone_without_attention_is_refused():
    with pytest.raises(ValueError, match="SDLoRA: MLP has no transformer blocks"):
        SDLoRA(backbone=MLP).build((1, 8, 8))
