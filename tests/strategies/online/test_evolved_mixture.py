"""Evolved mixture model for task-free learning."""

from functools import partial

import pytest
import torch
from support.baselines import finetuning
from support.fakes import batch_of, normal
from support.runs import plain_net, run

from cl_lightning.batch import Draw, join
from cl_lightning.models import VAE, gaussian_kernel, square_distances, two_sample_distance
from cl_lightning.strategies.online.evolved_mixture import EvolvedMixture, least_redundant, thresholds_of
from cl_lightning.stream import ClassIncremental
from cl_lightning.testing import Subject, small

tiny_vae = partial(VAE, hidden=(6,), latent=2)
digit_vae = partial(VAE, hidden=(128,), latent=8)
adam = partial(torch.optim.Adam, lr=0.01)
SUBJECTS = {
    "EvolvedMixture": Subject(
        small(
            EvolvedMixture,
            max_components=3,
            generator=tiny_vae,
            generator_weight=0.01,
            warmup=4,
            threshold=0.0,
            compared=10,
        ),
        first_task_is_finetuning=False,
        reason="the network has several components",
    ),
}
WAITS = {"EvolvedMixture": {"evolve", "unlike_all"}}  # whether a component is added


def test_the_threshold_is_exceeded_by_one_in_twenty_pairs_of_equal_samples():
    orders = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(k)) for k in range(60)])
    labels, above = (torch.arange(40) < 20).double(), 0
    for seed in range(100):
        kernel = gaussian_kernel(square_distances(normal(40, 3, seed=seed)))
        above += bool(two_sample_distance(kernel, labels[None])[0] > thresholds_of(kernel, 20, 0.95, orders))
    assert 1 <= above <= 13  # of 100, 5 expected, deviation 2.2
    shifted = torch.cat([normal(20, 3), normal(20, 3, seed=1) + 2])
    kernel = gaussian_kernel(square_distances(shifted))
    assert two_sample_distance(kernel, labels[None])[0] > thresholds_of(kernel, 20, 1.0, orders)
    distances = torch.stack([two_sample_distance(kernel, (order < 15).double()[None])[0] for order in orders])
    torch.testing.assert_close(thresholds_of(kernel, 15, 0.8, orders), distances.quantile(0.8))
    assert not torch.isclose(thresholds_of(kernel, 15, 0.8, orders), thresholds_of(kernel, 16, 0.8, orders))


def test_the_most_redundant_rows_are_dropped_and_one_of_two_equal_rows_stays():
    rows = torch.tensor([[0.0], [5.0], [0.0], [5.5], [9.0]])
    kernel = gaussian_kernel(square_distances(rows))
    assert least_redundant(kernel, 5).tolist() == [0, 1, 2, 3, 4]
    assert least_redundant(kernel, 4).tolist() == [0, 1, 3, 4]
    assert least_redundant(kernel, 3).tolist() == [0, 1, 4]


def strategy_with(count=12, **options):
    """A strategy with a full memory of images of 2 x 2 pixels."""
    torch.manual_seed(0)
    options = {"memory_size": count, "max_components": 3, "compared": 6, "warmup": 0, **options}
    strategy = EvolvedMixture(backbone=plain_net, generator=tiny_vae, **options)
    strategy.build((1, 2, 2))
    strategy.network.grow(2)
    labels = torch.arange(count) % 2
    raw = (255 * normal(count, 1, 2, 2).sigmoid()).to(torch.uint8)
    strategy.memory.add(raw, labels, labels, Draw.of(count, 1))
    strategy.ends[0], strategy.ends[1] = -1.0, 3.0  # normalised with the mean 1/4 and the deviation 1/4

    def finish(batch):
        return batch.replace(images=4 * batch.raw.float() / 255 - 1)

    strategy.data.finish = finish
    return strategy, raw


def test_pixels_are_those_before_the_normalisation():
    strategy, raw = strategy_with()
    torch.testing.assert_close(strategy.pixels(4 * raw.float() / 255 - 1), raw / 255)
    assert strategy.pixels(torch.full((1, 1, 2, 2), 9.0)).max() == 1


