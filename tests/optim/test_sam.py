"""Sharpness-aware minimisation: the two papers' equations, and the second pass of strategies."""

import copy
from functools import partial

import pytest
import torch
import yaml
from support.command import SHORT
from support.fakes import normal
from support.runs import NormNet, assert_same, assert_same_run, plain_net, run, sgd
from torch import nn

from cl_lightning.cli import main
from cl_lightning.optim import GSAM, SAM
from cl_lightning.strategies.baselines.finetune import Finetune

STEP = partial(torch.optim.SGD, lr=0.1)


def close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=tolerance, atol=tolerance)


def bowl(a, b):
    """A function of two tensors with the gradients a^3 and (1 + b)^2."""
    return a.pow(4).sum() / 4 + (1 + b).pow(3).sum() / 3


def weights():
    return normal(3, 2, requires_grad=True), normal(4, seed=1, requires_grad=True)


def closure_of(optimizer, a, b):
    def closure():
        optimizer.zero_grad()
        loss = bowl(a, b)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("kind", [SAM, GSAM])
def test_a_step_has_the_gradient_of_the_papers(kind, foreach):
    a, b = weights()
    w = torch.cat([a.detach().flatten(), b.detach()])

    def slope(w):
        return torch.cat([w[:6] ** 3, (1 + w[6:]) ** 2])

    g = slope(w)
    g_s = slope(w + 0.3 * g / sum(float(x) ** 2 for x in g) ** 0.5)
    if kind is GSAM:
        unit = g_s / float(g_s @ g_s) ** 0.5
        g_s = g_s - 0.7 * (g - float(g @ unit) * unit)
    extra = {"alpha": 0.7} if kind is GSAM else {}
    optimizer = kind([{"params": [a]}, {"params": [b], "lr": 0.02}], STEP, rho=0.3, foreach=foreach, **extra)
    loss = optimizer.step(closure_of(optimizer, a, b))
    close(loss, bowl(w[:6], w[6:]))
    close(a.flatten(), w[:6] - 0.1 * g_s[:6])
    close(b, w[6:] - 0.02 * g_s[6:])


@pytest.mark.parametrize(("first", "second"), [((SAM, {"rho": 0.0}), None), ((GSAM, {"alpha": 0.0}), (SAM, {}))])
def test_limit_cases_are_the_simpler_optimizer_to_the_bit(first, second):
    ends = []
    for choice in (first, second):
        pair = weights()
        optimizer = sgd(pair) if choice is None else choice[0](pair, sgd, **choice[1])
        for _ in range(4):
            optimizer.step(closure_of(optimizer, *pair))
        ends.append(pair)
    assert all(torch.equal(mine, other) for mine, other in zip(*ends, strict=True))


def test_the_radius_of_gsam_follows_the_schedule_of_the_learning_rate():
    optimizer = GSAM(weights(), STEP, rho=0.5, min_rho=0.1)
    assert optimizer.radius() == 0.5
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 4)
    optimizer.step(closure_of(optimizer, *optimizer.param_groups[0]["params"]))
    schedule.step()
    assert optimizer.base.param_groups[0]["lr"] == pytest.approx(0.075)
    assert optimizer.radius() == pytest.approx(0.1 + 0.4 * 0.75)
    assert GSAM(weights(), STEP, rho=0.5).radius() == 0.5


def test_weights_are_restored_to_the_bit_also_after_an_error():
    a, b = weights()
    still = nn.Parameter(torch.ones(2))  # without a gradient
    optimizer = SAM([a, b, still], STEP, rho=0.3)
    before = [value.detach().clone() for value in (a, b, still)]
    bowl(a, b).backward()

    def crash():
        assert not torch.equal(a, before[0])
        assert torch.equal(still, before[2])
        raise KeyError

    with pytest.raises(KeyError), optimizer.perturbed():
        crash()
    assert all(torch.equal(value, old) for value, old in zip((a, b, still), before, strict=True))
    with pytest.raises(ValueError, match=r"SAM: step\(\) has no closure"):
        optimizer.step()  # the second pass did not end


def test_a_gradient_of_0_moves_nothing():
    a = nn.Parameter(torch.zeros(3))
    optimizer = GSAM([a], STEP)
    optimizer.step(lambda: a.pow(2).sum().backward())
    assert torch.equal(a, torch.zeros(3))


def test_a_loaded_state_continues_as_without_a_stop():
    def made():
        pair = weights()
        return pair, GSAM(pair, partial(torch.optim.Adam, lr=0.1))

    (pair, optimizer), (other, resumed) = made(), made()
    for _ in range(3):
        optimizer.step(closure_of(optimizer, *pair))
    with torch.no_grad():
        for mine, value in zip(other, pair, strict=True):
            mine.copy_(value)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.param_groups is resumed.base.param_groups
    assert resumed.state is resumed.base.state
    for _ in range(2):
        optimizer.step(closure_of(optimizer, *pair))
        resumed.step(closure_of(resumed, *other))
    assert all(torch.equal(mine, value) for mine, value in zip(other, pair, strict=True))
    assert_same(dict(enumerate(resumed.state.values())), dict(enumerate(optimizer.state.values())))


