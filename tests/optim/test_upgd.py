from functools import partial

import pytest
import torch
from support.fakes import normal
from support.runs import assert_resumes, plain_net, run
from torch import nn

from cl_lightning.optim.upgd import UPGD
from cl_lightning.strategies.baselines.finetune import Finetune

FORMS = [
    {},
    {"scope": "local"},
    {"order": 2},
    {"protects": False},
    {"adam": True, "betas": (0.8, 0.9)},
    {"doubled": True, "weight_decay": 0.1},
    {"adam": True, "scope": "local", "order": 2, "protects": False},
]


def weights(seed: int = 0) -> list[nn.Parameter]:
    return [nn.Parameter(normal(*shape, seed=seed + i)) for i, shape in enumerate([(3, 4), (4,), (2, 3, 2), (1,)])]


def gradients(made: list[nn.Parameter], step: int) -> None:
    for i, weight in enumerate(made):
        weight.grad = normal(*weight.shape, seed=100 * step + i)


@pytest.mark.parametrize("options", FORMS)
def test_steps_are_their_equations_and_both_forms_agree(options):
    fast, slow, plain = weights(), weights(), [w.detach().clone() for w in weights()]
    options = {"lr": 0.1, "utility_decay": 0.9, "noise": 0.3, **options}
    optimizers = [UPGD(fast, **options), UPGD(slow, **options, foreach=False)]
    one, two = options.get("betas", (0.9, 0.999))
    U, m, v = ([torch.zeros_like(w) for w in plain] for _ in range(3))  # noqa: N806
    for t in range(1, 5):
        for made, optimizer in zip((fast, slow), optimizers, strict=True):
            gradients(made, t)
            optimizer.step()
        g = [w.grad for w in fast]
        for i, w in enumerate(plain):
            u = -g[i] * w + (0.5 * g[i] ** 2 * w**2 if options.get("order") == 2 else 0)
            U[i] = 0.9 * U[i] + 0.1 * u
            m[i], v[i] = one * m[i] + (1 - one) * g[i], two * v[i] + (1 - two) * g[i] ** 2
        eta = max(float(part.max()) for part in U)
        for i, w in enumerate(plain):
            corrected = U[i] / (1 - 0.9**t)
            if options.get("scope") == "local":
                norm = corrected.norm(dim=-1, keepdim=True) if corrected.dim() else corrected.abs()
                s = torch.sigmoid(corrected / norm)
            else:
                s = torch.sigmoid(corrected / eta)
            xi = optimizers[0]._noise(w, i, t, 0.3)
            step = g[i]
            if options.get("adam"):
                step = m[i] / (1 - one**t) / ((v[i] / (1 - two**t)).sqrt() + 1e-8)
            step = step + xi * (1 - s) if options.get("protects") is False else (step + xi) * (1 - s)
            factor = 2 if options.get("doubled") or options.get("adam") else 1
            plain[i] = (1 - 0.1 * options.get("weight_decay", 0)) * w - 0.1 * factor * step
        for mine, twin, expected in zip(fast, slow, plain, strict=True):
            torch.testing.assert_close(mine.detach(), expected)
            torch.testing.assert_close(twin.detach(), expected)


def test_the_most_useful_weight_keeps_a_quarter_of_its_step():
    weight = nn.Parameter(torch.tensor([3.0, 1.0]).double())
    weight.grad = torch.tensor([-2.0, 0.5]).double()
    UPGD([weight], lr=1.0, noise=0.0, utility_decay=0.0).step()
    torch.testing.assert_close(
        weight.detach()[0], torch.tensor(3 + 2 * (1 - torch.sigmoid(torch.tensor(1.0)).item())).double()
    )
    assert 1 - torch.sigmoid(torch.tensor(1.0)).item() == pytest.approx(0.269, abs=1e-3)


def test_with_equal_utilities_of_0_it_is_sgd_of_half_the_rate():
    weight = nn.Parameter(torch.zeros(4).double())  # u = -g w = 0, s = 1/2
    for doubled, factor in ((False, 0.5), (True, 1.0)):
        with torch.no_grad():
            weight.zero_()
        weight.grad = normal(4)
        UPGD([weight], lr=0.1, noise=0.0, doubled=doubled).step()
        torch.testing.assert_close(weight.detach(), -0.1 * factor * normal(4))


def test_negative_utilities_do_not_change_their_order():
    weight = nn.Parameter(torch.tensor([1.0, 1.0]).double())
    weight.grad = torch.tensor([3.0, 1.0]).double()  # utilities -3 and -1
    UPGD([weight], lr=0.1, noise=0.0, utility_decay=0.0).step()
    torch.testing.assert_close(weight.detach(), torch.tensor([0.7, 0.9]).double())  # both are free to move


def test_noise_is_normal_of_the_step_and_the_parameter_and_missing_gradients_do_not_move():
    first, second, idle = (nn.Parameter(torch.zeros(4000)) for _ in range(3))
    optimizer = UPGD([first, second, idle], lr=1.0, noise=0.5)
    for step in range(2):
        before = first.detach().clone()
        first.grad, second.grad = torch.zeros(4000), torch.zeros(4000)
        optimizer.step()
        if step == 0:
            assert abs(float(first.std()) - 0.25) < 0.01  # (1 - s) sigma
            assert abs(float((first.detach() * second.detach()).mean())) < 0.005
        else:
            change = first.detach() - before
            assert abs(float((change * before).mean())) < 0.01
    assert not idle.any()
    assert not optimizer.state[idle]


def test_its_state_goes_into_a_checkpoint():
    options = {"lr": 0.1, "noise": 0.1, "adam": True}
    straight, stopped = weights(), weights()
    whole, broken = UPGD(straight, **options), UPGD(stopped, **options)
    for step in (1, 2):
        for made, optimizer in ((straight, whole), (stopped, broken)):
            gradients(made, step)
            optimizer.step()
    again = UPGD(stopped, **options)
    again.load_state_dict(broken.state_dict())
    for made, optimizer in ((straight, whole), (stopped, again)):
        gradients(made, 3)
        optimizer.step()
    for mine, other in zip(straight, stopped, strict=True):
        assert torch.equal(mine, other)


def test_any_strategy_takes_it_and_resumes(tmp_path):
    optimizer = partial(UPGD, lr=0.2, noise=0.01)
    assert_resumes(lambda: (Finetune(backbone=plain_net, optimizer=optimizer), []), tmp_path)


def test_it_learns_a_stream():
    """Digits, each task right after it: measured .98.

    It forgets no less there than SGD: at a minimum of the loss, utilities of first order are near 0, and no weight is
    protected more than another.
    """
    optimizer = partial(UPGD, lr=0.4, noise=0.001)
    made = run(Finetune(backbone=plain_net, optimizer=optimizer, loss_classes="current"), max_epochs=8)
    found = float(made.matrix.R_ti.diagonal().mean())
    assert found > 0.85


def test_options_out_of_range_are_refused():
    wrong = {"lr": -1, "weight_decay": -1, "utility_decay": 1.0, "noise": -1, "scope": "row", "order": 3, "eps": 0}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            UPGD(weights(), **{name: value})
    with pytest.raises(ValueError, match="betas"):
        UPGD(weights(), betas=(0.9, 1.0))
