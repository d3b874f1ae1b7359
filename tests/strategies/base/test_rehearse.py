import copy
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from support.fakes import normal
from support.runs import NormNet
from torch.nn import functional as F

from cl_lightning.batch import Draw
from cl_lightning.memory import Memory
from cl_lightning.models import LinearHead, Network
from cl_lightning.strategies.base import finetune_on_memory, module_of, norms_and_head, of_memory, sensitivities

HEAD = ["head.blocks.0.weight", "head.blocks.0.bias"]


def case(**fields):
    head = LinearHead(16)
    head.grow(3)
    network = Network(NormNet((1, 4, 4)), head).double()
    network.backbone.layers[4].p = 0.0
    images = torch.randint(256, (10, 1, 4, 4), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    labels = torch.arange(10) % 3
    memory = Memory(10)
    memory.add(images, labels, torch.zeros_like(labels), Draw.of(10, 1), **fields)
    data = SimpleNamespace(augment=lambda batch: batch.replace(images=batch.raw.double() / 255))
    return SimpleNamespace(data=data), network, memory


@pytest.mark.parametrize("decays", [True, False])
@pytest.mark.parametrize("weight", [0.0, 0.6])
def test_the_steps_are_those_of_sgd_on_all_samples_along_a_half_cosine(decays, weight):
    stored = normal(10, 3, seed=4)
    strategy, network, memory = case(logits=stored)
    other = copy.deepcopy(network)
    options = {"steps": 4, "batch_size": 50, "lr": 0.3, "key": 7, "logit_weight": weight, "decays": decays}
    finetune_on_memory(strategy, network, memory, HEAD, **options)
    other.eval()
    x, y, z = memory.images.double() / 255, memory.labels, memory.fields["logits"]
    for step in range(4):
        output = other(x).logits
        loss = F.cross_entropy(output, y) + weight * (output - z).square().mean()
        lr = 0.3 * (1 + math.cos(math.pi * step / 4)) / 2 if decays else 0.3
        gradients = torch.autograd.grad(loss, list(other.head.parameters()))
        with torch.no_grad():
            for value, gradient in zip(other.head.parameters(), gradients, strict=True):
                value -= lr * gradient
    torch.testing.assert_close(dict(network.named_parameters()), dict(other.named_parameters()))
    assert not torch.equal(stored, memory.fields["logits"].flip(0))


@pytest.mark.parametrize("names", [HEAD, ["backbone.layers.2.weight"], []])
def test_only_the_named_parameters_and_the_statistics_of_their_layers_change(names):
    strategy, network, memory = case()
    network.backbone.layers[1].bias.requires_grad_(False)
    network.backbone.layers[2].eval()
    network.head.blocks[0].bias.grad = held = torch.ones(3).double()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    asked = [value.requires_grad for value in network.parameters()]
    modes = [module.training for module in network.modules()]
    finetune_on_memory(strategy, network, memory, names, steps=3, batch_size=4, lr=0.1, key=1)
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    statistics = {f"backbone.layers.2.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert changed == set(names) | (statistics if "backbone.layers.2.weight" in names else set())
    assert [value.requires_grad for value in network.parameters()] == asked
    assert [module.training for module in network.modules()] == modes
    assert network.head.blocks[0].bias.grad is held


def test_each_step_draws_other_samples_and_an_empty_memory_changes_nothing():
    strategy, network, memory = case()
    seen = []
    augment = strategy.data.augment
    strategy.data.augment = lambda batch: seen.append(batch.labels.tolist()) or augment(batch)
    finetune_on_memory(strategy, network, memory, HEAD, steps=5, batch_size=4, lr=0.1, key=1)
    assert [len(labels) for labels in seen] == [4] * 5
    assert len({tuple(labels) for labels in seen}) > 2
    before = copy.deepcopy(network.state_dict())
    finetune_on_memory(strategy, network, Memory(5), HEAD, steps=5, batch_size=4, lr=0.1, key=1)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_normalisation_and_head_are_the_modules_that_are_known_to_be_sensitive():
    _, network, _ = case()
    assert norms_and_head(network) == ["backbone.layers.2.weight", "backbone.layers.2.bias", *HEAD]


def test_the_sensitivity_is_the_mean_change_per_parameter_of_a_module():
    before = {"a.b.weight": torch.zeros(2, 2), "a.b.bias": torch.zeros(2), "head.blocks.0.bias": torch.ones(2)}
    after = {"a.b.weight": torch.tensor([[1.0, -2.0], [0.0, 0.0]]), "a.b.bias": torch.tensor([3.0, 0.0])}
    after |= {"head.blocks.0.bias": torch.tensor([1.0, 2.0]), "head.blocks.1.bias": torch.tensor([9.0])}
    assert sensitivities(before, after) == {"a.b": 1.0, "head": 0.5}
    assert [module_of(name) for name in after] == ["a.b", "a.b", "head", "head"]


def test_after_a_step_of_plain_sgd_the_sensitivity_is_the_learning_rate_times_the_mean_size_of_the_gradient():
    _, network, memory = case()
    start = {name: value.detach().clone() for name, value in network.named_parameters()}
    F.cross_entropy(network(memory.images.double() / 255).logits, memory.labels).backward()
    torch.optim.SGD(network.parameters(), lr=0.2).step()
    found = sensitivities(start, dict(network.named_parameters()))
    slopes = torch.cat([value.grad.flatten() for value in network.backbone.layers[1].parameters()])
    assert found["backbone.layers.1"] == pytest.approx(0.2 * float(slopes.abs().mean()))


@pytest.mark.parametrize("size", [3, 100])
def test_a_function_of_a_memory_has_a_row_for_each_sample(size):
    strategy, network, memory = case()
    strategy.network = network
    strategy.data.finish, strategy.data.augment = strategy.data.augment, None
    strategy.data.module = SimpleNamespace(eval_batch_size=size)
    strategy.trainer = SimpleNamespace(precision_plugin=SimpleNamespace(forward_context=nullcontext))
    network.train()
    lengths = []

    def logits(samples):
        assert not network.training
        lengths.append(len(samples))
        return network(samples.images).logits

    found = of_memory(strategy, memory, logits)
    assert network.training
    assert not found.requires_grad
    assert lengths == ([3, 3, 3, 1] if size == 3 else [10])
    network.eval()
    torch.testing.assert_close(found, network(memory.images.double() / 255).logits)
