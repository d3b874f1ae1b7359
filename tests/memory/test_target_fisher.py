"""Fisher information of several labels and of numbers, against gradients of each sample."""

import pytest
import torch
from torch import nn

from cl_lightning.batch import Batch, Draw
from cl_lightning.memory import fisher_diagonal, output_norm
from cl_lightning.models import LinearHead, Network, Output


def network(outputs):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh())
    head = LinearHead(3)
    head.grow(outputs)
    return Network(backbone, head).double()


def batches(count=5):
    images = torch.randn(count, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    nothing = torch.zeros(count, dtype=torch.int64)
    return [Batch(images, nothing, nothing, nothing, images, Draw.of(count, 0))]


@pytest.mark.parametrize("labels", ["exact", "sampled"])
@pytest.mark.parametrize("target", ["labels", "number"])
def test_it_is_the_expectation_over_the_targets(target, labels):
    net = network(1 if target == "number" else 3)
    parameters = dict(net.named_parameters())
    found = fisher_diagonal(net, parameters, batches(), labels=labels, target=target)
    expected = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for image in batches()[0].images:
        logits = net(image[None]).logits[0]
        for place, z in enumerate(logits):
            gradients = torch.autograd.grad(z, list(parameters.values()), retain_graph=True)
            p = float(logits[place].sigmoid())
            # E over y of (y - p)^2 is p (1 - p); of a normal number of variance 1 it is 1
            spread = p * (1 - p) if target == "labels" else 1.0
            for name, gradient in zip(parameters, gradients, strict=True):
                expected[name] += spread * gradient**2 / 5
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-9), name


def test_labels_of_other_tasks_have_none():
    net = network(3)
    only = torch.tensor([False, True, False])
    found = fisher_diagonal(net, dict(net.named_parameters()), batches(), target="labels", loss_classes=only)
    rows = found["head.blocks.0.weight"].sum(1)
    assert rows[1] > 0
    assert (rows[[0, 2]] == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"target": "pixels"}, "'pixels'"), ({"target": "number", "labels": "predicted"}, "'predicted'"),
     ({"target": "labels", "per_sample": False}, "per_sample False")],
)  # fmt: skip
def test_what_has_no_expectation_is_refused(options, message):
    net = network(1)
    with pytest.raises(ValueError, match=message):
        fisher_diagonal(net, dict(net.named_parameters()), batches(), **options)


def test_the_norm_of_maps_of_logits_is_a_mean_over_places():
    class Pixels(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(1, 2, 1).double()

        def forward(self, images):
            return Output(images, self.layer(images))

    net = Pixels()
    parameters = dict(net.named_parameters())
    found = output_norm(net, parameters, batches())
    for name, value in parameters.items():
        expected = torch.zeros_like(value)
        for image in batches()[0].images:
            norm = net(image[None]).logits.square().sum() / 4
            expected += torch.autograd.grad(norm, value)[0].abs() / 5
        assert torch.allclose(found[name], expected, rtol=1e-9)
