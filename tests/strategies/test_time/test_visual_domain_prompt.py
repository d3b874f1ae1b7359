from functools import partial

import pytest
import torch
from support.adaptation import adapt, batches, online_errors, scores, source_network, stream, tiny_resnet, watching

from cl_lightning.models import MLP
from cl_lightning.strategies.test_time import visual_domain_prompt
from cl_lightning.strategies.test_time.bn_adapt import BNAdapt
from cl_lightning.strategies.test_time.source import Source
from cl_lightning.strategies.test_time.visual_domain_prompt import VisualDomainPrompt
from cl_lightning.testing import Subject, small

SLOW = "each step runs the network, its teacher and the source on views"
SUBJECTS = {
    "VisualDomainPrompt": Subject(
        small(VisualDomainPrompt, backbone=tiny_resnet, frame_width=2, teacher_momentum=0.9, shift=0.001),
        first_task_is_finetuning=False,
        reason="prompts are not trained on the source",
    ),
}
WAITS = {"VisualDomainPrompt": {"_notice"}}  # whether the domain has changed

sgd = partial(torch.optim.SGD, lr=1.0)
still = partial(torch.optim.SGD, lr=0.0)


def framed(site: torch.nn.Module, width: int) -> torch.Tensor:
    """The image ``(1, 8, 8)`` that a prompt adds."""
    image = torch.zeros(1, 8, 8)
    image[:, :width], image[:, -width:] = site.rows.detach().chunk(2, dim=1)
    image[:, width:-width, :width], image[:, width:-width, -width:] = site.columns.detach().chunk(2, dim=2)
    return image