def generates(images):
    """A generator that has these samples."""
    made = tiny_vae((1, 2, 2))
    made.sample = lambda noise: images[: len(noise)]
    return made


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_a_component_is_added_if_all_components_are_unlike_the_memory(threshold):
    for close, used in (((), 2), ((0,), 1), ((1,), 2)):  # component 1 is not in use
        strategy, raw = strategy_with(threshold=threshold, random_dropout=0.0)
        order = torch.randperm(12, generator=Draw.of(4, 5).fork(0xE02).generator())
        same = raw[order[:6]] / 255
        far = torch.ones(6, 1, 2, 2)
        strategy.generators = torch.nn.ModuleList(generates(same if k in close else far) for k in range(3))
        strategy.evolve(Draw.of(4, 5))
        assert strategy.network.used == used
        assert strategy.network.current == used - 1
        assert len(strategy.memory) == 6


@pytest.mark.parametrize(("close", "used"), [((), 3), ((0,), 2), ((1,), 2)])
def test_one_component_that_is_like_the_memory_is_enough(close, used):
    strategy, raw = strategy_with(random_dropout=0.0, threshold=0.3)
    strategy.network.choose(1)
    order = torch.randperm(12, generator=Draw.of(4, 5).fork(0xE02).generator())
    same, far = raw[order[:6]] / 255, torch.ones(6, 1, 2, 2)
    strategy.generators = torch.nn.ModuleList(generates(same if k in close else far) for k in range(3))
    strategy.steps.fill_(7)
    strategy.evolve(Draw.of(4, 5))
    assert strategy.network.used == used
    assert int(strategy.steps) == (0 if used == 3 else 7)


def test_a_step_trains_the_current_component():
    strategy, _ = strategy_with(count=2)
    strategy.memory.keep(torch.zeros(0, dtype=torch.int64))
    strategy.network.choose(2)
    labels = torch.tensor([0, 1])
    strategy.prepare_batch(batch_of(labels, images=torch.zeros(2, 1, 2, 2, dtype=torch.uint8)))
    assert strategy._trained == {strategy.network.members[2], strategy.generators[2]}
    torch.testing.assert_close(strategy.ends.flatten(), torch.tensor([-1.0, 3.0]))


def test_the_distance_to_a_component_is_that_of_its_samples():
    for factor, used in ((0.99, 2), (1.01, 1)):
        strategy, raw = strategy_with()
        order = torch.randperm(12, generator=Draw.of(4, 5).fork(0xE02).generator())
        some, others = raw[order[:6]].flatten(1) / 255, normal(6, 4, seed=3).sigmoid().float()
        kernel = gaussian_kernel(square_distances(torch.cat([some, others])))
        distance = float(kernel[:6, :6].mean() + kernel[6:, 6:].mean() - 2 * kernel[:6, 6:].mean())
        strategy.threshold = factor * distance
        strategy.generators[0] = generates(others.view(6, 1, 2, 2))
        strategy.evolve(Draw.of(4, 5))
        assert strategy.network.used == used


def test_a_component_needs_its_steps_and_there_is_a_largest_number():
    strategy, _ = strategy_with(threshold=0.0, warmup=3, max_components=2, random_dropout=1.0)
    for step, used in ((2, 1), (3, 2), (9, 2)):
        strategy.steps.fill_(step)
        strategy.evolve(Draw.of(4, step))
        assert strategy.network.used == used
        assert len(strategy.memory) == 0  # all are dropped
        raw = torch.zeros(12, 1, 2, 2, dtype=torch.uint8)
        strategy.memory.add(raw, torch.zeros(12).long(), torch.zeros(12).long(), Draw.of(12, 1))
    assert int(strategy.steps) == 9
    assert strategy.network.current == 1


def test_the_random_dropout_keeps_its_share_and_then_the_quota_holds():
    strategy, raw = strategy_with(count=400, kept=0.99, random_dropout=0.25, max_components=1)
    strategy.evolve(Draw.of(4, 5))
    assert 270 < len(strategy.memory) < 330
    strategy, raw = strategy_with(kept=0.3, random_dropout=0.0, max_components=1)
    kernel = gaussian_kernel(square_distances(raw.flatten(1) / 255))
    strategy.evolve(Draw.of(4, 5))
    assert torch.equal(strategy.memory.images, raw[least_redundant(kernel, 3)])


