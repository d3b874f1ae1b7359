import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Callback
from support.runs import assert_resumes, plain_net, run, sgd

from cl_lightning.strategies.base.schedules import CosineOverPhase
from cl_lightning.strategies.base.stream_schedules import CosineOverStream, InfiniteOverStream, RsqrtOverStream
from cl_lightning.strategies.baselines.finetune import Finetune


class Rates(Callback):
    """Learning rates of the optimizer steps of each task."""

    def __init__(self):
        self.found = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.found.setdefault(pl_module.task.index, []).append(optimizer.param_groups[0]["lr"])


def begun(schedule_class, steps, task=0, tasks=3, **options):
    """A schedule of base rate 2 at the first step of a task."""
    schedule = schedule_class(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0), **options)
    schedule.begin(steps, task, tasks)
    return schedule


def rates(schedule_class, steps, task=0, tasks=3, **options):
    """Rates of the steps of a task, and the rate after it."""
    schedule = begun(schedule_class, steps, task, tasks, **options)
    found = [schedule.get_last_lr()[0]]
    for _ in range(steps):
        schedule.optimizer.step()
        schedule.step()
        found.append(schedule.get_last_lr()[0])
    return found


@pytest.mark.parametrize("decay", ["cosine", "rsqrt", "linear"])
def test_an_infinite_schedule_is_its_equations(decay):
    expected = []
    for n in range(21):  # 4 steps of warm-up, 8 of cool-down
        p = (n - 4) / 8
        if n < 4:
            rate = (n + 1) / 5
        elif n < 12:
            rate = {
                "cosine": 0.2 + 0.8 * (1 + math.cos(math.pi * p)) / 2,
                "rsqrt": 1 - 0.8 * (1 - (1 + 10 * p) ** -0.5) / (1 - 11**-0.5),
                "linear": 1 - 0.8 * p,
            }[decay]
        else:
            rate = 0.2
        expected.append(2 * rate)
    options = {"warmup": 0.2, "cooldown": 0.4, "constant": 0.2, "final": 0.05, "decay": decay}
    assert rates(InfiniteOverStream, 20, **options) == pytest.approx(expected)
    assert rates(InfiniteOverStream, 20, task=1, **options) == pytest.approx([0.4] * 21)
    annealed = [0.4] * 15 + [0.4 * 0.25 ** ((n - 15) / 5) for n in range(15, 21)]
    options["anneal"] = 0.25
    assert rates(InfiniteOverStream, 20, task=2, **options) == pytest.approx(annealed)
    assert annealed[-1] == pytest.approx(0.1)
    assert rates(InfiniteOverStream, 20, task=2, anneals="never", **options) == pytest.approx([0.4] * 21)
    assert rates(InfiniteOverStream, 20, task=1, anneals="each", **options) == pytest.approx(annealed)
    assert rates(InfiniteOverStream, 20, task=0, anneals="each", **options) == pytest.approx(
        expected[:15] + annealed[15:]
    )


@pytest.mark.parametrize("decay", ["cosine", "rsqrt", "linear"])
def test_an_infinite_schedule_is_continuous_over_the_stream(decay):
    whole = []
    for task in range(3):
        *found, after = rates(InfiniteOverStream, 1000, task, decay=decay)
        whole += found
    whole.append(after)
    steepest = 2 * 0.9 / (1 - 11**-0.5) * 5 / 100 if decay == "rsqrt" else 2 / 50  # else the slope of the warm-up
    assert max(abs(b - a) for a, b in pairwise(whole)) < steepest
    assert after == pytest.approx(0.02)
    assert whole[1000] == whole[999] == pytest.approx(0.2)


def test_without_cool_down_and_annealing_it_is_warm_up_and_constant():
    found = rates(InfiniteOverStream, 10, tasks=1, warmup=0.3, cooldown=0.0, anneal=0.0, constant=1.0)
    assert found == pytest.approx([0.5, 1.0, 1.5, *[2.0] * 8])
    assert rates(InfiniteOverStream, 1, tasks=1)[1] == pytest.approx(0.2)  # a task of one step has no annealing


def test_an_annealing_may_begin_anywhere_from_the_rate_there():
    found = rates(InfiniteOverStream, 10, tasks=1, warmup=0.2, cooldown=0.6, anneal=0.5, final=0.01)
    here = 0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2  # in the middle of the cool-down
    assert found[5:] == pytest.approx([2 * here * (0.01 / here) ** (n / 5) for n in range(6)])


