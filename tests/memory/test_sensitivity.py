"""Sensitivity of the outputs to the weights: Fisher information (EWC) and output norm (MAS)."""

from typing import Any

import pytest
import torch
from support.fakes import normal
from support.sensitivity import Net, SoftmaxRegression, batch, batches, network
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.memory import fisher_diagonal, output_norm
from cl_lightning.models import LinearHead, Output

# --- Fisher information (EWC) ----------------------------------------------------------------------------------------


def test_fisher_information_of_softmax_regression_is_its_closed_form():
    weight, image = normal(4, 3), normal(1, 3, seed=1)
    net = SoftmaxRegression(weight)
    fisher = fisher_diagonal(net, dict(net.named_parameters()), [batch(image)])["weight"]
    p = (image @ weight.T).softmax(1)[0]
    torch.testing.assert_close(fisher, (p * (1 - p))[:, None] * image.square(), rtol=1e-14, atol=0)


def plain_fisher(net: nn.Module, images: Tensor, labels: Any) -> dict[str, Tensor]:
    """One sample and one class after the other, by autograd."""
    net.eval()
    total = {name: torch.zeros_like(value) for name, value in net.named_parameters()}
    for i, image in enumerate(images):
        log_p = net(image[None]).logits.log_softmax(1)[0]
        for c in range(len(log_p)):
            share = log_p[c].exp().item() if labels == "exact" else float(labels(i, log_p) == c)
            gradients = torch.autograd.grad(log_p[c], list(net.parameters()), retain_graph=True)
            for name, gradient in zip(total, gradients, strict=True):
                total[name] += share * gradient.square() / len(images)
    net.train()
    return total


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_fisher_information_is_that_of_a_plain_loop_over_samples_and_classes(chunk_size: int | None):
    net, images = network(), normal(7, 2, 4, 4)
    labels = torch.tensor([0, 1, 2, 3, 3, 1, 0])
    truths = {
        "exact": "exact",
        "predicted": lambda i, log_p: int(log_p.argmax()),
        "empirical": lambda i, log_p: int(labels[i]),
    }
    for kind, truth in truths.items():
        fisher = fisher_diagonal(
            net, dict(net.named_parameters()), batches(images, labels), labels=kind, chunk_size=chunk_size
        )
        torch.testing.assert_close(fisher, plain_fisher(net, images, truth), rtol=1e-10, atol=1e-14)


def test_sampled_labels_give_the_exact_fisher_information_in_the_mean():
    weight, image = normal(4, 3), normal(1, 3, seed=1)
    net = SoftmaxRegression(weight)
    parameters = dict(net.named_parameters())
    many = [batch(image.expand(20_000, 3))]
    sampled = fisher_diagonal(net, parameters, many, labels="sampled")["weight"]
    exact = fisher_diagonal(net, parameters, [batch(image)])["weight"]
    torch.testing.assert_close(sampled, exact, rtol=0.03, atol=0)
    again = fisher_diagonal(net, parameters, many, labels="sampled", chunk_size=999)["weight"]
    torch.testing.assert_close(again, sampled)  # the draw belongs to the batch


def test_the_network_comes_back_as_it_was():
    net = network()
    net.norm.eval()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    fisher = fisher_diagonal(net, {"conv.weight": net.conv.weight}, batches(normal(7, 2, 4, 4)))
    assert list(fisher) == ["conv.weight"]
    assert not fisher["conv.weight"].requires_grad
    assert net.training
    assert net.drop.training
    assert not net.norm.training
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_rows_without_label_do_not_count_for_the_empirical_fisher_information():
    net, images, labels = network(), normal(6, 2, 4, 4), torch.tensor([0, -1, 2, -1, 3, 1])
    parameters = dict(net.named_parameters())
    fisher = fisher_diagonal(net, parameters, [batch(images, labels)], labels="empirical")
    known = fisher_diagonal(net, parameters, [batch(images[labels >= 0], labels[labels >= 0])], labels="empirical")
    torch.testing.assert_close(fisher, known)


def test_hidden_classes_take_no_part_in_the_fisher_information():
    weight, images = normal(5, 3), normal(6, 3, seed=1)
    visible = torch.tensor([True, False, True, True, False])
    net, part = SoftmaxRegression(weight), SoftmaxRegression(weight[visible])
    for kind in ("exact", "sampled", "predicted"):
        fisher = fisher_diagonal(net, {"weight": net.weight}, [batch(images)], labels=kind, loss_classes=visible)[
            "weight"
        ]
        alone = fisher_diagonal(part, {"weight": part.weight}, [batch(images)], labels=kind)["weight"]
        torch.testing.assert_close(fisher[visible], alone)
        assert (fisher[~visible] == 0).all()