def test_the_stream_follows_the_equations(monkeypatch):
    monkeypatch.setattr(visual_domain_prompt, "viewed", lambda strategy, batch, draw: batch.images.flip(-1))
    options = {"importance_weight": 2.0, "damping": 0.01, "shift": 0.03, "teacher_momentum": 0.6, "frame_width": 2}
    strategy = watching(VisualDomainPrompt, **options, optimizer=sgd)
    made = adapt(strategy, stream(corruptions=["gaussian_noise", "defocus_blur", "shot_noise"]))
    net, inside = source_network().requires_grad_(False), torch.ones(1, 8, 8)
    inside[:, 2:-2, 2:-2] = 0
    psi, phi = (torch.zeros(1, 8, 8, requires_grad=True) for _ in range(2))
    teacher = torch.zeros(2, 1, 8, 8)
    rho, omega, anchor, before, changes, expected = 0.0, torch.zeros(1, 8, 8), torch.zeros(1, 8, 8), None, 0, []
    for images, _ in batches(made.datamodule):
        with torch.no_grad():
            z, flipped = (net(part + teacher.sum(0)).logits for part in (images, images.flip(-1)))
            confidence = float(z.softmax(1).max(1).values.mean())
            if before is not None and abs(confidence - before) > 0.03:
                omega = omega + rho.clamp(min=0) / ((phi - anchor).square() + 0.01)
                rho, anchor, changes = 0.0, phi.detach().clone(), changes + 1
            before = confidence
        expected.append(z)
        target = (z.softmax(1) + flipped.softmax(1)) / 2
        logits = net(images + (psi + phi) * inside).logits
        loss = -(target * logits.log_softmax(1)).sum(1).mean()
        [slope] = torch.autograd.grad(loss, psi)
        with torch.no_grad():
            step = -1.0 * (slope + 2.0 * 2 * omega * (phi - anchor)) * inside
            phi += step
            psi -= 1.0 * slope * inside
            rho = rho - slope * step
            teacher = 0.6 * teacher + 0.4 * torch.stack([psi, phi]).detach()
    torch.testing.assert_close(scores(strategy), torch.cat(expected), rtol=1e-3, atol=1e-3)
    assert int(strategy.changes) == changes
    assert changes == 5  # of 11
    sites = strategy.network.backbone.peft.sites
    torch.testing.assert_close(framed(sites[0], 2), psi.detach(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(framed(sites[1], 2), phi.detach(), rtol=1e-3, atol=1e-3)
    assert float((psi - phi).abs().max()) > 0.01  # the penalty held phi
    assert all(bool((value >= 0).all()) for value in strategy.importance.omegas.values())
    source = source_network("source").state_dict()
    for name, value in strategy.network.named_parameters():
        plain = name.replace("backbone.base", "backbone").replace("head.blocks.0", "head")
        assert ".peft." in name or torch.equal(value, source[plain])


def test_a_pixel_that_is_held_settles_where_penalty_and_slope_are_equal():
    strategy = VisualDomainPrompt(backbone=partial(MLP, hidden=()), importance_weight=0.5)
    strategy.build((1, 8, 8))
    strategy._begin()
    phi = strategy._common()
    strategy.importance.merge(phi, {name: torch.full_like(value, 3.0) for name, value in phi.items()})
    for _ in range(200):
        slope = 0.2 * sum(value.sum() for value in phi.values())
        loss = slope + strategy.importance_weight * strategy.importance.penalty(phi)
        gradients = torch.autograd.grad(loss, list(phi.values()))
        with torch.no_grad():
            for value, gradient in zip(phi.values(), gradients, strict=True):
                value -= 0.1 * gradient
    for value in phi.values():
        torch.testing.assert_close(value, torch.full_like(value, -0.2 / (2 * 0.5 * 3.0)))


@pytest.mark.parametrize(("shape", "width"), [((3, 32, 32), 5), ((3, 224, 224), 36), ((1, 8, 8), 1)])
def test_the_frame_is_16_percent_of_the_side(shape, width):
    with torch.device("meta"):
        strategy = VisualDomainPrompt(backbone=partial(MLP, hidden=(2,)))
        strategy.build(shape)
    assert [site.rows.shape[1] for site in strategy.network.backbone.peft.sites] == [2 * width] * 2


def test_prompts_of_0_change_nothing():
    mine, plain = watching(VisualDomainPrompt, optimizer=still), watching(BNAdapt)
    adapt(mine)
    adapt(plain)
    torch.testing.assert_close(scores(mine), scores(plain), rtol=1e-5, atol=1e-5)


def test_a_reset_forgets_the_prompts_and_what_was_important(monkeypatch):
    monkeypatch.setattr(visual_domain_prompt, "viewed", lambda strategy, batch, draw: batch.images.flip(-1))
    both, alone = (watching(VisualDomainPrompt, reset="domain", shift=0.0, optimizer=sgd) for _ in range(2))
    adapt(both)
    adapt(alone, stream(corruptions=["contrast"]))
    assert torch.equal(torch.cat(both.noted[2]), torch.cat(alone.noted[1]))
    assert int(both.changes) == int(alone.changes) == 3  # 4 batches


def test_on_digits_prompts_neither_gain_nor_lose_against_the_statistics_of_the_batch():
    errors = online_errors((Source, {}), (BNAdapt, {}), (VisualDomainPrompt, {}))
    # Measured: errors of .42, .09 and .09; with learning rates up to 0.03 and frames of up to 3 pixels .09 to .11.
    assert errors[2] < errors[0] - 0.15
    assert errors[2] == pytest.approx(errors[1], abs=0.01)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"frame_width": 0}, "frame_width is 0"),
        ({"views": -1}, "views is -1"),
        ({"importance_weight": -1.0}, r"importance_weight is -1\.0"),
        ({"damping": 0.0}, r"damping is 0\.0"),
        ({"shift": -0.1}, r"shift is -0\.1"),
    ],
)
def test_options_out_of_range_are_errors(options, words):
    with pytest.raises(ValueError, match=f"VisualDomainPrompt: .*{words}"):
        VisualDomainPrompt(**options)


def test_the_source_network_is_trained_without_prompts():
    made = adapt(watching(VisualDomainPrompt, backbone=tiny_resnet, source_head=None, optimizer=still), max_epochs=1)
    assert not any(bool(value.any()) for value in made.strategy.network.backbone.peft.parameters())
