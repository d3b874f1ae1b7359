import math

import pytest
import torch

from cl_lightning.strategies.base.schedules import CosineOverPhase, QuarterCosineOverPhase, StepsOverPhase, WarmRestarts


def rates(schedule_class, epochs, **options):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = schedule_class(optimizer, **options)
    schedule.begin(epochs)
    found = []
    for _ in range(epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found, optimizer.param_groups[0]["lr"]


def test_a_cosine_goes_from_the_base_rate_to_its_end_over_any_phase():
    found, last = rates(CosineOverPhase, 4)
    torch.testing.assert_close(torch.tensor(found), torch.tensor([2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5]))
    assert last == pytest.approx(0)
    assert rates(CosineOverPhase, 8, final=0.1)[1] == pytest.approx(0.2)


def test_a_warm_up_rises_to_the_base_rate():
    found, _ = rates(CosineOverPhase, 5, warmup=3)
    assert found[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    found, last = rates(CosineOverPhase, 6, warmup=2, final=0.1)  # cosine of 0, 45, 90, 135, 180 degrees
    cosines = [1.0, 0.5**0.5, 0.0, -(0.5**0.5)]
    assert found == pytest.approx([2 / 3, 4 / 3, *(0.2 + 1.8 * (1 + cosine) / 2 for cosine in cosines)])
    assert last == pytest.approx(0.2)
    assert rates(CosineOverPhase, 3, warmup=2)[1] == pytest.approx(0.0)  # a cosine of one epoch
    assert rates(CosineOverPhase, 1)[1] == pytest.approx(0.0)
    with pytest.raises(ValueError, match="CosineOverPhase: warmup is -1"):
        rates(CosineOverPhase, 4, warmup=-1)


@pytest.mark.parametrize(("schedule_class", "end"), [(CosineOverPhase, 0.0), (QuarterCosineOverPhase, 0.015707)])
def test_after_the_phase_the_rate_stays(schedule_class, end):
    schedule = schedule_class(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0))
    schedule.begin(4)
    assert [schedule.factor(epoch) for epoch in (4, 5, 8)] == pytest.approx([end] * 3, abs=1e-6)


def test_steps_come_at_fractions_of_the_phase():
    assert rates(StepsOverPhase, 4)[0] == pytest.approx([2, 2, 0.2, 0.02])
    assert rates(StepsOverPhase, 10, at=[0.3], gamma=0.5)[0] == pytest.approx([2] * 3 + [1] * 7)


def test_a_resumed_schedule_continues_at_its_step():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = CosineOverPhase(optimizer)
    schedule.begin(4)
    optimizer.step()
    schedule.step()
    other = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    again = CosineOverPhase(other)
    again.begin(9)
    other.load_state_dict(optimizer.state_dict())
    again.load_state_dict(schedule.state_dict())
    for one in (schedule, again):
        one.optimizer.step()
        one.step()
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == pytest.approx(1.0)


@pytest.mark.parametrize("options", [{"at": [0.7, 0.5]}, {"at": [1.5]}, {"gamma": 0.0}])
def test_impossible_steps_are_refused(options):
    (name, _), *_ = options.items()
    with pytest.raises(ValueError, match=f"StepsOverPhase: {name} is "):
        rates(StepsOverPhase, 4, **options)


def test_an_impossible_cosine_is_refused():
    with pytest.raises(ValueError, match=r"CosineOverPhase: final is 2\.0"):
        rates(CosineOverPhase, 4, final=2.0)


def test_a_quarter_of_a_cosine_falls_late():
    found, _ = rates(QuarterCosineOverPhase, 5)
    assert found == pytest.approx([2 * math.cos(99 * math.pi * e / (200 * 4)) for e in range(5)])
    assert found[-1] == pytest.approx(0.0157 * 2, rel=1e-3)
    assert rates(QuarterCosineOverPhase, 1)[0] == [2.0]
    assert rates(QuarterCosineOverPhase, 2)[0] == pytest.approx([2.0, 2 * math.cos(math.radians(89.1))])


def test_a_late_quarter_of_a_cosine_has_the_released_factors_of_coda_prompt():
    found, _ = rates(QuarterCosineOverPhase, 20, late=1)
    factors = [rate / 2 for rate in found]
    assert factors[:3] == pytest.approx([1.0, 1.0, 0.996652], abs=1e-6)  # cos(89.1 / 19 degrees)
    assert factors[-1] == pytest.approx(0.097400, abs=1e-6)  # cos(89.1 * 18 / 19 degrees)
    with pytest.raises(ValueError, match="QuarterCosineOverPhase: late is -1"):
        rates(QuarterCosineOverPhase, 4, late=-1)


def test_warm_restarts_begin_at_powers_of_two_after_an_epoch_at_a_tenth():
    found, last = rates(WarmRestarts, 9, final=0.5)
    half = 0.5**0.5
    expected = [0.2, 2.0, 2.0, 1.5, 2.0, 1.5 + 0.5 * half, 1.5, 1.5 - 0.5 * half, 2.0]
    assert found == pytest.approx(expected)
    assert last == pytest.approx(1.5 + 0.5 * math.cos(math.pi / 8))
    with pytest.raises(ValueError, match="WarmRestarts: final is 2"):
        rates(WarmRestarts, 3, final=2)
