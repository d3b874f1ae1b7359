import functools

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization
from lightning.pytorch.profilers import SimpleProfiler
from torch import nn

from cl_lightning.datamodules.digits import Digits
from cl_lightning.loop import TaskLoop
from cl_lightning.loop.fast_step import FastOptimization, SilentProfiler, install_fast_steps
from cl_lightning.models import MLP
from cl_lightning.strategies.base.optimizers import fuse
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.stream import ClassIncremental


def trained(build, *, fused: bool) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    optimizer = build(net.parameters())
    if fused:
        fuse(optimizer)
        assert all(group["fused"] for group in optimizer.param_groups)
    for _ in range(5):
        optimizer.zero_grad()
        net(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
    return net


@pytest.mark.parametrize(
    "build",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
        lambda p: torch.optim.Adam(p, lr=0.01),
        lambda p: torch.optim.AdamW(p, lr=0.01),
    ],
)
def test_a_fused_optimizer_takes_the_same_steps(build):
    plain, fused = trained(build, fused=False), trained(build, fused=True)
    for expected, found in zip(plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_parameters_may_get_their_first_gradient_later_than_others(momentum):
    def trained(fused):
        torch.manual_seed(0)
        first, second = nn.Linear(4, 4), nn.Linear(4, 4)
        optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1, momentum=momentum)
        if fused:
            fuse(optimizer)
        for step in range(4):
            optimizer.zero_grad()
            hidden = first(torch.randn(3, 4))
            (second(hidden) if step in (1, 3) else hidden).square().mean().backward()
            optimizer.step()
        return [*first.parameters(), *second.parameters()]

    for expected, found in zip(trained(False), trained(True), strict=True):
        torch.testing.assert_close(found, expected)


def test_dampened_momentum_is_left_alone():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9, dampening=0.5)
    fuse(optimizer)
    assert not optimizer.param_groups[0]["fused"]


@pytest.mark.parametrize("told", [{"fused": False}, {"foreach": True}, {"foreach": False}])
def test_what_was_asked_for_stays(told):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, **told)
    before = dict(optimizer.param_groups[0])
    fuse(optimizer)
    assert optimizer.param_groups[0]["fused"] == before["fused"]


def test_an_optimizer_that_cannot_be_fused_stays():
    optimizer = torch.optim.RMSprop([nn.Parameter(torch.ones(2))], lr=0.1)
    fuse(optimizer)
    assert "fused" not in optimizer.param_groups[0]


def test_only_a_profiler_that_records_nothing_is_taken_out():
    trainer = Trainer(logger=False, enable_checkpointing=False)
    install_fast_steps(trainer)
    assert isinstance(trainer.profiler, SilentProfiler)
    with trainer.profiler.profile("anything"):
        pass
    trainer = Trainer(logger=False, enable_checkpointing=False, profiler=SimpleProfiler())
    install_fast_steps(trainer)
    assert isinstance(trainer.profiler, SimpleProfiler)


class Noting(Callback):
    """Notes the hooks of a step, in their order, and what they are given."""

    def __init__(self):
        self.notes = []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.notes.append(("zero", pl_module._current_fx_name, isinstance(optimizer, torch.optim.Optimizer)))

    def on_before_backward(self, trainer, pl_module, loss):
        self.notes.append(("before", pl_module._current_fx_name, loss.requires_grad))

    def on_after_backward(self, trainer, pl_module):
        norm = sum(float(p.grad.square().sum()) for p in pl_module.parameters() if p.grad is not None)
        self.notes.append(("after", pl_module._current_fx_name, round(norm, 5)))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.notes.append(("step", pl_module._current_fx_name, trainer.global_step))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.notes.append(("end", trainer.global_step, round(float(outputs["loss"]), 5), outputs["loss"].requires_grad))


class Halving(Finetune):
    """Edits gradients."""

    def edit_gradients(self, batch):
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)


def run(strategy, *, lean, optimizer=None, **options):
    noting = Noting()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        callbacks=[noting],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    data = Digits(scenario=ClassIncremental(tasks=5), batch_size=60)
    made = strategy(backbone=functools.partial(MLP, hidden=[16]), optimizer=optimizer)
    loop = TaskLoop(trainer, made, data)
    if not lean:
        trainer.fit_loop.epoch_loop.automatic_optimization = _AutomaticOptimization(trainer)
    loop.fit()
    return made.state_dict(), noting.notes, trainer


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        (Finetune, {}),
        (Halving, {"gradient_clip_val": 0.3}),
        (Halving, {"precision": "bf16-mixed"}),
        (Finetune, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
        (Finetune, {"accumulate_grad_batches": 2}),
    ],
)
def test_a_lean_step_is_that_of_lightning_to_the_bit(strategy, options):
    weights, notes, trainer = run(strategy, lean=True, **options)
    expected, expected_notes, plain = run(strategy, lean=False, **options)
    assert notes == expected_notes
    assert trainer.global_step == plain.global_step
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name
    saved, wanted = (t.fit_loop.epoch_loop.automatic_optimization.state_dict() for t in (trainer, plain))
    assert saved == wanted
    counts = [t.fit_loop.epoch_loop.automatic_optimization.optim_progress for t in (trainer, plain)]
    assert counts[0].state_dict() == counts[1].state_dict()


class Short(Finetune):
    """Leaves out the argument that Lightning lets one leave out."""

    def training_step(self, batch):
        return super().training_step(batch, 0)


class Asking(torch.optim.SGD):
    """Needs the closure, as an optimizer of second steps does."""

    def step(self, closure):
        return super().step(closure)


class OwnBackward(Finetune):
    def backward(self, loss, *args, **kwargs):
        super().backward(2 * loss)


@pytest.mark.parametrize(
    ("strategy", "optimizer"), [(Finetune, functools.partial(Asking, lr=0.1)), (OwnBackward, None), (Short, None)]
)
def test_what_needs_the_step_of_lightning_gets_it(strategy, optimizer):
    weights, *_ = run(strategy, lean=True, optimizer=optimizer)
    expected, *_ = run(strategy, lean=False, optimizer=optimizer)
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name


def test_another_optimization_than_that_of_lightning_stays():
    class Other(_AutomaticOptimization):
        pass

    trainer = Trainer(logger=False, enable_checkpointing=False)
    trainer.fit_loop.epoch_loop.automatic_optimization = other = Other(trainer)
    install_fast_steps(trainer)
    assert trainer.fit_loop.epoch_loop.automatic_optimization is other
    trainer = Trainer(logger=False, enable_checkpointing=False)
    install_fast_steps(trainer)
    assert isinstance(trainer.fit_loop.epoch_loop.automatic_optimization, FastOptimization)


def test_the_current_hook_is_noted_and_modules_are_still_registered():
    strategy = Finetune()
    strategy._current_fx_name = "training_step"
    assert strategy._current_fx_name == "training_step"
    strategy.extra = nn.Linear(2, 2)
    assert "extra.weight" in strategy.state_dict()