def test_the_peaks_of_a_cosine_follow_a_cosine_over_the_stream():
    long = 100_000
    peaks = [max(rates(CosineOverStream, 50, task, final=0.0)) / 2 for task in range(4)]
    assert peaks == pytest.approx(
        [1.0, *((1 + math.cos(math.pi * (45 * t + 1) / (45 * t + 45))) / 2 for t in (1, 2, 3))]
    )
    limits = [begun(CosineOverStream, long, t, final=0.001).factor(long // 10) for t in (1, 2, 3)]
    assert limits == pytest.approx([0.5005, 0.25075, 0.14730], abs=1e-3)
    found = rates(CosineOverStream, 10, task=1, warmup=0.2, final=0.1)
    peak = 0.1 + 0.9 * (1 + math.cos(math.pi * 9 / 16)) / 2
    inside = [2 * (0.1 + (peak - 0.1) * (1 + math.cos(math.pi * n / 8)) / 2) for n in range(9)]
    assert found == pytest.approx([2 * peak / 3, 4 * peak / 3, *inside])
    assert found[-1] == pytest.approx(0.2)


def test_in_the_first_task_it_is_a_cosine_over_the_phase():
    first = rates(CosineOverStream, 20, warmup=0.15, final=0.1)
    assert first == pytest.approx(rates(CosineOverPhase, 20, warmup=3, final=0.1))


def test_inverse_square_roots_are_their_equations():
    peaks = [begun(RsqrtOverStream, 100, t, final=0.0).factor(10) for t in range(4)]
    assert peaks == pytest.approx([1.0, *(math.sqrt((t + 1) * 10 / (t * 100 + 10)) for t in (1, 2, 3))])
    assert peaks[1:] == pytest.approx([0.426, 0.378, 0.359], abs=1e-3)
    found = rates(RsqrtOverStream, 20, task=1, warmup=0.2, cooldown=0.25, final=0.1)
    peak = 0.1 + 0.9 * math.sqrt(2 * 4 / (20 + 4))
    curve = [0.1 + math.sqrt(4 / n) * (peak - 0.1) for n in range(4, 16)]
    expected = [*(peak * n / 5 for n in (1, 2, 3, 4)), *curve[:-1], *(curve[-1] * n / 5 for n in (5, 4, 3, 2, 1, 0))]
    assert found == pytest.approx([2 * rate for rate in expected])


def test_a_continued_inverse_square_root_is_one_curve_over_the_stream():
    # 10 steps: 2 of warm-up and 3 of cool-down, so that task t is on the curve from 2 + 5 t on
    curve = [0.1 + 0.9 * math.sqrt(2 / n) for n in range(2, 30)]
    for task in range(4):
        options = {"warmup": 0.2, "cooldown": 0.3, "final": 0.1, "form": "continued"}
        found = rates(RsqrtOverStream, 10, task, **options)
        assert found[2:8] == pytest.approx([2 * rate for rate in curve[5 * task : 5 * task + 6]])
        assert found[7:] == pytest.approx([2 * curve[5 * task + 5] * n / 3 for n in (3, 2, 1, 0)])
        assert found[:2] == pytest.approx([2 * curve[5 * task] * n / 3 for n in (1, 2)])
    peaks = [begun(RsqrtOverStream, 100, t, final=0.0, form="continued").factor(10) for t in (1, 2)]
    assert peaks == pytest.approx([math.sqrt(10 / 90), math.sqrt(10 / (2 * 90 - 10))])


@pytest.mark.parametrize("schedule_class", [InfiniteOverStream, CosineOverStream, RsqrtOverStream])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_phases_of_few_steps_have_rates_between_0_and_the_base_rate(schedule_class, steps):
    for task in range(3):
        found = rates(schedule_class, steps, task)
        assert all(0 < rate <= 2.0 for rate in found[:-1])


@pytest.mark.parametrize(
    "build", [InfiniteOverStream, CosineOverStream, RsqrtOverStream, partial(RsqrtOverStream, form="continued")]
)
def test_a_schedule_of_a_checkpoint_continues_at_its_step(build):
    straight = rates(build, 20, task=2)
    schedule, again = begun(build, 20, task=2), begun(build, 9)
    for _ in range(17):
        schedule.optimizer.step()
        schedule.step()
    again.optimizer.load_state_dict(schedule.optimizer.state_dict())
    again.load_state_dict(schedule.state_dict())
    for n in (18, 19, 20):
        again.optimizer.step()
        again.step()
        assert again.get_last_lr()[0] == straight[n]


def test_steps_are_optimizer_steps_also_of_accumulated_gradients_in_every_task():
    watch = Rates()
    options = {"warmup": 0.25, "cooldown": 0.25, "anneal": 0.5, "constant": 0.2, "final": 0.05}
    build = partial(InfiniteOverStream, **options)
    strategy = Finetune(backbone=plain_net, optimizer=sgd, scheduler=build, scheduler_interval="step")
    run(strategy, watch, max_epochs=2, accumulate_grad_batches=2)
    assert len(watch.found) == 3
    for task, found in watch.found.items():
        assert found == pytest.approx([0.025 * r for r in rates(InfiniteOverStream, len(found), task, **options)[:-1]])


def test_a_run_resumes_in_the_middle_of_a_schedule(tmp_path):
    build = partial(RsqrtOverStream, form="continued")
    strategy = partial(Finetune, backbone=plain_net, optimizer=sgd, scheduler=build, scheduler_interval="step")
    assert_resumes(lambda: (strategy(), []), tmp_path)


def test_options_out_of_range_are_refused():
    infinite = {"warmup": 1.0, "cooldown": -0.1, "anneal": 1.1, "constant": 0.0, "final": 2.0}
    wrong = {
        InfiniteOverStream: infinite | {"decay": "step", "anneals": "first"},
        CosineOverStream: {"warmup": 1.0, "final": -0.1},
        RsqrtOverStream: {"warmup": 0.0, "cooldown": 1.0, "final": 1.1, "form": "both"},
    }
    for schedule_class, options in wrong.items():
        for name, value in options.items():
            with pytest.raises(ValueError, match=f"{schedule_class.__name__}: {name} is "):
                rates(schedule_class, 4, **{name: value})
    with pytest.raises(ValueError, match="sum must be at most 1"):
        rates(InfiniteOverStream, 4, warmup=0.6, cooldown=0.5)