def test_the_batch_variant_squares_the_gradient_of_the_batch_mean_as_facil_does():
    net, images, labels = network(), normal(10, 2, 4, 4), torch.arange(10) % 4
    fisher = fisher_diagonal(
        net, dict(net.named_parameters()), batches(images, labels), labels="empirical", per_sample=False
    )
    net.eval()
    expected = {name: torch.zeros_like(value) for name, value in net.named_parameters()}
    for part in batches(images, labels):
        loss = F.cross_entropy(net(part.images).logits, part.labels)
        for name, gradient in zip(expected, torch.autograd.grad(loss, list(net.parameters())), strict=True):
            expected[name] += gradient.square() * len(part) / 10
    torch.testing.assert_close(fisher, expected)
    with pytest.raises(ValueError, match="per_sample=False"):
        fisher_diagonal(net, dict(net.named_parameters()), [], per_sample=False)


# --- output norm (MAS) -----------------------------------------------------------------------------------------------


def test_output_norm_is_that_of_a_plain_loop_over_samples():
    net, images = network(), normal(7, 2, 4, 4)
    parameters = dict(net.named_parameters())
    for squared in (True, False):
        omega = output_norm(net, parameters, batches(images), squared=squared, chunk_size=3)
        net.eval()
        expected = {name: torch.zeros_like(value) for name, value in parameters.items()}
        for image in images:
            norm = net(image[None]).logits.norm()
            gradients = torch.autograd.grad(norm**2 if squared else norm, list(net.parameters()))
            for name, gradient in zip(expected, gradients, strict=True):
                expected[name] += gradient.abs() / len(images)
        net.train()
        torch.testing.assert_close(omega, expected, rtol=1e-10, atol=1e-14)


def test_scaling_the_output_scales_its_sensitivity_by_the_square_or_by_the_factor():
    class Scaled(Net):
        def forward(self, images: Tensor) -> Output:
            output = super().forward(images)
            return output._replace(logits=-3 * output.logits)

    net, scaled = network(), Scaled().double()
    scaled.load_state_dict(net.state_dict())
    data = batches(normal(7, 2, 4, 4))
    for squared, factor in ((True, 9.0), (False, 3.0)):
        plain = output_norm(net, dict(net.named_parameters()), data, squared=squared)
        more = output_norm(scaled, dict(scaled.named_parameters()), data, squared=squared)
        torch.testing.assert_close(more, {name: factor * value for name, value in plain.items()})


def test_per_batch_signs_cancel_and_per_sample_they_do_not():
    net = SoftmaxRegression(torch.tensor([[1.0, 2.0]], dtype=torch.float64))
    images = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)  # z = 3, -1; dz^2/dw = 2 z x
    omega = output_norm(net, {"weight": net.weight}, [batch(images)])["weight"]
    torch.testing.assert_close(omega, torch.tensor([[4.0, 4.0]], dtype=torch.float64))
    omega = output_norm(net, {"weight": net.weight}, [batch(images)], per_sample=False)["weight"]
    torch.testing.assert_close(omega, torch.tensor([[2.0, 4.0]], dtype=torch.float64))


def test_nothing_to_differentiate_by_is_an_error_and_no_data_gives_zeros():
    net = network()
    with pytest.raises(ValueError, match="parameters is empty"):
        output_norm(net, {}, [])
    assert output_norm(net, {"conv.bias": net.conv.bias}, [])["conv.bias"].eq(0).all()


class InPlaceNet(nn.Module):
    """Linear layers, one of them followed by an activation in place, under a head that has grown."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.ReLU(inplace=True), nn.Linear(6, 5), nn.Tanh())
        self.head = LinearHead(5)
        self.head.grow(2)
        self.head.grow(3)

    def forward(self, images: Tensor) -> Output:
        features = self.backbone(images)
        return Output(features, self.head(features))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("labels", ["exact", "predicted"])
def test_the_closed_form_of_linear_layers_is_the_sum_over_samples(labels, frozen):
    torch.manual_seed(3)
    net = InPlaceNet().double()
    images = normal(9, 2, 2, 2)
    which = "exact" if labels == "exact" else lambda i, log_p: int(log_p.argmax())
    expected = plain_fisher(net, images, which)
    net.requires_grad_(not frozen)
    found = fisher_diagonal(net, dict(net.named_parameters()), batches(images), labels=labels)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_layers_that_are_used_twice_or_share_weights_have_no_closed_form():
    class Twice(InPlaceNet):
        def forward(self, images: Tensor) -> Output:
            hidden = self.backbone[1](images.flatten(1))
            features = self.backbone[3](self.backbone[3](hidden)[:, [0, 1, 2, 3, 4, 0]])
            return Output(features, self.head(features))

    torch.manual_seed(3)
    net = Twice().double()
    images = normal(5, 2, 2, 2)
    expected = plain_fisher(net, images, "exact")
    found = fisher_diagonal(net, dict(net.named_parameters()), batches(images), labels="exact")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