def test_groups_that_are_added_are_groups_of_the_base_optimizer():
    a, b = weights()
    optimizer = SAM([a], STEP)
    optimizer.add_param_group({"params": [b], "lr": 0.5})
    assert [group["lr"] for group in optimizer.base.param_groups] == [0.1, 0.5]
    assert optimizer.param_groups is optimizer.base.param_groups


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match="SAM: rho is -1; it must be at least 0"):
        SAM(weights(), rho=-1)
    with pytest.raises(ValueError, match="GSAM: alpha is -1"):
        GSAM(weights(), alpha=-1)
    with pytest.raises(ValueError, match="GSAM: min_rho is -1"):
        GSAM(weights(), min_rho=-1)


class Recording(Finetune):
    """Keeps the weights and batches of the steps, up to the second optimizer step."""

    def __init__(self, **options):
        super().__init__(**options)
        self.states, self.seen = [], []

    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch, batch_idx)
        self.states.append(copy.deepcopy(self.network))
        self.seen.append(batch)


@pytest.mark.parametrize(("batches", "clip"), [(1, None), (2, None), (2, 0.1)])
def test_the_second_pass_of_a_strategy_covers_all_accumulated_batches_and_comes_before_clipping(batches, clip):
    strategy = Recording(backbone=plain_net, optimizer=partial(SAM, base=STEP, rho=0.5))
    options = {"accumulate_grad_batches": batches, "gradient_clip_val": clip, "max_epochs": 1}
    run(strategy, **options)
    before, after = strategy.states[0], strategy.states[batches]

    def slope(network):
        network = copy.deepcopy(network)
        for batch in strategy.seen[:batches]:
            logits = network(batch.images).logits
            (nn.functional.cross_entropy(logits, batch.labels) / batches).backward()
        return [value.grad for value in network.parameters()]

    g = slope(before)
    moved = copy.deepcopy(before)
    norm = torch.cat([part.flatten() for part in g]).norm()
    with torch.no_grad():
        for value, part in zip(moved.parameters(), g, strict=True):
            value += 0.5 * part / norm
    g_s = slope(moved)
    length = torch.cat([part.flatten() for part in g_s]).norm()
    share = 1.0 if clip is None else min(1.0, clip / float(length))
    assert clip is None or share < 0.5
    for old, new, part in zip(before.parameters(), after.parameters(), g_s, strict=True):
        close(new - old, -0.1 * share * part, 1e-6)


def test_without_a_perturbation_statistics_dropout_and_logs_are_those_of_one_pass():
    def learnt(optimizer):
        loop = run(Finetune(backbone=NormNet, optimizer=optimizer), accumulate_grad_batches=2)
        return loop, loop.strategy.terms.state_dict(torch.device("cpu"))

    (plain, terms), (twice, same) = learnt(sgd), learnt(partial(SAM, base=sgd, rho=0.0))
    assert_same_run(plain, twice)
    assert terms == same


class Counting(Finetune):
    """Losses that count, in a buffer, how often they are computed."""

    def __init__(self, **options):
        super().__init__(**options)
        self.register_buffer("calls", torch.zeros(()))

    def losses(self, batch, output):
        self.calls += 1
        return super().losses(batch, output)


def test_losses_that_change_a_buffer_are_refused_before_training():
    strategy = Counting(backbone=plain_net, optimizer=SAM)
    with pytest.raises(ValueError, match=r"optimizer is SAM, .* losses change the buffer .calls.; use another"):
        run(strategy, options={"dry_run": True})
    assert strategy.calls == 0


def test_the_command_line_builds_it_around_any_optimizer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = "--model Finetune --model.optimizer GSAM --model.optimizer.alpha 0.1"
    options += " --model.optimizer.base torch.optim.Adam --model.optimizer.base.lr 0.003"
    assert main(["fit", *options.split(), *SHORT]) == 0
    (last,) = tmp_path.glob("runs/Finetune/0000/**/last.ckpt")
    config = next(tmp_path.glob("runs/Finetune/0000/config.yaml")).read_text()
    chosen = yaml.safe_load(config)["model"]["init_args"]["optimizer"]
    assert chosen["class_path"] == "cl_lightning.optim.GSAM"
    assert chosen["init_args"]["base"]["init_args"]["lr"] == 0.003
    assert last.is_file()


def test_gradients_that_an_earlier_phase_left_behind_take_no_part():
    class Stale(Finetune):
        """The backbone keeps a gradient although it is not trained."""

        def on_train_start(self):
            super().on_train_start()
            for value in self.network.backbone.parameters():
                assert not value.requires_grad
                value.grad = torch.ones_like(value)

    options = {"backbone": plain_net, "freeze_backbone": True, "optimizer": partial(SAM, base=STEP, rho=0.5)}
    made = [run(cls(**options), max_epochs=1).strategy for cls in (Stale, Finetune)]
    assert_same(*(strategy.network.head.state_dict() for strategy in made))