def test_the_losses_are_of_the_current_component_on_all_samples():
    strategy, _ = strategy_with(generator_weight=0.5)
    strategy.network.choose(1)
    batch = batch_of(torch.tensor([0, 1, 1]), images=normal(3, 1, 2, 2).float())
    joint = join({"stream": batch, "replay": batch_of(torch.tensor([1]), images=normal(1, 1, 2, 2, seed=4).float())})
    strategy._trained = {strategy.network.members[1], strategy.generators[1]}
    terms = strategy.losses(joint, strategy.network(joint.images))
    noise = torch.cat([part.draw.fork(0xE01).randn(2) for _, part in joint.parts.values()])
    expected = 0.5 * strategy.generators[1].loss(strategy.pixels(joint.images), noise)
    torch.testing.assert_close(terms["generator"], expected)
    sum(terms.values()).backward()
    strategy.edit_gradients(batch)
    got = {k for k, part in enumerate(strategy.generators) if all(p.grad is not None for p in part.parameters())}
    assert got == {1}
    assert {
        k for k, part in enumerate(strategy.network.members) if any(p.grad is not None for p in part.parameters())
    } == {1}


def test_the_component_of_the_largest_bound_predicts():
    strategy, _ = strategy_with()
    strategy.network.choose(1)
    strategy.eval()
    images = normal(60, 1, 2, 2).float()
    found = strategy.predict(images)
    pixels, nothing = strategy.pixels(images), torch.zeros(60, 2)
    bounds = torch.stack([strategy.generators[k].losses(pixels, nothing) for k in range(2)])
    chosen = bounds.argmin(dim=0)
    assert len(chosen.unique()) == 2
    scores = strategy.network.scores_of(images)
    assert torch.equal(found, torch.stack([scores[k, i] for i, k in enumerate(chosen.tolist())]))


# ---------------------------------------------------------------------- behaviour


def test_components_follow_the_data_and_old_classes_are_kept():
    # Measured: .74, a component for each task, added 6 and 2 steps after the change; of fine-tuning .29.
    options = {"data": {"scenario": ClassIncremental(sizes=[4, 3, 3]), "batch_size": 16}, "max_epochs": 3}
    strategy = EvolvedMixture(
        backbone=plain_net,
        optimizer=adam,
        generator=digit_vae,
        memory_size=100,
        compared=50,
        warmup=40,
        max_components=3,
    )
    made = run(strategy, **options)
    plain = finetuning({"backbone": plain_net, "optimizer": adam}, **options)
    assert made.strategy.network.used == 3
    mean, std = made.datamodule.mean[0], made.datamodule.std[0]
    expected = torch.tensor([-mean / std, (1 - mean) / std])
    torch.testing.assert_close(strategy.ends.flatten(), expected, rtol=1e-5, atol=1e-5)
    assert made.matrix.measures()["average_accuracy"] > plain.measures()["average_accuracy"] + 0.25


def test_options_out_of_range_are_errors():
    for options, message in (
        ({"threshold": -1.0}, "EvolvedMixture: threshold is -1"),
        ({"warmup": -1}, "EvolvedMixture: warmup is -1"),
        ({"quantile": 1.5}, r"EvolvedMixture: quantile is 1.5; it must be in \[0, 1\]"),
        ({"permutations": 0}, "EvolvedMixture: permutations is 0"),
        ({"compared": 1}, "EvolvedMixture: compared is 1"),
        ({"random_dropout": 2.0}, "EvolvedMixture: random_dropout is 2"),
        ({"kept": 1.0}, r"EvolvedMixture: kept is 1.0; it must be in \(0, 1\)"),
        ({"generator_weight": -1.0}, "EvolvedMixture: generator_weight is -1"),
        ({"max_components": 0}, "EvolvedMixture: max_components is 0"),
        ({"freeze_backbone": True}, "EvolvedMixture: freeze_backbone is True"),
    ):
        with pytest.raises(ValueError, match=message):
            EvolvedMixture(**options)
